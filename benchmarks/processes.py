"""The processes of a benchmark: servers and fleets, each apart from the one that measures them.

A child prints a line of JSON when it is ready, answers each line of its standard input with one, and ends when that
input ends: nothing outlives the benchmark. What a process has used is read from /proc.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
ANSWER_TIMEOUT_S = 300.0
_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


class Child:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.said: dict[str, Any] = {}  # its first line

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, **what: Any) -> dict[str, Any]:
        """Its answer. Raises AssertionError if it ended instead."""
        self.tell(**what)
        return await self.answer()

    def tell(self, **what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")

    async def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            line = await self._process.stdout.readline()
        assert line, f"a process of the benchmark ended with {await self._process.wait()}"
        return dict(json.loads(line))


@asynccontextmanager
async def child(module: str, **config: Any) -> AsyncIterator[Child]:
    """`python -m benchmarks.<module>` with its configuration as one argument; ready."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"benchmarks.{module}", json.dumps(config)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 24,
        cwd=Path(__file__).parent.parent,
    )
    assert process.stdin is not None
    try:
        made = Child(process)
        made.said = await made.answer()
        yield made
        process.stdin.close()
        async with asyncio.timeout(30):
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def run(main: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run(); a SIGTERM, too, ends it in order, so that its servers do not stay."""

    async def ended_in_order() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await main

    return asyncio.run(ended_in_order())


# ---- in a child


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


async def orders() -> AsyncIterator[dict[str, Any]]:
    """The lines of standard input, until it ends."""
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield dict(json.loads(line))


# ---- what a process has used


def cpu_s(pid: int) -> float:
    """User and system, of all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_A_SECOND


def peak_rss_bytes(pid: int) -> int:
    return _status_bytes(pid, "VmHWM")


def rss_bytes(pid: int) -> int:
    return _status_bytes(pid, "VmRSS")


def _status_bytes(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/{pid}/status has no {field}")


def raise_file_limit(needed: int) -> None:
    """Soft to hard. Raises AssertionError if that is too low."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    assert hard >= needed, f"{needed} open files needed, `ulimit -Hn` allows {hard}"
