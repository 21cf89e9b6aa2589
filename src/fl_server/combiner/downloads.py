"""Models as the wire's messages, encoded once and handed to every Download.

The newest are kept, bounded by bytes; a model above the bound is read and encoded chunk by chunk for each call.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from pathlib import Path

from fl_client.wire import fl_pb2 as pb
from fl_client.wire.chunks import CHUNK_BYTES
from fl_server.errors import Missing
from fl_server.scheduler.scheduler import Scheduler
from fl_server.store.ports import Collection


class _LoaderLeft(Exception):
    """Whoever was reading the model was cancelled or failed: the next one reads it itself."""


class Downloads:
    def __init__(self, scheduler: Scheduler, disk: Executor, *, kept_bytes: int) -> None:
        self._scheduler, self._disk, self._kept_bytes = scheduler, disk, kept_bytes
        self._kept: OrderedDict[str, tuple[asyncio.Future[list[bytes] | None], int]] = OrderedDict()
        scheduler.preparers.append(lambda record: self._shared(record.model.id, is_new=True))

    async def messages(self, model_id: str) -> AsyncIterator[bytes]:
        """Serialized ModelResponse messages, the closing one included. Raises Missing."""
        if (messages := await self._shared(model_id)) is not None:
            for message in messages:
                yield message
            return
        path = await self._scheduler.insist(self._scheduler.models.local, model_id)
        loop, offset = asyncio.get_running_loop(), 0
        while chunk := await loop.run_in_executor(self._disk, _read_chunk, path, offset):
            yield _message(model_id, chunk)
            offset += len(chunk)
        yield _end(model_id)

    async def _shared(self, model_id: str, *, is_new: bool = False) -> list[bytes] | None:
        """The kept messages, read once if they are not there yet; None if the model is too large to keep.

        is_new: its bytes are there, and its record is being written.
        """
        while kept := self._kept.get(model_id):
            self._kept.move_to_end(model_id)
            try:
                return await asyncio.shield(kept[0])
            except _LoaderLeft:
                continue
        loaded: asyncio.Future[list[bytes] | None] = asyncio.get_running_loop().create_future()
        self._kept[model_id] = (loaded, 0)
        try:
            messages = await self._load(model_id, is_new)
        except BaseException:
            self._forget(model_id, loaded)
            loaded.set_exception(_LoaderLeft())
            loaded.exception()  # there may be nobody who waits for it
            raise
        loaded.set_result(messages)
        if messages is None:
            self._forget(model_id, loaded)
        return messages

    async def _load(self, model_id: str, is_new: bool) -> list[bytes] | None:
        scheduler = self._scheduler
        known = is_new or (await scheduler.insist(scheduler.store.get, Collection.MODELS, model_id)) is not None
        size_bytes = await scheduler.insist(scheduler.models.size_bytes, model_id) if known else None  # else any text
        if size_bytes is None:
            raise Missing(f"no model {model_id}")
        if size_bytes > self._kept_bytes:
            return None
        while sum(size for _, size in self._kept.values()) + size_bytes > self._kept_bytes:
            oldest = next(id for id, (_, size) in self._kept.items() if size)
            del self._kept[oldest]  # before the new one takes memory, too
        self._kept[model_id] = (self._kept[model_id][0], size_bytes)
        path = await scheduler.insist(scheduler.models.local, model_id)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._disk, _read_messages, path, model_id)

    def _forget(self, model_id: str, loaded: asyncio.Future[list[bytes] | None]) -> None:
        if (kept := self._kept.get(model_id)) and kept[0] is loaded:  # else others have taken its place
            del self._kept[model_id]


def _read_chunk(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(CHUNK_BYTES)


def _read_messages(path: Path, model_id: str) -> list[bytes]:
    with path.open("rb") as file:
        messages = [_message(model_id, chunk) for chunk in iter(lambda: file.read(CHUNK_BYTES), b"")]
    return [*messages, _end(model_id)]


def _message(model_id: str, chunk: bytes) -> bytes:
    return pb.ModelResponse(data=chunk, id=model_id, status=pb.IN_PROGRESS).SerializeToString()


def _end(model_id: str) -> bytes:
    return pb.ModelResponse(id=model_id, status=pb.OK).SerializeToString()
