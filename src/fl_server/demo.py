"""`flserve demo`: a server and its clients as real processes on this machine, training on real data.

It uses nothing that a user does not have: the command line, the REST API, the scripts of examples/digits.
It must never leave a process behind, nor delete a file that no demo has made. Every wait has a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import httpx
from rich.console import Console

from fl_client.api import EventParser, ServerEvent
from fl_server.watch import Progress, Show, say, shown

DEFAULT_FOLDER = Path("flserve-data/demo")
MARKER = ".flserve-demo"
MADE_HERE = (
    "server", "shards", "client", "packages", "logs", "ready.json", "package.tgz", "seed.npz", "final-model.npz",
)  # fmt: skip

READY_TIMEOUT_S = 20.0
SCRIPT_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 30.0
ROUND_TIMEOUT_S = 60.0
CLIENTS_TIMEOUT_S = 60.0
QUIET_LIMIT_S = 90.0  # longer than any one thing that a session waits for here
STOP_TIMEOUT_S = 8.0
LOG_TAIL_LINES = 15

FLCLIENT = ("-m", "fl_client.cli")
SHOWN_METRICS = ("accuracy", "loss")
CLIENT_SETTINGS = {"seed": 7, "epochs": 8, "batch_size": 8, "learning_rate": 0.02, "momentum": 0.9, "noise": 0.6}


class DemoFailed(Exception):
    """The demo cannot go on; the message says why, and ends with the log of the process that is to blame."""


@dataclass(frozen=True, slots=True)
class DemoResult:
    rounds: int
    clients: int
    test_accuracy: float
    model_id: str
    seconds: float


async def run_demo(
    *,
    data_dir: Path | None,
    rounds: int = 10,
    clients: int = 5,
    output_format: Literal["table", "json"] = "table",
    console: Console | None = None,
) -> int:
    """The exit code: 0, 1 if the session did not finish, 128 + n after signal n. Call it in the main thread.

    console: for humans; by default stdout, with json stderr. With json, the last line of stdout is the result.
    """
    console = console or Console(stderr=output_format == "json")
    received: list[signal.Signals] = []
    try:
        with _cancelled_by_signals(received), _own_folder(data_dir or DEFAULT_FOLDER) as root:
            result = await _Demo(root, rounds, clients, console).run()
    except DemoFailed as exc:
        say(console, f"flserve demo: {exc}")
        return 1
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if not received or task is None:
            raise
        for _ in received:
            task.uncancel()
        say(console, f"flserve demo: stopped by {received[0].name}")
        return 128 + received[0]
    if output_format == "json":
        answer = {name: getattr(result, name) for name in DemoResult.__slots__}
        print(json.dumps(answer), flush=True)
    return 0


# ---- the processes


@dataclass(frozen=True, slots=True)
class Child:
    name: str
    log: Path
    process: asyncio.subprocess.Process

    def failure(self, what: str) -> DemoFailed:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return DemoFailed("\n".join([f"{self.name} {what}; the end of {self.log}:", *(f"  {line}" for line in lines)]))


@dataclass(frozen=True, slots=True)
class Children:
    """Processes in sessions of their own, so that a Ctrl-C reaches us alone and the order of the end is ours."""

    logs: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    started: list[Child] = field(default_factory=list)

    async def start(self, name: str, argv: Sequence[str]) -> Child:
        log = self.logs / f"{name.replace(' ', '-')}.log"
        with _new_file(log) as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=_child_environment(self.variables),
            )
        child = Child(name, log, process)
        self.started.append(child)
        return child

    async def run(self, name: str, argv: Sequence[str]) -> str:
        """The last line that a process printed, once it has ended well."""
        child = await self.start(name, argv)
        async with _deadline(SCRIPT_TIMEOUT_S, name):
            code = await child.process.wait()
        if code != 0:
            raise child.failure(f"ended with exit code {code}")
        printed = child.log.read_text().splitlines()
        return printed[-1] if printed else ""

    async def stop(self) -> None:
        """Ends the server last. What is still there at the deadline, or when we are cancelled, is killed."""
        try:
            for group in (self.started[1:], self.started[:1]):
                for child in group:
                    _signal_group(child, signal.SIGTERM)
                await _ended(group)
        finally:
            for child in self.started:
                _signal_group(child, signal.SIGKILL)
        await _ended(self.started)


async def _ended(children: Sequence[Child]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOP_TIMEOUT_S), asyncio.TaskGroup() as waits:
            for child in children:
                waits.create_task(child.process.wait(), name=f"end of {child.name}")


async def watch(child: Child) -> None:
    """Raises DemoFailed when this process ends, whatever its exit code: none of ours ends by itself."""
    code = await child.process.wait()
    raise child.failure(f"ended with exit code {code}")


def _signal_group(child: Child, number: signal.Signals) -> None:
    if child.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, number)


def _child_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Without FL_* and FEDN_* settings (the demo keeps to the defaults), and without a proxy to this machine."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FL_", "FEDN_"))}
    here = "127.0.0.1,localhost"
    ours = {"OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "NO_PROXY": here, "no_proxy": here}
    return {**kept, **ours, **variables}


# ---- the demo itself


@dataclass(frozen=True, slots=True)
class _Demo:
    root: Path
    rounds: int
    clients: int
    console: Console

    async def run(self) -> DemoResult:
        begun_at_s = time.monotonic()
        example = locate_example()
        if importlib.util.find_spec("sklearn") is None:
            raise DemoFailed("the demo's data come with scikit-learn, which is missing: pip install 'flserve[demo]'")
        children = Children(self.root / "logs", {"DIGITS_DATA": str((self.root / "shards").absolute())})
        failures: list[DemoFailed] = []
        try:
            async with asyncio.TaskGroup() as tasks:
                model_id, accuracy = await self._federate(children, tasks, example)
                raise _Done
        except* _Done:
            pass
        except* DemoFailed as group:
            failures.extend(_leaves(group))
        finally:
            await children.stop()
        if failures:
            raise failures[0]
        seconds = round(time.monotonic() - begun_at_s, 1)
        result = DemoResult(self.rounds, self.clients, round(accuracy, 4), model_id, seconds)
        self._conclude(result)
        return result

    async def _federate(self, children: Children, tasks: asyncio.TaskGroup, example: Path) -> tuple[str, float]:
        """The final model's id and its accuracy on the test split."""
        shards, seed, final = self.root / "shards", self.root / "seed.npz", self.root / "final-model.npz"
        server = await children.start("server", self._server_argv())
        tasks.create_task(watch(server), name="watch the server")
        say(self.console, f"starting a server and {self.clients} clients; files and logs in {self.root}")
        await children.run("data", [str(example / "data.py"), "--out", str(shards), "--clients", str(self.clients)])
        package = await self._make_package(children, example)
        api_url = await self._ready()
        async with _api(api_url, server) as api:
            await _upload_package(api, package.read_bytes())
            for index in range(self.clients):
                client = await children.start(f"client {index}", self._client_argv(api_url, index))
                tasks.create_task(watch(client), name=f"watch client {index}")
            session_id = await self._create_session(api, await _upload_seed(api, seed.read_bytes()))
            model_id = await self._train(api, session_id)
            final.write_bytes((await api.ask("GET", f"/api/v1/models/{model_id}/download")).content)
        scored = await children.run("score", [str(example / "score.py"), "--model", str(final), "--data", str(shards)])
        return model_id, float(json.loads(scored)["accuracy"])

    def _server_argv(self) -> list[str]:
        data_dir, ready_file = str(self.root / "server"), str(self.root / "ready.json")
        ports = ["--api-port", "0", "--grpc-port", "0", "--advertise-host", "127.0.0.1"]
        return ["-m", "fl_server.cli", "up", "--data-dir", data_dir, *ports, "--ready-file", ready_file]

    async def _make_package(self, children: Children, example: Path) -> Path:
        """As its author does, in a copy: the example may lie where we cannot write. Leaves seed.npz beside it."""
        folder = self.root / "client"
        shutil.copytree(example / "client", folder, ignore=shutil.ignore_patterns("__pycache__"))
        await children.run("build", [*FLCLIENT, "package", "build", "--path", str(folder)])
        packing = [*FLCLIENT, "package", "create", "--path", str(folder), "--output", str(self.root)]
        await children.run("package", packing)
        return self.root / "package.tgz"

    def _client_argv(self, api_url: str, index: int) -> list[str]:
        name = f"digits-{index}"
        where = ["--api-url", api_url, "--package-dir", str(self.root / "packages")]
        return [*FLCLIENT, "join", *where, "--name", name, "--client-id", name]

    async def _ready(self) -> str:
        async with _deadline(READY_TIMEOUT_S, "the server's start"):
            while True:
                with contextlib.suppress(FileNotFoundError):
                    return str(json.loads((self.root / "ready.json").read_text())["api_url"])
                await asyncio.sleep(0.05)  # a file cannot be awaited; if the server dies, its watcher says so

    async def _create_session(self, api: _Api, model_id: str) -> str:
        config = {
            "aggregator": "fedavg",
            "round_timeout": int(ROUND_TIMEOUT_S),
            "buffer_size": -1,
            "model_id": model_id,
            "delete_models_storage": True,
            "clients_required": self.clients,
            "requested_clients": self.clients,
            "validate": True,
            "helper_type": "numpyhelper",
            "rounds": self.rounds,
            "client_settings": CLIENT_SETTINGS,
        }
        reply = await api.ask("POST", "/api/v1/sessions/", json={"name": "demo", "session_config": config})
        return str(reply.json()["session_id"])

    async def _train(self, api: _Api, session_id: str) -> str:
        """The final model's id. The events are subscribed to before the session starts, so that none is missed."""
        progress = Progress(session_id, self.rounds)
        start = {"session_id": session_id, "rounds": self.rounds, "wait_for_clients_s": CLIENTS_TIMEOUT_S}
        with shown(self.console, "federated training: digits", SHOWN_METRICS) as show:
            async with api.events() as events:
                async with _deadline(CLIENTS_TIMEOUT_S + REQUEST_TIMEOUT_S, "the session's start"):
                    await api.ask("POST", "/api/v1/sessions/start", json=start)
                await _follow(events, progress, show)
        last = progress.rows.get(self.rounds)
        if progress.status != "finished" or last is None or last.model_id is None:
            raise DemoFailed(
                f"the session ended as {progress.status or 'unknown'}: {progress.reason or 'no reason given'}"
            )
        return last.model_id

    def _conclude(self, result: DemoResult) -> None:
        say(self.console, f"test accuracy {result.test_accuracy:.3f} on digits that no client has seen")
        say(self.console, f"model {self.root / 'final-model.npz'} (id {result.model_id})")
        say(self.console, f"{result.rounds} rounds, {result.clients} clients, {result.seconds:.1f} s")


