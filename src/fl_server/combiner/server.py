"""The gRPC server: every method of the proto gets a handler, by its descriptor, behind one guard.

The guard lets in by the table in auth.py, ends streams whose token has expired, and turns our own bugs into "come
again". Beside FEDn's services there is gRPC's own health check.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.wrappers_pb2 import StringValue, UInt32Value

from fl_client.wire import fl_pb2 as pb
from fl_server import log
from fl_server.auth import EXPIRED, Gate, Identity, Role, roles_of_rpc
from fl_server.combiner import convert
from fl_server.combiner.servicer import Servicer, address_of, caller, metadata, token_of
from fl_server.core.model import ClientId
from fl_server.deadlines import Deadlines
from fl_server.errors import FlserveError, Forbidden, Invalid, TooMany, Unauthorized, Unavailable
from fl_server.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)
UPLOAD_WINDOW_BYTES = 256 * 1024  # what gRPC takes of a call before it is read; 64 KiB, its own choice, cost a tenth
RAW_REPLIES = {"Download"}  # handlers that write serialized messages themselves
Context = grpc.aio.ServicerContext[Any, Any]
Handler = Callable[[Any, Any], Awaitable[Any]]
HEALTH = "grpc.health.v1.Health"
_SERVING, _NOT_SERVING, _SERVICE_UNKNOWN = 1, 2, 3
_FAREWELL_S = 2.0  # a status waits so long for the client to read what was sent before

OPTIONS: list[tuple[str, int]] = [
    ("grpc.so_reuseport", 0),  # a second server must fail to bind, not share the port
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 4000),  # FEDn's clients ping every 5 s, also when idle
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 30_000),
    ("grpc.server.max_pending_requests", 100_000),
]


@dataclass(frozen=True, slots=True)
class WireLimits:
    """Of every call; the settings of these names."""

    grpc_max_message_bytes: int = 4 << 20
    grpc_max_metadata_bytes: int = 16 << 10
    grpc_request_timeout_s: float = 300.0
    grpc_idle_timeout_s: float = 300.0
    max_calls_per_peer: int = 20_000
    greeting_timeout_s: float = 20.0  # of a connection: TLS, and HTTP/2's settings

    def options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.max_receive_message_length", self.grpc_max_message_bytes),
            ("grpc.max_metadata_size", self.grpc_max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", self.grpc_max_metadata_bytes),
            ("grpc.max_concurrent_streams", min(self.max_calls_per_peer, 2**31 - 1)),
            ("grpc.max_connection_idle_ms", int(self.grpc_idle_timeout_s * 1000)),
            ("grpc.server_handshake_timeout_ms", int(self.greeting_timeout_s * 1000)),
        ]


class CombinerServer:
    def __init__(
        self,
        servicer: Servicer,
        scheduler: Scheduler,
        *,
        upload_window: str,
        limits: WireLimits,
        gate: Gate | None = None,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        """upload_window: "small" keeps memory flat; "auto" is faster for one far-away client.

        gate: None lets everybody in. credentials: None is plaintext.
        """
        window = (
            [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", UPLOAD_WINDOW_BYTES)]
            if upload_window == "small"
            else []
        )
        self._server = grpc.aio.server(options=[*OPTIONS, *limits.options(), *window])
        self._credentials, self._limits = credentials, limits
        self._methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}  # by path
        guard = Guard(limits.max_calls_per_peer)
        timeout_s = limits.grpc_request_timeout_s
        for service, methods in handlers(servicer, gate, guard, timeout_s).items():
            self._serve(service, methods)
        self._serve(HEALTH, _health(scheduler, guard, timeout_s))
        self._server.add_generic_rpc_handlers((_ByPath(self._methods),))

    def _serve(self, service: str, methods: dict[str, grpc.RpcMethodHandler[Any, Any]]) -> None:
        self._methods |= {f"/{service}/{method}": handler for method, handler in methods.items()}

    @property
    def rpcs(self) -> list[str]:
        """package.Service/Method."""
        return [path.removeprefix("/") for path in self._methods]

    async def start(self, host: str, port: int) -> int:
        """Listens; returns the port (port 0: a free one). Raises Unavailable if it is taken."""
        is_v6 = ":" in host
        try:
            # tried first by ourselves: gRPC writes lines of its own to stderr when it fails
            with socket.create_server((host, port), family=socket.AF_INET6 if is_v6 else socket.AF_INET):
                pass
            address = f"[{host}]:{port}" if is_v6 else f"{host}:{port}"
            if self._credentials is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, self._credentials)
        except OSError as taken:
            raise Unavailable(f"gRPC port {port} on {host} is taken: {taken.strerror or taken}") from taken
        except RuntimeError as taken:
            raise Unavailable(f"gRPC port {port} on {host} is taken: {taken}") from taken
        await self._server.start()
        return bound

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)


class _ByPath(grpc.GenericRpcHandler):
    """All services at once: gRPC asks one handler of a service after another, for each call."""

    def __init__(self, methods: dict[str, grpc.RpcMethodHandler[Any, Any]]) -> None:
        self._methods = methods

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        return self._methods.get(handler_call_details.method)


class Guard:
    """What is not answered in the reply leaves as UNAVAILABLE: any other code ends a FEDn client.

    It counts the calls under way, by address, and bounds them.
    """

    def __init__(self, most: int) -> None:
        self._most, self._calls_of = most, Counter[str]()

    def __call__(self, name: str, behaviour: Handler) -> Handler:
        most, calls_of = self._most, self._calls_of

        async def call(request: Any, context: Context) -> Any:
            said = metadata(context, "client")
            caller.set(said)
            log.client_id.set(said)
            address = address_of(context)
            if calls_of[address] >= most:
                why = f"max_calls_per_peer ({most}) of this address are under way"
                await context.abort(grpc.StatusCode.UNAVAILABLE, why)
            calls_of[address] += 1
            try:
                return await behaviour(request, context)
            except grpc.aio.AbortError:
                raise
            except TimeoutError:
                await _abort_unread(context, f"{name}: not done in time; come again")
            except DecodeError:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{name}: no message of this kind")
            except FlserveError as away:
                await context.abort(grpc.StatusCode.UNAVAILABLE, f"{name}: {away}")
            except asyncio.CancelledError:
                raise
            except Exception:
                incident = uuid.uuid4().hex[:8]
                logger.exception("rpc failed", extra={"rpc": name, "incident": incident})
                await context.abort(grpc.StatusCode.UNAVAILABLE, f"{name}: incident {incident}; see the server's log")
            finally:
                calls_of[address] -= 1
                if not calls_of[address]:
                    del calls_of[address]

        return call


def handlers(
    servicer: Servicer, gate: Gate | None, guard: Guard, timeout_s: float
) -> dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]]:
    """By service and method: all that the proto has."""
    return {
        service.full_name: {
            method.name: _handler(servicer, gate, guard, timeout_s, method) for method in service.methods
        }
        for service in pb.DESCRIPTOR.services_by_name.values()
    }


def _handler(
    servicer: Servicer, gate: Gate | None, guard: Guard, timeout_s: float, method: Any
) -> grpc.RpcMethodHandler[Any, Any]:
    behaviour = _let_in(servicer, gate, method, getattr(servicer, method.name, None) or _unimplemented)
    if method.client_streaming:
        behaviour = _with_messages(behaviour)
    else:
        behaviour = _with_message(behaviour, servicer.deadlines, timeout_s)
    make = grpc.stream_stream_rpc_method_handler if method.server_streaming else grpc.stream_unary_rpc_method_handler
    raw = method.name in RAW_REPLIES
    handler: grpc.RpcMethodHandler[Any, Any] = make(
        guard(method.name, behaviour),
        # one message is read behind the gate: what cannot be read would leave gRPC as UNKNOWN, whoever sent it
        request_deserializer=_reader(method) if method.client_streaming else None,
        response_serializer=None if raw else GetMessageClass(method.output_type).SerializeToString,
    )
    return handler


def _with_message(behaviour: Handler, deadlines: Deadlines, timeout_s: float) -> Handler:
    """For a method of one message, which is read here: grpc.aio would wait for it for ever, and never end a call that
    is half-closed without one."""

    async def call(_: Any, context: Context) -> Any:
        with deadlines.within(timeout_s):
            # not of the iterator: grpc.aio's is a cycle with a finalizer that the garbage collector finds, one a call
            request = await context.read()
        if request is grpc.aio.EOF:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")
        return await behaviour(request, context)

    return call


class _Messages:
    """Those of a call that streams."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def __aiter__(self) -> _Messages:
        return self

    async def __anext__(self) -> Any:
        if (message := await self._context.read()) is grpc.aio.EOF:
            raise StopAsyncIteration
        return message


