"""A running server with clients, for tests: ours, and those of whoever writes a client, an aggregator, an SDK call.

`Federation` serves in this process; `ServerProcess` is `flserve up` in one of its own, to be killed. As a pytest plugin
(`pytest_plugins = ["fl_server.testing"]`) it gives the fixture `federation`: an empty one, on free ports.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import numpy.typing as npt
import pytest

from fl_client.client import Backoff, Client, Predict, Train, Validate
from fl_client.tokens import Tokens
from fl_client.wire import codec
from fl_server.app import Server, serving
from fl_server.scheduler.feed import FeedEvent
from fl_server.settings import Settings

T = TypeVar("T")
QUICK = Backoff(base_s=0.02, cap_s=0.2)
CONFIG: Mapping[str, Any] = {
    "aggregator": "fedavg",
    "round_timeout": 60,
    "buffer_size": -1,
    "delete_models_storage": True,
    "clients_required": 1,
    "requested_clients": 0,
    "validate": False,
    "helper_type": "numpyhelper",
}


class Federation:
    """An async context manager: inside it the server is ready, and the clients are on their way.

    Everything runs in one task of its own, so that set-up, test and tear-down may be in different tasks (pytest-asyncio
    does that); every wait offered here ends with that task's error when it ends.
    """

    def __init__(
        self,
        *,
        train: Train | None = None,
        validate: Validate | None = None,
        predict: Predict | None = None,
        clients: int | Sequence[str] = 0,
        data_dir: Path | None = None,
        wait_s: float = 60.0,
        **settings: Any,
    ) -> None:
        """clients: how many, named c0, c1, …; or their ids. settings: those of the server (fl_server.settings)."""
        self._callbacks = (train, validate, predict)
        self._ids = [f"c{index}" for index in range(clients)] if isinstance(clients, int) else list(clients)
        self._data_dir, self._wait_s, self._settings = data_dir, wait_s, settings
        self._up, self._leave = asyncio.Event(), asyncio.Event()
        self._tasks: asyncio.TaskGroup
        self._main: asyncio.Task[None]
        self._running: dict[str, asyncio.Task[None]] = {}
        self.server: Server
        self.http: httpx.AsyncClient  # base_url is the server's

    async def __aenter__(self) -> Self:
        self._main = asyncio.create_task(self._live(), name="federation")  # awaited in __aexit__, watched in until()
        await self.until(self._up.wait())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._leave.set()
        await self._main

    async def _live(self) -> None:
        async with AsyncExitStack() as stack:
            data_dir = self._data_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flserve-")))
            given = {"api_port": 0, "grpc_port": 0, **self._settings, "data_dir": data_dir}
            self.server = await stack.enter_async_context(serving(Settings.load(None, given)))
            self.http = await stack.enter_async_context(httpx.AsyncClient(base_url=self.server.api_url, timeout=60))
            async with asyncio.TaskGroup() as self._tasks:
                train, validate, predict = self._callbacks
                if train is not None:
                    for client_id in self._ids:
                        self.add_client(client_id, train=train, validate=validate, predict=predict)
                self._up.set()
                await self._leave.wait()
                for task in self._running.values():
                    task.cancel()

    async def until(self, awaited: Awaitable[T]) -> T:
        """Its result, at most wait_s later; raises the federation's own error if that ends first."""
        wanted = asyncio.ensure_future(awaited)
        try:
            async with asyncio.timeout(self._wait_s):
                await asyncio.wait({wanted, self._main}, return_when=asyncio.FIRST_COMPLETED)
            if not wanted.done():
                await self._main
                raise RuntimeError("the federation has ended")
            return await wanted
        finally:
            wanted.cancel()

    # ---- clients

    def add_client(
        self,
        client_id: str,
        *,
        train: Train,
        validate: Validate | None = None,
        predict: Predict | None = None,
        token: str | Tokens = "",
    ) -> Client:
        """Attaches on its way; `attached` waits for it."""
        client = Client(
            api_url=self.server.api_url,
            train=train,
            validate=validate,
            predict=predict,
            client_id=client_id,
            token=token,
            backoff=QUICK,
        )
        self._running[client_id] = self._tasks.create_task(client.run(), name=f"client {client_id}")
        return client

    async def remove_client(self, client_id: str) -> None:
        """Ends it at once, whatever it is doing, and waits until the server has noticed."""
        self._running.pop(client_id).cancel()
        await self.event("client", client_id=client_id, status="offline")

    async def attached(self, count: int) -> None:
        """Returns when so many clients are attached."""

        async def wait() -> None:
            async with self.server.scheduler.feed.watch() as events:
                while len(self.server.scheduler.streams.attached()) < count:
                    await anext(events)

        await self.until(wait())

    # ---- sessions

    async def add_seed(self, parameters: Sequence[npt.NDArray[Any]], *, helper: str = codec.NUMPY) -> str:
        """The model's id."""
        files = {"file": (f"seed{codec.SUFFIXES[helper]}", codec.encode(parameters, helper=helper))}
        return str(await self.call("POST", "/api/v1/models/", "model_id", files=files, data={"helper": helper}))

    async def create_session(self, model_id: str, *, name: str | None = None, **config: Any) -> str:
        """config: FEDn's session_config keys; what is left out is as in CONFIG. Returns the session's id."""
        body = {"name": name, "session_config": {**CONFIG, "model_id": model_id, **config}}
        return str(await self.call("POST", "/api/v1/sessions/", "session_id", json=body))

    async def start(self, session_id: str, *, wait_for_clients_s: float = 30.0, **body: Any) -> None:
        wanted = {"session_id": session_id, "wait_for_clients_s": wait_for_clients_s, **body}
        await self.call("POST", "/api/v1/sessions/start", json=wanted)

    async def ended(self, session_id: str) -> dict[str, Any]:
        """The session's object, once it is Finished, Failed or Terminated."""

        async def wait() -> dict[str, Any]:
            async with self.server.scheduler.feed.watch() as events:
                while True:
                    session = await self.session(session_id)
                    if session["status"] in ("Finished", "Failed", "Terminated"):
                        return session
                    while (event := await anext(events)).kind != "session" or event.data["session_id"] != session_id:
                        pass

        return await self.until(wait())

    async def run(self, parameters: Sequence[npt.NDArray[Any]], *, rounds: int, **config: Any) -> dict[str, Any]:
        """A session from this seed to its end; its object."""
        seed = await self.add_seed(parameters, helper=config.get("helper_type", CONFIG["helper_type"]))
        session_id = await self.create_session(seed, rounds=rounds, **config)
        await self.start(session_id, rounds=rounds)
        return await self.ended(session_id)

    async def session(self, session_id: str) -> dict[str, Any]:
        return dict(await self.call("GET", f"/api/v1/sessions/{session_id}"))

    async def parameters(self, model_id: str) -> codec.Parameters:
        reply = await self.until(self.http.get(f"/api/v1/models/{model_id}/download"))
        reply.raise_for_status()
        helper = codec.recognised(memoryview(reply.content)) or codec.BINARY
        return codec.decode(reply.content, helper=helper)

    async def event(self, kind: str, *, after: int | None = 0, **data: Any) -> FeedEvent:
        """The first event of this kind with these data; after=0: also among those of the past that the feed keeps."""

        async def wait() -> FeedEvent:
            async with self.server.scheduler.feed.watch(after) as events:
                async for event in events:
                    if event.kind == kind and data.items() <= event.data.items():
                        return event
            raise RuntimeError("the feed has ended")

        return await self.until(wait())

    async def call(self, method: str, path: str, key: str | None = None, **request: Any) -> Any:
        """The reply's JSON, or one key of it. Raises AssertionError with the server's words when it refuses."""
        reply = await self.until(self.http.request(method, path, **request))
        assert reply.is_success, f"{method} {path}: {reply.status_code} {reply.text}"
        body = reply.json()
        return body[key] if key else body


