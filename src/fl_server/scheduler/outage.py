"""A store that is away: what may be repeated is repeated, and time stands still for the sessions meanwhile.

One place knows since when and why. An outage begins with the first call that fails and ends when none has failed for
a while and every store answers a probe; the log has one line for each.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import ParamSpec, TypeVar

from fl_server.errors import Unavailable

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
Probe = Callable[[], Awaitable[object]]


class Outages:
    def __init__(self, clock: Callable[[], float], retry_s: float, turned: Callable[[], None] = lambda: None) -> None:
        """turned: called when an outage has begun, and when it has ended."""
        self._clock, self._retry_s, self._turned = clock, retry_s, turned
        self._since: float | None = None
        self._why = ""
        self._last_failure = 0.0
        self._began = asyncio.Event()
        self._past_s = 0.0
        self._ended = 0  # how many outages have ended
        self._calm_since = -math.inf

    def now(self) -> float:
        """Seconds since the epoch; during an outage, those at which it began: deadlines do not pass then."""
        return self._clock() if self._since is None else self._since

    @property
    def away(self) -> bool:
        return self._since is not None

    @property
    def past_s(self) -> float:
        """How long all outages that have ended were, together."""
        return self._past_s

    @property
    def calm_s(self) -> float:
        """For how long no store has been away, as far as this process knows."""
        return 0.0 if self.away else self._clock() - self._calm_since

    def reason(self) -> str | None:
        if self._since is None:
            return None
        return f"a store has been away for {self._clock() - self._since:.0f} s: {self._why}"

    async def insist(self, work: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """The outcome of something that may be done again, however long its store is away."""
        while True:
            outages = self._ended
            try:
                return await work(*args, **kwargs)
            except Unavailable as failed:
                # a call that began before an outage ended may fail of it after that: it is no new one
                if self.away or outages == self._ended:
                    self._note(failed)
            await asyncio.sleep(self._retry_s)

    async def watch(self, probes: Sequence[Probe], returned: Callable[[], None]) -> None:
        """Ends each outage; `returned` is called then."""
        while True:
            await self._began.wait()
            logger.warning("store away", extra={"why": self._why})
            while not await self._is_over(probes):
                await asyncio.sleep(self._retry_s)
            assert self._since is not None
            away_s = max(0.0, self._clock() - self._since)  # it may have been set back
            self._past_s += away_s
            self._ended += 1
            self._since, self._calm_since = None, self._clock()
            self._began.clear()
            logger.warning("store back", extra={"away_s": round(away_s, 1)})
            self._turned()
            returned()

    async def _is_over(self, probes: Sequence[Probe]) -> bool:
        # whoever failed then may be about to try again; the clock may have been set back since
        if 0 <= self._clock() - self._last_failure < 2 * self._retry_s:
            return False
        try:
            for probe in probes:
                await probe()
        except Unavailable as failed:
            self._note(failed)
            return False
        return True

    def _note(self, failed: Unavailable) -> None:
        self._last_failure, self._why = self._clock(), str(failed)
        if self._since is None:
            self._since = self._last_failure
            self._began.set()
            self._turned()
