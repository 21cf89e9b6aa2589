"""The real FEDn 0.33.0 client, unmodified, against our server as a process of its own.

Training and validation (package/client) are sums that can be checked by hand, so that an update that is lost or
counted twice over the server's death shows in the last model.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.interop.fedn_venv import fedn_venv

PACKAGE = Path(__file__).with_name("package")
START_TIMEOUT_S = 30.0
# A FEDn client redials 10 s after it lost the server, and 20 s after that.
SESSION_TIMEOUT_S = 150.0

SHARDS = {
    "client-a": {"shift": 1.0, "num_examples": 10},
    "client-b": {"shift": 4.0, "num_examples": 20},
}
ROUND_SHIFT = 3.0  # (1 * 10 + 4 * 20) / 30


class Processes:
    """What the test starts: output goes to files in `directory`, and nothing outlives stop()."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started: list[Process] = []

    async def start(self, name: str, *command: str, cwd: Path, env: dict[str, str]) -> Process:
        with self.output_of(name).open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command, cwd=cwd, env=env, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def output_of(self, name: str) -> Path:
        return self.directory / f"{name}.out"

    def tails(self) -> str:
        """The last lines of every output."""
        outputs = sorted(self.directory.glob("*.out"))
        return "\n".join(f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-25:]) for path in outputs)

    async def stop(self) -> None:
        for process in self.started:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)  # a FEDn client may have an entry point running
        for process in self.started:
            await process.wait()


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


def environment(directory: Path, *, path_first: Path | None = None) -> dict[str, str]:
    """An environment without settings of ours or FEDn's; temporary files lie below `directory`."""
    tmp = directory / "tmp"
    tmp.mkdir(exist_ok=True)
    path = os.environ["PATH"]
    return {"PATH": f"{path_first}:{path}" if path_first else path, "HOME": str(directory), "TMPDIR": str(tmp)}


async def start_server(ours: Processes, api_port: int, grpc_port: int) -> tuple[Process, str, int]:
    """A ready server on the one data directory of the test, its API's URL and its gRPC port; port 0 is any."""
    ready_file = ours.directory / "ready.json"
    ready_file.unlink(missing_ok=True)
    process = await ours.start(
        "server", sys.executable, "-m", "fl_server.cli", "up", "--data-dir", str(ours.directory / "data"),
        "--api-port", str(api_port), "--grpc-port", str(grpc_port), "--ready-file", str(ready_file),
        cwd=ours.directory, env=environment(ours.directory),
    )  # fmt: skip
    async with asyncio.timeout(START_TIMEOUT_S):
        while not ready_file.exists():  # another process makes it: no event can tell us, but its exit ends the wait
            try:
                code = await asyncio.wait_for(process.wait(), 0.05)
            except TimeoutError:
                continue
            raise AssertionError(f"the server ended with exit code {code}")
    ready = json.loads(ready_file.read_text())
    return process, ready["api_url"], ready["grpc_port"]


async def start_fedn_client(ours: Processes, client_id: str, api_url: str) -> Process:
    directory = ours.directory / client_id
    shutil.copytree(PACKAGE, directory)
    (directory / "client" / "shard.json").write_text(json.dumps(SHARDS[client_id]))
    bin_directory = fedn_venv() / "bin"
    return await ours.start(
        client_id, str(bin_directory / "fedn"), "client", "start", "--api-url", api_url,
        "--name", f"name of {client_id}", "--client-id", client_id, "--local-package",
        cwd=directory, env=environment(directory, path_first=bin_directory),  # `python` of the entry points
    )  # fmt: skip


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


