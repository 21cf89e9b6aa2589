"""A server without sockets on virtual time: the real scheduler, embedded stores and servicer, and clients that the test
moves one step at a time. A test that waits for what never comes fails after ten virtual hours."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

from fl_client.wire import codec
from fl_client.wire import fl_pb2 as pb
from fl_server.combiner.downloads import Downloads
from fl_server.combiner.servicer import Limits, Servicer
from fl_server.core.model import GlobalModel, ModelId, SessionConfig, SessionRecord, Status
from fl_server.errors import Unavailable
from fl_server.scheduler import records
from fl_server.scheduler.aggregation import Workshop
from fl_server.scheduler.copies import Copies
from fl_server.scheduler.feed import FeedEvent
from fl_server.scheduler.intake import Intake
from fl_server.scheduler.scheduler import Scheduler
from fl_server.store.files import FileBlobStore
from fl_server.store.ports import Collection, Condition, Document, Query
from fl_server.store.spool import Spool
from fl_server.store.sqlite import SqliteStateStore
from tests.server.wire_client import filled, update_of, value_of
from tests.virtual import Aborted, Context, virtual_loop

LONGEST_S = 36_000.0
SEED = "seed"


class AwayStore(SqliteStateStore):
    """It raises Unavailable for as long as the test says that it is away."""

    away = False

    async def save(self, writes: Any) -> None:
        self._fail_if_away()
        await super().save(writes)

    async def append(self, collection: Collection, documents: Any) -> None:
        self._fail_if_away()
        await super().append(collection, documents)

    async def get(self, collection: Collection, id: str) -> Document | None:
        self._fail_if_away()
        return await super().get(collection, id)

    def _fail_if_away(self) -> None:
        if self.away:
            raise Unavailable("the test has sent it away")


class VirtualClient:
    """It does nothing by itself; `tasks` holds what it was sent."""

    def __init__(self, world: World, client_id: str) -> None:
        self.id, self._world = client_id, world
        self.tasks: asyncio.Queue[pb.TaskRequest] = asyncio.Queue()
        self._stream: asyncio.Task[None]

    async def attach(self) -> None:
        after = self._world.last_event
        self._stream = self._world.group.create_task(self._listen(), name=f"stream of {self.id}")
        await self._world.event("client", after=after, client_id=self.id, status="online")

    async def leave(self) -> None:
        """Its process dies, whatever it was doing."""
        after = self._world.last_event
        self._stream.cancel()
        await self._world.event("client", after=after, client_id=self.id, status="offline")

    async def _listen(self) -> None:
        sender = pb.Client(role=pb.CLIENT, name=self.id, client_id=self.id)
        with contextlib.suppress(Unavailable, Aborted):
            await self._servicer.TaskStream(pb.ClientAvailableMessage(sender=sender), self._context(self.tasks))

    async def task(self) -> pb.TaskRequest:
        return await self.tasks.get()

    async def train(self, task: pb.TaskRequest, value: float, *, num_examples: int = 1) -> str:
        """Uploads parameters of this value and reports them; the verdict's name."""
        update_id = str(uuid4())
        data = codec.encode(filled(value))

        async def requests() -> AsyncIterator[pb.ModelRequest]:
            yield pb.ModelRequest(id=update_id, data=data, status=pb.IN_PROGRESS)
            yield pb.ModelRequest(id=update_id, status=pb.OK)

        assert (await self._servicer.Upload(requests(), self._context())).status == pb.OK
        meta = {"training_metadata": {"num_examples": num_examples}}
        update = update_of(task, update_id, sender=self.id, meta=meta)
        reply = await self._servicer.SendModelUpdate(update, self._context())
        return str(pb.Verdict.Name(reply.verdict).removeprefix("VERDICT_"))

    async def validate(self, task: pb.TaskRequest) -> None:
        report = pb.ModelValidation(model_id=task.model_id, data='{"loss": 1.0}', correlation_id=task.correlation_id)
        await self._servicer.SendModelValidation(report, self._context())

    @property
    def _servicer(self) -> Servicer:
        return self._world.servicer

    def _context(self, *written: asyncio.Queue[Any]) -> Any:
        return Context(self.id, *written)


