"""Virtual time, and RPCs without sockets.

Time moves only when nobody has anything to do; if nobody ever will, that is an error and not a hang. What goes to an
executor is done at once, in the loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
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
def virtual_loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        yield loop
    finally:
        asyncio.set_event_loop(None)
        loop.close()
