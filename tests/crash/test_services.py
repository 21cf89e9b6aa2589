"""Real MongoDB and S3 servers, `flserve up` and clients as processes; one of them dies, hangs or answers nonsense.

Whatever happens in the session, its final model is the undisturbed run's, byte for byte: nothing that was accepted is
lost, nothing is counted twice, and the session goes on by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import httpx
import pytest

from fl_client.wire import fl_pb2 as pb
from fl_server.services import Mongod, Service, Weed, free_ports
from fl_server.store import mongo
from fl_server.store.s3 import S3
from fl_server.testing import ServerProcess
from tests.crash.processes import CLIENTS, WAIT_S, Run, Where, federation, on, run_of
from tests.proxy import Proxy, proxied
from tests.server.wire_client import WireClient

LAST = CLIENTS - 1  # the client whose update a round is kept waiting for
AWAY_S = 15.0
SAID_WITHIN_S = 30.0  # six at once, on a machine that has other things to do
SLOW_DOWN = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"


# ---- the server dies


async def test_killed_once_on_mongodb_and_s3(
    undisturbed: bytes, shards: Path, seed: bytes, tmp_path: Path, mongo_url: str, s3_server: S3
) -> None:
    model, killed = await federation(tmp_path / "run", shards, seed, [12], on(mongo_url, s3_server))
    assert killed == 1
    assert model == undisturbed


@pytest.mark.long
async def test_killed_at_ten_points_on_mongodb_and_s3(
    undisturbed: bytes, shards: Path, seed: bytes, tmp_path: Path, mongo_url: str, s3_server: S3
) -> None:
    for index, point in enumerate(sorted(random.Random(10).sample(range(3, 60), 10))):
        where = on(mongo_url, s3_server)
        model, killed = await federation(tmp_path / str(index), shards, seed, [point], where)
        assert killed == 1, f"event {point} did not come"
        assert model == undisturbed, f"killed after event {point}"


# ---- a store goes away


@asynccontextmanager
async def waiting_for_one(
    server: ServerProcess, shards: Path, seed: bytes, folder: Path, *, api_url: str = ""
) -> AsyncIterator[Run]:
    """A session in the midst of its first round: the update of one client, which is paused, is still to come."""
    async with run_of(server, shards, folder, api_url=api_url) as run:
        attached = 0
        async for kind, data in run.events():
            attached += kind == "client" and data["status"] == "online"
            if attached == CLIENTS:
                break
        run.pause(LAST)
        await run.start(seed)
        await run.accepted(CLIENTS - 1)
        yield run


async def readiness(run: Run, status: int) -> str:
    """Waits until /ready says so; its reason. /health is 200 all the time."""
    async with asyncio.timeout(WAIT_S):
        while True:
            assert (await run.http.get(f"{run.api_url}/health", timeout=WAIT_S)).status_code == 200
            ready = await run.http.get(f"{run.api_url}/ready", timeout=WAIT_S)
            if ready.status_code == status:
                return str(ready.json().get("reason") or "")
            await asyncio.sleep(0.2)


async def outage(
    where: Where,
    shards: Path,
    seed: bytes,
    folder: Path,
    begin: Callable[[], Awaitable[object]],
    end: Callable[[], Awaitable[object]],
    says: Sequence[str],
    away_s: float,
) -> bytes:
    """The final model of a session in whose first round something goes away for so long.

    Meanwhile its last update comes in. says: of which /ready names one.
    """
    folder.mkdir()
    async with (
        asyncio.timeout(2 * WAIT_S),
        ServerProcess(folder / "data", *where.arguments, environment=where.environment) as server,
        waiting_for_one(server, shards, seed, folder) as run,
    ):
        await begin()
        run.resume(LAST)
        reason = await readiness(run, 503)
        assert any(word in reason for word in says), reason
        await asyncio.sleep(away_s)  # it is an outage of so long
        assert await readiness(run, 503)
        await end()
        await readiness(run, 200)
        await run.until_ended()
        model = await run.final_model()
        log = server.log.read_text()
        assert (log.count("store away"), log.count("store back")) == (1, 1), server.tail()
        return model


@contextmanager
def own_services(folder: Path) -> Iterator[tuple[Mongod, Weed]]:
    """To be killed by the test."""
    mongod, weed = Mongod(folder / "mongod"), Weed(folder / "weed")
    try:
        for service in (mongod, weed):
            asyncio.run(service.start())
        yield mongod, weed
    finally:
        for service in (mongod, weed):
            asyncio.run(service.kill())


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mongod, Weed]]:
    with own_services(tmp_path_factory.mktemp("mortal")) as services:
        yield services


async def killed_and_restarted(
    mortal: tuple[Mongod, Weed], which: Sequence[Service], shards: Path, seed: bytes, folder: Path, away_s: float
) -> bytes:
    mongod, weed = mortal
    where = on(mongod.url, S3(weed.url, weed.access_key, weed.secret_key))
    says = ["MongoDB"] * (mongod in which) + ["S3"] * (weed in which)

    async def begin() -> None:
        await asyncio.gather(*(service.kill() for service in which))

    async def end() -> None:
        await asyncio.gather(*(service.start() for service in which))

    return await outage(where, shards, seed, folder, begin, end, says, away_s)


async def test_mongod_killed_and_restarted_in_a_round(
    mortal: tuple[Mongod, Weed], undisturbed: bytes, shards: Path, seed: bytes, tmp_path: Path
) -> None:
    model = await killed_and_restarted(mortal, mortal[:1], shards, seed, tmp_path / "run", 1.0)
    assert model == undisturbed


@pytest.mark.long
@pytest.mark.parametrize("names", ["mongod", "weed", "mongod and weed"])
async def test_servers_killed_and_back_after_15_s(
    names: str, mortal: tuple[Mongod, Weed], undisturbed: bytes, shards: Path, seed: bytes, tmp_path: Path
) -> None:
    """weed is gone when the round's model is to be put: the commit waits for it."""
    which = [service for service, name in zip(mortal, ("mongod", "weed"), strict=True) if name in names]
    model = await killed_and_restarted(mortal, which, shards, seed, tmp_path / "run", AWAY_S)
    assert model == undisturbed


