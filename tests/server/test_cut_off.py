"""Every RPC and every route, broken off in each way that a peer has: whatever it held is free again.

The RPCs are called in bare HTTP/2 (RFC 9113), since no gRPC library half-closes without a message or sends half of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.wrappers_pb2 import StringValue

from fl_client.wire import codec
from fl_client.wire import fl_pb2 as pb
from fl_server.testing import Federation
from tests.server.rest_world import tgz
from tests.server.test_limits import connected, nothing_is_left
from tests.server.wire_client import WAIT_S, WireClient, filled, online, port

HASTY = {
    "upload_idle_timeout_s": 0.4,
    "upload_min_bytes_per_s": 10**7,
    "grpc_request_timeout_s": 0.4,
    "grpc_idle_timeout_s": 1.0,
    "http_header_timeout_s": 1.0,
}
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING = 0, 1, 3, 4, 6
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
CANCEL = (8).to_bytes(4)


class Connection:
    """To the gRPC port. Reads, and opens no window for what it is sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer
        self._ended: set[int] = set()
        self._heard = asyncio.Event()
        self._next_call = 1

    def frame(self, kind: int, flags: int, call: int, payload: bytes = b"") -> None:
        self.writer.write(len(payload).to_bytes(3) + bytes([kind, flags]) + call.to_bytes(4) + payload)

    def begin(self, rpc: str, *, half_closed: bool = False) -> int:
        call, self._next_call = self._next_call, self._next_call + 2
        fields = {":method": "POST", ":scheme": "http", ":path": f"/{rpc}", ":authority": "x"}
        fields |= {"te": "trailers", "content-type": "application/grpc", "client": f"client-{call}"}
        block = b"".join(b"\0" + _short(name) + _short(value) for name, value in fields.items())
        self.frame(HEADERS, END_HEADERS | (END_STREAM if half_closed else 0), call, block)
        return call

    async def ended(self, calls: Iterable[int]) -> None:
        """Returns when the server has ended them all."""
        while not self._ended.issuperset(calls):
            self._heard.clear()
            await self._heard.wait()

    async def read(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3]))
                kind, flags, call = head[3], head[4], int.from_bytes(head[5:])
                if kind in (SETTINGS, PING) and not flags & ACK:
                    self.frame(kind, ACK, 0, payload if kind == PING else b"")
                if kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM):
                    self._ended.add(call)
                    self._heard.set()


def _short(text: str) -> bytes:
    """HPACK (RFC 7541, 5.2) of less than 127 characters."""
    return bytes([len(text)]) + text.encode()


@asynccontextmanager
async def dialled(federation: Federation) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port(federation))
    connection = Connection(reader, writer)
    writer.write(PREFACE)
    connection.frame(SETTINGS, 0, 0)
    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(connection.read())
        try:
            yield connection
        finally:
            reading.cancel()
            writer.transport.abort()


def message_of(rpc: str) -> bytes:
    """An empty one, as gRPC frames it."""
    service, _, name = rpc.partition("/")
    if known := pb.DESCRIPTOR.services_by_name.get(service.removeprefix("fedn.")):
        body = GetMessageClass(known.methods_by_name[name].input_type)().SerializeToString()
    else:
        body = StringValue().SerializeToString()
    return b"\0" + struct.pack(">I", len(body)) + body


async def break_off(connection: Connection, rpcs: tuple[str, ...], how: str) -> None:
    """All of these calls, at the same time."""
    calls = {connection.begin(rpc, half_closed=how == "half-closed"): rpc for rpc in rpcs}
    for call, rpc in calls.items():
        if how == "cancelled after its message":
            connection.frame(DATA, 0, call, message_of(rpc))
        if how in ("half-closed in its message", "disconnected"):
            connection.frame(DATA, 0 if how == "disconnected" else END_STREAM, call, b"\0\0\0\x10\0abc")
        if how.startswith("cancelled"):
            connection.frame(RST_STREAM, 0, call, CANCEL)
    if how == "trickled":
        async with asyncio.TaskGroup() as tasks:
            sending = tasks.create_task(_trickle(connection, tuple(calls)))
            await connection.ended(calls)
            sending.cancel()
    elif how in ("stalled", "half-closed", "half-closed in its message"):
        await connection.ended(calls)


async def _trickle(connection: Connection, calls: tuple[int, ...]) -> None:
    for byte in b"\0\0\0\x10\0" + b"x" * 1000:
        for call in calls:
            connection.frame(DATA, 0, call, bytes([byte]))
        await asyncio.sleep(0.05)


WAYS = (
    *("cancelled before its message", "cancelled after its message", "half-closed", "half-closed in its message"),
    *("stalled", "trickled", "disconnected"),
)


@pytest.mark.parametrize("how", WAYS)
async def test_every_rpc_that_is_broken_off_frees_all_that_it_held(how: str, tmp_path: Path) -> None:
    tight = {"uploads_at_once": 1, "uploads_in_flight_bytes": 10_000, "max_calls_per_peer": 40}
    async with Federation(data_dir=tmp_path, **HASTY, **tight) as federation, asyncio.timeout(WAIT_S):
        scheduler, rpcs = federation.server.scheduler, federation.server.rpcs
        services = pb.DESCRIPTOR.services_by_name.values()
        assert {f"{service.full_name}/{method.name}" for service in services for method in service.methods} < set(rpcs)
        assert (await federation.http.get("/health")).text == "OK"  # its connection is made, and kept
        async with nothing_is_left(tmp_path):
            for _ in range(2):
                async with dialled(federation) as connection, asyncio.TaskGroup() as tasks:
                    tasks.create_task(break_off(connection, rpcs, how))
                    assert (await federation.http.get("/health")).text == "OK"
        assert not scheduler.streams.attached()
        assert scheduler.workshop.spool.used_bytes == 0
        async with WireClient(port(federation), "a") as client:
            client.attach()
            await online(federation, "a")
            assert (await client.upload(codec.encode(filled(1)))).status == pb.OK


