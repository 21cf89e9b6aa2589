"""`flclient join` as processes that work for a real server, with the server's package or their own."""

from __future__ import annotations

import asyncio
import io
import json
import math
import os
import signal
import tarfile
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from fl_client import Client, TaskInfo, TrainResult
from fl_client.wire import codec
from fl_client.wire import fl_pb2 as pb
from fl_server.testing import Federation, ServerProcess
from tests.client.flclient_process import flclient
from tests.client.server_double import FAST, Combiner, joined

SEED = [np.zeros(3, np.float32)]
TRAIN = """
import json, sys
import numpy as np
given, trained = sys.argv[1:]
with np.load(given) as model:
    np.savez_compressed(trained, **{"0": model["0"] + np.float32(1)})
json.dump({"num_examples": 3}, open(f"{trained}-metadata", "w"))
"""
MANIFEST = "entry_points: {train: {command: python train.py}}\n"
FILES = {"client/fedn.yaml": MANIFEST, "client/train.py": TRAIN}


def write(folder: Path, train: str = TRAIN, *, manifest: str = MANIFEST) -> None:
    """A local package: folder/client."""
    (folder / "client").mkdir(exist_ok=True)
    (folder / "client" / "train.py").write_text(train)
    (folder / "client" / "fedn.yaml").write_text(manifest)


def tarred(mode: str) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=f"w:{mode}") as tar:  # type: ignore[call-overload]
        for name, text in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return made.getvalue()


def zipped() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
    return made.getvalue()


HELD = 'print("begun")\nopen("../go").readline()\n'


@contextmanager
def gate(folder: Path) -> Iterator[Callable[[], None]]:
    """Where a HELD training waits until it is let go."""
    os.mkfifo(folder / "go")
    with os.fdopen(os.open(folder / "go", os.O_RDWR), "w") as fifo:  # opened both ways, nobody waits for a counterpart
        yield lambda: print("go", file=fifo, flush=True)


async def add_package(federation: Federation, name: str, data: bytes) -> None:
    form = {"name": "ours", "helper": "numpyhelper", "description": ""}
    await federation.call("POST", "/api/v1/packages/", files={"file": (name, data)}, data=form)


async def last_value(federation: Federation, session: dict[str, Any]) -> float:
    model = await federation.parameters(session["session_config"]["model_id"])
    return float(model[0][0])


@pytest.fixture
async def federation() -> AsyncIterator[Federation]:
    async with Federation() as running:
        yield running


