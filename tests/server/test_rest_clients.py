"""Joining over REST."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fl_server.errors import Unavailable
from fl_server.rest.schemas import Assignment
from fl_server.store.ports import Collection
from tests.server.rest_world import serving

ADD = "/api/v1/clients/add"


async def test_a_client_is_assigned_and_stored(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        body = {"name": "n", "client_id": "c", "package": "local", "preferred_combiner": None, "os": "sent by others"}
        answer = await api.http.post(ADD, json=body)
        assert answer.status_code == 200
        assert answer.json() == {
            "status": "assigned",
            "host": "combiner.example",
            "fqdn": None,
            "package": "local",
            "ip": "10.1.2.3",
            "port": 12080,
            "tls": False,
            "helper_type": "",
            "client_id": "c",
        }
        Assignment.model_validate(answer.json())
        stored = (await api.http.get("/api/v1/clients/c")).json()
        assert (stored["name"], stored["status"], stored["combiner"]) == ("n", "available", "combiner")
        assert stored["last_seen"].endswith(" GMT")


@pytest.mark.parametrize("body", [{"name": "n"}, {"name": "n", "client_id": None}, {"name": "n", "client_id": ""}])
async def test_a_client_without_an_id_gets_one(body: dict[str, Any], tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        client_id = (await api.http.post(ADD, json=body)).json()["client_id"]
        assert len(client_id) == 36
        assert (await api.http.get(f"/api/v1/clients/{client_id}")).status_code == 200


async def test_a_remote_client_waits_for_a_package(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        answer = await api.http.post(ADD, json={"name": "n", "package": "remote"})
        message = "No compute package found. Set package in controller."
        assert (answer.status_code, answer.json()) == (203, {"success": False, "status": "retry", "message": message})


async def test_an_active_helper_is_no_package(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.http.put("/api/v1/helpers/active", json={"helper": "numpyhelper"})
        assert (await api.http.post(ADD, json={"name": "n", "package": "remote"})).status_code == 203


async def test_a_remote_client_hears_the_packages_helper(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.package()
        answer = await api.http.post(ADD, json={"name": "n", "package": "remote"})
        assert (answer.status_code, answer.json()["helper_type"]) == (200, "numpyhelper")


@pytest.mark.parametrize("key", ["preferred_combiner", "combiner_preferred"])
async def test_a_combiner_may_be_preferred_under_both_names(key: str, tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.scheduler.announce_combiner("combiner.example", 12080)
        assert (await api.http.post(ADD, json={"name": "n", "client_id": "c", key: "combiner"})).status_code == 200
        stored = (await api.http.get("/api/v1/clients/c")).json()
        assert stored["combiner_preferred"] == "combiner"


WRONG_BODIES: list[tuple[dict[str, Any], str]] = [
    ({"json": {"name": "n", "combiner_preferred": "nowhere"}}, "combiner_preferred"),
    ({"json": {"name": "n", "preferred_combiner": 5}}, "preferred_combiner"),
    ({"json": {"client_id": "c"}}, "name"),
    ({"json": {"name": ["n"]}}, "name"),
    ({"json": {"name": "a\0b"}}, "name"),
    ({"json": {"name": "n" * 300}}, "name"),
    ({"json": {"name": "n", "client_id": 5}}, "client_id"),
    ({"json": {"name": "n", "client_id": "a\r\nb"}}, "client_id"),
    ({"json": {"name": "n", "client_id": "c" * 300}}, "client_id"),
    ({"json": {"name": "n", "package": "cloud"}}, "package"),
    ({"json": []}, "body"),
    ({"json": "name"}, "body"),
    ({"content": b"{", "headers": {"content-type": "application/json"}}, "body"),
    ({"data": {"name": "n"}}, "body"),
    ({}, "body"),
]


async def test_a_wrong_body_is_a_400_that_names_the_field_and_adds_nobody(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        before = await api.counts()
        for sent, named in WRONG_BODIES:
            answer = await api.http.post(ADD, **sent)
            assert answer.status_code == 400, sent
            assert answer.json()["message"].startswith(f"{named}: ")
        assert await api.counts() == before


async def test_joining_is_answered_retry_while_the_server_stops(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.scheduler.stop_serving()
        answer = await api.http.post(ADD, json={"name": "n"})
        assert (answer.status_code, answer.json()["status"]) == (203, "retry")


async def test_joining_is_answered_retry_while_the_store_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise Unavailable("the disk is full")

    async with serving(tmp_path) as api:
        monkeypatch.setattr(api.scheduler.store, "find", fail)
        answer = await api.http.post(ADD, json={"name": "n"})
        monkeypatch.undo()
        assert answer.status_code == 203
        assert answer.json() == {"success": False, "status": "retry", "message": "the disk is full"}


async def test_a_client_is_deleted_once(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.http.post(ADD, json={"name": "n", "client_id": "c"})
        deleted = await api.http.delete("/api/v1/clients/c")
        assert (deleted.status_code, deleted.json()) == (200, {"message": "Client deleted"})
        again = await api.http.delete("/api/v1/clients/c")
        assert (again.status_code, again.json()) == (404, {"message": "Entity with id: c not found"})


async def test_the_client_config_says_where_the_caller_found_this_server(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        config = (await api.http.get("/api/v1/clients/config?checksum=true")).json()
        assert config == {"network_id": "flserve", "discover_host": "server", "discover_port": 8092}
        package = await api.package()
        config = (await api.http.get("/api/v1/clients/config")).json()
        assert config["checksum"] == package["checksum"]
        assert "checksum" not in (await api.http.get("/api/v1/clients/config?checksum=false")).json()


async def test_clients_online_are_counted_by_combiner(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.scheduler.announce_combiner("combiner.example", 12080)
        await api.attach("a", "b")
        await api.http.post(ADD, json={"name": "only added"})
        for body in ({}, {"combiners": "combiner"}):
            answer = await api.http.post("/api/v1/combiners/clients/count", json=body)
            assert answer.json() == {"result": [{"id": "combiner", "count": 2}]}


async def test_the_combiner_that_runs_here_stays_and_another_is_forgotten_once(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.scheduler.announce_combiner("combiner.example", 12080)
        own = (await api.http.get("/api/v1/combiners/")).json()["result"][0]["combiner_id"]
        kept = await api.http.delete(f"/api/v1/combiners/{own}")
        assert (kept.status_code, kept.json()) == (409, {"message": "combiner combiner runs in this server"})
        await api.insert(Collection.COMBINERS, combiner_id="old", name="old")
        deleted = await api.http.delete("/api/v1/combiners/old")
        assert (deleted.status_code, deleted.json()) == (200, {"message": "Combiner deleted"})
        again = await api.http.delete("/api/v1/combiners/old")
        assert (again.status_code, again.json()) == (404, {"message": "Entity with id: old not found"})
        assert (await api.http.get("/api/v1/combiners/count")).json() == 1
