"""A session from its start to its end: requests, restarts, validation, and being continued."""

from __future__ import annotations

from typing import Any

import pytest

from fl_server.core.events import (
    Aggregate,
    Aggregated,
    Answer,
    Broken,
    DeadlinePassed,
    Effect,
    IssueTask,
    Reconfigured,
    Recovered,
    SaveModel,
    SaveRound,
    SaveSession,
    StopRequested,
    UpdateLost,
    ValidationReported,
    WakeAt,
)
from fl_server.core.model import (
    CallId,
    ClientId,
    GlobalModel,
    ModelId,
    Outcome,
    Phase,
    Report,
    RoundRecord,
    SessionConfig,
    Status,
    TaskKind,
    UpdateId,
)
from fl_server.core.session import Session, step
from tests.core.story import (
    aggregated,
    attach,
    client,
    created,
    detach,
    kinds,
    one,
    running,
    start,
    started,
    task,
    update,
    updates,
)


def finished(**config: Any) -> Session:
    session, _ = started(rounds=1, **config)
    updates(session, "c0", "c1", "c2")
    aggregated(session)
    return session


def recovered(
    session: Session, expected: int, at: float, lost: tuple[UpdateLost, ...] = ()
) -> tuple[Session, list[Effect]]:
    """The process died and its records were read back."""
    round = session.round
    record: RoundRecord | None = round.record if round and round.record.cohort else None
    reports: list[Report] = [report for report in round.reports.values() if report] if round else []
    again = Session.from_records(session.record, record, reports, [])
    return again, step(again, Recovered(tuple(client(i) for i in range(expected)), lost), at)


def issued(effects: list[Effect], kind: TaskKind) -> list[str]:
    return [effect.task.client for effect in effects if isinstance(effect, IssueTask) and effect.task.kind is kind]


# ---- start and stop


def test_a_start_without_enough_clients_is_refused_or_waits_if_asked_to() -> None:
    session = created()
    reason = "Number of available clients is lower than the required minimum of 2 (1 attached)"
    assert start(session, clients=1) == [Answer(CallId(0), Outcome.REFUSED, reason)]
    assert session.record.status is Status.CREATED
    assert one(start(session, clients=1, wait_for_clients_s=30.0), WakeAt).at == 30.0
    assert kinds(attach(session, "c1", 3.0)) == ["SaveRound", "IssueTask", "IssueTask", "WakeAt"]


def test_a_session_that_does_not_run_takes_another_configuration_and_keeps_its_model() -> None:
    session = created()
    wanted = SessionConfig(rounds=5, min_clients=3)
    effects = step(session, Reconfigured(CallId(3), wanted), 1.0)
    assert effects == [SaveSession(session.record), Answer(CallId(3), Outcome.DONE)]
    assert (session.record.config, session.record.model.id, session.record.status) == (wanted, "seed", Status.CREATED)
    start(session, clients=3)
    assert session.record.last_round == 5


def test_a_running_session_keeps_its_configuration() -> None:
    session, _ = started()
    record = session.record
    effects = step(session, Reconfigured(CallId(3), SessionConfig(rounds=5)), 1.0)
    assert effects == [Answer(CallId(3), Outcome.CONFLICT, "the session is running")]
    assert session.record == record


def test_a_start_while_it_runs_is_a_conflict() -> None:
    session, _ = started()
    assert start(session) == [Answer(CallId(0), Outcome.CONFLICT, "the session is running")]


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"rounds": 0}, "rounds: 0, a whole number of at least 1 needed"),
        ({"rounds": 1.5}, "rounds: 1.5,"),
        ({"rounds": True}, "rounds: True,"),
        ({"round_timeout_s": 0}, "round_timeout: 0, a number of seconds above 0"),
        ({"round_timeout_s": float("nan")}, "round_timeout: nan,"),
        ({"round_timeout_s": float("inf")}, "round_timeout: inf,"),
        ({"round_timeout_s": 10**400}, "round_timeout: 1000"),
        ({"round_timeout_s": "3"}, "round_timeout: '3',"),
        ({"wait_for_clients_s": -1.0}, "wait_for_clients_s: -1.0,"),
        ({"client_ids": frozenset({"c0"})}, "client_ids: 1, below clients_required 2"),
    ],
)
def test_a_start_with_a_wrong_value_is_refused_with_its_name_and_changes_nothing(
    request_: dict[str, Any], reason: str
) -> None:
    session, before = created(), created()
    [answer] = start(session, **request_)
    assert isinstance(answer, Answer) and answer.reply is Outcome.REFUSED
    assert answer.reason.startswith(reason)
    assert session == before


