"""Prediction runs: who is attached, or attaches while the run is open, is asked, and each answer is kept."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from fl_client import APIClient, Client, TrainResult
from fl_client.api import EventParser
from fl_client.package import Package
from fl_client.task import TaskInfo
from fl_client.wire import codec
from fl_client.wire import fl_pb2 as pb
from fl_server.scheduler.predictions import Wanted
from fl_server.testing import QUICK, Federation, ServerProcess
from tests.server.rest_world import serving
from tests.server.virtual_world import SEED, World, on_virtual_time
from tests.server.wire_client import WireClient, clients

START = "/api/v1/predictions/start"
WAIT_S = 30.0


def unused(parameters: codec.Parameters, task: TaskInfo) -> TrainResult:
    raise AssertionError("nothing is trained here")


def prediction_of(task: pb.TaskRequest, client: str, data: str = "[1]") -> pb.ModelPrediction:
    """As FEDn's client makes it."""
    return pb.ModelPrediction(
        sender=pb.Client(name=client, role=pb.CLIENT),
        receiver=pb.Client(name=task.sender.name, role=task.sender.role),
        model_id=task.model_id,
        data=data,
        correlation_id=task.correlation_id,
        prediction_id=task.session_id,
    )


async def predictions(http: httpx.AsyncClient, **where: str) -> list[dict[str, Any]]:
    reply = (await http.get("/api/v1/predictions/", params=where, headers={"X-Sort-Order": "asc"})).raise_for_status()
    page = reply.json()
    assert page["count"] == len(page["result"])
    return list(page["result"])


async def heard(http: httpx.AsyncClient, kind: str, **data: str) -> None:
    """Returns once the server, in this life, has told such an event."""
    parser, params = EventParser(), {"after": 0}
    async with asyncio.timeout(WAIT_S), http.stream("GET", "/api/v1/events", params=params, timeout=WAIT_S) as stream:
        async for chunk in stream.aiter_raw():
            if any(event.kind == kind and data.items() <= event.data.items() for event in parser.feed(chunk)):
                return


async def attached(http: httpx.AsyncClient, *clients: WireClient) -> None:
    for client in clients:
        client.attach()
    for client in clients:
        await heard(http, "client", client_id=client.id, status="online")


async def test_every_clients_prediction_is_kept_and_found_by_the_run() -> None:
    def predict(parameters: codec.Parameters, task: TaskInfo) -> object:
        if task.client_id == "c1":
            raise ValueError("no data here")
        return {"client": task.client_id, "sum": float(parameters[0].sum())}

    async with Federation(train=unused, predict=predict, clients=2) as federation:
        await federation.add_seed([np.zeros(3)])
        newest = await federation.add_seed([np.ones(3)])
        await federation.attached(2)
        api = APIClient(federation.server.api_url)
        answer = await asyncio.to_thread(api.start_predictions, "run")
        assert answer == {"message": "Prediction session started"}
        ended = await federation.event("prediction", prediction_id="run", status="finished")
        assert ended.data["reported"] == 2
        rows = await predictions(federation.http, prediction_id="run")
        assert {row["sender"]["client_id"]: json.loads(row["data"]) for row in rows} == {
            "c0": {"client": "c0", "sum": 3.0},
            "c1": None,  # what a FEDn client sends then
        }
        assert [json.loads(row["meta"]) for row in rows if row["meta"]] == [{"failure": "ValueError: no data here"}]
        assert {(row["prediction_id"], row["model_id"]) for row in rows} == {("run", newest)}
        assert len({row["record_id"] for row in rows}) == 2
        assert (await asyncio.to_thread(api.get_predictions))["count"] == 2
        assert await federation.call("GET", "/api/v1/predictions/count") == 2
        for id in ("run", rows[1]["record_id"]):
            assert await federation.call("GET", f"/api/v1/predictions/{id}") == rows[1]


