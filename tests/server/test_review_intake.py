"""An update that is reported again, or too early, or while its bytes are swept: on virtual time."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from fl_client.wire import codec
from fl_client.wire import fl_pb2 as pb
from fl_server.core.events import ClientAttached
from fl_server.core.model import ClientId, GlobalModel, ModelId, SessionConfig, SessionId, SessionRecord, UpdateId
from fl_server.errors import Unavailable
from fl_server.scheduler.aggregation import Workshop
from fl_server.scheduler.calls import Reply
from fl_server.scheduler.intake import UNCHECKED, Announced, Intake
from fl_server.store.spool import Spool
from tests.server.virtual_world import VirtualClient, World, on_virtual_time
from tests.server.wire_client import filled, update_of
from tests.virtual import Context


async def deflated(world: World, client: VirtualClient, task: pb.TaskRequest, value: float) -> pb.ModelUpdate:
    """An update that was uploaded as FEDn's helper writes it, and whose size and digest are announced: a file."""
    world.scheduler.workshop.spool._small_bytes = 0
    out = io.BytesIO()
    np.savez_compressed(out, **{str(index): array for index, array in enumerate(filled(value))})  # type: ignore[arg-type]
    upload = await world.scheduler.workshop.spool.begin(client.id, "u")
    await upload.write(out.getvalue())
    await upload.finish()
    announced = {"size_bytes": len(out.getvalue()), "sha256": hashlib.sha256(out.getvalue()).hexdigest()}
    return update_of(task, "u", sender=client.id, **announced)


@on_virtual_time
async def test_a_report_that_comes_again_after_the_check_is_accepted(world: World) -> None:
    """The server died, or the store went away, between the check and the save of its report."""
    [client] = await world.clients("a")
    session = await world.started()
    update = await deflated(world, client, await client.task(), 3.0)
    submit = world.scheduler.update

    async def dies(*args: Any) -> Reply:
        raise Unavailable("the process dies here")

    world.scheduler.update = dies  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        await world.servicer.SendModelUpdate(update, Context("a"))  # type: ignore[arg-type]
    world.scheduler.update = submit  # type: ignore[method-assign]
    reply = await world.servicer.SendModelUpdate(update, Context("a"))  # type: ignore[arg-type]
    assert (reply.verdict, reply.reason) == (pb.VERDICT_ACCEPTED, "")
    assert await world.result(session) == 3.0


@on_virtual_time
async def test_an_update_that_nobody_has_checked_is_not_accepted(world: World) -> None:
    """It came before its task was open, and is decided after."""
    await world.clients("a")
    session = SessionId(await world.session(min_clients=2))
    assert await world.scheduler.start(session, wait_for_clients_s=60.0) == ("done", "")
    early = pb.ModelUpdate(
        sender=pb.Client(name="a", role=pb.CLIENT, client_id="a"),
        model_update_id="early",
        task_id=f"{session}/1/1/train/a",
        meta='{"training_metadata": {"num_examples": 1}}',
    )
    world.scheduler._sessions[session].inbox.put_nowait(ClientAttached(ClientId("b")))
    reply = await world.servicer.SendModelUpdate(early, Context("a"))  # type: ignore[arg-type]
    assert (reply.verdict, reply.reason) == (pb.VERDICT_REJECTED, UNCHECKED)


@on_virtual_time
async def test_a_check_that_takes_longer_than_the_patience_ends_with_a_verdict(world: World) -> None:
    [client] = await world.clients("a")
    session = await world.started()
    intake = world.servicer._intake
    check = intake._check

    async def slow(*args: Any) -> str | None:
        await asyncio.sleep(45)
        return await check(*args)

    intake._check = slow  # type: ignore[method-assign]
    assert await client.train(await client.task(), 2.0) == "ACCEPTED"
    assert await world.result(session) == 2.0


