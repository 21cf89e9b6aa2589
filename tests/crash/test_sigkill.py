"""The real process killed with SIGKILL under a session with real client processes: it resumes by itself, the number
of committed rounds is exact, and the final model is the undisturbed run's, byte for byte."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from fl_client.wire.codec import encode
from fl_server.testing import CONFIG, ServerProcess

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
CLIENTS, ROUNDS = 4, 5
WAIT_S = 120.0


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    script = [sys.executable, str(DIGITS / "data.py"), "--out", str(folder), "--clients", str(CLIENTS)]
    subprocess.run(script, check=True, timeout=WAIT_S)
    return folder


@asynccontextmanager
async def clients(api_url: str, shards: Path, folder: Path) -> AsyncIterator[list[asyncio.subprocess.Process]]:
    running = []
    for index in range(CLIENTS):
        command = (str(DIGITS / "callbacks.py"), "--api-url", api_url, "--data", str(shards), "--index", str(index))
        with (folder / f"client-{index}.log").open("ab") as log:
            running.append(await asyncio.create_subprocess_exec(sys.executable, *command, stdout=log, stderr=log))
    try:
        yield running
    finally:
        for process in running:
            if process.returncode is None:
                process.kill()
        await asyncio.gather(*(process.wait() for process in running))


async def events(server: ServerProcess, http: httpx.AsyncClient) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """(kind, data) of all that the server has told and tells; ends when it dies."""
    kind = ""
    try:
        async with http.stream("GET", f"{server.api_url}/api/v1/events?after=0", timeout=WAIT_S) as stream:
            async for line in stream.aiter_lines():
                if line.startswith("event:"):
                    kind = line.partition(":")[2].strip()
                elif line.startswith("data:"):
                    yield kind, json.loads(line.partition(":")[2])
    except httpx.TransportError:
        return


async def start_session(server: ServerProcess, http: httpx.AsyncClient, seed: bytes) -> str:
    async def ask(path: str, **request: Any) -> dict[str, Any]:
        reply = await http.post(server.api_url + path, timeout=WAIT_S, **request)
        assert reply.is_success, reply.text
        return dict(reply.json())

    model = await ask("/api/v1/models/", files={"file": ("seed.npz", seed)})
    config = {
        **CONFIG,
        "model_id": model["model_id"],
        "clients_required": CLIENTS,
        "validate": True,
        "client_settings": {"seed": 7},
    }
    session = await ask("/api/v1/sessions/", json={"session_config": config})
    start = {"session_id": session["session_id"], "rounds": ROUNDS, "wait_for_clients_s": 60}
    await ask("/api/v1/sessions/start", json=start)
    return str(session["session_id"])


async def federation(folder: Path, shards: Path, seed: bytes, kills: Sequence[int]) -> tuple[bytes, int]:
    """Trains a session to its end, the server being killed at the given numbers of events of each of its lives.

    Returns the final model's bytes, and how often it was killed.
    """
    folder.mkdir()
    plan, killed = list(kills), 0
    async with (
        asyncio.timeout(WAIT_S),
        ServerProcess(folder / "data") as server,
        httpx.AsyncClient() as http,
        clients(server.api_url, shards, folder) as running,
    ):
        session_id = await start_session(server, http, seed)
        while not await ended(server, http, plan[0] if plan else None):
            plan.pop(0)
            killed += 1
            await server.start()
        assert [process.returncode for process in running] == [None] * CLIENTS, "every client lives on"
        return await final_model(server, http, session_id), killed


async def ended(server: ServerProcess, http: httpx.AsyncClient, kill_at: int | None) -> bool:
    """Whether the session came to its end; False when the server was killed at that event of this life."""
    seen = 0
    async for kind, data in events(server, http):
        seen += 1
        if seen == kill_at:
            await server.kill()
            return False
        if kind == "session" and data["status"] != "Started":
            assert data["status"] == "Finished", data
            return True
    raise AssertionError(f"the server ended by itself:\n{server.tail()}")


async def final_model(server: ServerProcess, http: httpx.AsyncClient, session_id: str) -> bytes:
    api = f"{server.api_url}/api/v1"
    models = (await http.get(f"{api}/models/", params={"session_id": session_id})).json()
    assert models["count"] == ROUNDS, "one model a round"
    rounds = (await http.get(f"{api}/rounds/", params={"round_config.session_id": session_id})).json()
    assert [found["status"] for found in rounds["result"]] == ["Finished"] * ROUNDS
    session = (await http.get(f"{api}/sessions/{session_id}")).json()
    assert session["status"] == "Finished"
    return (await http.get(f"{api}/models/{session['session_config']['model_id']}/download")).content


@pytest.fixture(scope="module")
def seed() -> bytes:
    sys.path.insert(0, str(DIGITS / "client"))
    try:
        import model  # the example is no package
    finally:
        sys.path.remove(str(DIGITS / "client"))
    return encode(model.init(7))


@pytest.fixture(scope="module")
def undisturbed(shards: Path, seed: bytes, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    model, killed = asyncio.run(federation(tmp_path_factory.mktemp("calm") / "run", shards, seed, []))
    assert killed == 0
    return model


async def test_killed_three_times_in_one_session(undisturbed: bytes, shards: Path, seed: bytes, tmp_path: Path) -> None:
    model, killed = await federation(tmp_path / "run", shards, seed, [9, 12, 15])
    assert killed == 3
    assert model == undisturbed


@pytest.mark.long
async def test_killed_at_twenty_points(undisturbed: bytes, shards: Path, seed: bytes, tmp_path: Path) -> None:
    draw = random.Random(20)
    for index, point in enumerate(sorted(draw.sample(range(3, 60), 20))):
        model, killed = await federation(tmp_path / str(index), shards, seed, [point])
        assert killed == 1, f"event {point} did not come"
        assert model == undisturbed, f"killed after event {point}"
