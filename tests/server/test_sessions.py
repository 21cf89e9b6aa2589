"""Sessions beside one another, stopped, continued and broken: none of it changes another one."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from fl_client.client import TaskInfo, TrainResult
from fl_client.wire import codec
from fl_client.wire import fl_pb2 as pb
from fl_server.core.events import Effect, Event, UpdateReceived
from fl_server.core.model import Status
from fl_server.core.session import Session, step
from fl_server.scheduler import session_task
from fl_server.testing import Federation
from tests.server.virtual_world import World, on_virtual_time
from tests.server.wire_client import clients, committed, filled, online, result, started, value_of


def train(parameters: Sequence[np.ndarray], task: TaskInfo) -> TrainResult:
    """A function of the model, the client, the round and the session's settings: nothing of the other session."""
    seed = zlib.crc32(f"{task.client_id} {task.round} {task.settings['seed']}".encode())
    generator = np.random.default_rng(seed)
    drawn = [array + generator.normal(size=array.shape).astype(array.dtype) for array in parameters]
    return TrainResult(drawn, num_examples=int(generator.integers(1, 100)))


def validate(parameters: Sequence[np.ndarray], task: TaskInfo) -> dict[str, float]:
    return {"loss": float(np.sum(parameters[0]))}


async def final_models(federation: Federation, seeds: Sequence[int]) -> list[bytes]:
    """Of sessions that run at the same time, in the order of their seeds."""
    await federation.attached(3)
    model_id = await federation.add_seed(filled(0))
    config: dict[str, Any] = {"clients_required": 3, "validate": True}
    sessions = [
        await federation.create_session(model_id, rounds=3, client_settings={"seed": seed}, **config) for seed in seeds
    ]
    for session_id in sessions:
        await federation.start(session_id)
    models = []
    for session_id in sessions:
        session = await federation.ended(session_id)
        assert session["status"] == "Finished", session["status_reason"]
        models.append(codec.encode(await federation.parameters(session["session_config"]["model_id"])))
    return models


async def test_two_sessions_at_once_end_with_the_models_that_each_has_alone() -> None:
    async with Federation(train=train, validate=validate, clients=3) as federation:
        together = await final_models(federation, [1, 2])
        alone = [model for seed in (1, 2) for model in await final_models(federation, [seed])]
    assert together == alone
    assert together[0] != together[1]


async def test_a_client_in_two_sessions_gets_both_tasks_in_order_and_each_update_goes_to_its_own() -> None:
    async with Federation() as federation, clients(federation, "a", "b") as (a, b):
        sessions = [await started(federation), await started(federation)]
        for client in (a, b):
            tasks = [await client.task(), await client.task()]
            assert [task.session_id for task in tasks] == sessions
            for value, task in reversed(list(enumerate(tasks, start=1))):  # reported in the other order
                reply = await client.train(task, value, update_id=f"{client.id}-same-id-{value}")
                assert reply.verdict == pb.VERDICT_ACCEPTED
        assert [await result(federation, session_id) for session_id in sessions] == [1, 2]


async def test_the_same_update_id_in_two_sessions_has_a_verdict_in_each() -> None:
    async with Federation() as federation, clients(federation, "a", "b") as (a, b):
        sessions = [await started(federation), await started(federation)]
        first, second = await a.task(), await a.task()
        await a.upload(codec.encode([np.full(4, np.nan), np.ones((2, 3))]), "u")
        assert (await a.report(first, "u")).verdict == pb.VERDICT_REJECTED
        assert (await a.train(second, 2, update_id="u")).verdict == pb.VERDICT_ACCEPTED
        assert (await a.report(first, "u")).verdict == pb.VERDICT_REJECTED
        for value in (3, 2):
            await b.train(await b.task(), value)
        assert [await result(federation, session_id) for session_id in sessions] == [3, 2]


@on_virtual_time
async def test_each_deadline_runs_from_the_issue_of_its_own_round(world: World) -> None:
    (a,) = await world.clients("a")
    first = await world.started(round_timeout_s=60.0, round_retries=0)
    began_at = world.now
    await asyncio.sleep(20)
    second = await world.started(round_timeout_s=60.0, round_retries=0)
    deadlines = [(await a.task()).deadline, (await a.task()).deadline]
    assert deadlines == pytest.approx([began_at + 60, began_at + 80])
    assert (await world.ended(first)).status is Status.FAILED
    assert world.now == pytest.approx(began_at + 60)
    assert (await world.ended(second)).status is Status.FAILED
    assert world.now == pytest.approx(began_at + 80)