class _Done(Exception):
    """Ends the TaskGroup of the watchers when there is nothing left to watch over."""


def _leaves(group: BaseExceptionGroup[DemoFailed]) -> Iterator[DemoFailed]:
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from _leaves(exc)
        else:
            yield exc


async def _follow(events: AsyncIterator[ServerEvent], progress: Progress, show: Show) -> None:
    loop = asyncio.get_running_loop()
    show(progress)
    try:
        async with asyncio.timeout(QUIET_LIMIT_S) as quiet:
            async for event in events:
                if progress.apply(event.kind, event.data, time.monotonic()):
                    quiet.reschedule(loop.time() + QUIET_LIMIT_S)
                    show(progress)
                if progress.ended:
                    return
    except TimeoutError:
        raise DemoFailed(f"nothing happened for {QUIET_LIMIT_S:g} s in session {progress.session_id}") from None
    raise DemoFailed("the server ended its event stream before the session's end")


@dataclass(frozen=True, slots=True)
class _Api:
    http: httpx.AsyncClient

    async def ask(self, method: str, path: str, **content: Any) -> httpx.Response:
        reply = await self.http.request(method, path, **content)
        if not reply.is_success:
            raise DemoFailed(f"{method} {path}: {reply.status_code} {reply.text}")
        return reply

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[ServerEvent]]:
        timeout = httpx.Timeout(REQUEST_TIMEOUT_S, read=None)  # silence has its own limit, in _follow
        async with self.http.stream("GET", "/api/v1/events/", timeout=timeout) as feed:
            if not feed.is_success:
                raise DemoFailed(f"GET /api/v1/events/: {feed.status_code}")
            parser = EventParser()
            async with aclosing(event async for chunk in feed.aiter_bytes() for event in parser.feed(chunk)) as events:
                yield events


