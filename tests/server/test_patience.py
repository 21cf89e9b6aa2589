"""Waits that have an end, and what is left lying about: on virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from fl_client.wire import codec
from fl_client.wire import fl_pb2 as pb
from fl_server.errors import Unavailable
from fl_server.store.ports import Collection
from fl_server.store.spool import SpoolFull
from tests.server.virtual_world import World, on_virtual_time, world
from tests.server.wire_client import filled, update_of
from tests.virtual import Context, virtual_loop

STORE_PATIENCE_S = 30.0
SPOOL_BYTES = 20_000


class _Lines(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


@contextlib.contextmanager
def outages_logged() -> Iterator[list[str]]:
    lines: list[str] = []
    handler, logger = _Lines(lines), logging.getLogger("fl_server.scheduler.outage")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


async def upload(world: World, client: str, upload_id: str, data: bytes) -> pb.ModelResponse:
    async def requests() -> AsyncIterator[pb.ModelRequest]:
        yield pb.ModelRequest(id=upload_id, data=data, status=pb.IN_PROGRESS)
        yield pb.ModelRequest(id=upload_id, status=pb.OK)

    return await world.servicer.Upload(requests(), Context(client))  # type: ignore[arg-type]


@on_virtual_time
async def test_an_upload_that_does_not_fit_waits_until_a_round_has_ended(world: World) -> None:
    [client] = await world.clients("a")
    session = await world.started()
    task = await client.task()
    data = codec.encode(filled(1.0))
    world.scheduler.workshop.spool._max_bytes = len(data) + 100
    assert (await upload(world, "a", "u", data)).status == pb.OK
    waiting = asyncio.ensure_future(upload(world, "b", "waits", data))
    await asyncio.sleep(10)
    assert not waiting.done()
    update = update_of(task, "u", sender="a")
    assert (await world.servicer.SendModelUpdate(update, Context("a"))).verdict == pb.VERDICT_ACCEPTED  # type: ignore[arg-type]
    assert await world.result(session) == 1.0
    assert (await waiting).status == pb.OK


@on_virtual_time
async def test_an_upload_that_never_fits_is_told_to_come_again_after_the_patience(world: World) -> None:
    world.scheduler.workshop.spool._max_bytes = SPOOL_BYTES
    assert (await upload(world, "b", "filler", b"x" * (SPOOL_BYTES - 2000))).status == pb.OK
    began_s = world.now
    with pytest.raises(TimeoutError):  # the guard in combiner/server.py makes it UNAVAILABLE
        await upload(world, "c", "waits", b"y" * 4000)
    assert world.now - began_s == pytest.approx(STORE_PATIENCE_S)
    assert world.scheduler.workshop.spool.used_bytes == SPOOL_BYTES - 2000, "nothing of it is left"


@on_virtual_time
async def test_uploads_that_fill_the_spool_together_do_not_wait_for_each_other(world: World) -> None:
    """Each holds a half of it: one goes on, the other's client comes again."""
    world.scheduler.workshop.spool._max_bytes = SPOOL_BYTES
    began_s = world.now

    async def slowly(client: str) -> bool:
        async def requests() -> AsyncIterator[pb.ModelRequest]:
            for _ in range(2):
                yield pb.ModelRequest(id="u", data=b"x" * (SPOOL_BYTES // 2), status=pb.IN_PROGRESS)
                await asyncio.sleep(1)
            yield pb.ModelRequest(id="u", status=pb.OK)

        try:
            return (await world.servicer.Upload(requests(), Context(client))).status == pb.OK  # type: ignore[arg-type]
        except SpoolFull:  # the guard in combiner/server.py makes it UNAVAILABLE
            return False

    assert await asyncio.gather(slowly("a"), slowly("b")) == [True, False]
    assert world.now - began_s < 5


@on_virtual_time
async def test_uploads_that_wait_for_room_keep_no_small_one_out(world: World) -> None:
    spool = world.scheduler.workshop.spool
    spool._max_bytes = SPOOL_BYTES
    assert (await upload(world, "b", "filler", b"x" * (SPOOL_BYTES - 2000))).status == pb.OK
    waiting = [asyncio.ensure_future(upload(world, "c", f"{index}", b"y" * 4000)) for index in range(8)]
    await asyncio.sleep(1)
    async with asyncio.timeout(1):
        assert (await upload(world, "a", "small", b"z")).status == pb.OK
    await spool.remove([spool.find("b", "filler") or ""])
    ended = await asyncio.gather(*waiting, return_exceptions=True)
    assert [reply.status for reply in ended if isinstance(reply, pb.ModelResponse)] == [pb.OK] * 4
    assert [type(error) for error in ended if not isinstance(error, pb.ModelResponse)] == [TimeoutError] * 4


@pytest.mark.parametrize("comes_again", [False, True])
def test_a_spool_whose_disk_takes_nothing_holds_uploads_and_deadlines(comes_again: bool, tmp_path: Path) -> None:
    away_s = 600.0 if comes_again else 20.0

    async def story() -> None:
        async with world(tmp_path) as made:
            a, b = await made.clients("a", "b")
            session = await made.started(min_clients=2, round_timeout_s=60.0, round_retries=0)
            task = await b.task()
            assert await a.train(await a.task(), 1.0) == "ACCEPTED"
            with outages_logged() as lines:
                (tmp_path / "spool").rename(tmp_path / "unmounted")
                reporting = asyncio.ensure_future(b.train(task, 3.0))
                await asyncio.sleep(away_s)
                assert "spool" in (made.scheduler.unready() or "")
                await made.clients("c")  # whatever happens meanwhile, no time has passed
                if comes_again:
                    with pytest.raises((TimeoutError, Unavailable)):
                        await reporting
                (tmp_path / "unmounted").rename(tmp_path / "spool")
                assert await (b.train(task, 3.0) if comes_again else reporting) == "ACCEPTED"
                assert await made.result(session) == 2.0
                await asyncio.sleep(10)
            assert made.scheduler.unready() is None
            assert lines == ["store away", "store back"]

    with virtual_loop() as loop:
        loop.run_until_complete(asyncio.wait_for(story(), 36_000))


@on_virtual_time
async def test_while_the_store_is_away_a_report_is_held_and_small_talk_is_answered(world: World) -> None:
    [client] = await world.clients("a")
    session = await world.started()
    task = await client.task()
    world.store.away = True
    reporting = asyncio.ensure_future(client.train(task, 2.0))
    context = Context("a")
    servicer, sender = world.servicer, pb.Client(name="a", role=pb.CLIENT, client_id="a")
    assert (await servicer.SendHeartbeat(pb.Heartbeat(sender=sender), context)).response  # type: ignore[arg-type]
    assert (await servicer.SendStatus(pb.Status(sender=sender, status="s"), context)).response  # type: ignore[arg-type]
    await servicer.SendTelemetryMessage(pb.TelemetryMessage(sender=sender), context)  # type: ignore[arg-type]
    await asyncio.sleep(10)
    assert not reporting.done()
    assert "away for" in (world.scheduler.unready() or "")
    assert "away for" in await world.explained(session)
    world.store.away = False
    assert await reporting == "ACCEPTED"
    assert await world.result(session) == 2.0
    await asyncio.sleep(5)
    assert world.scheduler.unready() is None


@on_virtual_time
async def test_a_report_is_told_to_come_again_when_the_store_stays_away(world: World) -> None:
    [client] = await world.clients("a")
    session = await world.started()
    task = await client.task()
    world.store.away = True
    with pytest.raises((TimeoutError, Unavailable)):
        await client.train(task, 2.0)
    world.store.away = False
    assert await world.result(session) == 2.0, "what it had submitted counts all the same"


@on_virtual_time
async def test_an_outage_of_ten_minutes_neither_closes_a_round_nor_fails_its_session(world: World) -> None:
    a, b = await world.clients("a", "b")
    session = await world.started(min_clients=2, round_timeout_s=60.0, round_retries=0)
    task_a, task_b = await a.task(), await b.task()
    assert await a.train(task_a, 1.0) == "ACCEPTED"
    world.store.away = True
    reporting = asyncio.ensure_future(b.train(task_b, 3.0))
    with pytest.raises((TimeoutError, Unavailable)):
        await reporting
    await asyncio.sleep(600)
    world.store.away = False
    assert await world.result(session) == 2.0


@on_virtual_time
async def test_an_outage_is_one_line_when_it_begins_and_one_when_it_ends(world: World) -> None:
    with outages_logged() as lines:
        world.store.away = True
        asking = [
            asyncio.ensure_future(world.scheduler.patch(Collection.MODELS, "seed", {"name": "x"})) for _ in range(3)
        ]
        await asyncio.sleep(60)
        world.store.away = False
        await asyncio.gather(*asking)
        await asyncio.sleep(10)
    assert lines == ["store away", "store back"]


@on_virtual_time
async def test_uploads_that_no_report_names_are_swept_when_they_are_old(world: World) -> None:
    [client] = await world.clients("a")
    await world.started(round_timeout_s=10_000.0, min_clients=1, buffer_size=2)
    task = await client.task()
    spool = world.scheduler.workshop.spool
    spool._clock = lambda: world.now  # the spool's own is the real one
    assert (await upload(world, "a", "orphan", codec.encode(filled(1)))).status == pb.OK
    assert await client.train(task, 1.0) in ("ACCEPTED",)
    orphan = spool.find("a", "orphan")
    assert orphan
    await asyncio.sleep(3000)
    assert not await spool.missing([orphan]), "young"
    await asyncio.sleep(1500)
    assert await spool.missing([orphan]) == {orphan}
    assert spool.find("a", "orphan") is None


@on_virtual_time
async def test_a_models_bytes_that_no_record_names_are_swept_and_named_ones_stay(world: World) -> None:
    world.clock_is_off_s = 4_000_000_000.0  # files have real times: all are old by this clock
    models = world.scheduler.models
    await models.put("litter", b"a crash left it")
    [client] = await world.clients("a")
    session = await world.started(aggregator="fedopt")
    assert await client.train(await client.task(), 1.0) == "ACCEPTED"
    record = await world.ended(session)
    await asyncio.sleep(700)
    kept = {key for key, _ in await models.keys()}
    assert kept == {"seed", record.model.id, record.model.optimizer_state}
    assert record.model.optimizer_state
    assert await world.store.count(Collection.MODELS) == 2