def _with_messages(behaviour: Handler) -> Handler:
    return lambda _, context: behaviour(_Messages(context), context)


def _health(scheduler: Scheduler, guard: Guard, timeout_s: float) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    """HealthCheckRequest and -Response look as these wrappers do on the wire. Open to all: it says one bit."""
    known = {"", *(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())}

    def status() -> int:
        return _NOT_SERVING if scheduler.unready() else _SERVING

    async def check(request: StringValue, context: Context) -> UInt32Value:
        if request.value not in known:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return UInt32Value(value=status())

    async def watch(request: StringValue, context: Context) -> None:
        """The status, and each that follows; a service that is unknown may become known, says the protocol."""
        said = None
        while True:
            turn = scheduler.turn
            if scheduler.stopping:  # alone: clients drop a message that comes together with such an end
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the server stops")
            now = status() if request.value in known else _SERVICE_UNKNOWN
            if now != said:
                await context.write(UInt32Value(value=now))
                said = now
            await turn.wait()

    wire: dict[str, Any] = {
        "request_deserializer": StringValue.FromString,
        "response_serializer": UInt32Value.SerializeToString,
    }
    return {
        "Check": grpc.stream_unary_rpc_method_handler(
            guard("Check", _with_message(check, scheduler.deadlines, timeout_s)), **wire
        ),
        "Watch": grpc.stream_stream_rpc_method_handler(
            guard("Watch", _with_message(watch, scheduler.deadlines, timeout_s)), **wire
        ),
    }


