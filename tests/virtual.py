"""Virtual time, and RPCs without sockets.

Time moves only when nobody has anything to do; if nobody ever will, that is an error and not a hang. What goes to an
executor is done at once, in the loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc

from fl_server.errors import Unavailable

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = 1_000_000.0
        super().__init__(selectors.DefaultSelector())
        real = self._selector.select

        def select(timeout: float | None = None) -> Any:
            events = real(0)
            if not events and timeout is None:
                raise RuntimeError("nobody will ever do anything again")
            if not events and timeout and timeout > 0:
                self.now += timeout
            return events

        self._selector.select = select

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Executor | None, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except BaseException as error:
            future.set_exception(error)
        return future


class HurriedLoop(asyncio.SelectorEventLoop):
    """For real servers: real time, of which a second counts as five."""

    SPEED = 5.0

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        super().__init__(selectors.DefaultSelector())
        real = self._selector.select

        def select(timeout: float | None = None) -> Any:
            return real(None if timeout is None else timeout / self.SPEED)

        self._selector.select = select

    def time(self) -> float:
        return 1_000_000.0 + (time.monotonic() - self._began_s) * self.SPEED


class Aborted(Exception):
    """What the RPC ended with."""


@dataclass
class Context:
    """Of one call, as grpc.aio would give it."""

    client: str
    written: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return [("client", self.client)]

    async def send_initial_metadata(self, metadata: Any) -> None:
        assert self.invocation_metadata()

    def peer(self) -> str:
        return f"virtual:{self.client}"

    async def write(self, message: Any) -> None:
        await self.written.put(message)

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise (Unavailable if code is grpc.StatusCode.UNAVAILABLE else Aborted)(f"{code}: {details}")


@contextlib.contextmanager
def hurried_loop() -> Iterator[HurriedLoop]:
    with asyncio.Runner(loop_factory=HurriedLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, HurriedLoop)
        asyncio.set_event_loop(loop)
        try:
            yield loop
        finally:
            asyncio.set_event_loop(None)


@contextlib.contextmanager
def virtual_loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        yield loop
    finally:
        asyncio.set_event_loop(None)
        loop.close()
