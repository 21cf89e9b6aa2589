"""`flserve doctor` and `flserve reset`, on the embedded stores and on MongoDB with S3."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sqlite3
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from fl_client import Client, TrainResult
from fl_client.wire import codec
from fl_server.store.s3 import S3
from fl_server.testing import Federation, ServerProcess
from tests.server.cli_runner import Said, run
from tests.server.rest_world import tgz
from tests.server.tokens import token

ROOT = Path(__file__).parents[2]
WAIT_S = 120.0
SEED = [np.arange(6, dtype=np.float32)]


def train(parameters: codec.Parameters, *_: Any) -> TrainResult:
    return TrainResult([array + 1 for array in parameters], num_examples=1)


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FL_API_PORT", "0")
    monkeypatch.setenv("FL_GRPC_PORT", "0")
    monkeypatch.setenv("FL_SPOOL_MAX_BYTES", "1000000")


@pytest.fixture(params=["embedded", "MongoDB and S3"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings are in the environment."""
    if request.param != "embedded":
        s3: S3 = request.getfixturevalue("s3_server")
        name = f"fl-test-{uuid.uuid4()}"
        settings: Mapping[str, str] = {
            "FL_MONGO_URL": request.getfixturevalue("mongo_url"),
            "FL_MONGO_DATABASE": name,
            "FL_S3_ENDPOINT_URL": s3.endpoint_url,
            "FL_S3_ACCESS_KEY": s3.access_key,
            "FL_S3_SECRET_KEY": s3.secret_key,
            "FL_S3_MODEL_BUCKET": name,
            "FL_S3_CONTEXT_BUCKET": name,
        }
        for variable, value in settings.items():
            monkeypatch.setenv(variable, value)


def doctor(data: Path, *more: str) -> tuple[int, dict[str, tuple[str, str]]]:
    said = run("doctor", "--data-dir", data, "--format", "json", *more)
    findings = said.json["findings"]
    assert said.json["ok"] == (said.code == 0)
    return said.code, {finding["about"]: (finding["health"], finding["says"]) for finding in findings}


def reset(data: Path) -> Said:
    return run("reset", "--yes", "--data-dir", data)


@pytest.mark.usefixtures("where")
async def test_a_session_is_gone_after_a_reset_and_the_next_one_is_the_first(tmp_path: Path) -> None:
    for _ in range(2):
        async with Federation(train=train, clients=2, data_dir=tmp_path / "data") as federation:
            session = await federation.run(SEED, rounds=2, clients_required=2, delete_models_storage=False)
            assert session["status"] == "Finished"
            rounds = await federation.call("GET", "/api/v1/rounds/", "result")
            assert sorted(found["round_id"] for found in rounds) == ["1", "2"]
            owned = await asyncio.to_thread(reset, tmp_path / "data")
            assert owned.code == 1
            assert f"is owned by flserve, process {os.getpid()} " in owned.err
            code, findings = await asyncio.to_thread(doctor, tmp_path / "data")
            assert code == 0, findings
            assert f"its owner is flserve, process {os.getpid()} " in findings["database"][1]
        done = await asyncio.to_thread(reset, tmp_path / "data")
        assert done.code == 0, done.err
        assert "3 models, 4 updates, 0 packages" in done.out
    assert "0 models" in (await asyncio.to_thread(reset, tmp_path / "data")).out


@pytest.mark.usefixtures("where")
def test_a_doctor_has_nothing_to_say_against_a_new_deployment(tmp_path: Path) -> None:
    code, findings = doctor(tmp_path / "data")
    assert code == 0, findings
    healthy = ["settings", "api_port", "grpc_port", "database", "models", "updates", "packages", "clock", "disk"]
    assert [about for about, (health, _) in findings.items() if health == "ok"] == healthy
    assert findings["package"] == ("note", "none is active: clients run code of their own")
    assert not list((tmp_path / "data").glob("doctor-*")), "nothing of it stays"


def test_a_doctor_says_one_line_for_each_finding(tmp_path: Path) -> None:
    said = run("doctor", "--data-dir", tmp_path / "data")
    assert (said.code, len(said.out.splitlines())) == (0, 10)