@pytest.mark.long
async def test_s3_answers_503_for_a_while(
    undisturbed: bytes, shards: Path, seed: bytes, tmp_path: Path, mongo_url: str, s3_server: S3
) -> None:
    async with proxied(s3_server.endpoint_url) as proxy:

        async def begin() -> None:
            proxy.answer(SLOW_DOWN)

        async def end() -> None:
            proxy.answer(b"")

        where = on(mongo_url, s3_server, s3_url=proxy.url)
        model = await outage(where, shards, seed, tmp_path / "run", begin, end, ["503"], AWAY_S)
    assert model == undisturbed


# ---- the owner hangs, and another takes over


class Switch:
    """One address, behind which stands one of several hosts, on the same port."""

    def __init__(self, port: int) -> None:
        self._port, self._host = port, ""
        self._server: asyncio.Server
        self._open: set[asyncio.StreamWriter] = set()

    async def up(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)

    def to(self, host: str) -> None:
        """Connections to the former one are cut."""
        self._host = host
        for writer in list(self._open):
            writer.transport.abort()

    async def down(self) -> None:
        self._server.close()
        self.to("")
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind_writer: asyncio.StreamWriter | None = None
        self._open.add(writer)
        try:
            behind_reader, behind_writer = await asyncio.open_connection(self._host, self._port)
            self._open.add(behind_writer)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._relay(reader, behind_writer))
                tasks.create_task(self._relay(behind_reader, writer))
        except* OSError:
            pass
        finally:
            for end in filter(None, (writer, behind_writer)):
                self._open.discard(end)
                end.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError


@asynccontextmanager
async def switched(*ports: int) -> AsyncIterator[Callable[[str], None]]:
    """Its value moves all ports to a host."""
    switches = [Switch(port) for port in ports]
    for switch in switches:
        await switch.up()

    def to(host: str) -> None:
        for switch in switches:
            switch.to(host)

    try:
        yield to
    finally:
        for switch in switches:
            await switch.down()


OWNER, STANDBY = "127.0.0.2", "127.0.0.3"
REPORT = b"$push"  # an update is saved
COMMIT = b"\x02update\x00\x11\x00\x00\x00control.sessions\x00"  # in a round, the session is saved with its new model


