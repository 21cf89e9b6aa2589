"""Sessions of each helper: the model comes and goes in its format, and what does not fit is refused by name."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_client import APIClient, TrainResult
from fl_client.task import TaskInfo
from fl_client.wire import codec
from fl_client.wire import fl_pb2 as pb
from fl_server.testing import Federation
from tests.server.rest_world import npz, serving
from tests.server.wire_client import clients

MODELS = "/api/v1/models/"
SEEDS = {
    codec.NUMPY: [np.full((2, 3), 1.0, np.float32), np.zeros(4)],
    codec.SAFETENSORS: [np.full((2, 3), 1.0, np.float32), np.zeros(4), np.array(2.0, np.float16)],
    codec.BINARY: [np.array([1.0, -2.5, 0.0])],
}


def add_own_number(parameters: codec.Parameters, task: TaskInfo) -> TrainResult:
    step = int(task.client_id[1:]) + 1
    return TrainResult([array + array.dtype.type(step) for array in parameters], num_examples=1)


@pytest.mark.parametrize("aggregator", ["fedavg", "fedopt"])
@pytest.mark.parametrize("helper", sorted(SEEDS))
async def test_a_session_trains_in_its_helpers_format(helper: str, aggregator: str) -> None:
    def validate(parameters: codec.Parameters, task: TaskInfo) -> dict[str, float]:
        return {"first": float(parameters[0].reshape(-1)[0])}

    seed = SEEDS[helper]
    kwargs = {"serveropt": "adam", "learning_rate": 0.1} if aggregator == "fedopt" else None
    given: dict[str, Any] = {"helper_type": helper, "aggregator": aggregator, "aggregator_kwargs": kwargs}
    async with Federation(train=add_own_number, validate=validate, clients=2) as federation:
        session = await federation.run(seed, rounds=2, clients_required=2, validate=True, **given)
        assert session["status"] == "Finished", session["status_reason"]
        model_id = session["session_config"]["model_id"]
        made = await federation.parameters(model_id)
        reply = await federation.until(federation.http.get(f"{MODELS}{model_id}/download"))
        assert codec.recognised(memoryview(reply.content)) == (None if helper == codec.BINARY else helper)
        if aggregator == "fedavg":
            for array, start in zip(made, seed, strict=True):  # two rounds of the mean of 1 and 2
                assert array.dtype == start.dtype
                np.testing.assert_array_equal(array, start + start.dtype.type(3))
        else:
            assert [array.dtype for array in made] == [np.float64] * len(seed)
        numbers = await federation.call("GET", f"{MODELS}{model_id}/parameters", "array")
        assert numbers == [array.tolist() for array in made]


async def test_a_client_without_numpy_trains_in_binary() -> None:
    """As FEDn's C++ clients: raw float64, and no field of ours in what they send."""
    async with Federation() as federation, clients(federation, "a", "b") as (a, b):
        seed = await federation.add_seed([np.array([1.0, 2.0, 3.0])], helper=codec.BINARY)
        session_id = await federation.create_session(seed, helper_type=codec.BINARY, rounds=1, clients_required=2)
        await federation.start(session_id)
        for client, numbers in ((a, [2.0, 2.0, 2.0]), (b, [4.0, 0.0, 1.0])):
            task = await client.task()
            assert (task.helper, task.type) == (codec.BINARY, pb.MODEL_UPDATE)
            chunks = await client.download(task.model_id)
            assert b"".join(chunk.data for chunk in chunks) == np.array([1.0, 2.0, 3.0], "<f8").tobytes()
            await client.upload(np.array(numbers, "<f8").tobytes(), "u")
            assert (await client.report(task, "u")).verdict == pb.VERDICT_ACCEPTED
        session = await federation.ended(session_id)
        [array] = await federation.parameters(session["session_config"]["model_id"])
        assert array.tolist() == [3.0, 1.0, 1.5]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (np.arange(4.0).tobytes(), "array '0' has shape (4,), expected (3,)"),
        (np.array([1, np.nan, 1]).tobytes(), "array '0' is not finite: nan at flat index 1"),
        (codec.encode([np.arange(3.0)])[:-3], "bytes are no flat array of float64: a multiple of 8 needed"),
    ],
    ids=["another count", "a NaN", "an npz, cut off"],
)
async def test_an_update_that_is_no_binary_model_of_the_session_is_rejected(data: bytes, reason: str) -> None:
    async with Federation() as federation, clients(federation, "a") as [a]:
        seed = await federation.add_seed([np.zeros(3)], helper=codec.BINARY)
        session_id = await federation.create_session(seed, helper_type=codec.BINARY, rounds=1)
        await federation.start(session_id)
        task = await a.task()
        await a.upload(data, "u")
        reply = await a.report(task, "u")
        assert reply.verdict == pb.VERDICT_REJECTED and reason in reply.reason


