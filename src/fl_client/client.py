"""The client: it attaches to a combiner, works the tasks that come, one after the other, and reports each once.

It lives until it is stopped, or until the server refuses or replaces it (ClientError): a server that is away is waited
for, a task that fails is reported as failed. No heartbeats, no statuses: the open task stream says that it is alive.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import logging
import math
import numbers
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from fl_client.transport import Assignment, CallRefused, ClientError, Link, Unreachable, ask_assignment
from fl_client.wire import fl_pb2 as pb
from fl_client.wire.codec import MAX_MODEL_BYTES, BadModel, Layout, NpzFile, Parameters, encode, parameters_fault

logger = logging.getLogger(__name__)

T = TypeVar("T")

TaskKind = Literal["train", "validate", "predict"]

_KINDS: Mapping[int, TaskKind] = {
    pb.StatusType.MODEL_UPDATE: "train",
    pb.StatusType.MODEL_VALIDATION: "validate",
    pb.StatusType.MODEL_PREDICTION: "predict",
}
_VERDICTS: Mapping[int, str] = {
    pb.Verdict.VERDICT_ACCEPTED: "accepted",
    pb.Verdict.VERDICT_DUPLICATE: "duplicate",
    pb.Verdict.VERDICT_NOT_SELECTED: "not_selected",
    pb.Verdict.VERDICT_LATE: "late",
    pb.Verdict.VERDICT_REJECTED: "rejected",
}
_QUEUED_TASKS = 16  # when full, the stream is not read: the server's flow control holds the rest
_REPORT_TIMEOUT_S = 600.0  # a server whose store is away holds a report; asking again is free
_FAILURES_BEFORE_ASKING = 3  # of the stream, before the REST API is asked whether the combiner moved
_MAX_FAILURE_CHARS = 500


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """What is asked, beside the model's parameters."""

    task_id: str
    kind: TaskKind
    session_id: str
    round: int  # within the session, from 1; 0: not said
    attempt: int  # of the round, from 1; 0: not said
    model_id: str
    client_id: str
    settings: Mapping[str, Any]  # the session's client_settings
    deadline: float  # seconds since the epoch, by the server's clock; 0: none


@dataclass(frozen=True, slots=True)
class TrainResult:
    """parameters: count, order and shapes of the ones given; num_examples: finite, above 0, the weight in the mean."""

    parameters: Sequence[npt.ArrayLike]
    num_examples: float
    metrics: Mapping[str, Any] = field(default_factory=dict)  # JSON; a number that is not finite goes as null


Train = Callable[[Parameters, TaskInfo], TrainResult | Awaitable[TrainResult]]
Validate = Callable[[Parameters, TaskInfo], Mapping[str, float] | Awaitable[Mapping[str, float]]]
Predict = Callable[[Parameters, TaskInfo], object]


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits between tries: doubling from base_s up to cap_s, each shortened at random by up to a half."""

    base_s: float = 0.5
    cap_s: float = 10.0

    def wait_s(self, failures: int) -> float:
        """failures: those before this one."""
        longest_s = min(self.cap_s, self.base_s * 2.0 ** min(failures, 32))
        return random.uniform(longest_s / 2, longest_s)


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a task could not be done, for its report."""

    reason: str


@dataclass(frozen=True, slots=True)
class _Trained:
    data: bytes
    sha256: str
    metadata: Mapping[str, Any]