async def start_session(api: httpx.AsyncClient, seed: bytes, rounds: int) -> tuple[str, str]:
    """The ids of a started session and of its seed model."""
    (await api.put("/api/v1/helpers/active", json={"helper": "numpyhelper"})).raise_for_status()
    upload = (await api.post("/api/v1/models/", files={"file": ("seed.npz", seed)})).raise_for_status()
    seed_model_id = upload.json()["model_id"]
    config = {
        "aggregator": "fedavg",
        "round_timeout": 60,
        "buffer_size": -1,
        "delete_models_storage": True,
        "clients_required": len(SHARDS),
        "validate": True,
        "helper_type": "numpyhelper",
        "model_id": seed_model_id,
    }
    created = await api.post("/api/v1/sessions/", json={"name": "interop", "session_config": config})
    assert created.status_code == 201, created.text
    session_id = created.json()["session_id"]
    start = {"session_id": session_id, "rounds": rounds, "wait_for_clients_s": 60}
    started = await api.post("/api/v1/sessions/start", json=start)
    assert started.status_code == 200, started.text
    return session_id, seed_model_id


async def listed(api: httpx.AsyncClient, noun: str, session_id: str) -> list[dict[str, Any]]:
    page = (await api.get(f"/api/v1/{noun}/", params={"session_id": session_id})).raise_for_status().json()
    assert page["count"] == len(page["result"])
    return list(page["result"])


async def test_fedn_clients_finish_a_session_whose_server_was_killed_after_the_first_round(tmp_path: Path) -> None:
    seed = io.BytesIO()
    layers_by_index: dict[str, Any] = {"0": np.zeros((3, 2), np.float32), "1": np.zeros(2, np.float32)}
    np.savez(seed, **layers_by_index)

    async with processes(tmp_path) as ours:
        server, api_url, grpc_port = await start_server(ours, 0, 0)
        async with asyncio.timeout(SESSION_TIMEOUT_S):
            clients = {client_id: await start_fedn_client(ours, client_id, api_url) for client_id in SHARDS}

            async with httpx.AsyncClient(base_url=api_url, timeout=90) as api:
                session_id, seed_model_id = await start_session(api, seed.getvalue(), rounds=3)

                async def first_round_committed() -> bool:
                    return len(await listed(api, "models", session_id)) >= 1

                await until(api, first_round_committed)
                server.kill()
                await server.wait()

            _, api_url_again, grpc_port_again = await start_server(ours, httpx.URL(api_url).port or 0, grpc_port)
            assert (api_url_again, grpc_port_again) == (api_url, grpc_port)

            async with httpx.AsyncClient(base_url=api_url, timeout=90) as api:
                assert len(await listed(api, "models", session_id)) < 3, "killed too late to show anything"

                async def ended() -> bool:
                    session = (await api.get(f"/api/v1/sessions/{session_id}")).raise_for_status().json()
                    return session["status"] in ("Finished", "Failed", "Terminated")

                await until(api, ended)
                session = (await api.get(f"/api/v1/sessions/{session_id}")).json()
                models = await listed(api, "models", session_id)
                validations = await listed(api, "validations", session_id)

                assert session["status"] == "Finished", session
                assert len(models) == 3
                child_of = {model["parent_model"]: model["model_id"] for model in models}
                trail = [child_of[seed_model_id]]
                while trail[-1] in child_of:
                    trail.append(child_of[trail[-1]])
                assert len(trail) == 3

                for number, model_id in enumerate(trail, start=1):
                    stored = (await api.get(f"/api/v1/models/{model_id}/download")).raise_for_status().content
                    with np.load(io.BytesIO(stored)) as layers:
                        assert {name: layers[name].shape for name in layers.files} == {"0": (3, 2), "1": (2,)}
                        for name in layers.files:
                            np.testing.assert_array_equal(layers[name], number * ROUND_SHIFT)

        means = {(v["sender"]["client_id"], v["model_id"]): json.loads(v["data"])["mean"] for v in validations}
        assert len(means) == len(validations), "a validation is stored twice"
        # The kill may fall into the validation of the first model; a later one is done before the next round's task.
        for number, model_id in enumerate(trail[1:], start=2):
            for client_id in SHARDS:
                assert means[client_id, model_id] == number * ROUND_SHIFT
        assert {client_id: process.returncode for client_id, process in clients.items()} == dict.fromkeys(SHARDS)
