"""The demo without a federation: its folder, and that its processes end."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console

from fl_server.demo import Children, DemoFailed, _own_folder, run_demo, watch


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
