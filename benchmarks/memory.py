"""Peak memory of the server against the model's size and the number of clients: FEDn's wire, FedAvg over all.

What the kernel keeps of files in its cache is not the process's; what it has mapped is.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import peak_rss_bytes, run
from benchmarks.rounds import Row, served

ROWS = (Row(0.1, 10, 20, None), Row(1, 10, 20, None), Row(1, 100, 4, None), Row(100, 10, 3, None))
BIG_ROWS = (Row(100, 100, 1, None), Row(1000, 4, 1, None))  # 10 GB and 4 GB a round
BASE_MOST_BYTES, MODELS_MOST, WAITING_MOST_BYTES = 150_000_000, 4, 1_000_000
BOUND_FROM_MB = 100


@dataclass(frozen=True, slots=True)
class Measured:
    row: Row
    started_bytes: int
    peak_bytes: int

    @property
    def most_bytes(self) -> int | None:
        """150 MB, four models, 1 MB for every upload that waits beyond those of ten clients; of large models only."""
        if self.row.model_mb < BOUND_FROM_MB:
            return None
        waiting = max(0, self.row.clients - 10)
        return BASE_MOST_BYTES + MODELS_MOST * self.row.model_bytes + WAITING_MOST_BYTES * waiting


async def measure(row: Row) -> Measured:
    with tempfile.TemporaryDirectory(prefix="flserve-bench-") as folder:
        async with served("fedn", row, Path(folder)) as server:
            started_bytes = peak_rss_bytes(server.pid)
            await server.turn(row.rounds)
            return Measured(row, started_bytes, peak_rss_bytes(server.pid))


def report(measured: list[Measured]) -> list[str]:
    lines = ["| model, clients | attached, MB | peak, MB | at most, MB |", "|---|---|---|---|"]
    for one in measured:
        numbers = (one.started_bytes, one.peak_bytes, one.most_bytes)
        lines.append(
            f"| {one.row.name} | " + " | ".join(f"{number / 1e6:.0f}" if number else "–" for number in numbers) + " |"
        )
    if not set(BIG_ROWS) <= {one.row for one in measured}:
        lines += ["", f"Not measured in this run: {'; '.join(row.name for row in BIG_ROWS)} (`make bench BIG=1`)."]
    return lines


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--big", action="store_true", help="also 100 MB x 100 and 1 GB x 4: 20 GB of disk")
    parser.add_argument(
        "--rows", default="", help="indices of the rows, comma-separated; default: all but the big ones"
    )
    asked = parser.parse_args()
    rows: tuple[Row, ...] = ROWS + BIG_ROWS if asked.big else ROWS
    if asked.rows:
        rows = tuple((ROWS + BIG_ROWS)[int(index)] for index in asked.rows.split(","))
    print("\n".join(report([await measure(row) for row in rows])))


if __name__ == "__main__":
    run(main())
