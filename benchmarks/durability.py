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
from benchmarks.rounds import Measured, Ours, Row, ratio, served
from fl_server.services import Mongod, Weed

ROWS = (Row(0.004, 8, 20, None), Row(4, 8, 8, None))
EMBEDDED, SERVICES = ("process", "host"), ("process", "host", "site")


async def measure(
    row: Row, turns: int, durabilities: tuple[str, ...], environment: Mapping[str, str]
) -> dict[str, Measured]:
    """One turn each to warm up, then `turns` each, in turns."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flserve-bench-")))
        running: dict[str, Ours] = {}
        for name in durabilities:
            own = {"FL_MONGO_DATABASE": name, "FL_S3_MODEL_BUCKET": name, "FL_S3_CONTEXT_BUCKET": f"{name}-context"}
            (folder / name).mkdir()
            opened = served("ours", row, folder / name, "--durability", name, environment={**environment, **own})
            running[name] = await stack.enter_async_context(opened)
        measured = {name: Measured() for name in durabilities}
        for turn in range(turns + 1):
            for name, subject in running.items():
                times = await subject.turn(row.rounds if turn else 1)
                if turn:
                    measured[name].round_s.append(median(times["durations_s"]))
        return measured


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
    with tempfile.TemporaryDirectory(prefix="flserve-bench-") as folder:
        mongod, weed = Mongod(Path(folder) / "mongod"), Weed(Path(folder) / "weed")
        try:
            await mongod.start()
            await weed.start()
            where = {
                "FL_MONGO_URL": mongod.url,
                "FL_S3_ENDPOINT_URL": weed.url,
                "FL_S3_ACCESS_KEY": weed.access_key,
                "FL_S3_SECRET_KEY": weed.secret_key,
            }
            for row in ROWS:
                print(line("MongoDB and S3", row, await measure(row, turns, SERVICES, where)), flush=True)
        finally:
            await mongod.stop()
            await weed.stop()


if __name__ == "__main__":
    run(main())
