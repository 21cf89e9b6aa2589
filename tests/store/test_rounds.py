"""Whole rounds on a real MongoDB and a real S3: the embedded stores' model, and what a user sees in both."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aioboto3
import numpy as np
import pytest
from motor.motor_asyncio import AsyncIOMotorClient

from fl_client import TrainResult
from fl_client.wire import codec
from fl_server.rest.schemas import ENTITIES, Entity
from fl_server.store.ports import ID_FIELD, INDEXED, Collection, Document
from fl_server.store.s3 import S3
from fl_server.testing import Federation
from tests.server.rest_world import tgz

SEED = [np.arange(6, dtype=np.float32).reshape(2, 3)]


def train(parameters: codec.Parameters, *_: Any) -> TrainResult:
    return TrainResult([array * 1.5 + 1 for array in parameters], num_examples=3)


async def rounds(data_dir: Path, **settings: Any) -> tuple[str, str, bytes]:
    """The session, its model, and the bytes of this."""
    async with Federation(train=train, clients=3, data_dir=data_dir, **settings) as federation:
        session = await federation.run(SEED, rounds=3, clients_required=3)
        assert session["status"] == "Finished"
        model = session["session_config"]["model_id"]
        reply = await federation.http.get(f"/api/v1/models/{model}/download")
        return session["session_id"], model, reply.content


async def test_rounds_on_mongodb_and_s3_give_the_embedded_stores_model(
    tmp_path: Path, mongo_url: str, s3_server: S3
) -> None:
    name = f"fl-test-{uuid.uuid4()}"
    where = {
        "mongo_url": mongo_url,
        "mongo_database": name,
        "s3_endpoint_url": s3_server.endpoint_url,
        "s3_access_key": s3_server.access_key,
        "s3_secret_key": s3_server.secret_key,
        "s3_model_bucket": name,
        "s3_context_bucket": name,
        "s3_prediction_bucket": f"{name}-prediction",
    }
    _, _, expected = await rounds(tmp_path / "embedded")
    session_id, model_id, found = await rounds(tmp_path / "real", **where)
    assert np.array_equal(codec.decode(found)[0], codec.decode(expected)[0])

    client: AsyncIOMotorClient[Document] = AsyncIOMotorClient(mongo_url, timeoutMS=10_000)
    session = await client[name]["control.sessions"].find_one({"session_id": session_id}, {"fl": 0})
    assert session is not None and session["status"] == "Finished"
    assert await client[name]["control.model"].count_documents({"session_id": session_id}) == 3
    assert await client[name]["control.rounds"].count_documents({"status": "Finished"}) == 3
    assert await client[name]["network.clients"].count_documents({}) == 3
    await client.drop_database(name)
    client.close()

    keys = {"aws_access_key_id": s3_server.access_key, "aws_secret_access_key": s3_server.secret_key}
    async with aioboto3.Session(**keys).client("s3", endpoint_url=s3_server.endpoint_url) as bucket:
        got = await bucket.get_object(Bucket=name, Key=model_id)
        assert await got["Body"].read() == found
        await bucket.head_bucket(Bucket=f"{name}-prediction")


@pytest.mark.parametrize("url", ["mongo_url", "s3_endpoint_url"])
async def test_either_alone_may_be_chosen(tmp_path: Path, mongo_url: str, s3_server: S3, url: str) -> None:
    name = f"fl-test-{uuid.uuid4()}"
    if url == "mongo_url":
        where = {"mongo_url": mongo_url, "mongo_database": name}
    else:
        where = {
            "s3_endpoint_url": s3_server.endpoint_url,
            "s3_access_key": s3_server.access_key,
            "s3_secret_key": s3_server.secret_key,
            "s3_model_bucket": name,
            "s3_context_bucket": name,
        }
    _, _, found = await rounds(tmp_path, **where)
    assert codec.decode(found)[0].shape == (2, 3)


# fedn-interface 11.3, besides committed_at and updated_at; record_id, a prediction's own, is the one that is ours
FEDNS: Mapping[Collection, str] = {
    Collection.CLIENTS: "client_id name combiner combiner_preferred ip status last_seen package",
    Collection.COMBINERS: "combiner_id name address fqdn ip parent port",
    Collection.MODELS: "model key name parent_model session_id",
    Collection.PACKAGES: "package_id key description file_name helper name storage_file_name active",
    Collection.SESSIONS: "session_id name status session_config seed_model_id",
    Collection.ROUNDS: "round_id status round_config round_data combiners",
    Collection.RUNS: "run_id session_id model_id completed_at_model_id round_timeout rounds completed_at",
    Collection.STATUSES: "status_id status timestamp log_level data correlation_id type extra session_id sender",
    Collection.VALIDATIONS: "validation_id model_id data correlation_id timestamp session_id meta sender receiver",
    Collection.PREDICTIONS: "record_id prediction_id model_id data correlation_id timestamp meta sender receiver",
    Collection.METRICS: "metric_id key value timestamp sender model_id step round_id session_id",
    Collection.ATTRIBUTES: "attribute_id key value timestamp sender",
    Collection.TELEMETRY: "telemetry_id key value timestamp sender",
}


async def test_a_user_with_pymongo_finds_fedns_collections_and_fields(
    tmp_path: Path, mongo_url: str, client: Any
) -> None:
    name = f"fl-test-{uuid.uuid4()}"
    work = {"train": train, "validate": judge, "predict": judge}
    async with Federation(data_dir=tmp_path, clients=2, mongo_url=mongo_url, mongo_database=name, **work) as federation:
        form = {"name": "p", "helper": "numpyhelper", "description": ""}
        await federation.call("POST", "/api/v1/packages/", files={"file": ("p.tgz", tgz())}, data=form)
        session = await federation.run(SEED, rounds=2, clients_required=2, validate=True)
        model_id = session["session_config"]["model_id"]
        await federation.call("POST", "/api/v1/predictions/start", json={"prediction_id": "p", "model_id": model_id})
        await federation.event("prediction", status="reported")
        measured = {"key": "k", "sender": {"name": "c0", "role": "CLIENT", "client_id": "c0"}}
        for noun, value in (("attributes", "v"), ("telemetry", 1)):
            await federation.call("POST", f"/api/v1/{noun}/", json={**measured, "value": value})
    found = {one: await client[name][one.value].find({}).to_list(None) for one in Collection}
    await client.drop_database(name)
    assert [one for one, documents in found.items() if not documents] == [Collection.METRICS]
    for one, documents in found.items():
        fields = {field for document in documents for field in document} - {"_id", "fl", "committed_at", "updated_at"}
        assert fields == set(FEDNS[one].split() if documents else ()), one


def judge(*_: Any) -> dict[str, float]:
    return {"accuracy": 0.5}


MANY = 100_000
PAGE = 10


@pytest.fixture
async def client(mongo_url: str) -> AsyncIterator[Any]:
    client: AsyncIOMotorClient[Document] = AsyncIOMotorClient(mongo_url, timeoutMS=600_000)
    yield client
    client.close()


@pytest.mark.long
async def test_no_list_of_a_hundred_thousand_records_scans_a_collection(
    tmp_path: Path, mongo_url: str, client: Any, heard: list[Document]
) -> None:
    """What the driver sent for each route, explained by the database that answered it."""
    name = f"fl-test-{uuid.uuid4()}"
    where = {"mongo_url": mongo_url, "mongo_database": name}
    async with Federation(data_dir=tmp_path, wait_s=600.0, **where) as federation:
        for collection in Collection:
            await fill(client[name], collection)
        for entity in ENTITIES:
            await ask_every_list(federation, entity)
        for path in ("models/leaf-nodes", "models/7/descendants", "models/7/ancestors", "clients/7/attributes"):
            await federation.call("GET", f"/api/v1/{path}")
        await federation.call("POST", "/api/v1/attributes/current", json={"client_ids": ["7", "8"]})
        await federation.call("GET", "/get_controller_status")
    asked = {str(command): command for command in heard if command.keys() & {"find", "aggregate"}}
    assert len(asked) > 500
    scans = []
    for command in asked.values():
        bare = {key: value for key, value in command.items() if key not in ("lsid", "$db", "readConcern")}
        said = await client[name].command({"explain": bare, "verbosity": "queryPlanner"})
        del said["command"]
        if "COLLSCAN" in str(said):
            scans.append(bare)
    assert not scans, "\n".join(map(str, scans))
    await client.drop_database(name)


async def fill(database: Any, collection: Collection) -> None:
    """By the database itself: nothing of it goes over the wire."""
    document: Document = {
        ID_FIELD[collection]: {"$toString": "$n"},
        "committed_at": {"$toDouble": "$n"},
        "updated_at": {"$toDouble": "$n"},
        "fl.version": {"$literal": 1},
        "fl.ordinal": "$n",
        "value": "$n",
    }
    document |= {field: {"$toString": {"$mod": ["$n", MANY // 5]}} for field in INDEXED[collection]}
    document |= {ID_FIELD[collection]: {"$toString": "$n"}}
    if "status" in document:
        document["status"] = {"$literal": "Finished"}
    numbers = [{"$documents": [{"n": {"$range": [0, MANY]}}]}, {"$unwind": "$n"}, {"$set": document}, {"$unset": "n"}]
    await database.aggregate([*numbers, {"$out": collection.value}]).to_list(None)
    assert await database[collection.value].estimated_document_count() == MANY


async def ask_every_list(federation: Federation, entity: Entity) -> None:
    """Each field that a list is filtered by, each operator, each order; and the counts."""
    fields = [field for field in INDEXED[entity.collection] if field.partition(".")[0] in entity.shape.model_fields]
    filters = ["", "committed_at__gte=99990"]
    filters += [f"{field}{suffix}=7" for field in fields for suffix in ("", "__ne", "__gt", "__gte", "__lt", "__lte")]
    url = f"/api/v1/{entity.noun}"
    for query in filters:
        assert isinstance(await federation.call("GET", f"{url}/count?{query}"), int)
        for order in ("asc", "desc"):
            headers = {"X-Limit": f"{PAGE}", "X-Sort-Order": order}
            page = await federation.call("GET", f"{url}/?{query}", headers=headers)
            assert len(page["result"]) == min(PAGE, page["count"])
    for field in fields:
        await federation.call("GET", f"{url}/", headers={"X-Limit": f"{PAGE}", "X-Sort-Key": field})
        await federation.call("POST", f"{url}/list", json={field: "7,8"}, headers={"X-Limit": f"{PAGE}"})
        await federation.call("POST", f"{url}/count", json={field: "7,8"})
    await federation.call("GET", f"{url}/7")
