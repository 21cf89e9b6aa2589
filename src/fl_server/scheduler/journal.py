"""Group commit of what clients tell besides updates: many records, one write.

record() returns once its document is durable; note() returns when it is queued, and a kill may lose up to 0.2 s of
it. The order within a collection is the order of the calls. A document's id is made from its sender and its bytes, so
that a message sent twice by a retry is stored once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from fl_server.errors import StoreError
from fl_server.scheduler.aggregation import Insist
from fl_server.store.ports import Collection, Document, Patch, StateStore

logger = logging.getLogger(__name__)
QUEUE_SIZE = 4096  # full: record() and note() wait, and so does the client
GROUP_SIZE = 1024
MADE_AT_ONCE = 16  # documents; one of a message of 2 MB takes 4 ms
WOKEN_AT_ONCE = 64  # callers; then all else has its turn
NOTE_DELAY_S = 0.2
_NAMESPACE = uuid.UUID("6a1f4a0e-6f0b-5e0c-9a55-0f1d3a6c7b21")


def record_id(client: str, message: bytes) -> str:
    """A UUID of version 5 (RFC 9562, 5.5). Written out: uuid.uuid5() takes five times as long, for each status."""
    named = _NAMESPACE.bytes + client.encode("utf-8", "surrogatepass") + b"\0" + message
    hex = hashlib.sha1(named, usedforsecurity=False).hexdigest()
    return f"{hex[:8]}-{hex[8:12]}-5{hex[13:16]}-{int(hex[16], 16) & 3 | 8:x}{hex[17:20]}-{hex[20:32]}"


@dataclass(slots=True)
class Entry:
    collection: Collection
    document: Document | Callable[[], Document]  # or how it is made
    patch: Patch | None = None  # after the document, if that was there already
    durable: asyncio.Future[None] | None = field(default=None, compare=False)

    def made(self) -> Document:
        """Once: a write is repeated for as long as its store is away."""
        if callable(self.document):
            self.document = self.document()
        return self.document


class Journal:
    def __init__(self, store: StateStore, insist: Insist) -> None:
        """insist: runs a write again for as long as its store is away."""
        self._store, self._insist = store, insist
        self._queue: asyncio.Queue[Entry | None] = asyncio.Queue(QUEUE_SIZE)
        self._urgent = asyncio.Event()  # in the queue is something that is waited for, or a whole group
        self.dropped = 0  # statuses and telemetry that found the queue full

    async def record(self, collection: Collection, document: Document, patch: Patch | None = None) -> None:
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self._queue.put(Entry(collection, document, patch, durable))
        self._urgent.set()
        await durable

    async def note(self, collection: Collection, document: Document, patch: Patch | None = None) -> None:
        await self._queue.put(Entry(collection, document, patch))

    def offer(
        self, collection: Collection, document: Document | Callable[[], Document], patch: Patch | None = None
    ) -> None:
        """As note(), for what may be lost: when the queue is full (the store has been away for long) it is dropped.

        document: or how it is made, then with all others of its write: many together cost a third of one at a time.
        """
        if self._queue.full():
            self.dropped += 1
        else:
            self._queue.put_nowait(Entry(collection, document, patch))
            if self._queue.qsize() >= GROUP_SIZE:
                self._urgent.set()

    async def finish(self) -> None:
        """Lets run() end when all that was queued before is written."""
        await self._queue.put(None)
        self._urgent.set()

    async def run(self) -> None:
        ended = False
        while not ended:
            group, ended = await self._next_group()
            if group:
                await self._settle(group)

    async def _settle(self, group: list[Entry]) -> None:
        try:
            await self._insist(self._write, group)
        except StoreError:  # not ours any more, or unreadable: nothing can be promised
            raise
        except Exception as refused:  # one of them cannot be stored: it shall not take the others with it
            if len(group) > 1:
                for entry in group:
                    await self._settle([entry])
                return
            [entry] = group
            if entry.durable is None:
                logger.exception("record dropped", extra={"collection": str(entry.collection)})
            elif not entry.durable.done():
                entry.durable.set_exception(refused)
        else:
            for index, entry in enumerate(group):
                if index and not index % WOKEN_AT_ONCE:
                    await asyncio.sleep(0)
                if entry.durable and not entry.durable.done():  # a caller that left is not waited for
                    entry.durable.set_result(None)

    async def _next_group(self) -> tuple[list[Entry], bool]:
        """At least one; those that nobody waits for give others 0.2 s to come with them, and wake nobody meanwhile."""
        entry = await self._queue.get()
        if entry is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(NOTE_DELAY_S):
                    await self._urgent.wait()
        group: list[Entry] = []
        while entry is not None:
            group.append(entry)
            if len(group) == GROUP_SIZE or self._queue.empty():
                break
            entry = self._queue.get_nowait()
        if self._queue.empty():
            self._urgent.clear()
        return group, entry is None

    async def _write(self, group: list[Entry]) -> None:
        by_collection: dict[Collection, list[Document]] = {}
        for index, entry in enumerate(group):
            if index and not index % MADE_AT_ONCE:
                await asyncio.sleep(0)
            by_collection.setdefault(entry.collection, []).append(entry.made())
        for collection, documents in by_collection.items():
            await self._store.append(collection, documents)
        if patches := [entry.patch for entry in group if entry.patch]:
            await self._store.save(patches)
