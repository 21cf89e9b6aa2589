"""The client: it attaches to a combiner, works the tasks that come, one after the other, and reports each once.

It lives until it is stopped, or until the server refuses or replaces it (ClientError): a server that is away is waited
for, a task that fails is reported as failed. No heartbeats: the open task stream says that it is alive.
What a task is done with is a Runtime (task.py): callbacks, or a compute package.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import uuid4

from fl_client.callbacks import Callbacks, Predict, Train, TrainResult, Validate
from fl_client.task import Due, Runtime, TaskFailed, TaskInfo, TaskKind
from fl_client.tokens import Tokens
from fl_client.transport import (
    Assignment,
    CallRefused,
    ClientError,
    Link,
    Replaced,
    RestApi,
    TaskStream,
    Tls,
    TokenRefused,
    Unreachable,
    renew,
)
from fl_client.wire import fl_pb2 as pb
from fl_client.wire.codec import MAX_MODEL_BYTES, NUMPY

__all__ = ["Backoff", "Client", "Predict", "TaskInfo", "Train", "TrainResult", "Validate"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

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
_STATUS_TIMEOUT_S = 10.0
_LONGEST_WAIT_S = 3600.0  # then the clock is looked at again: a machine may have slept
_LEAST_RENEWAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits between tries: doubling from base_s up to cap_s, each shortened at random by up to a half."""

    base_s: float = 0.5
    cap_s: float = 10.0

    def wait_s(self, failures: int) -> float:
        """failures: those before this one."""
        longest_s = min(self.cap_s, self.base_s * 2.0 ** min(failures, 32))
        return random.uniform(longest_s / 2, longest_s)


class _GivenBack(Exception):
    """The server is away, and this client is to stop: the server gives the task again."""


