"""How many bytes of uploads may be under way at a time, on both ports together.

What has come of an upload is counted until it has ended, whichever way; the next bytes wait for room.
"""

from __future__ import annotations

import asyncio

from fl_server.errors import Invalid, TooMany


class InFlight:
    def __init__(self, max_bytes: int, patience_s: float) -> None:
        """patience_s: an upload waits so long for room."""
        self._max_bytes, self._patience_s, self.used_bytes = max_bytes, patience_s, 0
        self._waiting: set[asyncio.Future[None]] = set()

    def begin(self) -> Share:
        """Of a new upload. Whoever begins calls end(), in `finally`."""
        return Share(self)


class Share:
    """What one upload holds."""

    def __init__(self, in_flight: InFlight) -> None:
        self._in_flight, self._size_bytes = in_flight, 0

    async def take(self, size_bytes: int) -> None:
        """Returns when so many bytes more have room. Raises TooMany if they have none in time, Invalid if never."""
        whole = self._in_flight
        if self._size_bytes + size_bytes > whole._max_bytes:
            raise Invalid(f"upload: more than uploads_in_flight_bytes ({whole._max_bytes})")
        if whole.used_bytes + size_bytes > whole._max_bytes:
            await self._wait(size_bytes)
        whole.used_bytes += size_bytes
        self._size_bytes += size_bytes

    async def _wait(self, size_bytes: int) -> None:
        whole = self._in_flight
        try:
            async with asyncio.timeout(whole._patience_s):
                while whole.used_bytes + size_bytes > whole._max_bytes:
                    waiter = asyncio.get_running_loop().create_future()
                    whole._waiting.add(waiter)
                    try:
                        await waiter
                    finally:
                        whole._waiting.discard(waiter)
        except TimeoutError:
            why = f"uploads_in_flight_bytes ({whole._max_bytes}) are under way; come again"
            raise TooMany(why) from None

    def end(self) -> None:
        whole = self._in_flight
        whole.used_bytes -= self._size_bytes
        self._size_bytes = 0
        for waiter in whole._waiting:
            if not waiter.done():
                waiter.set_result(None)
