"""Models that are read once for many: who waits for a reader that leaves is not left waiting. On virtual time."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fl_client.wire import fl_pb2 as pb
from fl_server.core.model import ModelId
from fl_server.store.ports import Collection
from tests.server.virtual_world import World, on_virtual_time
from tests.virtual import Context


@on_virtual_time
async def test_a_model_whose_reader_leaves_is_read_by_the_next_although_others_were_read_meanwhile(
    world: World,
) -> None:
    models, downloads = world.scheduler.models, world.servicer._downloads
    seed = await world.store.get(Collection.MODELS, "seed")
    assert seed
    for number in range(3):
        name = f"m{number}"
        await models.put(name, b"x" * 400_000)
        document = {**seed, "model": name}
        await world.store.append(Collection.MODELS, [document])
    local, gate = models.local, asyncio.Event()

    async def slow(key: str) -> Path:
        if key == "m0":
            await gate.wait()
        return await local(key)

    async def download(name: str) -> int:
        context = Context("a")
        await world.servicer.Download(pb.ModelRequest(id=name), context)  # type: ignore[arg-type]
        return context.written.qsize()

    models.local = slow  # type: ignore[method-assign]
    reader = asyncio.ensure_future(download("m0"))
    await asyncio.sleep(1)
    waiting = asyncio.ensure_future(download("m0"))
    await asyncio.sleep(1)
    assert await download("m1") == await download("m2") == 2, "together with m0 they are more than is kept"
    reader.cancel()
    await asyncio.sleep(1)
    gate.set()
    assert await waiting == 2
    assert sum(size for _, size in downloads._kept.values()) <= 10**6


@on_virtual_time
async def test_a_new_model_is_ready_for_its_clients_before_they_are_told_of_it(world: World) -> None:
    [a] = await world.clients("a")
    await world.started(rounds=2)
    await a.train(await a.task(), 1.0)
    task = await a.task()
    assert task.round == 2
    for _ in range(100):  # what was begun beside the commit may take a few steps more
        await asyncio.sleep(0)
    kept = world.servicer._downloads._kept[task.model_id][0]
    assert kept.done() and kept.result()
    assert world.servicer._intake._layouts[ModelId(task.model_id)].done()


@on_virtual_time
async def test_a_model_that_cannot_be_read_early_disturbs_nobody(world: World) -> None:
    [a] = await world.clients("a")
    session_id = await world.started(rounds=2)
    size_bytes, failed = world.scheduler.models.size_bytes, []

    async def broken(key: str) -> int | None:
        if not failed:
            failed.append(key)
            raise RuntimeError(key)
        return await size_bytes(key)

    world.scheduler.models.size_bytes = broken  # type: ignore[method-assign]
    await a.train(await a.task(), 1.0)
    await a.train(await a.task(), 2.0)
    assert failed
    assert await world.result(session_id) == 2
