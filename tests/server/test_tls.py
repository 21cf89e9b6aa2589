"""Certificates on both ports: the private CA, callers with certificates, and new files without a restart."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.wrappers_pb2 import StringValue, UInt32Value

from fl_client.client import Client, TrainResult
from fl_client.transport import Tls, Unreachable
from fl_server import app
from fl_server.app import Server
from fl_server.errors import Invalid
from fl_server.settings import Settings
from fl_server.testing import QUICK
from fl_server.tls import Made, private_certificates
from tests.server.wire_client import WAIT_S


@asynccontextmanager
async def serving(folder: Path, **settings: Any) -> AsyncIterator[Server]:
    given = {"api_port": 0, "grpc_port": 0, "data_dir": folder / "data", **settings}
    async with asyncio.timeout(WAIT_S), app.serving(Settings.load(None, given)) as server:
        yield server


def context(ca: Path, made: Made | None = None) -> ssl.SSLContext:
    trusting = ssl.create_default_context(cafile=ca)
    if made:
        trusting.load_cert_chain(made.certificate, made.key)
    return trusting


async def health(port: int, ca: Path, made: Made | None = None) -> int:
    credentials = grpc.ssl_channel_credentials(
        ca.read_bytes(), made.key.read_bytes() if made else None, made.certificate.read_bytes() if made else None
    )
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=StringValue.SerializeToString,
            response_deserializer=UInt32Value.FromString,
        )
        return int((await check(StringValue(), timeout=10)).value)


async def shown(host: str, port: int, ca: Path) -> bytes:
    """The certificate that a new connection is shown."""
    trusting = context(ca)
    trusting.set_alpn_protocols(["h2", "http/1.1"])
    _, writer = await asyncio.open_connection(host, port, ssl=trusting)
    certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()  # gRPC is talking already
    assert certificate
    return bytes(certificate)


def api_port(server: Server) -> int:
    return int(server.api_url.rpartition(":")[2])


async def test_auto_makes_a_ca_that_both_ports_are_trusted_by_and_keeps_it(tmp_path: Path) -> None:
    ca = tmp_path / "data" / "tls" / "ca.pem"
    kept = b""
    for _ in range(2):
        async with serving(tmp_path, tls="auto") as server:
            assert server.api_url.startswith("https://127.0.0.1:")
            async with httpx.AsyncClient(verify=context(ca)) as http:
                assert (await http.get(f"{server.api_url}/health")).text == "OK"
                added = await http.post(f"{server.api_url}/api/v1/clients/add", json={"name": "a"})
                assert added.json()["tls"] is True
            assert await health(server.grpc_port, ca) == 1
            assert kept in (b"", ca.read_bytes())
            kept = ca.read_bytes()
    for key in (tmp_path / "data" / "tls").glob("*-key.pem"):
        assert key.stat().st_mode & 0o077 == 0


async def test_our_client_joins_over_tls_and_not_without_the_ca(tmp_path: Path) -> None:
    ca = tmp_path / "data" / "tls" / "ca.pem"
    async with serving(tmp_path, tls="auto") as server:

        def client(**where: Any) -> Client:
            return Client(train=lambda parameters, task: TrainResult(parameters, 1), backoff=QUICK, **where)

        strangers = client(api_url=server.api_url)
        with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
            await strangers._join()
        combiner = f"localhost:{server.grpc_port}"
        async with asyncio.TaskGroup() as running, server.scheduler.feed.watch(0) as events:
            for number, where in enumerate(({"api_url": server.api_url}, {"combiner": combiner})):
                one = client(**where, client_id=f"c{number}", tls=Tls(ca))
                task = running.create_task(one.run())
                while f"c{number}" not in server.scheduler.streams.attached():
                    await anext(events)
                one.stop()
                await task


async def test_new_certificates_are_shown_without_a_restart(tmp_path: Path) -> None:
    first, second = (private_certificates(tmp_path / name, []) for name in ("first", "second"))
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def use(made: Made) -> None:
        for source, target in ((made.key, key), (made.certificate, certificate)):
            part = target.with_suffix(".part")
            part.write_bytes(source.read_bytes())
            os.replace(part, target)

    use(first)
    async with serving(tmp_path, tls_cert=certificate, tls_key=key) as server:
        ports = (api_port(server), server.grpc_port)
        before = [await shown("127.0.0.1", port, first.ca) for port in ports]
        assert before[0] == before[1]
        assert await health(server.grpc_port, first.ca) == 1
        key.write_bytes(second.key.read_bytes())  # half-way: does not fit the certificate
        assert [await shown("127.0.0.1", port, first.ca) for port in ports] == before
        use(second)
        after = [await shown("127.0.0.1", port, second.ca) for port in ports]
        assert after[0] == after[1] != before[0]
        assert await health(server.grpc_port, second.ca) == 1


async def test_callers_need_a_certificate_where_a_client_ca_is_set(tmp_path: Path) -> None:
    made = private_certificates(tmp_path / "server", [])
    theirs = private_certificates(tmp_path / "client", [])
    settings = {"tls_cert": made.certificate, "tls_key": made.key, "tls_client_ca": theirs.ca}
    async with serving(tmp_path, **settings) as server:
        async with httpx.AsyncClient(verify=context(made.ca, theirs)) as http:
            assert (await http.get(f"{server.api_url}/health")).text == "OK"
        assert await health(server.grpc_port, made.ca, theirs) == 1
        for stranger in (None, made):
            with pytest.raises(httpx.TransportError):
                async with httpx.AsyncClient(verify=context(made.ca, stranger)) as http:
                    await http.get(f"{server.api_url}/health")
            with pytest.raises(grpc.aio.AioRpcError):
                await health(server.grpc_port, made.ca, stranger)


@pytest.mark.parametrize("given", [{"tls_cert": "a.pem"}, {"tls_key": "a.pem"}, {"tls_client_ca": "a.pem"}])
def test_half_a_certificate_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(Invalid, match="both are needed"):
        app.certificates(Settings.load(None, given))


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    made = private_certificates(tmp_path, [])
    for files in ({"tls_cert": tmp_path / "none.pem", "tls_key": made.key}, {"tls_cert": made.ca, "tls_key": made.key}):
        with pytest.raises(Invalid, match=str(files["tls_cert"])):
            app.certificates(Settings.load(None, files))
