"""What one client sends never ends the server, nor what another client has going: on virtual time."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_client.wire import codec
from fl_client.wire import fl_pb2 as pb
from fl_server.core.model import Status
from fl_server.errors import Unavailable
from fl_server.scheduler.journal import WOKEN_AT_ONCE
from fl_server.scheduler.scheduler import METRICS_SHOWN
from fl_server.store.ports import Collection, Put, PutReport, Query, Write
from tests.server.virtual_world import World, on_virtual_time
from tests.server.wire_client import SHAPES, update_of
from tests.virtual import Context


def context(client: str) -> Any:
    return Context(client)


@on_virtual_time
async def test_a_sum_that_leaves_its_range_ends_its_session_and_not_the_server(world: World) -> None:
    a, b = await world.clients("a", "b")
    session = await world.started(min_clients=2, round_retries=0)
    task, _ = await a.task(), await b.task()
    blob = codec.encode([np.full(shape, 1e307 if dtype is np.float64 else 1.0, dtype) for shape, dtype in SHAPES])
    upload = await world.scheduler.workshop.spool.begin("a", "u")
    await upload.write(blob)
    await upload.finish()
    update = update_of(task, "u", sender="a", meta={"training_metadata": {"num_examples": 1000}})
    assert (await world.servicer.SendModelUpdate(update, context("a"))).verdict == pb.VERDICT_ACCEPTED
    await asyncio.sleep(1)
    assert "waiting for 1 of 2 clients" in await world.explained(session)


@on_virtual_time
async def test_a_metric_that_is_no_number_is_stored_and_the_others_with_it(world: World) -> None:
    metrics = [pb.MetricElem(key=key, value=value) for key, value in (("nan", math.nan), ("inf", math.inf), ("one", 1))]
    await world.servicer.SendModelMetric(pb.ModelMetric(metrics=metrics), context("a"))
    telemetries = [pb.TelemetryElem(key="nan", value=math.nan)]
    await world.servicer.SendTelemetryMessage(pb.TelemetryMessage(telemetries=telemetries), context("a"))
    await asyncio.sleep(1)
    stored = await world.store.find(Collection.METRICS, Query())
    assert {metric["key"]: metric["value"] for metric in stored} == {"nan": None, "inf": None, "one": 1.0}
    [telemetry] = await world.store.find(Collection.TELEMETRY, Query())
    assert telemetry["value"] is None


@on_virtual_time
async def test_a_record_that_the_store_cannot_hold_is_refused_alone(world: World) -> None:
    journal = world.scheduler.journal
    good, bad = {"metric_id": "good", "value": 1.0}, {"metric_id": "bad", "value": math.nan}
    waiting = [asyncio.ensure_future(journal.record(Collection.METRICS, document)) for document in (bad, good)]
    done = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(done[0], ValueError)
    assert done[1] is None
    assert [metric["metric_id"] for metric in await world.store.find(Collection.METRICS, Query())] == ["good"]


@on_virtual_time
async def test_of_many_whose_records_are_one_write_some_hear_of_it_at_a_time(world: World) -> None:
    documents = [{"metric_id": f"{number}", "value": 1.0} for number in range(3 * WOKEN_AT_ONCE + 1)]
    record = world.scheduler.journal.record
    waiting = [asyncio.ensure_future(record(Collection.METRICS, document)) for document in documents]
    heard = {0}
    while max(heard) < len(waiting):
        await asyncio.sleep(0)
        heard.add(sum(one.done() for one in waiting))
    assert heard == {0, WOKEN_AT_ONCE, 2 * WOKEN_AT_ONCE, 3 * WOKEN_AT_ONCE, len(waiting)}


@on_virtual_time
async def test_the_feed_holds_a_bounded_number_of_a_clients_metrics(world: World) -> None:
    metrics = {"loss": 0.5, "nan": math.nan, "inf": math.inf, "huge": 10**400, "predictions": [1] * 9, "text": "x"}
    data = json.dumps(metrics | {"k" * 300: 1, "right": True} | {f"m{number}": number for number in range(1000)})
    session = await world.session()
    report = pb.ModelValidation(model_id="seed", data=data, correlation_id=f"{session}/1/1/validate/a")
    await world.servicer.SendModelValidation(report, context("a"))
    shown = (await world.event("validation", client_id="a")).data["metrics"]
    assert dict(list(shown.items())[:3]) == {"loss": 0.5, "right": True, "m0": 0}
    assert len(shown) == METRICS_SHOWN
    [stored] = await world.store.find(Collection.VALIDATIONS, Query())
    assert stored["data"] == data


def break_saves(world: World, session: str, *kinds: type[Write]) -> None:
    """From now on writes of these kinds that concern this session cannot be encoded."""
    save = world.store.save

    async def broken(writes: list[Write]) -> None:
        if any(isinstance(write, kinds) and session in repr(write) for write in writes):
            raise TypeError("what is this?")
        await save(writes)

    world.store.save = broken  # type: ignore[method-assign]


@on_virtual_time
async def test_a_bug_in_a_save_ends_its_session_and_not_the_server(world: World) -> None:
    [client] = await world.clients("a")
    session, other = await world.started(), await world.started()
    tasks = {task.session_id: task for task in (await client.task(), await client.task())}
    break_saves(world, session, PutReport)
    with pytest.raises(Unavailable, match="incident"):
        await client.train(tasks[session], 1.0)
    record = await world.ended(session)
    assert (record.status, record.reason[:8]) == (Status.FAILED, "incident")
    assert await client.train(tasks[session], 1.0) == "LATE", "it still says what is to be said"
    assert await client.train(tasks[other], 2.0) == "ACCEPTED"
    assert await world.result(other) == 2.0


@on_virtual_time
async def test_a_session_that_cannot_even_be_ended_refuses_calls_and_leaves_the_others_alone(world: World) -> None:
    [client] = await world.clients("a")
    session, other = await world.started(), await world.started()
    tasks = {task.session_id: task for task in (await client.task(), await client.task())}
    break_saves(world, session, PutReport, Put)
    for _ in range(2):
        with pytest.raises(Unavailable, match="incident"):
            await client.train(tasks[session], 1.0)
    with pytest.raises(Unavailable, match="incident"):
        await world.scheduler.stop(session)
    assert await client.train(tasks[other], 2.0) == "ACCEPTED"
    assert await world.result(other) == 2.0


@on_virtual_time
async def test_a_bug_while_updates_are_kept_ends_its_session_and_not_the_server(world: World) -> None:
    [client] = await world.clients("a")
    session = await world.started(rounds=2, delete_models_storage=False)

    async def broken(key: str, path: Path) -> None:
        raise TypeError("what is this?")

    world.scheduler.updates.put_file = broken  # type: ignore[method-assign]
    assert await client.train(await client.task(), 1.0) == "ACCEPTED"
    record = await world.ended(session)
    assert (record.status, record.reason[:8]) == (Status.FAILED, "incident")
    assert record.model.round == 1