@pytest.mark.parametrize("sent", [b"", PREFACE[:10], PREFACE + b"\0\0\0\x04\0\0\0\0\0", None], ids=str)
async def test_a_grpc_connection_without_a_call_is_closed(sent: bytes | None) -> None:
    async with Federation(**HASTY) as federation, asyncio.timeout(WAIT_S):
        if sent is not None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port(federation))
            writer.write(sent)
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()
        else:
            async with dialled(federation) as half_headers:
                half_headers.frame(HEADERS, 0, 1, b"\0")
                await half_headers.ended([1])


async def test_a_model_that_is_not_read_is_no_longer_held_open(tmp_path: Path) -> None:
    async with Federation(data_dir=tmp_path, download_cache_bytes=1000, **HASTY) as federation:
        model_id = await federation.add_seed([np.zeros(2_000_000)])
        request = pb.ModelRequest(id=model_id).SerializeToString()
        async with asyncio.timeout(WAIT_S), nothing_is_left(tmp_path), dialled(federation) as connection:
            for _ in range(3):
                call = connection.begin("fedn.ModelService/Download")
                connection.frame(DATA, END_STREAM, call, b"\0" + struct.pack(">I", len(request)) + request)
            async with WireClient(port(federation), "a") as client:
                assert len(await client.download(model_id)) > 10


# ---- REST


async def bodies(federation: Federation) -> list[tuple[str, str]]:
    """Method and path of every route that may have a body."""
    paths = (await federation.http.get("/openapi.json")).json()["paths"]
    return [
        (method.upper(), path.replace("{id}", "some-id"))
        for path, methods in sorted(paths.items())
        for method in methods
        if method in ("post", "put", "patch", "delete")
    ]


@pytest.mark.parametrize("how", ["disconnected", "half-closed", "stalled", "trickled"])
async def test_every_body_that_is_broken_off_frees_all_that_it_held(how: str, tmp_path: Path) -> None:
    async with Federation(data_dir=tmp_path, **HASTY) as federation, asyncio.timeout(WAIT_S):
        routes = await bodies(federation)
        assert ("POST", "/api/v1/packages/") in routes

        async def broken_off(method: str, path: str) -> None:
            form = path in ("/api/v1/models/", "/api/v1/packages/")
            kind = "multipart/form-data; boundary=b" if form else "application/json"
            begun = '--b\r\nContent-Disposition: form-data; name="file"; filename="a.zip"\r\n\r\nPK' if form else '{"a'
            head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\nContent-Type: {kind}\r\n\r\n"
            async with connected(federation) as (reader, writer):
                writer.write((head + begun).encode())
                if how == "disconnected":
                    return
                if how == "half-closed":
                    writer.write_eof()
                with contextlib.suppress(ConnectionError):
                    while how == "trickled" and not reader.at_eof() and not writer.is_closing():
                        writer.write(b"x")
                        await asyncio.sleep(0.05)
                    answer = await reader.read()
                    assert how != "stalled" or 400 <= int(answer.split()[1]) < 500 or answer.split()[1] == b"501", path

        async with nothing_is_left(tmp_path), asyncio.TaskGroup() as tasks:
            for route in routes:
                tasks.create_task(broken_off(*route))
            assert (await federation.http.get("/health")).text == "OK"


@pytest.mark.parametrize("how", ["disconnected", "half-closed", "not read"])
async def test_every_stream_that_is_broken_off_frees_all_that_it_held(how: str, tmp_path: Path) -> None:
    async with Federation(data_dir=tmp_path, **HASTY) as federation, asyncio.timeout(WAIT_S):
        model_id = await federation.add_seed([np.zeros(4_000_000)])
        package = {"file": ("p.tgz", tgz(big_bin=np.random.default_rng(0).bytes(8_000_000)))}
        await federation.call("POST", "/api/v1/packages/", files=package, data={"helper": "numpyhelper"})
        paths = [f"/api/v1/models/{model_id}/download", "/api/v1/packages/download", "/api/v1/events/"]
        async with nothing_is_left(tmp_path):
            before = len(asyncio.all_tasks())
            for path in paths:
                async with connected(federation) as (reader, writer):
                    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
                    if how == "half-closed":
                        writer.write_eof()
                        await reader.read()
                    elif how == "not read" and path != paths[-1]:
                        writer.transport.pause_reading()  # type: ignore[attr-defined]
                        while len(asyncio.all_tasks()) > before:
                            await asyncio.sleep(0.02)


async def test_a_body_that_nobody_wants_does_not_hold_a_stream(tmp_path: Path) -> None:
    async with (
        Federation(data_dir=tmp_path, **HASTY) as federation,
        asyncio.timeout(WAIT_S),
        nothing_is_left(tmp_path),
        connected(federation) as (reader, writer),
    ):
        writer.write(b"GET /api/v1/events/ HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
