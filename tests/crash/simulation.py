"""A federation on a virtual clock: the real scheduler, stores and servicer, clients that behave as FEDn's, a process
that can die at any of its durable calls.

Ports and sockets are left out: calls reach the servicer through a context of our own.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import inspect
import io
import json
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fl_client.wire import codec
from fl_client.wire import fl_pb2 as pb
from fl_server.combiner.downloads import Downloads
from fl_server.combiner.servicer import Limits, Servicer
from fl_server.core.model import GlobalModel, ModelId, Outcome, SessionConfig, SessionId, SessionRecord, Status
from fl_server.errors import Invalid, Unavailable
from fl_server.scheduler import records
from fl_server.scheduler.aggregation import Workshop
from fl_server.scheduler.intake import Intake
from fl_server.scheduler.scheduler import Patience, Scheduler
from fl_server.store.files import FileBlobStore
from fl_server.store.ports import BlobStore, Collection, Condition, Query, StateStore
from fl_server.store.spool import Spool
from fl_server.store.sqlite import SqliteStateStore
from tests.virtual import Context, virtual_loop

T = TypeVar("T")
BACKOFF_S, RESTART_S, SESSION = 10.0, 3.0, "s"
CLEARED_S = 5.0  # what the last round leaves is cleared beside it, and within this time
STATE_CALLS = ("save", "insert", "append", "get", "find", "count", "reports")
BLOB_CALLS = ("put", "put_file", "local", "get", "size_bytes", "delete")
SPOOL_CALLS = ("begin", "missing", "remove", "replace", "path")
UPLOAD_CALLS = ("write", "finish", "abort")


class Killed(BaseException):
    """The process is dead. Not an Exception: nothing may handle it."""


class Death:
    """Counts the calls of all durable things and dies at the k-th, before it has effect or after."""

    def __init__(self, at: int | None = None, after: bool = False) -> None:
        self.at, self.after, self.calls, self.dead = at, after, 0, asyncio.Event()
        self.log: list[str] = []

    def wrap(self, thing: T, methods: Sequence[str]) -> T:
        for name in methods:
            setattr(thing, name, self._deadly(getattr(thing, name), f"{type(thing).__name__}.{name}"))
        return thing

    def _deadly(self, method: Any, label: str) -> Any:
        if inspect.iscoroutinefunction(method):

            async def call(*args: Any, **kwargs: Any) -> Any:
                mine = self._enter(label)
                result = await method(*args, **kwargs)
                self._leave(mine)
                return self.wrap(result, UPLOAD_CALLS) if label == "Spool.begin" else result

        else:

            def call(*args: Any, **kwargs: Any) -> Any:
                mine = self._enter(label)
                result = method(*args, **kwargs)
                self._leave(mine)
                return result

        return call

    def _enter(self, label: str) -> int:
        if self.dead.is_set():
            raise Killed
        self.calls += 1
        self.log.append(label)
        if self.calls == self.at and not self.after:
            self._die()
        return self.calls

    def _leave(self, mine: int) -> None:
        if mine == self.at and self.after:
            self._die()
        if self.dead.is_set():
            raise Killed

    def _die(self) -> None:
        self.dead.set()
        raise Killed


class OneByOne(SqliteStateStore):
    """As a store without transactions over several documents: each write is durable on its own."""

    async def save(self, writes: Any) -> None:
        for write in writes:
            await super().save([write])
            self.between()

    def between(self) -> None:
        """A process may die here."""


@dataclass
class Life:
    """One life of the server process."""

    scheduler: Scheduler
    servicer: Servicer


class Network:
    """What clients can reach: a server, or nobody."""

    def __init__(self) -> None:
        self.life: Life | None = None
        self.died = asyncio.Event()

    async def call(self, make: Callable[[Life], Awaitable[T]]) -> T:
        """Runs a call on the server; raises Unavailable when the server is away or dies meanwhile."""
        if self.life is None:
            raise Unavailable("connection refused")
        died = self.died
        work, dead = asyncio.ensure_future(make(self.life)), asyncio.ensure_future(died.wait())
        try:
            await asyncio.wait({work, dead}, return_when=asyncio.FIRST_COMPLETED)
            if died.is_set() or not work.done():
                raise Unavailable("connection lost")
            return work.result()
        except (Killed, BaseExceptionGroup, TimeoutError):  # the last: UNAVAILABLE, by the guard in combiner/server.py
            raise Unavailable("connection lost") from None
        finally:
            for task in (work, dead):
                task.cancel()
            await asyncio.gather(work, dead, return_exceptions=True)

    async def insist(self, make: Callable[[Life], Awaitable[T]]) -> T:
        """As FEDn's client: again after 10 s, for ever."""
        while True:
            try:
                return await self.call(make)
            except Unavailable:
                await asyncio.sleep(BACKOFF_S)


