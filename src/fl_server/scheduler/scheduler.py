"""Routes what happens to the session that it concerns, and holds what all sessions share.

A session's state is its own task's; a store that is away is waited for here, in one place; nobody else writes.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_server.core.events import (
    Broken,
    ClientAttached,
    ClientDetached,
    DeadlinePassed,
    Discard,
    Reconfigured,
    Recovered,
    StartRequested,
    StopRequested,
    UpdateReceived,
    ValidationReported,
)
from fl_server.core.explain import explain
from fl_server.core.model import (
    ClientId,
    GlobalModel,
    ModelId,
    ModelUpdate,
    Outcome,
    Phase,
    SessionConfig,
    SessionId,
    SessionRecord,
    Status,
    Task,
    TaskKind,
    UpdateId,
    Verdict,
    verdict_of,
)
from fl_server.core.round import over
from fl_server.core.session import Session
from fl_server.deadlines import Deadlines
from fl_server.errors import Conflict, Invalid, NotFound, Unavailable
from fl_server.scheduler import records
from fl_server.scheduler.aggregation import Workshop
from fl_server.scheduler.calls import Calls, Reply
from fl_server.scheduler.copies import session_and_blob
from fl_server.scheduler.feed import Feed
from fl_server.scheduler.journal import Journal
from fl_server.scheduler.outage import Outages
from fl_server.scheduler.predictions import Predictions
from fl_server.scheduler.session_task import Rounds, SessionTask
from fl_server.scheduler.streams import ClientStreams, Mailbox
from fl_server.store.ports import BlobStore, Collection, Condition, Document, Patch, Put, Query, StateStore, Write

logger = logging.getLogger(__name__)
STOPPING = "stopping"
SWEPT_AT_ONCE = 2000
METRICS_SHOWN = 100  # of one validation
LARGEST = 1e308  # of them; so written, NaN and the infinities are none


@dataclass(frozen=True, slots=True)
class Patience:
    """How long things are waited for, in seconds."""

    store_retry_s: float = 1.0
    rejoin_window_s: float = 60.0  # a client that was here before a restart is called online until then
    upload_ttl_s: float = 3600.0  # an upload that no report names is litter after that
    litter_ttl_s: float = 3600.0  # so is a model's blob that no record names
    telemetry_ttl_s: float = 86_400.0
    prediction_timeout_s: float = 600.0  # of a prediction run that says none
    sweep_every_s: float = 600.0
    drain_s: float = 5.0  # a stop waits so long for what is queued to be written


class Scheduler:
    def __init__(
        self,
        store: StateStore,
        workshop: Workshop,
        updates: BlobStore,
        clock: Callable[[], float],
        patience: Patience | None = None,
    ) -> None:
        """updates: keeps clients' updates of sessions that do not want them deleted."""
        self.store, self.workshop, self.updates, self.clock = store, workshop, updates, clock
        self.models = workshop.models
        self.streams, self.calls, self.feed = ClientStreams(), Calls(), Feed(clock)
        self.deadlines = Deadlines()  # of calls
        self._patience = patience or Patience()
        self.turn = asyncio.Event()  # see turned()
        self.outages = Outages(clock, self._patience.store_retry_s, self.turned)
        self.insist = self.outages.insist
        self.journal = Journal(store, self.insist)
        self.predictions = Predictions(
            store,
            self.streams,
            self.feed,
            self.insist,
            clock,
            timeout_s=self._patience.prediction_timeout_s,
            rejoin_window_s=self._patience.rejoin_window_s,
        )
        self._sessions: dict[SessionId, SessionTask] = {}
        self._arriving: Counter[ClientId] = Counter()  # their presence is being recorded
        self._tasks: asyncio.TaskGroup
        self._telling: set[asyncio.Task[None]] = set()  # that clients left
        self.preparers: list[Callable[[SessionRecord], Awaitable[object]]] = []  # see prepare()
        self._preparing: set[asyncio.Task[None]] = set()
        self._round_ids = itertools.count(1)
        self._not_running: str | None = "starting"

    # ---- life

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Scheduler]:
        """Recovered when it enters. When it leaves its sessions are abandoned: recovery redoes what they did."""
        async with asyncio.TaskGroup() as self._tasks:
            journal = self._tasks.create_task(self.journal.run(), name="journal")
            background = [self._tasks.create_task(self._watch_stores(), name="watch stores")]
            background += [self._tasks.create_task(work, name=name) for name, work in await self._recover()]
            self._not_running = None
            self.turned()
            try:
                yield self
            finally:
                self.stop_serving()
                for task in [*background, *self._telling, *self._preparing]:
                    task.cancel()
                for session in self._sessions.values():
                    session.main.cancel()
                self.calls.refuse_all(Unavailable("the server stops"))
                try:
                    async with asyncio.timeout(0 if self.outages.away else self._patience.drain_s):
                        await self.journal.finish()
                        await asyncio.wait({journal})
                except TimeoutError:  # its store is away: what it still holds was promised to nobody
                    journal.cancel()

    def stop_serving(self) -> None:
        """Ends the streams; who is online stays recorded, so that the next life knows whom to expect."""
        self._not_running = STOPPING
        self.turned()
        self.streams.stop()
        self.feed.close()

    async def _recover(self) -> list[tuple[str, Any]]:
        newest = await self._find(Collection.ROUNDS, sort=(("fl.ordinal", True),), limit=1)
        self._round_ids = itertools.count(newest[0]["fl"]["ordinal"] + 1 if newest else 1)
        online = await self._find(Collection.CLIENTS, Condition("status", "eq", "online"))
        expected = tuple(ClientId(client["client_id"]) for client in online)
        started = records.WIRE_STATUS[Status.RUNNING]
        for document in await self._find(Collection.SESSIONS, Condition("status", "eq", started)):
            session_id = SessionId(document["session_id"])
            task = await self._load(session_id)
            model = records.session_record(document).model
            await self._begin_run(document)
            if await self.insist(self.models.size_bytes, model.id) is None:
                await task.inbox.put(
                    Broken(f"the global model {model.id} of round {model.round} is gone from the store")
                )
            else:
                await task.inbox.put(Recovered(expected, await task.lost()))
            logger.info("session recovered", extra={"session": session_id, "expected": len(expected)})
        await self._end_runs()
        await self._end_rounds()
        await self._clear_rounds()
        await self.predictions.recover(expected)
        return [
            ("forget absent", self._forget_absent(expected)),
            ("sweep", self._sweep()),
            ("predictions", self.predictions.run()),
        ]

    async def _begin_run(self, session: Document) -> None:
        """Again: a crash between two writes may have left a session that runs without the document of its run."""
        if (run_id := records.session_facts(session).run_id) is not None:
            await self.write([records.run_put(records.session_record(session), run_id, session["updated_at"])])

    async def _end_runs(self) -> None:
        """Likewise of sessions that have ended."""
        for run in await self._find(Collection.RUNS, Condition("completed_at", "eq", None)):
            session = await self.insist(self.store.get, Collection.SESSIONS, run["session_id"])
            if session and records.session_facts(session).run_id != run["run_id"]:
                record = records.session_record(session)
                await self.write([records.run_end(record, run["run_id"], session["updated_at"])])

    async def _end_rounds(self) -> None:
        """Likewise of attempts that were given up."""
        for round in await self._find(Collection.ROUNDS, Condition("status", "eq", records.WIRE_PHASE[Phase.TRAINING])):
            session = await self.insist(self.store.get, Collection.SESSIONS, round["fl"]["session"])
            if session is None:
                continue
            record = records.session_record(session)
            under_way = {(record.model.round, record.model.attempt)}  # its end comes with its model's record
            if record.status is Status.RUNNING:
                under_way.add((record.model.round + 1, record.attempt))
            if (round["fl"]["number"], round["fl"]["attempt"]) not in under_way:
                await self.write([records.round_end(round["round_id"], record.reason, self.clock())])

    async def _clear_rounds(self) -> None:
        """Likewise of updates that were to leave the spool: to where its session keeps them, or to make room."""
        keeps = Condition("fl.record.config.delete_models_storage", "eq", False)
        documents = await self._find(Collection.SESSIONS, keeps)
        running = [id for id, task in self._sessions.items() if task.running]
        for session_id in dict.fromkeys([*running, *(SessionId(document["session_id"]) for document in documents)]):
            if ended := await self._uncleared(session_id):
                task = self._sessions.get(session_id) or await self._load(session_id)
                for discard in ended:
                    task.clear(discard)

    async def _uncleared(self, session_id: SessionId) -> list[Discard]:
        """Attempts that are over and have updates in the spool, oldest first: they were cleared in their order."""
        session = await self.insist(self.store.get, Collection.SESSIONS, session_id)
        record = records.session_record(session) if session else None
        newer: tuple[Condition, ...] = ()
        found: list[Discard] = []
        while rounds := await self._find(
            Collection.ROUNDS,
            Condition("fl.session", "eq", session_id),
            *newer,
            sort=(("fl.ordinal", True),),
            limit=1,
        ):
            [round] = rounds
            fl = round["fl"]
            newer = (Condition("fl.ordinal", "lt", fl["ordinal"]),)
            under_way = (record.model.round + 1, record.attempt) if record else None
            if record and record.status is Status.RUNNING and (fl["number"], fl["attempt"]) == under_way:
                continue
            reports = await self.insist(self.store.reports, round["round_id"])
            blobs = [report["update"]["blob"] for report in reports if report["update"]["blob"] and not report["lost"]]
            gone = await self.insist(self.workshop.spool.missing, blobs)
            if blobs and len(gone) == len(blobs):
                break
            found.append(Discard(fl["number"], fl["attempt"], tuple(blob for blob in blobs if blob not in gone)))
        return found[::-1]

    def unready(self) -> str | None:
        """Why not to send work here now; None when ready."""
        return self.outages.reason() or self._not_running

    @property
    def stopping(self) -> bool:
        return self._not_running == STOPPING

    def turned(self) -> None:
        """unready() may say something else now: whoever took `turn` before is woken, and takes the next."""
        self.turn.set()
        self.turn = asyncio.Event()

    # ---- sessions

    async def create(
        self, config: SessionConfig, *, name: str | None, model_id: str, session_id: str | None = None
    ) -> Document:
        """The document of a new session that starts from this model. Raises Invalid, naming the field."""
        model = await self.insist(self.store.get, Collection.MODELS, model_id)
        if model is None:
            raise Invalid(f"model_id: no model {model_id}")
        _check_helper(config, model)
        seed = GlobalModel(ModelId(model_id), sha256=model["fl"]["sha256"])
        record = SessionRecord(
            SessionId(session_id or str(uuid.uuid4())), config, random.SystemRandom().getrandbits(32), seed
        )
        facts = records.SessionFacts(name, model_id, self.clock())
        put = records.session_put(record, facts, self.clock())
        if not await self.insist(self.store.insert, Collection.SESSIONS, put.document):
            raise Invalid(f"session_id: {record.id} exists")
        return put.document

    async def start(
        self,
        session_id: str,
        *,
        rounds: int | None = None,
        round_timeout_s: float | None = None,
        wait_for_clients_s: float = 0.0,
        client_ids: frozenset[ClientId] | None = None,
        model_name_prefix: str = "",
    ) -> Reply:
        """Starts it, or continues one that has ended. Raises NotFound."""
        task = self._sessions.get(SessionId(session_id)) or await self._load(SessionId(session_id))
        if not (task.running or await self._has_model(task.model)):
            return Outcome.REFUSED, "Session seed model not found"
        # no await between reading who is attached and putting it in the inbox: later attaches come after it
        return await self.calls.wait(
            lambda call: task.inbox.put(
                StartRequested(
                    call,
                    tuple(self.streams.attached()),
                    rounds,
                    round_timeout_s,
                    wait_for_clients_s,
                    client_ids,
                    model_name_prefix,
                )
            )
        )

    async def stop(self, session_id: str) -> Reply:
        """Raises NotFound."""
        task = self._sessions.get(SessionId(session_id)) or await self._load(SessionId(session_id))
        return await self.calls.wait(lambda call: task.inbox.put(StopRequested(call)))

    async def configure(self, session_id: str, config: SessionConfig) -> Reply:
        """Another configuration for a session that is not running. Raises NotFound, Invalid naming the field."""
        task = self._sessions.get(SessionId(session_id)) or await self._load(SessionId(session_id))
        if model := await self.insist(self.store.get, Collection.MODELS, task.model):
            _check_helper(config, model)
        return await self.calls.wait(lambda call: task.inbox.put(Reconfigured(call, config)))

    async def _has_model(self, model_id: ModelId) -> bool:
        """Its record and its bytes."""
        document = await self.insist(self.store.get, Collection.MODELS, model_id)
        return document is not None and await self.insist(self.models.size_bytes, model_id) is not None

    async def rename(self, session_id: str, name: str | None) -> None:
        if task := self._sessions.get(SessionId(session_id)):
            task.facts.name = name
        await self.patch(Collection.SESSIONS, session_id, {"name": name})

    async def explain(self, session_id: str) -> list[str]:
        """Raises NotFound."""
        if task := self._sessions.get(SessionId(session_id)):
            said = task.explain()
        else:
            document = await self.store.get(Collection.SESSIONS, session_id)
            if document is None:
                raise NotFound(f"Entity with id: {session_id} not found")
            said = explain(Session(records.session_record(document)), self.clock())
        return [*said, *([self.unready() or ""] if self.unready() else [])]

    def any_running(self) -> bool:
        return any(task.running for task in self._sessions.values())

    # ---- updates and validations

    def wants(self, task: Task) -> SessionRecord | None:
        owner = self._sessions.get(task.session)
        return owner.wants(task) if owner else None

    async def update(self, task: Task, update: ModelUpdate, fault: str | None) -> Reply:
        owner = self._sessions.get(task.session)
        if owner is None:  # its session ended before this process began
            return await self.verdict(task, update.update_id)
        return await self.calls.wait(lambda call: owner.inbox.put(UpdateReceived(call, task, update, fault)))

    async def validated(self, task: Task, metrics: Mapping[str, Any] | None) -> None:
        """A validation of this task is durable, or (None) its client could not do it."""
        if metrics is not None:  # before the session can end with it
            shown = _numbers(metrics)
            self.feed.tell(
                "validation", session_id=task.session, round=task.round, client_id=task.client, metrics=shown
            )
        if owner := self._sessions.get(task.session):
            await owner.inbox.put(ValidationReported(task))

    async def verdict(self, task: Task, update_id: UpdateId) -> Reply:
        """What an update of a round that is over was told, or would have been."""
        round = await self._round_of(task)
        if round is None or task.client not in round["fl"]["record"]["cohort"]:
            return Verdict.NOT_SELECTED, "no such task was issued"
        found = await self.insist(self.store.reports, round["round_id"], task.client)
        reports = [records.report_of(report) for report in found]
        return verdict_of(reports, update_id) or (Verdict.LATE, over(task))

    async def task_of_round(self, client: ClientId, session_id: str, round_id: str) -> Task | None:
        """The training task of a client in the round with this wire id."""
        if owner := self._sessions.get(SessionId(session_id)):
            known = owner.task_of_round(client, round_id)
            if known:
                return known
        document = await self.insist(self.store.get, Collection.ROUNDS, round_id)
        if document is None or document["fl"]["session"] != session_id:
            return None
        fl = document["fl"]
        return Task(SessionId(session_id), fl["number"], fl["attempt"], TaskKind.TRAIN, client)

    async def task_of_model(self, client: ClientId, model_id: str, update_id: str) -> Task | None:
        """The training task that this update has closed, or else the client's one open task of this model.

        For an update that names no task: asked again, it must find the one that it found before.
        """
        for round in await self._find(Collection.ROUNDS, Condition("round_config.model_id", "eq", model_id)):
            for report in await self.insist(self.store.reports, round["round_id"], client):
                if report["update"]["update_id"] == update_id:
                    return records.report_of(report).task
        tasks = [
            task for owner in self._sessions.values() for task, model in owner.open_tasks(client) if model == model_id
        ]
        return tasks[0] if len(tasks) == 1 else None

    # ---- clients

    async def attach(self, client: ClientId, name: str, peer: str) -> Mailbox:
        """Its tasks from now on; those that it has still to do come at once."""
        at = self.clock()
        presence = {"status": "online", "last_seen": at, "updated_at": at, "combiner": records.COMBINER_NAME}
        document = {**_new_client(client, name, at), **presence}
        try:
            with self._on_its_way(client):
                await self.journal.record(Collection.CLIENTS, document, Patch(Collection.CLIENTS, client, presence))
        except asyncio.CancelledError:  # the caller left: the record may be written all the same
            if not self._is_here(client):
                self.journal.offer(*_absence(client, self.clock()))
            raise
        mailbox = self.streams.open(client, peer)
        self.predictions.attached(client)  # no await in between: a run that begins then would ask it twice
        try:
            await self._tell_sessions(client)
        except BaseException:  # the caller left while an inbox was full, and will not detach what it never had
            await self.detach(mailbox)
            raise
        self.feed.tell("client", client_id=client, status="online")
        return mailbox

    async def detach(self, mailbox: Mailbox) -> None:
        """What it tells is told also if its caller is cancelled meanwhile, as gRPC does a second time."""
        client = mailbox.client
        if not self.streams.close(mailbox) or self._not_running:
            return
        telling = self._tasks.create_task(self._tell_detached(client), name=f"tell that {client} left")
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)
        await asyncio.shield(telling)

    async def _tell_detached(self, client: ClientId) -> None:
        await self._tell_sessions(client)
        await self._note_absence([client])

    async def _tell_sessions(self, client: ClientId) -> None:
        """Whether it is here. Who waits for a full inbox may be overtaken: then what it said is put right."""
        for session in list(self._sessions.values()):
            said: bool | None = None
            while said != (here := client in self.streams.attached()):
                said = here
                await session.inbox.put(ClientAttached(client) if here else ClientDetached(client))

    def _is_here(self, client: ClientId) -> bool:
        return client in self.streams.attached() or client in self._arriving

    @contextmanager
    def _on_its_way(self, client: ClientId) -> Iterator[None]:
        self._arriving[client] += 1
        try:
            yield
        finally:
            self._arriving[client] -= 1
            if not self._arriving[client]:
                del self._arriving[client]

    async def add_client(self, client: ClientId, *, name: str, ip: str, package: str, preferred: str | None) -> None:
        """Assigned over REST; its stream comes next."""
        at = self.clock()
        status = "online" if client in self.streams.attached() else "available"
        said = {"name": name, "ip": ip, "package": package, "combiner_preferred": preferred, "last_seen": at}
        changes = {**said, "status": status, "combiner": records.COMBINER_NAME, "updated_at": at}
        document = {**_new_client(client, name, at), **changes}
        await self.journal.record(Collection.CLIENTS, document, Patch(Collection.CLIENTS, client, changes))

    async def remove_client(self, client_id: str) -> bool:
        """Forgets what is recorded of it, False if nothing is; one that is attached stays so, and is noted again."""
        if removed := await self.insist(self.store.delete, Collection.CLIENTS, client_id):
            self.feed.tell("client", client_id=client_id, status="removed")
        return removed

    async def client_named(self, name: str) -> ClientId | None:
        """FEDn's SDK users may send a client's name where its id belongs."""
        query = Query((Condition("name", "eq", name),), limit=2)
        found = await self.insist(self.store.find, Collection.CLIENTS, query)
        return ClientId(found[0]["client_id"]) if len(found) == 1 else None

    async def _note_absence(self, clients: Sequence[ClientId]) -> None:
        for client in clients:
            if client in self.streams.attached():
                continue
            self.feed.tell("client", client_id=client, status="offline")
            if not self._is_here(client):  # else the record of its coming is queued already
                await self.journal.note(*_absence(client, self.clock()))

    async def _forget_absent(self, expected: Sequence[ClientId]) -> None:
        """Those that do not come back after a restart are offline; until then they are expected."""
        await asyncio.sleep(self._patience.rejoin_window_s)
        await self._note_absence(expected)

    # ---- models and other documents

    async def add_model(self, path: Path, *, name: str | None, sha256: str, helper: str) -> Document:
        """A seed from a checked file of this helper, which is taken: blob first, then the record that points at it."""
        model = GlobalModel(ModelId(str(uuid.uuid4())), sha256=sha256)
        await self.models.put_file(model.id, path)
        document = records.model_document(model, helper=helper, name=name, session_id=None, at=self.clock())
        await self.write([Put(Collection.MODELS, document)])
        self.feed.tell("model", session_id=None, round=0, model_id=model.id)
        return document

    async def patch(self, collection: Collection, id: str, changes: Mapping[str, Any]) -> Document | None:
        """The document with these plain fields set; None if there is none."""
        await self.write([Patch(collection, id, {**changes, "updated_at": self.clock()})])
        return await self.insist(self.store.get, collection, id)

    async def announce_combiner(self, address: str, port: int) -> None:
        """This process's combiner, for those who list them."""
        at = self.clock()
        where = {"address": address, "port": port, "updated_at": at}
        document: Document = {
            "combiner_id": records.COMBINER_ID,
            "name": records.COMBINER_NAME,
            "fqdn": None,
            "ip": "",
            "parent": "localhost",
            "committed_at": at,
            **where,
        }
        await self.insist(self.store.append, Collection.COMBINERS, [document])
        await self.write([Patch(Collection.COMBINERS, records.COMBINER_ID, where)])

    async def remove_combiner(self, combiner_id: str) -> bool:
        """False if there is none. Raises Conflict for the one that runs here."""
        if combiner_id == records.COMBINER_ID:
            raise Conflict(f"combiner {records.COMBINER_NAME} runs in this server")
        return await self.insist(self.store.delete, Collection.COMBINERS, combiner_id)

    async def add_record(self, collection: Collection, document: Document) -> None:
        """A client's record that came over REST; durable when this returns."""
        await self.journal.record(collection, document)

    # ---- the store

    async def _watch_stores(self) -> None:
        """Sessions that waited for a store hear that time goes on."""

        def returned() -> None:
            for task in self._sessions.values():
                if not task.inbox.full():  # else it has enough to wake up for
                    task.inbox.put_nowait(DeadlinePassed())

        probes = (
            functools.partial(self.store.get, Collection.SESSIONS, ""),
            functools.partial(self.models.size_bytes, "probe"),
            self.workshop.spool.probe,
        )
        await self.outages.watch(probes, returned)

    async def write(self, writes: Sequence[Write]) -> None:
        await self.insist(self.store.save, writes)

    async def load(self, session_id: str) -> tuple[Session, records.SessionFacts, Rounds]:
        """What the store knows of a session. Raises NotFound."""
        document = await self.insist(self.store.get, Collection.SESSIONS, session_id)
        if document is None:
            raise NotFound(f"Entity with id: {session_id} not found")
        record = records.session_record(document)
        committed, attempt = record.model.round, (record.model.round + 1, record.attempt)
        rounds = await self._find(
            Collection.ROUNDS, Condition("fl.session", "eq", session_id), Condition("fl.number", "gte", committed)
        )
        by_attempt: Rounds = {}
        running, reports = None, []
        for found in rounds:
            key = (found["fl"]["number"], found["fl"]["attempt"])
            by_attempt[key] = records.round_facts(found)
            if key == attempt:
                running = records.round_record(found)
                stored = await self.insist(self.store.reports, found["round_id"])
                reports = [records.report_of(report) for report in stored]
        validations = await self._find(
            Collection.VALIDATIONS,
            Condition("session_id", "eq", session_id),
            Condition("model_id", "eq", record.model.id),
        )
        validated = [ClientId(validation["fl"]["client"]) for validation in validations]
        session = Session.from_records(record, running, reports, validated)
        return session, records.session_facts(document), by_attempt

    async def _load(self, session_id: SessionId) -> SessionTask:
        session, facts, rounds = await self.load(session_id)
        if known := self._sessions.get(session_id):
            return known  # two loads at once: the first one owns it
        task = self._sessions[session_id] = SessionTask(self, session, facts, rounds)
        task.main = self._tasks.create_task(task.run(), name=f"session {session_id}")
        return task

    def prepare(self, record: SessionRecord) -> None:
        """The session's model is about to be asked for by many: what that needs is made beside its commit."""
        for prepare in self.preparers:
            preparing = self._tasks.create_task(self._prepare(prepare, record), name="prepare")
            self._preparing.add(preparing)
            preparing.add_done_callback(self._preparing.discard)

    async def _prepare(self, prepare: Callable[[SessionRecord], Awaitable[object]], record: SessionRecord) -> None:
        try:
            await prepare(record)
        except Exception:  # nobody waits for it, and whoever needs it meets it again, in a call of its own
            logger.exception("model not prepared", extra={"model": record.model.id})

    def new_round_id(self) -> str:
        return str(next(self._round_ids))

    async def _round_of(self, task: Task) -> Document | None:
        found = await self._find(
            Collection.ROUNDS,
            Condition("fl.session", "eq", task.session),
            Condition("fl.number", "eq", task.round),
            Condition("fl.attempt", "eq", task.attempt),
            limit=1,
        )
        return found[0] if found else None

    async def _find(
        self, collection: Collection, *where: Condition, sort: tuple[tuple[str, bool], ...] = (), limit: int = 0
    ) -> list[Document]:
        return await self.insist(self.store.find, collection, Query(where, sort, limit=limit))

    # ---- litter

    async def _sweep(self) -> None:
        """Uploads that no report names, and models' bytes that no record names, go when they are old enough."""
        while True:
            await asyncio.sleep(self._patience.sweep_every_s)
            spool, counted = self.workshop.spool, set[str]()
            for session in self._sessions.values():
                counted |= session.blobs()
            old = [blob for blob in spool.stale(self.clock() - self._patience.upload_ttl_s) if blob not in counted]
            if self.outages.calm_s < self._patience.upload_ttl_s:
                old = []  # their reports may still be on the way: whoever sent them was told to come again
            await self.insist(spool.remove, old)
            litter = await self._litter()
            await self.insist(self.models.delete, litter)
            copies = await self._old_copies(counted)
            await self.insist(self.updates.delete, copies)
            stale = await self._forget_telemetry()
            if old or litter or copies or stale:
                told = {"uploads": len(old), "blobs": len(litter), "copies": len(copies), "telemetry": stale}
                logger.info("swept", extra=told)

    async def _forget_telemetry(self) -> int:
        """In pieces, between which others reach the store."""
        where = (Condition("committed_at", "lt", self.clock() - self._patience.telemetry_ttl_s),)
        gone, last = 0, SWEPT_AT_ONCE
        while last == SWEPT_AT_ONCE:
            last = await self.insist(self.store.delete_where, Collection.TELEMETRY, where, SWEPT_AT_ONCE)
            gone += last
        return gone

    async def _old_copies(self, counted: set[str]) -> list[str]:
        """Of updates that did not count, or whose round's end a crash came upon; not what a session wants kept."""
        oldest, kept = self.clock() - self._patience.litter_ttl_s, dict[str, bool]()
        litter = []
        for key, put_at in await self.insist(self.updates.keys):
            named = session_and_blob(key)
            if put_at >= oldest or named is None or named[1] in counted:
                continue
            session_id = named[0]
            if session_id not in kept:
                document = await self.insist(self.store.get, Collection.SESSIONS, session_id)
                config = records.session_record(document).config if document else None
                kept[session_id] = config is not None and not config.delete_models_storage
            if not kept[session_id]:
                litter.append(key)
        return litter if self.outages.calm_s >= self._patience.litter_ttl_s else []

    async def _litter(self) -> list[str]:
        oldest = self.clock() - self._patience.litter_ttl_s
        keys = [key for key, put_at in await self.insist(self.models.keys) if put_at < oldest]
        sessions = await self._find(Collection.SESSIONS)
        named = {records.session_record(session).model.optimizer_state for session in sessions}
        named |= {records.session_record(session).model.id for session in sessions}
        litter = [
            key
            for key in keys
            if key not in named and await self.insist(self.store.get, Collection.MODELS, key) is None
        ]
        # what was put before an outage, or in it, may be about to be named by a save that has waited for its end
        return litter if self.outages.calm_s >= self._patience.litter_ttl_s else []


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What the feed holds of a client's metrics: it keeps thousands of them in memory, and is read as JSON."""
    numbers = ((key, value) for key, value in metrics.items() if isinstance(value, int | float))
    shown = ((key, value) for key, value in numbers if len(key) <= 200 and -LARGEST <= value <= LARGEST)
    return dict(itertools.islice(shown, METRICS_SHOWN))


def _check_helper(config: SessionConfig, model: Document) -> None:
    if config.helper != (helper := records.helper_of(model)):
        raise Invalid(f"helper_type: {config.helper!r}, but model {model['model']} is in the format of {helper}")


def _absence(client: ClientId, at: float) -> tuple[Collection, Document, Patch]:
    gone = {"status": "offline", "last_seen": at, "updated_at": at}
    return Collection.CLIENTS, {**_new_client(client, client, at), **gone}, Patch(Collection.CLIENTS, client, gone)


def _new_client(client: ClientId, name: str, at: float) -> Document:
    return {
        "client_id": client,
        "name": name,
        "combiner": records.COMBINER_NAME,
        "combiner_preferred": None,
        "ip": None,
        "status": "available",
        "last_seen": at,
        "package": None,
        "committed_at": at,
        "updated_at": at,
    }
