"""How bodies come and go: JSON of bounded size and depth, forms whose file goes to disk as it comes, files from disk.

Nothing that JSON has no word for (NaN, half a surrogate) gets past this file, so that whatever is stored can be shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.types import Receive, Scope, Send

from ..errors import Invalid, Unavailable
from ..scheduler.in_flight import InFlight, Share

MAX_FORM_TEXT_BYTES = 1 << 16  # all text of a form together, its part headers included
_WRITE_BYTES = _READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Of every request; the settings of these names. In the app's state."""

    http_max_header_bytes: int = 64 << 10
    json_max_bytes: int = 1 << 20
    json_max_depth: int = 64
    page_max_rows: int = 10_000


def limits_of(request: Request) -> Limits:
    limits: Limits = request.app.state.limits
    return limits


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is too large")
    return number


def _is_deep(value: object, max_depth: int) -> bool:
    level = [value]
    for _ in range(max_depth + 1):
        inner = [node for node in level if isinstance(node, dict | list)]
        level = [child for node in inner for child in (node.values() if isinstance(node, dict) else node)]
        if not inner:
            return False
    return True


def parsed_json(body: bytes, max_depth: int) -> Any:
    """Raises HTTPException 400: FastAPI would turn any other error into a sentence that says nothing."""
    deep = f"body: nested deeper than json_max_depth ({max_depth})"
    try:
        value = json.loads(body, parse_constant=_refuse_constant, parse_float=_finite)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as exc:
        raise HTTPException(400, deep) from exc
    except UnicodeEncodeError as exc:
        raise HTTPException(400, "body: half of a surrogate pair is no text") from exc
    except ValueError as exc:
        raise HTTPException(400, f"body: invalid JSON: {exc}") from exc
    if _is_deep(value, max_depth):
        raise HTTPException(400, deep)
    return value


class BoundedRequest(Request):
    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            body, max_bytes = bytearray(), limits_of(self).json_max_bytes
            async for chunk in self.stream():
                body += chunk
                if len(body) > max_bytes:
                    why = f"body: more than json_max_bytes ({max_bytes})"
                    raise HTTPException(413, why, {"connection": "close"})
            self._body = bytes(body)
        return self._body

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = parsed_json(await self.body(), limits_of(self).json_max_depth)
        return self._json


class BoundedRoute(APIRoute):
    """For every router of ours."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await handler(BoundedRequest(request.scope, request.receive))

        return bounded


# ---- forms


class _Parts:
    """What the multipart parser calls; gathers a form's text, and the one file's bytes until they are taken."""

    def __init__(self, file_field: str) -> None:
        self.file_field = file_field
        self.file_name = ""
        self.file_seen = False
        self.file_bytes = bytearray()
        self.fields: dict[str, str] = {}
        self.complete = False
        self._header, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._field = ""
        self._text = bytearray()
        self._text_bytes = 0

    def on_part_begin(self) -> None:
        self._disposition, self._field, self._text = b"", "", bytearray()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += self._counted(data[start:end])

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += self._counted(data[start:end])

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._field = options.get(b"name", b"").decode("utf-8", "replace")
        if self._field == self.file_field:
            if self.file_seen:
                raise Invalid(f"{self.file_field}: given twice")
            self.file_seen = True
            self.file_name = options.get(b"filename", b"").decode("utf-8", "replace")
        elif b"filename" in options:
            raise Invalid(f"{self.file_field}: missing; a file came as {self._field[:100]!r}")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field == self.file_field:
            self.file_bytes += data[start:end]
        else:
            self._text += self._counted(data[start:end])

    def on_part_end(self) -> None:
        if self._field != self.file_field:
            try:
                self.fields[self._field] = self._text.decode()
            except UnicodeDecodeError as exc:
                raise Invalid(f"{self._field}: text in UTF-8 needed") from exc

    def on_end(self) -> None:
        self.complete = True

    def _counted(self, text: bytes) -> bytes:
        self._text_bytes += len(text)
        if self._text_bytes > MAX_FORM_TEXT_BYTES:
            raise Invalid(f"form: more than {MAX_FORM_TEXT_BYTES} bytes of text")
        return text


@dataclass(frozen=True, slots=True)
class Upload:
    """A form whose file is on disk (not synced), under a name that is no other's."""

    path: Path
    file_name: str  # as the sender calls it
    fields: dict[str, str]


