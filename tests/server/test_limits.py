"""What no client may take more of, on both ports; and that whatever is cut off leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import grpc
import httpx
import pytest

from fl_client.wire import codec
from fl_client.wire import fl_pb2 as pb
from fl_server.testing import Federation
from tests.proxy import Proxy
from tests.server.wire_client import WAIT_S, WireClient, clients, filled, online, port


def held(data: Path) -> tuple[int, int, set[str]]:
    """Tasks, open files, and what lies in the spool and where uploads are checked."""
    left = {str(path.relative_to(data)) for place in ("spool", "work") for path in (data / place).rglob("*")}
    return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd")), left


@asynccontextmanager
async def nothing_is_left(data: Path) -> AsyncIterator[None]:
    """What was held before is held after."""
    before = now = held(data)
    yield
    try:
        async with asyncio.timeout(WAIT_S):
            while (now := held(data))[0] > before[0] or now[1] > before[1] or now[2] - before[2]:
                await asyncio.sleep(0.02)  # what ends it is on its way through sockets and threads
    except TimeoutError:
        raise AssertionError(f"tasks, open files and bytes before: {before}, after: {now}") from None


@asynccontextmanager
async def connected(federation: Federation) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(federation.server.api_url.rpartition(":")[2]))
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def trickle(piece: bytes, pause_s: float) -> AsyncIterator[pb.ModelRequest]:
    upload_id = str(uuid4())
    while True:
        yield pb.ModelRequest(id=upload_id, data=piece, status=pb.IN_PROGRESS)
        await asyncio.sleep(pause_s)


# ---- gRPC


async def test_more_than_max_clients_are_told_to_come_again_and_one_that_comes_back_is_let_in() -> None:
    async with Federation(max_clients=2) as federation, clients(federation, "a", "b") as (a, _):
        async with WireClient(port(federation), "c") as third:
            stream = third.attach()
            assert (await stream.code(), await stream.details()) == (
                grpc.StatusCode.UNAVAILABLE,
                "max_clients (2) are attached",
            )
        since = await online(federation, "a")
        a.attach()
        await online(federation, "a", after=since)


async def test_more_streams_of_one_address_are_told_to_come_again() -> None:
    async with (
        Federation(max_streams_per_peer=1) as federation,
        clients(federation, "a") as (a,),
        WireClient(port(federation), "b") as second,
    ):
        assert await second.attach().code() is grpc.StatusCode.UNAVAILABLE
        a.stream.cancel()
        await federation.event("client", client_id="a", status="offline")
        second.attach()
        await online(federation, "b")


async def test_an_upload_of_too_many_messages_or_bytes_is_refused_with_the_limits_name() -> None:
    async with Federation(upload_max_chunks=3, max_model_bytes=100) as federation, clients(federation, "a") as (a,):
        assert (await a.upload(b"x" * 3, chunk_bytes=1)).message == "more than upload_max_chunks (3) messages"
        assert (await a.upload(b"x" * 101)).message.startswith("more than max_model_bytes (100)")
        assert (await a.upload(b"x" * 100)).status == pb.OK
        assert (await a.upload(b"x", "i" * 2000)).message == "id: more than 1024 bytes"


async def test_a_client_id_of_10_kb_is_refused() -> None:
    async with Federation() as federation, WireClient(port(federation), "a") as client:
        sender = pb.Client(role=pb.CLIENT, client_id="i" * 10_000)
        stream = client.open("Combiner", "TaskStream", pb.ClientAvailableMessage(sender=sender))
        assert await stream.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_metadata_and_messages_above_their_size_are_refused() -> None:
    async with Federation() as federation, WireClient(port(federation), "a") as client:
        client.authorize("x" * 100_000)
        with pytest.raises(grpc.aio.AioRpcError):
            await client.ask("Connector", "SendStatus", pb.Status(status="here"))
        client.authorize("x")
        await client.ask("Connector", "SendStatus", pb.Status(status="here"))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.ask("Connector", "SendStatus", pb.Status(status="x" * (5 << 20)))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_an_upload_that_trickles_is_dropped_and_leaves_nothing(tmp_path: Path) -> None:
    slow = {"upload_idle_timeout_s": 0.5, "upload_min_bytes_per_s": 1000}
    async with Federation(data_dir=tmp_path, **slow) as federation, clients(federation, "a") as (a,):
        async with nothing_is_left(tmp_path):
            call = a.open("ModelService", "Upload", trickle(b"x", 0.05))
            began = time.monotonic()
            async with asyncio.timeout(WAIT_S):
                # INTERNAL is grpc.aio's own, on the client, when it was writing at the moment at which the call ended
                ended = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)
                assert await call.code() in ended, await call.details()
            assert time.monotonic() - began >= 0.4
        assert (await a.upload(codec.encode(filled(1)))).status == pb.OK


@pytest.mark.parametrize("how", ["cancelled", "half-closed", "disconnected"])
async def test_an_upload_that_is_broken_off_leaves_nothing(how: str, tmp_path: Path) -> None:
    spool = tmp_path / "spool"

    async def broken_off(federation: Federation) -> None:
        proxy = Proxy(f"http://127.0.0.1:{port(federation)}")
        await proxy.up()
        async with WireClient(int(proxy.url.rpartition(":")[2]), "a") as client:
            if how == "half-closed":
                assert (await client.upload(b"x" * 3_000_000, closing=False)).status == pb.FAILED
            else:
                before = set(spool.rglob("*"))
                call = client.open("ModelService", "Upload", trickle(b"x" * (1 << 20), 0.05))
                async with asyncio.timeout(WAIT_S):
                    while not set(spool.rglob("*")) - before:
                        await asyncio.sleep(0.01)
                if how == "disconnected":
                    await proxy.down()
                call.cancel()
        if how != "disconnected":
            await proxy.down()

    async with Federation(data_dir=tmp_path) as federation:
        await broken_off(federation)  # what is made once, and kept
        async with nothing_is_left(tmp_path):
            for _ in range(5):
                await broken_off(federation)


async def test_streams_and_downloads_that_are_cancelled_leave_nothing(tmp_path: Path) -> None:
    async with Federation(data_dir=tmp_path) as federation:
        model_id = await federation.add_seed(filled(0))

        async def come_and_go(client_id: str) -> None:
            async with WireClient(port(federation), client_id) as client:
                client.attach()
                await online(federation, client.id)
                download = client.open("ModelService", "Download", pb.ModelRequest(id=model_id))
                assert await download.read()
                download.cancel()
                client.stream.cancel()
            await federation.event("client", client_id=client_id, status="offline")

        await come_and_go("first")  # what is made once, and kept
        async with nothing_is_left(tmp_path):
            for number in range(20):
                await come_and_go(f"c{number}")
        assert list(federation.server.scheduler.streams.attached()) == []


# ---- REST


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_a_request_whose_headers_do_not_come_is_hung_up_on(sent: bytes) -> None:
    async with Federation(http_header_timeout_s=0.3) as federation, connected(federation) as (reader, writer):
        writer.write(sent)
        async with asyncio.timeout(WAIT_S):
            assert await reader.read() == b""


async def test_headers_that_trickle_after_a_good_request_are_hung_up_on() -> None:
    async with Federation(http_header_timeout_s=0.3) as federation, connected(federation) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\nOK")).startswith(b"HTTP/1.1 200")
        writer.write(b"GET /health HTTP/1.1\r\n")
        async with asyncio.timeout(WAIT_S):
            assert await reader.read() == b""


@pytest.mark.parametrize("path", ["/api/v1/sessions/", "/api/v1/models/"])
async def test_a_body_that_stops_or_trickles_is_408_and_leaves_nothing(path: str, tmp_path: Path) -> None:
    slow = {"upload_idle_timeout_s": 0.4, "upload_min_bytes_per_s": 1000}
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="file"; filename="a.npz"\r\n\r\n'
    ).encode()
    async with Federation(data_dir=tmp_path, **slow) as federation, nothing_is_left(tmp_path):
        for pieces in (1, 1000):
            async with connected(federation) as (reader, writer):
                writer.write(head)

                async def send(to: asyncio.StreamWriter = writer, count: int = pieces) -> None:
                    for _ in range(count):
                        to.write(b"x")
                        await asyncio.sleep(0.05)

                async with asyncio.TaskGroup() as group:
                    sending = group.create_task(send())
                    try:
                        async with asyncio.timeout(WAIT_S):
                            assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
                    except ConnectionResetError:
                        assert pieces > 1, "it was still sending when the server hung up"
                    sending.cancel()


async def test_requests_that_are_broken_off_leave_nothing(tmp_path: Path) -> None:
    async with Federation(data_dir=tmp_path) as federation, nothing_is_left(tmp_path):
        head = b"POST /api/v1/models/ HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
        form = (
            b'Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\nContent-Disposition: form-data; name="file"'
        )
        for _ in range(5):
            async with connected(federation) as (_, writer):
                writer.write(head + form + b'; filename="a.npz"\r\n\r\nPK')
                await writer.drain()


async def test_headers_above_their_size_are_refused() -> None:
    async with Federation() as federation:
        try:
            answer = await federation.http.get("/health", headers={"X-Large": "x" * 200_000})
            assert answer.status_code == 431
        except httpx.TransportError:
            pass  # it was still sending when the server hung up


async def test_a_refused_upload_is_not_read_to_its_end() -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536

    async with (
        Federation(jwt_secret_key="a secret of the test, which is long") as federation,
        asyncio.timeout(WAIT_S),
    ):
        try:
            answer = await federation.http.post("/api/v1/models/", content=endless())
            assert answer.status_code == 401
        except httpx.TransportError:
            pass  # it is still sending when the server hangs up
