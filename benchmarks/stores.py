"""Rounds with MongoDB and S3 beside those with the embedded stores, FEDn's wire, durability = process, in turns.

The database is one mongod, S3 one SeaweedFS, both on this machine: they work on the same cores and the same disk, and
what they take of them is part of the ratio. `--rows`, `--turns`: as of benchmarks.rounds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.processes import cpu_s, run
from benchmarks.rounds import Measured, Row, Subject, in_turns, served
from fl_server.services import Mongod, Weed

ROWS = (Row(1, 100, 8, 1.5), Row(100, 10, 3, 1.5))
EMBEDDED, SERVICES = "SQLite and files", "MongoDB and S3"


@dataclass(frozen=True, slots=True)
class Services:
    mongod: Mongod
    weed: Weed

    def environment(self, name: str) -> dict[str, str]:
        """Of a server that shares them with others, each under a name of its own."""
        return {
            "FL_MONGO_URL": self.mongod.url,
            "FL_MONGO_DATABASE": name,
            "FL_S3_ENDPOINT_URL": self.weed.url,
            "FL_S3_ACCESS_KEY": self.weed.access_key,
            "FL_S3_SECRET_KEY": self.weed.secret_key,
            "FL_S3_MODEL_BUCKET": name,
            "FL_S3_CONTEXT_BUCKET": f"{name}-context",
        }


@asynccontextmanager
async def services() -> AsyncIterator[Services]:
    with tempfile.TemporaryDirectory(prefix="flserve-bench-") as folder:
        running = Services(Mongod(Path(folder) / "mongod"), Weed(Path(folder) / "weed", volume_mb=1024))
        try:
            await running.mongod.start()
            await running.weed.start()
            yield running
        finally:
            await running.mongod.stop()
            await running.weed.stop()


@dataclass(frozen=True, slots=True)
class Beside:
    row: Row
    rounds: Mapping[str, Measured]
    mongod_cpu_s: float  # a round, as weed's
    weed_cpu_s: float

    @property
    def ratios(self) -> list[float]:
        """Of the turns."""
        pairs = zip(self.rounds[SERVICES].round_s, self.rounds[EMBEDDED].round_s, strict=True)
        return [services_s / embedded_s for services_s, embedded_s in pairs]


async def measure(row: Row, turns: int, running: Services) -> Beside:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flserve-bench-")))
        (folder / "services").mkdir()
        embedded = await stack.enter_async_context(served("fedn", row, folder))
        name = f"bench-{row.model_bytes}-{row.clients}"
        opened = served("fedn", row, folder / "services", environment=running.environment(name))
        subjects: dict[str, Subject] = {EMBEDDED: embedded, SERVICES: await stack.enter_async_context(opened)}
        pids = (running.mongod.pid, running.weed.pid)
        before_s = [cpu_s(pid) for pid in pids]
        measured = await in_turns(subjects, row, turns)
        rounds = 2 + turns * (row.rounds + 1)  # those that warm up, too
        mongod_s, weed_s = ((cpu_s(pid) - before) / rounds for pid, before in zip(pids, before_s, strict=True))
        return Beside(row, measured, mongod_s, weed_s)


def report(measured: Sequence[Beside]) -> list[str]:
    lines = [
        "A round, ms: in brackets the server's CPU. Dead: of it, from the last report's sending to the next task.",
        "mongod and weed (SeaweedFS): their CPU.",
        "",
        f"| MB, clients | {EMBEDDED} | {SERVICES} | ratio | at most | dead, ms | peak RSS, MB | mongod | weed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for beside in measured:
        row, one = beside.row, [beside.rounds[name] for name in (EMBEDDED, SERVICES)]
        times = " | ".join(f"{median(of.round_s) * 1e3:.0f} ({median(of.cpu_s) * 1e3:.0f})" for of in one)
        dead = " : ".join(f"{median(of.dead_s) * 1e3:.0f}" for of in one)
        between = f"**{median(beside.ratios):.2f}** ({min(beside.ratios):.2f}–{max(beside.ratios):.2f})"
        rss = " : ".join(f"{of.peak_rss_bytes / 1e6:.0f}" for of in one)
        cpu = f"{beside.mongod_cpu_s * 1e3:.0f} | {beside.weed_cpu_s * 1e3:.0f}"
        lines.append(f"| {row.name} | {times} | {between} | {row.most:g} | {dead} | {rss} | {cpu} |")
    return lines


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="", help="indices of ROWS, comma-separated; default: all")
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    rows = [ROWS[int(index)] for index in asked.rows.split(",")] if asked.rows else ROWS
    async with services() as running:
        print("\n".join(report([await measure(row, asked.turns, running) for row in rows])))


if __name__ == "__main__":
    run(main())
