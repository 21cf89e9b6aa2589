"""The server as a client sees it, played by the test: real gRPC and HTTP ports, with nothing behind them."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from fl_client.client import Backoff, Client
from fl_client.wire import fl_pb2 as pb
from fl_client.wire import fl_pb2_grpc

WAIT_S = 30.0
FAST = Backoff(base_s=0.001, cap_s=0.01)


@dataclass
class Attachment:
    """One task stream. `say` takes a task, or a status code (and details) to end it with."""

    client_id: str
    metadata: dict[str, str]
    says: asyncio.Queue[pb.TaskRequest | tuple[grpc.StatusCode, str]] = field(default_factory=asyncio.Queue)

    def say(self, what: pb.TaskRequest | tuple[grpc.StatusCode, str]) -> None:
        self.says.put_nowait(what)


class Combiner(fl_pb2_grpc.CombinerServicer, fl_pb2_grpc.ModelServiceServicer):
    """Attachments and reports are queues that a test waits on. `broken[method]` are codes for its next calls."""

    def __init__(self) -> None:
        self.attachments: asyncio.Queue[Attachment] = asyncio.Queue()
        self.reports: asyncio.Queue[Any] = asyncio.Queue()
        self.models: dict[str, bytes] = {}
        self.uploads: list[tuple[str, bytes]] = []
        self.update_ids: list[str] = []  # of all SendModelUpdate calls, answered or not
        self.broken: dict[str, list[grpc.StatusCode]] = defaultdict(list)
        self.cut_downloads = 0
        self.upload_refusal = ""
        self.hold_uploads: asyncio.Event | None = None  # set when an upload has come; it is never answered
        self.answer = pb.Response(verdict=pb.Verdict.VERDICT_ACCEPTED)
        self.port = 0

    async def start(self) -> None:
        """On the former port, if there was one."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        fl_pb2_grpc.add_CombinerServicer_to_server(self, self._server)
        fl_pb2_grpc.add_ModelServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)

    async def attachment(self) -> Attachment:
        return await self.attachments.get()

    async def report(self) -> Any:
        return await self.reports.get()

    async def _break(self, method: str, context: Any) -> None:
        if self.broken[method]:
            await context.abort(self.broken[method].pop(0), f"{method} is broken")

    async def TaskStream(self, request: pb.ClientAvailableMessage, context: Any) -> AsyncIterator[pb.TaskRequest]:
        await self._break("TaskStream", context)
        await context.send_initial_metadata(())
        attachment = Attachment(request.sender.client_id, dict(context.invocation_metadata()))
        self.attachments.put_nowait(attachment)
        while True:
            match await attachment.says.get():
                case pb.TaskRequest() as task:
                    yield task
                case (grpc.StatusCode.OK, _):
                    return
                case (code, details):
                    await context.abort(code, details)

    async def Download(self, request: pb.ModelRequest, context: Any) -> AsyncIterator[pb.ModelResponse]:
        await self._break("Download", context)
        data = self.models.get(request.id)
        if data is None:
            yield pb.ModelResponse(id=request.id, status=pb.ModelStatus.UNKNOWN)
            yield pb.ModelResponse(id=request.id, status=pb.ModelStatus.FAILED)
            return
        yield pb.ModelResponse(id=request.id, data=data[:100], status=pb.ModelStatus.IN_PROGRESS)
        if self.cut_downloads:
            self.cut_downloads -= 1
            return
        yield pb.ModelResponse(id=request.id, data=data[100:], status=pb.ModelStatus.IN_PROGRESS)
        yield pb.ModelResponse(id=request.id, status=pb.ModelStatus.OK)

    async def Upload(self, requests: AsyncIterator[pb.ModelRequest], context: Any) -> pb.ModelResponse:
        await self._break("Upload", context)
        if self.hold_uploads is not None:
            self.hold_uploads.set()
            await asyncio.Event().wait()
        data = b""
        async for request in requests:
            data += request.data
            if request.status == pb.ModelStatus.OK:
                self.uploads.append((request.id, data))
        if self.upload_refusal:
            return pb.ModelResponse(status=pb.ModelStatus.FAILED, message=self.upload_refusal)
        return pb.ModelResponse(status=pb.ModelStatus.OK)

    async def SendModelUpdate(self, update: pb.ModelUpdate, context: Any) -> pb.Response:
        self.update_ids.append(update.model_update_id)
        await self._break("SendModelUpdate", context)
        self.reports.put_nowait(update)
        return self.answer

    async def SendModelValidation(self, validation: pb.ModelValidation, context: Any) -> pb.Response:
        self.reports.put_nowait(validation)
        return pb.Response()

    async def SendModelPrediction(self, prediction: pb.ModelPrediction, context: Any) -> pb.Response:
        self.reports.put_nowait(prediction)
        return pb.Response()


class RestApi:
    """clients/add. `answers` are given one a request, the last one for ever; `requests` holds (headers, body)."""

    def __init__(self, *answers: tuple[int, Any]) -> None:
        self.answers = list(answers)
        self.requests: list[tuple[str, Any]] = []
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(
            int(line.split(":")[1]) for line in head.splitlines() if line.lower().startswith("content-length")
        )
        self.requests.append((head, json.loads(await reader.readexactly(length))))
        status, answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        body = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()
        await writer.wait_closed()


@asynccontextmanager
async def running(server: Combiner | RestApi) -> AsyncIterator[None]:
    await server.start()
    try:
        yield
    finally:
        await server.stop()


@asynccontextmanager
async def joined(client: Client) -> AsyncIterator[asyncio.Task[None]]:
    """The client's run(), cancelled at the end; everything within has WAIT_S."""
    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
        run = group.create_task(client.run())
        try:
            yield run
        finally:
            run.cancel()