def test_a_port_that_is_taken_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("FL_GRPC_PORT", str(taken.getsockname()[1]))
        code, findings = doctor(tmp_path / "data")
    assert code == 1
    assert findings["grpc_port"][0] == "wrong"


def test_stores_that_do_not_answer_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("FL_S3_ACCESS_KEY", "a")
    monkeypatch.setenv("FL_S3_SECRET_KEY", "b")
    nobody = f"127.0.0.1:{port}"
    code, findings = doctor(
        tmp_path / "data", "--mongo-url", f"mongodb://{nobody}", "--s3-endpoint-url", f"http://{nobody}"
    )
    assert code == 1
    assert [findings[about][0] for about in ("database", "models", "updates", "packages")] == ["wrong"] * 4


@pytest.mark.parametrize(("whose", "off_s"), [("MongoDB's", -120), ("the S3 server's", 120)])
def test_a_clock_that_is_not_the_stores_is_found(
    tmp_path: Path, mongo_url: str, s3_server: S3, monkeypatch: pytest.MonkeyPatch, whose: str, off_s: int
) -> None:
    if whose == "MongoDB's":
        monkeypatch.setenv("FL_MONGO_URL", mongo_url)
        monkeypatch.setenv("FL_MONGO_DATABASE", f"fl-test-{uuid.uuid4()}")
    else:
        monkeypatch.setenv("FL_S3_ENDPOINT_URL", s3_server.endpoint_url)
        monkeypatch.setenv("FL_S3_ACCESS_KEY", s3_server.access_key)
        monkeypatch.setenv("FL_S3_SECRET_KEY", s3_server.secret_key)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - off_s)
    code, findings = doctor(tmp_path / "data")
    assert (code, findings["clock"][0]) == (1, "wrong")
    assert re.match(rf"{whose} is \{off_s:+d}|{whose} is \{off_s - 1:+d}", findings["clock"][1]), "S3's is in seconds"


def test_a_database_that_a_newer_program_wrote_is_left_alone_and_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with contextlib.closing(sqlite3.connect(tmp_path / "data" / "state.db")) as newer:
        newer.execute("pragma user_version = 99")
    code, findings = doctor(tmp_path / "data")
    assert code == 1
    assert findings["database"] == ("wrong", findings["database"][1])
    assert findings["database"][1].endswith("start the newer program that wrote it")


async def test_a_disk_or_spool_that_the_known_clients_updates_do_not_fit_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Federation(train=train, clients=3, data_dir=tmp_path / "data") as federation:
        await federation.run(SEED, rounds=1, clients_required=3)
    enough = await asyncio.to_thread(doctor, tmp_path / "data")
    monkeypatch.setenv("FL_SPOOL_MAX_BYTES", "500")
    code, findings = await asyncio.to_thread(doctor, tmp_path / "data")
    assert (enough[0], enough[1]["disk"][0]) == (0, "ok")
    assert (code, findings["disk"][0]) == (1, "wrong")
    assert "3 updates of" in findings["disk"][1] and "spool_max_bytes" in findings["disk"][1]
    monkeypatch.setenv("FL_SPOOL_MAX_BYTES", str(2**60))
    code, findings = await asyncio.to_thread(doctor, tmp_path / "data")
    assert (code, findings["disk"][0]) == (0, "note"), "the disk is smaller than the spool may grow"


async def test_an_active_package_is_named_and_missed_when_its_bytes_are_gone(tmp_path: Path) -> None:
    async with Federation(data_dir=tmp_path / "data") as federation:
        form = {"name": "digits", "helper": "numpyhelper", "description": ""}
        await federation.call("POST", "/api/v1/packages/", files={"file": ("p.tgz", tgz())}, data=form)
    _, findings = await asyncio.to_thread(doctor, tmp_path / "data")
    assert findings["package"] == ("ok", "digits is active")
    for archive in (tmp_path / "data" / "packages").iterdir():
        archive.unlink()
    code, findings = await asyncio.to_thread(doctor, tmp_path / "data")
    assert code == 1
    assert findings["package"] == ("wrong", "the bytes of digits are gone: flserve package upload")