class Client:
    """Runs once: await run(), or cancel it.

    A callback gets the model's parameters (its own, to change as it likes) and a TaskInfo. A plain one runs in the
    client's one thread, an async one on the loop; a plain one that runs cannot be interrupted, and holds the exit of
    the process until it returns. A missing one is reported as a failure.
    on_report(task, verdict, reason) is called on the loop and must not raise; verdict is "accepted", "duplicate",
    "not_selected", "late" or "rejected", or "" where the server says none (a validation, a prediction).
    """

    def __init__(
        self,
        *,
        train: Train,
        validate: Validate | None = None,
        predict: Predict | None = None,
        api_url: str = "",
        combiner: str = "",
        name: str = "",
        client_id: str = "",
        token: str = "",
        preferred_combiner: str = "",
        backoff: Backoff | None = None,
        max_model_bytes: int = MAX_MODEL_BYTES,
        on_report: Callable[[TaskInfo, str, str], None] | None = None,
    ) -> None:
        """api_url: asked for a combiner; or combiner: "host:port", where there is no REST API. Raises ClientError."""
        if bool(api_url) == bool(combiner):
            raise ClientError("either api_url or combiner is needed")
        self.client_id = client_id or str(uuid4())
        self.name = name or self.client_id
        if not (self.client_id.isascii() and self.client_id.isprintable()):
            raise ClientError(f"client_id: {self.client_id!r} is not printable ASCII, which gRPC needs")
        self._combiner = Assignment.parse(combiner) if combiner else None
        self._api_url = api_url
        self._preferred_combiner = preferred_combiner
        self._token = token
        self._train = train
        self._validate = validate
        self._predict = predict
        self._backoff = backoff or Backoff()
        self._max_model_bytes = max_model_bytes
        self._on_report = on_report

        self._link: Link | None = None
        self._waits_for = ""
        self._queue: asyncio.Queue[pb.TaskRequest] = asyncio.Queue(_QUEUED_TASKS)
        self._open: set[str] = set()  # keys of the tasks that are queued or worked
        self._working = False
        self._stopping = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"client {self.client_id}")

    async def run(self) -> None:
        """Returns after stop(). Raises ClientError when the server refuses this client or another took its place."""
        try:
            async with asyncio.TaskGroup() as group:
                attending = group.create_task(self._attend(), name=f"attend {self.client_id}")
                working = group.create_task(self._work(), name=f"work {self.client_id}")
                await self._stopping.wait()
                attending.cancel()
                if not self._working:
                    working.cancel()
        except ExceptionGroup as errors:
            ours, others = errors.split(ClientError)
            if ours is None or others is not None:
                raise
            raise ours.exceptions[0] from None
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)
            if self._link is not None:
                await self._link.close()

    def stop(self) -> None:
        """Lets run() return once the task that is worked is reported; queued ones are left to the server."""
        self._stopping.set()

    # ---- the stream

    async def _attend(self) -> None:
        self._link = self._link_to(self._combiner or await self._join())
        failures = 0
        while True:
            stream = self._link.attach(self._sender())
            try:
                if await stream.attached():
                    failures = 0
                    self._waits_for = ""
                    logger.info("attached to combiner %s as %s", self._link.at, self.client_id)
                while True:
                    await self._take(await stream.task())
            except Unreachable as exc:
                self._say_waiting(exc)
            finally:
                stream.close()
            await asyncio.sleep(self._backoff.wait_s(failures))
            failures += 1
            if self._api_url and failures >= _FAILURES_BEFORE_ASKING:
                await self._follow()

    async def _join(self) -> Assignment:
        failures = 0
        while True:
            try:
                return await self._ask()
            except Unreachable as exc:
                self._say_waiting(exc)
            await asyncio.sleep(self._backoff.wait_s(failures))
            failures += 1

    async def _follow(self) -> None:
        """To where the REST API now sends us; a combiner may be back before the REST API is."""
        assert self._link is not None
        try:
            assignment = await self._ask()
        except Unreachable as exc:
            self._say_waiting(exc)
            return
        if assignment != self._link.at:
            former, self._link = self._link, self._link_to(assignment)
            await former.close()

    async def _ask(self) -> Assignment:
        body = {"name": self.name, "client_id": self.client_id, "package": "local"}
        if self._preferred_combiner:
            body["preferred_combiner"] = self._preferred_combiner
        return await ask_assignment(self._api_url, body, self._token)

    def _link_to(self, at: Assignment) -> Link:
        return Link(at, self.client_id, self._token, base_s=self._backoff.base_s, cap_s=self._backoff.cap_s)

    def _say_waiting(self, reason: Exception) -> None:
        if str(reason) != self._waits_for:
            self._waits_for = str(reason)
            logger.info("waiting for the server: %s", reason)

    async def _take(self, request: pb.TaskRequest) -> None:
        if request.type not in _KINDS:
            logger.warning("task of an unknown kind ignored: %s %s", request.type, _key(request))
            return
        if _key(request) not in self._open:  # else the server sends it again because we attached again
            self._open.add(_key(request))
            await self._queue.put(request)

    # ---- the tasks

    async def _work(self) -> None:
        while not self._stopping.is_set():
            request = await self._queue.get()
            self._working = True
            task = TaskInfo(
                task_id=_key(request),
                kind=_KINDS[request.type],
                session_id=request.session_id,
                round=request.round,
                attempt=request.attempt,
                model_id=request.model_id,
                client_id=self.client_id,
                settings=_settings(request.data),
                deadline=request.deadline,
            )
            logger.info("task begun: %s of model %s", task.task_id, task.model_id)
            try:
                match task.kind:
                    case "train":
                        response = await self._do_train(request, task)
                    case "validate":
                        response = await self._do_validate(request, task)
                    case "predict":
                        response = await self._do_predict(request, task)
            except CallRefused as exc:
                logger.error("task given up, its report was refused: %s: %s", task.task_id, exc)
            else:
                self._tell(task, response)
            finally:
                self._open.discard(_key(request))
                self._working = False

    async def _do_train(self, request: pb.TaskRequest, task: TaskInfo) -> pb.Response:
        clock = asyncio.get_running_loop().time
        update = pb.ModelUpdate(
            sender=self._sender(),
            receiver=pb.Client(name=request.sender.name, role=request.sender.role),
            model_id=request.model_id,
            model_update_id=str(uuid4()),
            correlation_id=request.correlation_id,
            task_id=request.task_id,
        )
        begun_s = clock()
        model = await self._fetch(task)
        fetched_s = clock()
        trained: _Trained | _Failure
        if isinstance(model, _Failure):
            trained = model
        else:
            parameters, layout = model
            trained = await self._call(task, self._train, parameters, lambda returned: _trained(returned, layout))
        trained_s = clock()
        if isinstance(trained, _Trained):
            trained = await self._upload(update.model_update_id, trained)
        if isinstance(trained, _Failure):
            update.failure = trained.reason
        else:
            update.size_bytes = len(trained.data)
            update.sha256 = trained.sha256
            update.meta = json.dumps(
                {
                    "training_metadata": trained.metadata,
                    "config": request.data,
                    "fetch_model": fetched_s - begun_s,
                    "processing_time": trained_s - fetched_s,
                    "upload_model": clock() - trained_s,
                }
            )
        update.timestamp = str(datetime.now(UTC))
        return await self._until_answered(lambda link: link.send_update(update, _REPORT_TIMEOUT_S))

    async def _do_validate(self, request: pb.TaskRequest, task: TaskInfo) -> pb.Response:
        validation = pb.ModelValidation(
            sender=self._sender(),
            receiver=pb.Client(name=request.sender.name, role=request.sender.role),
            model_id=request.model_id,
            correlation_id=request.correlation_id,
            session_id=request.session_id,
            task_id=request.task_id,
        )
        match await self._computed(task, self._validate, _validation_json):
            case _Failure(reason):
                validation.failure = reason
            case text:
                validation.data = text
        validation.timestamp.GetCurrentTime()
        return await self._until_answered(lambda link: link.send_validation(validation, _REPORT_TIMEOUT_S))

    async def _do_predict(self, request: pb.TaskRequest, task: TaskInfo) -> pb.Response:
        prediction = pb.ModelPrediction(
            sender=self._sender(),
            receiver=pb.Client(name=request.sender.name, role=request.sender.role),
            model_id=request.model_id,
            correlation_id=request.correlation_id,
            prediction_id=request.session_id,
        )
        match await self._computed(task, self._predict, _prediction_json):
            case _Failure(reason):
                prediction.data = "null"  # what a FEDn client sends then
                prediction.meta = json.dumps({"failure": reason})
            case text:
                prediction.data = text
        prediction.timestamp.GetCurrentTime()
        return await self._until_answered(lambda link: link.send_prediction(prediction, _REPORT_TIMEOUT_S))

    async def _computed(
        self,
        task: TaskInfo,
        callback: Callable[[Parameters, TaskInfo], object] | None,
        use: Callable[[object], str],
    ) -> str | _Failure:
        if callback is None:
            return _Failure(f"this client has no {task.kind} callback")
        model = await self._fetch(task)
        if isinstance(model, _Failure):
            return model
        parameters, _ = model
        return await self._call(task, callback, parameters, use)

    async def _fetch(self, task: TaskInfo) -> tuple[Parameters, Layout] | _Failure:
        sender = self._sender()
        try:
            data = await self._until_answered(
                lambda link: link.download(task.model_id, sender, max_bytes=self._max_model_bytes)
            )
            if data is None:
                return _Failure(f"no model {task.model_id}")
            return await self._in_thread(lambda: _decoded(data, self._max_model_bytes))
        except (CallRefused, BadModel, MemoryError) as exc:
            logger.error("model %s cannot be used: %s", task.model_id, exc)
            return _Failure(_one_line(f"model {task.model_id}: {exc}"))

    async def _upload(self, update_id: str, trained: _Trained) -> _Trained | _Failure:
        try:
            await self._until_answered(lambda link: link.upload(update_id, trained.data))
        except CallRefused as exc:
            logger.error("upload refused: %s", exc)
            return _Failure(_one_line(str(exc)))
        return trained

    async def _until_answered(self, call: Callable[[Link], Awaitable[T]]) -> T:
        """Again and again while the server is away: what a task has cost is not thrown away for that."""
        failures = 0
        waits_for = ""
        while True:
            assert self._link is not None
            try:
                return await call(self._link)
            except Unreachable as exc:
                if str(exc) != waits_for:
                    waits_for = str(exc)
                    logger.info("a task waits for the server: %s", exc)
            await asyncio.sleep(self._backoff.wait_s(failures))
            failures += 1

    async def _call(
        self,
        task: TaskInfo,
        callback: Callable[[Parameters, TaskInfo], object],
        parameters: Parameters,
        use: Callable[[object], T],
    ) -> T | _Failure:
        """What `use` makes of what the callback returns; `use` raises if it is unusable, and runs in the thread."""
        try:
            returned = await self._in_thread(lambda: callback(parameters, task))
            if inspect.isawaitable(returned):
                returned = await returned
            return await self._in_thread(lambda: use(returned))
        except (Exception, asyncio.CancelledError) as exc:  # whatever the user's code raises is this task's failure
            me = asyncio.current_task()
            if isinstance(exc, asyncio.CancelledError) and me is not None and me.cancelling():
                raise
            logger.error("task failed: %s: %s", task.task_id, exc, exc_info=exc)
            return _Failure(_one_line(f"{type(exc).__name__}: {exc}"))

    async def _in_thread(self, compute: Callable[[], T]) -> T:
        def run() -> T:
            try:
                return compute()
            except StopIteration as exc:  # a future cannot carry it, see PEP 479
                raise RuntimeError("StopIteration was raised") from exc

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def _tell(self, task: TaskInfo, response: pb.Response) -> None:
        verdict = _VERDICTS.get(response.verdict, "")
        logger.info("task reported: %s: %s", task.task_id, " ".join(filter(None, (verdict, response.reason))) or "done")
        if self._on_report is not None:
            self._on_report(task, verdict, response.reason)

    def _sender(self) -> pb.Client:
        return pb.Client(name=self.name, role=pb.Role.CLIENT, client_id=self.client_id)


