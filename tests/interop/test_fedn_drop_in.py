"""FEDn 0.33.0 unmodified against our server: its SDK, its client, its APIClient and its command line.

One server and one pair of SDK clients serve all tests of this file; each test has sessions of its own, or reads the
five rounds that the pair has trained at the start. Marked long: the same on MongoDB and S3.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import tarfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio

from fl_server.testing import ServerProcess
from tests.interop.conftest import URL_PREFIX
from tests.interop.fedn_world import (
    PACKAGE,
    ROUND_SHIFT,
    SHARDS,
    Processes,
    add_seed,
    ended,
    listed,
    online,
    processes,
    seed,
    start_session,
    trail,
    until,
    value_of,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
WAIT_S = 60.0
ROUNDS = 5
CONFIG_KEYS = {  # of a round, fedn-interface.md 6.5
    *("aggregator", "aggregator_kwargs", "buffer_size", "client_settings", "clients_required", "delete_models_storage"),
    *("helper_type", "is_sl_inference", "model_id", "requested_clients", "round_id", "round_timeout", "rounds"),
    *("selected_clients", "server_functions", "session_id", "task", "validate"),
}


@dataclass(frozen=True)
class World:
    ours: Processes
    server: ServerProcess
    api: httpx.AsyncClient
    session_id: str  # of five rounds, Finished
    seed_model_id: str

    async def ask(self, *calls: tuple[str, dict[str, Any]]) -> list[Any]:
        """What FEDn's APIClient answers."""
        where = self.server.api_url.removeprefix("http://")
        return await self.ours.ask("api_calls.py", [list(call) for call in calls], FLSERVE_API=where)

    async def fedn(self, *commands: list[str]) -> list[str]:
        """What `fedn` prints to these commands, each of which ends with 0."""
        answers = await self.ours.ask("cli_calls.py", list(commands), FEDN_CONTROLLER_URL=self.server.api_url)
        assert [answer["exit_code"] for answer in answers] == [0] * len(commands), answers
        return [answer["output"] for answer in answers]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(server_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    directory = tmp_path_factory.mktemp("fedn")
    async with processes(directory) as ours, ServerProcess(directory / "data", *server_arguments) as server:
        async with httpx.AsyncClient(base_url=server.api_url, timeout=90) as api, asyncio.timeout(2 * WAIT_S):
            # one calls itself by its id as `fedn client start` does, one by its name as SDK users do
            await ours.program("client-a", server.api_url, **SHARDS["client-a"])
            await ours.program("client-b", server.api_url, **SHARDS["client-b"], calls_itself="name of client-b")
            await online(api, *SHARDS)
            session_id, seed_model_id = await start_session(api, ROUNDS, client_ids="client-a,client-b")
            session = await ended(api, session_id)
            assert session["status"] == "Finished", session
        async with httpx.AsyncClient(base_url=server.api_url, timeout=90) as api:
            yield World(ours, server, api, session_id, seed_model_id)


# ---- FednClient


async def test_five_rounds_of_two_clients_give_the_weighted_means(world: World) -> None:
    models = await trail(world.api, world.session_id, world.seed_model_id)
    values = [await value_of(world.api, model_id) for model_id in models]
    assert values == [number * ROUND_SHIFT for number in range(1, ROUNDS + 1)]
    count = await world.api.get("/api/v1/models/count", params={"session_id": world.session_id})
    assert count.json() == len(models) == ROUNDS
    session = (await world.api.get(f"/api/v1/sessions/{world.session_id}")).json()
    assert session["session_config"]["model_id"] == models[-1]
    assert session["seed_model_id"] == world.seed_model_id


async def test_round_and_combiner_documents_have_fedns_shape(world: World) -> None:
    models = await trail(world.api, world.session_id, world.seed_model_id)
    rounds = await listed(world.api, "rounds", round_config__session_id=world.session_id)
    assert [round["status"] for round in rounds] == ["Finished"] * ROUNDS
    for round, began_with, model_id in zip(rounds, [world.seed_model_id, *models], models, strict=False):
        config, [combiner] = round["round_config"], round["combiners"]
        assert round["round_id"].isdigit()
        assert config.keys() >= CONFIG_KEYS
        native = {"round_timeout": 60, "rounds": 1, "validate": True, "model_id": began_with, "task": "training"}
        assert native.items() <= config.items()
        assert isinstance(round["round_data"]["time_commit"], float)
        assert sorted(round["round_data"]["reduce"]) == ["time_aggregate_model", "time_fetch_model", "time_load_model"]
        said = {"name": "combiner", "status": "Success", "round_id": round["round_id"], "model_id": model_id}
        assert said.items() <= combiner.items()
        assert combiner["time_exec_training"] >= 0
        inner = combiner["config"]
        assert inner.keys() >= CONFIG_KEYS | {"_job_id"}
        no_text = {key: value for key, value in inner.items() if not isinstance(value, str)}
        assert no_text == {"client_settings": {}, "is_sl_inference": False, "selected_clients": [*SHARDS]}
        assert (inner["round_timeout"], inner["validate"], inner["aggregator_kwargs"]) == ("60", "True", "None")
        data = combiner["data"]
        assert (data["nr_expected_updates"], data["nr_required_updates"], data["timeout"]) == (2, 2, 60)
        assert data["aggregation_time"]["nr_aggregated_models"] == 2
        assert {"time_model_aggregation", "time_model_load"} < data["aggregation_time"].keys()
        assert data["time_combination"] >= 0


async def test_validations_statuses_and_the_run_are_recorded(world: World) -> None:
    models = await trail(world.api, world.session_id, world.seed_model_id)

    async def all_validated() -> bool:
        return len(await listed(world.api, "validations", session_id=world.session_id)) == 2 * ROUNDS

    async with asyncio.timeout(WAIT_S):
        await until(world.api, all_validated)
    validations = await listed(world.api, "validations", session_id=world.session_id)
    told = {(v["sender"]["client_id"], v["model_id"]): json.loads(v["data"]) for v in validations}
    assert told == {
        (client_id, model_id): {"mean": number * ROUND_SHIFT, "zero": 0.0}
        for number, model_id in enumerate(models, start=1)
        for client_id in SHARDS
    }
    statuses = await listed(world.api, "statuses", session_id=world.session_id)
    completed = [s for s in statuses if s["status"] == "Model update completed."]
    assert len(completed) == 2 * ROUNDS
    assert {(s["log_level"], s["type"]) for s in completed} == {("AUDIT", "MODEL_UPDATE")}
    [run] = await listed(world.api, "runs", session_id=world.session_id)
    assert (run["model_id"], run["completed_at_model_id"], run["rounds"]) == (world.seed_model_id, models[-1], ROUNDS)


async def test_metrics_of_zero_empty_attributes_and_telemetry_are_kept(world: World) -> None:
    metrics = await listed(world.api, "metrics", session_id=world.session_id, sender__client_id="client-a")
    assert {(m["key"], m["value"], m["step"]) for m in metrics} == {
        ("loss", 0.0, 0),
        ("shift", 1.0, 0),
        ("loss", 0.25, 7),
    }
    assert len(metrics) == 3 * ROUNDS
    rounds = await listed(world.api, "rounds", round_config__session_id=world.session_id)
    assert {m["round_id"] for m in metrics} == {round["round_id"] for round in rounds}
    attributes = (await world.api.get("/api/v1/clients/client-b/attributes")).json()
    assert attributes == {"site": "name of client-b", "empty": "", "rounds_seen": "{}", "note": ""}
    telemetry = await listed(world.api, "telemetry", sender__client_id="client-b", key="battery")
    assert {entry["value"] for entry in telemetry} == {0.0}
    own = await listed(world.api, "telemetry", sender__client_id="client-b")
    assert {"cpu_usage", "memory_usage"} < {entry["key"] for entry in own}


async def test_predictions_of_all_clients_are_kept(world: World) -> None:
    models = await trail(world.api, world.session_id, world.seed_model_id)
    [started] = await world.ask(("start_predictions", {"prediction_id": "p-1", "model_id": models[0]}))
    assert started == {"message": "Prediction session started"}

    async def predicted() -> bool:
        found = await listed(world.api, "predictions", model_id=models[0])
        return {p["sender"]["client_id"] for p in found} >= set(SHARDS)

    async with asyncio.timeout(WAIT_S):
        await until(world.api, predicted)
    [page] = await world.ask(("get_predictions", {"model_id": models[0]}))
    data = {p["sender"]["name"]: json.loads(p["data"]) for p in page["result"]}
    for client_id in SHARDS:
        assert data[f"name of {client_id}"] == {"client": client_id, "mean": ROUND_SHIFT}


async def test_a_model_of_fedns_binaryhelper_is_trained_as_such(world: World) -> None:
    start = np.arange(4.0)
    form = {"files": {"file": ("seed.bin", start.tobytes())}, "data": {"helper": "binaryhelper"}}
    added = (await world.api.post("/api/v1/models/", **form)).raise_for_status().json()
    async with asyncio.timeout(WAIT_S):
        session_id, _ = await start_session(
            world.api,
            2,
            client_ids="client-a,client-b",
            seed_model_id=added["model_id"],
            helper_type="binaryhelper",
            validate=False,
        )
        session = await ended(world.api, session_id)
    assert session["status"] == "Finished", session
    stored = await world.api.get(f"/api/v1/models/{session['session_config']['model_id']}/download")
    np.testing.assert_array_equal(np.frombuffer(stored.content), start + 2 * ROUND_SHIFT)


async def test_a_callback_that_fails_ends_fedns_client_and_the_round_at_its_deadline(world: World) -> None:
    failing = await world.ours.program("failing", world.server.api_url, shift=0, num_examples=1, fail_at_train=True)
    async with asyncio.timeout(WAIT_S):
        await online(world.api, "failing")
        session_id, _ = await start_session(
            world.api, 1, client_ids="client-a,failing", clients_required=1, round_timeout=6, validate=False
        )
        session = await ended(world.api, session_id)
        assert await failing.wait() == 1
    assert session["status"] == "Finished", session
    [round] = await listed(world.api, "rounds", round_config__session_id=session_id)
    data = round["combiners"][0]["data"]
    assert (data["nr_expected_updates"], data["aggregation_time"]["nr_aggregated_models"]) == (2, 1)
    assert await value_of(world.api, session["session_config"]["model_id"]) == SHARDS["client-a"]["shift"]


# ---- fedn client start


async def test_clients_with_a_remote_package_directly_at_the_combiner_and_from_a_file_train_together(
    world: World,
) -> None:
    package = world.ours.directory / "package.tar.gz"
    with tarfile.open(package, "w:gz") as archive:  # what FEDn's server takes and its clients then cannot unpack
        for path in sorted((PACKAGE / "client").iterdir()):
            archive.add(path, path.name)
        shard = json.dumps({"shift": 3.0, "num_examples": 2}).encode()
        info = tarfile.TarInfo("shard.json")
        info.size = len(shard)
        archive.addfile(info, io.BytesIO(shard))
    form = {"path": str(package), "helper": "numpyhelper", "name": "sums", "description": ""}
    added, checksum, config = await world.ask(
        ("set_active_package", form), ("get_package_checksum", {}), ("get_client_config", {})
    )
    sha256 = hashlib.sha256(package.read_bytes()).hexdigest()
    assert (added["message"], checksum["checksum"], config["checksum"]) == ("Package uploaded", sha256, sha256)

    init = world.ours.directory / "client.yaml"
    init.write_text(
        f"network_id: fedn-network\ndiscover_host: {world.server.api_url}\nname: from a file\nclient_id: from-file\n"
        f"package_checksum: {sha256}\npreferred_combiner: combiner\n"
    )
    direct = ("--combiner", "127.0.0.1", "--combiner-port", str(world.server.grpc_port), "--local-package")
    started = [
        await world.ours.client_start(
            "remote", "--api-url", world.server.api_url, local=False, FEDN_CUSTOM_URL_PREFIX="internal/"
        ),
        await world.ours.client_start("direct", *direct, shard={"shift": 1.0, "num_examples": 1}),
        await world.ours.client_start("from-file", "-in", str(init), local=False),
    ]
    async with asyncio.timeout(WAIT_S):
        await online(world.api, "remote", "direct", "from-file")
        session_id, _ = await start_session(
            world.api, 1, client_ids="remote,direct,from-file", clients_required=3, helper_type="numpyhelper"
        )
        session = await ended(world.api, session_id)
    assert session["status"] == "Finished", session
    value = await value_of(world.api, session["session_config"]["model_id"])
    assert value == pytest.approx((3.0 * 2 + 1.0 * 1 + 3.0 * 2) / 5, rel=1e-6)
    validations = await listed(world.api, "validations", session_id=session_id)
    assert {v["sender"]["client_id"] for v in validations} == {"remote", "direct", "from-file"}
    clients = {client["client_id"]: client for client in await listed(world.api, "clients")}
    assert [clients[name]["package"] for name in ("remote", "direct", "from-file")] == ["remote", None, "remote"]
    assert clients["from-file"]["combiner_preferred"] == "combiner"
    assert [process.returncode for process in started] == [None] * 3
    for process in started:
        process.kill()


# ---- APIClient


async def test_every_method_of_fedns_api_client_is_answered(world: World, tmp_path: Path) -> None:
    session_id, api = world.session_id, world.api
    models = await trail(api, session_id, world.seed_model_id)
    package, model = tmp_path / "package.tgz", tmp_path / "seed.npz"
    with tarfile.open(package, "w:gz") as archive:
        archive.add(PACKAGE / "client", "client")
    model.write_bytes(seed())
    [round_id, *_] = [r["round_id"] for r in await listed(api, "rounds", round_config__session_id=session_id)]
    [combiner] = await listed(api, "combiners")
    status_id = (await listed(api, "statuses", session_id=session_id))[0]["status_id"]
    validation = (await listed(api, "validations", session_id=session_id))[0]
    attribute = {"key": "k", "value": "", "sender": {"name": "n", "role": "CLIENT", "client_id": "client-a"}}

    asked: list[tuple[str, dict[str, Any], Any]] = []  # method, arguments, what its answer is checked with

    def page(id_field: str, at_least: int = 1) -> Any:
        def check(answer: Any) -> bool:
            ids = {entry[id_field] for entry in answer["result"]}
            return list(answer) == ["count", "result"] and answer["count"] >= len(ids) >= at_least

        return check

    def shows(**fields: Any) -> Any:
        return lambda answer: fields.items() <= answer.items()

    def number(answer: Any) -> bool:
        return isinstance(answer, int) and answer > 0

    def call(method: str, check: Any, /, **arguments: Any) -> None:
        asked.append((method, arguments, check))

    call("set_active_package", shows(message="Package uploaded"), path=str(package), helper="numpyhelper", name="sums")
    call("get_packages", page("package_id"), n_max=5)
    call("get_packages_count", number)
    call("get_active_package", shows(name="sums", active=True, file_name="package.tgz", helper="numpyhelper"))
    call("get_package_checksum", shows(checksum=hashlib.sha256(package.read_bytes()).hexdigest()))
    call("download_package", shows(success=True), path=str(tmp_path / "got.tgz"))
    call("set_active_model", shows(success=True, message="Model added successfully"), path=str(model))
    call("get_active_model", shows(session_id=None, parent_model=None))
    call("get_model", shows(model_id=models[0], model=models[0], parent_model=world.seed_model_id), id=models[0])
    call("get_models", page("model_id", ROUNDS), session_id=session_id)
    call("get_models", lambda answer: len(answer["result"]) == 2 < answer["count"], n_max=2)
    call("get_models_count", number)
    trail_ids = [world.seed_model_id, *models]
    call("get_model_trail", lambda found: [m["model_id"] for m in found] == trail_ids, id=models[-1])
    call("get_model_trail", lambda found: [m["model_id"] for m in found] == models[-3:-1][::-1], id=models[-1],
         include_self=False, reverse=False, n_max=2)  # fmt: skip
    call("download_model", shows(success=True), id=models[-1], path=str(tmp_path / "got.npz"))
    call("get_client", shows(client_id="client-a", status="online", combiner="combiner"), id="client-a")
    call("get_clients", page("client_id", 2))
    call("get_clients_count", number)
    call("get_client_config", shows(discover_host="127.0.0.1"), checksum=False)
    call("get_active_clients", page("client_id", 2), combiner_id="combiner", n_max=10)
    call("get_combiner", shows(name="combiner"), id=combiner["combiner_id"])
    call("get_combiners", page("combiner_id"))
    call("get_combiners_count", lambda answer: answer == 1)
    call("get_controller_status", lambda answer: answer["state"] in ("idle", "monitoring"))
    call("get_round", shows(round_id=round_id, status="Finished"), id=round_id)
    call("get_rounds", page("round_id", ROUNDS))
    call("get_rounds_count", number)
    call("get_session", shows(session_id=session_id, status="Finished"), id=session_id)
    call("get_session", shows(name="interop"), name="interop")
    call("get_session", shows(message="Session not found."), name="no such name")
    call("get_session", shows(message="No id or name provided."))
    call("get_sessions", page("session_id"), name="interop")
    call("get_sessions_count", number)
    call("get_session_status", lambda answer: answer == "Finished", id=session_id)
    call("session_is_finished", lambda answer: answer is True, id=session_id)
    call("get_status", shows(status_id=status_id), id=status_id)
    call("get_statuses", page("status_id", 2), session_id=session_id, event_type="MODEL_UPDATE",
         sender_name="name of client-a", sender_role="CLIENT", n_max=2)  # fmt: skip
    call("get_statuses_count", number)
    call("get_validation", shows(model_id=validation["model_id"]), id=validation["validation_id"])
    call("get_validations", page("validation_id"), session_id=session_id, model_id=validation["model_id"],
         correlation_id=validation["correlation_id"], sender_name=validation["sender"]["name"], sender_role="CLIENT",
         receiver_name="combiner", receiver_role="COMBINER")  # fmt: skip
    call("get_validations_count", number)
    call("get_predictions", lambda answer: list(answer) == ["count", "result"], model_id="none", correlation_id="none",
         sender_name="n", sender_role="CLIENT", receiver_name="r", receiver_role="COMBINER", n_max=3)  # fmt: skip
    call("start_predictions", shows(message="Model none not found"), model_id="none")
    call("add_attributes", shows(key="k", value=""), attribute=attribute)
    call("get_current_attributes", lambda answer: answer["client-a"].items() >= {"k": "", "empty": ""}.items(),
         client_list=["client-a"])  # fmt: skip
    call("start_session", lambda answer: answer["message"] == "Session started" and answer["session_id"], name="by api",
         aggregator="fedopt", aggregator_kwargs={"serveropt": "yogi", "learning_rate": 0.1}, model_id=models[0],
         round_timeout=30, rounds=1, round_buffer_size=-1, delete_models=True, validate=False, helper=None,
         min_clients=1, requested_clients=8)  # fmt: skip
    call("continue_session", shows(message="Session not found."), session_id="none")
    call("start_splitlearning_session", lambda answer: "message" in answer, name="split", model_id=models[0])
    call("get_package", lambda answer: "not found" in answer["message"], id="none")

    names, *answers = await world.ask(("", {}), *[(method, arguments) for method, arguments, _ in asked])
    assert {method for method, _, _ in asked} == set(names)
    for (method, arguments, check), answer in zip(asked, answers, strict=True):
        assert check(answer), (method, arguments, answer)
    assert (tmp_path / "got.tgz").read_bytes() == package.read_bytes()
    with np.load(tmp_path / "got.npz") as layers:
        assert float(layers["1"][0]) == ROUNDS * ROUND_SHIFT

    [config] = await world.ours.ask(
        "api_calls.py",
        [["get_client_config", {}]],
        FLSERVE_API=world.server.api_url.removeprefix("http://") + URL_PREFIX,
    )
    assert config["checksum"], "below the prefix"
    started = next(a["session_id"] for (m, _, _), a in zip(asked, answers, strict=True) if m == "start_session")
    async with asyncio.timeout(WAIT_S):
        assert (await ended(api, started))["status"] == "Finished"
        [again] = await world.ask(("continue_session", {"session_id": started, "rounds": 2}))
        assert again["message"] == "Session started"
        assert (await ended(api, started))["status"] == "Finished"
    assert len(await listed(api, "models", session_id=started)) == 3


# ---- the fedn command


async def test_every_list_and_get_of_fedns_command_line_prints_what_there_is(world: World) -> None:
    session_id, api = world.session_id, world.api
    models = await trail(api, session_id, world.seed_model_id)
    [round_id, *_] = [r["round_id"] for r in await listed(api, "rounds", round_config__session_id=session_id)]
    [combiner] = await listed(api, "combiners")
    status_id = (await listed(api, "statuses", session_id=session_id))[0]["status_id"]
    validation_id = (await listed(api, "validations", session_id=session_id))[0]["validation_id"]
    answer = await api.post(
        "/api/v1/packages/",
        files={"file": ("p.tgz", _archive())},
        data={"name": "listed", "helper": "numpyhelper", "description": ""},
    )
    package_id = answer.raise_for_status().json()["package_id"]
    ids = {
        "client": "client-a",
        "combiner": combiner["combiner_id"],
        "model": models[0],
        "package": package_id,
        "round": round_id,
        "session": session_id,
        "validation": validation_id,
    }
    nouns = [*ids, "status"]
    lists = await world.fedn(*[[noun, "list", "--n_max", "1"] for noun in nouns])
    for output in lists:
        assert "Found " in output and "\tcommitted_at: " in output, output
    gets = await world.fedn(*[[noun, "get", "-id", id] for noun, id in ids.items()])
    for (noun, id), output in zip(ids.items(), gets, strict=True):
        assert f"Found {noun}" in output and f"\t{noun}_id: {id}" in output, output

    of_session = [[noun, "list", "-s", session_id] for noun in ("model", "round", "validation", "status")]
    found_models, found_rounds, found_validations, found_statuses = await world.fedn(*of_session)
    assert f"Found {ROUNDS} models" in found_models  # FEDn's server finds none: its command sends a stray slash
    assert f"Found {ROUNDS} rounds" in found_rounds
    assert "Found 10 validations" in found_validations
    assert "Model update completed." in found_statuses
    # a bug of FEDn's command, which leaves out a slash of the path: no server can help it
    [status] = await world.fedn(["status", "get", "-id", status_id])
    assert "Error: 404" in status


async def test_fedns_command_line_sets_a_model_and_starts_a_session(world: World, tmp_path: Path) -> None:
    model = tmp_path / "seed.npz"
    model.write_bytes(seed())
    [active] = await world.fedn(["model", "set-active", "-f", str(model)])
    assert "Active helper set to: numpyhelper" in active and "Model uploaded successfully." in active
    model_id = await add_seed(world.api)
    options = ["-n", "by fedn", "-r", "1", "-rt", "30", "-v", "False", "-mc", "1", "-rc", "8", "-m", model_id]
    newest, said = await world.fedn(
        ["session", "start", "-n", "the newest", "-r", "1", "-rt", "30"], ["session", "start", *options]
    )
    assert "Session started successfully: {'message': 'Session started'" in newest
    assert "Session started successfully: {'message': 'Session started'" in said
    for name in ("the newest", "by fedn"):
        [session] = await listed(world.api, "sessions", name=name)
        async with asyncio.timeout(WAIT_S):
            assert (await ended(world.api, session["session_id"]))["status"] == "Finished"
        assert session["session_config"]["aggregator_kwargs"] is None


async def test_what_is_wrong_in_fedns_own_command_line_is_its_own(world: World) -> None:
    """Said here so that nobody looks for these in our server."""
    refused, started = await world.ours.ask(
        "cli_calls.py",
        [
            ["session", "start", "-ak", '{"learning_rate": 0.1}'],
            ["session", "start", "-mc", "1000", "-rc", "2000", "-n", "refused", "-m", world.seed_model_id],
        ],
        FEDN_CONTROLLER_URL=world.server.api_url,
    )
    assert refused["exit_code"] == 2 and "-ak" in refused["output"]  # its type is `dict`: no text is one
    assert started["exit_code"] == 0  # and "successfully" is said, though the server's words are the refusal
    assert "Session started successfully: {'message': 'Number of available clients is lower" in started["output"]
    [lost] = await world.ours.ask("cli_calls.py", [["session", "list"]])  # no FEDN_CONTROLLER_URL, no Studio
    assert "TypeError" in lost["raised"]


async def test_fedns_package_and_run_commands_work_on_a_package_that_our_server_takes(
    world: World, tmp_path: Path
) -> None:
    folder = tmp_path / "client"
    folder.mkdir()
    for path in (PACKAGE / "client").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "shard.json").write_text(json.dumps({"shift": 2.0, "num_examples": 3}))
    (folder / "build.py").write_text("import pathlib; pathlib.Path('built').touch()\n")
    manifest = (folder / "fedn.yaml").read_text() + "  build:\n    command: python build.py\n"
    (folder / "fedn.yaml").write_text(manifest)
    (folder / ".fednignore").write_text("built\n")
    model, update, metrics = tmp_path / "seed.npz", tmp_path / "update.npz", tmp_path / "metrics.json"
    model.write_bytes(seed())
    await world.fedn(
        ["run", "build", "--path", str(folder)],
        ["package", "create", "--path", str(folder), "--name", "made.tgz", "--output", str(tmp_path)],
        ["run", "train", "--path", str(folder), "--input", str(model), "--output", str(update)],
        ["run", "validate", "--path", str(folder), "--input", str(update), "--output", str(metrics)],
    )
    assert (folder / "built").exists()
    assert json.loads(Path(f"{update}-metadata").read_text()) == {"num_examples": 3}
    assert json.loads(metrics.read_text()) == {"mean": 2.0}
    made = tmp_path / "made.tgz"
    form = {"path": str(made), "helper": "numpyhelper", "name": "made"}
    added, got = await world.ask(
        ("set_active_package", form), ("download_package", {"path": str(tmp_path / "got.tgz")})
    )
    assert (added["message"], got["success"]) == ("Package uploaded", True)
    assert (tmp_path / "got.tgz").read_bytes() == made.read_bytes()


def _archive() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        archive.add(PACKAGE / "client", "client")
    return out.getvalue()
