"""Who is attached, and a bounded mailbox for each: the newest stream of a client owns its mailbox."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum, auto

from fl_server.core.model import ClientId, ModelId, SessionConfig, Task

MAILBOX_SIZE = 256  # full: the stream is ended; attaching again issues again what is open


@dataclass(frozen=True, slots=True)
class Assignment:
    """A task on its way to its client, with what the wire tells about its round, if it is of one."""

    task: Task
    model: ModelId
    helper: str  # the model's format, and the update's
    deadline: float  # seconds since the epoch
    round_id: str = ""
    config: SessionConfig | None = None


class Ending(Enum):
    """Why a stream ends; the edge says it in its own codes."""

    REPLACED = auto()  # the client attached again: this stream is not its newest
    FULL = auto()  # it does not read
    STOPPING = auto()  # the server goes away


@dataclass(slots=True, eq=False)
class Mailbox:
    client: ClientId
    peer: str
    _queue: asyncio.Queue[Assignment | None] = field(default_factory=lambda: asyncio.Queue(MAILBOX_SIZE))
    ending: Ending | None = None
    detail: str = ""

    async def next(self) -> Assignment | None:
        """The next task; None once the mailbox has ended (then `ending` says why)."""
        return None if self.ending else await self._queue.get()

    def put(self, assignment: Assignment) -> None:
        if self._queue.full():
            self.end(Ending.FULL, f"{MAILBOX_SIZE} tasks were not read")
        elif not self.ending:
            self._queue.put_nowait(assignment)

    def end(self, ending: Ending, detail: str = "") -> None:
        if self.ending is None:
            self.ending, self.detail = ending, detail
            while not self._queue.empty():
                self._queue.get_nowait()
            self._queue.put_nowait(None)  # whoever waits hears it


class ClientStreams:
    def __init__(self) -> None:
        self._mailboxes: dict[ClientId, Mailbox] = {}
        self._stopping = False

    def attached(self) -> Collection[ClientId]:
        return self._mailboxes.keys()

    def open(self, client: ClientId, peer: str) -> Mailbox:
        if former := self._mailboxes.get(client):
            former.end(Ending.REPLACED, f"attached again from {peer}")
        mailbox = self._mailboxes[client] = Mailbox(client, peer)
        if self._stopping:
            mailbox.end(Ending.STOPPING)
        return mailbox

    def close(self, mailbox: Mailbox) -> bool:
        """Whether its client is gone with it; False if a newer stream of the client has taken over."""
        if self._mailboxes.get(mailbox.client) is not mailbox:
            return False
        del self._mailboxes[mailbox.client]
        return True

    def deliver(self, assignment: Assignment) -> None:
        """To nobody if its client just left: it gets the task when it attaches again."""
        if mailbox := self._mailboxes.get(assignment.task.client):
            mailbox.put(assignment)

    def stop(self) -> None:
        """Ends every stream, and every one that still comes."""
        self._stopping = True
        for mailbox in self._mailboxes.values():
            mailbox.end(Ending.STOPPING)