# ---- seeds and sessions


def file(data: bytes) -> dict[str, Any]:
    return {"files": {"file": ("seed", data)}}


NPZ, SAFE, RAW = (
    codec.encode([np.arange(4.0)], helper=helper) for helper in (codec.NUMPY, codec.SAFETENSORS, codec.BINARY)
)


@pytest.mark.parametrize(
    ("data", "form", "active", "helper"),
    [
        (NPZ, {}, None, codec.NUMPY),
        (SAFE, {}, None, codec.SAFETENSORS),
        (NPZ, {}, codec.SAFETENSORS, codec.NUMPY),
        (RAW, {}, codec.BINARY, codec.BINARY),
        (RAW, {"helper": codec.BINARY}, None, codec.BINARY),
        (SAFE, {"helper": codec.SAFETENSORS}, codec.BINARY, codec.SAFETENSORS),
    ],
)
async def test_a_seeds_format_is_what_the_form_the_bytes_or_the_active_helper_say(
    tmp_path: Path, data: bytes, form: dict[str, str], active: str | None, helper: str
) -> None:
    async with serving(tmp_path) as api:
        if active:
            assert (await api.http.put("/api/v1/helpers/active", json={"helper": active})).status_code == 200
        added = await api.http.post(MODELS, **file(data), data=form)
        assert added.status_code == 200, added.text
        model_id = added.json()["model_id"]
        made = await api.http.post("/api/v1/sessions/", json={"session_config": {"model_id": model_id}})
        assert made.json()["session_config"]["helper_type"] == helper
        parameters = await api.http.get(f"{MODELS}{model_id}/parameters")
        assert parameters.json() == {"array": [[0.0, 1.0, 2.0, 3.0]]}


@pytest.mark.parametrize(
    ("data", "form", "said"),
    [
        (RAW, {}, "file: not an npz"),
        (NPZ, {"helper": codec.BINARY}, "file: the file is in the format of numpyhelper, not of binaryhelper"),
        (SAFE, {"helper": codec.NUMPY}, "file: the file is in the format of safetensors, not of numpyhelper"),
        (RAW + b"x", {"helper": codec.BINARY}, "file: 33 bytes are no flat array of float64"),
        (np.array([np.inf]).tobytes(), {"helper": codec.BINARY}, "file: array '0' is not finite"),
        (SAFE[:-1], {}, "file: 31 bytes of data, expected 32"),
        (
            NPZ,
            {"helper": "androidhelper"},
            "helper: 'androidhelper' is unknown; known: binaryhelper, numpyhelper, safe",
        ),
    ],
)
async def test_a_file_that_is_no_model_of_its_helper_is_a_400_and_nothing_is_stored(
    tmp_path: Path, data: bytes, form: dict[str, str], said: str
) -> None:
    async with serving(tmp_path) as api:
        refused = await api.http.post(MODELS, **file(data), data=form)
        assert refused.status_code == 400
        assert refused.json()["success"] is False
        assert refused.json()["message"].startswith(said)
        assert (await api.counts())["models"] == 0
        assert not list(api.folder.iterdir())


@pytest.mark.parametrize("helper", sorted(codec.HELPERS))
async def test_the_ending_of_a_file_says_its_helper_to_set_active_model(tmp_path: Path, helper: str) -> None:
    path = tmp_path / f"seed{codec.SUFFIXES[helper]}"
    path.write_bytes(codec.encode([np.arange(3.0)], helper=helper))
    async with Federation(train=add_own_number, clients=1) as federation:
        api = APIClient(federation.server.api_url)
        await asyncio.to_thread(api.set_active_model, path)
        await federation.attached(1)
        started = await asyncio.to_thread(api.start_session, rounds=1, validate=False)
        session = await federation.ended(started["session_id"])
        assert (session["status"], session["session_config"]["helper_type"]) == ("Finished", helper)
        [array] = await federation.parameters(session["session_config"]["model_id"])
        assert array.tolist() == [1.0, 2.0, 3.0]


async def test_a_session_of_another_helper_than_its_models_is_a_400_that_names_helper_type(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        added = await api.http.post(MODELS, **file(npz(np.zeros(3))))
        model_id = added.json()["model_id"]
        said = f"helper_type: 'safetensors', but model {model_id} is in the format of numpyhelper"
        wanted = {"model_id": model_id, "helper_type": codec.SAFETENSORS}
        refused = await api.http.post("/api/v1/sessions/", json={"session_config": wanted})
        assert (refused.status_code, refused.json()) == (400, {"message": said})
        session_id = (await api.session(model_id=model_id))["session_id"]
        change = {"session_config": {"helper_type": codec.SAFETENSORS}}
        changed = await api.http.patch(f"/api/v1/sessions/{session_id}", json=change)
        assert (changed.status_code, changed.json()) == (400, {"message": said})