@asynccontextmanager
async def _api(api_url: str, server: Child) -> AsyncIterator[_Api]:
    # CLIENTS_TIMEOUT_S: the longest that an answer may be held back on purpose
    timeout = httpx.Timeout(REQUEST_TIMEOUT_S, read=CLIENTS_TIMEOUT_S + REQUEST_TIMEOUT_S)
    try:
        async with httpx.AsyncClient(base_url=api_url, timeout=timeout, trust_env=False) as http:
            yield _Api(http)
    except httpx.HTTPError as exc:
        raise server.failure(f"does not answer ({type(exc).__name__})") from exc


async def _upload_package(api: _Api, package: bytes) -> None:
    form = {"name": "digits", "helper": "numpyhelper", "description": "a perceptron for handwritten digits"}
    await api.ask("POST", "/api/v1/packages/", files={"file": ("package.tgz", package)}, data=form)


async def _upload_seed(api: _Api, seed: bytes) -> str:
    reply = await api.ask("POST", "/api/v1/models/", files={"file": ("seed.npz", seed)})
    return str(reply.json()["model_id"])


def locate_example() -> Path:
    """The folder of examples/digits: in the installed package, or in the repository of an editable install."""
    here = Path(__file__).resolve()
    for folder in (here.parent / "examples" / "digits", here.parents[2] / "examples" / "digits"):
        if (folder / "client" / "fedn.yaml").is_file():
            return folder
    raise DemoFailed("the digits example is missing from this installation")


@contextmanager
def _own_folder(root: Path) -> Iterator[Path]:
    """An empty folder, ours until the context ends: what a former demo made in it is deleted, anything else refused."""
    with _locked_marker(root):
        for name in MADE_HERE:
            _delete(root / name)
        (root / "logs").mkdir()
        yield root


def _locked_marker(root: Path) -> IO[str]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()) and not (root / MARKER).exists():
            raise DemoFailed(f"{root} is not empty, and no demo made it: choose another --data-dir")
        marker = (root / MARKER).open("a")
    except OSError as exc:
        raise DemoFailed(f"{exc.filename}: {exc.strerror}") from exc
    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        marker.close()
        raise DemoFailed(f"another demo is running in {root}: choose another --data-dir") from None
    return marker


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _new_file(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _cancelled_by_signals(received: list[signal.Signals]) -> Iterator[None]:
    """The first signal cancels the calling task, which ends its processes; the next one has them killed at once."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    all_numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    numbers = [number for number in all_numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup's stays ignored

    def on_signal(number: signal.Signals) -> None:
        received.append(number)
        task.cancel()

    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@asynccontextmanager
async def _deadline(seconds: float, what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise DemoFailed(f"{what} took longer than {seconds:g} s") from None