class ServerProcess:
    """`flserve up` as a process: start, kill and start again on the same data and ports."""

    def __init__(
        self,
        data_dir: Path,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        wait_s: float = 60.0,
        module: str = "fl_server.cli",
    ) -> None:
        """environment: FL_* variables; those of this process are not handed on. module: what is run as `flserve`."""
        self.data_dir, self._arguments, self._wait_s = data_dir, arguments, wait_s
        self._module = module
        self._environment = dict(environment or {})
        self._ports = (0, 0)
        self._process: asyncio.subprocess.Process | None = None
        self.api_url = ""
        self.log = data_dir.parent / f"{data_dir.name}.log"

    @property
    def grpc_port(self) -> int:
        return self._ports[1]

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Returns when it is ready. Raises AssertionError with the log's end if it stops instead."""
        ready_file = self.data_dir.parent / f"{self.data_dir.name}.ready"
        ready_file.unlink(missing_ok=True)
        api_port, grpc_port = self._ports
        ports = ("--api-port", str(api_port), "--grpc-port", str(grpc_port))
        where = ("--data-dir", str(self.data_dir), "--ready-file", str(ready_file))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FL_")}
        environment |= self._environment
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", self._module, "up", *where, *ports, *self._arguments),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        async with asyncio.timeout(self._wait_s):
            said = await self._process.stdout.readline()  # the one line that it prints, when it is ready
            if not said:
                raise AssertionError(f"flserve up ended with {await self._process.wait()}:\n{self.tail()}")
        ready = json.loads(ready_file.read_text())
        self.api_url = ready["api_url"]
        self._ports = (int(self.api_url.rpartition(":")[2]), ready["grpc_port"])

    def send(self, number: signal.Signals) -> None:
        """SIGSTOP and SIGCONT, for tests of a server that hangs."""
        assert self._process is not None
        self._process.send_signal(number)

    async def ended(self) -> int:
        """The exit code, when it ends by itself."""
        assert self._process is not None
        async with asyncio.timeout(self._wait_s):
            return await self._process.wait()

    async def kill(self) -> None:
        """SIGKILL: nothing of it can react."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> int:
        """SIGTERM; its exit code."""
        return await self._end(signal.SIGTERM)

    async def _end(self, number: signal.Signals) -> int:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(number)
        async with asyncio.timeout(self._wait_s):
            return await self._process.wait()

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.returncode is None:
            await self.kill()


@pytest.fixture
async def federation() -> AsyncIterator[Federation]:
    """A server without clients; add them with add_client."""
    async with Federation() as running:
        yield running
