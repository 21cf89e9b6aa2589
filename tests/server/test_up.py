"""`flserve up` as its user meets it: what it says when it is ready, when it cannot start, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from typer.testing import CliRunner

from fl_client.wire import codec
from fl_server.app import COUNT_OBJECTS_EVERY_S, QUIET_GROWTH, YOUNG_UP_TO_S, short_collections
from fl_server.cli import app
from fl_server.settings import Settings
from fl_server.testing import ServerProcess
from tests.server.wire_client import WAIT_S, WireClient, filled
from tests.virtual import virtual_loop

ANY_PORTS = ("--api-port", "0", "--grpc-port", "0")


async def flserve(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that ends by itself."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fl_server.cli", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    try:
        async with asyncio.timeout(WAIT_S):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def refused(*arguments: str, **environment: str) -> str:
    """What `flserve up` says when its settings are wrong: one line, with exit code 2."""
    result = CliRunner().invoke(app, ["up", *arguments], env=environment)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    return line.removeprefix("flserve: ")


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FL_")]:
        monkeypatch.delenv(name)


@asynccontextmanager
async def serving(*arguments: str, **environment: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The process, and the first line that it says."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fl_server.cli", "up", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(WAIT_S):
            yield process, (await process.stdout.readline()).decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


# ---- life


async def test_the_ready_line_has_the_urls_and_both_ports_answer(tmp_path: Path) -> None:
    ready_file = tmp_path / "ready.json"
    options = (*ANY_PORTS, "--data-dir", str(tmp_path / "data"), "--ready-file", str(ready_file))
    async with serving(*options) as (_, line), httpx.AsyncClient() as http:
        ready = json.loads(ready_file.read_text())
        where = f"REST {ready['api_url']}, gRPC port {ready['grpc_port']}, data in {tmp_path / 'data'}"
        assert line == f"flserve is ready: {where}\n"
        health = await http.get(f"{ready['api_url']}/health")
        assert (health.status_code, health.text) == (200, "OK")
        is_ready = await http.get(f"{ready['api_url']}/ready")
        assert (is_ready.status_code, is_ready.json()) == (200, {"ready": True, "reason": None})
        joined = await http.post(f"{ready['api_url']}/api/v1/clients/add", json={"name": "a"})
        assert (joined.json()["host"], joined.json()["port"]) == ("127.0.0.1", ready["grpc_port"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_it_with_0_though_streams_are_open(number: signal.Signals, tmp_path: Path) -> None:
    async with (
        ServerProcess(tmp_path / "data") as server,
        httpx.AsyncClient() as http,
        http.stream("GET", f"{server.api_url}/api/v1/events/", timeout=WAIT_S) as events,
        WireClient(server.grpc_port, "a") as client,
    ):
        told = events.aiter_lines()
        assert await anext(told) == ": hello"
        stream = client.attach()
        await stream.initial_metadata()
        assert await server._end(number) == 0
        assert await stream.code() is grpc.StatusCode.UNAVAILABLE
        rest = [line async for line in told]
        assert any('"status": "online"' in line for line in rest)
    log = server.log.read_text()
    assert "Traceback" not in log
    assert " stopping" in log


async def test_it_starts_again_on_the_data_of_one_that_was_killed(tmp_path: Path) -> None:
    async with ServerProcess(tmp_path / "data") as server, httpx.AsyncClient() as http:
        await http.put(f"{server.api_url}/api/v1/helpers/active", json={"helper": "numpyhelper"})
        await server.kill()
        await server.start()
        assert (await http.get(f"{server.api_url}/api/v1/helpers/active")).json() == "numpyhelper"


async def test_a_server_on_the_embedded_stores_imports_no_other_and_no_driver_of_one(tmp_path: Path) -> None:
    async with ServerProcess(tmp_path / "data", environment={"PYTHONPROFILEIMPORTTIME": "1"}) as server:
        lines = server.log.read_text().splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert {"fl_server.store.sqlite", "fl_server.store.files"} <= imported
    others = {"fl_server.store.mongo", "motor", "pymongo", "bson"}
    others |= {"fl_server.store.s3", "aioboto3", "aiobotocore", "boto3", "botocore", "aiohttp"}
    assert not others & imported


def test_a_server_on_mongodb_and_s3_imports_no_embedded_store() -> None:
    code = (
        "import sys; from fl_server.app import Settings, blob_stores, executors, state_store; "
        "settings = Settings.load(None, {'mongo_url': 'mongodb://127.0.0.1', 's3_endpoint_url': 'http://127.0.0.1'})\n"
        "with executors() as pools: state_store(settings, pools), blob_stores(settings, pools)\n"
        "print(sorted(name for name in sys.modules if name.rpartition('.')[2] in ('sqlite', 'files', 'mongo', 's3')))"
    )
    imported = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert imported == "['fl_server.store.mongo', 'fl_server.store.s3']\n"


# ---- when it cannot start


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.mark.parametrize(("option", "name"), [("--api-port", "REST"), ("--grpc-port", "gRPC")])
async def test_a_taken_port_is_one_clear_line(option: str, name: str, taken_port: int, tmp_path: Path) -> None:
    ports = {"--api-port": "0", "--grpc-port": "0", option: str(taken_port)}
    options = [part for pair in ports.items() for part in pair]
    code, out, err = await flserve("up", "--data-dir", str(tmp_path), *options, "--log-level", "error")
    assert (code, out) == (1, "")
    [line] = err.splitlines()
    assert line.startswith(f"flserve: {name} port {taken_port} on 127.0.0.1 is taken: Address already in use")


async def test_a_second_server_on_the_same_data_is_refused_and_the_first_one_named(tmp_path: Path) -> None:
    async with ServerProcess(tmp_path / "data") as server:
        options = ("--data-dir", str(tmp_path / "data"), "--log-level", "ERROR")
        code, out, err = await flserve("up", *ANY_PORTS, *options)
        assert (code, out) == (1, "")
        [line] = err.splitlines()
        assert f"process {server.pid} on " in line
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"{server.api_url}/ready")).status_code == 200


# ---- settings


def test_an_unknown_variable_is_refused_by_its_name() -> None:
    assert refused(FL_COLOUR="red") == "FL_COLOUR: unknown setting in the environment"


def test_an_unknown_key_in_a_file_is_refused_by_its_name_and_file(tmp_path: Path) -> None:
    config = tmp_path / "fl.toml"
    config.write_text('colour = "red"\n')
    assert refused("--config", str(config)) == f"colour: unknown setting in {config}"


@pytest.mark.parametrize("text", ["api_port = ", None])
def test_a_file_that_cannot_be_read_is_named(text: str | None, tmp_path: Path) -> None:
    config = tmp_path / "fl.toml"
    if text is not None:
        config.write_text(text)
    assert refused("--config", str(config)).startswith(f"config: {config}: ")


WRONG = [
    ("api_port", "70000"),
    ("api_port", "http"),
    ("grpc_port", "-1"),
    ("log_level", "loud"),
    ("durability", "never"),
    ("max_model_bytes", "0"),
    ("store_patience_s", "nan"),
    ("drain_timeout_s", "-1"),
    ("uploads_at_once", "0"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_refused_by_its_name(name: str, value: str, tmp_path: Path) -> None:
    assert refused(**{f"FL_{name.upper()}": value}).startswith(f"{name}: '{value}': ")
    config = tmp_path / "fl.toml"
    config.write_text(f'{name} = "{value}"\n')
    assert refused("--config", str(config)).startswith(f"{name}: '{value}': ")


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "fl.toml"
    config.write_text('api_port = 1\ngrpc_port = 2\nhost = "file"\nrejoin_window_s = 7.5\n')
    monkeypatch.setenv("FL_GRPC_PORT", "3")
    monkeypatch.setenv("FL_HOST", "environment")
    monkeypatch.setenv("FL_API_URL", "of the client")
    loaded = Settings.load(config, {"host": "command line", "log_level": None})
    chosen = (loaded.api_port, loaded.grpc_port, loaded.host, loaded.rejoin_window_s, loaded.log_level)
    assert chosen == (1, 3, "command line", 7.5, "INFO")


async def test_it_serves_with_what_file_and_environment_say(tmp_path: Path) -> None:
    config = tmp_path / "fl.toml"
    config.write_text(f'api_port = 0\ngrpc_port = 0\nadvertise_host = "fl.example"\ndata_dir = "{tmp_path / "data"}"\n')
    async with (
        serving("--config", str(config), FL_HOST="localhost") as (process, line),
        httpx.AsyncClient() as http,
    ):
        api_url = line.removeprefix("flserve is ready: REST ").partition(",")[0]
        assert api_url.startswith("http://localhost:")
        joined = await http.post(f"{api_url}/api/v1/clients/add", json={"name": "a"})
        assert joined.json()["host"] == "fl.example"
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


# ---- the rest of the command line


async def test_explain_says_why_as_text_or_json_and_by_its_exit_code_why_not(tmp_path: Path) -> None:
    async with ServerProcess(tmp_path / "data") as server, httpx.AsyncClient() as http:
        url = ("--api-url", server.api_url)
        assert await flserve("explain", *url) == (1, "", "flserve: there is no session yet\n")
        ids = [await created(http, server.api_url, name) for name in ("first", "second")]
        said = f"session {ids[1]} is not started"
        assert await flserve("explain", *url) == (0, f"{said}\n", ""), "the newest"
        first = f"session {ids[0]} is not started"
        assert await flserve("explain", ids[0], FL_API_URL=server.api_url) == (0, f"{first}\n", "")
        code, out, err = await flserve("explain", *url, "--format", "json")
        assert (code, json.loads(out), err) == (0, {"session_id": ids[1], "sentences": [said]}, "")
        unknown = await flserve("explain", "nowhere", *url)
        assert unknown == (1, "", "flserve: Entity with id: nowhere not found\n")
    code, out, err = await flserve("explain", *url)
    assert (code, out) == (3, "")
    [line] = err.splitlines()
    assert server.api_url in line


async def created(http: httpx.AsyncClient, api_url: str, name: str) -> str:
    """A session's id."""
    model = await http.post(f"{api_url}/api/v1/models/", files={"file": ("seed.npz", codec.encode(filled(0)))})
    body = {"name": name, "session_config": {"model_id": model.json()["model_id"]}}
    session = await http.post(f"{api_url}/api/v1/sessions/", json=body)
    return str(session.json()["session_id"])


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_help_lists_the_commands_and_each_has_an_example() -> None:
    shown = run("--help")
    assert shown.exit_code == 0
    for command in ("up", "settings", "demo", "explain"):
        assert f"  {command} " in shown.output
        own = run(command, "--help")
        assert own.exit_code == 0
        assert "Example: " in own.output
    assert run().output == shown.output, "without a command, too"