def _key(request: pb.TaskRequest) -> str:
    return request.task_id or request.correlation_id  # FEDn's server gives no task_id


def _settings(data: str) -> Mapping[str, Any]:
    try:
        config = json.loads(data) if data else {}
    except ValueError:
        return {}
    match config:
        case {"client_settings": dict(settings)}:
            return settings
    return {}


def _decoded(data: bytearray, max_bytes: int) -> tuple[Parameters, Layout]:
    npz = NpzFile(memoryview(data), max_bytes=max_bytes)
    return npz.copies(), npz.layout


def _trained(returned: object, layout: Layout) -> _Trained:
    """Raises TypeError or ValueError for a result that the server would reject."""
    if not isinstance(returned, TrainResult):
        raise TypeError(f"train returned {type(returned).__name__}, expected TrainResult")
    arrays = [np.asarray(array) for array in returned.parameters]
    if (fault := parameters_fault(arrays, layout)) is not None:
        raise ValueError(f"train returned bad parameters: {fault}")
    examples = returned.num_examples
    if isinstance(examples, bool | np.bool_) or not isinstance(examples, numbers.Real):
        raise TypeError(f"train returned num_examples {examples!r}, expected a number")
    if not 0 < examples <= 2**53:
        raise ValueError(f"train returned num_examples {examples}, expected a finite number above 0")
    num_examples = int(examples) if isinstance(examples, numbers.Integral) else float(examples)
    metrics = {str(key): _finite_or_null(value) for key, value in returned.metrics.items()}
    data = encode(arrays, [spec.name for spec in layout])
    metadata = json.loads(_json({**metrics, "num_examples": num_examples}))
    return _Trained(data, hashlib.sha256(data).hexdigest(), metadata)


def _validation_json(returned: object) -> str:
    if not isinstance(returned, Mapping):
        raise TypeError(f"validate returned {type(returned).__name__}, expected a dict of metrics")
    metrics: dict[str, float] = {}
    for key, value in returned.items():
        metrics[str(key)] = float(value)
        if not math.isfinite(metrics[str(key)]):
            raise ValueError(f"validate returned metric {key!r} = {value}, expected a finite number")
    return _json(metrics)


def _prediction_json(returned: object) -> str:
    return _json(returned)


def _json(value: object) -> str:
    return json.dumps(value, default=_plain, allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON")


def _finite_or_null(value: object) -> object:
    return None if isinstance(value, float | np.floating) and not math.isfinite(value) else value


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_MAX_FAILURE_CHARS]
