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
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import IO, Any, Literal

import httpx
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

DEFAULT_FOLDER = Path("flserve-data/demo")
MARKER = ".flserve-demo"
MADE_HERE = ("server", "shards", "logs", "ready.json", "seed.npz", "final-model.npz")

READY_TIMEOUT_S = 20.0
SCRIPT_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 30.0
ROUND_TIMEOUT_S = 60.0
CLIENTS_TIMEOUT_S = 60.0
QUIET_LIMIT_S = 90.0  # longer than any one thing that a session waits for here
STOP_TIMEOUT_S = 8.0
LOG_TAIL_LINES = 15

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
        _say(console, f"flserve demo: {exc}")
        return 1
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if not received or task is None:
            raise
        for _ in received:
            task.uncancel()
        _say(console, f"flserve demo: stopped by {received[0].name}")
        return 128 + received[0]
    if output_format == "json":
        answer = {name: getattr(result, name) for name in DemoResult.__slots__}
        print(json.dumps(answer), flush=True)
    return 0


# ---- what a session's events add up to


@dataclass(slots=True)
class RoundRow:
    round: int
    started_at_s: float
    attempt: int = 1
    phase: str = ""
    received: int = 0
    expected: int = 0
    model_id: str | None = None
    seconds: float | None = None  # set when it is completed; failed attempts count in
    reason: str = ""


@dataclass(slots=True)
class DemoProgress:
    """Folds the events of one session into rows, one a round. Pure: `at_s` is the caller's clock, any zero."""

    session_id: str
    rounds: int
    rows: dict[int, RoundRow] = field(default_factory=dict)
    status: str = ""
    reason: str = ""
    metrics: dict[int, dict[str, Mapping[str, Any]]] = field(default_factory=dict)  # of a round's model, by client id

    def apply(self, kind: str, data: Mapping[str, Any], at_s: float) -> bool:
        """False if the event is about something else."""
        if data.get("session_id") != self.session_id:
            return False
        match kind:
            case "session":
                self.status = str(data["status"]).lower()
                self.reason = data.get("reason") or ""
            case "round":
                self._round(data, at_s)
            case "update":
                if "received" in data:  # not for an update that comes when its round is over
                    row = self._row(data["round"], at_s)
                    row.received, row.expected = data["received"], data["expected"]
            case "model":
                row = self._row(data["round"], at_s)
                row.phase, row.model_id, row.seconds = "completed", data["model_id"], at_s - row.started_at_s
            case "validation":
                self.metrics.setdefault(data["round"], {})[data["client_id"]] = data["metrics"]
            case _:
                return False
        return True

    def _round(self, data: Mapping[str, Any], at_s: float) -> None:
        row = self._row(data["round"], at_s)
        if data["attempt"] != row.attempt:
            row.attempt, row.received = data["attempt"], 0
        row.phase = str(data["phase"]).lower()
        row.reason = data.get("reason") or ""
        row.expected = data["cohort"] or row.expected

    def _row(self, number: int, at_s: float) -> RoundRow:
        return self.rows.setdefault(number, RoundRow(number, at_s))

    @property
    def ended(self) -> bool:
        return self.status in ("finished", "failed", "terminated")

    @property
    def completed(self) -> int:
        return sum(row.phase == "completed" for row in self.rows.values())

    @property
    def fraction(self) -> float:
        """In [0, 1]; the running round counts by its updates."""
        running = (row for row in self.rows.values() if row.phase != "completed" and row.expected)
        return min(1.0, (self.completed + sum(row.received / row.expected for row in running)) / self.rounds)

    def mean(self, row: RoundRow, metric: str) -> float | None:
        """Of the round's model, over the clients that have validated it so far, each weighing the same."""
        reports = self.metrics.get(row.round, {}).values()
        values = [value for report in reports if (value := _finite(report.get(metric))) is not None]
        return fmean(values) if values else None

    def settled(self) -> list[RoundRow]:
        """The rows that will not change: completed, and validated by all or by no one any more."""
        done = sorted((row for row in self.rows.values() if row.phase == "completed"), key=lambda row: row.round)
        return [row for row in done if self.ended or row is not done[-1] or self._validated(row)]

    def _validated(self, row: RoundRow) -> bool:
        return 0 < row.expected <= len(self.metrics.get(row.round, {}))


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


async def server_events(chunks: AsyncIterable[bytes]) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
    """(event, data) of a stream of server-sent events whose data are JSON objects; comments are skipped."""
    kind, data, rest = "message", "", b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            text = line.rstrip(b"\r").decode()
            if not text:
                if data:
                    yield kind, json.loads(data)
                kind, data = "message", ""
            name, _, value = text.partition(":")
            if name == "event":
                kind = value.removeprefix(" ")
            elif name == "data":
                data += value.removeprefix(" ")


# ---- how it is shown