async def _abort_unread(context: Context, why: str) -> None:
    """To a client that may not be reading: the status then waits in gRPC, where nothing of ours is held for it."""
    try:
        async with asyncio.timeout(_FAREWELL_S):
            await context.abort(grpc.StatusCode.UNAVAILABLE, why)
    except TimeoutError:
        raise asyncio.CancelledError from None


def _reader(method: Any) -> Callable[[bytes], Any]:
    parse: Callable[[bytes], Any] = GetMessageClass(method.input_type).FromString
    if method.name == "Upload":
        parse = convert.chunk

    def read(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            raise Invalid(f"these {len(data)} bytes are no {method.input_type.full_name}") from None

    return read


async def _unimplemented(request: Any, context: Context) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "FEDn's inner wire; flserve's rounds have one owner")


def _let_in(servicer: Servicer, gate: Gate | None, method: Any, behaviour: Handler) -> Handler:
    """A call that streams, whichever way, ends when its token expires: it could go on for ever."""
    read: Callable[[Any], Any] = (lambda messages: messages) if method.client_streaming else _reader(method)
    if gate is None:
        return lambda request, context: behaviour(read(request), context)
    rpc = f"{method.containing_service.full_name}/{method.name}"
    streams = method.client_streaming or method.server_streaming
    names_its_client = method.name != "TaskStream"  # which says what the client is called: it checks by itself

    async def identified(context: Context) -> Identity | None:
        headers = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        header = ", ".join(value if isinstance(value, str) else "" for value in headers)  # two are none
        try:
            return gate.admit(roles_of_rpc(rpc), header, address_of(context))
        except Unauthorized as refused:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(refused) if header else "Token is missing")
        except (Forbidden, TooMany) as refused:
            await context.abort(refused.grpc_status, str(refused))

    async def call(request: Any, context: Context) -> Any:
        identity, message = await identified(context), read(request)
        if identity is None:
            return await behaviour(message, context)
        try:
            if identity.client_id is not None:
                token_of.set(ClientId(identity.client_id))
                log.client_id.set(identity.client_id)
            left_s = identity.expires_at - gate.verifier.clock()
            with servicer.deadlines.within(left_s if streams else None) as valid:
                if names_its_client and identity.role is Role.CLIENT:
                    await servicer.check_owner(context, getattr(message, "sender", None))
                return await behaviour(message, context)
        except Forbidden as refused:
            await context.abort(refused.grpc_status, str(refused))
        except TimeoutError:
            if not valid.expired:
                raise
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, EXPIRED)

    return call
