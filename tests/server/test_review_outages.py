"""What an outage must not do: hold a stop for ever, cost a model its bytes, or call a client gone who is here."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fl_client.wire import codec
from fl_client.wire import fl_pb2 as pb
from fl_server.core.events import ClientAttached
from fl_server.core.model import ClientId, SessionId, Status
from fl_server.errors import Unavailable
from fl_server.scheduler.journal import QUEUE_SIZE
from fl_server.store.ports import Collection
from tests.server.virtual_world import World, on_virtual_time, world
from tests.virtual import Context, virtual_loop

STOPS_WITHIN_S = 60.0


@pytest.mark.parametrize("queued", [1, 2 * QUEUE_SIZE])
def test_a_stop_does_not_wait_for_a_store_that_is_away(queued: int, tmp_path: Path) -> None:
    async def story() -> float:
        async with world(tmp_path) as made:
            made.store.away = True
            for number in range(queued):
                status = pb.Status(status=str(number))
                await made.servicer.SendStatus(status, Context("a"))  # type: ignore[arg-type]
                if number == 0:
                    await asyncio.sleep(10)  # the journal is writing it
            began_s = made.now
        return asyncio.get_running_loop().time() - began_s

    with virtual_loop() as loop:
        took_s = loop.run_until_complete(asyncio.wait_for(story(), 3600))
    assert took_s < STOPS_WITHIN_S


def test_a_stop_does_not_wait_for_a_store_that_goes_away_meanwhile(tmp_path: Path) -> None:
    async def story() -> float:
        async with world(tmp_path) as made:
            await made.servicer.SendStatus(pb.Status(status="last words"), Context("a"))  # type: ignore[arg-type]
            made.store.away = True
            began_s = made.now
        return asyncio.get_running_loop().time() - began_s

    with virtual_loop() as loop:
        took_s = loop.run_until_complete(asyncio.wait_for(story(), 3600))
    assert took_s < STOPS_WITHIN_S


@on_virtual_time
async def test_a_model_that_waits_long_for_its_commit_is_no_litter(world: World) -> None:
    """A disk that is full: nothing can be saved for hours, and all can be read."""
    [client] = await world.clients("a")
    session = await world.started(aggregator="fedopt")
    task = await client.task()
    save, is_full, commits = world.store.save, True, 0

    async def full(writes: Any) -> None:
        nonlocal commits
        documents = [getattr(write, "document", {}) for write in writes]
        if is_full and any(document.get("status") == "Finished" for document in documents):
            commits += 1
            raise Unavailable("no space left on device")
        await save(writes)

    world.store.save = full  # type: ignore[method-assign]
    assert await client.train(task, 1.0) == "ACCEPTED"
    await asyncio.sleep(10)
    assert commits, "the model is made, and cannot be named"
    world.clock_is_off_s = 4_000_000_000.0  # files have real times: all are old by this clock
    await asyncio.sleep(3 * 3600)
    is_full = False
    record = await world.ended(session)
    assert record.status is Status.FINISHED
    assert codec.decode(await world.scheduler.models.get(record.model.id))


@on_virtual_time
async def test_a_client_whose_old_stream_ends_while_it_attaches_again_is_recorded_as_online(world: World) -> None:
    [client] = await world.clients("a")
    await asyncio.sleep(1)
    world.store.away = True
    again = asyncio.ensure_future(world.scheduler.attach(client.id, client.id, "again"))  # type: ignore[arg-type]
    await asyncio.sleep(2)
    await client.leave()
    world.store.away = False
    await again
    await asyncio.sleep(5)
    document = await world.store.get(Collection.CLIENTS, "a")
    assert document and document["status"] == "online"


@on_virtual_time
async def test_a_client_that_gives_up_while_it_attaches_is_not_recorded_as_online(world: World) -> None:
    world.store.away = True
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(10):
            await world.scheduler.attach("a", "a", "peer")  # type: ignore[arg-type]
    world.store.away = False
    await asyncio.sleep(5)
    document = await world.store.get(Collection.CLIENTS, "a")
    assert document and document["status"] == "offline"


@on_virtual_time
async def test_an_outage_ends_although_the_clock_was_set_back_in_it(world: World) -> None:
    world.store.away = True
    asking = asyncio.ensure_future(world.scheduler.patch(Collection.MODELS, "seed", {"name": "x"}))
    await asyncio.sleep(5)
    world.clock_is_off_s = -3600.0
    world.store.away = False
    await asking
    await asyncio.sleep(10)
    assert world.scheduler.unready() is None


@on_virtual_time
async def test_a_call_that_fails_of_an_outage_after_its_end_begins_no_new_one(world: World) -> None:
    """A driver's call hangs until its own time-out: the store may be back before that."""
    outages, tries = world.scheduler.outages, 0
    world.store.away = True

    async def hangs() -> str:
        nonlocal tries
        tries += 1
        if tries == 1:
            await asyncio.sleep(30)
            raise Unavailable("timed out")
        return "done"

    hanging = asyncio.ensure_future(outages.insist(hangs))
    noticing = asyncio.ensure_future(world.scheduler.patch(Collection.MODELS, "seed", {"name": "x"}))
    await asyncio.sleep(10)
    world.store.away = False
    await noticing
    await asyncio.sleep(10)
    assert not outages.away
    past_s = outages.past_s
    assert await hanging == "done"
    assert outages.past_s == past_s
    assert not outages.away


@on_virtual_time
async def test_a_client_whose_leaving_is_cancelled_twice_is_gone_all_the_same(world: World) -> None:
    """gRPC cancels a handler a second time when it does not end at once: here an inbox is full."""
    client, other = await world.clients("a", "b")
    session = world.scheduler._sessions[SessionId(await world.started(min_clients=2))]
    task = await other.task()
    world.store.away = True
    reporting = asyncio.ensure_future(other.train(task, 1.0))
    await asyncio.sleep(1)
    while not session.inbox.full():
        session.inbox.put_nowait(ClientAttached(ClientId("c")))
    for _ in range(2):
        client._stream.cancel()
        await asyncio.sleep(1)
    assert client._stream.done()
    world.store.away = False
    assert await reporting == "ACCEPTED"
    await world.event("client", client_id="a", status="offline")
    await asyncio.sleep(5)
    document = await world.store.get(Collection.CLIENTS, "a")
    assert document and document["status"] == "offline"
    assert session._session.attached.keys() == {"b", "c"}
