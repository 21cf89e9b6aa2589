"""FEDn's wire alone: a bare grpc.aio server that answers its six calls a task, with nothing behind them.

What it receives it drops; a round is over when N updates were reported.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc

from benchmarks.limit import OPTIONS
from benchmarks.models import encoded
from benchmarks.processes import orders, raise_file_limit, say
from fl_client.wire import fl_pb2 as pb
from fl_client.wire.chunks import CHUNK_BYTES

SENDER = pb.Client(role=pb.COMBINER, name="wire")
ROUND_CONFIG = json.dumps({"round_config": "x" * 600})  # about as long as a real one


class Wire:
    def __init__(self, model: bytes, clients: int) -> None:
        self._clients, self._reported = clients, 0
        self._mailboxes: list[asyncio.Queue[pb.TaskRequest]] = []
        self._number = self._last = 0
        chunks = [model[at : at + CHUNK_BYTES] for at in range(0, len(model), CHUNK_BYTES)]
        messages = [pb.ModelResponse(id="model", data=chunk, status=pb.IN_PROGRESS) for chunk in chunks]
        messages.append(pb.ModelResponse(id="model", status=pb.OK))
        self._messages = [message.SerializeToString() for message in messages]

    async def task_stream(self, request: pb.ClientAvailableMessage, context: Any) -> None:
        mailbox: asyncio.Queue[pb.TaskRequest] = asyncio.Queue()
        self._mailboxes.append(mailbox)
        await context.send_initial_metadata(())
        while True:
            await context.write(await mailbox.get())

    async def status(self, request: pb.Status, context: Any) -> pb.Response:
        return pb.Response(sender=SENDER, response="Status received.")

    async def update(self, request: pb.ModelUpdate, context: Any) -> pb.Response:
        self._reported += 1
        if self._reported == self._clients:
            self._reported = 0
            self._issue()
        return pb.Response(sender=SENDER, response="RECEIVED")

    async def download(self, request: pb.ModelRequest, context: Any) -> None:
        for message in self._messages:
            await context.write(message)

    async def upload(self, requests: AsyncIterator[pb.ModelRequest], context: Any) -> pb.ModelResponse:
        async for request in requests:
            last = request
        return pb.ModelResponse(id=last.id, status=pb.OK)

    def start(self, rounds: int) -> None:
        self._last = self._number + rounds
        self._issue()

    def _issue(self) -> None:
        if self._number < self._last:
            self._number += 1
            self._send(self._number)

    def _send(self, number: int) -> None:
        for mailbox in self._mailboxes:
            id = f"{number}"
            task = pb.TaskRequest(
                sender=SENDER,
                model_id="model",
                correlation_id=id,
                session_id="session",
                data=ROUND_CONFIG,
                type=pb.MODEL_UPDATE,
                task_id=id,
                round=number,
            )
            mailbox.put_nowait(task)


async def main(config: dict[str, Any]) -> None:
    raise_file_limit(config["clients"] + 100)
    wire = Wire(encoded("ours", config["model_bytes"]), config["clients"])
    server = grpc.aio.server(options=OPTIONS)
    unary, streams = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
    encode = pb.Response.SerializeToString
    services = {
        "fedn.Combiner": {
            "TaskStream": streams(
                wire.task_stream, pb.ClientAvailableMessage.FromString, pb.TaskRequest.SerializeToString
            ),
            "SendModelUpdate": unary(wire.update, pb.ModelUpdate.FromString, encode),
        },
        "fedn.Connector": {"SendStatus": unary(wire.status, pb.Status.FromString, encode)},
        "fedn.ModelService": {
            "Download": streams(wire.download, pb.ModelRequest.FromString),
            "Upload": grpc.stream_unary_rpc_method_handler(
                wire.upload, pb.ModelRequest.FromString, pb.ModelResponse.SerializeToString
            ),
        },
    }
    for name, handlers in services.items():
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    say(grpc_port=port)
    async for order in orders():
        wire.start(order["rounds"])
    os._exit(0)  # at once: what is open is nobody's loss


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