async def test_fedns_client_finds_what_it_reads_in_the_task_and_a_retry_is_stored_once() -> None:
    async with Federation() as federation, clients(federation, "a") as [a]:
        model_id = await federation.add_seed([np.zeros(3)], helper=codec.BINARY)
        await federation.call("POST", START, json={"prediction_id": "run", "model_id": model_id})
        task = await a.task()
        assert (task.type, task.session_id, task.model_id) == (pb.MODEL_PREDICTION, "run", model_id)
        assert (task.sender.role, json.loads(task.data), task.helper) == (pb.COMBINER, {}, codec.BINARY)
        assert task.correlation_id
        for _ in range(2):
            reply = await a.ask("Combiner", "SendModelPrediction", prediction_of(task, "a"))
            assert reply.response == "RECEIVED ModelPrediction from client a"
        await federation.event("prediction", prediction_id="run", status="finished")
        [row] = await predictions(federation.http)
        assert (row["correlation_id"], row["data"]) == (task.correlation_id, "[1]")


async def test_who_attaches_while_the_run_is_open_is_asked_and_who_has_answered_is_not_asked_again() -> None:
    async with Federation() as federation, clients(federation, "a", "b") as (a, b):
        await federation.add_seed([np.zeros(3)])
        await federation.call("POST", START, json={"prediction_id": "run"})
        await a.ask("Combiner", "SendModelPrediction", prediction_of(await a.task(), "a"))
        async with clients(federation, "c") as [c]:
            asked = await c.task()
            assert asked.session_id == "run"
            await federation.call("POST", START, json={"prediction_id": "again"})
            a.attach()  # what has not been read goes with the former stream
            assert (await a.task()).session_id == "again"
            for client, task in ((b, await b.task()), (c, asked)):
                await client.ask("Combiner", "SendModelPrediction", prediction_of(task, client.id))
            ended = await federation.event("prediction", prediction_id="run", status="finished")
            assert ended.data["reported"] == 3


async def test_the_same_start_again_is_the_same_run_and_another_use_of_the_id_is_refused() -> None:
    async with Federation() as federation, clients(federation, "a") as [a]:
        first = await federation.add_seed([np.zeros(3)])
        second = await federation.add_seed([np.zeros(3)])
        for body in ({"model_id": first}, {"model_id": first}, {}):
            await federation.call("POST", START, json={"prediction_id": "run", **body})
        refused = await federation.http.post(START, json={"prediction_id": "run", "model_id": second})
        assert refused.status_code == 409
        await a.ask("Combiner", "SendModelPrediction", prediction_of(await a.task(), "a"))
        await federation.event("prediction", prediction_id="run", status="finished")
        used = await federation.http.post(START, json={"prediction_id": "run", "model_id": first})
        assert (used.status_code, used.json()) == (409, {"message": "prediction_id: run was used before"})
        assert len(await predictions(federation.http)) == 1


@on_virtual_time
async def test_a_run_ends_when_its_time_is_over_and_what_comes_later_is_kept_all_the_same(world: World) -> None:
    a, b = await world.clients("a", "b")
    began_at = world.now
    await world.scheduler.predictions.start(Wanted("run", SEED, 90.0))
    task = await a.task()
    assert task.deadline == pytest.approx(world.scheduler.clock() + 90.0)
    await a._servicer.SendModelPrediction(prediction_of(task, "a"), a._context())
    await b.leave()
    ended = await world.event("prediction", prediction_id="run", status="timed out")
    assert (ended.data["reported"], ended.data["missing"]) == (1, 1)
    assert world.now == pytest.approx(began_at + 90.0)
    await b.attach()
    assert b.tasks.qsize() == 1, "the one that it had before it left"
    await b._servicer.SendModelPrediction(prediction_of(await b.task(), "b"), b._context())
    ids = [event.data["client_id"] for event in world.scheduler.feed._recent if event.data.get("status") == "reported"]
    assert ids == ["a", "b"]


