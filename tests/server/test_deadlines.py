"""When a round is over, and what becomes of it: on virtual time, over the real scheduler and its stores."""

from __future__ import annotations

import asyncio

import pytest

from fl_client.wire import fl_pb2 as pb
from fl_server.core.model import Status
from tests.server.virtual_world import World, on_virtual_time


async def rounds_of(world: World, session_id: str) -> list[tuple[str, str]]:
    """Status and reason of each attempt, as users see them."""
    return [(found["status"], found["fl"]["record"]["reason"]) for found in await world.rounds(session_id)]


@on_virtual_time
async def test_a_deadline_with_enough_updates_closes_the_round_with_those(world: World) -> None:
    a, b, _ = await world.clients("a", "b", "silent")
    session_id = await world.started(min_clients=2)
    task, issued_at = await a.task(), world.now
    assert task.deadline == pytest.approx(issued_at + 60)
    assert await a.train(task, 1) == "ACCEPTED"
    assert await b.train(await b.task(), 3) == "ACCEPTED"
    assert await world.result(session_id) == 2
    assert world.now == pytest.approx(issued_at + 60)


@on_virtual_time
async def test_a_round_that_all_have_reported_to_does_not_wait_for_its_deadline(world: World) -> None:
    a, b = await world.clients("a", "b")
    session_id = await world.started()
    began_at = world.now
    await a.train(await a.task(), 1)
    await b.train(await b.task(), 3)
    assert await world.result(session_id) == 2
    assert world.now < began_at + 1


@on_virtual_time
async def test_a_deadline_with_too_few_updates_fails_the_attempt_and_after_the_retries_the_session(
    world: World,
) -> None:
    a, _ = await world.clients("a", "silent")
    session_id = await world.started(min_clients=2, round_retries=2, retry_wait_s=5.0)
    began_at = world.now
    issued_at = []
    for attempt in (1, 2, 3):
        task = await a.task()
        assert (task.round, task.attempt) == (1, attempt)
        issued_at.append(world.now - began_at)
        assert await a.train(task, attempt) == "ACCEPTED"
    record = await world.ended(session_id)
    reason = "1 of 2 updates, 0 rejected"
    assert (record.status, record.reason) == (Status.FAILED, f"round 1: {reason}")
    assert issued_at == pytest.approx([0, 65, 130])
    assert world.now - began_at == pytest.approx(190)
    assert await rounds_of(world, session_id) == [*[("Failed", reason)] * 2, ("Failed", f"round 1: {reason}")]
    assert f"session {session_id} has failed: round 1: {reason}" in await world.explained(session_id)


@on_virtual_time
async def test_an_attempt_that_failed_is_forgotten_when_the_next_one_succeeds(world: World) -> None:
    a, b = await world.clients("a", "b")
    session_id = await world.started(min_clients=2)
    first = await a.task()
    await a.train(first, 9)
    await b.task()  # and never comes back to it
    second = await a.task()
    assert "tried again" not in await world.explained(session_id)
    assert second.correlation_id != first.correlation_id
    await a.train(second, 1)
    await b.train(await b.task(), 3)
    assert await world.result(session_id) == 2, "an update counts for its own attempt"
    assert (await world.ended(session_id)).reason == ""
    assert await rounds_of(world, session_id) == [("Failed", "1 of 2 updates, 0 rejected"), ("Finished", "")]


@on_virtual_time
async def test_while_it_pauses_after_a_failed_attempt_the_session_says_why(world: World) -> None:
    (a,) = await world.clients("a")
    session_id = await world.started(retry_wait_s=30.0)
    await a.task()
    await world.event("round", session_id=session_id, phase="failed")
    said = await world.explained(session_id)
    assert "the last attempt failed (0 of 1 updates, 0 rejected); tried again in 30 s" in said
    await a.train(await a.task(), 3)
    assert await world.result(session_id) == 3


