"""Who takes part in a round and how many updates it needs: on virtual time, over the real scheduler and its stores."""

from __future__ import annotations

import pytest

from fl_client.wire import fl_pb2 as pb
from fl_server.core.model import ClientId, Outcome, Status
from fl_server.errors import Invalid
from tests.server.virtual_world import VirtualClient, World, on_virtual_time


async def cohorts(world: World, session_id: str) -> list[list[str]]:
    return [found["fl"]["record"]["cohort"] for found in await world.rounds(session_id)]


def too_few(needed: int, attached: int) -> str:
    """FEDn's words, and how many there are."""
    return f"Number of available clients is lower than the required minimum of {needed} ({attached} attached)"


async def train_always(client: VirtualClient) -> None:
    while True:
        await client.train(await client.task(), 1)


@on_virtual_time
async def test_requested_clients_limits_the_cohort_and_draws_differently_each_round(world: World) -> None:
    everybody = await world.clients(*"abcdef")
    working = [world.group.create_task(train_always(client)) for client in everybody]
    sessions = [await world.started(rounds=8, requested_clients=2) for _ in range(2)]
    for session_id in sessions:
        assert await world.result(session_id) == 1
    for task in working:
        task.cancel()
    drawn = [await cohorts(world, session_id) for session_id in sessions]
    for of_session in drawn:
        assert [len(cohort) for cohort in of_session] == [2] * 8
        assert all(cohort == sorted(set(cohort)) and set(cohort) <= set("abcdef") for cohort in of_session)
        assert len({tuple(cohort) for cohort in of_session}) > 1
    assert drawn[0] != drawn[1], "each session draws for itself"


@on_virtual_time
async def test_a_client_that_was_not_drawn_is_asked_nothing_and_its_update_is_not_selected(world: World) -> None:
    clients = {client.id: client for client in await world.clients(*"abc")}
    session_id = await world.started(requested_clients=1)
    [[chosen]] = await cohorts(world, session_id)
    task = await clients[chosen].task()
    for client in set(clients.values()) - {clients[chosen]}:
        assert client.tasks.empty()
        theirs = pb.TaskRequest(model_id=task.model_id, data=task.data.replace(f"train/{chosen}", f"train/{client.id}"))
        assert await client.train(theirs, 9) == "NOT_SELECTED"
    assert await clients[chosen].train(task, 3) == "ACCEPTED"
    assert await world.result(session_id) == 3


@on_virtual_time
async def test_without_a_limit_below_their_number_everybody_is_asked(world: World) -> None:
    await world.clients(*"abc")
    for requested_clients in (0, 3, 100):
        session_id = await world.started(requested_clients=requested_clients)
        assert await cohorts(world, session_id) == [["a", "b", "c"]]


@on_virtual_time
async def test_who_comes_in_mid_round_takes_part_from_the_next_one(world: World) -> None:
    (a,) = await world.clients("a")
    session_id = await world.started(rounds=2)
    task = await a.task()
    (b,) = await world.clients("b")
    assert b.tasks.empty()
    await a.train(task, 1)
    await a.train(await a.task(), 3)
    await b.train(await b.task(), 5)
    assert await world.result(session_id) == 4
    assert await cohorts(world, session_id) == [["a"], ["a", "b"]]


# ---- how many are needed


@on_virtual_time
async def test_a_start_with_fewer_than_clients_required_is_refused_with_the_numbers(world: World) -> None:
    session_id = await world.session(min_clients=2)
    assert await world.scheduler.start(session_id) == (Outcome.REFUSED, too_few(2, 0))
    a, b = await world.clients("a", "b")
    await b.leave()
    assert await world.scheduler.start(session_id) == (Outcome.REFUSED, too_few(2, 1))
    assert (await world.ended(session_id)).status is Status.CREATED
    assert await world.rounds(session_id) == []
    await b.attach()
    assert await world.scheduler.start(session_id) == (Outcome.DONE, "")
    for client in (a, b):
        await client.train(await client.task(), 3)
    assert await world.result(session_id) == 3


@on_virtual_time
async def test_a_start_may_wait_for_its_clients_and_gives_up_when_they_do_not_come(world: World) -> None:
    session_id = await world.session(min_clients=2, round_retries=0)
    await world.clients("a")
    began_at = world.now
    assert await world.scheduler.start(session_id, wait_for_clients_s=25.0) == (Outcome.DONE, "")
    assert "1 of 2 clients needed are attached; gives up in 25 s" in await world.explained(session_id)
    record = await world.ended(session_id)
    assert (record.status, record.reason) == (Status.FAILED, "round 1: 1 of 2 clients attached")
    assert world.now == pytest.approx(began_at + 25)


@on_virtual_time
async def test_a_start_that_waits_goes_on_as_soon_as_there_are_enough(world: World) -> None:
    session_id = await world.session(min_clients=2)
    await world.scheduler.start(session_id, wait_for_clients_s=25.0)
    a, b = await world.clients("a", "b")
    await a.train(await a.task(), 1)
    await b.train(await b.task(), 3)
    assert await world.result(session_id) == 2


