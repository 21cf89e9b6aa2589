"""The client's calls: decode, submit, encode. No rule of a round lives here.

On these calls an application's reason travels in the reply; only UNAVAILABLE (come again) and the two auth codes may
leave as errors, or a FEDn client ends. A store that is away is waited for `store_patience_s`, then UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from collections import Counter
from collections.abc import AsyncIterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc

from fl_client.wire import fl_pb2 as pb
from fl_server.combiner import convert
from fl_server.combiner.downloads import Downloads
from fl_server.core.model import ClientId, Task, TaskKind, Verdict
from fl_server.deadlines import Deadlines
from fl_server.errors import Forbidden, Invalid, Missing
from fl_server.scheduler.in_flight import InFlight
from fl_server.scheduler.intake import Intake
from fl_server.scheduler.scheduler import Scheduler
from fl_server.scheduler.streams import Ending
from fl_server.store import spool as spooling
from fl_server.store.ports import Collection

Context = grpc.aio.ServicerContext[Any, Any]
MAX_ID_BYTES = 1024
STATUS_RECEIVED = pb.Response(sender=convert.COMBINER, response="Status received.")
# whose token the call has, where it says: set for each call before its method runs
token_of: ContextVar[ClientId | None] = ContextVar("token_of", default=None)
caller: ContextVar[str | None] = ContextVar("caller", default=None)  # what its metadata call the client, once read


@dataclass(frozen=True, slots=True)
class Limits:
    max_model_bytes: int
    uploads_at_once: int  # more wait their turn: they would only hold buffers
    upload_idle_timeout_s: float  # an upload that sends nothing for so long is dropped
    store_patience_s: float
    upload_max_chunks: int = 1_000_000
    upload_min_bytes_per_s: float = 1024.0  # slower uploads are dropped, upload_idle_timeout_s apart
    max_clients: int = 20_000  # attached; more are told to come again
    max_streams_per_peer: int = 10_000  # of one address


class Servicer:
    """Methods are named as in the proto; `context` is that of the call."""

    def __init__(
        self,
        scheduler: Scheduler,
        intake: Intake,
        downloads: Downloads,
        limits: Limits,
        in_flight: InFlight | None = None,
    ) -> None:
        """in_flight: None does not bound it."""
        self._scheduler, self._intake, self._downloads, self._limits = scheduler, intake, downloads, limits
        self._in_flight = in_flight or InFlight(sys.maxsize, limits.store_patience_s)
        self.deadlines = scheduler.deadlines
        self._upload_turns = asyncio.Semaphore(limits.uploads_at_once)
        self._without_turn = asyncio.Semaphore(limits.uploads_at_once)
        self._ids: dict[str, ClientId] = {}  # what attached clients call themselves in metadata, if not by their id
        self._names: dict[ClientId, str] = {}  # the same the other way round: two may have one name
        self._streams_of: Counter[str] = Counter()  # by address

    # ---- Combiner

    async def TaskStream(self, request: pb.ClientAvailableMessage, context: Context) -> None:
        said = _said(context)
        client = ClientId(request.sender.client_id or token_of.get() or said or request.sender.name)
        if not client:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no client id: sender.client_id or metadata `client`")
        if token_of.get() not in (None, client):
            raise Forbidden(f"the token is not of client {client[:100]}")
        if len(client.encode()) > MAX_ID_BYTES:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"client id: more than {MAX_ID_BYTES} bytes")
        address = address_of(context)
        await self._admit_stream(client, address, context)
        self._streams_of[address] += 1
        try:
            await self._stream(client, said, request.sender.name, context)
        finally:
            self._streams_of[address] -= 1
            self._streams_of += Counter()  # forgets those at 0

    async def _admit_stream(self, client: ClientId, address: str, context: Context) -> None:
        limits, attached = self._limits, self._scheduler.streams.attached()
        if client not in attached and len(attached) >= limits.max_clients:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"max_clients ({limits.max_clients}) are attached")
        if self._streams_of[address] >= limits.max_streams_per_peer:
            why = f"max_streams_per_peer ({limits.max_streams_per_peer}) come from this address"
            await context.abort(grpc.StatusCode.UNAVAILABLE, why)

    async def _stream(self, client: ClientId, said: str, name: str, context: Context) -> None:
        scheduler = self._scheduler
        with self.deadlines.within(self._limits.store_patience_s):
            mailbox = await scheduler.attach(client, name or client, context.peer())
        if said and said != client and len(said.encode()) <= MAX_ID_BYTES:
            self._ids.setdefault(said, client)
            self._names[client] = said
        try:
            await context.send_initial_metadata(())  # says "attached" to a client that has no task yet
            self._note_stream(client, name, "connecting to")
            while assignment := await mailbox.next():
                await self._send(context, convert.task_request(assignment, scheduler.clock()), 0)
        finally:
            try:
                await scheduler.detach(mailbox)
            finally:
                self._note_stream(client, name, "disconnected from")
                # else a newer stream of the client is known by this name, or another client
                if client not in scheduler.streams.attached():
                    self._names.pop(client, None)
                    if self._ids.get(said) == client:
                        del self._ids[said]
        match mailbox.ending:
            case Ending.REPLACED:
                await context.abort(grpc.StatusCode.ABORTED, mailbox.detail)
            case Ending.FULL:
                await context.abort(grpc.StatusCode.UNAVAILABLE, mailbox.detail)
            case _:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the server stops; come again")

    async def SendModelUpdate(self, request: pb.ModelUpdate, context: Context) -> pb.Response:
        meta = convert.json_object(request.meta)
        echo = convert.echoed_config(request, meta)
        patience_s = self._limits.store_patience_s
        client = await self._sender(context, request.sender)
        if (task := convert.named_task(request, echo)) is None:
            with self.deadlines.within(patience_s):
                task = await self._unnamed_task(client, request, echo)
        if task is None or task.client != client or task.kind is not TaskKind.TRAIN:
            reply: tuple[Any, str] = (Verdict.NOT_SELECTED, "no such task was issued to this client")
        else:
            reply = await self._intake.receive(task, convert.announced(request, meta), patience_s)
        verdict, reason = reply
        return convert.response(f"ModelUpdate {request.model_update_id}", client, verdict, reason)

    async def SendModelValidation(self, request: pb.ModelValidation, context: Context) -> pb.Response:
        scheduler = self._scheduler
        with self.deadlines.within(self._limits.store_patience_s):
            client = await self._sender(context, request.sender)
            task = convert.validation_task(request)
            if request.failure:
                metrics = None
            else:
                document = convert.validation_document(request, client, scheduler.clock())
                await scheduler.journal.record(Collection.VALIDATIONS, document)
                metrics = convert.json_object(request.data)
            if task and task.client == client:
                await scheduler.validated(task, metrics)
        return convert.response("ModelValidation", client)

    async def SendModelPrediction(self, request: pb.ModelPrediction, context: Context) -> pb.Response:
        with self.deadlines.within(self._limits.store_patience_s):
            client = await self._sender(context, request.sender)
            document = convert.prediction_document(request, client, self._scheduler.clock())
            await self._scheduler.journal.record(Collection.PREDICTIONS, document)
            self._scheduler.predictions.reported(request.prediction_id, client)
        return convert.response("ModelPrediction", client)

    async def SendModelMetric(self, request: pb.ModelMetric, context: Context) -> pb.Response:
        with self.deadlines.within(self._limits.store_patience_s):
            client = await self._sender(context, request.sender)
            for document in convert.metric_documents(request, client, self._scheduler.clock()):
                await self._scheduler.journal.record(Collection.METRICS, document)
        return pb.Response()

    async def SendAttributeMessage(self, request: pb.AttributeMessage, context: Context) -> pb.Response:
        with self.deadlines.within(self._limits.store_patience_s):
            client = await self._sender(context, request.sender)
            for document in convert.attribute_documents(request, client, self._scheduler.clock()):
                await self._scheduler.journal.record(Collection.ATTRIBUTES, document)
        return pb.Response()

    async def SendTelemetryMessage(self, request: pb.TelemetryMessage, context: Context) -> pb.Response:
        client = self._attached_sender(context, request.sender)
        for document in convert.telemetry_documents(request, client, self._scheduler.clock()):
            self._scheduler.journal.offer(Collection.TELEMETRY, document)
        return pb.Response()

    # ---- Connector

    async def SendStatus(self, request: pb.Status, context: Context) -> pb.Response:
        client = self._attached_sender(context, request.sender)
        made = functools.partial(convert.status_document, request, client, self._scheduler.clock())
        self._scheduler.journal.offer(Collection.STATUSES, made)
        return STATUS_RECEIVED

    async def SendHeartbeat(self, request: pb.Heartbeat, context: Context) -> pb.Response:
        """A stream that is open is alive: nothing to note."""
        sender = pb.Client(role=request.sender.role, name=request.sender.name)
        return pb.Response(sender=sender, response="Heartbeat received")

    async def ListActiveClients(self, request: pb.ListClientsRequest, context: Context) -> pb.ClientList:
        attached = sorted(self._scheduler.streams.attached())
        return pb.ClientList(client=[pb.Client(role=pb.CLIENT, name=id, client_id=id) for id in attached])

    async def AcceptingClients(self, request: pb.ConnectionRequest, context: Context) -> pb.ConnectionResponse:
        ready = self._scheduler.unready() is None
        return pb.ConnectionResponse(status=pb.ACCEPTING if ready else pb.TRY_AGAIN_LATER)

    # ---- ModelService

    async def Upload(
        self, requests: AsyncIterable[pb.ModelRequest | convert.Chunk], context: Context
    ) -> pb.ModelResponse:
        """Answered OK once the bytes are durable and found; each call starts a new one."""
        limits, spool = self._limits, self._scheduler.workshop.spool
        client = await self._sender(context, pb.Client())
        incoming = _Incoming(requests, limits, self.deadlines)
        share, upload = self._in_flight.begin(), None
        async with Turn(self._upload_turns, self._without_turn) as turn:
            try:
                while (request := await incoming.next()) is not None:
                    id, data = request.id, request.data
                    if why := incoming.fault(request):
                        return _refused(id[:MAX_ID_BYTES], why)
                    if upload is None:
                        upload = await spool.begin(client, id)
                    try:
                        await share.take(len(data))
                    except Invalid as too_large:
                        return _refused(id, str(too_large))
                    if data and not upload.buffer(data):
                        await self._write(upload, data, turn)
                    if request.status == pb.OK:
                        with self.deadlines.within(limits.store_patience_s):
                            await self._scheduler.insist(upload.finish)
                        return pb.ModelResponse(id=id, status=pb.OK, message="Got model successfully.")
                return _refused("", "the upload ended without its closing message (status OK)")
            finally:
                share.end()
                if upload:
                    await upload.abort()

    async def Download(self, request: pb.ModelRequest, context: Context) -> None:
        """Writes serialized messages: the same bytes for everybody."""
        try:
            with self.deadlines.within(self._limits.store_patience_s) as patience:
                async for message in self._downloads.messages(request.id):
                    patience.move(None)  # from here on the client's reading is what takes time
                    await self._send(context, message, len(message))
        except Missing:
            gone = pb.ModelResponse(id=request.id, status=pb.FAILED, message=f"no model {request.id}")
            await context.write(gone.SerializeToString())

    async def _send(self, context: Context, message: Any, size_bytes: int) -> None:
        """Raises TimeoutError for a client that does not read."""
        limits = self._limits
        with self.deadlines.within(limits.upload_idle_timeout_s + size_bytes / limits.upload_min_bytes_per_s):
            await context.write(message)

    # ---- who and what

    def _attached_sender(self, context: Context, sender: pb.Client) -> ClientId:
        """By its token; else by metadata, as FEDn's clients always have it. Asks no store."""
        if (owner := token_of.get()) is not None:
            return owner
        said = _said(context) or sender.client_id or sender.name
        if said in self._scheduler.streams.attached():  # an id goes before another's name
            return ClientId(said)
        return self._ids.get(said, ClientId(said))

    async def check_owner(self, context: Context, sender: pb.Client | None) -> None:
        """Raises Forbidden if the call names another client than the one of its token, by id or by its own name.

        From then on the sender is who the token says: a name that is another client's id stays no more than a name.
        """
        owner = token_of.get()
        if owner is None:
            return
        if sender is None or sender.client_id != owner:
            for said in {_said(context), sender.client_id if sender else ""} - {"", owner}:
                if said != self._names.get(owner) and said != await self._recorded_name(owner):
                    raise Forbidden(f"the token is not of client {said[:100]}")
        if sender is not None:
            sender.client_id, sender.role = owner, pb.CLIENT

    async def _recorded_name(self, client: ClientId) -> str | None:
        """For one that is not attached: after a restart, an upload may come before its stream."""
        with self.deadlines.within(self._limits.store_patience_s):
            found = await self._scheduler.insist(self._scheduler.store.get, Collection.CLIENTS, client)
        return str(found["name"]) if found else None

    async def _sender(self, context: Context, sender: pb.Client) -> ClientId:
        client = self._attached_sender(context, sender)
        if client in self._scheduler.streams.attached():
            return client
        with self.deadlines.within(self._limits.store_patience_s):
            return await self._scheduler.client_named(client) or client

    async def _unnamed_task(self, client: ClientId, update: pb.ModelUpdate, echo: dict[str, Any]) -> Task | None:
        """Of an update that does not say its task: by the round that it echoes, or the client's one of the model."""
        if named := convert.named_round(echo):
            return await self._scheduler.task_of_round(client, *named)
        return await self._scheduler.task_of_model(client, update.model_id, update.model_update_id)

    async def _write(self, upload: spooling.Upload, data: bytes | memoryview, turn: Turn) -> None:
        with self.deadlines.within(self._limits.store_patience_s):
            while True:
                try:
                    await self._scheduler.insist(upload.write, data)
                    return
                except spooling.SpoolFull:
                    await turn.leave()
                    await upload.wait_for_room(len(data))

    def _note_stream(self, client: ClientId, name: str, verb: str) -> None:
        document = convert.stream_status(client, name, verb, self._scheduler.clock())
        self._scheduler.journal.offer(Collection.STATUSES, document)


