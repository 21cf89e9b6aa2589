"""Prediction runs: who is attached, or attaches while the run is open, is asked to predict with one model.

A run is durable before it is answered: a document among the predictions with `fl.run`, which lists leave out. Who has
still to report is soft: it follows from that, from the clients' records and from the stored predictions. One task
begins and ends runs.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fl_server.core.model import ClientId, ModelId, SessionId, Task, TaskKind
from fl_server.errors import Conflict, FlserveError, Invalid, NotFound
from fl_server.scheduler.aggregation import Insist
from fl_server.scheduler.feed import Feed
from fl_server.scheduler.records import helper_of
from fl_server.scheduler.streams import Assignment, ClientStreams
from fl_server.store.ports import ID_FIELD, Collection, Condition, Document, Patch, Query, StateStore

logger = logging.getLogger(__name__)
QUEUE_SIZE = 64  # full: who wants a run waits
ARE_PREDICTIONS = (Condition("fl.open", "eq", None),)  # what has it is a run


@dataclass(frozen=True, slots=True)
class Wanted:
    """A run that is asked for. Defaults: the newest model, the server's timeout."""

    prediction_id: str  # no "/" in it
    model_id: str | None = None
    timeout_s: float | None = None
    begun: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(slots=True)
class _Run:
    id: str
    model: ModelId
    helper: str
    deadline: float  # seconds since the epoch
    missing: set[ClientId]  # have been attached since it began, and have not reported
    reported: set[ClientId] = field(default_factory=set)


