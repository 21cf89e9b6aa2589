"""What lies between a client's life cycle and the work it does: a task, its result, and whoever carries it out.

A Runtime knows nothing of the network: it gets a model's bytes and gives bytes or JSON back. TaskFailed is the one way
to fail; its reason goes to the server, and closes the task there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

TaskKind = Literal["train", "validate", "predict"]

_LONGEST_REASON = 500  # characters


@dataclass(slots=True)
class Due:
    """When a task must have ended, on the event loop's clock. The server may move it while the task runs."""

    at_s: float = math.inf


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """What is asked, beside the model's parameters."""

    task_id: str
    kind: TaskKind
    session_id: str
    round: int  # within the session, from 1; 0: not said
    attempt: int  # of the round, from 1; 0: not said
    model_id: str
    client_id: str
    settings: Mapping[str, Any]  # the session's client_settings
    deadline: float  # seconds since the epoch, by the server's clock; 0: none
    due: Due = field(default_factory=Due, compare=False, repr=False)
    helper: str = "numpyhelper"  # the format of the model, and of the update


@dataclass(frozen=True, slots=True)
class Trained:
    """A model's bytes as they go to the server, and the training metadata: JSON, with a num_examples."""

    data: bytes
    sha256: str
    metadata: Mapping[str, Any]

    @classmethod
    def of(cls, data: bytes, metadata: Mapping[str, Any]) -> Trained:
        return cls(data, hashlib.sha256(data).hexdigest(), metadata)


class TaskFailed(Exception):
    """The reason is one line; last_lines are what the work said at its end, for the server's statuses."""

    def __init__(self, reason: str, last_lines: Sequence[str] = ()) -> None:
        super().__init__(" ".join(reason.split())[:_LONGEST_REASON])
        self.last_lines = tuple(last_lines)


class Runtime(Protocol):
    """One task at a time. A call that is cancelled leaves nothing running, unless it says otherwise."""

    @property
    def package(self) -> Literal["local", "remote"]:
        """Whether the server's compute package is needed: then the client is told to wait while there is none."""

    async def prepare(self) -> None:
        """Called before the client attaches, and each time that it has asked the REST API again.

        Raises Unreachable where it is worth to try again, ClientError where it is not.
        """

    def refusal(self, kind: TaskKind) -> str | None:
        """Why such a task cannot be done at all; asked before a model is fetched for it."""

    async def train(self, model: bytearray, task: TaskInfo) -> Trained:
        """Raises TaskFailed, as the other two do."""

    async def validate(self, model: bytearray, task: TaskInfo) -> str:
        """A JSON object of metrics."""

    async def predict(self, model: bytearray, task: TaskInfo) -> str:
        """JSON."""

    def close(self) -> None: ...


def checked_num_examples(value: object) -> int | float:
    """The weight of an update. Raises TypeError or ValueError for what the server would reject."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"num_examples {value!r}, expected a number")
    if not 0 < value <= 2**53:
        raise ValueError(f"num_examples {value}, expected a finite number above 0")
    return value
