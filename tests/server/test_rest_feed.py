"""Server-sent events, read as an ASGI server would send them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fl_server.rest import feed as rest_feed
from fl_server.rest.feed import EventStream
from fl_server.scheduler.feed import Feed
from tests.server.rest_world import serving

PATIENCE_S = 10.0


@dataclass
class Reader:
    sent: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.sent.put(dict(message))

    async def text(self) -> str:
        async with asyncio.timeout(PATIENCE_S):
            return str((await self.sent.get())["body"].decode())


@asynccontextmanager
async def reading(feed: Feed, after: int | None = None, *, follow: bool = True) -> AsyncIterator[Reader]:
    """Leaves when the stream has ended."""
    reader = Reader()
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        stream = EventStream(feed, after, follow)
        tasks.create_task(stream({"type": "http"}, reader.receive, reader.send))
        start = await reader.sent.get()
        assert (b"content-type", b"text/event-stream; charset=utf-8") in start["headers"]
        assert not any(name == b"content-length" for name, _ in start["headers"])
        assert await reader.text() == ": hello\n\n"
        yield reader


def _feed() -> Feed:
    return Feed(lambda: 1.5)


async def test_an_event_is_told_with_its_number_kind_and_data() -> None:
    feed = _feed()
    async with reading(feed) as reader:
        feed.tell("round", session_id="s", text="two\nlines")
        number, kind, data = (await reader.text()).removesuffix("\n\n").split("\n")
        assert (number, kind) == ("id: 1500000", "event: round")
        assert json.loads(data.removeprefix("data: ")) == {"session_id": "s", "text": "two\nlines", "at": 1.5}
        reader.left.set()


async def test_who_comes_again_with_the_last_number_misses_nothing() -> None:
    feed = _feed()
    for number in range(3):
        feed.tell("round", number=number)
    async with reading(feed, after=1_500_000) as reader:
        assert (await reader.text()).startswith("id: 1500001\n")
        assert (await reader.text()).startswith("id: 1500002\n")
        reader.left.set()


@pytest.mark.parametrize("after", [1_500_004, 10**15], ids=["of a former life", "of a life whose clock was ahead"])
async def test_who_comes_with_a_number_of_a_former_life_hears_all_of_this_one(after: int) -> None:
    before = _feed()
    for number in range(5):
        before.tell("round", number=number)
    feed = Feed(lambda: 2.0)
    feed.tell("round", number=5)
    feed.tell("round", number=6)
    async with reading(feed, after=after) as reader:
        assert (await reader.text()).startswith("id: 2000000\n")
        assert (await reader.text()).startswith("id: 2000001\n")
        feed.tell("round", number=7)
        assert (await reader.text()).startswith("id: 2000002\n")
        reader.left.set()


async def test_the_numbers_go_on_over_a_restart_of_the_server(tmp_path: Path) -> None:
    ids: list[int] = []
    for _ in range(2):
        async with serving(tmp_path) as api, api.scheduler.feed.watch(after=0) as events:
            await api.seed()
            ids.append((await anext(events)).id)
    assert ids[0] < ids[1]


async def test_the_stream_ends_when_the_server_stops() -> None:
    feed = _feed()
    async with reading(feed) as reader:
        feed.tell("session", status="Finished")
        feed.close()
        assert (await reader.text()).startswith("id: 1500000\n")
    assert (await reader.sent.get()) == {"type": "http.response.body", "body": b""}


async def test_a_stream_that_is_not_to_follow_ends_after_what_is_kept() -> None:
    feed = Feed(lambda: 1.0)
    feed.tell("model", model_id="a")
    async with reading(feed, 0, follow=False) as reader:
        assert "event: model" in await reader.text()
        assert await reader.text() == "", "the end"
    async with reading(feed, follow=False) as reader:
        assert await reader.text() == "", "the end"


async def test_a_silent_stream_is_kept_open_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest_feed, "PING_S", 0.001)
    async with reading(_feed()) as reader:
        assert await reader.text() == ": ping\n\n"
        assert await reader.text() == ": ping\n\n"
        reader.left.set()
