"""How long `flserve up` takes from exec to /ready on the embedded default, and `flserve --help`."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import httpx

from benchmarks.processes import run
from fl_server.testing import ServerProcess

READY_MOST_S, HELP_MOST_S = 1.5, 0.3


async def ready_s(folder: Path) -> float:
    began = time.perf_counter()
    async with ServerProcess(folder) as server, httpx.AsyncClient() as http:
        reply = await http.get(f"{server.api_url}/ready")
        assert reply.is_success, reply.text
        took_s = time.perf_counter() - began
        await server.stop()
        return took_s


async def help_s() -> float:
    began = time.perf_counter()
    command = shutil.which("flserve", path=str(Path(sys.executable).parent)) or "flserve"
    process = await asyncio.create_subprocess_exec(command, "--help", stdout=asyncio.subprocess.DEVNULL)
    assert await process.wait() == 0
    return time.perf_counter() - began


async def measure(times: int) -> tuple[float, float]:
    """Medians, after one of each to warm the file cache; the first start makes the database, the others find it."""
    with tempfile.TemporaryDirectory(prefix="flserve-bench-") as folder:
        starts = [await ready_s(Path(folder) / "data") for _ in range(times + 1)][1:]
    helps = [await help_s() for _ in range(times + 1)][1:]
    return median(starts), median(helps)


def report(measured: tuple[float, float]) -> list[str]:
    return [
        "| what | s | at most |",
        "|---|---|---|",
        f"| `flserve up` to /ready | {measured[0]:.2f} | {READY_MOST_S} |",
        f"| `flserve --help` | {measured[1]:.2f} | {HELP_MOST_S} |",
    ]


if __name__ == "__main__":
    print("\n".join(report(run(measure(5)))))
