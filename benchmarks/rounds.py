"""Our rounds beside the limit's and the bare wire's, measured in turns: the ratio is the result.

Each server is a process of its own (ours: `flserve up` with its default settings), each has a fleet process of its
own, and only one pair works at a time. All traffic stays on 127.0.0.1.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

import httpx

from benchmarks.models import MB, encoded
from benchmarks.processes import Child, child, cpu_s, peak_rss_bytes, run
from fl_server.testing import CONFIG, ServerProcess


@dataclass(frozen=True, slots=True)
class Row:
    model_mb: float
    clients: int
    rounds: int  # in one turn
    most: float | None  # ours / limit, the claim
    form: str = "stored"  # of what FEDn's clients send

    @property
    def model_bytes(self) -> int:
        return int(self.model_mb * MB)

    @property
    def name(self) -> str:
        name = f"{self.model_mb:g} MB, {self.clients:,}"
        return name if self.form == "stored" else f"{name}, {self.form}"


ROWS = (
    Row(0.1, 10, 60, 3.0),
    Row(1, 10, 40, 2.5),
    Row(1, 100, 8, 2.0),
    Row(100, 10, 3, 1.5),
    Row(0.01, 1000, 4, 3.0),
    Row(1, 100, 4, None, "deflated"),
)
SUBJECTS = ("limit", "wire", "fedn", "ours")  # fedn, ours: our server, spoken to in these dialects


@dataclass(slots=True)
class Measured:
    """Of one subject; what a turn gave, one entry a turn."""

    round_s: list[float] = field(default_factory=list)  # medians
    cpu_s: list[float] = field(default_factory=list)  # of the server, a round
    dead_s: list[float] = field(default_factory=list)  # from sending the last report to the next task
    answered_dead_s: list[float] = field(default_factory=list)  # from its answer on
    peak_rss_bytes: int = 0


class Subject(Protocol):
    pid: int

    async def turn(self, rounds: int) -> dict[str, list[float]]: ...


class _Bare:
    """limit or wire."""

    def __init__(self, server: Child, fleet: Child) -> None:
        self.pid, self._server, self._fleet = server.pid, server, fleet

    async def turn(self, rounds: int) -> dict[str, list[float]]:
        self._server.tell(rounds=rounds + 1)
        return await self._fleet.ask(rounds=rounds)


class Ours:
    """A session on our server; each turn continues it."""

    def __init__(self, server: ServerProcess, fleet: Child, http: httpx.AsyncClient, session_id: str) -> None:
        self.process, self.pid, self.api_url = server, server.pid, server.api_url
        self.attach_s = float(fleet.said["attach_s"])
        self._fleet, self._http, self._session_id = fleet, http, session_id

    async def turn(self, rounds: int) -> dict[str, list[float]]:
        self._fleet.tell(rounds=rounds)
        await _call(self._http, "sessions/start", json={"session_id": self._session_id, "rounds": rounds + 1})
        done = await self._fleet.answer()
        async with asyncio.timeout(60), self._http.stream("GET", "/api/v1/events/") as feed:
            lines = feed.aiter_lines()
            while (await self._status()) != "Finished":
                await anext(lines)
        return done

    async def _status(self) -> str:
        reply = await self._http.get(f"/api/v1/sessions/{self._session_id}")
        return str(reply.json()["status"])


async def _call(http: httpx.AsyncClient, path: str, **request: object) -> dict[str, str]:
    reply = await http.post(f"/api/v1/{path}", **request)  # type: ignore[arg-type]
    assert reply.is_success, f"{path}: {reply.status_code} {reply.text}"
    return dict(reply.json())


@asynccontextmanager
async def bare(name: str, row: Row) -> AsyncIterator[_Bare]:
    size = {"model_bytes": row.model_bytes, "clients": row.clients}
    async with child(name, **size) as server:
        target = f"127.0.0.1:{server.said['grpc_port']}"
        dialect, form = ("limit", "ours") if name == "limit" else ("fedn", row.form)
        async with child("fleet", target=target, dialect=dialect, form=form, **size) as fleet:
            yield _Bare(server, fleet)


@asynccontextmanager
async def served(
    dialect: str,
    row: Row,
    folder: Path,
    *settings: str,
    environment: Mapping[str, str] | None = None,
    module: str = "fl_server.cli",
) -> AsyncIterator[Ours]:
    """module: what is run as `flserve`."""
    async with AsyncExitStack() as stack:
        process = ServerProcess(
            folder / dialect, "--log-level", "WARNING", *settings, environment=environment, module=module
        )
        server = await stack.enter_async_context(process)
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=server.api_url, timeout=120))
        fleet = await stack.enter_async_context(
            child(
                "fleet",
                target=f"127.0.0.1:{server.grpc_port}",
                dialect=dialect,
                form=row.form if dialect == "fedn" else "ours",
                model_bytes=row.model_bytes,
                clients=row.clients,
            )
        )
        model = await _call(http, "models/", files={"file": ("seed.npz", encoded("ours", row.model_bytes))})
        config = {**CONFIG, "model_id": model["model_id"], "clients_required": row.clients, "round_timeout": 600}
        session = await _call(http, "sessions/", json={"name": "bench", "session_config": config})
        yield Ours(server, fleet, http, session["session_id"])


async def measure(row: Row, turns: int, subjects: Sequence[str] = SUBJECTS) -> dict[str, Measured]:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flserve-bench-")))
        running: dict[str, Subject] = {}
        for name in subjects:
            made = bare(name, row) if name in ("limit", "wire") else served(name, row, folder)
            running[name] = await stack.enter_async_context(made)
        return await in_turns(running, row, turns)


async def in_turns(running: Mapping[str, Subject], row: Row, turns: int) -> dict[str, Measured]:
    """One turn each to warm up, then `turns` each, in turns."""
    measured = {name: Measured() for name in running}
    for turn in range(turns + 1):
        for name, subject in running.items():
            before_s = cpu_s(subject.pid)
            times = await subject.turn(row.rounds if turn else 1)
            if turn:
                rounds = row.rounds if name == "limit" else row.rounds + 1
                measured[name].cpu_s.append((cpu_s(subject.pid) - before_s) / rounds)
                measured[name].round_s.append(median(times["durations_s"]))
                for into, key in (
                    (measured[name].dead_s, "dead_s"),
                    (measured[name].answered_dead_s, "answered_dead_s"),
                ):
                    if times[key]:
                        into.append(median(times[key]))
    for name, subject in running.items():
        measured[name].peak_rss_bytes = peak_rss_bytes(subject.pid)
    return measured


def ratio(measured: dict[str, Measured], above: str, below: str) -> float:
    """The median of the turns' ratios: what was loaded in a turn was so for both."""
    return median(mine / theirs for mine, theirs in zip(measured[above].round_s, measured[below].round_s, strict=True))