@pytest.mark.parametrize(
    ("name", "data"),
    [("p.tgz", tarred("gz")), ("p.tar.gz", tarred("gz")), ("p.tar.bz2", tarred("bz2")), ("p.zip", zipped())],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_the_servers_package_is_fetched_and_works(
    federation: Federation, tmp_path: Path, name: str, data: bytes
) -> None:
    await add_package(federation, name, data)
    async with flclient("join", "--api-url", federation.server.api_url, "-i", "a", cwd=tmp_path):
        session = await federation.run(SEED, rounds=2)
    assert session["status"] == "Finished"
    assert await last_value(federation, session) == 2.0
    assert len(list((tmp_path / "cache" / "flserve" / "packages").iterdir())) == 1


async def test_without_a_package_the_client_says_what_it_waits_for_and_goes_on_when_it_is_there(
    federation: Federation, tmp_path: Path
) -> None:
    async with flclient("join", "-u", federation.server.api_url, cwd=tmp_path) as client:
        assert "No compute package found" in await client.said("waiting for the server: ")
        await add_package(federation, "p.tgz", tarred("gz"))
        await federation.attached(1)
    assert len([line for line in client.lines if "waiting for" in line]) == 1


async def test_an_edit_of_a_local_package_takes_effect_at_the_next_task(federation: Federation, tmp_path: Path) -> None:
    write(tmp_path, HELD + TRAIN)
    arguments = ("join", "-u", federation.server.api_url, "--local-package")
    with gate(tmp_path) as let_go:
        async with flclient(*arguments, cwd=tmp_path) as client:
            session_id = await federation.create_session(await federation.add_seed(SEED), rounds=2)
            await federation.start(session_id, rounds=2)
            await client.said("train: begun")
            write(tmp_path, TRAIN.replace("np.float32(1)", "np.float32(10)"))
            let_go()
            session = await federation.ended(session_id)
    assert await last_value(federation, session) == 11.0


async def test_a_combiner_is_joined_directly_with_the_keys_of_client_yaml(
    federation: Federation, tmp_path: Path
) -> None:
    write(tmp_path)
    init = {
        "network_id": "fedn-network",
        "name": "from the file",
        "client_id": "from-the-file",
        "combiner": "127.0.0.1",
        "combiner_port": federation.server.grpc_port,
    }
    (tmp_path / "client.yaml").write_text(json.dumps(init))
    arguments = ("client", "start", "-in", "client.yaml", "--local-package", "--name", "Ada")
    async with flclient(*arguments, cwd=tmp_path):
        await federation.event("client", client_id="from-the-file", status="online")
        clients = await federation.call("GET", "/api/v1/clients/", "result")
        assert [client["name"] for client in clients] == ["Ada"]
        assert (await federation.run(SEED, rounds=1))["status"] == "Finished"


async def test_the_seeds_client_yaml_finds_the_server(federation: Federation, tmp_path: Path) -> None:
    write(tmp_path)
    host, _, port = federation.server.api_url.removeprefix("http://").rpartition(":")
    (tmp_path / "client.yaml").write_text(f"network_id: fedn-network\ndiscover_host: {host}\ndiscover_port: {port}\n")
    arguments = ("run", "client", "-in", "client.yaml", "--local-package", "--client-id", "a")
    async with flclient(*arguments, cwd=tmp_path):
        await federation.event("client", client_id="a", status="online")


async def test_a_failing_entry_point_closes_its_task_at_once_and_its_last_lines_are_a_status(
    federation: Federation, tmp_path: Path
) -> None:
    write(tmp_path, "print('reading shard 7')\nraise OSError('disk is gone')\n")
    async with flclient("join", "-u", federation.server.api_url, "--local-package", "-i", "a", cwd=tmp_path) as client:
        model_id = await federation.add_seed(SEED)
        session_id = await federation.create_session(model_id, round_timeout=3600, round_retries=0)
        await federation.start(session_id, rounds=1)
        session = await federation.ended(session_id)  # an hour before the round's deadline
        await client.said("task reported: ")
    assert session["status"] == "Failed"
    # answered when it is durable, and with it what was queued before: statuses are written within 0.2 s
    await federation.call("POST", "/api/v1/clients/add", json={"name": "b", "client_id": "b"})
    statuses = await federation.call("GET", f"/api/v1/statuses/?session_id={session_id}", "result")
    [status] = [status for status in statuses if status["log_level"] == "WARNING"]
    assert status["status"] == "train ended with exit code 1: OSError: disk is gone"
    assert status["type"] == "MODEL_UPDATE"
    lines = status["data"].splitlines()
    assert lines[0] == "reading shard 7" and lines[-1] == "OSError: disk is gone"
    assert "Traceback" in "\n".join(client.lines), "the package's output is in the log"


async def test_a_training_that_hangs_is_ended_at_the_rounds_deadline(federation: Federation, tmp_path: Path) -> None:
    write(tmp_path, "import signal; signal.pause()\n")
    async with flclient("join", "-u", federation.server.api_url, "--local-package", cwd=tmp_path) as client:
        session_id = await federation.create_session(await federation.add_seed(SEED), round_timeout=1, round_retries=0)
        await federation.start(session_id, rounds=1)
        await client.said("train was killed: it did not end by its deadline")
        assert (await federation.ended(session_id))["status"] == "Failed"
        assert len(await federation.call("GET", "/api/v1/clients/", "result")) == 1


async def test_another_package_than_the_one_asked_for_is_refused(federation: Federation, tmp_path: Path) -> None:
    await add_package(federation, "p.tgz", tarred("gz"))
    arguments = ("join", "-u", federation.server.api_url, "--package-checksum", "0" * 64)
    async with flclient(*arguments, cwd=tmp_path) as client:
        assert await client.exit_code() == 1
        assert (await client.said("flclient: the active package has sha256 ")).endswith(f"expected {'0' * 64}")
    assert "Traceback" not in "\n".join(client.lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_an_idle_client_with_0(
    federation: Federation, tmp_path: Path, number: signal.Signals
) -> None:
    write(tmp_path)
    async with flclient("join", "-u", federation.server.api_url, "--local-package", cwd=tmp_path) as client:
        await client.said("attached to combiner")
        client.signal(number)
        assert await client.exit_code() == 0
    assert "Traceback" not in "\n".join(client.lines)


async def test_a_signal_while_training_lets_the_task_end_and_be_reported(
    federation: Federation, tmp_path: Path
) -> None:
    write(tmp_path, HELD + TRAIN)
    with gate(tmp_path) as let_go:
        async with flclient("join", "-u", federation.server.api_url, "--local-package", cwd=tmp_path) as client:
            session_id = await federation.create_session(await federation.add_seed(SEED))
            await federation.start(session_id, rounds=1)
            await client.said("train: begun")
            client.signal(signal.SIGTERM)
            await client.said("stopping when task ")
            let_go()
            assert await client.exit_code() == 0
            assert (await federation.ended(session_id))["status"] == "Finished"


async def test_a_second_signal_gives_the_task_up(federation: Federation, tmp_path: Path) -> None:
    write(tmp_path, HELD + TRAIN)
    with gate(tmp_path):
        async with flclient("join", "-u", federation.server.api_url, "--local-package", cwd=tmp_path) as client:
            session_id = await federation.create_session(await federation.add_seed(SEED))
            await federation.start(session_id, rounds=1)
            await client.said("train: begun")
            client.signal(signal.SIGTERM)
            await client.said("stopping when task ")
            client.signal(signal.SIGTERM)
            assert await client.exit_code() == 130
    assert "Traceback" not in "\n".join(client.lines)


async def test_a_client_waits_for_a_server_that_starts_later_and_for_one_that_restarts(tmp_path: Path) -> None:
    write(tmp_path)
    server = ServerProcess(tmp_path / "data")
    async with server:
        pass  # now its ports are known
    async with flclient("join", "-u", server.api_url, "--local-package", cwd=tmp_path) as client:
        await client.said("waiting for the server: ")
        async with server:
            await client.said("attached to combiner")
            await server.kill()
            client.lines.clear()
            await server.start()
            await client.said("attached to combiner")
            client.signal(signal.SIGINT)
            assert await client.exit_code() == 0


async def test_a_stopped_client_whose_server_is_away_gives_its_task_back(combiner: Combiner, tmp_path: Path) -> None:
    write(tmp_path, HELD + TRAIN)
    combiner.models["m0"] = codec.encode(SEED)
    where = ("--combiner", "127.0.0.1", "--combiner-port", combiner.port)
    with gate(tmp_path) as let_go:
        async with flclient("join", *where, "--local-package", cwd=tmp_path) as client:
            (await combiner.attachment()).say(
                pb.TaskRequest(task_id="t1", type=pb.StatusType.MODEL_UPDATE, model_id="m0")
            )
            await client.said("train: begun")
            await combiner.stop()
            client.signal(signal.SIGTERM)
            await client.said("stopping when task t1 is reported")
            let_go()
            assert await client.exit_code() == 0
        assert "task given back to the server: t1" in "\n".join(client.lines)


async def test_a_task_that_is_issued_again_has_its_new_deadline(combiner: Combiner) -> None:
    tasks: list[TaskInfo] = []
    begun, go = asyncio.Event(), asyncio.Event()

    async def train(parameters: codec.Parameters, task: TaskInfo) -> TrainResult:
        tasks.append(task)
        begun.set()
        await go.wait()
        return TrainResult(parameters, 1)

    def issued(task_id: str, deadline: float) -> pb.TaskRequest:
        """By a server whose clock is decades away from ours."""
        sent = "2001-09-09 01:46:40.000000"  # 1e9
        kind = pb.StatusType.MODEL_UPDATE
        return pb.TaskRequest(task_id=task_id, type=kind, model_id="m0", timestamp=sent, deadline=deadline)

    combiner.models["m0"] = codec.encode(SEED)
    client = Client(combiner=f"127.0.0.1:{combiner.port}", train=train, backoff=FAST)
    async with joined(client):
        attachment = await combiner.attachment()
        before_s = asyncio.get_running_loop().time()
        attachment.say(issued("t1", 1e9 + 30))
        await begun.wait()
        assert 0 <= tasks[0].due.at_s - before_s - 30 < 10
        attachment.say((grpc.StatusCode.UNAVAILABLE, "restarts"))
        attachment = await combiner.attachment()
        attachment.say(issued("t1", 1e9 + 90))
        attachment.say(issued("t2", 0.0))
        go.set()
        await combiner.report()
        await combiner.report()
    assert 0 <= tasks[0].due.at_s - before_s - 90 < 10
    assert tasks[1].due.at_s == math.inf
