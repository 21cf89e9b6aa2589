"""Paths, lists, errors: what all routes have in common."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from fl_server.errors import Corrupt, Unavailable
from fl_server.rest.bodies import Limits
from fl_server.rest.schemas import ENTITIES
from fl_server.store.ports import Collection
from tests.server.rest_world import NOW, Api, serving

NOUNS = [entity.noun for entity in ENTITIES]


async def _three_rounds(api: Api) -> None:
    for number in (1, 2, 3):
        config = {"session_id": "s" if number < 3 else "t"}
        stored = {"round_id": str(number), "status": "Finished", "round_config": config, "committed_at": NOW + number}
        await api.insert(Collection.ROUNDS, **stored)


@pytest.mark.parametrize(
    "path", ["/api/v1/rounds/", "/api/v1/rounds", "http://server:8092//api//v1/rounds//", "/api/v1/rounds?status=x"]
)
async def test_a_collection_answers_without_a_redirect_however_its_path_is_written(path: str, tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        answer = await api.http.get(path)
        assert (answer.status_code, answer.text) == (200, '{"count":0,"result":[]}')


async def test_every_entity_has_its_five_routes(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for entity in ENTITIES:
            path = f"/api/v1/{entity.noun}"
            await api.insert(entity.collection, **{entity.id_field: "x"})
            got = (await api.http.get(f"{path}/x")).json()
            entity.shape.model_validate(got)
            for answer in (await api.http.get(path), await api.http.post(f"{path}/list")):
                assert (answer.status_code, answer.json()) == (200, {"count": 1, "result": [got]})
                assert answer.text.startswith('{"count":1,"result":[')  # the order that FEDn's CLI relies on
            for answer in (await api.http.get(f"{path}/count"), await api.http.post(f"{path}/count", json={})):
                assert (answer.status_code, answer.text) == (200, "1")
            missing = await api.http.get(f"{path}/y")
            assert (missing.status_code, missing.json()) == (404, {"message": "Entity with id: y not found"})


async def test_the_newest_come_first_and_the_count_ignores_the_page(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await _three_rounds(api)
        page = await api.http.get("/api/v1/rounds/", headers={"X-Limit": "1", "X-Skip": "1"})
        assert page.json()["count"] == 3
        assert [found["round_id"] for found in page.json()["result"]] == ["2"]
        ascending = await api.http.get("/api/v1/rounds/", headers={"X-Sort-Key": "round_id", "X-Sort-Order": "asc"})
        assert [found["round_id"] for found in ascending.json()["result"]] == ["1", "2", "3"]


FILTERS: list[tuple[str, list[str]]] = [
    ("round_id=2", ["2"]),
    ("round_config.session_id=s", ["2", "1"]),
    ("round_config.session_id=s/", ["2", "1"]),
    ("round_id__ne=2", ["3", "1"]),
    (f"committed_at__gte={NOW + 2}", ["3", "2"]),
    ("committed_at__lt=2026-11-24T01:54:03Z", ["1"]),
    ("round_data=null&round_id__gt=1", ["3", "2"]),
    ("status=Failed", []),
]


async def test_filters_of_a_get(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await _three_rounds(api)
        for filters, ids in FILTERS:
            found = (await api.http.get(f"/api/v1/rounds/?{filters}")).json()
            assert [each["round_id"] for each in found["result"]] == ids, filters
            assert (await api.http.get(f"/api/v1/rounds/count?{filters}")).json() == len(ids)


@pytest.mark.parametrize(
    "sent",
    [
        {"json": {"round_id": "1,3"}},
        {"json": {"round_id": ["1", "3"]}},
        {"json": {"round_id__ne": "2", "status": "Finished"}},
        {"data": {"round_id": "1,3"}},
    ],
    ids=["commas", "list", "several", "form"],
)
async def test_filters_of_a_post_may_be_json_or_a_form(sent: dict[str, Any], tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await _three_rounds(api)
        found = (await api.http.post("/api/v1/rounds/list", **sent)).json()
        assert [each["round_id"] for each in found["result"]] == ["3", "1"]
        assert (await api.http.post("/api/v1/rounds/count", **sent)).json() == 2


WRONG_QUESTIONS: list[tuple[dict[str, Any], str]] = [
    ({"method": "GET", "url": "/api/v1/rounds/?colour=red"}, "colour"),
    ({"method": "GET", "url": "/api/v1/rounds/", "headers": {"X-Sort-Key": "colour"}}, "colour"),
    ({"method": "GET", "url": "/api/v1/rounds/", "headers": {"X-Limit": "ten"}}, "x-limit"),
    (
        {"method": "GET", "url": "/api/v1/rounds/", "headers": {"X-Limit": "10001"}},
        "X-Limit: more than page_max_rows (10000)",
    ),
    ({"method": "GET", "url": "/api/v1/rounds/", "headers": {"X-Limit": "9" * 30}}, "page_max_rows"),
    ({"method": "POST", "url": "/api/v1/rounds/list", "json": {"colour": "red"}}, "colour"),
    ({"method": "POST", "url": "/api/v1/rounds/list", "json": {"round_id": {"$ne": 1}}}, "round_id"),
    ({"method": "POST", "url": "/api/v1/rounds/list", "json": ["round_id"]}, "body"),
    ({"method": "POST", "url": "/api/v1/rounds/count", "content": b"{"}, "body"),
    ({"method": "POST", "url": "/api/v1/rounds/count", "content": b"x" * (Limits().json_max_bytes + 1)}, "body"),
]


async def test_what_cannot_be_asked_is_a_4xx_that_names_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for request_of, named in WRONG_QUESTIONS:
            answer = await api.http.request(**request_of)
            assert answer.status_code in (400, 413)
            assert named in answer.json()["message"]


async def test_unknown_paths_and_wrong_methods_are_answered_in_json(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        unknown = await api.http.get("/api/v2/rounds")
        assert (unknown.status_code, unknown.json()) == (404, {"message": "no such path: /api/v2/rounds"})
        wrong = await api.http.delete("/api/v1/rounds/")
        assert (wrong.status_code, wrong.json()) == (405, {"message": "DELETE is not allowed here"})


@pytest.mark.parametrize("error", [ValueError("surprise"), Corrupt("a page of the file")], ids=["a bug", "corrupt"])
async def test_an_unexpected_error_is_logged_once_under_the_id_that_the_answer_has(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: object) -> None:
        raise error

    async with serving(tmp_path) as api:
        monkeypatch.setattr(api.scheduler.store, "count", fail)
        with caplog.at_level(logging.ERROR):
            answer = await api.http.get("/api/v1/rounds/")
        monkeypatch.undo()
    said = answer.json()
    assert (answer.status_code, said["message"]) == (500, "An unexpected error occurred")
    assert [record.__dict__["incident"] for record in caplog.records] == [said["incident"]]
    assert "surprise" not in answer.text


async def test_a_store_that_is_away_is_a_503_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise Unavailable("the disk is full")

    async with serving(tmp_path) as api:
        monkeypatch.setattr(api.scheduler.store, "count", fail)
        answer = await api.http.get("/api/v1/rounds/")
        monkeypatch.undo()
    assert (answer.status_code, answer.json()) == (503, {"message": "the disk is full"})


async def test_health_is_text_and_readiness_says_why_not(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        health = await api.http.get("/health")
        assert (health.status_code, health.text) == (200, "OK")
        assert (await api.http.head("/health")).status_code == 200
        assert (await api.http.get("/ready")).json() == {"ready": True, "reason": None}
        api.scheduler.stop_serving()
        stopping = await api.http.get("/ready")
        assert (stopping.status_code, stopping.json()) == (503, {"ready": False, "reason": "stopping"})
        assert (await api.http.get("/health")).status_code == 200


async def test_openapi_is_typed_and_its_operations_have_one_id_each(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        schema = (await api.http.get("/openapi.json")).json()
        assert (await api.http.get("/docs")).status_code == 200
    operations = [operation for path in schema["paths"].values() for operation in path.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(ids) == len(set(ids))
    for operation in operations:
        assert operation["tags"]
        assert {"4XX", "5XX"} <= operation["responses"].keys()
        assert "422" not in operation["responses"]
        success = next(answer for code, answer in operation["responses"].items() if code.isdigit())
        assert all("schema" in content and content["schema"] for content in success.get("content", {}).values())
    for noun in NOUNS:
        page = schema["paths"][f"/api/v1/{noun}/"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        properties = schema["components"]["schemas"][page["$ref"].rsplit("/", 1)[1]]["properties"]
        assert list(properties) == ["count", "result"]
