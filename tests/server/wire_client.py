"""A client on the bare wire that says what FEDn's says: one call each, nothing tried again, every answer as it came.

`name` is what it calls itself in metadata and as sender of its updates: its id, as `fedn client start` does, or the
name of an SDK user's client. A call that ends with a gRPC error raises it: where FEDn's client would end, a test fails.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import grpc
import numpy as np

from fl_client.wire import codec, fl_pb2_grpc
from fl_client.wire import fl_pb2 as pb
from fl_server.testing import Federation

WAIT_S = 30.0
SHAPES: tuple[tuple[tuple[int, ...], type], ...] = (((4,), np.float32), ((2, 3), np.float64))
stubs: Any = fl_pb2_grpc  # generated without types


def filled(value: float) -> list[np.ndarray]:
    """Parameters of the model that the tests train, all of this value."""
    return [np.full(shape, value, dtype) for shape, dtype in SHAPES]


def value_of(parameters: Sequence[np.ndarray]) -> float:
    """The one value that all parameters have, exactly."""
    [value] = {float(number) for array in parameters for number in array.reshape(-1)}
    return value


def update_of(
    task: pb.TaskRequest, update_id: str, *, sender: str = "", meta: Mapping[str, Any] | None = None, **fields: Any
) -> pb.ModelUpdate:
    """As FEDn's client makes it; `meta` replaces what is in it, a None there leaves it out."""
    said = {"training_metadata": {"num_examples": 1}, "fetch_model": 0.1, "config": task.data, **(meta or {})}
    given: dict[str, Any] = {
        "sender": pb.Client(name=sender, role=pb.CLIENT, client_id=sender),
        "receiver": pb.Client(name=task.sender.name, role=task.sender.role),
        "model_id": task.model_id,
        "model_update_id": update_id,
        "timestamp": "2026-11-24 01:54:01.000000+00:00",
        "meta": json.dumps({key: value for key, value in said.items() if value is not None}),
    }
    return pb.ModelUpdate(**{**given, **fields})


class WireClient:
    def __init__(self, port: int, client_id: str, *, name: str = "", host: str = "127.0.0.1") -> None:
        self.id, self.name = client_id, name or client_id
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.aio.insecure_channel(f"{host}:{port}", options)
        self._metadata: tuple[tuple[str, str], ...] = (("client", self.name), ("grpc-server", "127.0.0.1"))
        self._stubs = {
            service: getattr(stubs, f"{service}Stub")(self._channel) for service in pb.DESCRIPTOR.services_by_name
        }
        self.stream: Any = None  # the newest

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        await self._channel.close(None)

    def authorize(self, header: str) -> None:
        """From now on each call says so."""
        said = [(key, value) for key, value in self._metadata if key != "authorization"]
        self._metadata = (*said, ("authorization", header))

    def open(self, service: str, method: str, request: Any) -> Any:
        """The call object of any RPC. request: a message, or an iterator of them."""
        return getattr(self._stubs[service], method)(request, metadata=self._metadata)

    async def ask(self, service: str, method: str, request: Any) -> Any:
        async with asyncio.timeout(WAIT_S):
            return await self.open(service, method, request)

    # ---- the stream

    def attach(self) -> Any:
        """On its way; the server's feed says when it is attached."""
        sender = pb.Client(name=self.name, role=pb.CLIENT, client_id=self.id)
        self.stream = self.open("Combiner", "TaskStream", pb.ClientAvailableMessage(sender=sender))
        return self.stream

    async def task(self) -> pb.TaskRequest:
        async with asyncio.timeout(WAIT_S):
            message = await self.stream.read()
        assert isinstance(message, pb.TaskRequest), "the stream has ended"
        return message

    # ---- models

    async def download(self, model_id: str) -> list[pb.ModelResponse]:
        request = pb.ModelRequest(id=model_id, sender=pb.Client(role=pb.CLIENT, client_id=self.id))
        async with asyncio.timeout(WAIT_S):
            return [message async for message in self.open("ModelService", "Download", request)]

    async def upload(
        self, data: bytes, update_id: str = "", *, chunk_bytes: int = 1 << 20, closing: bool = True
    ) -> pb.ModelResponse:
        """closing: with the last message that says it is complete."""
        upload_id = update_id or str(uuid4())

        async def requests() -> AsyncIterator[pb.ModelRequest]:
            for start in range(0, len(data), chunk_bytes):
                yield pb.ModelRequest(id=upload_id, data=data[start : start + chunk_bytes], status=pb.IN_PROGRESS)
            if closing:
                yield pb.ModelRequest(id=upload_id, status=pb.OK)

        reply: pb.ModelResponse = await self.ask("ModelService", "Upload", requests())
        return reply

    # ---- reports

    async def send(self, update: pb.ModelUpdate) -> pb.Response:
        reply: pb.Response = await self.ask("Combiner", "SendModelUpdate", update)
        return reply

    async def report(self, task: pb.TaskRequest, update_id: str, **said: Any) -> pb.Response:
        """said: as update_of takes it."""
        return await self.send(update_of(task, update_id, sender=self.name, **said))

    async def train(
        self, task: pb.TaskRequest, value: float, *, num_examples: Any = 1, update_id: str = ""
    ) -> pb.Response:
        """Uploads parameters of this value, and reports them."""
        update_id = update_id or str(uuid4())
        assert (await self.upload(codec.encode(filled(value)), update_id)).status == pb.OK
        return await self.report(task, update_id, meta={"training_metadata": {"num_examples": num_examples}})

    async def validate(self, task: pb.TaskRequest, **metrics: float) -> pb.Response:
        validation = pb.ModelValidation(
            sender=pb.Client(name=self.name, role=pb.CLIENT, client_id=self.id),
            receiver=pb.Client(name=task.sender.name, role=task.sender.role),
            model_id=task.model_id,
            data=json.dumps(metrics),
            correlation_id=task.correlation_id,
            session_id=task.session_id,
        )
        validation.timestamp.GetCurrentTime()
        reply: pb.Response = await self.ask("Combiner", "SendModelValidation", validation)
        return reply


# ---- in a federation


def port(federation: Federation) -> int:
    return federation.server.grpc_port


@asynccontextmanager
async def clients(federation: Federation, *ids: str) -> AsyncIterator[list[WireClient]]:
    """They are attached when it enters."""
    async with AsyncExitStack() as stack:
        made = [await stack.enter_async_context(WireClient(port(federation), id)) for id in ids]
        for client in made:
            client.attach()
        for client in made:
            await online(federation, client.id)
        yield made


async def online(federation: Federation, client_id: str, *, after: int = 0) -> int:
    """Returns the number of the event that says so, once it has happened (again: after that number)."""
    return (await federation.event("client", after=after, client_id=client_id, status="online")).id


async def started(federation: Federation, *, rounds: int = 1, **config: Any) -> str:
    """A session of this many rounds from parameters of 0; its id. Its clients are attached already."""
    session_id = await federation.create_session(await federation.add_seed(filled(0)), rounds=rounds, **config)
    await federation.start(session_id, wait_for_clients_s=0)
    return session_id


async def committed(federation: Federation, session_id: str, round: int) -> str:
    """The id of the model that this round made, once it has."""
    event = await federation.event("model", session_id=session_id, round=round)
    return str(event.data["model_id"])


async def result(federation: Federation, session_id: str) -> float:
    """The one value that all parameters of the model have with which the session finished."""
    session = await federation.ended(session_id)
    assert session["status"] == "Finished", session["status_reason"]
    return value_of(await federation.parameters(session["session_config"]["model_id"]))
