"""What attached clients cost one server that has nothing to do: bytes each, idle CPU, and CPU when they beat as FEDn's.

Then a round over all of them, while /health is asked all the time.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.processes import child, cpu_s, rss_bytes, run
from benchmarks.rounds import Row, served
from fl_server.testing import ServerProcess

WATCHED_S = 10.0
BEAT_EVERY_S = 2.0
CLIENT_MOST_BYTES, IDLE_MOST, BEATING_MOST, HEALTH_MOST_S = 60_000, 0.05, 0.30, 0.250


@dataclass(frozen=True, slots=True)
class Measured:
    clients: int
    client_bytes: float
    attach_s: float
    idle: float  # of one core
    round_s: float
    health_p99_s: float
    beating_clients: int
    beating: float  # of one core


async def load(pid: int) -> float:
    """The share of one core that the process takes, over WATCHED_S."""
    began, before_s = time.perf_counter(), cpu_s(pid)
    await asyncio.sleep(WATCHED_S)  # watching takes time
    return (cpu_s(pid) - before_s) / (time.perf_counter() - began)


@asynccontextmanager
async def asking(url: str) -> AsyncIterator[list[float]]:
    """How long each of a row of GETs took, in seconds; 20 a second."""
    took_s: list[float] = []

    async def ask() -> None:
        async with httpx.AsyncClient(timeout=30) as http:
            while True:
                began = time.perf_counter()
                (await http.get(url)).raise_for_status()
                took_s.append(time.perf_counter() - began)
                await asyncio.sleep(0.05)

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(ask())
        yield took_s
        task.cancel()


async def measure(clients: int, beating_clients: int) -> Measured:
    row = Row(0.01, clients, 1, None)
    with tempfile.TemporaryDirectory(prefix="flserve-bench-") as folder:
        async with ServerProcess(Path(folder) / "empty") as empty:
            empty_bytes = rss_bytes(empty.pid)
        async with served("ours", row, Path(folder)) as server:
            client_bytes = (rss_bytes(server.pid) - empty_bytes) / clients
            idle = await load(server.pid)
            async with asking(f"{server.api_url}/health") as took_s:
                round_s = (await server.turn(1))["durations_s"][0]
            health_p99_s = sorted(took_s)[int(len(took_s) * 0.99)]
            attach_s = server.attach_s
        async with (
            ServerProcess(Path(folder) / "beats", "--log-level", "WARNING") as beaten,
            child(
                "fleet",
                target=f"127.0.0.1:{beaten.grpc_port}",
                dialect="fedn",
                form="ours",
                model_bytes=10_000,
                clients=beating_clients,
                beat_every_s=BEAT_EVERY_S,
            ),
        ):
            beating = await load(beaten.pid)
    return Measured(clients, client_bytes, attach_s, idle, round_s, health_p99_s, beating_clients, beating)


def report(one: Measured) -> list[str]:
    return [
        "| what | measured | at most |",
        "|---|---|---|",
        f"| {one.clients:,} attached clients, kB each | {one.client_bytes / 1e3:.0f} | {CLIENT_MOST_BYTES / 1e3:.0f} |",
        f"| … attached within, s | {one.attach_s:.1f} | |",
        f"| … idle, % of a core | {one.idle * 100:.1f} | {IDLE_MOST * 100:.0f} |",
        f"| … a round of 0.01 MB, s | {one.round_s:.1f} | |",
        f"| … /health meanwhile, p99, ms | {one.health_p99_s * 1e3:.0f} | {HEALTH_MOST_S * 1e3:.0f} |",
        f"| {one.beating_clients:,} beat every 2 s, % of a core | {one.beating * 100:.0f} | {BEATING_MOST * 100:.0f} |",
    ]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--beating", type=int, default=1_000)
    asked = parser.parse_args()
    print("\n".join(report(await measure(asked.clients, asked.beating))))


if __name__ == "__main__":
    run(main())
