"""Callers that wait for an answer, by the number that travels through the core."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

from fl_server.core.model import CallId, Outcome, Verdict
from fl_server.errors import FlserveError, Unavailable

Reply = tuple[Verdict | Outcome, str]


class Calls:
    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._waiting: dict[CallId, asyncio.Future[Reply]] = {}

    async def wait(self, submit: Callable[[CallId], Awaitable[None]]) -> Reply:
        """The caller knows how long: it puts a timeout around this."""
        call = CallId(next(self._numbers))
        self._waiting[call] = asyncio.get_running_loop().create_future()
        try:
            await submit(call)
            return await self._waiting[call]
        finally:
            del self._waiting[call]

    def answer(self, call: CallId, reply: Reply) -> None:
        future = self._waiting.get(call)
        if future and not future.done():  # a caller that left is not waited for
            future.set_result(reply)

    def refuse(self, call: CallId, why: FlserveError) -> None:
        future = self._waiting.get(call)
        if future and not future.done():
            future.set_exception(why)

    def refuse_all(self, why: Unavailable) -> None:
        for call in list(self._waiting):
            self.refuse(call, why)
