"""A session: rounds one after another, each tried again when it fails; start, stop, finish, recover.

step(session, event, at) changes the session and returns what must be done, in order. It is the only way to change
one. Same events at same times, same session and same effects: no I/O, clock or randomness in here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, assert_never

from fl_server.core import round as rounds
from fl_server.core.events import (
    Aggregated,
    Answer,
    AnswerFromStore,
    Broken,
    ClientAttached,
    ClientDetached,
    DeadlinePassed,
    Discard,
    Effect,
    EffectFailed,
    Event,
    IssueTask,
    Reconfigured,
    Recovered,
    SaveModel,
    SaveSession,
    StartRequested,
    StopRequested,
    StoreReturned,
    UpdateLost,
    UpdateReceived,
    ValidationReported,
    WakeAt,
)
from fl_server.core.model import (
    CallId,
    ClientId,
    GlobalModel,
    InvalidConfig,
    Outcome,
    Phase,
    Report,
    RoundRecord,
    SessionRecord,
    Status,
    Task,
    TaskKind,
    Verdict,
    check_duration,
)
from fl_server.core.round import Round
from fl_server.core.selection import choose_cohort

GONE_KEPT = 1000  # clients that left, for explain; each start of a client may bring a new id


@dataclass(slots=True)
class Validation:
    """The current model is with the clients to be validated. Soft: it follows from the session's record."""

    model: GlobalModel
    deadline: float
    open: set[ClientId] = field(default_factory=set)  # here (or expected back), and have not reported
    reported: set[ClientId] = field(default_factory=set)


@dataclass(slots=True)
class Session:
    record: SessionRecord
    round: Round | None = None  # None: nothing to train (not running, or the last model is being validated)
    validation: Validation | None = None
    attached: dict[ClientId, float] = field(default_factory=dict)  # since when; only those that client_ids admits
    last_seen: dict[ClientId, float] = field(default_factory=dict)  # of those that left, for explain
    awaited: set[ClientId] = field(default_factory=set)  # were here before the restart, are not back yet
    awaited_until: float = 0.0
    alarm: float | None = None

    @classmethod
    def from_records(
        cls, record: SessionRecord, round: RoundRecord | None, reports: Iterable[Report], validated: Iterable[ClientId]
    ) -> Session:
        """What the store knows of it; Recovered, the next event, sets it going."""
        session = cls(record)
        if record.status is Status.RUNNING:
            if record.model.round < record.last_round:
                session.round = Round.from_records(round or _next_record(record), reports)
            if record.config.validate and record.model.round:
                session.validation = Validation(record.model, 0.0, reported=set(validated))
        return session


def step(session: Session, event: Event, at: float) -> list[Effect]:
    """What must be done now, in this order. at: seconds since the epoch; it decides, not the alarm."""
    effects = _handle(session, event, at)
    while more := _settle(session, at):
        effects += more
    alarm = _next_deadline(session, at)
    if alarm != session.alarm or isinstance(event, DeadlinePassed | Recovered):
        session.alarm = alarm
        effects.append(WakeAt(alarm))
    return effects


def _handle(session: Session, event: Event, at: float) -> list[Effect]:
    match event:
        case UpdateReceived():
            return _receive(session, event)
        case ClientAttached(client):
            return _attach(session, client, at)
        case ClientDetached(client):
            return _detach(session, client, at)
        case ValidationReported(task):
            if session.validation and session.validation.model.round == task.round:
                session.validation.open.discard(task.client)
                session.validation.reported.add(task.client)
            return []
        case DeadlinePassed():
            return []  # the time decides, not the bell
        case StartRequested():
            return _start(session, event, at)
        case StopRequested(call):
            return _stop(session, call)
        case Reconfigured():
            return _reconfigure(session, event)
        case Recovered():
            return _recover(session, event, at)
        case StoreReturned(away_s):
            return _postpone(session, away_s)
        case Broken(reason):
            return [] if session.record.status is not Status.RUNNING else _end(session, Status.FAILED, reason)
        case Aggregated(model):
            if not _aggregating(session, model.round, model.attempt, model.num_updates):
                return []
            return _commit(session, model, at)
        case UpdateLost():
            return _lose(session, event)
        case EffectFailed(number, attempt, reason):
            return _fail(session, reason, at) if _aggregating(session, number, attempt) else []
        case _:
            assert_never(event)


