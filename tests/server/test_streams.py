"""Task streams, models and records on the real wire: who is attached, what is sent again, what every call answers."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.wrappers_pb2 import UInt32Value

from fl_client.wire import codec
from fl_client.wire import fl_pb2 as pb
from fl_server.testing import Federation
from tests.server.wire_client import (
    WAIT_S,
    WireClient,
    clients,
    committed,
    online,
    port,
    result,
    started,
)


async def ending(stream: Any) -> tuple[grpc.StatusCode, str]:
    """How the stream ends, once it does; what still comes before is passed over."""
    async with asyncio.timeout(WAIT_S):
        return await stream.code(), await stream.details()


async def presence(federation: Federation) -> dict[str, str]:
    found = await federation.call("GET", "/api/v1/clients/", "result")
    return {client["client_id"]: client["status"] for client in found}


# ---- streams


async def test_a_stream_says_that_it_is_attached_before_there_is_a_task() -> None:
    async with Federation() as federation, WireClient(port(federation), "a") as client:
        stream = client.attach()
        async with asyncio.timeout(WAIT_S):
            await stream.initial_metadata()
        assert list(federation.server.scheduler.streams.attached()) == ["a"]


async def test_a_second_stream_of_a_client_ends_the_first_with_aborted_and_gets_its_tasks() -> None:
    async with Federation() as federation, clients(federation, "a") as (client,):
        first, since = client.stream, await online(federation, "a")
        session_id = await started(federation)
        task = await client.task()
        async with WireClient(port(federation), "a") as again:
            again.attach()
            await online(federation, "a", after=since)
            code, details = await ending(first)
            assert code is grpc.StatusCode.ABORTED
            assert details.startswith("attached again from ipv4:127.0.0.1:")
            assert (await again.task()).correlation_id == task.correlation_id
            assert await presence(federation) == {"a": "online"}
            await again.train(task, 3)
            assert await result(federation, session_id) == 3


async def test_an_sdk_client_whose_second_stream_replaced_its_first_is_still_known_by_its_name() -> None:
    async with Federation() as federation, WireClient(port(federation), "id-1", name="Site") as client:
        first = client.attach()
        since = await online(federation, "id-1")
        client.attach()
        await online(federation, "id-1", after=since)
        assert (await ending(first))[0] is grpc.StatusCode.ABORTED
        await client.ask("Connector", "SendStatus", pb.Status(sender=pb.Client(name="Site"), status="here"))
        found = await stored(federation, "statuses")
        assert found[-1]["sender"] == {"name": "Site", "role": "OTHER", "client_id": "id-1"}


async def test_a_client_that_comes_back_gets_its_open_task_again_and_no_closed_one() -> None:
    async with Federation() as federation, clients(federation, "a", "b") as (a, b):
        session_id = await started(federation, rounds=2)
        tasks = await a.task(), await b.task()
        await a.train(tasks[0], 1)
        for client in (a, b):
            since = await online(federation, client.id)
            client.stream.cancel()
            gone = await federation.event("client", after=since, client_id=client.id, status="offline")
            client.attach()
            await online(federation, client.id, after=gone.id)
        again = await b.task()
        assert (again.correlation_id, again.data) == (tasks[1].correlation_id, tasks[1].data)
        await b.train(again, 3)
        second = await a.task()
        assert second.round == 2
        await a.train(second, 5)
        await b.train(await b.task(), 5)
        assert await result(federation, session_id) == 5


async def test_who_is_attached_is_online_in_the_rest_api_and_on_the_wire() -> None:
    async with Federation() as federation, clients(federation, "a", "b") as (a, b):
        assert await presence(federation) == {"a": "online", "b": "online"}
        since = await online(federation, "b")
        b.stream.cancel()
        await federation.event("client", after=since, client_id="b", status="offline")
        listed = await a.ask("Connector", "ListActiveClients", pb.ListClientsRequest(channel=pb.TASK_QUEUE))
        assert listed == pb.ClientList(client=[pb.Client(role=pb.CLIENT, name="a", client_id="a")])
        b.attach()
        await online(federation, "b", after=since)
        assert await federation.call("GET", "/api/v1/clients/?status=online", "count") == 2


async def test_a_client_that_goes_is_offline_in_the_rest_api() -> None:
    async with Federation() as federation, clients(federation, "a") as (client,):
        client.stream.cancel()
        await federation.event("client", client_id="a", status="offline")
        await written(federation)
        assert (await presence(federation))["a"] == "offline"


async def test_a_client_that_died_in_mid_training_is_named_with_when_it_was_last_seen() -> None:
    async with Federation() as federation, clients(federation, "a", "killed") as (a, killed):
        session_id = await started(federation, round_timeout=300)
        await killed.task()
        await a.train(await a.task(), 3)
        killed.stream.cancel()
        await federation.event("client", client_id="killed", status="offline")
        said = await federation.call("GET", f"/api/v1/sessions/{session_id}/explain", "sentences")
        assert said[0] == f"session {session_id} is running: 0 of 1 rounds are committed"
        assert said[1].startswith("round 1, attempt 1: waiting for 1 of 2 clients (killed); killed last seen ")


async def test_a_server_that_stops_ends_its_streams_with_unavailable(tmp_path: Path) -> None:
    async with Federation(data_dir=tmp_path) as federation:
        client = WireClient(port(federation), "a")
        stream = client.attach()
        await online(federation, "a")
    code, details = await ending(stream)
    assert (code, details) == (grpc.StatusCode.UNAVAILABLE, "the server stops; come again")
    async with client, Federation(data_dir=tmp_path) as federation:
        assert await presence(federation) == {"a": "online"}, "expected back, until the rejoin window is over"


async def test_a_client_without_any_id_is_unauthenticated() -> None:
    async with Federation() as federation, WireClient(port(federation), "") as client:
        assert (await ending(client.attach()))[0] is grpc.StatusCode.UNAUTHENTICATED


# ---- tasks


async def test_a_training_task_has_what_fedns_client_needs() -> None:
    async with Federation() as federation, clients(federation, "a") as (client,):
        settings = {"lr": 0.1, "layers": [1, 2]}
        session_id = await started(federation, client_settings=settings, round_timeout=90, validate=True)
        task = await client.task()
        session = await federation.session(session_id)
        assert (task.sender.role, task.receiver.role, task.receiver.client_id) == (pb.COMBINER, pb.CLIENT, "a")
        assert (task.type, task.session_id) == (pb.MODEL_UPDATE, session_id)
        assert task.model_id == session["seed_model_id"]
        assert task.correlation_id == task.task_id == f"{session_id}/1/1/train/a"
        assert (task.round, task.attempt) == (1, 1)
        assert task.timestamp[4] == "-" and len(task.timestamp) == len("2026-11-24 01:54:01.000000")
        data = json.loads(task.data)
        assert data.pop("client_settings") == settings
        assert all(isinstance(value, str) for value in data.values()), data
        [found] = await federation.call("GET", "/api/v1/rounds/", "result")
        told = {
            "round_id": found["round_id"],
            "session_id": session_id,
            "model_id": task.model_id,
            "task": "training",
            "rounds": "1",
            "round_timeout": "90",
            "buffer_size": "-1",
            "validate": "True",
            "aggregator": "fedavg",
            "aggregator_kwargs": "None",
            "helper_type": "numpyhelper",
            "clients_required": "1",
            "delete_models_storage": "True",
        }
        assert told.items() <= data.items()


async def test_a_validation_task_has_what_fedns_client_needs() -> None:
    async with Federation() as federation, clients(federation, "a") as (client,):
        session_id = await started(federation, validate=True)
        await client.train(await client.task(), 3)
        task = await client.task()
        assert (task.type, task.data, task.session_id) == (pb.MODEL_VALIDATION, "", session_id)
        assert (task.sender.role, task.model_id) == (pb.COMBINER, await committed(federation, session_id, 1))
        reply = await client.validate(task, loss=0.25, accuracy=0.0)
        assert (reply.response, reply.verdict) == ("RECEIVED ModelValidation from client a", pb.VERDICT_NONE)
        assert await result(federation, session_id) == 3
        [found] = await federation.call("GET", "/api/v1/validations/", "result")
        assert json.loads(found["data"]) == {"loss": 0.25, "accuracy": 0.0}
        assert (found["model_id"], found["session_id"]) == (task.model_id, session_id)
        assert found["correlation_id"] == task.correlation_id
        assert found["sender"] == {"name": "a", "role": "CLIENT", "client_id": "a"}


# ---- downloads


async def test_a_model_comes_in_chunks_of_a_mebibyte_and_an_ok() -> None:
    model = [np.arange(400_000, dtype=np.float64)]
    async with Federation() as federation, WireClient(port(federation), "a") as client:
        model_id = await federation.add_seed(model)
        messages = await client.download(model_id)
    data = codec.encode(model)
    assert b"".join(message.data for message in messages) == data
    assert [len(message.data) for message in messages] == [1 << 20, 1 << 20, 1 << 20, len(data) - (3 << 20), 0]
    assert [message.status for message in messages] == [pb.IN_PROGRESS] * 4 + [pb.OK]
    assert {message.id for message in messages} == {model_id}


async def test_a_model_that_does_not_exist_is_failed() -> None:
    async with Federation() as federation, WireClient(port(federation), "a") as client:
        for model_id in ("nowhere", "", "../state.db", "a" * 5000, "\0", "ö"):
            failed = pb.ModelResponse(id=model_id, status=pb.FAILED, message=f"no model {model_id}")
            assert await client.download(model_id) == [failed]


@pytest.mark.parametrize("kept_bytes", [1, 1 << 30], ids=["read each time", "read once"])
async def test_many_downloads_at_once_give_the_same_bytes_though_the_first_is_cancelled(kept_bytes: int) -> None:
    model = [np.arange(1_000_000, dtype=np.float32)]
    async with Federation(download_cache_bytes=kept_bytes) as federation, WireClient(port(federation), "a") as client:
        model_id = await federation.add_seed(model)
        first = client.open("ModelService", "Download", pb.ModelRequest(id=model_id))
        others = [asyncio.ensure_future(client.download(model_id)) for _ in range(20)]
        first.cancel()
        async with asyncio.timeout(WAIT_S):
            downloaded = [b"".join(message.data for message in messages) for messages in await asyncio.gather(*others)]
    assert set(downloaded) == {codec.encode(model)}


# ---- everything else that a client calls


async def test_calls_leave_nothing_that_only_the_garbage_collector_frees() -> None:
    """With 10,000 clients it would find so much that it holds the loop."""
    gc.collect()
    gc.disable()
    try:
        async with Federation() as federation, clients(federation, "a") as (client,):
            await started(federation)
            task = await client.task()
            await client.download(task.model_id)
            assert (await client.train(task, 1.0)).verdict == pb.VERDICT_ACCEPTED
        left = [one for one in gc.get_objects() if isinstance(one, AsyncGenerator)]
        assert not [one for one in left if "message_receiver" in one.__qualname__]
    finally:
        gc.enable()


async def test_heartbeats_and_whether_clients_are_accepted_are_answered() -> None:
    async with Federation() as federation, WireClient(port(federation), "a") as client:
        sender = pb.Client(name="a", role=pb.CLIENT, client_id="a")
        reply = await client.ask("Connector", "SendHeartbeat", pb.Heartbeat(sender=sender))
        assert reply == pb.Response(sender=pb.Client(name="a", role=pb.CLIENT), response="Heartbeat received")
        accepting = await client.ask("Connector", "AcceptingClients", pb.ConnectionRequest())
        assert accepting.status == pb.ACCEPTING
        assert await presence(federation) == {}, "a heartbeat alone makes nobody online"


async def test_a_status_is_answered_and_stored_once_however_often_it_is_sent() -> None:
    async with Federation() as federation, WireClient(port(federation), "a") as client:
        status = pb.Status(
            sender=pb.Client(name="a", role=pb.CLIENT),  # FEDn's clients never fill the id
            status="Model update completed.",
            log_level=pb.AUDIT,
            data='{"modelId": "m"}',
            type=pb.MODEL_UPDATE,
            session_id="s",
            timestamp=Timestamp(seconds=1_795_485_241, nanos=324_398_000),
        )
        for _ in range(2):
            reply = await client.ask("Connector", "SendStatus", status)
            assert reply.response == "Status received."
        other = pb.Status(status="another", timestamp=Timestamp(seconds=1))
        await client.ask("Connector", "SendStatus", other)
        found = await stored(federation, "statuses")
        assert [status["status"] for status in found] == ["Model update completed.", "another"]
        shown = {key: found[0][key] for key in ("log_level", "data", "type", "session_id", "timestamp", "sender")}
        assert shown == {
            "log_level": "AUDIT",
            "data": '{"modelId": "m"}',
            "type": "MODEL_UPDATE",
            "session_id": "s",
            "timestamp": "2026-11-24T01:54:01.324398Z",
            "sender": {"name": "a", "role": "CLIENT", "client_id": "a"},
        }


async def test_a_stream_leaves_fedns_note_that_its_client_connected() -> None:
    async with Federation() as federation, clients(federation, "a"):
        [found] = await stored(federation, "statuses")
        assert (found["status"], found["type"], found["log_level"]) == (
            "Client a connecting to TaskStream.",
            "NETWORK",
            "INFO",
        )
        assert (found["sender"]["role"], found["sender"]["name"]) == ("COMBINER", "combiner")


async def test_metrics_attributes_and_telemetry_are_stored_zeros_and_empty_texts_too() -> None:
    async with Federation() as federation, WireClient(port(federation), "a") as client:
        sender, at = pb.Client(name="a", role=pb.CLIENT, client_id="a"), Timestamp(seconds=1_795_485_241)
        metric = pb.ModelMetric(
            sender=sender,
            metrics=[pb.MetricElem(key="loss", value=0.0), pb.MetricElem(key="accuracy", value=0.5)],
            timestamp=at,
            step=UInt32Value(value=0),
            model_id="m",
            round_id="1",
            session_id="s",
        )
        attributes = pb.AttributeMessage(
            sender=sender,
            attributes=[pb.AttributeElem(key="site", value=""), pb.AttributeElem(key="city", value="Uppsala")],
            timestamp=at,
        )
        telemetry = pb.TelemetryMessage(
            sender=sender, telemetries=[pb.TelemetryElem(key="cpu", value=0.0)], timestamp=at
        )
        for _ in range(2):  # a call that is sent again is stored once
            assert await client.ask("Combiner", "SendModelMetric", metric) == pb.Response()
            assert await client.ask("Combiner", "SendAttributeMessage", attributes) == pb.Response()
            assert await client.ask("Combiner", "SendTelemetryMessage", telemetry) == pb.Response()
        empty = await client.ask("Combiner", "SendModelMetric", pb.ModelMetric(sender=sender))
        assert empty == pb.Response()
        metrics = await stored(federation, "metrics")
        assert [(found["key"], found["value"], found["step"]) for found in metrics] == [
            ("loss", 0.0, 0),
            ("accuracy", 0.5, 0),
        ]
        assert (metrics[0]["model_id"], metrics[0]["round_id"], metrics[0]["session_id"]) == ("m", "1", "s")
        found = await stored(federation, "attributes")
        assert [(attribute["key"], attribute["value"]) for attribute in found] == [("site", ""), ("city", "Uppsala")]
        [one] = await stored(federation, "telemetry")
        assert (one["key"], one["value"], one["sender"]["client_id"]) == ("cpu", 0.0, "a")


async def test_predictions_of_several_clients_of_one_run_are_all_stored() -> None:
    async with Federation() as federation, clients(federation, "a", "b") as everybody:
        for client in everybody:
            prediction = pb.ModelPrediction(
                sender=pb.Client(name=client.id, role=pb.CLIENT), model_id="m", data="[1]", prediction_id="run"
            )
            reply = await client.ask("Combiner", "SendModelPrediction", prediction)
            assert reply.response == f"RECEIVED ModelPrediction from client {client.id}"
        found = await stored(federation, "predictions")
        assert sorted(prediction["sender"]["client_id"] for prediction in found) == ["a", "b"]


async def written(federation: Federation) -> None:
    """Returns when all that was queued until now is stored: who is added is answered when that is durable."""
    await federation.call("POST", "/api/v1/clients/add", json={"name": "last", "client_id": "last"})


async def stored(federation: Federation, noun: str) -> list[dict[str, Any]]:
    """Oldest first."""
    await written(federation)
    return list(await federation.call("GET", f"/api/v1/{noun}/", "result", headers={"X-Sort-Order": "asc"}))


UNIMPLEMENTED = [
    (service, method.name)
    for service, methods in pb.DESCRIPTOR.services_by_name.items()
    for method in methods.methods
    if service in ("Control", "Reducer", "FunctionService")
    or method.name in ("AllianceStatusStream", "ReassignClient", "ReconnectClient")
]


async def test_fedns_inner_wire_is_unimplemented() -> None:
    async with Federation() as federation, WireClient(port(federation), "a") as client:
        for service, name in UNIMPLEMENTED:
            method = pb.DESCRIPTOR.services_by_name[service].methods_by_name[name]
            message = GetMessageClass(method.input_type)()
            call = client.open(service, name, iter([message]) if method.client_streaming else message)
            said = grpc.StatusCode.UNIMPLEMENTED, "FEDn's inner wire; flserve's rounds have one owner"
            assert await ending(call) == said, name
