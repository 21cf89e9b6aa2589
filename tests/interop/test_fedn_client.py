"""The real FEDn 0.33.0 client, unmodified, over the death of our server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import httpx
import pytest

from fl_server.services import Mongod, Weed
from fl_server.store.s3 import S3
from fl_server.testing import ServerProcess
from tests.crash.processes import on
from tests.interop.fedn_world import (
    ROUND_SHIFT,
    SHARDS,
    ended,
    listed,
    processes,
    start_session,
    trail,
    until,
    value_of,
)

# A FEDn client redials 10 s after it lost the server, and 20 s after that.
SESSION_TIMEOUT_S = 150.0
AWAY_S = 15.0


async def test_fedn_clients_finish_a_session_whose_server_was_killed_after_the_first_round(
    tmp_path: Path, server_arguments: list[str]
) -> None:
    async with processes(tmp_path) as ours, ServerProcess(tmp_path / "data", *server_arguments) as server:
        async with asyncio.timeout(SESSION_TIMEOUT_S):
            clients = {
                client_id: await ours.client_start(client_id, "--api-url", server.api_url, "--local-package")
                for client_id in SHARDS
            }
            async with httpx.AsyncClient(base_url=server.api_url, timeout=90) as api:
                session_id, seed_model_id = await start_session(api, rounds=3)

                async def first_round_committed() -> bool:
                    return len(await listed(api, "models", session_id=session_id)) >= 1

                await until(api, first_round_committed)
                await server.kill()

            await server.start()
            async with httpx.AsyncClient(base_url=server.api_url, timeout=90) as api:
                models = await listed(api, "models", session_id=session_id)
                assert len(models) < 3, "killed too late to show anything"
                session = await ended(api, session_id)
                assert session["status"] == "Finished", session
                models_by_round = await trail(api, session_id, seed_model_id)
                assert [await value_of(api, model_id) for model_id in models_by_round] == [
                    number * ROUND_SHIFT for number in (1, 2, 3)
                ]
                validations = await listed(api, "validations", session_id=session_id)
                rounds = await listed(api, "rounds", round_config__session_id=session_id, status="Finished")
                told = [round["combiners"][0]["data"] for round in rounds]
                assert [data["nr_expected_updates"] for data in told] == [2, 2, 2]
                assert [data["aggregation_time"]["nr_aggregated_models"] for data in told] == [2, 2, 2]

        means = {(v["sender"]["client_id"], v["model_id"]): json.loads(v["data"])["mean"] for v in validations}
        assert len(means) == len(validations), "a validation is stored twice"
        # The kill may fall into the validation of the first model; a later one is done before the next round's task.
        for number, model_id in enumerate(models_by_round[1:], start=2):
            for client_id in SHARDS:
                assert means[client_id, model_id] == number * ROUND_SHIFT
        assert {client_id: process.returncode for client_id, process in clients.items()} == dict.fromkeys(SHARDS)


@pytest.mark.long
async def test_fedn_clients_live_through_an_outage_of_both_stores(tmp_path: Path) -> None:
    mongod, weed = Mongod(tmp_path / "mongod"), Weed(tmp_path / "weed")
    async with contextlib.AsyncExitStack() as stack:
        for service in (mongod, weed):
            await service.start()
            stack.push_async_callback(service.kill)
        where = on(mongod.url, S3(weed.url, weed.access_key, weed.secret_key))
        server = ServerProcess(tmp_path / "data", *where.arguments, environment=where.environment)
        await stack.enter_async_context(server)
        ours = await stack.enter_async_context(processes(tmp_path))
        api = await stack.enter_async_context(httpx.AsyncClient(base_url=server.api_url, timeout=90))
        await stack.enter_async_context(asyncio.timeout(SESSION_TIMEOUT_S))
        clients = [
            await ours.client_start(client_id, "--api-url", server.api_url, "--local-package") for client_id in SHARDS
        ]
        session_id, seed_model_id = await start_session(api, rounds=3)

        async def first_round_committed() -> bool:
            return len(await listed(api, "models", session_id=session_id)) >= 1

        await until(api, first_round_committed)
        await asyncio.gather(mongod.kill(), weed.kill())
        await asyncio.sleep(AWAY_S)  # it is an outage of so long
        assert (await api.get("/ready")).status_code == 503
        assert (await api.get("/health")).status_code == 200
        await asyncio.gather(mongod.start(), weed.start())
        assert (await ended(api, session_id))["status"] == "Finished"
        models = await trail(api, session_id, seed_model_id)
        assert [await value_of(api, model_id) for model_id in models] == [number * ROUND_SHIFT for number in (1, 2, 3)]
        assert [process.returncode for process in clients] == [None] * len(SHARDS), "they live"
        log = server.log.read_text()
        assert (log.count("store away"), log.count("store back")) == (1, 1), server.tail()