class World:
    scheduler: Scheduler
    servicer: Servicer
    store: AwayStore
    group: asyncio.TaskGroup

    def __init__(self) -> None:
        self.clock_is_off_s = 0.0  # how far the server's clock is ahead of the loop's

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    @property
    def last_event(self) -> int:
        recent = self.scheduler.feed._recent
        return recent[-1].id if recent else 0

    async def clients(self, *ids: str) -> list[VirtualClient]:
        """They are attached when it returns."""
        made = [VirtualClient(self, id) for id in ids]
        for client in made:
            await client.attach()
        return made

    async def session(self, **config: Any) -> str:
        """Created; from parameters of 0. config: the fields of SessionConfig."""
        given = {"rounds": 1, "validate": False, "round_timeout_s": 60.0, **config}
        document = await self.scheduler.create(SessionConfig(**given), name=None, model_id=SEED)
        return str(document["session_id"])

    async def started(self, **config: Any) -> str:
        session_id = await self.session(**config)
        assert await self.scheduler.start(session_id) == ("done", "")
        return session_id

    async def event(self, kind: str, *, after: int = 0, **data: Any) -> FeedEvent:
        async with self.scheduler.feed.watch(after) as events:
            async for event in events:
                if event.kind == kind and data.items() <= event.data.items():
                    return event
        raise AssertionError("the feed has ended")

    async def ended(self, session_id: str) -> SessionRecord:
        """Its record, once it does not run any more."""
        async with self.scheduler.feed.watch() as events:
            while True:
                document = await self.store.get(Collection.SESSIONS, session_id)
                assert document is not None
                record = records.session_record(document)
                if record.status is not Status.RUNNING:
                    return record
                while (event := await anext(events)).kind != "session" or event.data["session_id"] != session_id:
                    pass

    async def result(self, session_id: str) -> float:
        """The one value of all parameters of the model with which the session finished."""
        record = await self.ended(session_id)
        assert record.status is Status.FINISHED, record.reason
        return value_of(codec.decode(await self.scheduler.models.get(record.model.id)))

    async def rounds(self, session_id: str) -> list[Document]:
        """One document an attempt, oldest first."""
        where = (Condition("fl.session", "eq", session_id),)
        return await self.store.find(Collection.ROUNDS, Query(where, sort=(("fl.ordinal", False),)))

    async def explained(self, session_id: str) -> str:
        return "\n".join(await self.scheduler.explain(session_id))


@contextlib.asynccontextmanager
async def world(folder: Path, *, site: bool = False) -> AsyncIterator[World]:
    """site: accepted updates are copied, as durability = "site" does."""
    unused = ThreadPoolExecutor(1)  # the loop does what goes there itself
    made = World()
    made.store = AwayStore(folder / "state.db", unused)
    models, updates = FileBlobStore(folder / "models", unused), FileBlobStore(folder / "updates", unused)
    spool = Spool(folder / "spool", unused, max_bytes=10**9)
    work = folder / "work"
    work.mkdir(exist_ok=True)
    await made.store.open("a test")
    for opened in (models, updates, spool):
        await opened.open()
    await models.put(SEED, codec.encode(filled(0)))
    seed = records.model_document(GlobalModel(ModelId(SEED)), helper=codec.NUMPY, name=None, session_id=None, at=0.0)
    await made.store.append(Collection.MODELS, [seed])
    loop = asyncio.get_running_loop()
    workshop = Workshop(models, spool, unused, work, 10**9, Copies(updates, spool) if site else None)
    made.scheduler = Scheduler(made.store, workshop, updates, lambda: loop.time() + made.clock_is_off_s)
    try:
        async with made.scheduler.running(), asyncio.TaskGroup() as made.group:
            downloads = Downloads(made.scheduler, unused, kept_bytes=10**6)
            made.servicer = Servicer(made.scheduler, Intake(made.scheduler), downloads, Limits(10**9, 8, 60.0, 30.0))
            yield made
            made.scheduler.stop_serving()  # ends the streams
    finally:
        await made.store.close()


def on_virtual_time(test: Callable[[World], Awaitable[None]]) -> Callable[[Path], None]:
    def run(tmp_path: Path) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(LONGEST_S), world(tmp_path) as made:
                await test(made)

        with virtual_loop() as loop:
            loop.run_until_complete(bounded())

    run.__name__, run.__qualname__, run.__doc__ = test.__name__, test.__qualname__, test.__doc__
    return run