def test_a_start_sets_rounds_timeout_clients_and_prefix_for_this_run() -> None:
    session = created()
    some = frozenset({client(0), client(2)})
    effects = start(session, rounds=5, round_timeout_s=7.0, client_ids=some, model_name_prefix="digits")
    assert issued(effects, TaskKind.TRAIN) == ["c0", "c2"]
    assert one(effects, SaveRound).record.deadline == 7.0
    assert (session.record.last_round, session.record.config.model_name_prefix) == (5, "digits")
    assert attach(session, "c1", 1.0) == []


def test_a_finished_session_is_continued_from_its_model_with_fresh_optimizer_state() -> None:
    session = finished()
    assert session.record.status is Status.FINISHED and session.record.model.optimizer_state == "moments"
    effects = start(session, at=10.0)
    saved = one(effects, SaveSession).record
    assert (saved.model.id, saved.model.optimizer_state, saved.last_round) == ("m1", "", 2)
    assert one(effects, IssueTask).task.round == 2


def test_a_continued_session_never_gives_an_attempt_number_twice() -> None:
    session, _ = started()
    step(session, StopRequested(CallId(2)), 1.0)
    effects = start(session, at=2.0)
    assert one(effects, IssueTask).task == task("c0", attempt=2)


def test_a_stop_is_answered_after_it_is_saved_and_again_when_asked_again() -> None:
    session, _ = started()
    assert kinds(step(session, StopRequested(CallId(2)), 1.0)) == [
        "SaveSession",
        "SaveRound",
        "Discard",
        "Answer",
        "WakeAt",
    ]
    assert step(session, StopRequested(CallId(3)), 2.0) == [Answer(CallId(3), Outcome.DONE)]
    assert one(step(finished(), StopRequested(CallId(4)), 3.0), Answer).reply is Outcome.CONFLICT


def test_a_stop_while_aggregating_is_answered_and_the_model_that_comes_later_is_ignored() -> None:
    session, _ = started()
    updates(session, "c0", "c1", "c2")
    assert kinds(step(session, StopRequested(CallId(9)), 2.0)) == ["SaveSession", "SaveRound", "Discard", "Answer"]
    assert step(session, Aggregated(GlobalModel(ModelId("m1"), 1, 1, None, "", 3)), 3.0) == []
    assert session.record.status is Status.TERMINATED and session.record.model.id == "seed"


def test_a_broken_session_fails_with_the_reason_and_stays_so() -> None:
    session, _ = started()
    step(session, Broken("the model's bytes are gone"), 2.0)
    assert (session.record.status, session.record.reason) == (Status.FAILED, "the model's bytes are gone")
    assert step(session, Broken("again"), 3.0) == []


def test_selecting_gives_up_with_who_was_last_seen() -> None:
    session, _ = started(clients=2, round_retries=0)
    updates(session, "c0", "c1")
    detach(session, "c1", 1.5)
    aggregated(session)
    step(session, DeadlinePassed(), 302.0)
    assert session.record.status is Status.FAILED
    assert session.record.reason == "round 2: 1 of 2 clients attached; c1 last seen 5 min ago"


# ---- restarts


def test_after_a_restart_selecting_waits_for_those_who_were_there() -> None:
    session = created()
    start(session, clients=1, wait_for_clients_s=30.0)
    again, effects = recovered(session, expected=3, at=10.0)
    assert one(effects, WakeAt).at == 70.0
    attach(again, "c0", 11.0)
    attach(again, "c1", 12.0)
    assert running(again).record.phase is Phase.SELECTING
    attach(again, "c2", 13.0)
    assert len(running(again).reports) == 3


def test_after_a_restart_selecting_goes_on_without_those_who_do_not_come_back() -> None:
    session = created()
    start(session, clients=1, wait_for_clients_s=30.0)
    again, _ = recovered(session, expected=3, at=10.0)
    attach(again, "c0", 11.0)
    attach(again, "c1", 12.0)
    step(again, DeadlinePassed(), 70.0)
    assert list(running(again).reports) == ["c0", "c1"]


