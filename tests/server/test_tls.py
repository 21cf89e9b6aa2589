"""Certificates on both ports: the private CA, callers with certificates, and new files without a restart."""

from __future__ import annotations

import asyncio
import datetime
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cryptography import x509
from google.protobuf.wrappers_pb2 import StringValue, UInt32Value

from fl_client.client import Client, TrainResult
from fl_client.transport import Tls, Unreachable
from fl_server import app, tls
from fl_server.app import Server
from fl_server.errors import Invalid
from fl_server.settings import Settings
from fl_server.testing import QUICK
from fl_server.tls import Certificates, Made, private_certificates
from tests.proxy import proxied, tunnelled
from tests.server.tokens import SECRET, token
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


async def test_our_client_dials_the_proxy_that_ends_tls_before_a_plaintext_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name, on port 443: the test's HTTP proxy knows where that is."""
    made = private_certificates(tmp_path / "proxy", ["fl.example.org"])
    shown_there = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    shown_there.load_cert_chain(made.certificate, made.key)
    shown_there.set_alpn_protocols(["h2"])
    settings = {"grpc_trusted_proxy": "fl.example.org", "jwt_secret_key": SECRET}
    async with (
        serving(tmp_path, **settings) as server,
        proxied(f"http://127.0.0.1:{server.grpc_port}", shown_there) as proxy,
        tunnelled(proxy.url) as tunnel,
        asyncio.TaskGroup() as running,
        server.scheduler.feed.watch(0) as events,
    ):
        monkeypatch.setenv("grpc_proxy", tunnel.url)
        one = Client(
            train=lambda parameters, task: TrainResult(parameters, 1),
            backoff=QUICK,
            api_url=server.api_url,
            client_id="a",
            token=token("client", sub="a"),
            tls=Tls(made.ca),
        )
        task = running.create_task(one.run())
        while "a" not in server.scheduler.streams.attached():
            await anext(events)
        assert tunnel.asked == {"fl.example.org:443"}
        one.stop()
        await task


async def test_our_client_shows_its_certificate_on_both_ports(tmp_path: Path) -> None:
    made, theirs = (private_certificates(tmp_path / name, []) for name in ("server", "client"))
    settings = {"tls_cert": made.certificate, "tls_key": made.key, "tls_client_ca": theirs.ca}
    async with (
        serving(tmp_path, **settings) as server,
        asyncio.TaskGroup() as running,
        server.scheduler.feed.watch(0) as events,
    ):

        def client(tls: Tls) -> Client:
            train = lambda parameters, task: TrainResult(parameters, 1)  # noqa: E731
            return Client(train=train, backoff=QUICK, api_url=server.api_url, client_id="a", tls=tls)

        for stranger in (Tls(made.ca), Tls(made.ca, made.certificate, made.key)):
            with pytest.raises(Unreachable):
                await client(stranger)._join()
        one = client(Tls(made.ca, theirs.certificate, theirs.key))
        task = running.create_task(one.run())
        while "a" not in server.scheduler.streams.attached():
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


async def test_a_broken_certificate_is_passed_over_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = private_certificates(tmp_path / "made", [])
    async with serving(tmp_path, tls_cert=made.certificate, tls_key=made.key) as server:
        ports = (api_port(server), server.grpc_port)
        before = [await shown("127.0.0.1", port, made.ca) for port in ports]
        made.certificate.write_text("-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n")
        for _ in range(3):
            assert [await shown("127.0.0.1", port, made.ca) for port in ports] == before
        made.certificate.unlink()
        assert [await shown("127.0.0.1", port, made.ca) for port in ports] == before
        assert await health(server.grpc_port, made.ca) == 1
    [line] = [record for record in caplog.records if record.getMessage() == "new certificates not used"]
    assert str(made.certificate) in line.__dict__["files"]


async def test_another_client_ca_counts_without_a_restart_and_the_former_one_no_more(tmp_path: Path) -> None:
    made, first, second = (private_certificates(tmp_path / name, []) for name in ("server", "first", "second"))
    trusted = tmp_path / "clients.pem"
    trusted.write_bytes(first.ca.read_bytes())
    settings = {"tls_cert": made.certificate, "tls_key": made.key, "tls_client_ca": trusted}
    async with serving(tmp_path, **settings) as server:

        async def lets_in(caller: Made) -> list[bool]:
            async with httpx.AsyncClient(verify=contexts[caller.ca]) as http:
                try:
                    rest = (await http.get(f"{server.api_url}/health")).text == "OK"
                except httpx.TransportError:
                    rest = False
            try:
                return [rest, await health(server.grpc_port, made.ca, caller) == 1]
            except grpc.aio.AioRpcError:
                return [rest, False]

        # one context each, which may try to go on with a former session
        contexts = {caller.ca: context(made.ca, caller) for caller in (first, second)}
        assert (await lets_in(first), await lets_in(second)) == ([True, True], [False, False])
        trusted.write_bytes(second.ca.read_bytes())
        assert (await lets_in(first), await lets_in(second)) == ([False, False], [True, True])


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
async def test_no_version_before_tls_1_2_is_spoken(version: ssl.TLSVersion, tmp_path: Path) -> None:
    async with serving(tmp_path, tls="auto") as server:
        old = context(tmp_path / "data" / "tls" / "ca.pem")
        old.set_alpn_protocols(["h2", "http/1.1"])
        old.set_ciphers("ALL:@SECLEVEL=0")  # else this side would not offer it
        old.minimum_version = old.maximum_version = version
        for port in (api_port(server), server.grpc_port):
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=old)
            except (ssl.SSLError, ConnectionError):
                assert version is ssl.TLSVersion.TLSv1_1
                continue
            assert writer.get_extra_info("ssl_object").version() == version.name.replace("v1_", "v1.")
            writer.transport.abort()


