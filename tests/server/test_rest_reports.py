"""Attributes and telemetry over REST, and FEDn's older routes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fl_server.rest.legacy import MOVED, NOT_HERE
from fl_server.rest.schemas import AttributeObject, TelemetryObject
from fl_server.scheduler.scheduler import Patience
from fl_server.store.ports import Collection
from tests.server.rest_world import NOW, Api, serving

ATTRIBUTES, TELEMETRY = "/api/v1/attributes/", "/api/v1/telemetry/"
SENDER = {"name": "n", "role": "CLIENT", "client_id": "c"}


async def _client(api: Api, *ids: str) -> None:
    for id in ids:
        await api.http.post("/api/v1/clients/add", json={"name": id, "client_id": id})


async def _say(api: Api, client: str, **attributes: str) -> None:
    for key, value in attributes.items():
        body = {"key": key, "value": value, "sender": {**SENDER, "client_id": client}}
        assert (await api.http.post(ATTRIBUTES, json=body)).status_code == 201


@pytest.mark.parametrize(
    ("path", "shape", "values"),
    [(ATTRIBUTES, AttributeObject, ["x", ""]), (TELEMETRY, TelemetryObject, [1.5, 0, -3])],
    ids=["attributes", "telemetry"],
)
async def test_what_is_posted_is_answered_and_found(path: str, shape: Any, values: list[Any], tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for value in values:
            answer = await api.http.post(path, json={"key": "k", "value": value, "sender": SENDER})
            assert answer.status_code == 201
            shape.model_validate(answer.json())
            assert (answer.json()["key"], answer.json()["value"], answer.json()["sender"]) == ("k", value, SENDER)
            assert answer.json()["timestamp"].startswith("2026-11-24T01:54")
        found = (await api.http.get(f"{path}?sender.client_id=c", headers={"X-Sort-Order": "asc"})).json()
        assert [record["value"] for record in found["result"]] == values


async def test_a_time_that_is_given_is_kept_in_utc(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for said, kept in [
            ("2026-01-02T03:04:05", "2026-01-02T03:04:05Z"),
            ("2026-01-02T03:04:05.5+02:00", "2026-01-02T01:04:05.500000Z"),
        ]:
            body = {"key": "k", "value": "v", "sender": SENDER, "timestamp": said}
            assert (await api.http.post(ATTRIBUTES, json=body)).json()["timestamp"] == kept


GOOD = {"key": "k", "sender": SENDER}
WRONG_EITHER_WAY: list[tuple[dict[str, Any], str]] = [
    ({"key": ""}, "key: "),
    ({"key": 5}, "key: "),
    ({"key": "k" * 300}, "key: "),
    ({"sender": "c"}, "sender: "),
    ({"sender": None}, "sender: "),
    ({"sender": {**SENDER, "role": "KING"}}, "sender.role: "),
    ({"sender": {**SENDER, "client_id": 5}}, "sender.client_id: "),
    ({"sender": {**SENDER, "colour": "red"}}, "Invalid object: unknown key 'sender.colour'"),
    ({"timestamp": "yesterday"}, "timestamp: a date as ISO 8601 needed"),
    ({"timestamp": 5}, "timestamp: "),
    ({"colour": "red"}, "Invalid object: unknown key 'colour'"),
]
WRONG: list[tuple[str, Any, str]] = [
    (ATTRIBUTES, {**GOOD}, "value: missing"),
    (ATTRIBUTES, {**GOOD, "value": 5}, "value: "),
    (ATTRIBUTES, {**GOOD, "value": None}, "value: "),
    (ATTRIBUTES, {**GOOD, "value": "v" * 100_000}, "value: "),
    (TELEMETRY, {**GOOD, "value": "5"}, "value: "),
    (TELEMETRY, {**GOOD, "value": True}, "value: "),
    (TELEMETRY, {**GOOD, "value": [1]}, "value: "),
    *((ATTRIBUTES, {**GOOD, "value": "v", **change}, named) for change, named in WRONG_EITHER_WAY),
    *((TELEMETRY, {**GOOD, "value": 1.0, **change}, named) for change, named in WRONG_EITHER_WAY),
    (ATTRIBUTES, [], "body: "),
    (TELEMETRY, "x", "body: "),
]


async def test_a_wrong_report_is_a_400_that_names_the_field_and_writes_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for path, body, named in WRONG:
            answer = await api.http.post(path, json=body)
            assert answer.status_code == 400, body
            assert answer.json()["message"].startswith(named)
        infinite = await api.http.post(TELEMETRY, content=b'{"key": "k", "value": Infinity}')
        assert infinite.status_code == 400
        assert not any((await api.counts()).values())


async def test_of_each_key_the_latest_value_counts_empty_ones_too(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await _client(api, "a", "b", "silent")
        await _say(api, "a", city="Lund", role="x")
        await _say(api, "b", city="Uppsala")
        await _say(api, "a", role="", os="linux")
        of_a = {"city": "Lund", "role": "", "os": "linux"}
        assert (await api.http.get("/api/v1/clients/a/attributes")).json() == of_a
        assert (await api.http.get("/api/v1/clients/silent/attributes")).json() == {}
        body = {"client_ids": ["b", "nobody", "a", "silent"]}
        assert (await api.http.post(f"{ATTRIBUTES}current", json=body)).json() == {
            "b": {"city": "Uppsala"},
            "nobody": "Entity with client_id: nobody not found",
            "a": of_a,
            "silent": {},
        }


async def test_attributes_of_a_client_that_is_not_known_are_a_404(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        answer = await api.http.get("/api/v1/clients/nope/attributes")
        assert (answer.status_code, answer.json()) == (404, {"message": "Entity with id: nope not found"})


@pytest.mark.parametrize("body", [{}, {"client_ids": []}, {"client_ids": None}])
async def test_current_attributes_of_nobody_are_refused_in_fedns_words(body: Any, tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        answer = await api.http.post(f"{ATTRIBUTES}current", json=body)
        assert (answer.status_code, answer.json()) == (400, {"message": "Missing required field: client_ids"})


@pytest.mark.parametrize("body", [{"client_ids": "a"}, {"client_ids": [5]}, {"client_ids": ["a"], "x": 1}, []])
async def test_a_wrong_choice_of_clients_is_a_400(body: Any, tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        assert (await api.http.post(f"{ATTRIBUTES}current", json=body)).status_code == 400


async def test_telemetry_is_kept_for_its_time_and_other_records_longer(tmp_path: Path) -> None:
    patience = Patience(telemetry_ttl_s=100.0, sweep_every_s=0.001)
    async with serving(tmp_path, patience=patience) as api:
        old = [{"telemetry_id": f"{number}", "committed_at": NOW - 101 - number} for number in range(5000)]
        await api.scheduler.store.append(Collection.TELEMETRY, old)
        await api.insert(Collection.TELEMETRY, telemetry_id="fresh", committed_at=NOW + 1_000_000)
        await api.insert(Collection.ATTRIBUTES, attribute_id="a", committed_at=NOW - 1_000_000)
        async with asyncio.timeout(30):
            while await api.scheduler.store.count(Collection.TELEMETRY) > 1:
                pass
        assert (await api.http.get(f"{TELEMETRY}fresh")).status_code == 200
        assert (await api.http.get(f"{ATTRIBUTES}a")).status_code == 200


# ---- FEDn's older routes


async def test_an_older_route_says_what_to_use_instead(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for path, (methods, instead) in MOVED.items():
            for method in methods:
                answer = await api.http.request(method, path)
                message = f"This endpoint is deprecated. Use {instead} instead."
                assert (answer.status_code, answer.json()) == (410, {"message": message})
        for path, why in NOT_HERE.items():
            answer = await api.http.post(path, json={})
            assert (answer.status_code, answer.json()) == (501, {"message": why})


async def test_what_the_older_routes_name_is_there(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        paths = (await api.http.get("/openapi.json")).json()["paths"]
    for _, instead in MOVED.values():
        named = instead.split()[0].rstrip(",").partition("?")[0]
        assert named == "the" or named in paths, instead


async def test_the_older_way_to_join_works(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        answer = await api.http.post("/add_client", json={"name": "n", "client_id": "c"})
        assert (answer.status_code, answer.json()["status"], answer.json()["client_id"]) == (200, "assigned", "c")
        assert (await api.http.get("/api/v1/clients/c")).status_code == 200
        assert (await api.http.post("/add_client", json={"name": "n", "package": "remote"})).status_code == 203
        assert (await api.http.post("/add_client", json={})).status_code == 400
