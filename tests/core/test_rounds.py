"""A round from its tasks to its commit, and the ways in which it ends without one."""

from __future__ import annotations

import pytest

from fl_server.core.events import (
    Aggregate,
    Aggregated,
    Answer,
    AnswerFromStore,
    DeadlinePassed,
    Discard,
    EffectFailed,
    IssueTask,
    SaveReport,
    SaveRound,
    StoreReturned,
    UpdateLost,
    WakeAt,
)
from fl_server.core.model import GlobalModel, ModelId, Phase, Status, UpdateId, Verdict
from fl_server.core.session import step
from tests.core.story import aggregated, attach, detach, kinds, one, running, started, task, update, updates


def test_the_commit_the_next_round_and_its_tasks_are_one_step() -> None:
    session, effects = started()
    assert kinds(effects) == ["SaveSession", "Answer", "SaveRound", *["IssueTask"] * 3, "WakeAt"]
    updates(session, "c1", "c0")
    assert kinds(update(session, "c2")) == ["SaveReport", "Answer", "Fold", "SaveRound", "Aggregate", "WakeAt"]
    committed = ["SaveSession", "SaveModel", "Discard", "SaveRound", *["IssueTask"] * 3, "WakeAt"]
    assert kinds(aggregated(session)) == committed
    assert (session.record.model.id, running(session).record.number) == ("m1", 2)


def test_a_deadline_with_too_few_updates_fails_the_attempt_then_the_session() -> None:
    session, _ = started()
    update(session, "c0")
    assert one(step(session, DeadlinePassed(), 180.0), SaveRound).record.reason == "1 of 2 updates, 0 rejected"
    assert (session.record.status, session.record.reason) == (Status.RUNNING, "1 of 2 updates, 0 rejected")
    step(session, DeadlinePassed(), 185.0)
    assert running(session).record.attempt == 2 and running(session).record.phase is Phase.TRAINING
    step(session, DeadlinePassed(), 400.0)
    assert session.record.status is Status.FAILED
    assert session.record.reason == "round 1: 0 of 2 updates, 0 rejected"


def test_a_deadline_with_enough_updates_goes_on_without_the_others() -> None:
    session, _ = started()
    updates(session, "c0", "c2")
    assert [r.task.client for r in one(step(session, DeadlinePassed(), 180.0), Aggregate).reports] == ["c0", "c2"]
    assert one(update(session, "c1", at=181.0), Answer).reply is Verdict.LATE


def test_any_event_after_the_deadline_closes_the_round_without_the_bell() -> None:
    session, _ = started()
    updates(session, "c0", "c2")
    assert one(detach(session, "c1", 200.0), Aggregate)


def test_a_commit_forgets_why_an_earlier_attempt_failed() -> None:
    session, _ = started()
    step(session, DeadlinePassed(), 180.0)
    step(session, DeadlinePassed(), 185.0)
    for name in ("c0", "c1", "c2"):
        update(session, name, attempt=2, at=186.0)
    aggregated(session, 187.0)
    assert (session.record.reason, session.record.failures) == ("", 0)


def test_one_rejected_update_does_not_hold_the_round() -> None:
    session, _ = started()
    update(session, "c0")
    answer = one(update(session, "c1", fault="NaN in w"), Answer)
    assert (answer.reply, answer.reason) == (Verdict.REJECTED, "NaN in w")
    assert one(update(session, "c2"), Aggregate)


def test_too_many_rejected_updates_fail_the_attempt_as_soon_as_all_have_reported() -> None:
    session, _ = started()
    update(session, "c0")
    update(session, "c1", fault="not finite")
    assert running(session).record.phase is Phase.TRAINING
    failed = one(update(session, "c2", fault="not finite"), SaveRound).record
    assert (failed.phase, failed.reason) == (Phase.FAILED, "1 of 2 updates, 2 rejected")


def test_a_buffer_smaller_than_clients_required_closes_the_round() -> None:
    session, _ = started(buffer_size=1)
    assert one(update(session, "c1"), Aggregate)
    assert one(update(session, "c0"), Answer).reply is Verdict.LATE


def test_the_same_update_sent_twice_is_accepted_twice_and_counted_once() -> None:
    session, _ = started()
    assert one(update(session, "c0"), Answer).reply is Verdict.ACCEPTED
    assert kinds(update(session, "c0")) == ["Answer"]
    assert one(update(session, "c0"), Answer).reply is Verdict.ACCEPTED
    assert running(session).accepted == 1


def test_another_update_for_a_closed_task_is_a_duplicate_that_names_the_first() -> None:
    session, _ = started()
    update(session, "c0")
    answer = one(update(session, "c0", "other"), Answer)
    assert (answer.reply, answer.reason) == (Verdict.DUPLICATE, "the task was closed by update u-c0")


