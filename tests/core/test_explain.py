"""What a person reads who asks why a session is where it is."""

from __future__ import annotations

import pytest

from fl_server.core.events import DeadlinePassed, EffectFailed, Recovered, StopRequested, UpdateLost, ValidationReported
from fl_server.core.explain import explain
from fl_server.core.model import CallId, TaskKind, UpdateId
from fl_server.core.session import Session, duration_text, step
from tests.core.story import aggregated, attach, client, created, detach, start, started, task, update, updates

RUNNING = "session s is running: 0 of 2 rounds are committed"


def test_a_session_that_was_created_is_not_started() -> None:
    assert explain(created(), 0.0) == ["session s is not started"]


def test_training_says_for_whom_it_waits_who_is_away_and_until_when() -> None:
    session, _ = started(clients=5)
    updates(session, "c0", "c1", "c3")
    detach(session, "c4", 10.0)
    waits = "round 1, attempt 1: waiting for 2 of 5 clients (c2, c4); c4 last seen 2 min ago; deadline in 41 s"
    assert explain(session, 139.0) == [RUNNING, waits]


def test_training_names_three_clients_and_counts_the_others() -> None:
    session, _ = started(clients=6)
    update(session, "c5")
    assert "waiting for 5 of 6 clients (c0, c1, c2 and 2 more); deadline in" in explain(session, 2.0)[1]


def test_training_with_a_buffer_says_when_it_closes() -> None:
    session, _ = started(clients=4, buffer_size=3)
    update(session, "c1")
    waits = "waiting for 3 of 4 clients (c0, c2, c3); closes with 3 updates, 1 so far; deadline in 2 min"
    assert explain(session, 2.0)[1] == f"round 1, attempt 1: {waits}"


def test_selecting_says_who_is_missing_and_when_it_gives_up() -> None:
    session, _ = started(clients=2)
    updates(session, "c0", "c1")
    detach(session, "c1", 1.5)
    aggregated(session)
    assert explain(session, 12.0) == [
        "session s is running: 1 of 2 rounds are committed",
        "round 2, attempt 1: 1 of 2 clients needed are attached; c1 last seen 10 s ago; gives up in 4 min",
    ]


def test_a_pause_after_a_failed_attempt_says_why_it_failed_and_when_it_goes_on() -> None:
    session, _ = started()
    step(session, DeadlinePassed(), 180.0)
    why = "round 1, attempt 2: the last attempt failed (0 of 2 updates, 0 rejected); tried again in 3 s"
    assert explain(session, 182.0) == [RUNNING, why]


def test_aggregating_says_how_many_updates_count() -> None:
    session, _ = started()
    update(session, "c1", fault="NaN in layer 2")
    updates(session, "c0", "c2")
    assert explain(session, 2.0) == [
        RUNNING,
        "round 1, attempt 1: the updates of 2 of 3 clients are being aggregated",
        "the update of c1 was rejected: NaN in layer 2",
    ]


def test_an_update_that_was_lost_is_told_until_the_round_is_over() -> None:
    session, _ = started()
    update(session, "c0")
    step(session, UpdateLost(task("c0"), UpdateId("u-c0"), "disk gone"), 2.0)
    lost = "an update of c0 was accepted and does not count any more: its bytes were lost: disk gone"
    assert explain(session, 3.0)[-1] == lost


def test_a_restart_says_who_is_awaited_and_who_is_not_attached() -> None:
    session, _ = started()
    again = Session.from_records(session.record, session.round.record if session.round else None, [], [])
    step(again, Recovered(tuple(client(i) for i in range(3))), 10.0)
    attach(again, "c1", 11.0)
    assert explain(again, 12.0) == [
        RUNNING,
        "the server was restarted: waiting for c0, c2 to come back, at most 58 s more",
        "round 1, attempt 1: waiting for 3 of 3 clients (c0, c1, c2); "
        "c0 is not attached; c2 is not attached; deadline in 2 min",
    ]


def test_a_validation_says_who_has_still_to_report() -> None:
    session, _ = started(rounds=1, validate=True)
    updates(session, "c0", "c1", "c2")
    aggregated(session)
    step(session, ValidationReported(task("c1", kind=TaskKind.VALIDATE)), 3.0)
    assert explain(session, 122.0) == [
        "session s is running: 1 of 1 rounds are committed",
        "the model of round 1 is being validated: 1 report so far, waiting for c0, c2, at most 60 s more; "
        "the session then finishes",
    ]


def test_a_validation_that_all_have_reported_waits_for_nobody() -> None:
    session, _ = started(validate=True)
    updates(session, "c0", "c1", "c2")
    aggregated(session)
    for name in ("c0", "c1", "c2"):
        step(session, ValidationReported(task(name, kind=TaskKind.VALIDATE)), 3.0)
    nobody = "3 reports so far, nobody attached has still to report; open for 2 min more"
    assert explain(session, 3.0)[1] == f"the model of round 1 is being validated: {nobody}"


def test_a_finished_session_says_what_it_reached() -> None:
    session, _ = started(rounds=1)
    updates(session, "c0", "c1", "c2")
    aggregated(session)
    assert explain(session, 3.0) == ["session s is finished: 1 of 1 rounds are committed"]


def test_a_failed_session_says_why() -> None:
    session, _ = started(round_retries=0)
    updates(session, "c0", "c1", "c2")
    step(session, EffectFailed(1, 1, "overflow in layer 2"), 2.0)
    assert explain(session, 3.0) == ["session s has failed: round 1: overflow in layer 2; 0 of 2 rounds are committed"]


def test_a_terminated_session_says_that_it_was_stopped() -> None:
    session, _ = started()
    step(session, StopRequested(CallId(1)), 2.0)
    assert explain(session, 3.0) == ["session s was terminated: stopped; 0 of 2 rounds are committed"]


def test_a_start_that_waits_for_clients_says_so() -> None:
    session = created()
    start(session, clients=1, wait_for_clients_s=30.0)
    assert explain(session, 9.0)[1] == "round 1, attempt 1: 1 of 2 clients needed are attached; gives up in 21 s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3.0, "0 s"),
        (0.4, "0 s"),
        (41.0, "41 s"),
        (119.4, "119 s"),
        (120.0, "2 min"),
        (180.0, "3 min"),
        (7_199.0, "119 min"),
        (7_200.0, "2 h"),
        (200_000.0, "2 days"),
    ],
)
def test_durations_are_said_as_a_person_would(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