def _settle(session: Session, at: float) -> list[Effect]:
    """What follows from the facts and the time: the one place that says when something is over."""
    validation, round, config = session.validation, session.round, session.record.config
    if session.awaited and at >= session.awaited_until:
        session.awaited.clear()
        if validation:
            validation.open &= session.attached.keys()
    if validation and at >= validation.deadline:
        session.validation = validation = None
    if session.record.status is not Status.RUNNING:
        return []
    if round is None:
        return [] if validation and validation.open else _end(session, Status.FINISHED, "")
    if round.record.phase is Phase.SELECTING and at >= round.opens_at and not session.awaited:
        if len(session.attached) >= config.min_clients:
            return _select(session, round, at)
        if at >= round.select_until:
            return _fail(session, _too_few(session, at), at)
    closes = rounds.complete(round, config) or at >= round.record.deadline
    enough = round.accepted >= config.min_updates
    match round.record.phase:
        case Phase.TRAINING if closes and enough:
            return rounds.freeze(round, session.record.model)
        case Phase.TRAINING if closes:
            rejected = round.reported - round.accepted
            return _fail(session, f"{round.accepted} of {config.min_updates} updates, {rejected} rejected", at)
        case Phase.AGGREGATING if not enough:
            reason = f"{round.accepted} of {config.min_updates} updates left, the others' bytes were lost"
            return _fail(session, reason, at)
        case _:
            return []


def _next_deadline(session: Session, at: float) -> float | None:
    if session.record.status is not Status.RUNNING:
        return None
    deadlines = [session.awaited_until] if session.awaited else []
    if session.validation:
        deadlines.append(session.validation.deadline)
    if session.round and session.round.record.phase is Phase.SELECTING:
        if not session.awaited:  # else nothing is decided before they are back, and that has its own deadline
            deadlines.append(session.round.opens_at if at < session.round.opens_at else session.round.select_until)
    elif session.round and session.round.record.phase is Phase.TRAINING:
        deadlines.append(session.round.record.deadline)
    return min(deadlines, default=None)


# ---- requests


def _start(session: Session, event: StartRequested, at: float) -> list[Effect]:
    record = session.record
    if record.status is Status.RUNNING:
        return [Answer(event.call, Outcome.CONFLICT, "the session is running")]
    asked: dict[str, Any] = {"client_ids": event.client_ids, "model_name_prefix": event.model_name_prefix}
    if event.rounds is not None:
        asked["rounds"] = event.rounds
    if event.round_timeout_s is not None:
        asked["round_timeout_s"] = event.round_timeout_s
    try:
        config = replace(record.config, **asked)
        check_duration("wait_for_clients_s", event.wait_for_clients_s, zero=True)
    except InvalidConfig as wrong:
        return [Answer(event.call, Outcome.REFUSED, str(wrong))]
    here = [client for client in event.attached if config.admits(client)]
    if len(here) < config.min_clients and not event.wait_for_clients_s:
        needed = f"Number of available clients is lower than the required minimum of {config.min_clients}"
        return [Answer(event.call, Outcome.REFUSED, f"{needed} ({len(here)} attached)")]
    session.attached = dict.fromkeys(here, at)
    session.last_seen.clear()
    session.awaited.clear()
    model = replace(record.model, optimizer_state="")  # as FEDn: the moments start afresh
    last_round = model.round + config.rounds
    _write(session, status=Status.RUNNING, reason="", config=config, model=model, failures=0, last_round=last_round)
    saved = _begin_round(session, at, select_for_s=event.wait_for_clients_s or config.selection_timeout_s)
    return [*saved, Answer(event.call, Outcome.DONE)]


def _stop(session: Session, call: CallId) -> list[Effect]:
    match session.record.status:
        case Status.RUNNING:
            return [*_end(session, Status.TERMINATED, "stopped"), Answer(call, Outcome.DONE)]
        case Status.TERMINATED:
            return [Answer(call, Outcome.DONE)]  # asked again: the first answer may have been lost
        case other:
            return [Answer(call, Outcome.CONFLICT, f"the session is {other}")]