def line(row: Row, measured: dict[str, Measured]) -> str:
    said = [f"{row.name:24}"]
    for name, one in measured.items():
        said.append(f"{name} {median(one.round_s) * 1e3:.1f} ms (CPU {median(one.cpu_s) * 1e3:.1f})")
    if "limit" in measured:
        others = measured.keys() - {"limit"}
        said += [f"{name}/limit {ratio(measured, name, 'limit'):.2f}" for name in sorted(others)]
    if {"fedn", "wire"} <= measured.keys():
        said.append(f"fedn/wire {ratio(measured, 'fedn', 'wire'):.2f}")
    for name, one in measured.items():
        said.append(f"{name} RSS {one.peak_rss_bytes / 2**20:.0f} MiB")
        if one.dead_s:
            said.append(f"dead {median(one.dead_s) * 1e3:.1f}/{median(one.answered_dead_s) * 1e3:.1f} ms")
    return "; ".join(said)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="", help="indices of ROWS, comma-separated; default: all")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--subjects", default=",".join(SUBJECTS))
    asked = parser.parse_args()
    rows = [ROWS[int(index)] for index in asked.rows.split(",")] if asked.rows else ROWS
    for row in rows:
        print(line(row, await measure(row, asked.turns, asked.subjects.split(","))), flush=True)


if __name__ == "__main__":
    run(main())