class SimClient:
    """One task at a time; trains whenever asked; a new update id each time; never uploads again after Upload's OK."""

    def __init__(self, index: int, network: Network, federation: Federation) -> None:
        self.id, self.index, self.network, self.federation = f"c{index}", index, network, federation
        self.heard: list[tuple[pb.TaskRequest, str, int]] = []  # (task, update id, verdict)
        self.count = 0
        self.announced: dict[str, dict[str, Any]] = {}  # by update id

    async def run(self) -> None:
        tasks: asyncio.Queue[pb.TaskRequest] = asyncio.Queue()
        async with asyncio.TaskGroup() as group:
            group.create_task(self.listen(tasks))
            while True:
                task = await tasks.get()
                if task.type == pb.MODEL_UPDATE:
                    await self.train(task)
                else:
                    report = pb.ModelValidation(
                        model_id=task.model_id,
                        data='{"loss": 1.0}',
                        correlation_id=task.correlation_id,
                        session_id=task.session_id,
                    )
                    await self.network.insist(lambda life: life.servicer.SendModelValidation(report, Context(self.id)))  # noqa: B023

    async def listen(self, tasks: asyncio.Queue[pb.TaskRequest]) -> None:
        sender = pb.ClientAvailableMessage(sender=pb.Client(role=pb.CLIENT, name=self.id, client_id=self.id))
        while True:
            context = Context(self.id, tasks)
            with contextlib.suppress(Unavailable):
                await self.network.call(lambda life: life.servicer.TaskStream(sender, context))  # noqa: B023
            await asyncio.sleep(BACKOFF_S + self.index * 0.1)

    async def download(self, model_id: str) -> list[np.ndarray]:
        async def fetch(life: Life) -> bytes:
            context = Context(self.id)
            await life.servicer.Download(pb.ModelRequest(id=model_id), context)
            messages = [
                pb.ModelResponse.FromString(context.written.get_nowait()) for _ in range(context.written.qsize())
            ]
            assert messages[-1].status == pb.OK
            return b"".join(message.data for message in messages)

        return codec.decode(await self.network.insist(fetch))

    async def train(self, task: pb.TaskRequest) -> None:
        base = await self.download(task.model_id)
        generator = np.random.default_rng(zlib.crc32(f"{task.model_id}/{self.id}/{task.round}".encode()))
        update = [array + generator.normal(size=array.shape).astype(array.dtype) for array in base]
        await asyncio.sleep(1 + self.index * 0.3)
        if self.id == "c0" and task.round == 1:
            update[0][0] = np.nan  # its content is at fault
        if self.id == "c1" and task.round == 2:
            await self.federation.closed_without_c1()  # late, however long a restart moves the deadline
        update_id = await self.report(task, update)
        if self.id == "c2" and task.round == 2:
            await self.report(task, [array * 2 for array in update])  # a second, different update
        if self.id == "c3":
            await self.send(task, update_id)  # the answer was lost on the way
            if task.round == 2:
                self.federation.later.append((self, task, update_id))

    async def report(self, task: pb.TaskRequest, update: list[np.ndarray]) -> str:
        self.count += 1
        update_id = f"{self.id}-{self.count}"
        data = codec.encode(update)
        if self.id == "c2":  # as FEDn's helper writes it, but announced: the server keeps another form of it
            out = io.BytesIO()
            np.savez_compressed(out, **{str(index): array for index, array in enumerate(update)})  # type: ignore[arg-type]
            data = out.getvalue()
            self.announced[update_id] = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        requests = [
            pb.ModelRequest(id=update_id, data=data[:100], status=pb.IN_PROGRESS),
            pb.ModelRequest(id=update_id, data=data[100:], status=pb.IN_PROGRESS),
            pb.ModelRequest(id=update_id, status=pb.OK),
        ]

        async def stream() -> Any:
            for request in requests:
                yield request

        done = await self.network.insist(lambda life: life.servicer.Upload(stream(), Context(self.id)))
        assert done.status == pb.OK
        await self.send(task, update_id)
        return update_id

    async def send(self, task: pb.TaskRequest, update_id: str) -> None:
        meta = {"training_metadata": {"num_examples": 1 + self.index}, "config": task.data}
        announced = self.announced.get(update_id, {})
        message = pb.ModelUpdate(model_id=task.model_id, model_update_id=update_id, meta=json.dumps(meta), **announced)
        reply = await self.network.insist(lambda life: life.servicer.SendModelUpdate(message, Context(self.id)))
        self.heard.append((task, update_id, reply.verdict))