class _Incoming:
    """The messages of an upload: how long each may take, and what all of them may be."""

    def __init__(
        self, requests: AsyncIterable[pb.ModelRequest | convert.Chunk], limits: Limits, deadlines: Deadlines
    ) -> None:
        self._stream, self._limits, self._deadlines = aiter(requests), limits, deadlines
        self._loop = asyncio.get_running_loop()
        self._chunks, self._received_bytes, self._waited_s = 0, 0, 0.0

    async def next(self) -> pb.ModelRequest | convert.Chunk | None:
        """None at the end. Raises TimeoutError for a client that is too slow."""
        began_s, limits = self._loop.time(), self._limits
        earned_s = self._received_bytes / limits.upload_min_bytes_per_s - self._waited_s
        with self._deadlines.within(limits.upload_idle_timeout_s + min(0.0, earned_s)):
            request = await anext(self._stream, None)
        self._waited_s += self._loop.time() - began_s
        return request

    def fault(self, request: pb.ModelRequest | convert.Chunk) -> str | None:
        """Why it is refused."""
        limits = self._limits
        if len(request.id) > MAX_ID_BYTES or len(request.id.encode()) > MAX_ID_BYTES:
            return f"id: more than {MAX_ID_BYTES} bytes"
        self._chunks += 1
        self._received_bytes += len(request.data)
        if self._chunks > limits.upload_max_chunks:
            return f"more than upload_max_chunks ({limits.upload_max_chunks}) messages"
        if self._received_bytes > limits.max_model_bytes:
            return f"more than max_model_bytes ({limits.max_model_bytes}); the server's owner can raise it"
        return None


class Turn:
    """One upload's. It leaves it to another when it waits for room in the spool, and then goes on without: not more
    than have a turn, or what all of them hold in memory would have no bound."""

    def __init__(self, turns: asyncio.Semaphore, without: asyncio.Semaphore) -> None:
        self._held, self._without = turns, without

    async def __aenter__(self) -> Turn:
        await self._held.acquire()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._held.release()

    async def leave(self) -> None:
        if self._held is not self._without and not self._without.locked():
            await self._without.acquire()  # at once: it is not locked
            self._held.release()
            self._held = self._without


def _said(context: Context) -> str:
    """gRPC decodes all metadata of a call each time that it is asked."""
    said = caller.get()
    return metadata(context, "client") if said is None else said


def metadata(context: Context, key: str) -> str:
    for name, value in context.invocation_metadata() or ():
        if name == key:
            return value if isinstance(value, str) else value.decode("utf-8", "replace")
    return ""


def address_of(context: Context) -> str:
    """The peer without its port: "ipv4:10.1.2.3"."""
    return str(context.peer()).rpartition(":")[0]


def _refused(id: str, why: str) -> pb.ModelResponse:
    return pb.ModelResponse(id=id, status=pb.FAILED, message=why)
