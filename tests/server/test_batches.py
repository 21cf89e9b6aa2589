"""Events that a session finds in its inbox together: their saves are one write, and nothing is mixed up by that.

And what it does for many clients at once, which is done in portions.
"""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

from fl_client.wire import fl_pb2 as pb
from fl_server.core.events import Aggregated, ClientAttached, Event
from fl_server.core.model import ClientId, SessionId
from fl_server.scheduler.session_task import ISSUED_AT_ONCE
from fl_server.store.ports import PutReport
from tests.server.virtual_world import World, on_virtual_time


@on_virtual_time
async def test_who_attaches_together_with_a_commit_gets_the_former_models_validation_and_the_new_round(
    world: World,
) -> None:
    [a] = await world.clients("a")
    session = await world.started(rounds=3, validate=True)
    first = await a.task()
    assert await a.train(first, 1.0) == "ACCEPTED"
    [b] = await world.clients("b")
    owner: Any = world.scheduler._sessions[SessionId(session)]
    tell = owner._aggregation._tell

    async def together(event: Event) -> None:
        if isinstance(event, Aggregated) and event.model.round == 2:
            owner.inbox.put_nowait(ClientAttached(ClientId("b")))
        await tell(event)

    owner._aggregation._tell = together
    a_tasks = [await a.task(), await a.task()]
    assert [task.type for task in a_tasks] == [pb.MODEL_VALIDATION, pb.MODEL_UPDATE]
    assert await a.train(a_tasks[1], 2.0) == "ACCEPTED"
    heard = [await b.task() for _ in range(4)]
    assert [(task.type, task.round) for task in heard] == [
        (pb.MODEL_VALIDATION, 1),  # when it attached
        (pb.MODEL_VALIDATION, 1),  # again, as it seemed to attach again
        (pb.MODEL_VALIDATION, 2),
        (pb.MODEL_UPDATE, 3),
    ]


@on_virtual_time
async def test_the_tasks_of_many_clients_go_out_in_portions_between_which_others_have_their_turn(world: World) -> None:
    many = await world.clients(*(f"c{index}" for index in range(3 * ISSUED_AT_ONCE)))
    await world.started()
    issued = [0]
    while issued[-1] < len(many):
        await asyncio.sleep(0)  # to the next turn of the loop
        issued.append(sum(client.tasks.qsize() for client in many))
    assert max(after - before for before, after in pairwise(issued)) <= ISSUED_AT_ONCE


@on_virtual_time
async def test_updates_share_writes_and_a_rounds_last_one_does_not_wait(world: World) -> None:
    many = await world.clients(*(f"c{index}" for index in range(12)))
    await world.started(rounds=1, validate=False)
    tasks, save, written, loop = (
        [await client.task() for client in many],
        world.scheduler.store.save,
        [],
        asyncio.get_running_loop(),
    )

    async def counted(writes: Any) -> None:
        if count := sum(isinstance(write, PutReport) for write in writes):
            written.append(count)
        await save(writes)

    world.scheduler.store.save = counted  # type: ignore[method-assign]
    took_s = dict[int, float]()

    async def report(index: int) -> None:
        await asyncio.sleep(index * 0.001)
        began_s = loop.time()
        assert await many[index].train(tasks[index], 1.0) == "ACCEPTED"
        took_s[index] = loop.time() - began_s

    await asyncio.gather(*(report(index) for index in range(12)))
    assert sum(written) == 12
    assert len(written) <= 3
    assert took_s[11] == 0
    assert max(took_s.values()) < 0.012


@on_virtual_time
async def test_updates_that_come_right_before_the_deadline_are_not_late_for_each_other(world: World) -> None:
    clients = await world.clients(*"abcd")
    session_id = await world.started(rounds=1, round_timeout_s=60.0)
    tasks = [await client.task() for client in clients]
    began_at = world.now
    await asyncio.sleep(60.0 - 0.008)
    verdicts = [
        asyncio.ensure_future(client.train(task, 1.0)) for client, task in zip(clients[:3], tasks, strict=False)
    ]
    assert await asyncio.gather(*verdicts) == ["ACCEPTED"] * 3
    assert await world.result(session_id) == 1
    assert world.now - began_at < 60.5


@on_virtual_time
async def test_a_buffer_larger_than_the_cohort_does_not_make_its_last_update_wait(world: World) -> None:
    clients = await world.clients("a", "b")
    await world.started(rounds=1, buffer_size=10)
    began_at = world.now
    await asyncio.gather(*[client.train(await client.task(), 1.0) for client in clients])
    assert world.now == began_at