async def test_an_open_run_outlives_a_kill_of_the_server(tmp_path: Path) -> None:
    """Who has answered is not asked again, who has not is; the run then ends, and an ended one stays so."""
    async with ServerProcess(tmp_path / "data") as server, httpx.AsyncClient(base_url=server.api_url) as http:
        seed = {"file": ("seed.npz", codec.encode([np.zeros(3)]))}
        (await http.post("/api/v1/models/", files=seed)).raise_for_status()

        async with WireClient(server.grpc_port, "a") as a, WireClient(server.grpc_port, "b") as b:
            await attached(http, a, b)
            (await http.post(START, json={"prediction_id": "run"})).raise_for_status()
            await a.ask("Combiner", "SendModelPrediction", prediction_of(await a.task(), "a", "[1]"))
            await server.kill()
        await server.start()
        async with WireClient(server.grpc_port, "a") as a, WireClient(server.grpc_port, "b") as b:
            b.attach()
            task = await b.task()
            assert task.session_id == "run"
            await attached(http, a)
            await b.ask("Combiner", "SendModelPrediction", prediction_of(task, "b", "[2]"))
            rows = await predictions(http, prediction_id="run")
            assert [row["data"] for row in rows] == ["[1]", "[2]"]
            (await http.post(START, json={"prediction_id": "next"})).raise_for_status()
            assert (await a.task()).session_id == "next", "nothing of the former run came before"
        await server.kill()
        await server.start()
        async with WireClient(server.grpc_port, "c") as c:
            c.attach()
            assert (await c.task()).session_id == "next", "the ended run is not begun again"
            assert (await http.post(START, json={"prediction_id": "run"})).status_code == 409


async def test_a_compute_package_predicts(tmp_path: Path) -> None:
    folder = tmp_path / "client"
    folder.mkdir()
    (folder / "fedn.yaml").write_text(
        "entry_points:\n  train: {command: 'false'}\n  predict: {command: sh predict.sh}\n"
    )
    (folder / "predict.sh").write_text('printf \'{"file": "%s", "helper": "%s"}\' "${1##*/}" "$FL_HELPER_TYPE" > "$2"')
    async with Federation() as federation, asyncio.TaskGroup() as group:
        await federation.add_seed([np.zeros(3)], helper=codec.BINARY)
        client = Client(api_url=federation.server.api_url, runtime=Package(folder), client_id="p", backoff=QUICK)
        running = group.create_task(client.run())
        await federation.attached(1)
        await federation.call("POST", START, json={"prediction_id": "run"})
        await federation.event("prediction", prediction_id="run", status="finished")
        [row] = await predictions(federation.http)
        assert json.loads(row["data"]) == {"file": "model.bin", "helper": "binaryhelper"}
        running.cancel()


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 400, "prediction_id is required"),
        ({"prediction_id": ""}, 400, "prediction_id is required"),
        ({"prediction_id": "a/b"}, 400, "prediction_id: "),
        ({"prediction_id": "run", "timeout": 0}, 400, "timeout: "),
        ({"prediction_id": "run"}, 400, "No models available"),
        ({"prediction_id": "run", "model_id": "gone"}, 404, "Model gone not found"),
    ],
)
async def test_a_start_that_cannot_be_is_refused_and_nothing_is_stored(
    body: dict[str, Any], status: int, said: str, tmp_path: Path
) -> None:
    async with serving(tmp_path) as api:
        await api.attach("a")
        refused = await api.http.post(START, json=body)
        assert refused.status_code == status
        assert refused.json()["message"].startswith(said)
        assert (await api.counts())["predictions"] == 0


async def test_a_start_without_an_attached_client_is_a_400(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.seed()
        refused = await api.http.post(START, json={"prediction_id": "run"})
        assert (refused.status_code, refused.json()) == (400, {"message": "no client is attached that could predict"})
