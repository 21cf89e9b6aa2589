"""`flserve demo` as a user runs it: what it prints, what it leaves behind, and how it ends when something ends it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

TIME_LIMIT_S = 60.0


@asynccontextmanager
async def demo(*options: object) -> AsyncIterator[Process]:
    argv = [sys.executable, "-m", "fl_server.cli", "demo", *map(str, options)]
    process = await asyncio.create_subprocess_exec(*argv, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
    try:
        async with asyncio.timeout(TIME_LIMIT_S):
            yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


def processes_of(folder: Path) -> dict[int, str]:
    """By process id: the commands that name a file in this folder; that is our processes, and not the demo itself."""
    return {pid: command for pid, command in running_commands() if f"{folder}/" in command}


def running_commands() -> Iterator[tuple[int, str]]:
    if not Path("/proc/self").exists():
        for line in subprocess.check_output(["ps", "-axww", "-o", "pid=,command="], text=True).splitlines():
            pid, command = line.split(maxsplit=1)
            yield int(pid), command
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            yield int(folder.name), (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


async def until_round_1_is_done(process: Process) -> None:
    assert process.stdout is not None
    async for line in process.stdout:
        if line.startswith(b"round  1/"):
            return
    raise AssertionError("the demo ended before its first round")


async def test_the_demo_trains_an_accurate_model_and_leaves_the_model_but_no_process(tmp_path: Path) -> None:
    async with demo("--format", "json", "--data-dir", tmp_path) as process:
        printed, said = await process.communicate()
    assert process.returncode == 0, said.decode()
    (line,) = printed.decode().splitlines()
    result = json.loads(line)
    assert list(result) == ["rounds", "clients", "test_accuracy", "model_id", "seconds"]
    assert (result["rounds"], result["clients"]) == (10, 5)
    assert result["test_accuracy"] >= 0.93
    text = said.decode()
    assert re.findall(r"^round +(\d+)/10  updates 5/5  validation accuracy 0\.\d+ ", text, re.M) == [
        str(number) for number in range(1, 11)
    ]
    assert f"test accuracy {result['test_accuracy']:.3f}" in text
    assert f"model {tmp_path / 'final-model.npz'} (id {result['model_id']})" in text
    with np.load(tmp_path / "final-model.npz") as model:
        assert [model[name].shape for name in model.files] == [(64, 64), (64,), (64, 10), (10,)]
    assert processes_of(tmp_path) == {}


async def test_two_runs_give_the_same_model_byte_for_byte(tmp_path: Path) -> None:
    models = set()
    for _ in range(2):
        async with demo("--data-dir", tmp_path, "--rounds", 2, "--clients", 3) as process:
            await process.communicate()
        assert process.returncode == 0
        models.add((tmp_path / "final-model.npz").read_bytes())
    assert len(models) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_ends_the_demo_and_all_its_processes(tmp_path: Path, number: signal.Signals) -> None:
    async with demo("--data-dir", tmp_path, "--rounds", 10_000, "--clients", 2) as process:
        await until_round_1_is_done(process)
        # a client's child that has not begun its own program has the command of its parent
        assert len(set(processes_of(tmp_path).values())) == 3
        process.send_signal(number)
        rest, said = await process.communicate()
    assert process.returncode == 128 + number
    assert rest.decode().splitlines()[-1] == f"flserve demo: stopped by {number.name}"
    assert said == b""
    assert processes_of(tmp_path) == {}


@pytest.mark.parametrize(("command", "name"), [("fl_client.cli", r"client \d"), ("fl_server.cli", "server")])
async def test_a_process_that_is_killed_is_named_and_ends_the_demo(tmp_path: Path, command: str, name: str) -> None:
    async with demo("--data-dir", tmp_path, "--rounds", 10_000, "--clients", 2) as process:
        await until_round_1_is_done(process)
        victim = next(pid for pid, line in processes_of(tmp_path).items() if command in line)
        os.kill(victim, signal.SIGKILL)
        rest, _ = await process.communicate()
    assert process.returncode == 1
    assert re.search(rf"^flserve demo: {name} (ended with exit code -9|does not answer)", rest.decode(), re.M)
    assert processes_of(tmp_path) == {}
