"""Deadlines of many short waits, on one timer of the loop.

asyncio.timeout() makes a timer and takes it back for each wait: with six calls a task and several waits a call that
cost a server of 1,000 clients a quarter more CPU. Here a wait that ends in time costs an entry in a dict, and the one
timer looks at that when the nearest deadline that it knew is over.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

_LEAST_S = 0.05  # between two looks: deadlines close to each other pass together


class Deadlines:
    """Of the waits of one owner, on one loop."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None  # of the first wait
        self._open: dict[Deadline, None] = {}  # in the order of their beginning
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = 0.0  # by the loop's clock, as are all times here

    def within(self, delay_s: float | None) -> Deadline:
        """`with` it: as `async with asyncio.timeout(delay_s)`, but that it may ring up to 0.05 s late."""
        return Deadline(self, delay_s)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop

    def _await(self, deadline: Deadline, loop: asyncio.AbstractEventLoop) -> None:
        self._open[deadline] = None
        if self._timer is None or deadline.at < self._rings_at:
            self._ring_at(deadline.at, loop)

    def _ring_at(self, at: float, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_at, self._timer = at, loop.call_at(at, self._ring, loop)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for deadline in [one for one in self._open if one.at <= now]:
            deadline._expire()
        if self._open:
            self._ring_at(max(min(one.at for one in self._open), now + _LEAST_S), loop)


class Deadline:
    """One wait's. `expired` says, also afterwards, whether it was cut off."""

    __slots__ = ("_cancelling", "_delay_s", "_loop", "_owner", "_task", "at", "expired")

    def __init__(self, owner: Deadlines, delay_s: float | None) -> None:
        self._owner, self._delay_s = owner, delay_s
        self.expired = False

    def __enter__(self) -> Deadline:
        self._loop = self._owner._running_loop()
        task = asyncio.current_task(self._loop)  # unless it is told the loop, it asks for that, with a system call
        if task is None:
            raise AssertionError("a deadline is a task's")
        self._task, self._cancelling = task, task.cancelling()
        if self._delay_s is not None:
            self.at = self._loop.time() + self._delay_s
            self._owner._await(self, self._loop)
        return self

    def move(self, at: float | None) -> None:
        """To another time of the loop's clock; None: there is none for now."""
        if self.expired:
            return
        if at is None:
            self._owner._open.pop(self, None)
        else:
            self.at = at
            self._owner._await(self, self._loop)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        self._owner._open.pop(self, None)
        if self.expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from value

    def _expire(self) -> None:
        self._owner._open.pop(self, None)
        self.expired = True
        self._task.cancel()
