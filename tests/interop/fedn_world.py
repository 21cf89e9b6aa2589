"""FEDn 0.33.0, unmodified, as processes against our server: what the interop tests start, ask and wait for.

Training and validation (package/client, fedn_program.py) are sums that can be checked by hand, so that an update that
is lost or counted twice shows in the model.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import signal
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.interop.fedn_venv import fedn_venv

HERE = Path(__file__).parent
PACKAGE = HERE / "package"
CALL_TIMEOUT_S = 60.0

SHARDS = {
    "client-a": {"shift": 1.0, "num_examples": 10},
    "client-b": {"shift": 4.0, "num_examples": 20},
}
ROUND_SHIFT = 3.0  # (1 * 10 + 4 * 20) / 30


class Processes:
    """What a test starts: output goes to files in `directory`, and nothing outlives stop()."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started: list[Process] = []

    async def start(self, name: str, *command: str, cwd: Path, env: dict[str, str]) -> Process:
        with (self.directory / f"{name}.out").open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command, cwd=cwd, env=env, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def tails(self) -> str:
        """The last lines of every output."""
        outputs = sorted([*self.directory.glob("*.out"), *self.directory.glob("*.log")])
        return "\n".join(f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-25:]) for path in outputs)

    async def stop(self) -> None:
        for process in self.started:
            if process.returncode is None:
                with suppress(ProcessLookupError):  # it has ended, and its end was not heard yet
                    os.killpg(process.pid, signal.SIGKILL)  # a FEDn client may have an entry point running
        for process in self.started:
            await process.wait()

    # ---- FEDn

    async def client_start(
        self, client_id: str, *options: str, local: bool = True, shard: dict[str, Any] | None = None, **variables: str
    ) -> Process:
        """`fedn client start` with these options, in a directory of its own."""
        directory = self.directory / client_id
        if local:
            shutil.copytree(PACKAGE, directory)
            (directory / "client" / "shard.json").write_text(json.dumps(shard or SHARDS[client_id]))
        else:
            directory.mkdir()
        given = ("--name", f"name of {client_id}", "--client-id", client_id) if "-in" not in options else ()
        command = [str(fedn_venv() / "bin" / "fedn"), "client", "start", *given, *options]
        return await self.start(client_id, *command, cwd=directory, env=fedn_environment(directory) | variables)

    async def program(
        self,
        client_id: str,
        api_url: str,
        *,
        shift: float,
        num_examples: int,
        variables: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Process:
        """fedn_program.py as a client that trains in its own process."""
        directory = self.directory / client_id
        directory.mkdir()
        said = {"api_url": api_url, "client_id": client_id, "shift": shift, "num_examples": num_examples, **more}
        command = [str(fedn_venv() / "bin" / "python"), str(HERE / "fedn_program.py"), json.dumps(said)]
        environment = fedn_environment(directory) | dict(variables or {})
        return await self.start(client_id, *command, cwd=directory, env=environment)

    async def ask(self, script: str, calls: list[Any], **variables: str) -> list[Any]:
        """What a script of this folder, run in FEDn's environment, answers to the calls: one answer each."""
        directory = self.directory / "calls"
        directory.mkdir(exist_ok=True)
        process = await asyncio.create_subprocess_exec(
            str(fedn_venv() / "bin" / "python"), str(HERE / script), cwd=directory,
            env=fedn_environment(directory) | variables, stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        async with asyncio.timeout(CALL_TIMEOUT_S):
            said, complained = await process.communicate(json.dumps(calls).encode())
        assert process.returncode == 0, complained.decode()
        answers: list[Any] = json.loads(said)
        assert len(answers) == len(calls)
        return answers


@asynccontextmanager
async def processes(directory: Path) -> AsyncIterator[Processes]:
    ours = Processes(directory)
    try:
        yield ours
    except (AssertionError, TimeoutError, httpx.HTTPError, KeyError) as failure:
        failure.add_note(ours.tails())
        raise
    finally:
        await ours.stop()


def fedn_environment(directory: Path) -> dict[str, str]:
    """Without settings of ours or FEDn's; temporary files lie below `directory`; `python` is that of FEDn."""
    tmp = directory / "tmp"
    tmp.mkdir(exist_ok=True)
    path = f"{fedn_venv() / 'bin'}:{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(directory), "TMPDIR": str(tmp), "FEDN_HOME_DIR": str(directory)}


# ---- our server's side


async def until(api: httpx.AsyncClient, reached: Callable[[], Awaitable[bool]]) -> None:
    """Ask `reached` now, and again after every event of the server's feed."""
    async with api.stream("GET", "/api/v1/events", timeout=None) as feed:
        feed.raise_for_status()
        if await reached():
            return
        async for line in feed.aiter_lines():
            if line.startswith("data:") and await reached():
                return
    raise AssertionError("the feed ended")


async def online(api: httpx.AsyncClient, *client_ids: str) -> None:
    """Returns when these clients are attached."""

    async def reached() -> bool:
        page = (await api.get("/api/v1/clients/", params={"status": "online"})).raise_for_status().json()
        return set(client_ids) <= {client["client_id"] for client in page["result"]}

    await until(api, reached)


async def ended(api: httpx.AsyncClient, session_id: str) -> dict[str, Any]:
    """The session, once it has ended."""

    async def reached() -> bool:
        session = (await api.get(f"/api/v1/sessions/{session_id}")).raise_for_status().json()
        return session["status"] in ("Finished", "Failed", "Terminated")

    await until(api, reached)
    return dict((await api.get(f"/api/v1/sessions/{session_id}")).json())


def seed() -> bytes:
    out = io.BytesIO()
    layers_by_index: dict[str, Any] = {"0": np.zeros((3, 2), np.float32), "1": np.zeros(2, np.float32)}
    np.savez(out, **layers_by_index)
    return out.getvalue()


async def add_seed(api: httpx.AsyncClient) -> str:
    upload = (await api.post("/api/v1/models/", files={"file": ("seed.npz", seed())})).raise_for_status()
    return str(upload.json()["model_id"])


async def start_session(
    api: httpx.AsyncClient, rounds: int, *, client_ids: str = "", seed_model_id: str = "", **config: Any
) -> tuple[str, str]:
    """The ids of a started session and of its seed model."""
    seed_model_id = seed_model_id or await add_seed(api)
    wanted = {
        "aggregator": "fedavg",
        "round_timeout": 60,
        "buffer_size": -1,
        "delete_models_storage": True,
        "clients_required": 2,
        "validate": True,
        "helper_type": "numpyhelper",
        "model_id": seed_model_id,
        **config,
    }
    created = await api.post("/api/v1/sessions/", json={"name": "interop", "session_config": wanted})
    assert created.status_code == 201, created.text
    session_id = created.json()["session_id"]
    start = {"session_id": session_id, "rounds": rounds, "wait_for_clients_s": 60}
    start |= {"client_ids": client_ids} if client_ids else {}
    started = await api.post("/api/v1/sessions/start", json=start)
    assert started.status_code == 200, started.text
    return session_id, seed_model_id


async def listed(api: httpx.AsyncClient, noun: str, **filters: str) -> list[dict[str, Any]]:
    """All that the filters (`__` for a dot) leave, oldest first."""
    params = {key.replace("__", "."): value for key, value in filters.items()}
    answer = await api.get(f"/api/v1/{noun}/", params=params, headers={"X-Sort-Order": "asc"})
    page = answer.raise_for_status().json()
    assert list(page) == ["count", "result"]
    return list(page["result"])


async def trail(api: httpx.AsyncClient, session_id: str, seed_model_id: str) -> list[str]:
    """The session's models from the first round to the last, each the parent of the next."""
    models = await listed(api, "models", session_id=session_id)
    child_of = {model["parent_model"]: model["model_id"] for model in models}
    found = [child_of[seed_model_id]]
    while found[-1] in child_of:
        found.append(child_of[found[-1]])
    assert len(found) == len(models)
    return found


async def value_of(api: httpx.AsyncClient, model_id: str) -> float:
    """The one value of all parameters of a model that came from the seed."""
    stored = (await api.get(f"/api/v1/models/{model_id}/download")).raise_for_status().content
    with np.load(io.BytesIO(stored)) as layers:
        assert {name: layers[name].shape for name in layers.files} == {"0": (3, 2), "1": (2,)}
        [value] = {float(number) for name in layers.files for number in layers[name].reshape(-1)}
    return value
