"""What each durability costs: the same rounds with process, host and site, measured in turns; the ratio is the result.

`python -m benchmarks.durability` writes the rows of the table in docs/guide/production.md. Clients train nothing; the
database is one mongod, S3 one SeaweedFS, both on this machine and its disk.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median

from benchmarks.processes import run
from benchmarks.rounds import Measured, Ours, Row, in_turns, ratio, served
from benchmarks.stores import Services, services

ROWS = (Row(0.004, 8, 20, None), Row(4, 8, 8, None))
EMBEDDED, SERVICES = ("process", "host"), ("process", "host", "site")


async def measure(
    row: Row, turns: int, durabilities: tuple[str, ...], stores: Services | None = None
) -> dict[str, Measured]:
    """stores: None is SQLite and files."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flserve-bench-")))
        running: dict[str, Ours] = {}
        for name in durabilities:
            own = stores.environment(f"{name}-{row.model_bytes}") if stores else {}
            (folder / name).mkdir()
            opened = served("ours", row, folder / name, "--durability", name, environment=own)
            running[name] = await stack.enter_async_context(opened)
        return await in_turns(running, row, turns)


def line(stores: str, row: Row, measured: Mapping[str, Measured]) -> str:
    times = ", ".join(f"{name} {median(one.round_s) * 1e3:.0f} ms" for name, one in measured.items())
    ratios = " : ".join(f"{ratio(dict(measured), name, 'process'):.2f}" for name in measured)
    return f"{stores}; {row.name} clients: {times}; {' : '.join(measured)} = {ratios}"


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    for row in ROWS:
        print(line("SQLite and files", row, await measure(row, turns, EMBEDDED, {})), flush=True)
    async with services() as running:
        for row in ROWS:
            print(line("MongoDB and S3", row, await measure(row, turns, SERVICES, running)), flush=True)


if __name__ == "__main__":
    run(main())