def test_a_selection_timeout_within_the_rejoin_window_neither_rings_for_ever_nor_gives_up_early() -> None:
    session, _ = started(selection_timeout_s=5.0, retry_wait_s=0.0)
    updates(session, "c0")
    again, _ = recovered(session, expected=3, at=10.0)
    update(again, "c1", fault="NaN", at=11.0)
    update(again, "c2", fault="NaN", at=12.0)  # the attempt fails, and the next would select until 17.0
    assert running(again).record.phase is Phase.SELECTING
    assert again.alarm == 70.0
    assert again.record.failures == 1


def test_after_a_restart_training_gives_its_clients_time_to_come_back() -> None:
    session, _ = started()
    update(session, "c0")
    again, effects = recovered(session, expected=3, at=170.0)
    assert one(effects, SaveRound).record.deadline == 230.0
    assert issued(attach(again, "c1", 171.0), TaskKind.TRAIN) == ["c1"]
    assert attach(again, "c0", 172.0) == []


def test_after_a_restart_a_complete_round_closes_and_an_aggregation_is_done_again() -> None:
    session, _ = started()
    updates(session, "c0", "c1", "c2")
    again, effects = recovered(session, expected=3, at=10.0)
    assert len(one(effects, Aggregate).reports) == 3
    aggregated(again)
    assert again.record.model.id == "m1"


def test_after_a_restart_an_update_whose_bytes_are_gone_is_asked_for_again() -> None:
    session, _ = started()
    update(session, "c0")
    lost = UpdateLost(task("c0"), UpdateId("u-c0"), "host died")
    again, effects = recovered(session, expected=3, at=10.0, lost=(lost,))
    assert "SaveReport" in kinds(effects)
    assert issued(attach(again, "c0", 11.0), TaskKind.TRAIN) == ["c0"]


def test_after_a_restart_the_model_is_listed_again_and_its_validation_opened_anew() -> None:
    session, _ = started(validate=True)
    updates(session, "c0", "c1", "c2")
    aggregated(session)
    again, effects = recovered(session, expected=3, at=1000.0)
    assert one(effects, SaveModel).record.model.id == "m1"
    assert issued(attach(again, "c0", 1001.0), TaskKind.VALIDATE) == ["c0"]


def test_a_session_that_has_ended_is_left_alone_by_a_restart() -> None:
    again, effects = recovered(finished(), expected=3, at=10.0)
    assert effects == [WakeAt(None)] and again.round is None


# ---- validation


def test_validation_does_not_hold_the_next_round() -> None:
    session, _ = started(validate=True)
    updates(session, "c0", "c1", "c2")
    effects = aggregated(session)
    assert issued(effects, TaskKind.VALIDATE) == issued(effects, TaskKind.TRAIN) == ["c0", "c1", "c2"]
    assert kinds(effects).index("SaveRound") > kinds(effects).index("IssueTask")  # validate first, then train


def test_the_last_validation_holds_the_session_only_for_clients_that_are_there() -> None:
    session, _ = started(rounds=1, validate=True)
    updates(session, "c0", "c1", "c2")
    tasks = [effect.task for effect in aggregated(session) if isinstance(effect, IssueTask)]
    assert (session.record.status, session.record.model.id) == (Status.RUNNING, "m1")
    step(session, ValidationReported(tasks[0]), 3.0)
    detach(session, "c1", 3.0)
    assert session.validation and session.validation.open == {"c2"}
    effects = step(session, ValidationReported(tasks[2]), 4.0)
    assert one(effects, SaveSession).record.status is Status.FINISHED


def test_the_last_validation_ends_at_its_deadline() -> None:
    session, _ = started(rounds=1, validate=True, validation_timeout_s=15.0)
    updates(session, "c0", "c1", "c2")
    assert one(aggregated(session), WakeAt).at == 17.0
    step(session, DeadlinePassed(), 17.0)
    assert session.record.status is Status.FINISHED


def test_who_attaches_while_a_validation_is_open_takes_part_in_it() -> None:
    session, _ = started(validate=True)
    updates(session, "c0", "c1", "c2")
    aggregated(session)
    assert issued(attach(session, ClientId("c7"), 3.0), TaskKind.VALIDATE) == ["c7"]
