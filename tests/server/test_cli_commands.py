"""flserve's commands against a running server: what they print, their JSON, their exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_client import TrainResult
from fl_server.core.model import ClientId
from fl_server.testing import Federation
from tests.server.cli_runner import Terminal

WAIT_S = 60.0


def plus_one(parameters: Any, task: Any) -> TrainResult:
    return TrainResult([array + task.settings.get("step", 1) for array in parameters], num_examples=1)


def not_a_number(parameters: Any, task: Any) -> TrainResult:
    return TrainResult([array * float("nan") for array in parameters], num_examples=1)


def score(parameters: Any, task: Any) -> dict[str, float]:
    return {"accuracy": float(parameters[0][0]) / 8}


def terminal_of(federation: Federation) -> Terminal:
    return Terminal(federation.server.api_url)


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    np.savez(tmp_path / "seed.npz", np.zeros(2))
    return tmp_path / "seed.npz"


@pytest.fixture
async def federation() -> AsyncIterator[Federation]:
    async with Federation() as running:
        yield running


# ---- a session


async def test_a_watched_session_is_a_line_a_round_and_its_outcome(seed: Path) -> None:
    async with Federation(train=plus_one, validate=score, clients=2) as federation:
        flserve = terminal_of(federation)
        added = await flserve("model", "upload", seed, "--name", "seed")
        assert (added.code, added.err) == (0, "")
        model_id = added.out.split()[1]
        said = await flserve(
            *("session", "start", "--rounds", 3, "--min-clients", 2, "--wait-for-clients", 30, "--watch"),
            *("--client-settings", '{"step": 2}', "--name", "mine", "--round-timeout", 50.5, "--model", model_id),
        )
        assert (said.code, said.err) == (0, "")
        *rounds, outcome = said.out.splitlines()
        assert [re.sub(r"[\d.]+ s$", "s", line) for line in rounds] == [
            f"round  {number}/3  updates 2/2  validation accuracy {number / 4:.3f}  s" for number in (1, 2, 3)
        ]
        session = (await flserve.json("session", "list"))["result"][0]
        config = session["session_config"]
        assert outcome == f"session {session['session_id']} is Finished; 3 rounds, model {config['model_id']}"
        assert (session["name"], config["rounds"], config["round_timeout"]) == ("mine", 3, 50.5)
        assert (session["seed_model_id"], config["requested_clients"]) == (model_id, 0)


async def test_in_json_the_outcome_alone_is_on_stdout(seed: Path) -> None:
    async with Federation(train=plus_one, clients=1) as federation:
        flserve = terminal_of(federation)
        await flserve("model", "upload", seed)
        start = ("session", "start", "--rounds", 2, "--no-validate", "--wait-for-clients", 30)
        said = await flserve(*start, "--watch", "--format", "json")
        assert (said.code, said.json["status"]) == (0, "Finished")
        assert [line.split("  ")[0] for line in said.err.splitlines()] == ["round", "round"]
        said = await flserve(*start, "--format", "json")
        assert said.json.keys() == {"message", "session_id"}
        await federation.ended(said.json["session_id"])


async def test_a_watched_session_that_does_not_finish_is_exit_code_1_and_failed_attempts_are_told(seed: Path) -> None:
    async with Federation(train=not_a_number, clients=1) as federation:
        flserve = terminal_of(federation)
        await flserve("model", "upload", seed)
        watching = asyncio.create_task(flserve("session", "start", "--wait-for-clients", 30, "--watch"))
        event = await federation.event("round", phase="failed")
        # not by a second command: the standard output of this process is one, and the watching one has it now
        await federation.server.scheduler.stop(event.data["session_id"])
        said = await watching
        assert said.code == 1
        first, *_, outcome = said.out.splitlines()
        assert first.startswith("round  1/5  attempt 1 failed: ")
        assert outcome.startswith(f"session {event.data['session_id']} is Terminated")


async def test_ctrl_c_stops_the_watching_and_not_the_session(seed: Path) -> None:
    async with Federation(train=plus_one, clients=1) as federation:
        await terminal_of(federation)("model", "upload", seed)
        arguments = ("session", "start", "--rounds", "100000", "--no-validate", "--wait-for-clients", "30", "--watch")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fl_server.cli", *arguments),
            stdout=PIPE,
            stderr=PIPE,
            env={**os.environ, "FL_API_URL": federation.server.api_url},
        )
        assert process.stdout is not None
        async with asyncio.timeout(WAIT_S):
            assert (await process.stdout.readline()).startswith(b"round  1/100000  updates 1/1")
            process.send_signal(signal.SIGINT)
            _, err = await process.communicate()
        assert process.returncode == 130
        (session,) = (await federation.call("GET", "/api/v1/sessions/"))["result"]
        session_id = session["session_id"]
        assert err.decode() == (
            f"flserve: not watching any more; session {session_id} goes on: flserve session stop {session_id} ends it\n"
        )
        assert session["status"] == "Started"
        stopped = await terminal_of(federation)("session", "stop", session_id)
        assert (stopped.code, stopped.out) == (0, f"session {session_id} is Terminated\n")


async def test_a_session_that_cannot_start_is_refused_in_the_servers_words(federation: Federation, seed: Path) -> None:
    flserve = terminal_of(federation)
    said = await flserve("session", "start")
    assert (said.code, said.out, said.err) == (1, "", "flserve: No models found in the repository\n")
    await flserve("model", "upload", seed)
    said = await flserve("session", "start", "--watch")
    assert said.code == 1 and re.fullmatch(r"flserve: .*\b0 .*attached.*; session \S+ is created\n", said.err)
    for option, value, words in (
        ("--aggregator", "nope", "aggregator: "),
        ("--helper", "nope", "helper_type: 'nope' is unknown"),
        ("--model", "nope", "model_id: no model nope"),
        ("--buffer-size", 0, "buffer_size: "),
        ("--min-clients", 0, "clients_required: "),
        ("--round-timeout", 0, "round_timeout: "),
        ("--aggregator-kwargs", '{"colour": 1}', "aggregator_kwargs"),
    ):
        said = await flserve("session", "start", option, value)
        assert (said.code, said.out) == (1, "") and words in said.err and len(said.err.splitlines()) == 1, option


async def test_why_a_session_waits_is_explained(federation: Federation, seed: Path) -> None:
    flserve = terminal_of(federation)
    said = await flserve("explain")
    assert (said.code, said.err) == (1, "flserve: there is no session yet\n")
    await flserve("model", "upload", seed)
    said = await flserve("session", "start", "--wait-for-clients", 60)
    session_id = said.out.split()[1]
    assert said.out == f"session {session_id} is started: flserve explain {session_id}\n"
    newest, named = await flserve("explain"), await flserve("explain", session_id)
    for said in (newest, named):
        assert said.code == 0 and "0 of 1 clients needed are attached" in said.out
    assert (await flserve.json("explain"))["session_id"] == session_id
    assert (await flserve("session", "stop", session_id)).code == 0
    assert (await flserve.json("session", "get", session_id))["status"] == "Terminated"


# ---- list and get


async def test_every_noun_is_listed_and_got(seed: Path) -> None:
    async with Federation(train=plus_one, validate=score, clients=1) as federation:
        flserve = terminal_of(federation)
        await flserve("model", "upload", seed)
        start = ("session", "start", "--rounds", 1, "--wait-for-clients", 30, "--watch")
        assert (await flserve(*start)).code == 0
        for noun, least in (
            ("session", 1),
            ("client", 1),
            ("model", 2),
            ("round", 1),
            ("validation", 1),
            ("combiner", 1),
        ):
            table, page = await flserve(noun, "list"), await flserve.json(noun, "list")
            assert (table.code, table.err, len(table.rows)) == (0, "", page["count"] + 1)
            assert page["count"] == len(page["result"]) == least
            one = page["result"][0]
            (id_field,) = {f"{noun}_id", "round_id"} & set(one) if noun == "round" else {f"{noun}_id"}
            assert await flserve.json(noun, "get", one[id_field]) == one
            shown = await flserve(noun, "get", one[id_field])
            assert re.search(rf"^{id_field} +{re.escape(one[id_field])}$", shown.out, re.M)
        for noun in ("package", "status", "run"):
            said = await flserve(noun, "list")
            assert said.code == 0 and len(said.rows[0]) >= 6
            assert (await flserve.json(noun, "list")).keys() == {"count", "result"}
        said = await flserve("round", "list")
        assert said.rows[0] == ["round_id", "status", "session", "model", "committed_at", "reason"]
        assert said.rows[1][:2] == ["1", "Finished"]
        assert re.search(r"^round_config\.session_id +\S+$", (await flserve("round", "get", "1")).out, re.M)


async def test_lists_are_filtered_sorted_and_cut(federation: Federation, seed: Path) -> None:
    flserve = terminal_of(federation)
    for name in ("b", "a", "c"):
        await flserve("model", "upload", seed, "--name", name)

    async def names(*options: object) -> list[str]:
        return [model["name"] for model in (await flserve.json("model", "list", *options))["result"]]

    assert await names() == ["c", "a", "b"]
    assert await names("--sort", "name") == ["a", "b", "c"]
    assert await names("--sort", "-name") == ["c", "b", "a"]
    assert await names("--filter", "name=a") == ["a"]
    assert await names("--filter", "name=a", "--filter", "session_id=x") == []
    assert await names("--filter", "name__ne=a", "--limit", 1) == ["c"]
    said = await flserve("model", "list", "--limit", 2)
    assert (len(said.rows), said.err) == (3, "2 of 3 shown: --limit, --filter\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["session", "get", "nope"], "Entity with id: nope not found"),
        (["session", "stop", "nope"], "Entity with id: nope not found"),
        (["explain", "nope"], "nope"),
        (["model", "get", ""], "models: an empty id"),
        (["model", "get", "a/../b"], "a/../b"),
        (["model", "trail", "nope"], "Entity with id: nope not found"),
        (["model", "list", "--filter", "colour=red"], "colour: models have no such field"),
        (["model", "list", "--sort", "colour"], "X-Sort-Key: colour: models have no such field"),
    ],
)
async def test_an_unknown_id_or_field_is_one_line_and_exit_code_1(
    federation: Federation, arguments: list[str], words: str
) -> None:
    said = await terminal_of(federation)(*arguments)
    assert (said.code, said.out) == (1, "")
    (line,) = said.err.splitlines()
    assert line.startswith("flserve: ") and words in line


# ---- models


async def test_models_come_and_go_whole(federation: Federation, seed: Path, tmp_path: Path) -> None:
    flserve = terminal_of(federation)
    model_id = (await flserve.json("model", "upload", seed))["model_id"]
    target = tmp_path / "out.npz"
    said = await flserve("model", "download", model_id, "-o", target)
    assert said.out == f"model {model_id} is in {target} ({target.stat().st_size} bytes)\n"
    with np.load(target) as model:
        assert [model[name].tolist() for name in model.files] == [[0, 0]]
    told = await flserve.json("model", "download", model_id, "--output", target)
    assert told == {"model_id": model_id, "path": str(target), "size_bytes": target.stat().st_size}
    trail = await flserve("model", "trail")
    assert [row[0] for row in trail.rows] == ["model_id", model_id]
    assert [model["model_id"] for model in await flserve.json("model", "trail", model_id, "--limit", 1)] == [model_id]


async def test_a_trail_has_as_many_models_as_its_limit_the_newest_ones_last(federation: Federation) -> None:
    federation.add_client("c", train=plus_one)
    session = await federation.run([np.zeros(2)], rounds=3)
    flserve = terminal_of(federation)
    trail = [model["model_id"] for model in await flserve.json("model", "trail")]
    assert (len(trail), trail[-1]) == (4, session["session_config"]["model_id"])
    for limit in range(1, 6):
        limited = await flserve.json("model", "trail", "--limit", limit)
        assert [model["model_id"] for model in limited] == trail[-limit:]


async def test_a_file_that_is_no_model_or_cannot_be_written_leaves_nothing(
    federation: Federation, seed: Path, tmp_path: Path
) -> None:
    flserve = terminal_of(federation)
    (tmp_path / "text.npz").write_text("text")
    said = await flserve("model", "upload", tmp_path / "text.npz")
    assert (said.code, said.out) == (1, "") and said.err.startswith("flserve: file: ")
    assert (await flserve.json("model", "list"))["count"] == 0
    model_id = (await flserve.json("model", "upload", seed))["model_id"]
    said = await flserve("model", "download", model_id, "-o", tmp_path / "no" / "out.npz")
    assert (said.code, said.out) == (2, "") and said.err.endswith("No such file or directory\n")
    said = await flserve("model", "download", "nope", "-o", tmp_path / "out.npz")
    assert (said.code, said.err) == (1, "flserve: Entity with id: nope not found\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed.npz", "text.npz"]


# ---- events


async def test_events_are_printed_and_in_json_one_a_line(federation: Federation, seed: Path) -> None:
    flserve = terminal_of(federation)
    models = [(await flserve.json("model", "upload", seed))["model_id"] for _ in range(2)]
    said = await flserve("events")
    assert said.code == 0
    lines = [line for line in said.out.splitlines() if "  model " in line]
    assert [line.rpartition("model_id=")[2] for line in lines] == models
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  \d+  model +round=0 model_id=", lines[0])
    told = [json.loads(line) for line in (await flserve("events", "--format", "json")).out.splitlines()]
    first, second = (event for event in told if event["kind"] == "model")
    assert first.keys() == {"id", "kind", "session_id", "round", "model_id", "at"}
    later = await flserve("events", "--after", first["id"], "--format", "json")
    assert [json.loads(line)["model_id"] for line in later.out.splitlines()] == [second["model_id"]]


async def test_events_are_followed_until_ctrl_c(federation: Federation) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fl_server.cli", "events", "--follow", "--format", "json"),
        stdout=PIPE,
        stderr=PIPE,
        env={**os.environ, "FL_API_URL": federation.server.api_url},
    )
    assert process.stdout is not None
    first = await federation.add_seed([np.zeros(2)])
    async with asyncio.timeout(WAIT_S):
        assert json.loads(await process.stdout.readline())["model_id"] == first
        await federation.server.scheduler.attach(ClientId("late"), "late", "peer")
        event = json.loads(await process.stdout.readline())
        assert (event["kind"], event["client_id"], event["status"]) == ("client", "late", "online")
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    assert (process.returncode, err) == (130, b"")