# ---- stop


async def test_a_stop_in_mid_round_ends_the_session_at_once_and_touches_no_other() -> None:
    async with Federation() as federation, clients(federation, "a") as (client,):
        stopped, other = await started(federation), await started(federation)
        task, others_task = await client.task(), await client.task()
        session = await federation.call("PATCH", f"/api/v1/sessions/{stopped}", json={"status": "Terminated"})
        assert (session["status"], session["status_reason"]) == ("Terminated", "stopped")
        late = await client.train(task, 9)
        assert (late.verdict, late.reason) == (pb.VERDICT_LATE, "round 1 is over")
        again = await federation.call("PATCH", f"/api/v1/sessions/{stopped}", json={"status": "Terminated"})
        assert again["status"] == "Terminated"
        await client.train(others_task, 3)
        assert await result(federation, other) == 3
        rounds = await federation.call("GET", "/api/v1/rounds/", "result", headers={"X-Sort-Order": "asc"})
        assert [(found["status"], found["status_reason"]) for found in rounds] == [
            ("Failed", "stopped"),
            ("Finished", ""),
        ]
        assert (await federation.session(stopped))["session_config"]["model_id"] == session["seed_model_id"]


async def test_a_stop_outlives_the_server(tmp_path: Path) -> None:
    async with Federation(data_dir=tmp_path) as federation, clients(federation, "a") as (client,):
        session_id = await started(federation)
        await client.task()
        await federation.call("PATCH", f"/api/v1/sessions/{session_id}", json={"status": "Terminated"})
    async with Federation(data_dir=tmp_path) as federation:
        assert (await federation.session(session_id))["status"] == "Terminated"
        assert await federation.call("GET", "/get_controller_status") == {"state": "idle"}


# ---- continue


async def test_a_finished_session_goes_on_with_its_model_and_round_numbers() -> None:
    async with Federation() as federation, clients(federation, "a") as (client,):
        session_id = await started(federation)
        await client.train(await client.task(), 3)
        assert await result(federation, session_id) == 3
        first = await committed(federation, session_id, 1)
        await federation.start(session_id, rounds=2, wait_for_clients_s=0)
        for number, value in ((2, 5), (3, 7)):
            task = await client.task()
            assert (task.round, task.attempt) == (number, 1)
            if number == 2:
                assert task.model_id == first
            await client.train(task, value)
            await committed(federation, session_id, number)
        assert await result(federation, session_id) == 7
        last = (await federation.session(session_id))["session_config"]["model_id"]
        trail = await federation.call("GET", f"/api/v1/models/{last}/ancestors?include_self=true")
        assert len(trail) == 4, "the seed and a model a round"


async def test_a_terminated_session_goes_on_also_after_a_restart_and_its_old_tasks_stay_late(tmp_path: Path) -> None:
    async with Federation(data_dir=tmp_path) as federation, clients(federation, "a") as (client,):
        session_id = await started(federation, rounds=2)
        await client.train(await client.task(), 3)
        old = await client.task()
        assert (old.round, old.attempt) == (2, 1)
        await federation.call("PATCH", f"/api/v1/sessions/{session_id}", json={"status": "Terminated"})
    async with Federation(data_dir=tmp_path) as federation, clients(federation, "a") as (client,):
        await federation.start(session_id, rounds=1)
        task = await client.task()
        assert (task.round, task.attempt, task.model_id) == (2, 2, old.model_id)
        assert (await client.train(old, 9)).verdict == pb.VERDICT_LATE
        await client.train(task, 5)
        assert await result(federation, session_id) == 5


@on_virtual_time
async def test_a_failed_session_goes_on_and_may_fail_as_often_as_a_new_one(world: World) -> None:
    (a,) = await world.clients("a")
    session_id = await world.started(round_retries=1)
    for attempt in (1, 2):
        assert (await a.task()).attempt == attempt
    assert (await world.ended(session_id)).status is Status.FAILED
    assert await world.scheduler.start(session_id) == ("done", "")
    for attempt in (3, 4):
        task = await a.task()
        assert task.attempt == attempt
    await a.train(task, 3)
    assert await world.result(session_id) == 3
    assert (await world.ended(session_id)).reason == ""


