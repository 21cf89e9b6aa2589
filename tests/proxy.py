"""A TCP proxy that loses what a test names: a request before its server hears it, or the answer after.

It may end TLS, as in front of a server that has none. Tunnel is an HTTP proxy for what a client wants to dial by name.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal, TypeVar
from urllib.parse import urlsplit

Lost = Literal["request", "answer", "rest", "wait"]


class Proxy:
    def __init__(self, url: str, tls: ssl.SSLContext | None = None) -> None:
        """url: of the server behind it, with its port. tls: what it shows to callers; the server gets plaintext."""
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self._behind = (parts.hostname, parts.port)
        self._scheme, self._tls = parts.scheme, tls
        self._server: asyncio.Server
        self._port = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None] | None] = set()
        self._pattern, self._lost = b"", "request"
        self.times = 0  # how often it is still to happen
        self._answer = b""

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._port}"

    def lose(self, lost: Lost, pattern: bytes, times: int = 1) -> None:
        """The connection is cut at the next request that holds the pattern: it does not arrive, or its answer, or the
        rest of this after its first piece. "wait": the request does not arrive, but nothing is cut."""
        self._pattern, self._lost, self.times = pattern, lost, times

    def answer(self, data: bytes) -> None:
        """Said to every request instead of asking the server, until it is empty."""
        self._answer = data

    async def up(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, ssl=self._tls)
        self._port = self._server.sockets[0].getsockname()[1]

    async def down(self) -> None:
        """As if the server had died: connections are cut, new ones refused."""
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        await asyncio.gather(*filter(None, self._serving))
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._serving.add(asyncio.current_task())
        try:
            await self._relay(reader, writer)
        finally:
            self._serving.discard(asyncio.current_task())

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            behind_reader, behind_writer = await asyncio.open_connection(*self._behind)
        except OSError:
            self._open.discard(writer)
            writer.transport.abort()
            return
        self._open.add(behind_writer)
        doomed = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._requests(reader, behind_writer, doomed, writer))
                tasks.create_task(self._answers(behind_reader, writer, doomed))
        except* (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            for end in (writer, behind_writer):
                self._open.discard(end)
                end.transport.abort()

    async def _requests(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        doomed: asyncio.Event,
        back: asyncio.StreamWriter,
    ) -> None:
        while data := await reader.read(2**20):
            if self._answer:
                back.write(self._answer)
                continue
            if self.times and self._pattern in data:
                self.times -= 1
                match self._lost:
                    case "request":
                        raise ConnectionResetError
                    case "wait":
                        continue
                doomed.set()
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, doomed: asyncio.Event) -> None:
        while data := await reader.read(2**16):
            if doomed.is_set() and self._lost == "answer":
                raise ConnectionResetError
            writer.write(data)
            if doomed.is_set():
                await writer.drain()
                writer.write_eof()
                raise ConnectionResetError
            await writer.drain()
        raise ConnectionResetError


P = TypeVar("P", bound=Proxy)


class Tunnel(Proxy):
    """Grants each CONNECT (RFC 9110, 9.3.6), and leads to its one server whatever name was asked for."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked: set[str] = set()  # "name:port"

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return
        self.asked.add(head.split()[1].decode())
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await super()._relay(reader, writer)


@asynccontextmanager
async def proxied(url: str, tls: ssl.SSLContext | None = None) -> AsyncIterator[Proxy]:
    async with _running(Proxy(url, tls)) as proxy:
        yield proxy


@asynccontextmanager
async def tunnelled(url: str) -> AsyncIterator[Tunnel]:
    async with _running(Tunnel(url)) as tunnel:
        yield tunnel


@asynccontextmanager
async def _running(proxy: P) -> AsyncIterator[P]:
    await proxy.up()
    try:
        yield proxy
    finally:
        await proxy.down()