@on_virtual_time
async def test_updates_that_are_all_rejected_fail_the_attempt_at_once(world: World) -> None:
    (a,) = await world.clients("a")
    session_id = await world.started(round_retries=0)
    began_at = world.now
    assert await a.train(await a.task(), float("nan")) == "REJECTED"
    record = await world.ended(session_id)
    assert (record.status, record.reason) == (Status.FAILED, "round 1: 0 of 1 updates, 1 rejected")
    assert world.now == began_at


@on_virtual_time
async def test_an_update_after_the_deadline_is_late_and_not_counted(world: World) -> None:
    a, slow = await world.clients("a", "slow")
    session_id = await world.started(rounds=2)
    missed = await slow.task()
    await a.train(await a.task(), 3)
    await world.event("model", session_id=session_id, round=1)
    assert await slow.train(missed, 9) == "LATE"
    await a.train(await a.task(), 5)
    await slow.train(await slow.task(), 7)
    assert await world.result(session_id) == 6
    assert await slow.train(missed, 9) == "LATE"


# ---- clients


@on_virtual_time
async def test_a_client_killed_in_mid_training_holds_its_round_to_the_deadline_and_no_longer(world: World) -> None:
    a, b, killed = await world.clients("a", "b", "killed")
    session_id = await world.started(min_clients=2, rounds=2)
    began_at = world.now
    await killed.task()
    await a.train(await a.task(), 1)
    await b.train(await b.task(), 3)
    await killed.leave()
    await asyncio.sleep(20)
    said = await world.explained(session_id)
    assert "waiting for 1 of 3 clients (killed); killed last seen 20 s ago; deadline in 40 s" in said
    await world.event("model", session_id=session_id, round=1)
    assert world.now == pytest.approx(began_at + 60)
    await a.train(await a.task(), 5)
    await b.train(await b.task(), 7)
    assert await world.result(session_id) == 6, "the next round does not wait for it"
    assert world.now == pytest.approx(began_at + 60)


@on_virtual_time
async def test_a_client_that_comes_back_before_the_deadline_gets_its_task_again_and_is_counted(world: World) -> None:
    a, back = await world.clients("a", "back")
    session_id = await world.started()
    task = await back.task()
    await a.train(await a.task(), 1)
    await back.leave()
    await asyncio.sleep(50)
    await back.attach()
    again = await back.task()
    assert (again.correlation_id, again.deadline) == (task.correlation_id, task.deadline)
    assert await back.train(again, 3) == "ACCEPTED"
    assert await world.result(session_id) == 2


@on_virtual_time
async def test_too_few_clients_for_the_next_round_fail_the_session_with_who_is_missing(world: World) -> None:
    a, b = await world.clients("a", "b")
    session_id = await world.started(rounds=2, min_clients=2, selection_timeout_s=100.0, round_retries=0)
    first = await a.task(), await b.task()
    await b.leave()
    for client, task in zip((a, b), first, strict=True):
        await client.train(task, 3)  # b's last report, on a connection of its own
    await world.event("model", session_id=session_id, round=1)
    selecting_from = world.now
    assert "1 of 2 clients needed are attached; b last seen 0 s ago" in await world.explained(session_id)
    record = await world.ended(session_id)
    reason = "round 2: 1 of 2 clients attached; b last seen 100 s ago"
    assert (record.status, record.reason, record.model.round) == (Status.FAILED, reason, 1)
    assert world.now == pytest.approx(selecting_from + 100)
    assert await rounds_of(world, session_id) == [("Finished", ""), ("Failed", reason)]


@on_virtual_time
async def test_a_round_waits_for_its_clients_and_goes_on_when_they_come(world: World) -> None:
    a, b = await world.clients("a", "b")
    session_id = await world.started(rounds=2, min_clients=2)
    tasks = await a.task(), await b.task()
    await b.leave()
    await a.train(tasks[0], 1)
    await b.train(tasks[1], 1)
    await world.event("model", session_id=session_id, round=1)
    await asyncio.sleep(200)
    await b.attach()
    await a.train(await a.task(), 3)
    await b.train(await b.task(), 5)
    assert await world.result(session_id) == 4