# ---- the private CA


def names_of(path: Path) -> set[str]:
    found = x509.load_pem_x509_certificate(path.read_bytes()).extensions
    names = found.get_extension_for_class(x509.SubjectAlternativeName).value
    return {*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))}


def test_the_private_certificate_names_this_machine_and_where_clients_dial(tmp_path: Path) -> None:
    settings = Settings.load(None, {"tls": "auto", "data_dir": tmp_path, "host": "::", "advertise_host": "fl.example"})
    assert app.certificates(settings)
    folder = tmp_path / "tls"
    assert names_of(folder / "server.pem") == {"localhost", "127.0.0.1", "::1", socket.gethostname(), "fl.example"}
    assert folder.stat().st_mode & 0o077 == 0
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        "ca.pem": 0o644,
        "server.pem": 0o644,
        "ca-key.pem": 0o600,
        "server-key.pem": 0o600,
    }
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    app.certificates(settings)
    assert {path: path.read_bytes() for path in folder.iterdir()} == kept
    more = Settings.load(None, {"tls": "auto", "data_dir": tmp_path, "advertise_host": "other.example"})
    app.certificates(more)
    assert "other.example" in names_of(folder / "server.pem")
    assert (folder / "ca.pem").read_bytes() == kept[folder / "ca.pem"]


def test_a_private_certificate_is_renewed_before_it_expires_by_the_same_ca(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "_DAYS", 20)
    made = private_certificates(tmp_path, [])
    ca, former = made.ca.read_bytes(), made.certificate.read_bytes()
    monkeypatch.setattr(tls, "_DAYS", 397)
    private_certificates(tmp_path, [])
    assert made.ca.read_bytes() == ca
    assert made.certificate.read_bytes() != former
    assert 390 < _days_left(ssl.PEM_cert_to_DER_cert(made.certificate.read_text())) < 398


async def test_a_server_that_runs_renews_its_private_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "RENEW_CERTIFICATES_S", 0.01)
    monkeypatch.setattr(tls, "_DAYS", 20)
    ca = tmp_path / "data" / "tls" / "ca.pem"
    async with serving(tmp_path, tls="auto") as server:
        monkeypatch.setattr(tls, "_DAYS", 397)
        for port in (api_port(server), server.grpc_port):
            while _days_left(await shown("127.0.0.1", port, ca)) < 390:
                pass


def _days_left(certificate: bytes) -> int:
    left = x509.load_der_x509_certificate(certificate).not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return left.days


def test_a_key_that_a_crash_left_without_its_certificate_gets_one(tmp_path: Path) -> None:
    made = private_certificates(tmp_path, [])
    other = private_certificates(tmp_path / "other", [])
    made.key.write_bytes(other.key.read_bytes())
    Certificates(*[getattr(private_certificates(tmp_path, []), name) for name in ("certificate", "key")])


def test_a_ca_whose_key_was_taken_away_is_never_replaced_by_another(tmp_path: Path) -> None:
    """Whoever keeps it elsewhere has clients that trust this one."""
    made = private_certificates(tmp_path, [])
    ca = made.ca.read_bytes()
    (tmp_path / "ca-key.pem").unlink()
    private_certificates(tmp_path, [])
    assert made.ca.read_bytes() == ca
    with pytest.raises(Invalid, match=r"ca-key\.pem"):
        private_certificates(tmp_path, ["another.example"])
    assert made.ca.read_bytes() == ca


@pytest.mark.parametrize("name", ["ca.pem", "ca-key.pem"])
def test_a_damaged_file_of_the_private_ca_is_named(name: str, tmp_path: Path) -> None:
    private_certificates(tmp_path, [])
    (tmp_path / name).write_text("no")
    with pytest.raises(Invalid, match=name.replace(".", r"\.")):
        private_certificates(tmp_path, ["another.example"])


def test_a_damaged_certificate_is_made_again_and_a_name_that_none_can_have_is_refused(tmp_path: Path) -> None:
    made = private_certificates(tmp_path, [])
    made.certificate.write_text("no")
    Certificates(*[getattr(private_certificates(tmp_path, []), name) for name in ("certificate", "key")])
    with pytest.raises(Invalid, match="cannot stand in a certificate"):
        private_certificates(tmp_path, ["a" * 64 + ".example"])


async def test_where_callers_need_certificates_no_session_is_taken_up_again(tmp_path: Path) -> None:
    """It would let in a caller whose CA was taken out meanwhile."""
    made, theirs = (private_certificates(tmp_path / name, []) for name in ("server", "client"))
    settings = {"tls_cert": made.certificate, "tls_key": made.key, "tls_client_ca": theirs.ca}
    async with serving(tmp_path, **settings) as server:

        def session(version: ssl.TLSVersion) -> ssl.SSLSession | None:
            caller = context(made.ca, theirs)
            caller.minimum_version = caller.maximum_version = version
            with (
                socket.create_connection(("127.0.0.1", api_port(server)), timeout=WAIT_S) as plain,
                caller.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
            ):
                secured.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert secured.recv(100).startswith(b"HTTP/1.1 200")
                return secured.session

        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            kept = await asyncio.to_thread(session, version)
            assert kept is None or not kept.has_ticket


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
