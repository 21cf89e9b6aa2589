"""The limit: a bare grpc.aio server that moves the same bytes and averages them, and promises nothing.

No task stream, no records, no disk. The file is folded as one float32 vector as its chunks come in; the words of its
headers mean nothing meanwhile and are put back at the close. Its updates are our own form: all of one layout.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np

from benchmarks.models import encoded
from benchmarks.processes import orders, raise_file_limit, say
from fl_client.wire import fl_pb2 as pb
from fl_client.wire.chunks import CHUNK_BYTES

OPTIONS = [("grpc.so_reuseport", 0), ("grpc.server.max_pending_requests", 100_000), ("grpc.http2.max_ping_strikes", 0)]
OK = pb.ModelResponse(id="update", status=pb.OK).SerializeToString()


class Limit:
    def __init__(self, model: bytes, clients: int) -> None:
        self._seed, self._clients, self._received = model, clients, 0
        self._sum = np.zeros(len(model) // 4, np.float32)
        self._kept = np.frombuffer(model, np.float32, count=len(model) // 4)
        self._is_value = np.abs(self._kept) < 100  # not the words of headers
        self._messages = self._encode(model)

    def _encode(self, model: bytes) -> list[bytes]:
        chunks = [model[at : at + CHUNK_BYTES] for at in range(0, len(model), CHUNK_BYTES)]
        messages = [pb.ModelResponse(id="model", data=chunk, status=pb.IN_PROGRESS) for chunk in chunks]
        return [message.SerializeToString() for message in [*messages, pb.ModelResponse(id="model", status=pb.OK)]]

    async def download(self, request: pb.ModelRequest, context: Any) -> None:
        for message in self._messages:
            await context.write(message)

    async def upload(self, requests: AsyncIterator[pb.ModelRequest], context: Any) -> bytes:
        at = 0
        async for request in requests:
            words = np.frombuffer(request.data, np.float32, count=len(request.data) // 4)
            with np.errstate(all="ignore"):
                self._sum[at : at + len(words)] += words
            at += len(words)
        self._received += 1
        if self._received == self._clients:
            self._close()
        return OK

    def _close(self) -> None:
        self._received = 0
        with np.errstate(all="ignore"):
            self._sum /= self._clients
        np.copyto(self._sum, self._kept, where=~self._is_value)
        self._messages = self._encode(self._sum.tobytes() + self._seed[self._sum.nbytes :])
        self._sum[:] = 0


async def main(config: dict[str, Any]) -> None:
    raise_file_limit(config["clients"] + 100)
    limit = Limit(encoded("ours", config["model_bytes"]), config["clients"])
    server = grpc.aio.server(options=OPTIONS)
    handlers = {
        "Download": grpc.unary_stream_rpc_method_handler(
            limit.download, request_deserializer=pb.ModelRequest.FromString
        ),
        "Upload": grpc.stream_unary_rpc_method_handler(limit.upload, request_deserializer=pb.ModelRequest.FromString),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("fedn.ModelService", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    say(grpc_port=port)
    async for _ in orders():
        pass
    os._exit(0)  # at once: what is open is nobody's loss


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
