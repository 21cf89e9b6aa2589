"""How many bytes of uploads may be under way at a time, on both ports together.

What has come of an upload is counted until it has ended, whichever way; the next bytes wait for room.
"""

from __future__ import annotations

import asyncio

from fl_server.errors import Invalid


class InFlight:
    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self.used_bytes = max_bytes, 0
        self._waiting: set[asyncio.Future[None]] = set()

    def __str__(self) -> str:
        return f"uploads_in_flight_bytes ({self._max_bytes}) are under way"

    def begin(self) -> Share:
        """Of a new upload. Whoever begins calls end(), in `finally`."""
        return Share(self)


class Share:
    """What one upload holds."""

    def __init__(self, in_flight: InFlight) -> None:
        self.in_flight, self.size_bytes = in_flight, 0

    def take_at_once(self, size_bytes: int) -> bool:
        """Whether there was room for so many bytes more; if not, none are taken."""
        whole = self.in_flight
        if whole.used_bytes + size_bytes > whole._max_bytes:
            return False
        whole.used_bytes += size_bytes
        self.size_bytes += size_bytes
        return True

    async def take(self, size_bytes: int) -> None:
        """Returns when so many bytes more have room. Raises Invalid if they never will."""
        whole = self.in_flight
        if self.size_bytes + size_bytes > whole._max_bytes:
            raise Invalid(f"upload: more than uploads_in_flight_bytes ({whole._max_bytes})")
        while not self.take_at_once(size_bytes):
            waiter = asyncio.get_running_loop().create_future()
            whole._waiting.add(waiter)
            try:
                await waiter
            finally:
                whole._waiting.discard(waiter)

    def end(self) -> None:
        whole = self.in_flight
        whole.used_bytes -= self.size_bytes
        self.size_bytes = 0
        for waiter in whole._waiting:
            if not waiter.done():
                waiter.set_result(None)