# ---- the clock and the store


@on_virtual_time
async def test_a_timer_that_rings_early_is_set_again(world: World) -> None:
    (a,) = await world.clients("a")
    session_id = await world.started(round_retries=0)
    task, began_at = await a.task(), world.now
    world.clock_is_off_s = -30.0  # the server's clock was set back: when the timer rings, it is too early
    record = await world.ended(session_id)
    assert record.reason == "round 1: 0 of 1 updates, 0 rejected"
    assert world.now == pytest.approx(began_at + 90)
    assert await a.train(task, 9) == "LATE"


@on_virtual_time
async def test_a_deadline_that_has_passed_counts_though_the_timer_has_not_rung(world: World) -> None:
    a, b = await world.clients("a", "b")
    session_id = await world.started()
    tasks = await a.task(), await b.task()
    began_at = world.now
    await a.train(tasks[0], 3)
    world.clock_is_off_s = 61.0
    await world.clients("passer-by")  # anything that happens
    assert await world.result(session_id) == 3
    assert world.now < began_at + 1
    assert await b.train(tasks[1], 9) == "LATE"


@on_virtual_time
async def test_a_store_that_is_away_for_long_moves_the_deadline(world: World) -> None:
    a, b = await world.clients("a", "b")
    session_id = await world.started()
    tasks, began_at = (await a.task(), await b.task()), world.now
    await asyncio.sleep(50)
    world.store.away = True
    report = asyncio.ensure_future(a.train(tasks[0], 1))
    await asyncio.sleep(20)
    assert "a store has been away for 20 s" in await world.explained(session_id)
    world.store.away = False
    assert await report == "ACCEPTED"
    await asyncio.sleep(began_at + 75 - world.now)  # the deadline as it was has passed
    assert await b.train(tasks[1], 3) == "ACCEPTED"
    assert await world.result(session_id) == 2


# ---- validation


@on_virtual_time
async def test_the_last_validation_is_waited_for_until_its_deadline(world: World) -> None:
    a, b = await world.clients("a", "silent")
    session_id = await world.started(validate=True, validation_timeout_s=40.0)
    await a.train(await a.task(), 3)
    await b.train(await b.task(), 3)
    began_at = world.now
    task = await a.task()
    assert (task.type, task.deadline) == (pb.MODEL_VALIDATION, pytest.approx(began_at + 40))
    await a.validate(task)
    await asyncio.sleep(10)
    assert "1 report so far, waiting for silent, at most 30 s more" in await world.explained(session_id)
    assert await world.result(session_id) == 3
    assert world.now == pytest.approx(began_at + 40)


@on_virtual_time
async def test_a_client_that_leaves_is_not_waited_for_in_the_last_validation(world: World) -> None:
    a, b = await world.clients("a", "b")
    session_id = await world.started(validate=True)
    await a.train(await a.task(), 3)
    await b.train(await b.task(), 3)
    began_at = world.now
    await a.validate(await a.task())
    await b.leave()
    assert await world.result(session_id) == 3
    assert world.now == began_at


@on_virtual_time
async def test_a_validation_that_is_late_is_stored_and_holds_no_round(world: World) -> None:
    a, slow = await world.clients("a", "slow")
    session_id = await world.started(rounds=2, validate=True)
    began_at = world.now
    await a.train(await a.task(), 1)
    await slow.train(await slow.task(), 1)
    await a.validate(await a.task())
    missed = await slow.task()
    assert missed.type == pb.MODEL_VALIDATION
    await a.train(await a.task(), 3)
    await slow.train(await slow.task(), 3)  # it took its training task first
    for client in (a, slow):
        await client.validate(await client.task())
    assert await world.result(session_id) == 3
    assert world.now < began_at + 1
    await slow.validate(missed)
    assert (await world.ended(session_id)).status is Status.FINISHED
