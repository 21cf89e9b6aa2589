"""A federation of real processes that a test disturbs: `flserve up`, and the digits example's clients.

Everything of a run is determined, so that its final model can be compared with the undisturbed run's, byte for byte.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from fl_server.store.s3 import S3
from fl_server.testing import CONFIG, ServerProcess

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
CLIENTS, ROUNDS = 4, 5
WAIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Where:
    """Where a server keeps what it knows: arguments of `flserve up`, and FL_* variables. Default: its data folder."""

    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def on(mongo_url: str, s3: S3, *arguments: str, s3_url: str = "") -> Where:
    """A database and buckets of its own."""
    name = f"fl-test-{uuid.uuid4()}"
    options = ("--mongo-url", mongo_url, "--mongo-database", name, "--s3-endpoint-url", s3_url or s3.endpoint_url)
    buckets = {"FL_S3_MODEL_BUCKET": name, "FL_S3_CONTEXT_BUCKET": name}
    keys = {"FL_S3_ACCESS_KEY": s3.access_key, "FL_S3_SECRET_KEY": s3.secret_key}
    return Where((*options, *arguments), {**buckets, **keys})


class Run:
    """One session of CLIENTS client processes on a server process."""

    def __init__(self, server: ServerProcess, http: httpx.AsyncClient) -> None:
        self.server, self.http = server, http
        self.api_url = server.api_url  # of whatever the clients dial
        self.clients: list[asyncio.subprocess.Process] = []
        self.session_id = ""

    async def start(self, seed: bytes) -> None:
        model = await self._ask("/api/v1/models/", files={"file": ("seed.npz", seed)})
        config = {
            **CONFIG,
            "model_id": model["model_id"],
            "clients_required": CLIENTS,
            "round_timeout": 600,
            "validate": True,
            "client_settings": {"seed": 7},
        }
        session = await self._ask("/api/v1/sessions/", json={"session_config": config})
        self.session_id = str(session["session_id"])
        start = {"session_id": self.session_id, "rounds": ROUNDS, "wait_for_clients_s": 60}
        await self._ask("/api/v1/sessions/start", json=start)

    async def _ask(self, path: str, **request: Any) -> dict[str, Any]:
        reply = await self.http.post(self.api_url + path, timeout=WAIT_S, **request)
        assert reply.is_success, reply.text
        return dict(reply.json())

    async def events(self) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """(kind, data) of all that this life of the server has told and tells; ends when it dies."""
        kind = ""
        try:
            async with self.http.stream("GET", f"{self.api_url}/api/v1/events?after=0", timeout=WAIT_S) as stream:
                async for line in stream.aiter_lines():
                    if line.startswith("event:"):
                        kind = line.partition(":")[2].strip()
                    elif line.startswith("data:"):
                        yield kind, json.loads(line.partition(":")[2])
        except httpx.TransportError:
            return

    async def until_ended(self, kill_at: int | None = None) -> bool:
        """Whether the session came to its end; False when the server was killed at that event of this life."""
        seen = 0
        async for kind, data in self.events():
            seen += 1
            if seen == kill_at:
                await self.server.kill()
                return False
            if kind == "session" and data["status"] != "Started":
                assert data["status"] == "Finished", data
                return True
        raise AssertionError(f"the server ended by itself:\n{self.server.tail()}")

    async def accepted(self, count: int) -> None:
        """Returns when so many updates were accepted in this life of the server."""
        async for kind, data in self.events():
            count -= kind == "update" and data["verdict"] == "accepted"
            if not count:
                return
        raise AssertionError(f"the server ended by itself:\n{self.server.tail()}")

    def pause(self, index: int) -> None:
        """This client works no more: the round that it is asked for stays open."""
        self.clients[index].send_signal(signal.SIGSTOP)

    def resume(self, index: int) -> None:
        self.clients[index].send_signal(signal.SIGCONT)

    async def final_model(self, *, failed_attempts: int = 0) -> bytes:
        """Its bytes; every round was committed once, and every client lives."""
        assert [process.returncode for process in self.clients] == [None] * CLIENTS, "every client lives on"
        api = f"{self.api_url}/api/v1"
        models = (await self.http.get(f"{api}/models/", params={"session_id": self.session_id})).json()
        assert models["count"] == ROUNDS, "one model a round"
        wanted = {"round_config.session_id": self.session_id}
        rounds = (await self.http.get(f"{api}/rounds/", params=wanted)).json()
        statuses = [(found["round_id"], found["status"]) for found in rounds["result"]]
        expected = ["Failed"] * failed_attempts + ["Finished"] * ROUNDS
        assert sorted(status for _, status in statuses) == expected, statuses
        session = (await self.http.get(f"{api}/sessions/{self.session_id}")).json()
        assert session["status"] == "Finished"
        return (await self.http.get(f"{api}/models/{session['session_config']['model_id']}/download")).content


@asynccontextmanager
async def run_of(server: ServerProcess, shards: Path, folder: Path, *, api_url: str = "") -> AsyncIterator[Run]:
    """The server is ready; clients are on their way to api_url (default: the server's own)."""
    async with httpx.AsyncClient() as http:
        run = Run(server, http)
        run.api_url = api_url or server.api_url
        try:
            for index in range(CLIENTS):
                command = (str(DIGITS / "callbacks.py"), "--api-url", run.api_url, "--data", str(shards))
                with (folder / f"client-{index}.log").open("ab") as log:
                    run.clients.append(
                        await asyncio.create_subprocess_exec(
                            sys.executable, *command, "--index", str(index), stdout=log, stderr=log
                        )
                    )
            yield run
        finally:
            for process in run.clients:
                if process.returncode is None:
                    process.kill()
            await asyncio.gather(*(process.wait() for process in run.clients))


async def federation(
    folder: Path, shards: Path, seed: bytes, kills: Sequence[int], where: Where | None = None
) -> tuple[bytes, int]:
    """Trains a session to its end, the server being killed at the given numbers of events of each of its lives.

    Returns the final model's bytes, and how often it was killed.
    """
    where = where or Where()
    folder.mkdir()
    plan, killed = list(kills), 0
    async with (
        asyncio.timeout(WAIT_S),
        ServerProcess(folder / "data", *where.arguments, environment=where.environment) as server,
        run_of(server, shards, folder) as run,
    ):
        await run.start(seed)
        while not await run.until_ended(plan[0] if plan else None):
            plan.pop(0)
            killed += 1
            await server.start()
        return await run.final_model(), killed