@dataclass(frozen=True)
class Ended:
    """How a simulated session ended."""

    record: SessionRecord
    reports: dict[int, list[dict[str, Any]]]  # by round, of its first attempt
    models: list[str]
    blob: bytes
    kept: list[str]  # keys of updates
    spooled: set[str]  # blobs

    @property
    def result(self) -> tuple[GlobalModel, list[str], bytes]:
        return self.record.model, self.models, self.blob


Faults = Callable[[SqliteStateStore, FileBlobStore, Spool], None]
Stores = tuple[StateStore, BlobStore, BlobStore]  # state, models, updates
Places = Callable[["Federation"], contextlib.AbstractAsyncContextManager[Stores]]


@contextlib.asynccontextmanager
async def embedded(federation: Federation) -> AsyncIterator[Stores]:
    store = federation.make_store(federation.folder / "state.db", federation.pool)
    close = store.close
    models = FileBlobStore(federation.folder / "models", federation.pool)
    updates = FileBlobStore(federation.folder / "updates", federation.pool)
    await store.open("a test")
    try:
        await models.open()
        await updates.open()
        yield store, models, updates
    finally:
        await close()  # the kernel lets go of a dead process's lock


class Federation:
    """Four clients, three rounds, one session; `deaths` says when each life of the server ends."""

    def __init__(
        self,
        folder: Path,
        deaths: Sequence[tuple[int, bool]],
        *,
        store: type[SqliteStateStore] = SqliteStateStore,
        faults: Faults | None = None,
        between_lives: Callable[[Path], None] | None = None,
        places: Places = embedded,
        round_timeout_s: float = 30.0,
        delete_models_storage: bool = True,
        deadline_by_hand: bool = False,
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        """pool: for a loop that does not run everything at once.

        deadline_by_hand: where time is real, a round waits for all whom it can wait for, and then for nobody.
        """
        self.deadline_by_hand, self.clock_is_ahead_s = deadline_by_hand, 0.0
        self.places, self.round_timeout_s = places, round_timeout_s
        self.delete_models_storage = delete_models_storage
        self.folder, self.deaths, self.make_store = folder, list(deaths), store
        self.faults, self.between_lives = faults, between_lives
        self.network, self.lives = Network(), 0
        self.later: list[tuple[SimClient, pb.TaskRequest, str]] = []
        self.clients = [SimClient(index, self.network, self) for index in range(4)]
        self.pool = pool or ThreadPoolExecutor(1)  # VirtualLoop does not use it
        self.death = Death()
        self.calls = 0

    async def live(self, death: Death) -> None:
        async with self.places(self) as (store, models, updates):
            # where records are written one by one, uploads are, too; elsewhere they share segments
            small = {"small_bytes": 0} if issubclass(self.make_store, OneByOne) else {}
            spool = Spool(self.folder / "spool", self.pool, max_bytes=10**9, **small)
            (self.folder / "work").mkdir(exist_ok=True)
            await spool.open()
            death.wrap(store, STATE_CALLS)
            death.wrap(models, BLOB_CALLS)
            death.wrap(updates, BLOB_CALLS)
            death.wrap(spool, SPOOL_CALLS)
            if isinstance(store, OneByOne):
                death.wrap(store, ["between"])
            if self.faults:
                assert isinstance(store, SqliteStateStore)
                assert isinstance(models, FileBlobStore)
                self.faults(store, models, spool)
            workshop = Workshop(models, spool, self.pool, self.folder / "work", 10**9)
            scheduler = Scheduler(store, workshop, updates, self.clock, Patience())
            async with scheduler.running():
                limits = Limits(10**9, 8, 60.0, 30.0)
                downloads = Downloads(scheduler, self.pool, kept_bytes=10**6)
                servicer = Servicer(scheduler, Intake(scheduler), downloads, limits)
                self.network.life, self.network.died = Life(scheduler, servicer), death.dead
                await asyncio.Event().wait()

    async def process(self) -> None:
        while True:
            death = Death(*(self.deaths[self.lives] if self.lives < len(self.deaths) else ()))
            self.death, self.lives = death, self.lives + 1
            life, dead = asyncio.ensure_future(self.live(death)), asyncio.ensure_future(death.dead.wait())
            try:
                await asyncio.wait({life, dead}, return_when=asyncio.FIRST_COMPLETED)
                if not death.dead.is_set():
                    life.result()
            finally:
                self.network.life = None
                for task in (life, dead):
                    task.cancel()
                await asyncio.gather(life, dead, return_exceptions=True)
            if self.between_lives:
                self.between_lives(self.folder)
            await asyncio.sleep(RESTART_S)

    async def record(self) -> SessionRecord | None:
        document = await self.network.insist(lambda life: life.scheduler.store.get(Collection.SESSIONS, SESSION))
        return records.session_record(document) if document else None

    def clock(self) -> float:
        return asyncio.get_running_loop().time() + self.clock_is_ahead_s

    async def closed_without_c1(self) -> None:
        """Returns when round 2 is committed: by its deadline."""
        while (record := await self.record()) is None or record.model.round < 2:
            said = [sum(task.round == 2 for task, _, _ in client.heard) for client in self.clients]
            if self.deadline_by_hand and said[0] >= 1 and said[2] >= 2 and said[3] >= 2:
                await self.network.insist(self.let_deadline_pass)
            await asyncio.sleep(5)  # virtual time: a user who looks now and then

    async def let_deadline_pass(self, life: Life) -> None:
        """Of round 2, and of no other; and not before all are back: the window for that would end with it."""
        task = life.scheduler._sessions.get(SessionId(SESSION))
        everybody = len(life.scheduler.streams.attached()) == len(self.clients)
        if everybody and task and (round := task._session.round) and round.record.number == 2:
            self.clock_is_ahead_s += max(0.0, round.record.deadline + 1.0 - self.clock())
            await life.scheduler.start(SESSION)  # refused: it only wakes the session

    async def user(self) -> SessionRecord:
        await asyncio.sleep(15)
        await self.network.insist(self.create)
        while True:  # started only when all four are there, so that every life draws the same cohort
            record = await self.record()
            assert record is not None
            if record.status is not Status.CREATED:
                break
            if await self.network.insist(attached) < 4:
                await asyncio.sleep(2)
                continue
            try:
                reply, _ = await self.network.call(lambda life: life.scheduler.start(SESSION))
            except Unavailable:  # who is there must be asked again
                await asyncio.sleep(BACKOFF_S)
                continue
            if reply in (Outcome.DONE, Outcome.CONFLICT):
                break
        while (record := await self.record()) is None or record.status is Status.RUNNING:
            await asyncio.sleep(5)
        for client, task, update_id in self.later:  # an update of round 2 asked again after the session has ended
            await client.send(task, update_id)
        return record

    async def create(self, life: Life) -> None:
        seed = codec.encode([np.zeros(50), np.zeros((3, 2), np.float32)])
        await life.scheduler.models.put("seed", seed)
        model = records.model_document(
            GlobalModel(ModelId("seed")), helper=codec.NUMPY, name=None, session_id=None, at=0.0
        )
        await life.scheduler.store.append(Collection.MODELS, [model])
        config = SessionConfig(
            rounds=3,
            min_clients=2,
            round_timeout_s=self.round_timeout_s,
            validation_timeout_s=30.0,
            rejoin_window_s=self.round_timeout_s if self.deadline_by_hand else 60.0,
            delete_models_storage=self.delete_models_storage,
        )
        with contextlib.suppress(Invalid):  # it exists: we asked before, and the answer was lost
            await life.scheduler.create(config, name=None, model_id="seed", session_id=SESSION)

    async def run(self) -> Ended:
        background = [asyncio.ensure_future(self.process()), *(asyncio.ensure_future(c.run()) for c in self.clients)]
        user = asyncio.ensure_future(self.user())
        try:
            done, _ = await asyncio.wait({user, *background}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            self.calls, self.death.at = self.death.calls, None  # what we ask now is no call of the session's
            assert self.network.life is not None
            return await self.outcome(self.network.life.scheduler, user.result())
        finally:
            for task in (user, *background):
                task.cancel()
            await asyncio.gather(user, *background, return_exceptions=True)

    async def outcome(self, scheduler: Scheduler, record: SessionRecord) -> Ended:
        store = scheduler.store
        of_session = Query((Condition("session_id", "eq", SESSION),), sort=(("fl.round", False),))
        models = [document["model"] for document in await store.find(Collection.MODELS, of_session)]
        rounds = await store.find(Collection.ROUNDS, Query((Condition("fl.attempt", "eq", 1),)))
        reports = {found["fl"]["number"]: await store.reports(found["round_id"]) for found in rounds}
        blob = await scheduler.models.get(record.model.id)
        await asyncio.sleep(CLEARED_S)
        kept = [key for key, _ in await scheduler.updates.keys()]
        return Ended(record, reports, models, blob, kept, set(scheduler.workshop.spool._sizes))


async def attached(life: Life) -> int:
    return len(life.scheduler.streams.attached())


def simulate(folder: Path, deaths: Sequence[tuple[int, bool]] = (), **options: Any) -> tuple[Federation, Ended]:
    with virtual_loop() as loop:
        return loop.run_until_complete(simulated(folder, deaths, **options))


async def simulated(folder: Path, deaths: Sequence[tuple[int, bool]] = (), **options: Any) -> tuple[Federation, Ended]:
    folder.mkdir(parents=True, exist_ok=True)
    federation = Federation(folder, deaths, **options)
    async with asyncio.timeout(36_000):
        return federation, await federation.run()


def lose_upload(folder: Path, name: str) -> None:
    """The bytes of an upload leave the spool in this folder, while no process has it open."""
    if (file := folder / name).exists():
        file.unlink()
        return
    for segment in folder.glob("*.segment"):
        data = segment.read_bytes()
        segment.write_bytes(data.replace(name.encode(), b"0" * 32 + b"." + b"0" * 20))
