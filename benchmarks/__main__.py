"""`make bench`: all that we claim about speed, measured beside the limit in one run, written to RESULTS.md.

What a person found out (profiles, what was tried) stands in NOTES.md, which is appended as it is.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median

from benchmarks import connections, lag, memory, rounds, startup, stores
from benchmarks.processes import run
from benchmarks.rounds import ROWS, Measured, Row, ratio

HERE = Path(__file__).parent
PACKAGES = ("grpcio", "protobuf", "numpy", "fastapi", "uvicorn", "httpx")
DEAD_MOST_S = 0.015


def machine() -> list[str]:
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    return [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC. {os.cpu_count()} cores, {memory_gib:.0f} GiB, {platform.platform()};",
        f"load before the run {os.getloadavg()[0]:.1f} (the machine may be shared).",
        f"Python {platform.python_version()}, {versions}.",
    ]


def tables(done: Sequence[tuple[Row, dict[str, Measured]]]) -> list[str]:
    lines = [
        "## Rounds",
        "",
        "A round from its first task to the next one's, ms. limit: a bare server that moves and averages; wire: a bare",
        "server that answers FEDn's six calls; FEDn's: our server, spoken to as FEDn's client does; ours: as our own",
        "client does. A ratio is the median of those of the turns, the smallest and largest in brackets.",
        "",
        "| MB, clients | limit | wire | FEDn's | ours | FEDn's / limit | at most | FEDn's / wire | ours / limit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, one in done:
        times = " | ".join(f"{median(one[name].round_s) * 1e3:.0f}" for name in rounds.SUBJECTS)
        most = f"{row.most:g}" if row.most else "–"
        ratios = [_spread(one, *pair) for pair in (("fedn", "limit"), ("fedn", "wire"), ("ours", "limit"))]
        lines.append(f"| {row.name} | {times} | {ratios[0]} | {most} | {ratios[1]} | {ratios[2]} |")
    lines += [
        "",
        "| MB, clients | server's CPU, ms a round: limit / wire / FEDn's / ours | FEDn's / limit, CPU | peak RSS, MB |",
        "|---|---|---|---|",
    ]
    for row, one in done:
        cpu_ms = " / ".join(f"{median(one[name].cpu_s) * 1e3:.0f}" for name in rounds.SUBJECTS)
        cpu_ratio = median(one["fedn"].cpu_s) / median(one["limit"].cpu_s)
        lines.append(f"| {row.name} | {cpu_ms} | {cpu_ratio:.2f} | {one['fedn'].peak_rss_bytes / 1e6:.0f} |")
    row, one = done[0]
    dead_ms, answered_ms = (median(times) * 1e3 for times in (one["fedn"].dead_s, one["fedn"].answered_dead_s))
    lines += [
        "",
        f"Dead time at {row.name}: {answered_ms:.1f} ms from the last verdict to the next round's first task, "
        f"{dead_ms:.1f} ms from the last report's sending (at most {DEAD_MOST_S * 1e3:.0f}).",
    ]
    return lines


def _spread(one: dict[str, Measured], above: str, below: str) -> str:
    all = [mine / theirs for mine, theirs in zip(one[above].round_s, one[below].round_s, strict=True)]
    return f"**{ratio(one, above, below):.2f}** ({min(all):.2f}–{max(all):.2f})"


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--clients", type=int, default=10_000, help="attached ones, in connections")
    parser.add_argument("--big", action="store_true", help="memory of 100 MB x 100 and 1 GB x 4, too: 20 GB of disk")
    parser.add_argument("--memory", action="store_true", help="that part alone: it is printed, and nothing is written")
    asked = parser.parse_args()
    sizes = memory.ROWS + (memory.BIG_ROWS if asked.big else ())
    if asked.memory:
        print("\n".join(memory.report([await memory.measure(row) for row in sizes])))
        return
    head, done = machine(), []
    for row in ROWS:
        done.append((row, await rounds.measure(row, asked.turns)))
        print(rounds.line(*done[-1]), flush=True)
    lines = ["# What was measured", "", "`make bench` writes this file.", "", *head, "", *tables(done)]
    async with stores.services() as running:
        beside = [await stores.measure(row, asked.turns, running) for row in stores.ROWS]
    lines += ["", "## MongoDB and S3 beside SQLite and files", "", *stores.report(beside)]
    lines += ["", "## Memory", "", *memory.report([await memory.measure(row) for row in sizes])]
    lines += ["", "## Connections", "", *connections.report(await connections.measure(asked.clients, 1_000))]
    lines += ["", "## What holds the loop", "", *lag.report(await lag.measure_all(asked.clients))]
    lines += ["", "## Start", "", *startup.report(await startup.measure(5))]
    if (notes := HERE / "NOTES.md").exists():
        lines += ["", notes.read_text().rstrip()]
    (HERE / "RESULTS.md").write_text("\n".join(lines) + "\n")
    print(f"written to {HERE / 'RESULTS.md'}")


if __name__ == "__main__":
    run(main())