@dataclass(frozen=True, slots=True)
class Desk:
    """Where uploads lie while they are checked, who reads and checks them, and how large they may be."""

    folder: Path
    kernel: Executor
    disk: Executor
    max_model_bytes: int  # of a model's arrays, inflated
    max_package_bytes: int  # of a compute package, as it comes
    max_unpacked_bytes: int  # of all that is in one
    in_flight: InFlight

    @asynccontextmanager
    async def receive(
        self, request: Request, file_field: str, max_file_bytes: int, named: str
    ) -> AsyncIterator[Upload]:
        """Whatever begins with the file's name is removed at the end. named: as the setting of that limit is.

        Raises Invalid if the form is broken, has no such file, or a larger one; TooMany while other uploads are too
        large together; Unavailable if the disk fails.
        """
        path = self.folder / uuid.uuid4().hex
        share, largest = self.in_flight.begin(), f"{named} ({max_file_bytes} bytes)"
        try:
            yield await _receive_form(request, file_field, path, self.disk, share, max_file_bytes, largest)
        except OSError as exc:
            raise Unavailable(f"the upload could not be written: {exc}") from exc
        finally:
            share.end()
            await asyncio.get_running_loop().run_in_executor(self.disk, _remove, path)


def _remove(path: Path) -> None:
    for beside in path.parent.glob(f"{path.name}*"):
        beside.unlink(missing_ok=True)


async def _receive_form(
    request: Request, file_field: str, target: Path, disk: Executor, share: Share, max_file_bytes: int, largest: str
) -> Upload:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise Invalid(f"{file_field}: send it as multipart/form-data")
    parts = _Parts(file_field)
    try:
        parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": parts.on_part_begin,
                "on_part_data": parts.on_part_data,
                "on_part_end": parts.on_part_end,
                "on_header_field": parts.on_header_field,
                "on_header_value": parts.on_header_value,
                "on_header_end": parts.on_header_end,
                "on_headers_finished": parts.on_headers_finished,
                "on_end": parts.on_end,
            },
        )
    except FormParserError as exc:  # of its boundary
        raise Invalid(f"form: {exc}") from exc
    loop = asyncio.get_running_loop()
    file: BinaryIO = await loop.run_in_executor(disk, target.open, "xb")
    written = 0
    try:
        async for chunk in request.stream():
            await share.take(len(chunk))
            try:
                parser.write(chunk)
            except FormParserError as exc:
                raise Invalid(f"form: {exc}") from exc
            if written + len(parts.file_bytes) > max_file_bytes:
                raise Invalid(f"{file_field}: more than {largest}")
            if len(parts.file_bytes) >= _WRITE_BYTES:
                written += await loop.run_in_executor(disk, file.write, parts.file_bytes)
                parts.file_bytes = bytearray()
        await loop.run_in_executor(disk, file.write, parts.file_bytes)
    finally:
        await loop.run_in_executor(disk, file.close)
    if not parts.complete:
        raise Invalid("form: it ends too early")
    if not parts.file_seen:
        raise Invalid(f"{file_field}: missing")
    return Upload(target, parts.file_name, parts.fields)


# ---- files that go out


def _open(path: Path) -> tuple[BinaryIO, int]:
    file = path.open("rb")
    return file, path.stat().st_size


class FileBytes(Response):
    """A local file as an attachment, read in the disk executor (Starlette's own uses the default pool)."""

    def __init__(self, path: Path, name: str, disk: Executor, media_type: str = "application/octet-stream") -> None:
        super().__init__(media_type=media_type)
        self._path, self._name, self._disk = path, name, disk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        file, size_bytes = await loop.run_in_executor(self._disk, _open, self._path)
        try:
            self.headers["content-length"] = str(size_bytes)
            self.headers["content-disposition"] = f"attachment; filename={self._name}"
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with asyncio.TaskGroup() as tasks:
                left = tasks.create_task(gone(receive), name="reader gone")
                while block := await loop.run_in_executor(self._disk, file.read, _READ_BYTES):
                    if left.done():  # nobody would notice if the rest were read for nobody
                        return
                    await send({"type": "http.response.body", "body": block, "more_body": True})
                left.cancel()
            await send({"type": "http.response.body", "body": b""})
        finally:
            file.close()


async def gone(receive: Receive) -> None:
    """Returns when the reader has left, or sends a body, which nobody wants, too slowly."""
    with contextlib.suppress(HTTPException):
        while (await receive())["type"] != "http.disconnect":
            pass
