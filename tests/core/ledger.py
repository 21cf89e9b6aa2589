"""What the world outside the core knows: the disk, the clients, the callers; and the laws that effects must keep.

The disk takes one record at a time, as a store without transactions would, so a crash may come after any of them.
Law numbers are those of design.md, section 4. Nothing in here looks into a Session.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count

from fl_server.core.events import (
    Aggregate,
    Answer,
    AnswerFromStore,
    Discard,
    Effect,
    Event,
    Fold,
    IssueTask,
    Reconfigured,
    SaveModel,
    SaveReport,
    SaveRound,
    SaveSession,
    StartRequested,
    WakeAt,
)
from fl_server.core.model import (
    CallId,
    ClientId,
    GlobalModel,
    ModelId,
    Outcome,
    Phase,
    Report,
    RoundRecord,
    SessionRecord,
    Status,
    Task,
    TaskKind,
    UpdateId,
    Verdict,
    verdict_of,
)

ENDED = {Status.FINISHED, Status.FAILED, Status.TERMINATED}

Attempt = tuple[int, int]  # (round, attempt)
Question = tuple[Task, UpdateId]
Running = tuple[int, int, tuple[Report, ...]]  # an Aggregate that is being carried out


class Ledger:
    def __init__(self, created: SessionRecord, now: float) -> None:
        self.now = now
        # on disk
        self.session = created
        self.rounds: dict[Attempt, RoundRecord] = {}
        self.reports: dict[Question, Report] = {}
        self.models: dict[ModelId, GlobalModel] = {}
        self.validated: set[tuple[ClientId, int]] = set()
        # with the clients and the callers
        self.streams: set[ClientId] = set()
        self.issued: list[Task] = []
        self.asked: dict[CallId, Question | None] = {}
        self.answered: dict[CallId, Verdict | Outcome] = {}
        # under way, and lost with the process
        self.alarm: float | None = None
        self.running: list[Running] = []
        self.awaited: set[ClientId] = set()  # were here before the restart, and are not back
        self.awaited_until = 0.0
        self.validation_until: float | None = None
        # what the laws remember
        self.verdicts: dict[Question, Verdict | Outcome] = {}
        self.accepted: set[Question] = set()  # told so, and not lost since
        self.lost: set[Question] = set()
        self.excused: set[Task] = set()  # UpdateLost touched them
        self.aggregates: dict[Attempt, set[UpdateId]] = {}
        self.committed: dict[int, set[UpdateId]] = {}
        self._calls = count(1)

    @property
    def begun(self) -> Attempt:
        return self.session.model.round + 1, self.session.attempt

    def call(self, question: Question | None = None) -> CallId:
        call = CallId(next(self._calls))
        self.asked[call] = question
        return call

    def reports_of(self, attempt: Attempt) -> list[Report]:
        return [report for (task, _), report in self.reports.items() if (task.round, task.attempt) == attempt]

    def validators(self) -> set[ClientId]:
        """Who has reported a validation of the current model."""
        return {client for client, number in self.validated if number == self.session.model.round}

    def forget_what_is_soft(self) -> tuple[ClientId, ...]:
        """The process dies. Whom the client records call online."""
        online = tuple(sorted(self.streams))
        self.streams, self.alarm, self.running, self.validation_until = set(), None, [], None
        self.awaited = set()
        return online

    def carry_out(self, effect: Effect, event: Event) -> None:
        match effect:
            case SaveSession(record):
                self._save_session(record, event)
            case SaveRound(record):
                self._save_round(record)
            case SaveReport(report):
                question = report.task, report.update.update_id
                self.reports[question] = report
                self.lost.discard(question)
                if report.lost:
                    self.lost.add(question)
                    self.accepted.discard(question)
                    self.excused.add(report.task)
            case SaveModel(record):
                assert record.model == self.session.model, "4: no model is listed that the session does not name"
                self.models[record.model.id] = record.model
                attempt = record.model.round, record.model.attempt
                phase = self.rounds[attempt].phase
                assert phase in (Phase.AGGREGATING, Phase.COMPLETED), "1: terminal phases never change"
                self.rounds[attempt] = replace(self.rounds[attempt], phase=Phase.COMPLETED)
            case IssueTask(task, model, _):
                self._issue(task, model)
            case Answer(call, reply, _):
                self._answer(call, reply)
            case AnswerFromStore(call, task, update_id):
                known = verdict_of([r for (t, _), r in self.reports.items() if t == task], update_id)
                self._answer(call, known[0] if known else Verdict.LATE)
            case WakeAt(at):
                self.alarm = at
            case Fold(report):
                saved = self.reports.get((report.task, report.update.update_id))
                assert saved == report, "4: saved before folded"
            case Aggregate(base, number, number_of_attempt, reports):
                self._aggregate(base, (number, number_of_attempt), reports)
            case Discard(number, number_of_attempt, _):
                self.running = [job for job in self.running if job[:2] != (number, number_of_attempt)]

    def _save_session(self, record: SessionRecord, event: Event) -> None:
        before = self.session
        assert record.version > before.version, "9: a save that the store would drop as an old one"
        if isinstance(event, Reconfigured):
            kept = replace(record, config=before.config, version=before.version)
            assert kept == before, "1: another configuration changes nothing else"
        elif before.status in ENDED:
            assert isinstance(event, StartRequested), "1: an ended session stays ended"
        assert before.status is not Status.RUNNING or record.config == before.config, "1: what runs keeps its config"
        if record.model.round > before.model.round:
            self._commit(record.model)
        else:
            assert record.model.id == before.model.id, "3: another model without a commit"
        if record.status in ENDED:
            self.validation_until = None
        self.session = record

    def _commit(self, model: GlobalModel) -> None:
        attempt, number = (model.round, model.attempt), self.session.model.round + 1
        assert model.round == number and number not in self.committed, "3: one commit a round"
        assert self.rounds[attempt].phase is Phase.AGGREGATING, "3: a commit follows an Aggregate"
        counted = self.aggregates[attempt]
        told = {update_id for task, update_id in self.accepted if (task.round, task.attempt) == attempt}
        assert told <= counted, "2: an accepted update counts exactly once"
        assert model.num_updates == len(counted), "2: a client counts at most once"
        self.committed[number] = counted
        if self.session.config.validate:
            self.validation_until = self.now + self.session.config.validation_timeout_s

    def _save_round(self, record: RoundRecord) -> None:
        attempt = record.number, record.attempt
        old = self.rounds.get(attempt)
        assert old is None or old.phase not in (Phase.COMPLETED, Phase.FAILED), "1: terminal phases never change"
        assert old is None or record.version > old.version, "9: a save that the store would drop as an old one"
        if old is None and record.phase is Phase.TRAINING:
            assert not self.awaited, "8: a cohort is chosen while some who were here before the restart are awaited"
            config = self.session.config
            assert len(record.cohort) >= config.min_clients, "3: never below clients_required"
            assert all(map(config.admits, record.cohort)), "a client takes part whom client_ids does not admit"
        self.rounds[attempt] = record

    def _issue(self, task: Task, model: ModelId) -> None:
        assert self.session.status is Status.RUNNING, "4: the start is saved before a task is issued"
        assert self.session.model.id == model, "4: the model is committed before it is handed out"
        assert task.client in self.streams, "issued to nobody"
        if task.kind is TaskKind.TRAIN:
            saved = self.rounds.get((task.round, task.attempt))
            assert saved and saved.phase is Phase.TRAINING and task.client in saved.cohort, "4: saved before issued"
        self.issued.append(task)

    def _aggregate(self, base: GlobalModel, attempt: Attempt, reports: tuple[Report, ...]) -> None:
        assert not [job for job in self.running if job[:2] == attempt], "3: one Aggregate at a time"
        assert len(reports) >= self.session.config.min_updates, "3: never below min_updates"
        assert self.rounds[attempt].phase is Phase.AGGREGATING, "4: frozen before aggregated"
        assert base == self.session.model, "3: the base is the committed model"
        clients = [report.task.client for report in reports]
        assert clients == sorted(set(clients)), "7: in the cohort's order, each client once"
        told = {update_id for task, update_id in self.accepted if (task.round, task.attempt) == attempt}
        ids = {report.update.update_id for report in reports}
        assert told <= ids, "2: every update that was told ACCEPTED counts"
        on_disk = {report.update.update_id for report in self.reports_of(attempt) if report.counts}
        assert ids == on_disk, "7: the set on disk decides"
        gone = {update_id for _, update_id in self.lost}
        before = self.aggregates.get(attempt)
        assert before is None or before - gone == ids, "7: the set changes only by what was lost"
        self.aggregates[attempt] = ids
        self.running.append((*attempt, reports))

    def _answer(self, call: CallId, reply: Verdict | Outcome) -> None:
        assert call in self.asked and call not in self.answered, "one answer a call"
        self.answered[call] = reply
        question = self.asked[call]
        if question is None:
            return
        task, _ = question
        attempt = task.round, task.attempt
        if reply is Verdict.ACCEPTED:
            assert question in self.reports and self.reports[question].counts, "4: saved before accepted"
            self.accepted.add(question)
        if reply is Verdict.LATE and attempt == self.begun and self.session.status is Status.RUNNING:
            saved = self.rounds.get(attempt)
            assert saved is None or saved.phase is not Phase.TRAINING, "4: closed before LATE"
        if task in self.issued and task not in self.excused:
            assert self.verdicts.setdefault(question, reply) == reply, "6: one verdict per update"
