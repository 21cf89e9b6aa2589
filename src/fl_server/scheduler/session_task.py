"""Owns one session: takes what happened from its inbox, lets the core decide, carries the effects out in order.

Saves of a whole batch of events are one write and come first, but for what promises nothing: an Aggregate begins
beside them. Whatever else the core ordered after them follows in its order. Nobody else holds the session; what others
need of it is asked through the methods here, which only read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from fl_server import log
from fl_server.core.events import (
    Aggregate,
    Answer,
    AnswerFromStore,
    Broken,
    DeadlinePassed,
    Discard,
    Effect,
    Event,
    Fold,
    IssueTask,
    Save,
    SaveModel,
    SaveReport,
    SaveRound,
    SaveSession,
    StoreReturned,
    UpdateLost,
    UpdateReceived,
    WakeAt,
)
from fl_server.core.explain import explain
from fl_server.core.model import ClientId, ModelId, SessionRecord, Status, Task, TaskKind, UpdateId
from fl_server.core.session import Session, step
from fl_server.errors import Missing, StoreError, Unavailable
from fl_server.scheduler import records
from fl_server.scheduler.aggregation import Aggregation, Insist, Workshop
from fl_server.scheduler.calls import Calls, Reply
from fl_server.scheduler.copies import key_of
from fl_server.scheduler.feed import Feed
from fl_server.scheduler.outage import Outages
from fl_server.scheduler.streams import Assignment, ClientStreams
from fl_server.store.ports import BlobStore, Write

logger = logging.getLogger(__name__)
GATHERED_S = 0.01  # a write of updates waits so long for more of them
INBOX_SIZE = 1024  # full: submit waits, and so does the client
BATCH_SIZE = 256
ISSUED_AT_ONCE = 64  # tasks, then all else has its turn: each wakes a stream, 10,000 of them hold the loop for 0.9 s
OUTAGE_S = 5.0  # a longer one moves the deadlines; the save of that may fail at first without an end to it


class Surroundings(Protocol):
    """What a session's task needs of the scheduler."""

    clock: Callable[[], float]
    streams: ClientStreams
    calls: Calls
    feed: Feed
    workshop: Workshop
    updates: BlobStore

    outages: Outages
    insist: Insist

    async def write(self, writes: Sequence[Write]) -> None: ...
    def prepare(self, record: SessionRecord) -> None: ...
    async def load(self, session_id: str) -> tuple[Session, records.SessionFacts, Rounds]: ...
    async def verdict(self, task: Task, update_id: UpdateId) -> Reply: ...
    def new_round_id(self) -> str: ...


Rounds = dict[tuple[int, int], records.RoundFacts]  # by (round, attempt)


class Inbox(asyncio.Queue[Event]):
    """What has happened to a session, and is not decided yet."""

    def __init__(self) -> None:
        super().__init__(INBOX_SIZE)
        self._enough, self._is_enough = INBOX_SIZE, asyncio.Event()

    def _put(self, item: Event) -> None:
        super()._put(item)
        if self.qsize() >= self._enough:
            self._is_enough.set()

    async def gather(self, size: int, within_s: float) -> None:
        """Returns when so many are in it, or the time is over."""
        if self.qsize() >= size:
            return
        self._enough = size
        self._is_enough.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._is_enough.wait()