@contextmanager
def shown(console: Console) -> Iterator[Callable[[DemoProgress], None]]:
    """Shows progress: a live table on a terminal, elsewhere a line for each round when it is settled."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda progress: live.update(
                render(progress, time.monotonic(), max_rows=max(3, console.height - 7)), refresh=True
            )
    else:
        yield PlainRows(console).show


@dataclass(slots=True)
class PlainRows:
    console: Console
    printed: int = 0

    def show(self, progress: DemoProgress) -> None:
        settled = progress.settled()
        for row in settled[self.printed :]:
            number, updates, accuracy, loss, seconds, _ = cells(progress, row, row.started_at_s)
            _say(
                self.console,
                f"round {number:>2}/{progress.rounds}  updates {updates}  "
                f"validation accuracy {accuracy}  loss {loss}  {seconds} s",
            )
        self.printed = len(settled)


def render(progress: DemoProgress, now_s: float, *, max_rows: int) -> RenderableType:
    """The newest rounds and the overall progress; `now_s` on the clock of the events."""
    table = Table(title="federated training: digits")
    for column in ("round", "updates", "validation accuracy", "validation loss", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("state", no_wrap=True)
    newest = sorted(progress.rows.values(), key=lambda row: row.round)[-max_rows:]
    for row in newest:
        table.add_row(*(Text(cell) for cell in cells(progress, row, now_s)))
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        ProgressBar(total=1.0, completed=progress.fraction, width=40),
        Text(f"{progress.completed}/{progress.rounds} rounds" + ("" if progress.rows else ", waiting for clients")),
    )
    return Group(table, bar)


def cells(progress: DemoProgress, row: RoundRow, now_s: float) -> tuple[str, str, str, str, str, str]:
    """Round, updates, mean accuracy, mean loss, seconds, state: as they stand in the table."""
    accuracy, loss = progress.mean(row, "accuracy"), progress.mean(row, "loss")
    seconds = now_s - row.started_at_s if row.seconds is None else row.seconds
    attempt = f" (attempt {row.attempt})" if row.attempt > 1 else ""
    return (
        str(row.round),
        f"{row.received}/{row.expected}",
        "-" if accuracy is None else f"{accuracy:.3f}",
        "-" if loss is None else f"{loss:.3f}",
        f"{seconds:.2f}",
        row.phase + attempt + (f": {row.reason}" if row.reason else ""),
    )


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


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
                env=_child_environment(),
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


def _child_environment() -> dict[str, str]:
    """Without our FL_* settings (the demo keeps to the embedded default), and without a proxy to this machine."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FL_")}
    here = "127.0.0.1,localhost"
    return kept | {"OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "NO_PROXY": here, "no_proxy": here}


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
        children = Children(self.root / "logs")
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
        _say(self.console, f"starting a server and {self.clients} clients; files and logs in {self.root}")
        await children.run("data", [str(example / "data.py"), "--out", str(shards), "--clients", str(self.clients)])
        await children.run("seed", [str(example / "seed.py"), "--out", str(seed)])
        api_url = await self._ready()
        for index in range(self.clients):
            argv = [str(example / "client.py"), "--api-url", api_url, "--data", str(shards), "--index", str(index)]
            client = await children.start(f"client {index}", argv)
            tasks.create_task(watch(client), name=f"watch client {index}")
        async with _api(api_url, server) as api:
            session_id = await self._create_session(api, await _upload(api, seed.read_bytes()))
            model_id = await self._train(api, session_id)
            final.write_bytes((await api.ask("GET", f"/api/v1/models/{model_id}/download")).content)
        scored = await children.run("score", [str(example / "score.py"), "--model", str(final), "--data", str(shards)])
        return model_id, float(json.loads(scored)["accuracy"])

    def _server_argv(self) -> list[str]:
        data_dir, ready_file = str(self.root / "server"), str(self.root / "ready.json")
        ports = ["--api-port", "0", "--grpc-port", "0", "--advertise-host", "127.0.0.1"]
        return ["-m", "fl_server.cli", "up", "--data-dir", data_dir, *ports, "--ready-file", ready_file]

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
        progress = DemoProgress(session_id, self.rounds)
        start = {"session_id": session_id, "rounds": self.rounds, "wait_for_clients_s": CLIENTS_TIMEOUT_S}
        with shown(self.console) as show:
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
        _say(self.console, f"test accuracy {result.test_accuracy:.3f} on digits that no client has seen")
        _say(self.console, f"model {self.root / 'final-model.npz'} (id {result.model_id})")
        _say(self.console, f"{result.rounds} rounds, {result.clients} clients, {result.seconds:.1f} s")


class _Done(Exception):
    """Ends the TaskGroup of the watchers when there is nothing left to watch over."""


def _leaves(group: BaseExceptionGroup[DemoFailed]) -> Iterator[DemoFailed]:
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from _leaves(exc)
        else:
            yield exc


async def _follow(
    events: AsyncIterator[tuple[str, dict[str, Any]]], progress: DemoProgress, show: Callable[[DemoProgress], None]
) -> None:
    loop = asyncio.get_running_loop()
    show(progress)
    try:
        async with asyncio.timeout(QUIET_LIMIT_S) as quiet:
            async for kind, data in events:
                if progress.apply(kind, data, time.monotonic()):
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
    async def events(self) -> AsyncIterator[AsyncIterator[tuple[str, dict[str, Any]]]]:
        timeout = httpx.Timeout(REQUEST_TIMEOUT_S, read=None)  # silence has its own limit, in _follow
        async with self.http.stream("GET", "/api/v1/events/", timeout=timeout) as feed:
            if not feed.is_success:
                raise DemoFailed(f"GET /api/v1/events/: {feed.status_code}")
            async with aclosing(server_events(feed.aiter_bytes())) as events:
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


async def _upload(api: _Api, seed: bytes) -> str:
    await api.ask("PUT", "/api/v1/helpers/active", json={"helper": "numpyhelper"})
    reply = await api.ask("POST", "/api/v1/models/", files={"file": ("seed.npz", seed)})
    return str(reply.json()["model_id"])


def locate_example() -> Path:
    """The folder of examples/digits: in the installed package, or in the repository of an editable install."""
    here = Path(__file__).resolve()
    for folder in (here.parent / "examples" / "digits", here.parents[2] / "examples" / "digits"):
        if (folder / "client.py").is_file():
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
