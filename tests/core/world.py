"""A session in a world that forgets, repeats and dies: everything that can happen to it, held against all the laws.

World.do(op, a, b) lets one thing happen; a and b choose which, so that any list of such triples is a history.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fl_server.core.events import (
    Aggregated,
    Broken,
    ClientAttached,
    ClientDetached,
    DeadlinePassed,
    Effect,
    EffectFailed,
    Event,
    IssueTask,
    Reconfigured,
    Recovered,
    StartRequested,
    StopRequested,
    StoreReturned,
    UpdateLost,
    UpdateReceived,
    ValidationReported,
)
from fl_server.core.model import (
    ClientId,
    GlobalModel,
    ModelId,
    ModelUpdate,
    Phase,
    Report,
    SessionConfig,
    SessionId,
    SessionRecord,
    Status,
    Task,
    TaskKind,
    UpdateId,
    Verdict,
)
from fl_server.core.session import Session, step
from tests.core.ledger import ENDED, Ledger

CLIENTS = [ClientId(f"c{i}") for i in range(5)]

_OFTEN = {
    "attach": 1,
    "detach": 1,
    "everybody": 2,
    "everybody_leaves": 1,
    "update": 3,
    "report_all": 2,
    "whole_round": 3,
    "retry": 2,
    "stray": 1,
    "time": 2,
    "early": 1,
    "aggregation": 3,
    "stale": 2,
    "lose": 1,
    "validation": 1,
    "outage": 1,
    "stop": 1,
    "start": 2,
    "reconfigure": 1,
    "broken": 1,
    "kill": 1,
    "kill_in_next_step": 2,
}
OPS = [op for op, times in _OFTEN.items() for _ in range(times)]


class World:
    def __init__(self, config: SessionConfig, name: str = "s") -> None:
        seed_model = GlobalModel(ModelId("seed"), optimizer_state="moments")
        self.ledger = Ledger(SessionRecord(SessionId(name), config, 7, seed_model), now=1000.0)
        self.client_ids = config.client_ids
        self.story: list[tuple[Event, float, list[Effect]]] = []  # of all lives
        self.sent: list[tuple[Task, ModelUpdate, str | None]] = []
        self.outcomes: list[Event] = []  # that the shell has reported
        self.die_after: int | None = None  # effects of the next step
        self._boot()

    # ---- the machine under test

    def _boot(self) -> None:
        """Builds the session from the disk, and keeps how: to replay it later, the disk as it was."""
        ledger = self.ledger
        record, saved = ledger.session, ledger.rounds.get(ledger.begun)
        reports, validated = ledger.reports_of(ledger.begun), ledger.validators()
        self.build: Callable[[], Session] = lambda: Session.from_records(record, saved, reports, validated)
        self.session = self.build()
        self.life: list[tuple[Event, float, list[Effect]]] = []

    def crash(self) -> None:
        self.check_replay()
        ledger = self.ledger
        online = ledger.forget_what_is_soft()
        self._boot()
        lost: tuple[UpdateLost, ...] = ()
        if self.session.round and ledger.now % 3 < 1:  # now and then the spool has lost one
            counted = [report for report in self.session.round.reports.values() if report and report.counts]
            lost = tuple(UpdateLost(r.task, r.update.update_id, "host died") for r in counted[:1])
        self.happen(Recovered(online, lost))

    def happen(self, event: Event) -> None:
        before = self.ledger.session
        self._foresee(event)
        effects = step(self.session, event, self.ledger.now)
        self.life.append((event, self.ledger.now, effects))
        self.story.append((event, self.ledger.now, effects))
        for count, effect in enumerate(effects, 1):
            self.ledger.carry_out(effect, event)
            if self.die_after == count:
                self.die_after = None
                self.crash()
                return
        if before.status in ENDED and not isinstance(event, StartRequested | Reconfigured):
            assert self.session.record == before, "1: an ended session stays ended"
        self._check_record_is_disk()
        self._check_something_will_come()
        if isinstance(event, ClientAttached):
            self._check_told_all(event.client, effects)

    def _foresee(self, event: Event) -> None:
        """What this event does to the world's own idea of who is awaited and until when a model is validated."""
        ledger, config = self.ledger, self.ledger.session.config
        match event:
            case DeadlinePassed():
                ledger.alarm = None  # it has rung
            case StartRequested():
                if ledger.session.status is not Status.RUNNING:
                    ledger.awaited = set()
            case ClientAttached(client):
                ledger.awaited.discard(client)
            case StoreReturned(away_s):
                ledger.awaited_until += away_s
                if ledger.validation_until is not None:
                    ledger.validation_until += away_s
            case Recovered(expected) if ledger.session.status is Status.RUNNING:
                ledger.awaited = set(filter(config.admits, expected))
                ledger.awaited_until = ledger.now + config.rejoin_window_s
                if config.validate and ledger.session.model.round:
                    window_s = max(config.validation_timeout_s, config.rejoin_window_s)
                    ledger.validation_until = ledger.now + window_s
            case _:
                pass
        if ledger.now >= ledger.awaited_until:
            ledger.awaited = set()
        if ledger.validation_until is not None and ledger.now >= ledger.validation_until:
            ledger.validation_until = None

    # ---- laws about the session as it is after a step

    def _check_record_is_disk(self) -> None:
        ledger, round = self.ledger, self.session.round
        assert self.session.record == ledger.session, "9: record == disk: the session's"
        if round and round.record.phase is not Phase.SELECTING:
            reports = ledger.reports_of(ledger.begun)
            assert round.record == ledger.rounds.get(ledger.begun), "9: record == disk: the round's"
            known = [report for report in round.reports.values() if report]
            assert set(known) == {r for r in reports if not r.lost}, "9: record == disk: the reports"
            assert set(round.lost.values()) == {r for r in reports if r.lost}, "9: record == disk: what was lost"
            assert round.reported == len(known), "9: record == disk: the number of reports"
            assert round.accepted == sum(r.counts for r in known), "9: record == disk: the number of updates"
        assert self.session.alarm == ledger.alarm, "8: the bell that is set is the one that is waited for"

    def _check_something_will_come(self) -> None:
        ledger, session, round = self.ledger, self.session, self.session.round
        assert ledger.alarm is None or ledger.alarm > ledger.now, "8: an alarm in the past rings for ever"
        if ledger.session.status is not Status.RUNNING:
            return
        assert ledger.alarm is not None or ledger.running, "8: nothing will ever happen again"
        if round is None:
            validated = ledger.validators()
            assert (ledger.streams | ledger.awaited) - validated, "8: the last validation waits for nobody"
            return
        match round.record.phase:
            case Phase.TRAINING:
                closed = {report.task.client for report in ledger.reports_of(ledger.begun) if not report.lost}
                assert set(round.record.cohort) - closed, "8: all have reported, and it still waits"
            case Phase.AGGREGATING:
                assert [job for job in ledger.running if job[:2] == ledger.begun], (
                    "8: AGGREGATING, and nobody aggregates"
                )
            case Phase.SELECTING if ledger.now >= round.opens_at and not ledger.awaited:
                here = set(filter(ledger.session.config.admits, ledger.streams))
                assert len(here) < ledger.session.config.min_clients, "8: enough are here, and nothing begins"
            case Phase.SELECTING:
                pass
            case other:
                raise AssertionError(f"8: a round that is {other} stays the session's")
        assert set(session.attached) == set(filter(ledger.session.config.admits, ledger.streams)), "8: who is here"

    def _check_told_all(self, client: ClientId, effects: list[Effect]) -> None:
        """Who attaches hears all that he has still to do."""
        ledger = self.ledger
        if ledger.session.status is not Status.RUNNING or not ledger.session.config.admits(client):
            return
        told = [effect.task for effect in effects if isinstance(effect, IssueTask) and effect.task.client == client]
        saved = ledger.rounds.get(ledger.begun)
        closed = {report.task.client for report in ledger.reports_of(ledger.begun) if not report.lost}
        if saved and saved.phase is Phase.TRAINING and client in set(saved.cohort) - closed:
            kinds = [task.kind for task in told if (task.round, task.attempt) == ledger.begun]
            assert TaskKind.TRAIN in kinds, "8: attached, and not told of the open training task"
        if ledger.validation_until is not None and client not in ledger.validators():
            rounds = [task.round for task in told if task.kind is TaskKind.VALIDATE]
            assert rounds == [ledger.session.model.round], "8: attached, and not told of the open validation"

    def check_replay(self) -> None:
        again = self.build()
        for event, at, effects in self.life:
            assert step(again, event, at) == effects, "5: a replay gives the same effects"
        assert again == self.session, "5: a replay gives the same state"

    def check_every_verdict_again(self) -> None:
        """Law 6, asked of everything that was ever answered; the ledger compares."""
        for task, update, fault in list(self.sent):
            self._send(task, update, fault)

    # ---- what can happen

    def do(self, op: str, a: int, b: int) -> None:
        ops: dict[str, Callable[[int, int], None]] = {
            "attach": lambda a, b: self._attach(CLIENTS[a % len(CLIENTS)]),
            "detach": lambda a, b: self._detach(CLIENTS[a % len(CLIENTS)]),
            "everybody": lambda a, b: self._everybody(self._attach),
            "everybody_leaves": lambda a, b: self._everybody(self._detach),
            "update": self._update,
            "report_all": self._report_all,
            "whole_round": self._whole_round,
            "retry": self._retry,
            "stray": self._stray,
            "time": self._time,
            "early": lambda a, b: self.happen(DeadlinePassed()),
            "aggregation": self._aggregation,
            "stale": self._stale,
            "lose": self._lose,
            "validation": self._validation,
            "outage": self._outage,
            "stop": lambda a, b: self.happen(StopRequested(self.ledger.call())),
            "start": self._start,
            "reconfigure": self._reconfigure,
            "broken": lambda a, b: self.happen(Broken("the model's blob is gone")) if b % 4 == 0 else None,
            "kill": lambda a, b: self.crash(),
            "kill_in_next_step": self._kill_in_next_step,
        }
        ops[op](a, b)
        if self.ledger.alarm is not None and self.ledger.alarm <= self.ledger.now:
            self.happen(DeadlinePassed())

    def _attach(self, client: ClientId) -> None:
        self.ledger.streams.add(client)
        self.happen(ClientAttached(client))

    def _detach(self, client: ClientId) -> None:
        self.ledger.streams.discard(client)
        self.happen(ClientDetached(client))

    def _everybody(self, comes_or_goes: Callable[[ClientId], None]) -> None:
        for client in CLIENTS:
            comes_or_goes(client)

    def _update(self, a: int, b: int) -> None:
        tasks = [task for task in self.ledger.issued if task.kind is TaskKind.TRAIN]
        if tasks:
            self._send_new(tasks[-1 - a % min(len(tasks), 12)], 1 + b % 5, "NaN in w" if b % 7 == 0 else None)

    def _report_all(self, a: int, b: int) -> None:
        for client in CLIENTS:
            mine = [task for task in self.ledger.issued if task.client == client and task.kind is TaskKind.TRAIN]
            if mine and not (a & 1 and client == CLIENTS[b % len(CLIENTS)]):
                self._send_new(mine[-1], 2, None)

    def _whole_round(self, a: int, b: int) -> None:
        self._report_all(0, b)
        self._aggregation(a, 3)

    def _retry(self, a: int, b: int) -> None:
        if not self.sent:
            return
        task, update, fault = self.sent[-1 - a % min(len(self.sent), 16)]
        if b % 3 == 0 and (task, update.update_id) in self.ledger.verdicts:
            fault = "no upload"  # the spool of an ended round is gone
        self._send(task, update, fault)

    def _send_new(self, task: Task, num_examples: float, fault: str | None) -> None:
        number = len(self.sent)
        update = ModelUpdate(UpdateId(f"u{number}"), f"blob{number}", num_examples)
        self.sent.append((task, update, fault))
        self._send(task, update, fault)

    def _send(self, task: Task, update: ModelUpdate, fault: str | None) -> None:
        self.happen(UpdateReceived(self.ledger.call((task, update.update_id)), task, update, fault))

    def _stray(self, a: int, b: int) -> None:
        """An update for a task that its client was never given."""
        client = CLIENTS[a % len(CLIENTS)]
        task = Task(self.ledger.session.id, a % 4, b % 4, TaskKind.TRAIN, client)
        saved = self.ledger.rounds.get((task.round, task.attempt))
        if saved is None or client not in saved.cohort:
            call = self.ledger.call((task, UpdateId("stray")))
            self.happen(UpdateReceived(call, task, ModelUpdate(UpdateId("stray"), "blob", 1), None))
            reply = self.ledger.answered.get(call, Verdict.LATE)  # none if the process died before it
            assert reply in (Verdict.NOT_SELECTED, Verdict.LATE), "2: an update of a task that was never issued counts"

    def _time(self, a: int, b: int) -> None:
        self.ledger.now += (0.5, 4.0, 30.0, 100.0, 400.0)[a % 5]

    def _aggregation(self, a: int, b: int) -> None:
        """An Aggregate ends, in one of its three ways."""
        if not self.ledger.running:
            return
        number, attempt, reports = self.ledger.running.pop(0)
        outcome: Event
        match b % 6:
            case 0:
                outcome = EffectFailed(number, attempt, "kernel raised")
            case 1 | 2:
                outcome = _lost(reports[a % len(reports)])
            case _:
                base = self.ledger.session.model.id
                model_id = ModelId(f"m{number}.{attempt}.{len(reports)}")
                outcome = Aggregated(GlobalModel(model_id, number, attempt, base, "", len(reports), "moments"))
        self.outcomes.append(outcome)
        self.happen(outcome)

    def _stale(self, a: int, b: int) -> None:
        """An outcome that arrives twice, after its attempt, or of another set than the one that now counts."""
        if self.ledger.running:
            number, attempt, reports = self.ledger.running[0]
            self.happen(Aggregated(GlobalModel(ModelId("stale"), number, attempt, None, "", len(reports) + 1)))
            assert self.session.record.model.id != "stale", "3: the outcome of a former set is committed"
        elif self.outcomes:
            self.happen(self.outcomes[a % len(self.outcomes)])

    def _lose(self, a: int, b: int) -> None:
        round = self.session.round
        if round and round.record.phase is Phase.TRAINING:
            counted = [report for report in round.reports.values() if report and report.counts]
            if counted:
                self.happen(_lost(counted[a % len(counted)]))

    def _validation(self, a: int, b: int) -> None:
        tasks = [task for task in self.ledger.issued if task.kind is TaskKind.VALIDATE]
        if tasks:
            task = tasks[-1 - a % min(len(tasks), 8)]
            self.ledger.validated.add((task.client, task.round))
            self.happen(ValidationReported(task))

    def _outage(self, a: int, b: int) -> None:
        """The store was away during a save; the clock went on meanwhile, and the bell may have rung."""
        away_s = (2.0, 15.0, 90.0)[a % 3]
        self.ledger.now += away_s
        self.happen(StoreReturned(away_s))

    def _start(self, a: int, b: int) -> None:
        attached, wait_s = tuple(sorted(self.ledger.streams)), 50.0 if b % 2 else 0.0
        self.happen(StartRequested(self.ledger.call(), attached, 1 + a % 3, None, wait_s, self.client_ids))

    def _reconfigure(self, a: int, b: int) -> None:
        wanted: dict[str, Any] = {
            "rounds": 1 + a % 3,
            "min_clients": 1 + b % 3,
            "validate": a % 2 == 0,
            "round_timeout_s": 5.0 + a,
        }
        self.happen(Reconfigured(self.ledger.call(), replace(self.ledger.session.config, **wanted)))

    def _kill_in_next_step(self, a: int, b: int) -> None:
        self.die_after = 1 + a % 4


def _lost(report: Report) -> UpdateLost:
    return UpdateLost(report.task, report.update.update_id, "disk gone")
