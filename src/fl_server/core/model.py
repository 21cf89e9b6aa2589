"""Nouns of a session: what is asked of clients, what they report, and the records that survive a kill.

Everything here is frozen. A record is exactly what lies on disk: the machines in round.py and session.py
hold one and replace it whole, so that "what is saved" and "what we decide from" cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import UnionType
from typing import Any, NamedTuple, NewType

from fl_server.core import server_opt

ClientId = NewType("ClientId", str)
UpdateId = NewType("UpdateId", str)
SessionId = NewType("SessionId", str)
ModelId = NewType("ModelId", str)
CallId = NewType("CallId", int)  # whom to answer; the shell's number, meaningless to the core


class InvalidConfig(ValueError):
    """The message begins with the field's name."""


_NUMBERS = 2**32  # rounds and attempts are below: they travel as uint32
LONGEST_DURATION_S = 1e9  # 30 years: a time of our days plus it is still exact to the microsecond


def check_duration(field: str, seconds: float, *, zero: bool = False) -> None:
    """Raises InvalidConfig unless it is a finite number above 0 (or 0, where that is allowed)."""
    if not _is_number(seconds, int | float) or not 0 <= seconds <= LONGEST_DURATION_S or (seconds == 0 and not zero):
        least = "0 or above" if zero else "above 0"
        raise InvalidConfig(f"{field}: {seconds!r}, a number of seconds {least} and at most 1e9 needed")


def _check_count(field: str, count: int, *, least: int) -> None:
    if not _is_number(count, int) or count < least:
        raise InvalidConfig(f"{field}: {count!r}, a whole number of at least {least} needed")


def _is_number(value: object, kind: type | UnionType) -> bool:
    """What comes from JSON may be true, or text, whatever the annotation says."""
    return isinstance(value, kind) and not isinstance(value, bool)


class TaskKind(StrEnum):
    TRAIN = "train"
    VALIDATE = "validate"
    PREDICT = "predict"  # of no round: its session is the prediction's id


class Task(NamedTuple):
    """What one client is asked to do. Its id travels to the client and comes back with the update."""

    session: SessionId
    round: int
    attempt: int
    kind: TaskKind
    client: ClientId

    @property
    def id(self) -> str:
        return f"{self.session}/{self.round}/{self.attempt}/{self.kind}/{self.client}"

    @classmethod
    def parse(cls, task_id: str) -> Task | None:
        """The task with this id; None if no task can have it."""
        try:
            session, number, attempt, kind, client = task_id.split("/", 4)
            task = cls(SessionId(session), int(number), int(attempt), TaskKind(kind), ClientId(client))
        except ValueError:
            return None
        return task if 0 < task.round < _NUMBERS and 0 < task.attempt < _NUMBERS else None


class Verdict(StrEnum):
    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"  # another update already closed this task
    NOT_SELECTED = "not_selected"  # names no task that was issued to this client
    LATE = "late"  # its round closed without it
    REJECTED = "rejected"  # its content is at fault, or was lost


class Outcome(StrEnum):
    """The answer to a request that is not an update."""

    DONE = "done"
    CONFLICT = "conflict"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class ModelUpdate:
    update_id: UpdateId
    blob: str  # the spool's name for its bytes
    num_examples: float


@dataclass(frozen=True, slots=True)
class Report:
    """What closes a task. `lost`: its bytes went after we accepted it, and the task is open again."""

    task: Task
    update: ModelUpdate
    verdict: Verdict  # ACCEPTED or REJECTED
    reason: str = ""
    seq: int = 0
    lost: bool = False

    @property
    def counts(self) -> bool:
        return self.verdict is Verdict.ACCEPTED