async def hangs(proxy: Proxy, run: Run, at: bytes) -> None:
    """Stops the owner when it is about to save this of the last update or its model; nothing: before that came in."""
    if at:
        proxy.lose("wait", at)
        run.resume(LAST)
        async with asyncio.timeout(WAIT_S):
            while proxy.times:
                await asyncio.sleep(0.01)
    run.server.send(signal.SIGSTOP)
    run.resume(LAST)


async def taken_over(folder: Path, shards: Path, seed: bytes, mongo_url: str, s3: S3, at: bytes) -> tuple[bytes, float]:
    """The final model of a session whose owner hangs in a round and wakes up after its end; the standby's delay."""
    folder.mkdir()
    api_port, grpc_port = free_ports(2)
    where = on(mongo_url, s3, "--durability", "site", "--advertise-host", "127.0.0.1")
    ports = ("--api-port", str(api_port), "--grpc-port", str(grpc_port))
    async with asyncio.timeout(2 * WAIT_S), proxied(mongo_url) as proxy, switched(api_port, grpc_port) as to:
        mine = ("--host", OWNER, "--mongo-url", proxy.url)
        waits = ("--host", STANDBY, "--standby")
        owner = ServerProcess(folder / "a", *where.arguments, *ports, *mine, environment=where.environment)
        standby = ServerProcess(
            folder / "b", *where.arguments, *ports, *waits, environment=where.environment, wait_s=90
        )
        to(OWNER)
        async with (
            owner,
            asyncio.TaskGroup() as tasks,
            waiting_for_one(owner, shards, seed, folder, api_url=f"http://127.0.0.1:{api_port}") as run,
            WireClient(grpc_port, f"digits-{LAST}", host=OWNER) as left_behind,
        ):
            task = f"{run.session_id}/1/1/train/{left_behind.id}"
            update_id = str(uuid.uuid4())
            assert (await left_behind.upload(seed, update_id)).status == pb.OK
            starting = tasks.create_task(standby.start(), name="standby")
            await hangs(proxy, run, at)
            clock = asyncio.get_running_loop().time
            hung_at_s = clock()
            late = tasks.create_task(reported(left_behind, task, update_id), name="told to the one that hangs")
            try:
                await starting
                delay_s = clock() - hung_at_s
                to(STANDBY)
                await run.until_ended()
                # what was uploaded to the former owner and not yet accepted is on its disk: rejected as missing
                failed_attempts = 1 if at == REPORT else 0
                model = await run.final_model(failed_attempts=failed_attempts)
                owner.send(signal.SIGCONT)
                assert await owner.ended() == 1
                [line] = [line for line in owner.tail(1000).splitlines() if line.startswith("flserve: ")]
                assert f"is now owned by flserve, process {standby.pid} " in line
                assert await late != "VERDICT_ACCEPTED"
                await readiness(run, 200)
                assert await run.final_model(failed_attempts=failed_attempts) == model, (
                    "the one that was deposed changed nothing"
                )
            finally:
                if starting.done():
                    await standby.kill()
        return model, delay_s


async def reported(client: WireClient, task: str, update_id: str) -> str:
    """The verdict, or why there is none."""
    sender = pb.Client(name=client.id, role=pb.CLIENT, client_id=client.id)
    meta = '{"training_metadata": {"num_examples": 1}}'
    update = pb.ModelUpdate(sender=sender, model_update_id=update_id, task_id=task, meta=meta)
    try:
        reply = await client.open("Combiner", "SendModelUpdate", update)
    except grpc.aio.AioRpcError as refused:
        return refused.code().name
    return str(pb.Verdict.Name(reply.verdict))


async def test_a_standby_takes_over_from_an_owner_that_hangs_in_a_round(
    undisturbed: bytes, shards: Path, seed: bytes, tmp_path: Path, mongo_url: str, s3_server: S3
) -> None:
    model, delay_s = await taken_over(tmp_path / "run", shards, seed, mongo_url, s3_server, b"")
    assert model == undisturbed
    print(f"the standby was ready {delay_s:.1f} s after")