def test_refused_keys_are_found(tmp_path: Path, s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_S3_ACCESS_KEY", s3_server.access_key)
    monkeypatch.setenv("FL_S3_SECRET_KEY", "another")
    code, findings = doctor(tmp_path / "data", "--s3-endpoint-url", s3_server.endpoint_url)
    assert code == 1
    assert "s3_secret_key" in findings["models"][1]


def test_site_without_s3_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_DURABILITY", "site")
    code, findings = doctor(tmp_path / "data")
    assert code == 1
    assert findings["settings"][1].startswith("durability: ")


def test_a_reset_wants_a_yes(tmp_path: Path) -> None:
    said = run("reset", "--data-dir", tmp_path)
    assert said.code == 2
    assert "for ever" in said.err


@pytest.mark.long
async def test_the_line_that_make_services_prints_starts_a_server_on_them(tmp_path: Path) -> None:
    piped = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "fl_server.services", str(tmp_path / "services"))
    async with asyncio.timeout(WAIT_S):
        services = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=piped)
        assert services.stdout
        try:
            while b"flserve up" not in (line := await services.stdout.readline()):
                assert line, "it ended"
            typed = f"exec env {line.decode().strip()} --data-dir {tmp_path / 'data'}"
            server = await asyncio.create_subprocess_shell(typed, cwd=ROOT, stdout=piped)
            assert server.stdout
            try:
                assert b"flserve is ready" in await server.stdout.readline()
                assert not (tmp_path / "data" / "state.db").exists(), "the state is in MongoDB"
                assert not (tmp_path / "data" / "models").exists(), "models are in S3"
            finally:
                server.send_signal(signal.SIGTERM)
                assert await server.wait() == 0
        finally:
            services.send_signal(signal.SIGTERM)
            assert await services.wait() == 0


async def test_at_debug_a_server_on_real_services_logs_no_secret(tmp_path: Path, mongo_url: str, s3_server: S3) -> None:
    """A round with tokens, packages and refusals; tests/leaks.py looks at the log, too."""
    name = f"fl-test-{uuid.uuid4()}"
    secret = "a-secret-of-a-process-at-debug-0123456789"
    environment = {
        "FL_LOG_LEVEL": "DEBUG",
        "FL_JWT_SECRET_KEY": secret,
        "FL_MONGO_URL": mongo_url,
        "FL_MONGO_DATABASE": name,
        "FL_S3_ENDPOINT_URL": s3_server.endpoint_url,
        "FL_S3_ACCESS_KEY": s3_server.access_key,
        "FL_S3_SECRET_KEY": s3_server.secret_key,
        "FL_S3_MODEL_BUCKET": name,
        "FL_S3_CONTEXT_BUCKET": name,
    }
    admin, mine = (token(role, key=secret, client_id="a", exp=time.time() + 600) for role in ("admin", "client"))
    async with ServerProcess(tmp_path / "data", environment=environment) as server:
        async with httpx.AsyncClient(base_url=server.api_url, headers={"Authorization": f"Bearer {admin}"}) as http:
            model = {"file": ("seed.npz", codec.encode(SEED))}
            model_id = (await http.post("/api/v1/models/", files=model)).json()["model_id"]
            body = {"session_config": {"model_id": model_id, "rounds": 1, "clients_required": 1, "validate": False}}
            session_id = (await http.post("/api/v1/sessions/", json=body)).json()["session_id"]
            for header in (f"Bearer {mine}", f"Bearer {admin[:-4]}", f"Basic {admin}"):
                assert (await http.get("/api/v1/sessions/", headers={"Authorization": header})).status_code == 401
            await http.post("/api/v1/sessions/start", json={"session_id": session_id, "wait_for_clients_s": 60})
            client = Client(api_url=server.api_url, train=train, client_id="a", token=mine)
            async with asyncio.TaskGroup() as group, http.stream("GET", "/api/v1/events/?after=0") as events:
                running = group.create_task(client.run())
                async with asyncio.timeout(60):
                    async for line in events.aiter_lines():
                        if line.startswith("data: ") and '"status": "Finished"' in line:
                            break
                running.cancel()
        assert await server.stop() == 0
    log = server.log.read_text()
    assert " DEBUG fl_server." in log
    signatures = [word.rpartition(".")[2] for word in (admin, mine)]
    for told in (secret, s3_server.secret_key, admin, mine, *signatures):
        assert told not in log
