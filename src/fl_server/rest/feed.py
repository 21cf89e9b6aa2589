"""What happens on the server as server-sent events (WHATWG HTML, 9.2).

Ends when the reader leaves or the server stops, or, without `follow`, when all that is kept was told; a reader that
comes again with Last-Event-ID misses nothing that the feed still holds.
"""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from starlette.types import Receive, Scope, Send

from ..scheduler.feed import Feed, FeedEvent, Watcher
from .bodies import BoundedRoute, gone

PING_S = 15.0  # a comment, so that proxies keep a silent connection
MAX_EVENT_ID = 2**62


def routes(feed: Feed) -> APIRouter:
    router = APIRouter(prefix="/api/v1/events", tags=["events"], route_class=BoundedRoute)

    @router.get(
        "/",
        operation_id="watch_events",
        response_class=Response,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    )
    async def watch(
        last_event_id: Annotated[int | None, Header(le=MAX_EVENT_ID)] = None,
        after: Annotated[int | None, Query(le=MAX_EVENT_ID, description="as Last-Event-ID")] = None,
        follow: Annotated[bool, Query(description="false: what is kept, then the end")] = True,
    ) -> Response:
        """Of each event: its number as `id`, its kind as `event`, and as `data` a JSON object with `at`, in seconds."""
        return EventStream(feed, after if last_event_id is None else last_event_id, follow)

    return router


class EventStream(Response):
    def __init__(self, feed: Feed, after: int | None, follow: bool) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._feed, self._after, self._follow = feed, after, follow

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._feed.watch(self._after, follow=self._follow) as events, asyncio.TaskGroup() as tasks:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send(_part(": hello\n\n"))  # the reader learns that it is connected before anything happens
            left = tasks.create_task(gone(receive), name="reader gone")
            following = tasks.create_task(_next(events), name="next event")
            while not left.done():
                done, _ = await asyncio.wait({left, following}, timeout=PING_S, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    await send(_part(": ping\n\n"))
                if following.done():
                    if (event := following.result()) is None:
                        break
                    await send(_part(_text(event)))
                    following = tasks.create_task(_next(events), name="next event")
            left.cancel()
            following.cancel()
            await send({"type": "http.response.body", "body": b""})


def _text(event: FeedEvent) -> str:
    data = json.dumps({**event.data, "at": event.at})
    return f"id: {event.id}\nevent: {event.kind}\ndata: {data}\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": True}


async def _next(events: Watcher) -> FeedEvent | None:
    return await anext(events, None)