class SessionTask:
    def __init__(self, around: Surroundings, session: Session, facts: records.SessionFacts, rounds: Rounds) -> None:
        self._around, self._session, self.facts = around, session, facts
        self._rounds = rounds
        self.inbox = Inbox()
        self._ended: asyncio.Queue[Discard] = asyncio.Queue()  # unbounded: one an attempt
        self._leaving: set[str] = set()  # the blobs of these
        self._alarm: float | None = None
        self._waited_s = 0.0  # for the last save
        self._outages_s = around.outages.past_s  # those that the session has heard of
        self._aggregation = Aggregation(
            session.record.id, lambda: self._session.record.config, around.workshop, around.insist, self.inbox.put
        )
        self.main: asyncio.Task[None]

    # ---- for those who only read

    @property
    def running(self) -> bool:
        return self._session.record.status is Status.RUNNING

    @property
    def model(self) -> ModelId:
        """From which the next round trains."""
        return self._session.record.model.id

    def explain(self) -> list[str]:
        return explain(self._session, self._around.clock())

    def wants(self, task: Task) -> SessionRecord | None:
        """With whose model and helper an update of this task is compared; None if the task is not open."""
        round = self._session.round
        is_open = round is not None and round.open_task(task.client) == task
        return self._session.record if is_open else None

    def open_tasks(self, client: ClientId) -> list[tuple[Task, ModelId]]:
        """What the client has still to train."""
        round = self._session.round
        task = round.open_task(client) if round else None
        return [(task, self._session.record.model.id)] if task else []

    def task_of_round(self, client: ClientId, round_id: str) -> Task | None:
        for (number, attempt), facts in self._rounds.items():
            if facts.round_id == round_id:
                return Task(self._session.record.id, number, attempt, TaskKind.TRAIN, client)
        return None

    def blobs(self) -> set[str]:
        """The spooled updates that the running round counts on, or that are to be kept elsewhere first."""
        return self._leaving | self._counted()

    def _counted(self) -> set[str]:
        reports = self._session.round.reports.values() if self._session.round else ()
        return {report.update.blob for report in reports if report}

    async def lost(self) -> tuple[UpdateLost, ...]:
        """The running round's accepted updates whose bytes did not survive."""
        round = self._session.round
        reports = [report for report in (round.reports.values() if round else ()) if report and report.counts]
        spool = self._around.workshop.spool
        gone = await self._around.insist(spool.missing, [report.update.blob for report in reports])
        lost = [report for report in reports if report.update.blob in gone]
        if copies := self._around.workshop.copies:
            lost = [report for report in lost if not await self._around.insist(copies.fetch, report)]
        why = "not in the spool after a restart"
        return tuple(UpdateLost(report.task, report.update.update_id, why) for report in lost)

    # ---- the one writer

    async def run(self) -> None:
        log.session_id.set(self._session.record.id)
        try:
            async with asyncio.TaskGroup() as children:
                children.create_task(self._aggregation.run(), name="aggregation")
                children.create_task(self._clear(), name="clear")
                while True:
                    events = await self._next_events()
                    try:
                        await self._carry_out(await self._decide(events))
                    except StoreError:
                        raise
                    except Exception:  # a bug of ours, as in _decide(); how much was carried out, nobody knows
                        await self._break(events)
        finally:
            self._aggregation.stop()

    async def _break(self, events: list[Event]) -> None:
        """Ends the session, from what is stored of it; if not even that can be done, refuses whatever comes."""
        incident = self._note_incident(events)
        try:
            await self._carry_out(await self._broken(incident))
        except StoreError:
            raise
        except Exception:
            incident = self._note_incident([])
            while True:
                self._refuse(await self.inbox.get(), incident)

    def _note_incident(self, events: list[Event]) -> str:
        """In the log, with the traceback; to those who wait for an answer. Its id."""
        incident = uuid.uuid4().hex[:8]
        names = sorted({type(event).__name__ for event in events})
        logger.exception("session broken", extra={"incident": incident, "events": names})
        for event in events:
            self._refuse(event, incident)
        return incident

    def _refuse(self, event: Event, incident: str) -> None:
        if call := getattr(event, "call", None):
            self._around.calls.refuse(call, Unavailable(f"incident {incident}"))

    async def _broken(self, incident: str) -> list[Effect]:
        """Built again from its records (memory is not trusted), the session hears of it."""
        self._session, self.facts, self._rounds = await self._around.load(self._session.record.id)
        return step(self._session, Broken(f"incident {incident}"), self._around.outages.now())

    async def _next_events(self) -> list[Event]:
        """All that is in the inbox; waits for the first, at most until the alarm.

        No alarm rings while a store is away; first of all after that the session hears for how long it was.
        """
        outages = self._around.outages
        events: list[Event] = []
        if self._waited_s <= OUTAGE_S:
            until_s = None
            if self._alarm is not None and not outages.away:
                until_s = max(0.0, self._alarm - self._around.clock())
            try:
                async with asyncio.timeout(until_s):
                    events.append(await self.inbox.get())
            except TimeoutError:
                events.append(DeadlinePassed())
        if events:
            await self._gather(events[0])
        while not self.inbox.empty() and len(events) < BATCH_SIZE:
            events.append(self.inbox.get_nowait())
        away_s = max(outages.past_s - self._outages_s, self._waited_s)
        self._outages_s, self._waited_s = outages.past_s, 0.0
        return [StoreReturned(away_s), *events] if away_s > OUTAGE_S else events

    async def _gather(self, first: Event) -> None:
        """Lets more updates come into the same write, until with them the round may be complete: a write for every two
        or three costs more than the updates themselves."""
        round, buffer_size = self._session.round, self._session.record.config.buffer_size
        if not isinstance(first, UpdateReceived) or round is None:
            return
        if self._alarm is not None and self._alarm - self._around.clock() < 2 * GATHERED_S:
            return  # they came before the deadline, and shall be decided before it
        least = min(len(round.reports), buffer_size) if buffer_size > 0 else len(round.reports)
        await self.inbox.gather(min(least - round.reported, BATCH_SIZE) - 1, GATHERED_S)

    async def _decide(self, events: list[Event]) -> list[Effect]:
        effects: list[Effect] = []
        for event in events:
            try:
                more = step(self._session, event, self._around.outages.now())
            except Exception:  # a bug of ours: this session ends, the others go on
                incident = self._note_incident([event])
                await self._carry_out(effects)
                effects = await self._broken(incident)
                continue
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug("step", extra={"event": type(event).__name__, "effects": [type(e).__name__ for e in more]})
            effects += more
        return effects

    async def _carry_out(self, effects: list[Effect]) -> None:
        around, issued = self._around, 0
        self._begin_early(effects)
        if writes := self._writes(effects, around.clock()):
            began_at = around.outages.now()
            await around.write(writes)
            self._waited_s = around.outages.now() - began_at
        for effect in effects:
            match effect:
                case SaveSession() | SaveRound() | SaveReport() | SaveModel():
                    self._tell(effect)
                case Answer(call, reply, reason):
                    around.calls.answer(call, (reply, reason))
                case AnswerFromStore(call, task, update_id):
                    around.calls.answer(call, await around.verdict(task, update_id))
                case IssueTask(task, model, deadline):
                    # a validation's task names the round that made its model
                    round_id = self._rounds[task.round, task.attempt].round_id
                    config = self._session.record.config
                    around.streams.deliver(Assignment(task, model, config.helper, deadline, round_id, config))
                    issued += 1
                    if not issued % ISSUED_AT_ONCE:
                        await asyncio.sleep(0)
                case WakeAt(at_s):
                    self._alarm = at_s
                case Fold():
                    self._aggregation.order(effect)
                case Aggregate():  # ordered already, unless it was over at once
                    pass
                case Discard():
                    self._aggregation.abandon(effect)
                    self.clear(effect)

    def _begin_early(self, effects: Sequence[Effect]) -> None:
        """What promises nothing to anybody is done beside the write that comes first."""
        issues = any(isinstance(effect, IssueTask) for effect in effects)
        over = {(effect.round, effect.attempt) for effect in effects if isinstance(effect, Discard)}
        for effect in effects:
            match effect:
                case Aggregate() if (effect.round, effect.attempt) not in over:
                    self._aggregation.order(effect)
                case SaveModel(record) if issues:
                    self._around.prepare(record)
                case _:
                    pass

    def clear(self, ended: Discard) -> None:
        """An attempt's updates leave the spool, in the order of these calls and beside the inbox."""
        self._leaving.update(ended.blobs)
        self._ended.put_nowait(ended)

    async def _clear(self) -> None:
        while True:
            ended = await self._ended.get()
            try:
                await self._clear_one(ended)
            except Exception:  # as everywhere: it ends this session alone
                incident = uuid.uuid4().hex[:8]
                logger.exception("updates not cleared", extra={"incident": incident, "round": ended.round})
                await self.inbox.put(Broken(f"incident {incident}"))

    async def _clear_one(self, ended: Discard) -> None:
        """Deleted, or kept if the session says so."""
        around, record, counted = self._around, self._session.record, self._counted()
        blobs = [blob for blob in ended.blobs if blob and blob not in counted]  # a later attempt may have one, too
        if not record.config.delete_models_storage:
            for blob in blobs:
                await around.insist(self._keep, key_of(record.id, ended.round, ended.attempt, blob), blob)
        elif copies := around.workshop.copies:
            await around.insist(copies.delete, record.id, ended.round, ended.attempt, ended.blobs)
        await around.insist(around.workshop.spool.remove, blobs)
        self._leaving.difference_update(ended.blobs)

    async def _keep(self, key: str, blob: str) -> None:
        with contextlib.suppress(Missing):  # it was kept before, or is gone: nothing that a session could help
            async with self._around.workshop.spool.linked(blob) as file:
                await self._around.updates.put_file(key, file)

    # ---- records

    def _round(self, number: int, attempt: int, at: float) -> records.RoundFacts:
        """Its wire id is given when the attempt is first saved, and kept."""
        if (number, attempt) not in self._rounds:
            # validation tasks name the committed round; this batch of events may still name the one before
            oldest = self._session.record.model.round - 1
            kept = {key: facts for key, facts in self._rounds.items() if key[0] >= oldest}
            self._rounds = {**kept, (number, attempt): records.RoundFacts(self._around.new_round_id(), at)}
        return self._rounds[number, attempt]

    def _writes(self, effects: Sequence[Effect], at: float) -> list[Write]:
        return [write for effect in effects if isinstance(effect, Save) for write in self._documents(effect, at)]

    def _documents(self, save: Save, at: float) -> list[Write]:
        config = self._session.record.config
        match save:
            case SaveSession(record):
                run = self._run_writes(record, at)
                return [records.session_put(record, self.facts, at), *run]
            case SaveRound(record):
                round = self._round(record.number, record.attempt, at)
                return [records.round_put(record, round, config, self._base_of(record.number), at)]
            case SaveReport(report):
                round = self._rounds[report.task.round, report.task.attempt]
                return [records.report_put(report, round.round_id)]
            case SaveModel(record):
                round = self._round(record.model.round, record.model.attempt, at)
                return [*records.model_writes(record, round, at)]

    def _run_writes(self, record: SessionRecord, at: float) -> list[Write]:
        """A run begins with the record that starts the session, and ends with the one that ends it."""
        facts = self.facts
        if record.status is Status.RUNNING and facts.run_id is None:
            facts.run_id = records.new_run_id(record)
            return [records.run_put(record, facts.run_id, at)]
        if record.status is not Status.RUNNING and facts.run_id is not None:
            ended, facts.run_id = facts.run_id, None
            return [records.run_end(record, ended, at)]
        return []

    def _base_of(self, number: int) -> ModelId:
        model = self._session.record.model
        return model.parent if model.round == number and model.parent else model.id

    def _tell(self, save: Save) -> None:
        session_id, feed = self._session.record.id, self._around.feed
        match save:
            case SaveSession(record):
                log.round_number.set(record.model.round + 1)
                wire = records.WIRE_STATUS[record.status]
                done = {"rounds_committed": record.model.round, "rounds": record.last_round}
                feed.tell("session", session_id=session_id, status=wire, reason=record.reason, **done)
                logger.info("session saved", extra={"status": wire, "reason": record.reason, **done})
            case SaveRound(record):
                told: dict[str, Any] = {"round": record.number, "attempt": record.attempt, "phase": str(record.phase)}
                told |= {"cohort": len(record.cohort), "reason": record.reason}
                round_id = self._rounds[record.number, record.attempt].round_id
                feed.tell("round", session_id=session_id, round_id=round_id, **told)
                logger.info("round saved", extra=told)
            case SaveReport(report):
                round = self._session.round
                same = round is not None and round.record.number == report.task.round
                received = {"received": round.reported, "expected": len(round.reports)} if round and same else {}
                feed.tell(
                    "update",
                    session_id=session_id,
                    round=report.task.round,
                    client_id=report.task.client,
                    verdict=str(report.verdict),
                    reason=report.reason,
                    **received,
                )
            case SaveModel(record):
                model = record.model
                feed.tell(
                    "model", session_id=session_id, round=model.round, model_id=model.id, updates=model.num_updates
                )
