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
from pathlib import Path

import grpc
import pytest

from fl_client.wire import fl_pb2 as pb
from fl_server.services import Mongod, Service, Weed, free_ports
from fl_server.store.s3 import S3
from fl_server.testing import ServerProcess
from tests.crash.processes import CLIENTS, WAIT_S, Run, Where, federation, run_of
from tests.proxy import Proxy, proxied
from tests.server.wire_client import WireClient

LAST = CLIENTS - 1  # the client whose update a round is kept waiting for
AWAY_S = 15.0
SLOW_DOWN = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"


def on(mongo_url: str, s3: S3, *arguments: str, s3_url: str = "") -> Where:
    """A database and buckets of its own."""
    name = f"fl-test-{uuid.uuid4()}"
    options = ("--mongo-url", mongo_url, "--mongo-database", name, "--s3-endpoint-url", s3_url or s3.endpoint_url)
    buckets = {"FL_S3_MODEL_BUCKET": name, "FL_S3_CONTEXT_BUCKET": name}
    keys = {"FL_S3_ACCESS_KEY": s3.access_key, "FL_S3_SECRET_KEY": s3.secret_key}
    return Where((*options, *arguments), {**buckets, **keys})


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
COMMIT = b"\x02update\x00\x11\x00\x00\x00control.sessions\x00"  # in a round, the session is saved with its new model


async def hangs(proxy: Proxy, run: Run, *, at_the_commit: bool) -> None:
    """Stops the owner before the last update came in, or when it is about to commit what it has made of all."""
    if at_the_commit:
        proxy.lose("wait", COMMIT)
        run.resume(LAST)
        async with asyncio.timeout(WAIT_S):
            while proxy.times:
                await asyncio.sleep(0.01)
    run.server.send(signal.SIGSTOP)
    run.resume(LAST)


async def taken_over(
    folder: Path, shards: Path, seed: bytes, mongo_url: str, s3: S3, *, at_the_commit: bool
) -> tuple[bytes, float]:
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
            await hangs(proxy, run, at_the_commit=at_the_commit)
            clock = asyncio.get_running_loop().time
            hung_at_s = clock()
            late = tasks.create_task(reported(left_behind, task, update_id), name="told to the one that hangs")
            try:
                await starting
                delay_s = clock() - hung_at_s
                to(STANDBY)
                await run.until_ended()
                model = await run.final_model()
                owner.send(signal.SIGCONT)
                assert await owner.ended() == 1
                [line] = [line for line in owner.tail(1000).splitlines() if line.startswith("flserve: ")]
                assert f"is now owned by flserve, process {standby.pid} " in line
                assert await late != "VERDICT_ACCEPTED"
                await readiness(run, 200)
                assert await run.final_model() == model, "the one that was deposed changed nothing"
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
    model, delay_s = await taken_over(tmp_path / "run", shards, seed, mongo_url, s3_server, at_the_commit=False)
    assert model == undisturbed
    print(f"the standby was ready {delay_s:.1f} s after")


@pytest.mark.long
async def test_a_standby_takes_over_from_an_owner_that_hangs_before_its_commit(
    undisturbed: bytes, shards: Path, seed: bytes, tmp_path: Path, mongo_url: str, s3_server: S3
) -> None:
    model, _ = await taken_over(tmp_path / "run", shards, seed, mongo_url, s3_server, at_the_commit=True)
    assert model == undisturbed


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
