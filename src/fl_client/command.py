"""One command of a compute package, or pip, as a process: its output heard line by line, and its end made sure of.

It runs in a session of its own: a Ctrl-C in the terminal does not reach it, and whatever it starts ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shlex
import shutil
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fl_client.task import Due

TAIL_LINES = 20
_LONGEST_LINE_BYTES = 4096  # longer ones are cut into several
_BLOCK_BYTES = 1 << 16
_GRACE_S = 5.0  # between SIGTERM and SIGKILL
_DRAIN_S = 1.0  # for output that a process holds which has left the group


class CommandFailed(Exception):
    """The message says how it ended, not what it is; last_lines is the end of its output."""

    def __init__(self, reason: str, last_lines: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.last_lines = tuple(last_lines)


def in_shell(command: str, *arguments: str | Path) -> list[str]:
    """The command with arguments appended, as bash reads it (sh where there is none)."""
    line = " ".join([command, *(shlex.quote(str(argument)) for argument in arguments)])
    return [shutil.which("bash") or "/bin/sh", "-c", line]


async def run(
    argv: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    say: Callable[[str], None],
    due: Due | None = None,
) -> None:
    """Returns when it has ended with exit code 0, and none of its processes is left.

    say: gets stdout and stderr, as lines. due: it is ended then, at once if that is over. Raises CommandFailed.
    """
    due = due or Due()
    loop = asyncio.get_running_loop()
    if due.at_s <= loop.time():
        raise CommandFailed("was not begun: its deadline was over")
    tail: deque[str] = deque(maxlen=TAIL_LINES)

    def take(line: str) -> None:
        tail.append(line)
        say(line)

    output, theirs = os.pipe()  # not asyncio's PIPE: its wait() also waits for whoever else holds the output
    stream = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(output, "rb", buffering=0)
    )
    try:
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                cwd=cwd,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs,
                start_new_session=True,
            )
        except OSError as exc:
            raise CommandFailed(f"cannot be started: {exc}") from exc
        finally:
            os.close(theirs)
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(_read_lines(stream, take), name="output of a command")
            try:
                in_time = await _ended_in_time(process, due)
            finally:
                await _end(process)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_DRAIN_S):
                        await reading
    finally:
        transport.close()
    if not in_time:
        raise CommandFailed("was killed: it did not end by its deadline", tail)
    assert process.returncode is not None
    if process.returncode < 0:
        raise CommandFailed(f"was killed by {signal.Signals(-process.returncode).name}", tail)
    if process.returncode > 0:
        raise CommandFailed(f"ended with exit code {process.returncode}", tail)


async def _ended_in_time(process: asyncio.subprocess.Process, due: Due) -> bool:
    loop = asyncio.get_running_loop()
    while True:
        try:
            async with asyncio.timeout_at(None if math.isinf(due.at_s) else due.at_s):
                await process.wait()
                return True
        except TimeoutError:
            if due.at_s <= loop.time():  # else it was moved meanwhile
                return False


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ends the group: one that still runs is asked first, what a command leaves behind is killed."""
    try:
        if process.returncode is None:
            _signal_group(process, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GRACE_S):
                    await process.wait()
    finally:
        _signal_group(process, signal.SIGKILL)
    await process.wait()


def _signal_group(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    # PermissionError: macOS, for a group of zombies
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


async def _read_lines(stream: asyncio.StreamReader, take: Callable[[str], None]) -> None:
    rest = b""
    while block := await stream.read(_BLOCK_BYTES):
        *lines, rest = (rest + block).split(b"\n")
        if len(rest) > _LONGEST_LINE_BYTES:
            lines, rest = [*lines, rest], b""
        for line in lines:
            _take_cut(line, take)
    if rest:
        _take_cut(rest, take)


def _take_cut(line: bytes, take: Callable[[str], None]) -> None:
    shown = line.rstrip(b"\r").rpartition(b"\r")[2]  # of a progress bar that overwrites itself, the last state
    for start in range(0, max(1, len(shown)), _LONGEST_LINE_BYTES):
        take(shown[start : start + _LONGEST_LINE_BYTES].decode(errors="replace"))