def _reconfigure(session: Session, event: Reconfigured) -> list[Effect]:
    if session.record.status is Status.RUNNING:
        return [Answer(event.call, Outcome.CONFLICT, "the session is running")]
    _write(session, config=event.config)
    return [SaveSession(session.record), Answer(event.call, Outcome.DONE)]


def _receive(session: Session, event: UpdateReceived) -> list[Effect]:
    record, task, round = session.record, event.task, session.round
    begun = (record.model.round + 1, record.attempt)
    if task.session != record.id or task.kind is not TaskKind.TRAIN or (task.round, task.attempt) > begun:
        return [Answer(event.call, Verdict.NOT_SELECTED, "no such task was issued")]
    if round is None or (task.round, task.attempt) != begun:
        return [AnswerFromStore(event.call, task, event.update.update_id)]
    return rounds.receive(round, event)


# ---- clients come and go


def _attach(session: Session, client: ClientId, at: float) -> list[Effect]:
    """A client gets what it has still to do: again, if it had it before."""
    if session.record.status is not Status.RUNNING or not _admits(session, client):
        return []  # a start says who is attached then
    session.attached[client] = at
    session.last_seen.pop(client, None)
    session.awaited.discard(client)
    effects: list[Effect] = []
    if session.validation and client not in session.validation.reported:
        effects.append(_validate(session, session.validation, client))
    if session.round and (task := session.round.open_task(client)):
        effects.append(_train(session, session.round, task))
    return effects


def _detach(session: Session, client: ClientId, at: float) -> list[Effect]:
    if session.attached.pop(client, None) is not None:
        session.last_seen[client] = at
        if len(session.last_seen) > GONE_KEPT:
            del session.last_seen[next(iter(session.last_seen))]  # the oldest: who attached again is not in it
        if session.validation:
            session.validation.open.discard(client)
    return []


def _admits(session: Session, client: ClientId) -> bool:
    return session.record.config.admits(client)


def _train(session: Session, round: Round, task: Task) -> IssueTask:
    return IssueTask(task, session.record.model.id, round.record.deadline)


def _validate(session: Session, validation: Validation, client: ClientId) -> IssueTask:
    validation.open.add(client)
    model = validation.model
    task = Task(session.record.id, model.round, model.attempt, TaskKind.VALIDATE, client)
    return IssueTask(task, model.id, validation.deadline)


# ---- rounds begin, end, are tried again


def _write(session: Session, **changes: Any) -> None:
    session.record = replace(session.record, version=session.record.version + 1, **changes)


def _next_record(record: SessionRecord) -> RoundRecord:
    return RoundRecord(record.id, record.model.round + 1, record.attempt)


def _begin_round(session: Session, at: float, *, select_for_s: float, pause_s: float = 0.0) -> list[Effect]:
    """Attempt numbers never come back within a round: a task of an old attempt must not fit a new one."""
    session.record = replace(session.record, attempt=session.record.attempt + 1)
    opens_at = at + pause_s
    session.round = Round(_next_record(session.record), opens_at=opens_at, select_until=opens_at + select_for_s)
    return [SaveSession(session.record)]


def _select(session: Session, round: Round, at: float) -> list[Effect]:
    record = session.record
    seed = f"{record.seed}/{round.record.number}/{round.record.attempt}"
    cohort = choose_cohort(session.attached, record.config.requested_clients, seed)
    saved = rounds.open_training(round, cohort, at + record.config.round_timeout_s)
    return [*saved, *(_train(session, round, round.task(client)) for client in cohort)]


def _commit(session: Session, model: GlobalModel, at: float) -> list[Effect]:
    """Everything that follows from the new model is in the one write that makes it current."""
    config, done = session.record.config, session.round
    assert done is not None
    rounds.enter(done, Phase.COMPLETED)  # its record is written with the model's, after the session's
    _write(session, model=model, attempt=0, failures=0, reason="")
    session.round = None
    if model.round < session.record.last_round:
        saved = _begin_round(session, at, select_for_s=config.selection_timeout_s)
    else:
        saved = [SaveSession(session.record)]
    effects: list[Effect] = [*saved, SaveModel(session.record), _discard(done)]
    if config.validate:
        session.validation = Validation(model, at + config.validation_timeout_s)
        effects += [_validate(session, session.validation, client) for client in session.attached]
    return effects