def test_a_retry_whose_upload_is_gone_still_gets_its_verdict() -> None:
    session, _ = started()
    update(session, "c0")
    assert one(update(session, "c0", fault="no upload"), Answer).reply is Verdict.ACCEPTED


def test_an_update_of_round_1_sent_in_round_2_is_answered_from_the_store() -> None:
    session, _ = started()
    updates(session, "c0", "c1", "c2")
    aggregated(session)
    assert one(update(session, "c0", "again"), AnswerFromStore).task == task("c0")
    assert running(session).accepted == 0


@pytest.mark.parametrize(("name", "number", "attempt"), [("c9", 1, 1), ("c0", 2, 1), ("c0", 1, 2)])
def test_an_update_of_a_task_that_was_never_issued_is_not_selected(name: str, number: int, attempt: int) -> None:
    session, _ = started()
    effects = update(session, name, number=number, attempt=attempt)
    assert one(effects, Answer).reply is Verdict.NOT_SELECTED


def test_a_client_that_attaches_again_gets_its_open_task_again_and_not_a_closed_one() -> None:
    session, _ = started()
    update(session, "c1")
    detach(session, "c0", 2.0)
    issued = one(attach(session, "c0", 3.0), IssueTask)
    assert (issued.task, issued.model, issued.deadline) == (task("c0"), "seed", 180.0)
    assert attach(session, "c1", 4.0) == []


def test_an_early_timer_is_set_again() -> None:
    session, _ = started()
    assert step(session, DeadlinePassed(), 100.0) == [WakeAt(180.0)]
    assert step(session, DeadlinePassed(), 179.9) == [WakeAt(180.0)]


def test_an_outage_of_the_store_moves_the_deadline_by_its_length() -> None:
    session, _ = started()
    effects = step(session, StoreReturned(400.0), 400.0)
    assert one(effects, SaveRound).record.deadline == 580.0 and one(effects, WakeAt).at == 580.0


def test_an_aggregation_that_raised_fails_the_attempt_with_its_reason_and_discards_the_updates() -> None:
    session, _ = started()
    updates(session, "c0", "c1", "c2")
    effects = step(session, EffectFailed(1, 1, "overflow"), 2.0)
    assert one(effects, SaveRound).record.reason == "overflow"
    assert one(effects, Discard).blobs == ("blob-c0", "blob-c1", "blob-c2")
    assert running(session).record.attempt == 2


def test_a_lost_update_opens_its_task_again_and_its_id_is_refused() -> None:
    session, _ = started()
    update(session, "c0")
    effects = step(session, UpdateLost(task("c0"), UpdateId("u-c0"), "disk gone"), 2.0)
    assert one(effects, SaveReport).report.lost and one(effects, IssueTask).task == task("c0")
    answer = one(update(session, "c0"), Answer)
    assert (answer.reply, answer.reason) == (Verdict.REJECTED, "its bytes were lost: disk gone")
    assert one(update(session, "c0", "new"), Answer).reply is Verdict.ACCEPTED


def test_an_update_lost_while_aggregating_is_left_out_if_enough_are_left() -> None:
    session, _ = started()
    updates(session, "c0", "c1", "c2")
    effects = step(session, UpdateLost(task("c1"), UpdateId("u-c1"), "disk gone"), 2.0)
    assert [r.task.client for r in one(effects, Aggregate).reports] == ["c0", "c2"]
    effects = step(session, UpdateLost(task("c2"), UpdateId("u-c2"), "disk gone"), 3.0)
    assert one(effects, SaveRound).record.reason == "1 of 2 updates left, the others' bytes were lost"


def test_the_model_of_a_set_that_no_longer_counts_is_ignored() -> None:
    session, _ = started()
    updates(session, "c0", "c1", "c2")
    step(session, UpdateLost(task("c1"), UpdateId("u-c1"), "disk gone"), 2.0)
    assert step(session, Aggregated(GlobalModel(ModelId("of-three"), 1, 1, None, "", 3)), 3.0) == []
    assert one(aggregated(session), IssueTask).model == "m1"


def test_requested_clients_caps_the_cohort_and_draws_anew_each_round() -> None:
    session, _ = started(clients=20, rounds=5, requested_clients=4)
    cohorts = set()
    for number in range(1, 6):
        cohort = tuple(running(session).reports)
        cohorts.add(cohort)
        assert len(cohort) == 4
        updates(session, *cohort, number=number)
        aggregated(session)
    assert len(cohorts) > 1 and session.record.status is Status.FINISHED
