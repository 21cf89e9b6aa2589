"""What holds the server's event loop, and for how long: timed from inside, so in runs of their own.

`python -m benchmarks.lag up …` is `flserve up …`, watched: at SIGUSR1 and at its end it writes a line of JSON to
standard error, what it saw since the last one. A callback holds the loop against everybody; a turn of the loop is all
callbacks that were ready when it looked, and what comes meanwhile waits for its end.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import heapq
import json
import selectors
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.processes import run
from benchmarks.rounds import Row, served
from fl_server import cli

CALLBACK_MOST_S = 0.050
SHOWN = 8
TOLD_FROM_S = 0.005
MANY = ("ours", Row(0.01, 10_000, 1, None))
WATCHED = (("fedn", Row(100, 10, 3, None)), ("fedn", Row(0.01, 1000, 4, None)), MANY)


@dataclass(frozen=True, slots=True)
class Held:
    """The longest that there were, in seconds, longest first."""

    name: str
    callbacks: list[tuple[float, float, str]]  # how much of it was work: the rest it waited for the GIL or a core
    turns: list[tuple[float, int, dict[str, float]]]  # with how many callbacks, and which took most of it
    collections: list[tuple[float, int]]  # of garbage, of which generation


async def measure(dialect: str, row: Row) -> Held:
    """While the row's rounds are under way; the attaching of its clients is not looked at."""
    with tempfile.TemporaryDirectory(prefix="flserve-bench-") as folder:
        async with served(dialect, row, Path(folder), module="benchmarks.lag") as server:
            await server.turn(1)
            server.process.send(signal.SIGUSR1)
            await server.turn(row.rounds)
            server.process.send(signal.SIGUSR1)
            log = server.process.log
        lines = [json.loads(line)["held"] for line in log.read_text().splitlines() if line.startswith('{"held"')]
        held = lines[1]
        return Held(row.name, held["callbacks_s"], held["turns_s"], held["collections_s"])


async def measure_all(clients: int) -> list[Held]:
    """clients: of the last row, as of the connections."""
    dialect, many = MANY
    return [await measure(*one) for one in (*WATCHED[:-1], (dialect, replace(many, clients=clients)))]


def report(done: Sequence[Held]) -> list[str]:
    lines = [
        "A callback holds the loop against everybody; in brackets how much of that time was work of its own: for the",
        "rest it waited for a core, or for the interpreter's lock. A turn is all callbacks that were ready at once.",
        "",
        "| a round of MB, clients | longest callback, ms (its CPU) | at most | which | longest turn, ms "
        "| longest collection, ms |",
        "|---|---|---|---|---|---|",
    ]
    for one in done:
        took_s, worked_s, name = one.callbacks[0] if one.callbacks else (0.0, 0.0, "")
        longest_ms = [most[0][0] * 1e3 if most else 0.0 for most in (one.turns, one.collections)]
        lines.append(
            f"| {one.name} | {took_s * 1e3:.0f} ({worked_s * 1e3:.0f}) | {CALLBACK_MOST_S * 1e3:.0f} | {name} "
            f"| {longest_ms[0]:.0f} | {longest_ms[1]:.0f} |"
        )
    return lines


# ---- in the server


class Watch:
    def __init__(self) -> None:
        self._looked_at = time.perf_counter()
        self._took_s: Counter[str] = Counter()  # by callback, in this turn
        self._callbacks = 0
        self._began_collecting = 0.0
        self._clear()

    def _clear(self) -> None:
        self._turns: list[tuple[float, int, dict[str, float]]] = []
        self._slowest: list[tuple[float, float, str]] = []
        self._collections: list[tuple[float, int]] = []

    def install(self) -> None:
        plain, plain_select = asyncio.Handle._run, selectors.EpollSelector.select

        def timed(handle: asyncio.Handle) -> None:
            callback = handle._callback  # type: ignore[attr-defined]
            began, began_cpu = time.perf_counter(), time.thread_time()
            plain(handle)
            self._note_callback(callback, time.perf_counter() - began, time.thread_time() - began_cpu)

        def select(selector: selectors.EpollSelector, timeout: float | None = None) -> Any:
            self._note_turn(time.perf_counter() - self._looked_at)
            try:
                return plain_select(selector, timeout)
            finally:
                self._looked_at = time.perf_counter()

        asyncio.Handle._run = timed  # type: ignore[method-assign, assignment]
        selectors.EpollSelector.select = select  # type: ignore[method-assign]
        gc.callbacks.append(self._note_collection)
        signal.signal(signal.SIGUSR1, lambda *_: self.say())

    def _note_callback(self, callback: Any, took_s: float, worked_s: float) -> None:
        name = _name(callback)
        self._took_s[name] += took_s
        self._callbacks += 1
        if took_s > TOLD_FROM_S:
            _keep(self._slowest, (took_s, worked_s, name))

    def _note_turn(self, took_s: float) -> None:
        if took_s > TOLD_FROM_S:
            _keep(self._turns, (took_s, self._callbacks, dict(self._took_s.most_common(4))))
        self._took_s.clear()
        self._callbacks = 0

    def _note_collection(self, phase: str, info: dict[str, int]) -> None:
        now = time.perf_counter()
        if phase == "start":
            self._began_collecting = now
        elif now - self._began_collecting > TOLD_FROM_S:
            _keep(self._collections, (now - self._began_collecting, info["generation"]))

    def say(self) -> None:
        told = {
            "turns_s": sorted(self._turns, key=lambda turn: -turn[0]),
            "callbacks_s": sorted(self._slowest, reverse=True),
            "collections_s": sorted(self._collections, reverse=True),
        }
        self._clear()
        print(json.dumps({"held": told}), file=sys.stderr, flush=True)


def _keep(slowest: list[Any], one: tuple[Any, ...]) -> None:
    heapq.heappush(slowest, one)
    if len(slowest) > SHOWN:
        heapq.heappop(slowest)


def _name(callback: Any) -> str:
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        coroutine = owner.get_coro()
        return str(getattr(coroutine, "__qualname__", coroutine))
    return str(getattr(callback, "__qualname__", type(callback).__name__))


def watched() -> None:
    cli.uvloop.new_event_loop = asyncio.new_event_loop  # whose callbacks can be timed; they are the same
    watch = Watch()
    watch.install()
    try:
        cli.main()
    finally:
        watch.say()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="", help="indices of WATCHED, comma-separated; default: all")
    parser.add_argument("--clients", type=int, help="instead of the row's")
    parser.add_argument("--all", action="store_true", help="not the longest alone")
    asked = parser.parse_args()
    done = []
    for dialect, row in [WATCHED[int(index)] for index in asked.rows.split(",")] if asked.rows else WATCHED:
        done.append(await measure(dialect, replace(row, clients=asked.clients or row.clients)))
        if asked.all:
            print(*done[-1].callbacks, *done[-1].turns, *done[-1].collections, sep="\n")
    print("\n".join(report(done)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["up"]:
        watched()
    else:
        run(main())