def _fail(session: Session, reason: str, at: float) -> list[Effect]:
    """The attempt is over without a model; the session tries again or fails with the reason."""
    config, failed = session.record.config, session.round
    assert failed is not None
    if session.record.failures >= config.round_retries:
        return _end(session, Status.FAILED, f"round {failed.record.number}: {reason}")
    ended = rounds.enter(failed, Phase.FAILED, reason=reason)
    _write(session, failures=session.record.failures + 1, reason=reason)
    begun = _begin_round(session, at, select_for_s=config.selection_timeout_s, pause_s=config.retry_wait_s)
    return [*begun, *ended, _discard(failed)]


def _end(session: Session, status: Status, reason: str) -> list[Effect]:
    """The session's record first: it decides, the round's only tells."""
    _write(session, status=status, reason=reason)
    effects: list[Effect] = [SaveSession(session.record)]
    if session.round:
        effects += [*rounds.enter(session.round, Phase.FAILED, reason=reason), _discard(session.round)]
    session.round = session.validation = None
    session.attached.clear()
    session.last_seen.clear()
    session.awaited.clear()
    return effects


def _lose(session: Session, event: UpdateLost) -> list[Effect]:
    round, task = session.round, event.task
    if round is None or task != round.task(task.client):
        return []
    saved = rounds.lose(round, event)
    if not saved:
        return []
    if round.record.phase is Phase.TRAINING:
        here = task.client in session.attached
        return [*saved, _train(session, round, task)] if here else saved
    if round.accepted >= session.record.config.min_updates:
        saved.append(rounds.aggregate(round, session.record.model))
    return saved  # too few now? _settle fails the round, and after a crash right here it does so again


def _recover(session: Session, event: Recovered, at: float) -> list[Effect]:
    config, round = session.record.config, session.round
    if session.record.status is not Status.RUNNING:
        return []
    session.awaited = {client for client in event.expected if _admits(session, client)}
    session.awaited_until = at + config.rejoin_window_s
    effects: list[Effect] = [SaveModel(session.record)] if session.record.model.round else []
    if session.validation:
        session.validation.deadline = at + max(config.validation_timeout_s, config.rejoin_window_s)
        session.validation.open = session.awaited - session.validation.reported
    if round is None:
        return effects
    for lost in event.lost:
        effects += rounds.lose(round, lost)
    match round.record.phase:
        case Phase.SELECTING:
            round.select_until = at + max(config.selection_timeout_s, config.rejoin_window_s)
        case Phase.TRAINING if not rounds.complete(round, config):
            effects += rounds.postpone(round, at + config.rejoin_window_s)
        case Phase.AGGREGATING if round.accepted >= config.min_updates:
            effects.append(rounds.aggregate(round, session.record.model))
    return effects


def _postpone(session: Session, away_s: float) -> list[Effect]:
    """Deadlines run from the issue of the task, not from the wish to issue it; nobody could come back meanwhile."""
    session.awaited_until += away_s
    if session.validation:
        session.validation.deadline += away_s
    round = session.round
    if round is None:
        return []
    round.opens_at += away_s
    round.select_until += away_s
    return rounds.postpone(round, round.record.deadline + away_s) if round.record.phase is Phase.TRAINING else []


def _aggregating(session: Session, number: int, attempt: int, num_updates: int | None = None) -> bool:
    """Whether this is how the running Aggregate ended, and not how a former one did."""
    round = session.round
    return (
        round is not None
        and round.record.phase is Phase.AGGREGATING
        and (round.record.number, round.record.attempt) == (number, attempt)
        and num_updates in (None, round.accepted)
    )


def _discard(round: Round) -> Discard:
    blobs = tuple(report.update.blob for report in round.reports.values() if report)
    return Discard(round.record.number, round.record.attempt, blobs)


def _too_few(session: Session, at: float) -> str:
    config = session.record.config
    gone = sorted((seen, client) for client, seen in session.last_seen.items() if client not in session.attached)
    said = [f"{client} last seen {duration_text(at - seen)} ago" for seen, client in gone[-3:]]
    return "; ".join([f"{len(session.attached)} of {config.min_clients} clients attached", *said])


def duration_text(seconds: float) -> str:
    """As a person would say it: "41 s", "3 min", "2 h"."""
    for unit, name in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds // unit:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"
