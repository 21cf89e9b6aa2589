"""Models over REST: what comes in is checked first, what goes out is what is stored."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_server.rest.schemas import ModelObject
from fl_server.store.ports import Collection
from tests.server.rest_world import MAX_MODEL_BYTES, NOW, Api, npz, serving

MODELS = "/api/v1/models/"


def _file(data: bytes) -> dict[str, Any]:
    return {"files": {"file": ("seed.npz", data)}}


def _compressed(*arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, *arrays)
    return out.getvalue()


async def _trail(api: Api) -> None:
    """a <- b <- c, and d, later, from b too."""
    for number, (model, parent) in enumerate([("a", None), ("b", "a"), ("c", "b"), ("d", "b")]):
        await api.insert(Collection.MODELS, model=model, parent_model=parent, committed_at=NOW + number)


async def _ids(api: Api, path: str, **headers: str) -> list[str]:
    answer = await api.http.get(f"{MODELS}{path}", headers=headers)
    assert answer.status_code == 200, answer.text
    return [ModelObject.model_validate(model).model_id for model in answer.json()]


@pytest.mark.parametrize("write", [npz, _compressed], ids=["stored", "deflated"])
async def test_a_seed_comes_back_with_the_names_that_fedns_helper_reads(write: Any, tmp_path: Path) -> None:
    weights: list[Any] = [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.ones((3, 2), order="F"),
        np.array(5, dtype=np.int64),
    ]
    async with serving(tmp_path) as api:
        added = await api.http.post(MODELS, **_file(write(*weights)), data={"name": "first", "helper": "numpyhelper"})
        assert added.status_code == 200
        model_id = added.json()["model_id"]
        assert added.json() == {"success": True, "message": "Model added successfully", "model_id": model_id}

        model = (await api.http.get(f"{MODELS}{model_id}")).json()
        assert (model["name"], model["model"], model["parent_model"]) == ("first", model_id, None)
        down = await api.http.get(f"{MODELS}{model_id}/download")
        assert down.headers["content-type"] == "application/octet-stream"
        assert down.headers["content-disposition"] == f"attachment; filename={model_id}"
        assert int(down.headers["content-length"]) == len(down.content)
        with np.load(io.BytesIO(down.content)) as stored:
            assert stored.files == ["0", "1", "2"]
            for name, weight in zip(stored.files, weights, strict=True):
                assert stored[name].dtype == weight.dtype
                np.testing.assert_array_equal(stored[name], weight)
        parameters = (await api.http.get(f"{MODELS}{model_id}/parameters")).json()
        assert parameters == {"array": [weight.tolist() for weight in weights]}
        assert not any(api.folder.iterdir())


async def test_names_that_say_something_are_kept(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        added = await api.http.post(MODELS, **_file(npz(bias=np.zeros(2), dense=np.ones(3))))
        down = await api.http.get(f"{MODELS}{added.json()['model_id']}/download")
        with np.load(io.BytesIO(down.content)) as stored:
            assert stored.files == ["bias", "dense"]


async def test_a_model_of_several_network_chunks_arrives_whole(tmp_path: Path) -> None:
    weights = np.random.default_rng(1).normal(size=MAX_MODEL_BYTES // 8 - 100)
    async with serving(tmp_path) as api:
        added = await api.http.post(MODELS, **_file(npz(weights)))
        down = await api.http.get(f"{MODELS}{added.json()['model_id']}/download")
        with np.load(io.BytesIO(down.content)) as stored:
            np.testing.assert_array_equal(stored["0"], weights)


BAD_SEEDS: list[tuple[dict[str, Any], str]] = [
    (_file(b""), "file: not an npz"),
    (_file(b"no npz at all"), "file: not an npz"),
    (_file(npz(np.zeros(3))[:-10]), "file: "),
    (_file(npz(np.zeros(3)) + b"more"), "file: "),
    (_file(npz(np.array([{}], dtype=object))), "file: "),
    (_file(npz(np.array([1.0, np.nan]))), "file: "),
    (_file(_compressed(np.array([1.0, np.inf]))), "file: "),
    (_file(npz(np.array(["text"]))), "file: "),
    (_file(npz(np.array([1j]))), "file: "),
    (_file(npz()), "file: the npz holds no arrays"),
    (_file(_compressed(np.zeros(MAX_MODEL_BYTES))), "file: "),
    (_file(bytes(3 * MAX_MODEL_BYTES)), "file: more than max_model_bytes"),
    ({"files": {"model": ("seed.npz", npz(np.zeros(3)))}}, "file: missing"),
    ({**_file(npz(np.zeros(3))), "data": {"name": "a\nb"}}, "name: "),
    ({**_file(npz(np.zeros(3))), "data": {"name": "n" * 300}}, "name: "),
    ({**_file(npz(np.zeros(3))), "data": {"name": "n" * 100_000}}, "form: "),
    ({"files": [("file", ("a", npz(np.zeros(3)))), ("file", ("b", b"x"))]}, "file: given twice"),
    ({"data": {"file": "text"}}, "file: send it as multipart/form-data"),
    ({"json": {"file": "text"}}, "file: send it as multipart/form-data"),
    ({}, "file: send it as multipart/form-data"),
    ({"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "form: "),
    ({"content": b"garbage", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "form: "),
    ({"content": b"", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "form: "),
    ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, "file: send it as"),
]


async def test_a_bad_seed_is_a_400_that_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for sent, message in BAD_SEEDS:
            answer = await api.http.post(MODELS, **sent)
            assert answer.status_code == 400, answer.text
            assert answer.json()["success"] is False
            assert answer.json()["message"].startswith(message)
            assert not any(api.folder.iterdir())
        assert not any((await api.counts()).values())
        assert await api.scheduler.models.keys() == []


async def test_ancestors_are_newest_first_and_may_be_turned_around(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await _trail(api)
        assert await _ids(api, "c/ancestors") == ["b", "a"]
        assert await _ids(api, "c/ancestors?include_self=true") == ["c", "b", "a"]
        assert await _ids(api, "c/ancestors?include_self=true", **{"X-Reverse": "true"}) == ["a", "b", "c"]
        assert await _ids(api, "c/ancestors?include_self=true", **{"X-Limit": "1"}) == ["c", "b"]


async def test_descendants_follow_the_newest_child(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await _trail(api)
        assert await _ids(api, "a/descendants") == ["d", "b"]
        assert await _ids(api, "a/descendants", **{"X-Limit": "1"}) == ["b"]
        assert await _ids(api, "leaf-nodes") == ["d", "c"]


async def test_a_trail_that_bites_its_tail_ends(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.insert(Collection.MODELS, model="a", parent_model="b")
        await api.insert(Collection.MODELS, model="b", parent_model="a")
        assert await _ids(api, "a/ancestors") == ["b"]
        assert await _ids(api, "a/descendants") == ["b"]


async def test_models_of_a_session_are_found_also_with_the_stray_slash_of_fedns_cli(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.insert(Collection.MODELS, model="a", session_id="s")
        await api.insert(Collection.MODELS, model="b", session_id="t")
        found = (await api.http.get("/api/v1/models/?session_id=s/")).json()
        assert [model["model_id"] for model in found["result"]] == ["a"]
        assert (await api.http.get("/api/v1/models?model_id=b")).json()["count"] == 1


async def test_a_model_is_renamed_and_nothing_else(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.insert(Collection.MODELS, model="a", session_id="s")
        patched = await api.http.patch(f"{MODELS}a", json={"name": "x", "model_id": "b", "colour": "red"})
        assert (patched.status_code, patched.json()["name"], patched.json()["model_id"]) == (200, "x", "a")
        put = await api.http.put(f"{MODELS}a", json={**patched.json(), "name": "y"})
        assert (put.status_code, put.json()["name"]) == (200, "y")
        for body, named in [
            ({"name": 5}, "name: "),
            ({"colour": 1}, "Invalid object"),
            ({"session_id": "t"}, "session_"),
        ]:
            refused = await api.http.put(f"{MODELS}a", json=body)
            assert refused.status_code == 400
            assert refused.json()["message"].startswith(named)


async def test_an_unknown_model_is_a_404_for_every_verb(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for method, path in [
            ("GET", "nope"),
            ("GET", "nope/download"),
            ("GET", "nope/parameters"),
            ("GET", "nope/ancestors"),
            ("GET", "nope/descendants"),
            ("PATCH", "nope"),
        ]:
            answer = await api.http.request(method, f"{MODELS}{path}", json={} if method == "PATCH" else None)
            assert (answer.status_code, answer.json()) == (404, {"message": "Entity with id: nope not found"})


async def test_a_model_whose_bytes_are_gone_is_a_404(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.insert(Collection.MODELS, model="a")
        answer = await api.http.get(f"{MODELS}a/download")
        assert answer.status_code == 404
        assert "a" in answer.json()["message"]


async def test_the_deprecated_active_model_is_gone(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        assert (await api.http.get(f"{MODELS}active")).status_code == 410
        assert (await api.http.put(f"{MODELS}active")).status_code == 410


async def test_the_active_helper_is_a_bare_string_once_it_is_set(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        none = await api.http.get("/api/v1/helpers/active")
        assert (none.status_code, none.json()) == (400, {"message": "No active helper"})
        put = await api.http.put("/api/v1/helpers/active", json={"helper": "numpyhelper"})
        assert (put.status_code, put.json()) == (200, {"message": "Active helper set"})
        assert (await api.http.get("/api/v1/helpers/active")).text == '"numpyhelper"'


@pytest.mark.parametrize("body", [{"helper": "nope"}, {"helper": 5}, {}])
async def test_an_unknown_helper_is_refused_and_not_set(body: dict[str, Any], tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        answer = await api.http.put("/api/v1/helpers/active", json=body)
        assert answer.status_code == 400
        assert answer.json()["message"].startswith("helper: ")
        assert not any((await api.counts()).values())
