"""Sessions over REST: create, start, stop, rename, explain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fl_server.rest.schemas import RunObject, SessionObject
from fl_server.store.ports import Collection, Patch
from tests.server.rest_world import Api, serving

SESSIONS = "/api/v1/sessions/"


async def _started(api: Api) -> dict[str, Any]:
    await api.attach("a")
    session = await api.session(clients_required=1)
    answer = await api.http.post(f"{SESSIONS}start", json={"session_id": session["session_id"], "rounds": 3})
    assert (answer.status_code, answer.json()) == (200, {"message": "Session started"})
    return session


async def _status(api: Api, session: dict[str, Any]) -> str:
    return str((await api.http.get(f"{SESSIONS}{session['session_id']}")).json()["status"])


async def test_a_session_is_created_as_fedn_shows_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        seed = await api.seed()
        config = {"model_id": seed, "round_timeout": 90, "clients_required": 2, "validate": False}
        answer = await api.http.post(SESSIONS, json={"name": "first", "session_config": config})
        assert answer.status_code == 201
        session = answer.json()
        SessionObject.model_validate(session)
        assert (session["status"], session["name"], session["seed_model_id"]) == ("Created", "first", seed)
        assert session["session_config"].items() >= {**config, "buffer_size": -1, "aggregator": "fedavg"}.items()
        assert '"round_timeout":90,' in answer.text
        assert (await api.http.get(f"{SESSIONS}{session['session_id']}")).json() == session
        assert (await api.http.get("/api/v1/sessions?name=first")).json()["result"] == [session]


async def test_the_seed_may_be_named_beside_the_config_and_the_id_chosen(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        body = {"session_id": "mine", "seed_model_id": await api.seed(), "session_config": {}}
        answer = await api.http.post(SESSIONS, json=body)
        assert (answer.status_code, answer.json()["session_id"]) == (201, "mine")
        again = await api.http.post(SESSIONS, json=body)
        assert again.status_code in (400, 409)
        assert "mine" in again.json()["message"]


async def test_the_active_helper_is_used_when_none_is_named(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.http.put("/api/v1/helpers/active", json={"helper": "numpyhelper"})
        assert (await api.session())["session_config"]["helper_type"] == "numpyhelper"


WRONG_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"rounds": 0}, "rounds: "),
    ({"rounds": "5"}, "rounds: "),
    ({"rounds": True}, "rounds: "),
    ({"aggregator": "nope"}, "aggregator: "),
    ({"aggregator_kwargs": [1]}, "aggregator_kwargs: "),
    ({"helper_type": "nope"}, "helper_type: 'nope' is unknown; known: binaryhelper, numpyhelper, safetensors"),
    ({"model_id": "nope"}, "model_id: no model nope"),
    ({"model_id": None}, "model_id: missing"),
    ({"model_id": ""}, "model_id: missing"),
    ({"model_id": 5}, "model_id: "),
    ({"server_functions": "class ServerFunctions: ..."}, "server_functions: not supported"),
    ({"buffer_size": 0}, "buffer_size: "),
    ({"clients_required": 0}, "clients_required: "),
    ({"clients_required": 5, "requested_clients": 3}, "requested_clients: "),
    ({"round_timeout": -1}, "round_timeout: "),
    ({"client_settings": []}, "client_settings: "),
    ({"colour": "red"}, "Invalid object: unknown key 'colour'"),
]


async def test_a_wrong_config_is_a_400_that_names_the_field_and_writes_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        seed = await api.seed()
        before = await api.counts()
        for change, named in WRONG_CONFIGS:
            answer = await api.http.post(SESSIONS, json={"session_config": {"model_id": seed, **change}})
            assert answer.status_code == 400, change
            assert answer.json()["message"].startswith(named)
        assert await api.counts() == before


WRONG_BODIES: list[tuple[dict[str, Any], str]] = [
    ({"json": {}}, "session_config: missing"),
    ({"json": {"session_config": "fedavg"}}, "session_config: a JSON object needed"),
    ({"json": {"session_config": {}, "seed_model_id": "nope"}}, "seed_model_id: no model nope"),
    ({"json": {"session_config": {}, "colour": "red"}}, "Invalid object: unknown key 'colour'"),
    ({"json": {"session_config": {}, "name": 5}}, "name: "),
    ({"json": []}, "body: a JSON object needed"),
    ({"json": "session"}, "body: a JSON object needed"),
    ({"json": 5}, "body: a JSON object needed"),
    ({"json": None}, "body: "),
    ({"content": b'{"session_config": {', "headers": {"content-type": "application/json"}}, "body: invalid JSON"),
    ({"content": b'{"session_config": {}}', "headers": {"content-type": "text/plain"}}, "body: a JSON object"),
    ({"content": b"[" * 9999, "headers": {"content-type": "application/json"}}, "body: nested deeper"),
    ({}, "body: "),
]


async def test_a_body_of_the_wrong_type_is_a_400_and_writes_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        before = await api.counts()
        for sent, named in WRONG_BODIES:
            answer = await api.http.post(SESSIONS, **sent)
            assert answer.status_code == 400, sent
            assert answer.json()["message"].startswith(named)
        assert await api.counts() == before


async def test_a_body_of_more_than_a_megabyte_is_a_413(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        answer = await api.http.post(SESSIONS, json={"session_config": {"client_settings": {"x": "x" * (1 << 20)}}})
        assert answer.status_code == 413
        assert answer.json()["message"].startswith("body: ")


# ---- start


async def test_a_session_starts_and_the_controller_monitors(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        assert (await api.http.get("/get_controller_status")).json() == {"state": "idle"}
        session = await _started(api)
        assert await _status(api, session) == "Started"
        assert (await api.http.get("/get_controller_status")).json() == {"state": "monitoring"}


REFUSED_STARTS: list[tuple[dict[str, Any], str]] = [
    ({"client_ids": ["a"], "rounds": "3"}, "client_ids must be a comma separated string"),
    ({"rounds": "3"}, "Session ID is required"),
    ({"session_id": None}, "Session ID is required"),
    ({"session_id": "nope"}, "Session with specified ID does not exist"),
]


async def test_a_start_is_refused_in_fedns_order_and_words(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for body, message in REFUSED_STARTS:
            answer = await api.http.post(f"{SESSIONS}start", json=body)
            assert (answer.status_code, answer.json()) == (400, {"message": message})


WRONG_STARTS: list[tuple[str, Any]] = [
    ("rounds", 0),
    ("rounds", "3"),
    ("rounds", True),
    ("rounds", 2.5),
    ("round_timeout", 0),
    ("round_timeout", "180"),
    ("model_name_prefix", 5),
    ("wait_for_clients_s", -1),
]


async def test_a_start_with_a_wrong_value_names_it_and_starts_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.attach("a")
        session = await api.session()
        for field, value in WRONG_STARTS:
            body = {"session_id": session["session_id"], field: value}
            answer = await api.http.post(f"{SESSIONS}start", json=body)
            assert answer.status_code == 400, body
            assert answer.json()["message"].startswith(f"{field}: ")
        assert await _status(api, session) == "Created"


async def test_a_session_that_runs_cannot_be_started_again(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        session = await _started(api)
        again = await api.http.post(f"{SESSIONS}start", json={"session_id": session["session_id"]})
        assert (again.status_code, again.json()) == (400, {"message": "A session is already running!"})


@pytest.mark.parametrize("chosen", [{}, {"client_ids": "b, c"}])
async def test_a_session_without_enough_clients_says_so_at_the_call(chosen: dict[str, str], tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.attach("a")
        session = await api.session(clients_required=2)
        answer = await api.http.post(f"{SESSIONS}start", json={"session_id": session["session_id"], **chosen})
        assert answer.status_code == 400
        assert "2" in answer.json()["message"]
        assert await _status(api, session) == "Created"


async def test_a_session_whose_model_is_gone_is_not_started(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.attach("a")
        for gone in ("bytes", "record"):
            session = await api.session()
            model_id = session["session_config"]["model_id"]
            if gone == "bytes":
                await api.scheduler.models.delete([model_id])
            else:
                await api.scheduler.store.delete(Collection.MODELS, model_id)
            answer = await api.http.post(f"{SESSIONS}start", json={"session_id": session["session_id"]})
            assert (answer.status_code, answer.json()) == (400, {"message": "Session seed model not found"})
            assert await _status(api, session) == "Created"


async def test_split_learning_is_not_here(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        answer = await api.http.post(f"{SESSIONS}start_splitlearning_session", json={"session_id": "s"})
        assert (answer.status_code, answer.json()) == (501, {"message": "Split learning is not supported"})


# ---- runs


async def _runs(api: Api, session: dict[str, Any]) -> list[dict[str, Any]]:
    found = await api.http.get(f"/api/v1/runs/?session_id={session['session_id']}", headers={"X-Sort-Order": "asc"})
    return [RunObject.model_validate(run).model_dump() for run in found.json()["result"]]


async def test_each_start_is_a_run_that_ends_with_the_session(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.attach("a")
        session = await api.session()
        assert await _runs(api, session) == []
        path, model_id = f"{SESSIONS}{session['session_id']}", session["session_config"]["model_id"]
        for number in (1, 2):
            body = {"session_id": session["session_id"], "rounds": 2 + number, "round_timeout": 30}
            await api.http.post(f"{SESSIONS}start", json=body)
            run = (await _runs(api, session))[-1]
            assert (run["model_id"], run["rounds"], run["round_timeout"]) == (model_id, 2 + number, 30)
            assert (run["completed_at"], run["completed_at_model_id"]) == (None, None)
            await api.http.patch(path, json={"status": "Terminated"})
            ended = (await _runs(api, session))[-1]
            assert (ended["run_id"], ended["completed_at_model_id"]) == (run["run_id"], model_id)
            assert ended["completed_at"].endswith(" GMT")
        assert len({run["run_id"] for run in await _runs(api, session)}) == 2


async def test_a_restart_goes_on_with_the_run_and_makes_none(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        session = await _started(api)
        runs = await _runs(api, session)
    async with serving(tmp_path) as api:
        assert await _runs(api, session) == runs
        await api.http.patch(f"{SESSIONS}{session['session_id']}", json={"status": "Terminated"})
        ended = await _runs(api, session)
        assert [run["run_id"] for run in ended] == [run["run_id"] for run in runs]
        assert ended[0]["completed_at"]


async def test_what_a_crash_between_two_writes_left_out_of_the_runs_is_made_up(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        begun, ended = await _started(api), await _started(api)
        runs = [await _runs(api, begun), await _runs(api, ended)]
        await api.scheduler.store.delete(Collection.RUNS, runs[0][0]["run_id"])
        await api.http.patch(f"{SESSIONS}{ended['session_id']}", json={"status": "Terminated"})
        runs[1] = await _runs(api, ended)
        undone = {"completed_at": None, "completed_at_model_id": None}
        await api.scheduler.write([Patch(Collection.RUNS, runs[1][0]["run_id"], undone)])
    async with serving(tmp_path) as api:
        assert await _runs(api, begun) == runs[0]
        assert await _runs(api, ended) == runs[1]


async def test_a_session_may_wait_for_its_clients(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        session = await api.session()
        body = {"session_id": session["session_id"], "wait_for_clients_s": 60}
        assert (await api.http.post(f"{SESSIONS}start", json=body)).status_code == 200
        assert await _status(api, session) == "Started"


# ---- change


async def test_a_running_session_is_stopped_by_patching_its_status(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        session = await _started(api)
        path = f"{SESSIONS}{session['session_id']}"
        stopped = await api.http.patch(path, json={"status": "Terminated"})
        assert (stopped.status_code, stopped.json()["status"]) == (200, "Terminated")
        again = await api.http.patch(path, json={"status": "Terminated"})
        assert (again.status_code, again.json()["status"]) == (200, "Terminated")


async def test_a_session_that_does_not_run_cannot_be_stopped(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        session = await api.session()
        path = f"{SESSIONS}{session['session_id']}"
        answer = await api.http.patch(path, json={"status": "Terminated", "name": "other"})
        assert answer.status_code == 409
        assert (await api.http.get(path)).json() == session


async def test_a_patch_changes_the_keys_of_the_config_that_it_names_and_the_next_start_follows(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.attach("a")
        session = await api.session(clients_required=1, round_timeout=90, aggregator_kwargs={})
        path = f"{SESSIONS}{session['session_id']}"
        wanted = {"session_config": {"clients_required": 2, "buffer_size": 2}, "name": "other"}
        patched = (await api.http.patch(path, json=wanted)).json()
        assert patched["session_config"] == {**session["session_config"], "clients_required": 2, "buffer_size": 2}
        assert (patched["name"], patched["seed_model_id"]) == ("other", session["seed_model_id"])
        assert (await api.http.get(path)).json() == patched
        refused = await api.http.post(f"{SESSIONS}start", json={"session_id": session["session_id"]})
        message = "Number of available clients is lower than the required minimum of 2 (1 attached)"
        assert (refused.status_code, refused.json()) == (400, {"message": message})


async def test_a_put_replaces_the_whole_config(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        session = await api.session(clients_required=2, round_timeout=90)
        path = f"{SESSIONS}{session['session_id']}"
        put = (await api.http.put(path, json={"session_config": {"rounds": 7}})).json()["session_config"]
        assert (put["rounds"], put["clients_required"], put["round_timeout"]) == (7, 1, 180)
        assert put["model_id"] == session["session_config"]["model_id"]


async def test_a_changed_config_is_there_after_a_restart(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        session = await api.session()
        path = f"{SESSIONS}{session['session_id']}"
        await api.http.patch(path, json={"session_config": {"rounds": 7}})
    async with serving(tmp_path) as api:
        assert (await api.http.get(path)).json()["session_config"]["rounds"] == 7


async def test_a_session_is_not_stopped_and_reconfigured_in_one_request(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        session = await _started(api)
        body = {"status": "Terminated", "session_config": {"rounds": 9}}
        answer = await api.http.patch(f"{SESSIONS}{session['session_id']}", json=body)
        assert (answer.status_code, await _status(api, session)) == (409, "Started")


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
async def test_a_running_sessions_config_is_not_overwritten(method: str, tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        session = await _started(api)
        path = f"{SESSIONS}{session['session_id']}"
        answer = await api.http.request(method, path, json={"session_config": {"rounds": 9}, "name": "other"})
        assert answer.status_code == 409
        assert answer.json()["message"].startswith("session_config: ")
        assert (await api.http.get(path)).json()["name"] == "s"


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
async def test_a_session_is_renamed_also_when_all_of_it_is_sent_back(method: str, tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        session = await api.session()
        path = f"{SESSIONS}{session['session_id']}"
        renamed = await api.http.request(method, path, json={**session, "name": "other"})
        assert renamed.status_code == 200
        assert renamed.json() == {**session, "name": "other", "updated_at": renamed.json()["updated_at"]}
        assert (await api.http.get(path)).json() == renamed.json()


async def test_the_name_of_a_running_session_outlives_its_next_save(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        session = await _started(api)
        path = f"{SESSIONS}{session['session_id']}"
        await api.http.patch(path, json={"name": "other"})
        stopped = await api.http.patch(path, json={"status": "Terminated"})
        assert (stopped.json()["name"], stopped.json()["status"]) == ("other", "Terminated")


async def test_patch_passes_over_unknown_keys_and_put_refuses_them(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        session = await api.session()
        path = f"{SESSIONS}{session['session_id']}"
        patched = await api.http.patch(path, json={"colour": "red", "seed_model_id": "other"})
        assert (patched.status_code, patched.json()) == (200, session)
        put = await api.http.put(path, json={"colour": "red"})
        assert (put.status_code, put.json()) == (400, {"message": "Invalid object: unknown key 'colour'"})


WRONG_CHANGES: list[tuple[Any, str]] = [
    ({"status": "Finished"}, "status: "),
    ({"status": 5}, "status: "),
    ({"name": 5}, "name: "),
    ({"committed_at": "now"}, "committed_at: "),
    ({"session_config": {"rounds": 0}}, "rounds: "),
    ({"session_config": {"rounds": "9"}}, "rounds: "),
    ({"session_config": {"colour": "red"}}, "Invalid object: unknown key 'colour'"),
    ({"session_config": {"aggregator": "nope"}}, "aggregator: "),
    ({"session_config": {"helper_type": "nope"}}, "helper_type: "),
    ({"session_config": {"server_functions": "class X: ..."}}, "server_functions: "),
    ({"session_config": {"model_id": "other"}}, "model_id: cannot be changed"),
    ({"session_config": [1], "name": "other"}, "session_config: "),
    ({"session_config": {"rounds": 0}, "name": "other"}, "rounds: "),
    ({"session_config": {"rounds": 9}, "status": "Finished"}, "status: "),
    (["name"], "body: "),
]


async def test_what_cannot_be_changed_is_refused_by_name(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        session = await api.session()
        path = f"{SESSIONS}{session['session_id']}"
        for body, named in WRONG_CHANGES:
            answer = await api.http.patch(path, json=body)
            assert answer.status_code == 400, body
            assert answer.json()["message"].startswith(named)
        assert (await api.http.get(path)).json() == session


async def test_an_unknown_session_is_a_404_for_every_verb(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        missing = {"message": "Entity with id: nope not found"}
        for method, path in [("GET", "nope"), ("PATCH", "nope"), ("PUT", "nope"), ("GET", "nope/explain")]:
            answer = await api.http.request(
                method, f"{SESSIONS}{path}", json=None if method == "GET" else {"name": "x"}
            )
            assert (answer.status_code, answer.json()) == (404, missing)


async def test_explain_says_why_in_sentences(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        session = await _started(api)
        answer = (await api.http.get(f"{SESSIONS}{session['session_id']}/explain")).json()
        assert answer["session_id"] == session["session_id"]
        assert any("waiting for 1 of 1 clients" in sentence for sentence in answer["sentences"])
