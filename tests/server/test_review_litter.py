"""What is swept, and what only looks like litter; what a server that runs for months must let go: on virtual time."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fl_server.core.events import Discard
from fl_server.core.model import ClientId, SessionId
from fl_server.core.session import GONE_KEPT
from tests.core.story import attach, detach, started
from tests.server.virtual_world import World, on_virtual_time


@on_virtual_time
async def test_updates_that_are_to_be_kept_are_not_swept_before_they_are(world: World) -> None:
    a, b = await world.clients("a", "b")
    session = await world.started(min_clients=2, delete_models_storage=False)
    spool, updates = world.scheduler.workshop.spool, world.scheduler.updates
    spool._clock = lambda: world.now  # the spool's own is the real one
    put_file = updates.put_file

    async def slow(key: str, path: Path) -> None:
        await asyncio.sleep(8000)
        await put_file(key, path)

    updates.put_file = slow  # type: ignore[method-assign]
    for client in (a, b):
        assert await client.train(await client.task(), 1.0) == "ACCEPTED"
    await world.ended(session)
    await asyncio.sleep(17_000)
    assert len(await updates.keys()) == 2
    assert spool.used_bytes == 0


@on_virtual_time
async def test_an_upload_that_a_later_attempt_counts_on_does_not_leave_with_the_former(world: World) -> None:
    a, b = await world.clients("a", "b")
    session = await world.started(min_clients=2, round_retries=0)
    assert await a.train(await a.task(), 1.0) == "ACCEPTED"
    spool, running = world.scheduler.workshop.spool, world.scheduler._sessions[SessionId(session)]
    running.clear(Discard(1, 0, tuple(running.blobs())))
    await asyncio.sleep(5)
    assert not await spool.missing(running.blobs())
    assert await b.train(await b.task(), 3.0) == "ACCEPTED"
    assert await world.result(session) == 2.0
    await asyncio.sleep(5)
    assert spool.used_bytes == 0


@on_virtual_time
async def test_a_session_that_has_ended_does_not_count_who_comes_and_goes(world: World) -> None:
    [client] = await world.clients("a")
    session = await world.started()
    assert await client.train(await client.task(), 1.0) == "ACCEPTED"
    await world.ended(session)
    for number in range(20):
        [guest] = await world.clients(f"guest {number}")
        await guest.leave()
    ended = world.scheduler._sessions[SessionId(session)]._session
    assert not ended.attached and not ended.last_seen


def test_a_session_remembers_a_bounded_number_of_those_that_left() -> None:
    session, _ = started(clients=3)
    for number in range(GONE_KEPT + 10):
        attach(session, f"guest {number}", at=1.0)
        detach(session, f"guest {number}", at=1.0)
    assert len(session.last_seen) == GONE_KEPT
    assert ClientId(f"guest {GONE_KEPT + 9}") in session.last_seen
