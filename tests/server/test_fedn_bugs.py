"""What FEDn 0.33 gets wrong, where the client on the wire sees it: each right thing under its own name.

Those that a file of its own shows are there: verdicts, sampling, packages, filters, predictions.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest

from fl_client import TrainResult
from fl_client.wire import codec
from fl_client.wire import fl_pb2 as pb
from fl_server.testing import Federation
from tests.server.wire_client import (
    WireClient,
    clients,
    committed,
    filled,
    port,
    result,
    started,
    value_of,
)


@pytest.fixture
async def federation() -> AsyncIterator[Federation]:
    async with Federation() as running:
        yield running


MANY = 400  # FEDn's combiner has 350 threads, and each stream holds one


async def test_four_hundred_clients_train_in_one_round_and_calls_are_still_answered() -> None:
    async with Federation(wait_s=120) as federation, AsyncExitStack() as stack:
        ids = [f"c{index:03}" for index in range(MANY)]
        made = [await stack.enter_async_context(WireClient(port(federation), id)) for id in ids]
        for client in made:
            client.attach()
        await federation.attached(MANY)
        session_id = await started(federation, clients_required=MANY, round_timeout=600)

        async def train(index: int, client: WireClient) -> None:
            reply = await client.train(await client.task(), float(index % 2))
            assert reply.verdict == pb.VERDICT_ACCEPTED

        async with asyncio.TaskGroup() as tasks:
            for index, client in enumerate(made):
                tasks.create_task(train(index, client))
        assert await result(federation, session_id) == 0.5
        page = await federation.call("GET", "/api/v1/rounds/")
        [round] = page["result"]
        data = round["combiners"][0]["data"]
        assert (data["nr_expected_updates"], data["aggregation_time"]["nr_aggregated_models"]) == (MANY, MANY)
        heartbeat = pb.Heartbeat(sender=pb.Client(name=ids[-1], client_id=ids[-1], role=pb.CLIENT))
        assert (await made[-1].ask("Connector", "SendHeartbeat", heartbeat)).response == "Heartbeat received"


async def test_a_selected_client_whose_id_holds_anothers_does_not_select_the_other(federation: Federation) -> None:
    async with clients(federation, "a", "ab") as (short, long):
        session_id = await federation.create_session(await federation.add_seed(filled(0)), rounds=1)
        await federation.start(session_id, client_ids="ab", wait_for_clients_s=0)
        assert (await long.train(await long.task(), 2)).verdict == pb.VERDICT_ACCEPTED
        assert await result(federation, session_id) == 2
        following = await started(federation, clients_required=2)
        assert (await short.task()).session_id == following, "it was asked to train for the first session"


async def test_only_the_selected_clients_validate(federation: Federation) -> None:
    async with clients(federation, "a", "b", "c") as (a, b, c):
        session_id = await federation.create_session(await federation.add_seed(filled(0)), rounds=1, validate=True)
        await federation.start(session_id, client_ids="a,b", wait_for_clients_s=0)
        for client in (a, b):
            await client.train(await client.task(), 1)
        for client in (a, b):
            task = await client.task()
            assert task.type == pb.MODEL_VALIDATION
            await client.validate(task, accuracy=0.0)
        await federation.ended(session_id)
        page = await federation.call("GET", "/api/v1/validations/", params={"session_id": session_id})
        assert {validation["sender"]["client_id"] for validation in page["result"]} == {"a", "b"}
        following = await started(federation, clients_required=3)
        assert (await c.task()).session_id == following, "it was asked to validate"


async def test_terminated_stops_a_session_at_once_and_the_next_one_starts(federation: Federation) -> None:
    async with clients(federation, "a", "b") as (a, b):
        session_id = await started(federation, rounds=5, clients_required=2, round_timeout=3600)
        task, _ = await a.task(), await b.task()
        patched = await federation.call("PATCH", f"/api/v1/sessions/{session_id}", json={"status": "Terminated"})
        assert patched["status"] == "Terminated"
        following = await started(federation, clients_required=2)
        assert (await a.train(task, 1)).verdict == pb.VERDICT_LATE
        for client in (a, b):
            await client.train(await client.task(), 3)
        assert await result(federation, following) == 3
        assert (await federation.session(session_id))["status"] == "Terminated"


async def test_an_update_that_comes_late_does_not_leak_into_the_next_sessions_model(federation: Federation) -> None:
    async with clients(federation, "a", "b") as (a, b):
        first = await started(federation, clients_required=2, buffer_size=1)
        late = await b.task()
        await a.train(await a.task(), 1)
        await federation.ended(first)
        following = await started(federation, clients_required=2)
        assert (await b.train(late, 100)).verdict == pb.VERDICT_LATE
        for client in (a, b):
            await client.train(await client.task(), 2)
        assert await result(federation, following) == 2


async def test_a_train_callback_that_fails_does_not_hold_the_round() -> None:
    def train(parameters: Sequence[np.ndarray], settings: dict[str, Any]) -> TrainResult:
        return TrainResult([array + 1 for array in parameters], num_examples=1)

    def fail(parameters: Sequence[np.ndarray], settings: dict[str, Any]) -> TrainResult:
        raise RuntimeError("out of memory")

    async with Federation(train=train, clients=2) as federation:
        federation.add_client("failing", train=fail)
        await federation.attached(3)
        session_id = await started(federation, rounds=3, clients_required=2, round_timeout=3600)
        assert await result(federation, session_id) == 3
        told = await federation.event("update", session_id=session_id, client_id="failing")
        assert told.data["verdict"] == "rejected" and "out of memory" in told.data["reason"]


async def test_round_numbers_go_on_as_numbers_and_are_found_though_they_are_text(federation: Federation) -> None:
    """FEDn's tenth round comes after its ninth as text, and its filter looks for a number."""
    async with clients(federation, "a") as (a,):
        session_id = await started(federation, rounds=12)
        for number in range(1, 13):
            await a.train(await a.task(), number)
            await committed(federation, session_id, number)
        await federation.ended(session_id)
        found = await federation.call("GET", "/api/v1/rounds/", params={"round_id": "11"})
        assert [round["round_id"] for round in found["result"]] == ["11"]
        several = await federation.call("POST", "/api/v1/rounds/list", json={"round_id": "9,10, 12"})
        assert {round["round_id"] for round in several["result"]} == {"9", "10", "12"}
        assert await federation.call("POST", "/api/v1/rounds/count", data={"round_id": "9,10"}) == 2


