"""What happens, told to whoever watches: the newest events by number, and each new one as it comes.

A watcher that falls behind is not waited for: it misses the oldest, and hears how many.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

KEPT = 4096  # for those who come again with the number of the last event that they saw


@dataclass(frozen=True, slots=True)
class FeedEvent:
    id: int
    kind: str  # session, round, update, model, validation, prediction, client
    at: float  # seconds since the epoch
    data: Mapping[str, Any]


@dataclass(slots=True)
class Watcher:
    """An endless async iterator; `missed` counts what it was too slow for. Ends when the feed closes."""

    pending: deque[FeedEvent]
    missed: int = 0
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False

    def __aiter__(self) -> Watcher:
        return self

    async def __anext__(self) -> FeedEvent:
        while not self.pending:
            if self.closed:
                raise StopAsyncIteration
            self.wake.clear()
            await self.wake.wait()
        return self.pending.popleft()


class Feed:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # numbers go on after a restart, so that "after" of a former life does not hide what is new; fewer than a
        # million events a second, so that they do not overtake the clock
        self._ids = itertools.count(int(clock() * 1_000_000))
        self._recent: deque[FeedEvent] = deque(maxlen=KEPT)
        self._watchers: list[Watcher] = []
        self._closed = False

    def tell(self, kind: str, **data: Any) -> None:
        event = FeedEvent(next(self._ids), kind, self._clock(), data)
        self._recent.append(event)
        for watcher in self._watchers:
            if len(watcher.pending) == watcher.pending.maxlen:
                watcher.missed += 1
            watcher.pending.append(event)
            watcher.wake.set()

    @asynccontextmanager
    async def watch(self, after: int | None = None, *, follow: bool = True) -> AsyncIterator[Watcher]:
        """Events from now on; with `after`, first those kept whose number is higher; then, without `follow`, the end.

        All that are kept, if it is higher than any number that was given: it is of a life whose clock was ahead.
        """
        newest = self._recent[-1].id if self._recent else 0
        kept = [event for event in self._recent if after is not None and not event.id <= after <= newest]
        watcher = Watcher(deque(kept, maxlen=KEPT), closed=self._closed or not follow)
        self._watchers.append(watcher)
        try:
            yield watcher
        finally:
            self._watchers.remove(watcher)

    def close(self) -> None:
        """Ends every watcher once it has heard what is pending."""
        self._closed = True
        for watcher in self._watchers:
            watcher.closed = True
            watcher.wake.set()