@on_virtual_time
async def test_clients_required_says_how_many_updates_a_commit_needs(world: World) -> None:
    a, b, _ = await world.clients("a", "b", "silent")
    session_id = await world.started(min_clients=2, round_retries=0)
    await a.train(await a.task(), 1)
    await b.train(await b.task(), 3)
    assert await world.result(session_id) == 2, "two of three at the deadline are enough"


# ---- buffer


@on_virtual_time
async def test_a_full_buffer_closes_the_round_and_the_others_are_late(world: World) -> None:
    everybody = await world.clients(*"abcd")
    session_id = await world.started(buffer_size=2)
    began_at = world.now
    tasks = [await client.task() for client in everybody]
    said = await world.explained(session_id)
    assert "closes with 2 updates, 0 so far" in said
    verdicts = [
        await client.train(task, value)
        for value, (client, task) in enumerate(zip(everybody, tasks, strict=True), start=1)
    ]
    assert verdicts == ["ACCEPTED", "ACCEPTED", "LATE", "LATE"]
    assert await world.result(session_id) == 1.5
    assert world.now < began_at + 1


@on_virtual_time
async def test_a_rejected_update_does_not_fill_the_buffer(world: World) -> None:
    a, b, c = await world.clients(*"abc")
    session_id = await world.started(buffer_size=1)
    tasks = await a.task(), await b.task(), await c.task()
    assert await a.train(tasks[0], float("inf")) == "REJECTED"
    assert await b.train(tasks[1], 3) == "ACCEPTED"
    assert await c.train(tasks[2], 9) == "LATE"
    assert await world.result(session_id) == 3


@on_virtual_time
async def test_a_buffer_smaller_than_clients_required_is_enough_for_a_commit(world: World) -> None:
    a, b = await world.clients("a", "b")
    session_id = await world.started(min_clients=2, buffer_size=1, rounds=2)
    missed = await b.task()
    await a.train(await a.task(), 1)
    await world.event("model", session_id=session_id, round=1)
    assert await b.train(missed, 9) == "LATE"
    await b.train(await b.task(), 5)
    assert await world.result(session_id) == 5


# ---- what a start may say


@on_virtual_time
async def test_a_start_sets_another_timeout_for_its_rounds(world: World) -> None:
    (a,) = await world.clients("a")
    session_id = await world.session(round_timeout_s=60.0, round_retries=0)
    began_at = world.now
    await world.scheduler.start(session_id, round_timeout_s=7.0)
    assert (await a.task()).deadline == pytest.approx(began_at + 7)
    assert (await world.ended(session_id)).status is Status.FAILED
    assert world.now == pytest.approx(began_at + 7)


@on_virtual_time
async def test_a_start_sets_another_number_of_rounds(world: World) -> None:
    (a,) = await world.clients("a")
    session_id = await world.session(rounds=5)
    await world.scheduler.start(session_id, rounds=1)
    await a.train(await a.task(), 3)
    assert await world.result(session_id) == 3
    assert (await world.ended(session_id)).model.round == 1


@on_virtual_time
async def test_only_the_clients_that_are_named_take_part_also_when_others_come_later(world: World) -> None:
    a, b, outsider = await world.clients("a", "b", "outsider")
    session_id = await world.session(rounds=2)
    await world.scheduler.start(session_id, client_ids=frozenset({ClientId("a"), ClientId("b"), ClientId("absent")}))
    (late_outsider,) = await world.clients("late outsider")
    for value in (1, 2):
        for client in (a, b):
            await client.train(await client.task(), value)
        await world.event("model", session_id=session_id, round=value)
    assert await world.result(session_id) == 2
    assert await cohorts(world, session_id) == [["a", "b"]] * 2
    assert outsider.tasks.empty()
    assert late_outsider.tasks.empty()


@on_virtual_time
async def test_a_start_with_too_few_of_the_named_clients_is_refused(world: World) -> None:
    await world.clients("a", "b")
    session_id = await world.session(min_clients=2)
    absent = frozenset({ClientId("a"), ClientId("absent")})
    assert await world.scheduler.start(session_id, client_ids=absent) == (Outcome.REFUSED, too_few(2, 1))
    one = await world.scheduler.start(session_id, client_ids=frozenset({ClientId("a")}))
    assert one == (Outcome.REFUSED, "client_ids: 1, below clients_required 2")


@on_virtual_time
async def test_a_session_whose_cohort_is_smaller_than_it_requires_is_refused_at_its_creation(world: World) -> None:
    with pytest.raises(ValueError, match="requested_clients: 1, below clients_required 2"):
        await world.session(min_clients=2, requested_clients=1)
    with pytest.raises(Invalid, match="model_id: no model nowhere"):
        await world.scheduler.create((await world.ended(await world.session())).config, name=None, model_id="nowhere")