def test_the_version_is_that_of_the_distribution() -> None:
    shown = run("--version")
    assert (shown.exit_code, shown.output) == (0, f"flserve {version('flserve')}\n")


def test_settings_lists_each_with_its_variable() -> None:
    shown = CliRunner().invoke(app, ["settings"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert all(f"FL_{name.upper()}" in shown.output for name in Settings.model_fields)


@pytest.mark.parametrize("arguments", [["dance"], ["up", "--colour"], ["up", "--api-port", "http"]])
def test_a_wrong_command_line_is_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_young_objects_are_looked_at_after_a_while_however_many_python_has_counted() -> None:
    async def main() -> None:
        async with short_collections(lambda: False):
            gc.disable()
            try:
                gone = weakref.ref(Cycle())
                assert gone() is not None
                await asyncio.sleep(2 * YOUNG_UP_TO_S)
                assert gone() is None
            finally:
                gc.enable()

    with virtual_loop() as loop:
        loop.run_until_complete(main())


def test_garbage_among_what_collections_leave_alone_is_found_once_it_has_grown_and_nothing_runs() -> None:
    is_quiet = False

    async def main() -> None:
        nonlocal is_quiet
        async with short_collections(lambda: is_quiet):
            cycles = [Cycle() for _ in range(QUIET_GROWTH)]
            first = weakref.ref(cycles[0])
            gc.collect()
            del cycles
            gc.collect()
            await asyncio.sleep(COUNT_OBJECTS_EVERY_S + 1)
            assert first() is not None
            is_quiet = True
            await asyncio.sleep(COUNT_OBJECTS_EVERY_S)
            assert first() is None

    with virtual_loop() as loop:
        loop.run_until_complete(main())


async def test_it_may_open_as_many_files_as_the_system_lets_it(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, soft), hard))
    try:
        server = ServerProcess(tmp_path / "data")
        await server.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    limits = Path(f"/proc/{server.pid}/limits").read_text()
    await server.stop()
    assert re.search(rf"Max open files +{hard} +{hard} ", limits)


async def test_it_says_when_too_few_files_may_be_open_for_the_clients_that_it_admits(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    environment = {"FL_MAX_CLIENTS": f"{hard}", "FL_HTTP_MAX_CONNECTIONS": "1"}
    async with ServerProcess(tmp_path / "data", environment=environment) as server:
        said = f"few open files are allowed limit={hard} clients_and_connections={hard + 1}"
        assert said in server.log.read_text()


async def test_it_says_nothing_of_open_files_where_they_are_enough(tmp_path: Path) -> None:
    environment = {"FL_MAX_CLIENTS": "10", "FL_HTTP_MAX_CONNECTIONS": "10"}
    async with ServerProcess(tmp_path / "data", environment=environment) as server:
        assert "open files" not in server.log.read_text()