@on_virtual_time
async def test_an_upload_is_not_swept_while_its_report_is_checked(world: World) -> None:
    [client] = await world.clients("a")
    session = await world.started(round_timeout_s=20_000.0)
    task = await client.task()
    spool = world.scheduler.workshop.spool
    spool._clock = lambda: world.now  # the spool's own is the real one
    intake = world.servicer._intake
    check = intake._check

    async def slow(*args: Any) -> str | None:
        await asyncio.sleep(8000)  # more than an upload's time to live, and than a sweep's interval
        return await check(*args)

    intake._check = slow  # type: ignore[method-assign]
    assert await client.train(task, 2.0) == "ACCEPTED"
    assert await world.result(session) == 2.0
    assert not spool._held


@on_virtual_time
async def test_a_model_that_is_gone_is_the_reason_for_a_rejection(world: World) -> None:
    [client] = await world.clients("a")
    session = await world.started(round_retries=0)
    task = await client.task()
    await world.scheduler.models.delete(["seed"])
    assert await client.train(task, 2.0) == "REJECTED"
    [round] = await world.rounds(session)
    [report] = await world.store.reports(round["round_id"])
    assert report["reason"].startswith("the global model is gone")


async def test_a_check_whose_caller_left_leaves_no_file(tmp_path: Path) -> None:
    """In real threads: the check goes on when its caller is cancelled."""
    begun, go_on = threading.Event(), threading.Event()

    def check_update(path: Path, layout: Any, *, stored_copy: Path, **how: Any) -> codec.Checked:
        begun.set()
        assert go_on.wait(30)
        stored_copy.write_bytes(b"inflated")
        return codec.Checked(None, stored=True)

    with ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patched:
        patched.setattr("fl_server.scheduler.intake.codec.check_update", check_update)
        spool = Spool(tmp_path / "spool", pool, max_bytes=100, small_bytes=0)
        await spool.open()
        upload = await spool.begin("a", "u")
        await upload.write(b"deflated")
        blob = await upload.finish()
        (tmp_path / "work").mkdir()

        class Around:
            preparers: ClassVar[list[object]] = []
            workshop = Workshop(None, spool, ThreadPoolExecutor(1), tmp_path / "work", 100)  # type: ignore[arg-type]

        intake = Intake(Around())  # type: ignore[arg-type]
        known = intake._layouts[ModelId("m")] = asyncio.get_running_loop().create_future()
        known.set_result(())
        record = SessionRecord(SessionId("s"), SessionConfig(rounds=1), 1, GlobalModel(ModelId("m")))
        checking = asyncio.ensure_future(intake._check(blob, record, Announced(UpdateId("u"), 1), 30.0))
        await asyncio.get_running_loop().run_in_executor(pool, begun.wait, 30)
        checking.cancel()
        await asyncio.gather(checking, return_exceptions=True)
        go_on.set()
        Around.workshop.kernel.shutdown(wait=True)
        assert list((tmp_path / "work").iterdir()) == []


async def test_a_replacement_whose_caller_left_is_counted(tmp_path: Path) -> None:
    """In real threads: the file is placed when its caller is cancelled."""
    with ThreadPoolExecutor(1) as pool:
        spool = Spool(tmp_path / "spool", pool, max_bytes=100, small_bytes=0)
        await spool.open()
        upload = await spool.begin("a", "u")
        await upload.write(b"deflated")
        blob = await upload.finish()
        inflated = tmp_path / "inflated"
        inflated.write_bytes(b"x" * 20)
        go_on = threading.Event()
        pool.submit(go_on.wait, 30)
        replacing = asyncio.ensure_future(spool.replace(blob, inflated))
        await asyncio.sleep(0)  # it is in the pool
        replacing.cancel()
        await asyncio.gather(replacing, return_exceptions=True)
        go_on.set()
        assert await spool.missing([blob]) == set()
        assert (spool.size_bytes(blob), spool.used_bytes) == (20, 20)
