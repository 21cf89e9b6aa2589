"""Whole rounds on a real MongoDB and a real S3: the embedded stores' model, and what a user sees in both."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import aioboto3
import numpy as np
import pytest
from motor.motor_asyncio import AsyncIOMotorClient

from fl_client import TrainResult
from fl_client.wire import codec
from fl_server.store.ports import Document
from fl_server.store.s3 import S3
from fl_server.testing import Federation

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
