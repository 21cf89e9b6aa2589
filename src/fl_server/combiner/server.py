"""The gRPC server: every method of the proto gets a handler, by its descriptor, guarded against our own bugs."""

from __future__ import annotations

import asyncio
import logging
import socket
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass

from fl_client.wire import fl_pb2 as pb
from fl_server import log
from fl_server.combiner.servicer import Servicer
from fl_server.errors import FlserveError, Unavailable

logger = logging.getLogger(__name__)
RAW_REPLIES = {"Download"}  # handlers that write serialized messages themselves
Handler = Callable[[Any, Any], Awaitable[Any]]

OPTIONS: list[tuple[str, int]] = [
    ("grpc.so_reuseport", 0),  # a second server must fail to bind, not share the port
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 4000),  # FEDn's clients ping every 5 s, also when idle
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 30_000),
    ("grpc.server.max_pending_requests", 100_000),
]


class CombinerServer:
    def __init__(self, servicer: Servicer, *, upload_window: str) -> None:
        """upload_window: "small" keeps memory flat; "auto" is faster for one far-away client."""
        options = [*OPTIONS, ("grpc.http2.bdp_probe", 0)] if upload_window == "small" else OPTIONS
        self._server = grpc.aio.server(options=options)
        for service in pb.DESCRIPTOR.services_by_name.values():
            handlers = {method.name: _handler(servicer, method) for method in service.methods}
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))

    async def start(self, host: str, port: int) -> int:
        """Listens; returns the port (port 0: a free one). Raises Unavailable if it is taken."""
        is_v6 = ":" in host
        try:
            # tried first by ourselves: gRPC writes lines of its own to stderr when it fails
            with socket.create_server((host, port), family=socket.AF_INET6 if is_v6 else socket.AF_INET):
                pass
            bound = self._server.add_insecure_port(f"[{host}]:{port}" if is_v6 else f"{host}:{port}")
        except OSError as taken:
            raise Unavailable(f"gRPC port {port} on {host} is taken: {taken.strerror or taken}") from taken
        except RuntimeError as taken:
            raise Unavailable(f"gRPC port {port} on {host} is taken: {taken}") from taken
        await self._server.start()
        return bound

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)


def _handler(servicer: Servicer, method: Any) -> grpc.RpcMethodHandler[Any, Any]:
    behaviour: Handler = getattr(servicer, method.name, None) or _unimplemented
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[method.client_streaming, method.server_streaming]
    raw = method.name in RAW_REPLIES
    handler: grpc.RpcMethodHandler[Any, Any] = make(
        _guarded(method.name, behaviour),
        request_deserializer=GetMessageClass(method.input_type).FromString,
        response_serializer=None if raw else GetMessageClass(method.output_type).SerializeToString,
    )
    return handler


async def _unimplemented(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "FEDn's inner wire; flserve's rounds have one owner")


def _guarded(name: str, behaviour: Handler) -> Handler:
    """What is not answered in the reply leaves as UNAVAILABLE: any other code ends a FEDn client."""

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        client = next((value for key, value in context.invocation_metadata() or () if key == "client"), "")
        log.client_id.set(client if isinstance(client, str) else "")
        try:
            return await behaviour(request, context)
        except grpc.aio.AbortError:
            raise
        except TimeoutError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"{name}: not done in time; come again")
        except FlserveError as away:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"{name}: {away}")
        except asyncio.CancelledError:
            raise
        except Exception:
            incident = uuid.uuid4().hex[:8]
            logger.exception("rpc failed", extra={"rpc": name, "incident": incident})
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"{name}: incident {incident}; see the server's log")

    return call
