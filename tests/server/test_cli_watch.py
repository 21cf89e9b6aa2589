"""What a session's events add up to, and how it is shown."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from fl_server.watch import Progress, render, shown

SESSION = "s1"
Event = tuple[str, dict[str, Any], float]


def phase(number: int, name: str, at_s: float, *, attempt: int = 1, reason: str = "") -> Event:
    data = {"round": number, "attempt": attempt, "phase": name, "cohort": 2, "reason": reason}
    return "round", data, at_s


def update(number: int, client: str, received: int, at_s: float) -> Event:
    data = {"round": number, "client_id": client, "verdict": "accepted", "received": received, "expected": 2}
    return "update", data, at_s


def validation(number: int, client: str, accuracy: float, at_s: float) -> Event:
    metrics = {"accuracy": accuracy, "loss": 1 - accuracy}
    return "validation", {"round": number, "client_id": client, "metrics": metrics}, at_s


def model(number: int, at_s: float) -> Event:
    return "model", {"round": number, "model_id": f"m{number}"}, at_s


ROUND_1 = [
    phase(1, "selecting", 10.0),
    phase(1, "training", 11.0),
    update(1, "a", 1, 12.0),
    update(1, "b", 2, 13.0),
    phase(1, "aggregating", 13.0),
    model(1, 14.5),
]


def progress_after(events: list[Event], *, rounds: int = 2) -> Progress:
    progress = Progress(SESSION, rounds)
    for kind, data, at_s in events:
        assert progress.apply(kind, {"session_id": SESSION, **data}, at_s)
    return progress


def test_a_completed_round_tells_its_updates_its_model_and_its_seconds() -> None:
    row = progress_after(ROUND_1).rows[1]
    assert (row.received, row.expected, row.model_id, row.seconds) == (2, 2, "m1", 4.5)


def test_validations_weigh_the_same_and_a_repeated_one_counts_once() -> None:
    progress = progress_after(
        [*ROUND_1, validation(1, "a", 0.5, 15.0), validation(1, "b", 1.0, 15.0), validation(1, "b", 1.0, 16.0)]
    )
    assert progress.mean(progress.rows[1], "accuracy") == 0.75
    assert progress.mean(progress.rows[1], "loss") == 0.25


def test_a_validation_heard_before_its_model_is_not_lost() -> None:
    progress = progress_after([*ROUND_1[:5], validation(1, "a", 0.5, 13.0), ROUND_1[5]])
    assert progress.mean(progress.rows[1], "accuracy") == 0.5


def test_metrics_that_are_missing_or_not_finite_are_left_out_of_the_mean() -> None:
    progress = progress_after([*ROUND_1, validation(1, "a", 0.5, 15.0), validation(1, "b", float("nan"), 15.0)])
    assert progress.mean(progress.rows[1], "accuracy") == 0.5
    assert progress.mean(progress.rows[1], "perplexity") is None


def test_events_of_other_sessions_and_of_unknown_kinds_change_nothing() -> None:
    progress = Progress(SESSION, 2)
    assert not progress.apply("update", {"session_id": "other", "round": 1, "received": 1, "expected": 2}, 1.0)
    assert not progress.apply("client", {"client_id": "a", "status": "online"}, 1.0)
    assert not progress.apply("prediction", {"session_id": SESSION}, 1.0)
    assert progress == Progress(SESSION, 2)


def test_an_update_that_comes_after_its_round_leaves_the_count() -> None:
    late = ("update", {"round": 1, "client_id": "c", "verdict": "late", "reason": "round 1 is over"}, 20.0)
    assert progress_after([*ROUND_1, late]).rows == progress_after(ROUND_1).rows


def test_another_attempt_counts_its_updates_anew_and_its_time_on_top() -> None:
    failed = phase(1, "failed", 13.0, reason="1 of 2 updates at the deadline")
    progress = progress_after([*ROUND_1[:3], failed])
    assert progress.rows[1].reason == "1 of 2 updates at the deadline"
    again = [phase(1, "training", 18.0, attempt=2), update(1, "a", 1, 19.0)]
    progress = progress_after([*ROUND_1[:3], failed, *again, model(1, 20.0)])
    row = progress.rows[1]
    assert (row.attempt, row.received, row.reason, row.seconds) == (2, 1, "", 10.0)


def test_the_bar_moves_with_each_update_and_is_full_at_the_end() -> None:
    assert progress_after([]).fraction == 0
    assert progress_after(ROUND_1[:3]).fraction == 0.25
    assert progress_after(ROUND_1).fraction == 0.5
    assert progress_after([*ROUND_1, phase(2, "training", 15.0), update(2, "a", 1, 16.0)]).fraction == 0.75
    assert progress_after([*ROUND_1, model(2, 15.0)]).fraction == 1


def test_a_row_is_settled_when_all_have_validated_or_nobody_will() -> None:
    one = [*ROUND_1, validation(1, "a", 0.5, 15.0)]
    assert progress_after(one).settled() == []
    assert [row.round for row in progress_after([*one, validation(1, "b", 0.5, 15.0)]).settled()] == [1]
    assert [row.round for row in progress_after([*one, model(2, 16.0)]).settled()] == [1]
    assert [row.round for row in progress_after([*one, ("session", {"status": "Failed"}, 16.0)]).settled()] == [1]


@pytest.mark.parametrize(("status", "ended"), [("Started", False), ("Finished", True), ("Failed", True)])
def test_the_session_says_when_it_has_ended_and_why(status: str, ended: bool) -> None:
    progress = progress_after([("session", {"status": status, "reason": "because"}, 1.0)])
    assert (progress.ended, progress.reason) == (ended, "because")


def test_without_a_terminal_each_round_is_one_line_printed_once() -> None:
    console = Console(file=io.StringIO(), width=40)
    progress = Progress(SESSION, 2)
    with shown(console, "digits", ("accuracy", "loss")) as show:
        for kind, data, at_s in [*ROUND_1, validation(1, "a", 0.5, 15.0), validation(1, "b", 0.7, 15.0)]:
            progress.apply(kind, {"session_id": SESSION, **data}, at_s)
            show(progress)
        show(progress)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "round  1/2  updates 2/2  validation accuracy 0.600  loss 0.400  4.50 s\n"


def test_the_table_shows_the_newest_rounds_as_they_stand() -> None:
    console = Console(file=io.StringIO(), width=120)
    running = [phase(2, "training", 15.0, attempt=2, reason="a [bold] retry"), update(2, "a", 1, 18.0)]
    progress = progress_after([*ROUND_1, validation(1, "a", 0.5, 15.0), *running])
    console.print(render(progress, "digits", ("accuracy", "loss"), max_rows=5))
    assert isinstance(console.file, io.StringIO)
    table = console.file.getvalue()
    assert "0.500" in table and "completed" in table and "1/2 rounds" in table
    assert "1/2" in table and "3.00" in table and "training (attempt 2): a [bold] retry" in table
    console.print(render(progress, "digits", ("accuracy", "loss"), max_rows=1))
    assert console.file.getvalue()[len(table) :].count("completed") == 0


def test_metrics_that_nobody_named_are_those_that_come_first() -> None:
    progress = progress_after(ROUND_1)
    reports = [
        ("a", {"f1": 0.5, "name": "x", "ok": True, "huge": 10**400}),
        ("b", {"loss": 2, "f1": 1.0, "c": 0, "d": 0}),
    ]
    for client, metrics in reports:
        progress.apply("validation", {"session_id": SESSION, "round": 1, "client_id": client, "metrics": metrics}, 15.0)
    assert progress.metric_names() == ["f1", "loss", "c", "d"]
    console = Console(file=io.StringIO(), width=40)
    with shown(console, "any") as show:
        show(progress)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "round  1/2  updates 2/2  validation f1 0.750  loss 2.000  c 0.000  4.50 s\n"


def test_a_session_that_does_not_validate_settles_a_round_with_its_model() -> None:
    progress = Progress(SESSION, 2, validates=False)
    for kind, data, at_s in ROUND_1:
        progress.apply(kind, {"session_id": SESSION, **data}, at_s)
    console = Console(file=io.StringIO(), width=40)
    with shown(console, "any") as show:
        show(progress)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "round  1/2  updates 2/2  4.50 s\n"


def test_without_a_terminal_a_failed_attempt_is_one_line_with_its_reason() -> None:
    console = Console(file=io.StringIO(), width=40)
    progress = Progress(SESSION, 2)
    with shown(console, "any") as show:
        for number, reason in ((1, "too few"), (2, "")):
            kind, data, at_s = phase(1, "failed", 13.0, attempt=number, reason=reason)
            progress.apply(kind, {"session_id": SESSION, **data}, at_s)
            show(progress)
            show(progress)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "round  1/2  attempt 1 failed: too few",
        "round  1/2  attempt 2 failed: no reason given",
    ]


def test_a_terminal_gets_a_table_that_is_drawn_over() -> None:
    console = Console(file=io.StringIO(), width=100, height=30, force_terminal=True, legacy_windows=False)
    with shown(console, "session s1") as show:
        show(progress_after(ROUND_1[:3]))
        show(progress_after(ROUND_1))
    assert isinstance(console.file, io.StringIO)
    drawn = console.file.getvalue()
    assert "session s1" in drawn and "training" in drawn and "completed" in drawn and "\x1b[" in drawn