class Predictions:
    def __init__(
        self,
        store: StateStore,
        streams: ClientStreams,
        feed: Feed,
        insist: Insist,
        clock: Callable[[], float],
        *,
        timeout_s: float,
        rejoin_window_s: float,
    ) -> None:
        """timeout_s: of a run that says none. rejoin_window_s: what clients have at least after a restart."""
        self._store, self._streams, self._feed, self._insist, self._clock = store, streams, feed, insist, clock
        self._timeout_s, self._rejoin_window_s = timeout_s, rejoin_window_s
        self._open: dict[str, _Run] = {}
        self._inbox: asyncio.Queue[Wanted | None] = asyncio.Queue(QUEUE_SIZE)  # None: a run may be over

    async def start(self, wanted: Wanted) -> None:
        """Returns when the run is durable. The same again while it is open is the same run.

        Raises NotFound without that model, Invalid without any model or client, Conflict if the id was used before.
        """
        await self._inbox.put(wanted)
        await wanted.begun

    def attached(self, client: ClientId) -> None:
        """It has a mailbox now."""
        for run in self._open.values():
            if client not in run.reported:
                run.missing.add(client)
                self._issue(run, client)

    def reported(self, prediction_id: str, client: ClientId) -> None:
        """A prediction of this client is durable."""
        self._feed.tell("prediction", prediction_id=prediction_id, status="reported", client_id=client)
        if run := self._open.get(prediction_id):
            run.reported.add(client)
            run.missing.discard(client)
            if not run.missing and not self._inbox.full():  # else the task will look anyway
                self._inbox.put_nowait(None)

    async def recover(self, online: Iterable[ClientId]) -> None:
        """online: whom the records call so."""
        for document in await self._find(Condition("fl.open", "eq", True)):
            stored = document["fl"]["run"]
            rows = await self._find(Condition("prediction_id", "eq", stored["id"]))
            reported = {ClientId(row["fl"]["client"]) for row in rows}
            missing = {*map(ClientId, stored["clients"]), *online} - reported
            deadline = max(stored["deadline"], self._clock() + self._rejoin_window_s)
            run = _Run(stored["id"], ModelId(stored["model"]), stored["helper"], deadline, missing, reported)
            self._open[run.id] = run
            logger.info("prediction recovered", extra={"prediction": run.id, "missing": len(missing)})

    async def run(self) -> None:
        while True:
            if wanted := await self._next():
                try:
                    await self._begin(wanted)
                except FlserveError as refused:
                    if not wanted.begun.done():  # a caller that left is not waited for
                        wanted.begun.set_exception(refused)
                else:
                    if not wanted.begun.done():
                        wanted.begun.set_result(None)
            await self._end_what_is_over()

    async def _next(self) -> Wanted | None:
        """What comes, or None at the earliest deadline."""
        left_s = min((run.deadline for run in self._open.values()), default=None)
        try:
            async with asyncio.timeout(None if left_s is None else max(0.0, left_s - self._clock())):
                return await self._inbox.get()
        except TimeoutError:
            return None

    async def _begin(self, wanted: Wanted) -> None:
        model = await self._model(wanted.model_id)
        attached = sorted(self._streams.attached())
        if not attached:
            raise Invalid("no client is attached that could predict")
        at, key = self._clock(), _key(wanted.prediction_id)
        about = {
            "id": wanted.prediction_id,
            "model": model["model"],
            "helper": helper_of(model),
            "deadline": at + (wanted.timeout_s or self._timeout_s),
            "clients": attached,
            "mark": uuid.uuid4().hex,
        }
        document: Document = {
            ID_FIELD[Collection.PREDICTIONS]: key,
            "committed_at": at,
            "updated_at": at,
            "fl": {"version": 1, "open": True, "run": about},
        }
        if not await self._insist(self._store.insert, Collection.PREDICTIONS, document):
            stored = await self._insist(self._store.get, Collection.PREDICTIONS, key)
            former = stored["fl"]["run"] if stored else {}
            if former.get("mark") != about["mark"]:  # else an insert that we did not hear of was ours
                same_model = wanted.model_id in (None, former.get("model"))
                if wanted.prediction_id in self._open and same_model:
                    return
                raise Conflict(f"prediction_id: {wanted.prediction_id} was used before")
        run = _Run(
            wanted.prediction_id,
            ModelId(model["model"]),
            helper_of(model),
            about["deadline"],
            {*attached, *self._streams.attached()},
        )
        self._open[run.id] = run
        for client in self._streams.attached():
            self._issue(run, client)
        self._tell(run, "started")

    async def _model(self, model_id: str | None) -> Document:
        if model_id:
            model = await self._insist(self._store.get, Collection.MODELS, model_id)
            if model is None:
                raise NotFound(f"Model {model_id} not found")
            return model
        newest = Query(sort=(("committed_at", True),), limit=1)
        models = await self._insist(self._store.find, Collection.MODELS, newest)
        if not models:
            raise Invalid("No models available")
        return models[0]

    def _issue(self, run: _Run, client: ClientId) -> None:
        task = Task(SessionId(run.id), 0, 0, TaskKind.PREDICT, client)
        self._streams.deliver(Assignment(task, run.model, run.helper, run.deadline))

    async def _end_what_is_over(self) -> None:
        at = self._clock()
        for run in [run for run in self._open.values() if not run.missing or run.deadline <= at]:
            del self._open[run.id]
            ended = {"fl.open": False, "fl.run.ended_at": at, "updated_at": at}
            await self._insist(self._store.save, [Patch(Collection.PREDICTIONS, _key(run.id), ended)])
            self._tell(run, "timed out" if run.missing else "finished")

    def _tell(self, run: _Run, status: str) -> None:
        counts = {"reported": len(run.reported), "missing": len(run.missing)}
        self._feed.tell("prediction", prediction_id=run.id, status=status, model_id=run.model, **counts)
        logger.info("prediction %s", status, extra={"prediction": run.id, **counts})

    async def _find(self, condition: Condition) -> list[Document]:
        return await self._insist(self._store.find, Collection.PREDICTIONS, Query((condition,)))


def _key(prediction_id: str) -> str:
    """No path of the REST API reaches it: an id in a path has no "/"."""
    return f"run/{prediction_id}"