# ---- why not


async def test_a_session_that_cannot_start_says_why_at_the_call() -> None:
    async with Federation() as federation, clients(federation, "a"):
        session_id = await federation.create_session(await federation.add_seed(filled(0)), rounds=1, clients_required=2)
        too_few = "Number of available clients is lower than the required minimum of 2 (1 attached)"
        for asked, why in ((session_id, too_few), ("nowhere", "Session with specified ID does not exist")):
            reply = await federation.http.post("/api/v1/sessions/start", json={"session_id": asked})
            assert (reply.status_code, reply.json()) == (400, {"message": why})
        assert (await federation.session(session_id))["status"] == "Created"


async def test_while_it_waits_a_session_explains_for_whom_and_until_when() -> None:
    async with Federation() as federation, clients(federation, "a", "b") as (a, b):
        session_id = await started(federation, round_timeout=100_000)
        explain = f"/api/v1/sessions/{session_id}/explain"
        await a.task()
        await b.train(await b.task(), 3)
        standing, waiting = await federation.call("GET", explain, "sentences")
        assert standing == f"session {session_id} is running: 0 of 1 rounds are committed"
        assert waiting == "round 1, attempt 1: waiting for 1 of 2 clients (a); deadline in 27 h"
        since = await online(federation, "a")
        a.stream.cancel()
        await federation.event("client", after=since, client_id="a", status="offline")
        waiting = (await federation.call("GET", explain, "sentences"))[1]
        assert waiting.startswith("round 1, attempt 1: waiting for 1 of 2 clients (a); a last seen ")
        await federation.call("PATCH", f"/api/v1/sessions/{session_id}", json={"status": "Terminated"})
        assert await federation.call("GET", explain, "sentences") == [
            f"session {session_id} was terminated: stopped; 0 of 1 rounds are committed"
        ]


# ---- a bug of ours


async def test_a_bug_in_one_session_ends_it_with_an_incident_and_the_other_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Federation() as federation, clients(federation, "a") as (client,):
        broken, other = await started(federation), await started(federation, rounds=2)
        task, others_task = await client.task(), await client.task()

        def buggy(session: Session, event: Event, at: float) -> list[Effect]:
            if session.record.id == broken and isinstance(event, UpdateReceived):
                raise ZeroDivisionError("a bug of ours")
            return step(session, event, at)

        monkeypatch.setattr(session_task, "step", buggy)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.train(task, 9, update_id="u1")
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        incident = (refused.value.details() or "").removeprefix("SendModelUpdate: ")
        session = await federation.ended(broken)
        assert (session["status"], session["status_reason"]) == ("Failed", incident)
        assert incident.startswith("incident ")
        monkeypatch.undo()
        late = await client.report(task, "u1")
        assert (late.verdict, late.reason) == (pb.VERDICT_LATE, "round 1 is over")
        await client.train(others_task, 3)
        await client.train(await client.task(), 5)
        assert await result(federation, other) == 5
        await federation.start(broken, wait_for_clients_s=0)
        await client.train(await client.task(), 7)
        assert await result(federation, broken) == 7


# ---- what stays


@on_virtual_time
async def test_updates_are_deleted_with_their_round_or_kept_if_the_session_says_so(world: World) -> None:
    a, b = await world.clients("a", "b")
    for keep, values in ((False, []), (True, [1.0, 3.0, 4.0])):
        session_id = await world.started(rounds=2, min_clients=2, delete_models_storage=not keep)
        await a.train(await a.task(), 1)
        await b.train(await b.task(), 3)
        for client in (a, b):
            await client.train(await client.task(), 4)
        assert await world.result(session_id) == 4
        await asyncio.sleep(1)  # virtual: all that was under way is done
        kept = [key for key, _ in await world.scheduler.updates.keys()]
        assert all(key.startswith(f"{session_id}-") for key in kept)
        found = {value_of(codec.decode(await world.scheduler.updates.get(key))) for key in kept}
        assert (sorted(found), len(kept)) == (values, 4 if keep else 0)
        assert world.scheduler.workshop.spool.used_bytes == 0
