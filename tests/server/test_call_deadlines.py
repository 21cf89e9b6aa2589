"""Deadlines of calls: they do what asyncio.timeout() does, on one timer."""

from __future__ import annotations

import asyncio

import pytest

from fl_server.deadlines import Deadlines
from tests.server.virtual_world import World, on_virtual_time


async def never() -> None:
    await asyncio.get_running_loop().create_future()


@on_virtual_time
async def test_what_takes_too_long_is_cut_off_when_its_time_is_over(world: World) -> None:
    deadlines, loop = Deadlines(), asyncio.get_running_loop()
    began_s = loop.time()
    with pytest.raises(TimeoutError), deadlines.within(5):
        await never()
    assert 5 <= loop.time() - began_s <= 5.1


@on_virtual_time
async def test_a_nearer_deadline_rings_before_a_farther_one_that_began_earlier(world: World) -> None:
    deadlines, ended = Deadlines(), list[str]()

    async def wait(name: str, delay_s: float) -> None:
        with pytest.raises(TimeoutError), deadlines.within(delay_s):
            await never()
        ended.append(name)

    async with asyncio.TaskGroup() as tasks:
        for name, delay_s in (("far", 30), ("near", 1), ("between", 10)):
            tasks.create_task(wait(name, delay_s))
    assert ended == ["near", "between", "far"]


@on_virtual_time
async def test_what_ends_in_time_is_not_cut_off_later(world: World) -> None:
    deadlines = Deadlines()
    with deadlines.within(1) as first:
        await asyncio.sleep(0.5)
    with deadlines.within(None), deadlines.within(10) as second:
        second.move(None)
        await asyncio.sleep(20)
    assert not first.expired
    assert not second.expired


@on_virtual_time
async def test_the_outer_one_of_two_cuts_off_what_the_inner_one_lets_go_on(world: World) -> None:
    deadlines = Deadlines()
    with pytest.raises(TimeoutError), deadlines.within(1) as outer, deadlines.within(60) as inner:
        await never()
    assert (outer.expired, inner.expired) == (True, False)


@on_virtual_time
async def test_who_is_cancelled_from_outside_is_cancelled_and_not_late(world: World) -> None:
    deadlines = Deadlines()

    async def wait() -> None:
        with deadlines.within(60):
            await never()

    task = asyncio.create_task(wait())
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