@pytest.mark.long
@pytest.mark.parametrize("at", [REPORT, COMMIT], ids=["an update", "the commit"])
async def test_a_standby_takes_over_from_an_owner_that_hangs_before_it_saves(
    at: bytes, undisturbed: bytes, shards: Path, seed: bytes, tmp_path: Path, mongo_url: str, s3_server: S3
) -> None:
    model, delay_s = await taken_over(tmp_path / "run", shards, seed, mongo_url, s3_server, at)
    assert model == undisturbed
    print(f"the standby was ready {delay_s:.1f} s after")


def test_a_standby_has_seconds_left_of_the_ten_to_recover() -> None:
    """It sees the last renewal at a poll, and that none followed at another."""
    assert mongo.TAKE_OVER_S + 2 * mongo._POLL_S <= 8.0


# ---- it does not start


def up(where: Where, data: Path) -> ServerProcess:
    return ServerProcess(data, *where.arguments, "--log-level", "error", environment=where.environment)


async def refusal(server: ServerProcess) -> tuple[str, float]:
    """The one line that it says before it ends, and after how long."""
    clock = asyncio.get_running_loop().time
    began_s = clock()
    with pytest.raises(AssertionError, match=r"ended with [12]:"):
        await server.start()
    [line] = server.log.read_text().splitlines()
    return line.removeprefix("flserve: "), clock() - began_s


async def test_a_second_server_on_the_same_database_is_refused_and_the_first_one_named(
    tmp_path: Path, mongo_url: str, s3_server: S3
) -> None:
    where = on(mongo_url, s3_server)
    async with up(where, tmp_path / "a") as first:
        line, _ = await refusal(up(where, tmp_path / "b"))
        assert f"is owned by flserve, process {first.pid} on " in line and "--standby" in line
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"{first.api_url}/ready")).status_code == 200


async def test_wrong_credentials_and_urls_are_one_line_at_the_start(
    tmp_path: Path, mongo_url: str, s3_server: S3
) -> None:
    [nobody] = free_ports(1)
    wrong = {
        "user": on(mongo_url.replace("//", "//fl:hush@"), s3_server),
        "host": on(f"mongodb://fl:hush@127.0.0.1:{nobody}", s3_server),
        "no URL": on("http://fl:hush@localhost", s3_server),
        "key": on(mongo_url, replace(s3_server, secret_key="hush")),
        "S3 host": on(mongo_url, s3_server, s3_url=f"http://127.0.0.1:{nobody}"),
        "no S3 URL": on(mongo_url, s3_server, s3_url="s3://fl-models"),
    }
    servers = [up(where, tmp_path / f"{index}") for index, where in enumerate(wrong.values())]
    said = dict(zip(wrong, await asyncio.gather(*map(refusal, servers)), strict=True))
    assert "wrong user or password" in said["user"][0]
    assert f"127.0.0.1:{nobody}" in said["host"][0]
    assert said["no URL"][0].startswith("mongo_url")
    assert "S3" in said["key"][0]
    assert f"127.0.0.1:{nobody}" in said["S3 host"][0]
    assert "s3://fl-models" in said["no S3 URL"][0] and "valid URI" in said["no S3 URL"][0]
    for line, took_s in said.values():
        assert "hush" not in line
        assert took_s < SAID_WITHIN_S, line


# ---- the disk is full


def fill(file: Path) -> None:
    """It grows until nothing more fits on its disk."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as out:
        while out.write(bytes(4096)):
            pass


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with a file system of its own; mounting it needs root."""
    folder = tmp_path / "data"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.long
async def test_a_disk_that_is_full_for_a_while(
    undisturbed: bytes, shards: Path, seed: bytes, tmp_path: Path, small_disk: Path
) -> None:
    async with (
        asyncio.timeout(2 * WAIT_S),
        ServerProcess(small_disk) as server,
        waiting_for_one(server, shards, seed, tmp_path) as run,
    ):
        filler = small_disk / "filler"
        fill(filler)
        run.resume(LAST)
        reason = await readiness(run, 503)
        assert "No space left" in reason or "disk is full" in reason
        await asyncio.sleep(AWAY_S)  # it is full for so long: the client's upload is told to come again
        assert await readiness(run, 503)
        filler.unlink()
        await run.until_ended()
        await readiness(run, 200)
        assert await run.final_model() == undisturbed
        log = server.log.read_text()
        assert (log.count("store away"), log.count("store back")) == (1, 1), server.tail()
