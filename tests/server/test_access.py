"""Who gets in on both ports: every route and every RPC, with every kind of token."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from fastapi import FastAPI, WebSocket
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.wrappers_pb2 import StringValue, UInt32Value

from fl_client.wire import codec
from fl_client.wire import fl_pb2 as pb
from fl_server.auth import ACCESS, LEEWAY_S, OPEN, SERVERS, Failures, Gate, Role, Verifier, roles_of_route, roles_of_rpc
from fl_server.errors import Unavailable
from fl_server.testing import Federation
from tests.server.rest_world import serving, tgz
from tests.server.tokens import SECRET, bad_headers, token
from tests.server.wire_client import WAIT_S, WireClient, filled, online, port, started

HEALTH = "grpc.health.v1.Health/Check"
WATCH = "grpc.health.v1.Health/Watch"
MANY = 1_000_000


def bearer(role: str, **claims: Any) -> str:
    return f"Bearer {token(role, **claims)}"


def gate(**settings: Any) -> Gate:
    return Gate(Verifier.of(SECRET), Failures(MANY, time.monotonic), **settings)


def routes(app: FastAPI) -> set[tuple[str, str]]:
    """Method and path template of every route, those that the OpenAPI document leaves out too."""

    def walk(found: Any) -> Iterator[tuple[str, str]]:
        for route in found:
            if (inner := getattr(route, "original_router", None)) is not None:
                assert not route.include_context.prefix
                yield from walk(inner.routes)
            else:
                yield from ((method, route.path) for method in route.methods)

    documented = {(method.upper(), path) for path, item in app.openapi()["paths"].items() for method in item}
    every = set(walk(app.routes))
    assert documented <= every
    return every


# ---- REST


async def test_every_route_is_in_the_table_and_nothing_else_is(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        served = {f"{'GET' if method == 'HEAD' else method} {path}" for method, path in routes(api.app)}
    assert served == {key for key in ACCESS if " " in key}


async def test_no_route_takes_a_bad_token_or_another_role(tmp_path: Path) -> None:
    async with serving(tmp_path, gate=gate()) as api:
        for method, template in sorted(routes(api.app)):
            path = template.replace("{id}", "some-id")
            allowed = roles_of_route(method, path)
            assert allowed
            if allowed == OPEN:
                assert (await api.http.request(method, path)).status_code == 200
                continue
            for kind, (header, said) in bad_headers().items():
                answer = await api.http.request(method, path, headers={"Authorization": header} if header else {})
                assert answer.status_code == 401, (method, path, kind)
                assert method == "HEAD" or answer.json() == {"message": said}, (method, path, kind)
            for role in set(Role) - allowed:
                answer = await api.http.request(method, path, headers={"Authorization": bearer(role)})
                assert answer.status_code in (401, 403), (method, path, role)


async def test_every_role_gets_to_its_routes(tmp_path: Path) -> None:
    async with serving(tmp_path, gate=gate()) as api:
        for method, template in sorted(routes(api.app) - {("GET", "/api/v1/events/")}):
            path = template.replace("{id}", "some-id")
            for role in Role:
                if role in roles_of_route(method, path):
                    answer = await api.http.request(method, path, headers={"Authorization": bearer(role)})
                    assert answer.status_code not in (401, 403), (method, path, role)


async def test_another_role_is_401_on_fedns_routes_and_403_on_ours(tmp_path: Path) -> None:
    async with serving(tmp_path, gate=gate()) as api:
        admin, client = {"Authorization": bearer("admin")}, {"Authorization": bearer("client")}
        answer = await api.http.post("/api/v1/clients/add", headers=admin, json={"name": "a"})
        assert (answer.status_code, answer.json()) == (401, {"message": "Invalid token"})
        answer = await api.http.get("/api/v1/sessions/s/explain", headers=client)
        assert (answer.status_code, answer.json()) == (403, {"message": "Insufficient permissions"})


async def test_a_path_that_is_not_in_the_table_is_401_without_a_token_and_404_with_one(tmp_path: Path) -> None:
    async with serving(tmp_path, gate=gate()) as api:

        @api.app.get("/forgotten")
        def forgotten() -> str:
            raise AssertionError("reached")

        for path in ("/forgotten", "/nowhere", "/health/x"):
            assert (await api.http.get(path)).status_code == 401
            assert (await api.http.get(path, headers={"Authorization": bearer("admin")})).status_code == 404


@pytest.mark.parametrize("path", ["//api//v1//clients", "/api/v1/clients/", "/api/v1/clients//", "/api/v1/%63lients/"])
async def test_no_spelling_of_a_path_gets_around_the_table(path: str, tmp_path: Path) -> None:
    async with serving(tmp_path, gate=gate(open_prefix="/internal"), url_prefix="/internal") as api:
        url = f"http://server:8092{path}"
        assert (await api.http.get(url)).status_code == 401
        assert (await api.http.get(url, headers={"Authorization": bearer("client")})).status_code == 401
        assert (await api.http.get(url, headers={"Authorization": bearer("admin")})).status_code == 200
        assert (await api.http.get(f"/internal{path}")).status_code == 200


async def test_the_whitelist_opens_what_lies_under_it_and_no_neighbour(tmp_path: Path) -> None:
    async with serving(tmp_path, gate=gate(open_prefix="/internal"), url_prefix="/internal") as api:
        assert (await api.http.get("/internal/api/v1/clients/")).status_code == 200
        added = await api.http.post("/internal/api/v1/clients/add", json={"name": "a", "client_id": "a"})
        assert added.status_code == 200
        for path in ("/internalapi/v1/clients/", "/api/v1/clients/", "/x/internal/api/v1/clients/"):
            assert (await api.http.get(path)).status_code == 401
        for path in ("/internal/../api/v1/clients/", "/internal/%2e%2e/api/v1/clients/"):
            url = httpx.URL("http://server:8092").copy_with(raw_path=path.encode())
            assert (await api.http.get(url)).status_code in (401, 404)


async def wired(federation: Federation, request: str, *headers: str) -> tuple[int, str]:
    """Status and body of a request as it stands: no client tidies its path. A body never comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(federation.server.api_url.rpartition(":")[2]))
    writer.write("\r\n".join([f"{request} HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""]).encode())
    async with asyncio.timeout(WAIT_S):
        head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    return int(head.split()[1]), body


TRICKS = (
    *("/INTERNAL/api/v1/clients/", "/Internal/api/v1/clients/", "//api/v1/clients/", "/%2Finternal", "/internal"),
    *("/internal%00/api/v1/clients/", "/internal%0a/api/v1/clients/", "/internal;/api/v1/clients/", "internal/health"),
    *("/./internal/api/v1/clients/", "/x/../internal/api/v1/clients/", "/%69nternal%2e/api/v1/clients/", "*"),
    *("/api/v1/clients/?/internal/", "/internal\\..\\api/v1/clients/", "/api/v1/clients/%2f%2finternal"),
    *("/internal/../api/v1/clients/", "/internal/%2e%2e/api/v1/clients/", "/internal/..%2fapi/v1/clients/"),
    *("/internal/./api/v1/clients/", "/internal/internal/api/v1/clients/", "/internal/%252e%252e/api/v1/clients"),
    *("http://x/internal/api/v1/clients/", "/%c0%afinternal/api/v1/clients/", "/internal%20/api/v1/clients/"),
)


async def test_no_trick_with_a_path_makes_it_lie_under_the_whitelist() -> None:
    settings = {"auth_whitelist_url": "/internal", "custom_url_prefix": "/internal"}
    async with Federation(jwt_secret_key=SECRET, auth_failures_per_minute=MANY, **settings) as federation:
        for path in TRICKS:
            assert (await wired(federation, f"GET {path}"))[0] in (401, 404), path
        for path in ("//internal//api//v1//clients", "/%69nternal/api/v1/clients", "/internal/api/v1/clients//"):
            assert (await wired(federation, f"GET {path}"))[0] == 200, path


async def test_the_whitelist_means_the_path_as_it_was_asked_prefix_and_all(tmp_path: Path) -> None:
    async with serving(tmp_path, gate=gate(open_prefix="/api/v1/models"), url_prefix="/internal") as api:
        assert (await api.http.get("/api/v1/models/")).status_code == 200
        assert (await api.http.get("/api/v1/models/count")).json() == 0
        for path in ("/internal/api/v1/models/", "/api/v1/modelsx", "/api/v1/sessions/"):
            assert (await api.http.get(path)).status_code == 401


async def test_every_route_is_there_with_the_prefix_and_without_and_guarded_alike(tmp_path: Path) -> None:
    async with serving(tmp_path, gate=gate(), url_prefix="/v1") as api:
        for method, template in sorted(routes(api.app) - {("GET", "/api/v1/events/")}):
            path = template.replace("{id}", "some-id")
            for header in (None, bearer("admin"), bearer("client"), bearer("combiner")):
                headers = {"Authorization": header} if header else {}
                codes = {
                    (await api.http.request(method, f"{prefix}{path}", headers=headers)).status_code
                    for prefix in ("", "/v1")
                }
                assert len(codes) == 1, (method, path, codes)
        for path in ("/v1/health", "/v1/ready", "/health"):
            assert (await api.http.get(path)).status_code == 200
        assert (await api.http.get("/v1x/health")).status_code == 401


async def test_a_method_that_a_route_does_not_have_is_for_nobody() -> None:
    async with Federation(jwt_secret_key=SECRET, auth_failures_per_minute=MANY) as federation:
        for method in ("OPTIONS", "HEAD", "TRACE", "CONNECT", "get", "PROPFIND", "DELETE", "PATCH", "PUT"):
            for path in ("/api/v1/clients/", "/api/v1/events/", "/docs", "/get_controller_status"):
                assert (await wired(federation, f"{method} {path}"))[0] == 401
                for role in Role:
                    code, body = await wired(federation, f"{method} {path}", f"Authorization: {bearer(role)}")
                    assert code in (401, 403, 404, 405) or (method, path, role) == ("HEAD", "/docs", Role.ADMIN), body


async def test_a_web_socket_gets_nowhere(tmp_path: Path) -> None:
    """Nothing here speaks it; a route that did would not be in the table."""
    async with serving(tmp_path, gate=gate()) as api:

        @api.app.websocket("/health")
        async def forgotten(socket: WebSocket) -> None:
            raise AssertionError("reached")

        async def never(message: Any = None) -> Any:
            raise AssertionError(f"asked: {message}")

        scope = {"type": "websocket", "path": "/health", "headers": [], "query_string": b"", "subprotocols": []}
        await api.app(scope, never, never)


@pytest.mark.parametrize("origin", ["http://evil.example", "https://server:8092.evil.example", "null", "http://server"])
async def test_without_authentication_a_page_of_another_site_writes_nothing(origin: str, tmp_path: Path) -> None:
    """A form with a file needs no leave of the server's: a compute package would be run by every client."""
    async with serving(tmp_path) as api:
        form = {"files": {"file": ("package.tgz", tgz())}, "data": {"name": "evil", "helper": "numpyhelper"}}
        answer = await api.http.post("/api/v1/packages/", headers={"Origin": origin}, **form)
        assert (answer.status_code, (await api.counts())["packages"]) == (403, 0)
        answer = await api.http.post("/api/v1/packages/", headers={"Origin": "http://server:8092"}, **form)
        assert answer.status_code == 200, "its own /docs may"
        assert (await api.http.get("/api/v1/packages/", headers={"Origin": origin})).status_code == 200


async def test_two_tokens_are_none(tmp_path: Path) -> None:
    async with serving(tmp_path, gate=gate()) as api:
        headers = [("Authorization", bearer("admin")), ("Authorization", bearer("admin"))]
        assert (await api.http.get("/api/v1/clients/", headers=headers)).status_code == 401


async def test_a_client_can_add_itself_only(tmp_path: Path) -> None:
    async with serving(tmp_path, gate=gate()) as api:
        for claim in ("client_id", "sub"):
            headers = {"Authorization": bearer("client", **{claim: "a"})}
            refused = await api.http.post("/api/v1/clients/add", headers=headers, json={"name": "x", "client_id": "b"})
            assert refused.status_code == 401
            for body in ({"name": "x", "client_id": "a"}, {"name": "x"}):
                added = await api.http.post("/api/v1/clients/add", headers=headers, json=body)
                assert (added.status_code, added.json()["client_id"]) == (200, "a")
        unnamed = {"Authorization": bearer("client")}
        added = await api.http.post("/add_client", headers=unnamed, json={"name": "x", "client_id": "b"})
        assert added.json()["client_id"] == "b"
        assert (await api.counts())["clients"] == 2


async def test_bad_tokens_above_the_limit_are_429(tmp_path: Path) -> None:
    few = Gate(Verifier.of(SECRET), Failures(2, lambda: 0.0))
    async with serving(tmp_path, gate=few) as api:
        codes = [(await api.http.get("/api/v1/clients/")).status_code for _ in range(4)]
        assert codes == [401, 401, 429, 429]
        assert (await api.http.get("/api/v1/clients/", headers={"Authorization": bearer("admin")})).status_code == 200


async def test_an_event_stream_ends_when_its_token_expires() -> None:
    async with Federation(jwt_secret_key=SECRET) as federation:
        headers = {"Authorization": bearer("admin", exp=time.time() - 4)}  # within the leeway, for another second
        async with (
            asyncio.timeout(WAIT_S),
            federation.http.stream("GET", "/api/v1/events/", headers=headers) as events,
        ):
            assert events.status_code == 200
            lines = [line async for line in events.aiter_lines()]
            assert lines[0] == ": hello"


# ---- gRPC


class Caller:
    """Any RPC with any metadata."""

    def __init__(self, federation: Federation) -> None:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port(federation)}")

    async def __aenter__(self) -> Caller:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close(None)

    async def call(self, rpc: str, *said: Any, **sender: str) -> tuple[grpc.StatusCode, str]:
        """How it ends: OK for a stream that has begun. Asked again where grpc.aio only says that its own write failed:
        the server had answered before."""
        while (ending := await self._call(rpc, *said, **sender))[1] == "Internal error from Core":
            pass
        return ending

    async def _call(
        self, rpc: str, header: str | None, client: str = "a", **sender: str
    ) -> tuple[grpc.StatusCode, str]:
        metadata = [("client", client), *([("authorization", header)] if header is not None else [])]
        service, _, name = rpc.partition("/")
        if rpc in (HEALTH, WATCH):
            method: Any = None
            request: Any = StringValue()
        else:
            method = pb.DESCRIPTOR.services_by_name[service.removeprefix("fedn.")].methods_by_name[name]
            request = GetMessageClass(method.input_type)()
            if sender:
                request.sender.client_id = sender["client_id"]
        streams_in = method is not None and method.client_streaming
        streams_out = rpc == WATCH or (method is not None and method.server_streaming)
        kind = f"{'stream' if streams_in else 'unary'}_{'stream' if streams_out else 'unary'}"
        stub = getattr(self._channel, kind)(
            f"/{rpc}", request_serializer=lambda message: message.SerializeToString(), response_deserializer=bytes
        )
        call = stub(iter([request]) if streams_in else request, metadata=metadata)
        async with asyncio.timeout(WAIT_S):
            if streams_out:
                await call.initial_metadata()
                if not call.done() and name in ("TaskStream", "Watch"):
                    call.cancel()
                    return grpc.StatusCode.OK, ""
                with contextlib.suppress(grpc.aio.AioRpcError):
                    while await call.read() is not grpc.aio.EOF:
                        pass
            return await call.code(), await call.details()


async def test_every_rpc_is_in_the_table_and_nothing_else_is() -> None:
    async with Federation() as federation:
        assert set(federation.server.rpcs) == {key for key in ACCESS if "/" in key and " " not in key}


async def test_no_rpc_takes_a_bad_token_or_another_role() -> None:
    unauthenticated, denied = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
    async with (
        Federation(jwt_secret_key=SECRET, auth_failures_per_minute=MANY) as federation,
        Caller(federation) as caller,
    ):
        for rpc in federation.server.rpcs:
            if rpc in (HEALTH, WATCH):
                continue
            for kind, (header, said) in bad_headers().items():
                if kind == "long":
                    continue
                text = "Token is missing" if header is None else said
                assert await caller.call(rpc, header) == (unauthenticated, text), (rpc, kind)
            for role in Role:
                code, text = await caller.call(rpc, bearer(role))
                if role in roles_of_rpc(rpc):
                    assert code not in (unauthenticated, denied), (rpc, role)
                else:
                    assert (code, text) == (denied, "Insufficient permissions"), (rpc, role)


async def test_a_token_of_one_client_cannot_act_as_another_on_any_rpc() -> None:
    async with Federation(jwt_secret_key=SECRET) as federation, Caller(federation) as caller:
        own = bearer("client", client_id="a")
        for rpc in federation.server.rpcs:
            if rpc in (HEALTH, WATCH) or roles_of_rpc(rpc) == SERVERS:
                continue
            takes_sender = rpc != "fedn.ModelService/Upload"
            code, _ = await caller.call(rpc, own, "b", **({"client_id": "b"} if takes_sender else {}))
            assert code is grpc.StatusCode.PERMISSION_DENIED, rpc
            code, _ = await caller.call(rpc, own, "a", **({"client_id": "a"} if takes_sender else {}))
            assert code is not grpc.StatusCode.PERMISSION_DENIED, rpc
        statuses = (await federation.http.get("/api/v1/statuses/", headers={"Authorization": bearer("admin")})).json()
        senders = Counter(status["sender"]["client_id"] for status in statuses["result"])
        assert "b" not in senders


async def test_both_schemes_are_taken_on_both_ports_and_only_the_one_that_is_set() -> None:
    for scheme, taken in (("", {"Bearer", "Token", "bearer"}), ("Token", {"Token"})):
        async with Federation(jwt_secret_key=SECRET, auth_scheme=scheme) as federation, Caller(federation) as caller:
            for said in ("Bearer", "Token", "bearer", "JWT"):
                header = f"{said} {token('admin')}"
                code = (await federation.http.get("/api/v1/clients/", headers={"Authorization": header})).status_code
                assert (code == 200) == (said in taken), said
                status, _ = await caller.call("fedn.Connector/SendHeartbeat", f"{said} {token('client')}")
                assert (status is grpc.StatusCode.OK) == (said in taken), said


async def test_two_tokens_are_none_on_the_wire_either() -> None:
    async with Federation(jwt_secret_key=SECRET) as federation:
        good = ("authorization", bearer("client"))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port(federation)}") as channel:
            heartbeat = channel.unary_unary("/fedn.Connector/SendHeartbeat", pb.Heartbeat.SerializeToString)
            await heartbeat(pb.Heartbeat(), metadata=[good])
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await heartbeat(pb.Heartbeat(), metadata=[good, good])
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("method", ["grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "fedn.Combiner/Other"])
async def test_what_is_not_served_is_unimplemented_whoever_asks(method: str) -> None:
    async with (
        Federation(jwt_secret_key=SECRET) as federation,
        grpc.aio.insecure_channel(f"127.0.0.1:{port(federation)}") as channel,
    ):
        for metadata in ([], [("authorization", bearer("admin"))], [("user-agent", "grpc_health_probe/0.4")]):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary(f"/{method}")(b"", metadata=metadata)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


# ---- whose token it is


async def owned(federation: Federation, *claim: str, client: str = "a", name: str = "") -> WireClient:
    made = WireClient(port(federation), client, name=name)
    made.authorize(bearer("client", **{claim[0] if claim else "client_id": client}))
    return made


async def test_what_a_client_reports_is_its_own_whatever_name_it_goes_by() -> None:
    """Its stream runs under the name "b", which is another's id: a name that a client chooses makes it nobody else."""
    admin = {"Authorization": bearer("admin")}
    async with Federation(jwt_secret_key=SECRET) as federation, await owned(federation, "sub", name="b") as client:
        client.attach()
        await online(federation, "a")
        for sender in (pb.Client(name="b", client_id="b", role=pb.COMBINER), pb.Client(name="b", role=pb.REDUCER)):
            await client.ask("Connector", "SendStatus", pb.Status(sender=sender, status="x"))
            await client.ask("Combiner", "SendModelValidation", pb.ModelValidation(sender=sender, data="{}"))
            prediction = pb.ModelPrediction(sender=sender, prediction_id="p", data="{}")
            await client.ask("Combiner", "SendModelPrediction", prediction)
            metric = pb.ModelMetric(sender=sender, metrics=[pb.MetricElem(key="loss", value=1)])
            await client.ask("Combiner", "SendModelMetric", metric)
            attribute = pb.AttributeMessage(sender=sender, attributes=[pb.AttributeElem(key="k", value="v")])
            await client.ask("Combiner", "SendAttributeMessage", attribute)
        for noun in ("statuses", "validations", "predictions", "metrics", "attributes"):
            page = (await federation.http.get(f"/api/v1/{noun}/", headers=admin)).json()
            senders = {
                (said["sender"]["client_id"], said["sender"]["role"])
                for said in page["result"]
                if "TaskStream" not in said.get("status", "")
            }
            assert senders == {("a", "CLIENT")}, noun


async def test_two_clients_of_one_name_may_both_upload() -> None:
    """FEDn's SDK calls itself by a name in metadata, and an upload says nothing else of who sends it."""
    async with Federation(jwt_secret_key=SECRET) as federation:
        for client_id in ("a", "b"):
            client = await owned(federation, client=client_id, name="site")
            client.attach()
            await online(federation, client_id)
            assert (await client.upload(b"x")).status == pb.OK
            if client_id == "b":
                await client.__aexit__(None, None, None)


async def test_an_upload_after_a_restart_may_come_before_its_stream(tmp_path: Path) -> None:
    for life in range(2):
        async with Federation(jwt_secret_key=SECRET, data_dir=tmp_path) as federation:
            async with await owned(federation, name="site") as client:
                if life == 0:
                    client.attach()
                    await online(federation, "a")
                assert (await client.upload(b"x")).status == pb.OK
            async with await owned(federation, name="another site") as client:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await client.upload(b"x")
                assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_the_upload_of_one_client_is_no_update_of_another() -> None:
    admin = {"Authorization": bearer("admin", exp=time.time() + 600)}
    async with Federation(jwt_secret_key=SECRET) as federation:
        federation.http.headers.update(admin)
        async with await owned(federation, client="a") as victim, await owned(federation, client="b") as thief:
            for client in (victim, thief):
                client.attach()
                await online(federation, client.id)
            await started(federation, clients_required=2)
            theirs, task = await victim.task(), await thief.task()
            assert (await victim.upload(codec.encode(filled(2)), "update-of-a")).status == pb.OK
            reply = await thief.report(task, "update-of-a")
            assert reply.verdict == pb.VERDICT_REJECTED, "it has no upload of that id"
            reply = await thief.report(theirs, "update-of-a")
            assert reply.verdict == pb.VERDICT_NOT_SELECTED, "that is not its task"
            assert [message.status for message in await thief.download("update-of-a")] == [pb.FAILED]
            assert (await victim.report(theirs, "update-of-a")).verdict == pb.VERDICT_ACCEPTED


# ---- tokens that expire


async def test_an_upload_ends_unauthenticated_when_its_token_expires_and_leaves_nothing() -> None:
    async with Federation(jwt_secret_key=SECRET) as federation, WireClient(port(federation), "a") as client:
        client.authorize(bearer("client", client_id="a", exp=time.time() - 4))

        async def trickling() -> AsyncIterator[pb.ModelRequest]:
            yield pb.ModelRequest(id="u", data=b"x", status=pb.IN_PROGRESS)
            await asyncio.Event().wait()

        call = client.open("ModelService", "Upload", trickling())
        async with asyncio.timeout(WAIT_S):
            assert (await call.code(), await call.details()) == (grpc.StatusCode.UNAUTHENTICATED, "Token expired")
        spool = federation.server.scheduler.workshop.spool
        assert spool.used_bytes == 0


async def test_a_download_that_is_hardly_read_ends_when_its_token_expires() -> None:
    async with Federation(jwt_secret_key=SECRET) as federation, WireClient(port(federation), "a") as client:
        federation.http.headers["Authorization"] = bearer("admin", exp=time.time() + 600)
        seed = await federation.add_seed([np.random.default_rng(0).random(1 << 22)])  # 32 MiB: more than any window
        expires_at = time.time() - 4
        client.authorize(bearer("client", client_id="a", exp=expires_at))
        call = client.open("ModelService", "Download", pb.ModelRequest(id=seed, sender=pb.Client(client_id="a")))
        async with asyncio.timeout(WAIT_S):
            assert isinstance(await call.read(), pb.ModelResponse)
            await asyncio.sleep(expires_at + LEEWAY_S - time.time())
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await call.read() is not grpc.aio.EOF:
                    pass
            assert (await call.code(), await call.details()) == (grpc.StatusCode.UNAUTHENTICATED, "Token expired")


async def test_a_body_that_is_still_coming_when_its_token_expires_is_not_taken() -> None:
    async with Federation(jwt_secret_key=SECRET) as federation:
        said = f"Authorization: {bearer('admin', exp=time.time() - 4)}"
        answer = await wired(federation, "POST /api/v1/sessions/", said, "Content-Length: 10")
        assert answer == (401, '{"message":"Token expired"}')


async def test_a_task_stream_ends_unauthenticated_when_its_token_expires() -> None:
    async with Federation(jwt_secret_key=SECRET) as federation, WireClient(port(federation), "a") as client:
        client.authorize(bearer("client", client_id="a", exp=time.time() - 4))
        stream = client.attach()
        async with asyncio.timeout(WAIT_S):
            await stream.initial_metadata()
            assert (await stream.code(), await stream.details()) == (
                grpc.StatusCode.UNAUTHENTICATED,
                "Token expired",
            )
        await federation.event("client", client_id="a", status="offline")


async def test_health_is_open_and_says_whether_the_server_takes_work() -> None:
    async with (
        Federation(jwt_secret_key=SECRET) as federation,
        grpc.aio.insecure_channel(f"127.0.0.1:{port(federation)}") as channel,
    ):
        check = channel.unary_unary(
            f"/{HEALTH}", request_serializer=StringValue.SerializeToString, response_deserializer=UInt32Value.FromString
        )
        assert (await check(StringValue())).value == 1
        assert (await check(StringValue(value="fedn.Combiner"))).value == 1
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await check(StringValue(value="nobody"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        federation.server.scheduler.stop_serving()
        assert (await check(StringValue())).value == 2


async def test_a_watcher_of_the_health_hears_each_change_needs_no_token_and_is_told_when_the_server_stops() -> None:
    async with (
        Federation(jwt_secret_key=SECRET) as federation,
        grpc.aio.insecure_channel(f"127.0.0.1:{port(federation)}") as channel,
        asyncio.timeout(WAIT_S),
    ):
        watch = channel.unary_stream(
            f"/{WATCH}", request_serializer=StringValue.SerializeToString, response_deserializer=UInt32Value.FromString
        )
        whole, unknown = watch(StringValue()), watch(StringValue(value="nobody"))
        assert ((await whole.read()).value, (await unknown.read()).value) == (1, 3)
        outages = federation.server.scheduler.outages
        away = Unavailable("the test has sent it away")

        async def once_away() -> None:
            nonlocal away
            if said := away:
                away = None
                raise said

        await outages.insist(once_away)
        assert ((await whole.read()).value, (await whole.read()).value) == (2, 1)
        federation.server.scheduler.stop_serving()
        for call in (whole, unknown):
            assert await call.code() is grpc.StatusCode.UNAVAILABLE


async def test_neither_token_nor_secret_is_in_any_log_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    sent = [header for header, _ in bad_headers().values() if header and len(header) < 8000]
    good = bearer("client", client_id="a")
    async with Federation(jwt_secret_key=SECRET) as federation, Caller(federation) as caller:
        for header in (*sent, good):
            await federation.http.get("/api/v1/clients/", headers={"Authorization": header})
            await caller.call("fedn.Connector/SendStatus", header)
    ours = "\n".join(record.getMessage() + str(record.__dict__) for record in caplog.records if _ours(record))
    assert ours
    for secret in (SECRET, *(header.split()[-1] for header in (*sent, good) if len(header) > 40)):
        assert secret not in ours


def _ours(record: logging.LogRecord) -> bool:
    """httpcore, which the test itself calls with, tells its headers at DEBUG."""
    return not record.name.startswith(("httpcore", "hpack"))