class Client:
    """Runs once: await run(), or cancel it.

    A callback gets the model's parameters (its own, to change as it likes) and a TaskInfo. A plain one runs in the
    client's one thread, an async one on the loop; a plain one that runs cannot be interrupted, and holds the exit of
    the process until it returns. A missing one is reported as a failure. Instead of callbacks: a runtime.
    on_report(task, verdict, reason) is called on the loop and must not raise; verdict is "accepted", "duplicate",
    "not_selected", "late" or "rejected", or "" where the server says none (a validation, a prediction).
    """

    def __init__(
        self,
        *,
        train: Train | None = None,
        validate: Validate | None = None,
        predict: Predict | None = None,
        runtime: Runtime | None = None,
        api_url: str = "",
        combiner: str = "",
        name: str = "",
        client_id: str = "",
        token: str | Tokens = "",
        auth_scheme: str = "Bearer",
        tls: Tls | None = None,
        preferred_combiner: str = "",
        backoff: Backoff | None = None,
        max_model_bytes: int = MAX_MODEL_BYTES,
        on_report: Callable[[TaskInfo, str, str], None] | None = None,
    ) -> None:
        """api_url: asked for a combiner; or combiner: "host:port", where there is no REST API. Raises ClientError.

        token: Tokens are renewed before they expire; auth_scheme is that of a text. tls: with a CA or a certificate, a
        combiner without a REST API is dialled over TLS.
        """
        if bool(api_url) == bool(combiner):
            raise ClientError("either api_url or combiner is needed")
        self.client_id = client_id or str(uuid4())
        self.name = name or self.client_id
        if not (self.client_id.isascii() and self.client_id.isprintable()):
            raise ClientError(f"client_id: {self.client_id!r} is not printable ASCII, which gRPC needs")
        self._tls = tls or Tls()
        self._combiner = Assignment.parse(combiner) if combiner else None
        if self._combiner and (self._tls.ca or self._tls.certificate):
            self._combiner = replace(self._combiner, tls=True)
        try:
            self._tokens = token if isinstance(token, Tokens) else Tokens(token, scheme=auth_scheme)
        except ValueError as exc:
            raise ClientError(str(exc)) from None
        self._rest = RestApi(api_url, self._tokens, self._tls) if api_url else None
        self._preferred_combiner = preferred_combiner
        if runtime is None and train is not None:
            thread = f"client {self.client_id}"
            runtime = Callbacks(train, validate, predict, max_model_bytes=max_model_bytes, thread=thread)
        elif runtime is None or train is not None:
            raise ClientError("either train or runtime is needed")
        self._runtime = runtime
        self._backoff = backoff or Backoff()
        self._max_model_bytes = max_model_bytes
        self._on_report = on_report

        self._link: Link | None = None
        self._stream: TaskStream | None = None
        self._successor: TaskStream | None = None  # attached already, with a newer token
        self._renew_now = asyncio.Event()
        self._renewed = asyncio.Event()  # another one for each token
        self._no_renewal: ClientError | None = None  # the issuer refuses
        self._waits_for = ""
        self._queue: asyncio.Queue[tuple[pb.TaskRequest, TaskInfo]] = asyncio.Queue(_QUEUED_TASKS)
        self._open: dict[str, Due] = {}  # the tasks that are queued or worked, by their keys
        self._latest: dict[str, tuple[int, int]] = {}  # by session: (round, attempt) of the last task to train
        self._working = ""  # the task's id
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Returns after stop(). Raises ClientError when the server refuses this client or another took its place."""
        try:
            async with asyncio.TaskGroup() as group:
                attending = group.create_task(self._attend(), name=f"attend {self.client_id}")
                working = group.create_task(self._work(), name=f"work {self.client_id}")
                renewing = group.create_task(self._renew(), name=f"renew {self.client_id}")
                await self._stopping.wait()
                attending.cancel()
                if not self._working:
                    working.cancel()
                await asyncio.wait({working})  # its report may need a new token
                renewing.cancel()
        except ExceptionGroup as errors:
            ours, others = errors.split(ClientError)
            if ours is None or others is not None:
                raise
            raise ours.exceptions[0] from None
        finally:
            self._runtime.close()
            if self._link is not None:
                await self._link.close()

    def stop(self) -> None:
        """Lets run() return once the task that is worked is reported; queued ones are left to the server.

        So is the one that is worked, if its server is away.
        """
        if self._working:
            logger.info("stopping when task %s is reported", self._working)
        self._stopping.set()

    # ---- the stream

    async def _attend(self) -> None:
        self._link = self._link_to(await self._until_reached(self._join))
        failures = refusals = 0
        while True:
            shown = self._tokens.count
            stream, self._successor = self._successor or self._link.attach(self._sender()), None
            self._stream = stream
            try:
                if await stream.attached():
                    failures = refusals = 0
                    self._waits_for = ""
                    logger.info("attached to combiner %s as %s", self._link.at, self.client_id)
                while True:
                    await self._take(await stream.task())
            except (Unreachable, TokenRefused, Replaced) as exc:
                if self._successor is not None:
                    continue
                if isinstance(exc, Replaced) or (isinstance(exc, TokenRefused) and not self._may_renew(refusals)):
                    raise
                if isinstance(exc, TokenRefused):
                    refusals += 1
                    await self._newer_token(shown)
                    continue
                self._say_waiting(exc)
            finally:
                self._stream = None
                stream.close()
            await asyncio.sleep(self._backoff.wait_s(failures))
            failures += 1
            if self._rest is not None and failures >= _FAILURES_BEFORE_ASKING:
                await self._follow()

    # ---- the token

    async def _renew(self) -> None:
        """A new token before the old one expires, or when it is refused; the stream moves over to it."""
        if not self._tokens.renewable:
            return
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self._tokens.due_in_s(), _LONGEST_WAIT_S)):
                    await self._renew_now.wait()
            if not self._renew_now.is_set() and self._tokens.due_in_s():
                continue
            try:
                await self._until_reached(lambda: renew(self._tokens, self._tls))
            except ClientError as exc:
                logger.error("no new access token, the one that we have is the last: %s", exc)
                self._no_renewal = exc
                self._renewed.set()
                return
            logger.info("new access token")
            self._renew_now.clear()
            self._renewed.set()
            self._renewed = asyncio.Event()
            await self._move_stream()
            await asyncio.sleep(_LEAST_RENEWAL_S)  # an issuer whose tokens are dead on arrival is not to be stormed

    async def _move_stream(self) -> None:
        """Attaches with the new token before the old stream is let go: the client is never away."""
        former = self._stream
        if former is None or self._link is None:
            return  # on its way, or waiting: it attaches with the new token
        successor = self._link.attach(self._sender())
        try:
            if not await successor.attached():
                return
        except (Unreachable, CallRefused, ClientError) as exc:
            logger.info("the stream keeps its old token for now: %s", exc)
            return
        if self._stream is former:
            self._successor = successor
            former.close()
        else:
            successor.close()

    def _may_renew(self, refusals: int) -> bool:
        return self._tokens.renewable and not refusals

    async def _newer_token(self, shown: int) -> None:
        """Raises ClientError if the issuer gives no more."""
        while self._tokens.count <= shown:
            if self._no_renewal is not None:
                raise self._no_renewal
            renewed = self._renewed
            self._renew_now.set()
            await renewed.wait()

    async def _let_in(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Once more with a new token where the one that we have is refused."""
        shown = self._tokens.count
        try:
            return await ask()
        except TokenRefused:
            if not self._tokens.renewable:
                raise
        await self._newer_token(shown)
        return await ask()

    async def _until_reached(self, ask: Callable[[], Awaitable[T]]) -> T:
        failures = 0
        while True:
            try:
                return await ask()
            except Unreachable as exc:
                self._say_waiting(exc)
            await asyncio.sleep(self._backoff.wait_s(failures))
            failures += 1

    async def _follow(self) -> None:
        """To where the REST API now sends us; a combiner may be back before the REST API is."""
        assert self._link is not None
        try:
            assignment = await self._join()
        except Unreachable as exc:
            self._say_waiting(exc)
            return
        if assignment != self._link.at or assignment.tls:  # certificates may have changed
            former, self._link = self._link, self._link_to(assignment)
            await former.close()

    async def _join(self) -> Assignment:
        """Where the combiner is, once the runtime has what it needs."""
        if self._rest is None:
            assert self._combiner is not None
            assignment = self._combiner
        else:
            body = {"name": self.name, "client_id": self.client_id, "package": self._runtime.package}
            if self._preferred_combiner:
                body["preferred_combiner"] = self._preferred_combiner
            rest = self._rest
            assignment = await self._let_in(lambda: rest.assignment(body))
        await self._let_in(self._runtime.prepare)
        return assignment

    def _link_to(self, at: Assignment) -> Link:
        backoff = self._backoff
        return Link(at, self.client_id, self._tokens, tls=self._tls, base_s=backoff.base_s, cap_s=backoff.cap_s)

    def _say_waiting(self, reason: Exception) -> None:
        if str(reason) != self._waits_for:
            self._waits_for = str(reason)
            logger.info("waiting for the server: %s", reason)

    async def _take(self, request: pb.TaskRequest) -> None:
        if request.type not in _KINDS:
            logger.warning("task of an unknown kind ignored: %s %s", request.type, _key(request))
            return
        due_s = _due_s(request, asyncio.get_running_loop().time())
        if (known := self._open.get(_key(request))) is not None:
            known.at_s = due_s  # the server sends it again because we attached again
            return
        config = _config(request.data)
        task = TaskInfo(
            task_id=_key(request),
            kind=_KINDS[request.type],
            session_id=request.session_id,
            round=request.round,
            attempt=request.attempt,
            model_id=request.model_id,
            client_id=self.client_id,
            settings=_object(config.get("client_settings")),
            deadline=request.deadline,
            helper=request.helper or str(config.get("helper_type") or NUMPY),
            due=Due(due_s),
        )
        self._open[task.task_id] = task.due
        if task.kind == "train":
            self._latest[task.session_id] = task.round, task.attempt
        await self._queue.put((request, task))

    # ---- the tasks

    async def _work(self) -> None:
        while not self._stopping.is_set():
            request, task = await self._queue.get()
            attempt = task.round, task.attempt
            if task.kind == "train" and attempt < self._latest.get(task.session_id, attempt):
                # its attempt is over, or the server had not begun another: a slow client would never catch up
                logger.info("task passed over, its session is further: %s", task.task_id)
                del self._open[task.task_id]
                continue
            self._working = task.task_id
            logger.info("task begun: %s %s of model %s", task.kind, task.task_id, task.model_id)
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
            except _GivenBack as exc:
                logger.warning("task given back to the server: %s: %s", task.task_id, exc)
            else:
                self._tell(task, response)
            finally:
                del self._open[task.task_id]
                self._working = ""
                if self._latest.get(task.session_id) == attempt:
                    del self._latest[task.session_id]

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
        try:
            begun_s = clock()
            model = await self._fetch(task)
            fetched_s = clock()
            trained = await self._runtime.train(model, task)
            trained_s = clock()
            await self._upload(update.model_update_id, trained.data)
        except TaskFailed as failed:
            update.failure = str(failed)
            await self._note(request, task, failed)
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
        try:
            validation.data = await self._runtime.validate(await self._fetch(task), task)
        except TaskFailed as failed:
            validation.failure = str(failed)
            await self._note(request, task, failed)
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
        try:
            prediction.data = await self._runtime.predict(await self._fetch(task), task)
        except TaskFailed as failed:
            prediction.data = "null"  # what a FEDn client sends then
            prediction.meta = json.dumps({"failure": str(failed)})
            await self._note(request, task, failed)
        prediction.timestamp.GetCurrentTime()
        return await self._until_answered(lambda link: link.send_prediction(prediction, _REPORT_TIMEOUT_S))

    async def _fetch(self, task: TaskInfo) -> bytearray:
        if (refusal := self._runtime.refusal(task.kind)) is not None:
            raise TaskFailed(refusal)
        sender = self._sender()
        try:
            data = await self._until_answered(
                lambda link: link.download(task.model_id, sender, max_bytes=self._max_model_bytes)
            )
        except (CallRefused, MemoryError) as exc:
            raise TaskFailed(f"model {task.model_id}: {exc}") from exc
        if data is None:
            raise TaskFailed(f"no model {task.model_id}")
        return data

    async def _upload(self, update_id: str, data: bytes) -> None:
        try:
            await self._until_answered(lambda link: link.upload(update_id, data))
        except CallRefused as exc:
            raise TaskFailed(str(exc)) from exc

    async def _note(self, request: pb.TaskRequest, task: TaskInfo, failed: TaskFailed) -> None:
        """Logs why, and tells the server what the work said at its end: once, it is in the log in any case."""
        logger.error("task failed: %s: %s", task.task_id, failed, exc_info=failed.__cause__)
        if not failed.last_lines:
            return
        status = pb.Status(
            sender=self._sender(),
            status=str(failed),
            log_level=pb.LogLevel.WARNING,
            data="\n".join(failed.last_lines),
            correlation_id=request.correlation_id,
            session_id=request.session_id,
            type=request.type,
        )
        status.timestamp.GetCurrentTime()
        assert self._link is not None
        try:
            await self._link.send_status(status, _STATUS_TIMEOUT_S)
        except (Unreachable, CallRefused) as exc:
            logger.warning("the failure's last lines did not reach the server: %s", exc)

    async def _until_answered(self, call: Callable[[Link], Awaitable[T]]) -> T:
        """Again and again while the server is away: what a task has cost is not thrown away for that."""
        failures = 0
        waits_for = ""
        while True:
            try:
                return await self._let_in(lambda: call(self._linked()))
            except Unreachable as exc:
                if self._stopping.is_set():
                    raise _GivenBack(str(exc)) from exc
                if str(exc) != waits_for:
                    waits_for = str(exc)
                    logger.info("a task waits for the server: %s", exc)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._backoff.wait_s(failures)):
                    await self._stopping.wait()
            failures += 1

    def _linked(self) -> Link:
        """The newest."""
        assert self._link is not None
        return self._link

    def _tell(self, task: TaskInfo, response: pb.Response) -> None:
        verdict = _VERDICTS.get(response.verdict, "")
        logger.info("task reported: %s: %s", task.task_id, " ".join(filter(None, (verdict, response.reason))) or "done")
        if self._on_report is not None:
            self._on_report(task, verdict, response.reason)

    def _sender(self) -> pb.Client:
        return pb.Client(name=self.name, role=pb.Role.CLIENT, client_id=self.client_id)


def _key(request: pb.TaskRequest) -> str:
    return request.task_id or request.correlation_id  # FEDn's server gives no task_id


def _config(data: str) -> Mapping[str, Any]:
    """The task's data; FEDn's server says the helper there, for training alone."""
    try:
        return _object(json.loads(data) if data else {})
    except ValueError:
        return {}


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _due_s(request: pb.TaskRequest, now_s: float) -> float:
    """On the clock of now_s. By what the server's own clock says is left when it sends: clocks need not agree."""
    if not request.deadline:
        return math.inf
    try:
        sent_at = datetime.strptime(request.timestamp, "%Y-%m-%d %H:%M:%S.%f").replace(tzinfo=UTC)
    except ValueError:
        return math.inf
    return now_s + request.deadline - sent_at.timestamp()
