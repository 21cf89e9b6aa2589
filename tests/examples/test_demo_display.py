"""The demo without a federation: what its events add up to, how it is shown, and that its processes end."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fl_server.demo import (
    Children,
    DemoFailed,
    DemoProgress,
    _own_folder,
    render,
    run_demo,
    server_events,
    shown,
    watch,
)

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


def progress_after(events: list[Event], *, rounds: int = 2) -> DemoProgress:
    progress = DemoProgress(SESSION, rounds)
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
    progress = DemoProgress(SESSION, 2)
    assert not progress.apply("update", {"session_id": "other", "round": 1, "received": 1, "expected": 2}, 1.0)
    assert not progress.apply("client", {"client_id": "a", "status": "online"}, 1.0)
    assert not progress.apply("prediction", {"session_id": SESSION}, 1.0)
    assert progress == DemoProgress(SESSION, 2)


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
    progress = DemoProgress(SESSION, 2)
    with shown(console) as show:
        for kind, data, at_s in [*ROUND_1, validation(1, "a", 0.5, 15.0), validation(1, "b", 0.7, 15.0)]:
            progress.apply(kind, {"session_id": SESSION, **data}, at_s)
            show(progress)
        show(progress)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "round  1/2  updates 2/2  validation accuracy 0.600  loss 0.400  4.50 s\n"


def test_the_table_shows_the_newest_rounds_as_they_stand() -> None:
    console = Console(file=io.StringIO(), width=120)
    running = [phase(2, "training", 15.0, attempt=2, reason="a [bold] retry"), update(2, "a", 1, 16.0)]
    progress = progress_after([*ROUND_1, validation(1, "a", 0.5, 15.0), *running])
    console.print(render(progress, 18.0, max_rows=5))
    assert isinstance(console.file, io.StringIO)
    table = console.file.getvalue()
    assert "0.500" in table and "completed" in table and "1/2 rounds" in table
    assert "1/2" in table and "3.00" in table and "training (attempt 2): a [bold] retry" in table
    console.print(render(progress, 18.0, max_rows=1))
    assert console.file.getvalue()[len(table) :].count("completed") == 0


async def chunked(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def test_server_sent_events_are_read_however_the_network_cuts_them() -> None:
    stream = (
        b': keep-alive\n\nid: 7\nevent: round\ndata: {"round":\ndata: 1}\n\n'
        b'event:model\r\ndata:{"a": "\xe2\x80\xa8"}\r\n\r\n'
        b'event: half\ndata: {"never": "finished"}\n'
    )
    expected = [("round", {"round": 1}), ("model", {"a": "\u2028"})]
    assert [event async for event in server_events(chunked(stream))] == expected
    assert [event async for event in server_events(chunked(*(bytes([b]) for b in stream)))] == expected


def test_the_folder_of_a_former_demo_is_emptied_of_what_demos_make(tmp_path: Path) -> None:
    with _own_folder(tmp_path / "demo") as root:
        (root / "server").mkdir()
        (root / "server" / "state").touch()
        (root / "seed.npz").touch()
        (root / "notes.txt").touch()
    with _own_folder(tmp_path / "demo") as root:
        assert sorted(path.name for path in root.iterdir()) == [".flserve-demo", "logs", "notes.txt"]


def test_a_folder_that_no_demo_made_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DemoFailed, match="not empty"), _own_folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_demos_do_not_share_a_folder(tmp_path: Path) -> None:
    with _own_folder(tmp_path), pytest.raises(DemoFailed, match="another demo is running"), _own_folder(tmp_path):
        pass


async def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    console = Console(file=io.StringIO(), width=40)
    assert await run_demo(data_dir=tmp_path / "file" / "demo", console=console) == 1
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == f"flserve demo: {tmp_path / 'file' / 'demo'}: Not a directory\n"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


STAY = "import signal; signal.pause()"


async def test_a_process_that_ends_fails_the_demo_with_the_end_of_its_log(tmp_path: Path) -> None:
    children = Children(tmp_path)
    child = await children.start("client 3", ["-c", "print('no such server'); raise SystemExit(3)"])
    with pytest.raises(DemoFailed, match=r"client 3 ended with exit code 3(.|\n)*no such server"):
        await watch(child)
    await children.stop()


async def test_stopping_ends_processes_in_groups_of_their_own(tmp_path: Path) -> None:
    children = Children(tmp_path)
    started = [await children.start(name, ["-c", STAY]) for name in ("server", "client 0")]
    assert all(os.getpgid(child.process.pid) == child.process.pid for child in started)
    await children.stop()
    assert [child.process.returncode for child in started] == [-signal.SIGTERM, -signal.SIGTERM]
    assert not any(alive(child.process.pid) for child in started)


async def test_a_process_that_ignores_the_request_is_killed_when_the_stop_is_cancelled(tmp_path: Path) -> None:
    children = Children(tmp_path)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a process inherits what is ignored
    try:
        child = await children.start("server", ["-c", STAY])
    finally:
        signal.signal(signal.SIGTERM, before)
    stopping = asyncio.ensure_future(children.stop())
    await asyncio.sleep(0)  # up to its first wait
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert await child.process.wait() == -signal.SIGKILL


async def test_a_script_that_ends_well_gives_its_last_line(tmp_path: Path) -> None:
    children = Children(tmp_path)
    assert await children.run("score", ["-c", "print('a'); print('b')"]) == "b"
    assert await children.run("data", ["-c", ""]) == ""
    with pytest.raises(DemoFailed, match=r"data ended with exit code 1(.|\n)*ValueError: odd"):
        await children.run("data", ["-c", "raise ValueError('odd')"])