@pytest.mark.parametrize(
    ("config", "named"),
    [({"helper_type": "nohelper"}, "helper_type"), ({"aggregator": "noaggregator"}, "aggregator")],
)
async def test_a_session_that_could_never_run_is_refused_at_creation_and_the_next_one_runs(
    federation: Federation, config: dict[str, str], named: str
) -> None:
    async with clients(federation, "a") as (a,):
        wanted = {"model_id": await federation.add_seed(filled(0)), **config}
        refused = await federation.http.post("/api/v1/sessions/", json={"session_config": wanted})
        assert refused.status_code == 400 and refused.json()["message"].startswith(named)
        following = await started(federation)
        await a.train(await a.task(), 1)
        assert await result(federation, following) == 1


async def test_the_seed_of_another_session_is_never_what_a_session_goes_on_from(federation: Federation) -> None:
    """FEDn goes on from the newest model of the whole database when a session has none of its own."""
    async with clients(federation, "a") as (a,):
        session_id = await federation.create_session(await federation.add_seed(filled(5)), rounds=1)
        await federation.add_seed(filled(1000))
        await federation.start(session_id, wait_for_clients_s=0)
        task = await a.task()
        stored = b"".join([message.data for message in await a.download(task.model_id)])
        assert value_of(codec.decode(stored)) == 5
        await a.train(task, 6)
        assert await result(federation, session_id) == 6