@dataclass(frozen=True, slots=True)
class GlobalModel:
    id: ModelId
    round: int = 0  # rounds of this session behind it; 0 is the seed
    attempt: int = 0
    parent: ModelId | None = None
    sha256: str = ""
    num_updates: int = 0
    optimizer_state: str = ""  # the blob with the server optimizer's moments after this model; "": none


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """FEDn's clients_required is `min_clients`; its requested_clients caps the cohort (0: everybody)."""

    rounds: int
    min_clients: int = 1
    requested_clients: int = 0
    buffer_size: int = -1
    client_ids: frozenset[ClientId] | None = None
    validate: bool = True
    aggregator: str = "fedavg"
    aggregator_kwargs: Mapping[str, Any] = field(default_factory=dict)
    helper: str = "numpyhelper"
    delete_models_storage: bool = True
    client_settings: Mapping[str, Any] = field(default_factory=dict)  # JSON that goes to the clients with each task
    model_name_prefix: str = ""
    round_timeout_s: float = 180.0
    validation_timeout_s: float = 180.0
    selection_timeout_s: float = 300.0
    rejoin_window_s: float = 60.0
    round_retries: int = 2
    retry_wait_s: float = 5.0

    def __post_init__(self) -> None:
        _check_count("rounds", self.rounds, least=1)
        _check_count("clients_required", self.min_clients, least=1)
        _check_count("requested_clients", self.requested_clients, least=0)
        _check_count("round_retries", self.round_retries, least=0)
        check_duration("round_timeout", self.round_timeout_s)
        check_duration("validation_timeout_s", self.validation_timeout_s)
        check_duration("selection_timeout_s", self.selection_timeout_s)
        check_duration("rejoin_window_s", self.rejoin_window_s, zero=True)
        check_duration("retry_wait_s", self.retry_wait_s, zero=True)
        if 0 < self.requested_clients < self.min_clients:
            what = f"{self.requested_clients}, below clients_required {self.min_clients}"
            raise InvalidConfig(f"requested_clients: {what}")
        if not _is_number(self.buffer_size, int) or self.buffer_size < -1 or self.buffer_size == 0:
            raise InvalidConfig(f"buffer_size: {self.buffer_size!r}, -1 or at least 1 needed")
        try:
            server_opt.parse(self.aggregator, self.aggregator_kwargs)
        except ValueError as wrong:
            raise InvalidConfig(str(wrong)) from None
        if self.client_ids is not None and len(self.client_ids) < self.min_clients:
            raise InvalidConfig(f"client_ids: {len(self.client_ids)}, below clients_required {self.min_clients}")

    def admits(self, client: ClientId) -> bool:
        return self.client_ids is None or client in self.client_ids

    @property
    def min_updates(self) -> int:
        """A buffer smaller than clients_required is FEDn's "asynchronous" session: it wins."""
        return self.min_clients if self.buffer_size < 1 else min(self.min_clients, self.buffer_size)


class Phase(StrEnum):
    SELECTING = "selecting"  # waiting until enough clients are attached
    TRAINING = "training"  # tasks are out, updates come in
    AGGREGATING = "aggregating"  # the set of updates is frozen, the new model is made
    COMPLETED = "completed"
    FAILED = "failed"


class Status(StrEnum):
    """On the wire: Created, Started, Finished, Failed, Terminated."""

    CREATED = "created"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    TERMINATED = "terminated"


@dataclass(frozen=True, slots=True)
class RoundRecord:
    session: SessionId
    number: int
    attempt: int
    phase: Phase = Phase.SELECTING
    cohort: tuple[ClientId, ...] = ()  # sorted: the order of folding
    deadline: float = 0.0
    reason: str = ""
    version: int = 0  # a write with a lower one than the stored is a late one, and dropped


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """The document that decides. A commit is one conditional write of it that names the new model."""

    id: SessionId
    config: SessionConfig
    seed: int
    model: GlobalModel  # current; model.round rounds are committed
    status: Status = Status.CREATED
    reason: str = ""  # why it ended; while it runs: why the last try of the current round failed
    attempt: int = 0  # tries begun of round model.round + 1; goes on when the session is continued
    failures: int = 0  # tries of that round that failed since the session was started
    last_round: int = 0
    version: int = 0


def verdict_of(reports: Iterable[Report], update_id: UpdateId) -> tuple[Verdict, str] | None:
    """What a task that has these reports says to an update, whenever it is asked; None while the task is open."""
    duplicate = None
    for report in reports:
        if report.update.update_id == update_id:
            return report.verdict, report.reason
        if not report.lost:
            duplicate = Verdict.DUPLICATE, f"the task was closed by update {report.update.update_id}"
    return duplicate
