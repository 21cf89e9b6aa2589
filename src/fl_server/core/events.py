"""What can have happened to a session (Event), and what may have to be done (Effect).

Time is not in the events: step() takes it, so that no event can lack it. An effect that begins with Save is
durable before any effect after it is carried out; only Aggregate, of which nobody hears before it has ended, may begin.
"""

from __future__ import annotations

from dataclasses import dataclass

from fl_server.core.model import (
    CallId,
    ClientId,
    GlobalModel,
    ModelId,
    ModelUpdate,
    Outcome,
    Report,
    RoundRecord,
    SessionConfig,
    SessionRecord,
    Task,
    UpdateId,
    Verdict,
)

# ---- events: requests, each answered exactly once


@dataclass(frozen=True, slots=True)
class StartRequested:
    """Starts a new session, or continues one that has ended."""

    call: CallId
    attached: tuple[ClientId, ...]  # everybody attached now; from here on ClientAttached and ClientDetached tell
    rounds: int | None = None  # this many more; None: as the config says
    round_timeout_s: float | None = None
    wait_for_clients_s: float = 0.0
    client_ids: frozenset[ClientId] | None = None  # only these take part; None: everybody
    model_name_prefix: str = ""


@dataclass(frozen=True, slots=True)
class StopRequested:
    call: CallId


@dataclass(frozen=True, slots=True)
class Reconfigured:
    """A session that does not run gets another configuration; its model and its rounds stay."""

    call: CallId
    config: SessionConfig


@dataclass(frozen=True, slots=True)
class UpdateReceived:
    """An update whose task's client is its sender (the edge has checked that)."""

    call: CallId
    task: Task
    update: ModelUpdate
    fault: str | None = None  # why its content cannot be used


# ---- events: facts


@dataclass(frozen=True, slots=True)
class ClientAttached:
    client: ClientId


@dataclass(frozen=True, slots=True)
class ClientDetached:
    client: ClientId


@dataclass(frozen=True, slots=True)
class ValidationReported:
    """A validation of this task is durable (the journal stores and answers it)."""

    task: Task


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The alarm rang, rightly or early."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """The session was built from its records after a restart."""

    expected: tuple[ClientId, ...]  # whom the client records call online
    lost: tuple[UpdateLost, ...] = ()  # of the running round: accepted updates that the spool no longer has


@dataclass(frozen=True, slots=True)
class StoreReturned:
    """A save had to wait: what was to be issued after it was issued late, and nobody could be answered."""

    away_s: float


@dataclass(frozen=True, slots=True)
class Broken:
    """The session cannot go on: its model's bytes are gone, or we have a bug (then with the incident's id)."""

    reason: str


# ---- events: how an Aggregate ended; exactly one of the three for each


@dataclass(frozen=True, slots=True)
class Aggregated:
    """The new model's bytes are in the blob store."""

    model: GlobalModel


@dataclass(frozen=True, slots=True)
class UpdateLost:
    task: Task
    update_id: UpdateId
    why: str


@dataclass(frozen=True, slots=True)
class EffectFailed:
    """It did not happen and never will. A store that is away is not this: the shell waits for it."""

    round: int
    attempt: int
    reason: str


Event = (
    StartRequested
    | StopRequested
    | Reconfigured
    | UpdateReceived
    | ClientAttached
    | ClientDetached
    | ValidationReported
    | DeadlinePassed
    | Recovered
    | StoreReturned
    | Broken
    | Aggregated
    | UpdateLost
    | EffectFailed
)

# ---- effects


@dataclass(frozen=True, slots=True)
class SaveSession:
    """Naming a new model, this is the commit."""

    record: SessionRecord


@dataclass(frozen=True, slots=True)
class SaveRound:
    record: RoundRecord


@dataclass(frozen=True, slots=True)
class SaveReport:
    report: Report


@dataclass(frozen=True, slots=True)
class SaveModel:
    """The model's own record and its round's COMPLETED: made from the session's, so written twice is written once."""

    record: SessionRecord


@dataclass(frozen=True, slots=True)
class Answer:
    call: CallId
    reply: Verdict | Outcome
    reason: str = ""


@dataclass(frozen=True, slots=True)
class AnswerFromStore:
    """The task's round is over: its verdict is what the store says (verdict_of, else LATE)."""

    call: CallId
    task: Task
    update_id: UpdateId


@dataclass(frozen=True, slots=True)
class IssueTask:
    task: Task
    model: ModelId
    deadline: float


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Sets the session's one alarm; a former one is forgotten. None: nothing to wait for."""

    at: float | None


@dataclass(frozen=True, slots=True)
class Fold:
    """May be folded already: next in the cohort's order. Aggregate names all of them again."""

    report: Report


@dataclass(frozen=True, slots=True)
class Aggregate:
    base: GlobalModel
    round: int
    attempt: int
    reports: tuple[Report, ...]  # in the cohort's order


@dataclass(frozen=True, slots=True)
class Discard:
    """The attempt is over: its accumulator and its spooled updates are litter."""

    round: int
    attempt: int
    blobs: tuple[str, ...]


Save = SaveSession | SaveRound | SaveReport | SaveModel
Effect = Save | Answer | AnswerFromStore | IssueTask | WakeAt | Fold | Aggregate | Discard
