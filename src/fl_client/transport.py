"""What goes over the network: joining and compute packages (REST), the task stream, models and reports (gRPC).

The only file that knows httpx and grpc: their errors become ours here, and nothing is tried twice here.

  ClientError     the end of this client: it is wrongly set up, or
    TokenRefused    not let in with the token that it has now
    Replaced        another process with its id took over
  Unreachable     it may work later, and may have happened: do it again
  CallRefused     this call will never work, others may
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import grpc
import httpx

from fl_client.tokens import Tokens, renewed
from fl_client.wire import fl_pb2 as pb
from fl_client.wire import fl_pb2_grpc
from fl_client.wire.chunks import split

_ASK_TIMEOUT_S = 10.0
_NO_PROXY = {f"all://{here}": None for here in ("localhost", "127.0.0.1", "[::1]")}  # to this machine

_stubs: Any = fl_pb2_grpc  # generated without types; each method below says what goes in and out


class ClientError(Exception):
    pass


class TokenRefused(ClientError):
    pass


class Replaced(ClientError):
    pass


class Unreachable(Exception):
    pass


class CallRefused(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM; they are read at each use, so that new ones count without a restart."""

    ca: Path | None = None  # whom to believe; None: whom this machine does
    certificate: Path | None = None  # of this client, where the server wants one
    key: Path | None = None

    def context(self, *, of_issuer: bool = False) -> ssl.SSLContext:
        """of_issuer: whom this machine believes counts, too: tokens may come from elsewhere. Raises ClientError."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if of_issuer and self.ca:
                context.load_default_certs()
            if self.certificate:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as exc:
            raise ClientError(f"TLS: {self._names()}: {exc.strerror or exc}") from exc
        return context

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises ClientError."""
        try:
            ca, key, certificate = (
                path.read_bytes() if path else None
                for path in (self.ca, self.key or self.certificate, self.certificate)
            )
        except OSError as exc:
            raise ClientError(f"TLS: {exc.filename}: {exc.strerror}") from exc
        return grpc.ssl_channel_credentials(ca, key, certificate)

    def _names(self) -> str:
        return ", ".join(str(path) for path in (self.ca, self.certificate, self.key) if path)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where the combiner is."""

    host: str
    port: int
    tls: bool

    @classmethod
    def parse(cls, address: str) -> Assignment:
        """From "host:port"; port 443 means TLS, as in FEDn. Raises ClientError."""
        host, colon, port = address.rpartition(":")
        if not (host and colon and port.isascii() and port.isdigit() and int(port) < 65536):
            raise ClientError(f"combiner: {address!r} is not host:port")
        return cls(host.strip("[]"), int(port), tls=port == "443")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class RestApi:
    """The few requests of a client. Each is sent once; Unreachable: worth to ask again, ClientError: not."""

    def __init__(self, api_url: str, tokens: Tokens, tls: Tls | None = None) -> None:
        self._api_url, self._tokens, self._tls = api_url.rstrip("/"), tokens, tls or Tls()

    async def assignment(self, body: Mapping[str, str]) -> Assignment:
        """POST clients/add."""
        async with self._request("POST", "/api/v1/clients/add", json=body) as reply:
            await reply.aread()
            url, message = shown(reply.url), _message(reply)
            if reply.status_code == 203:
                raise Unreachable(f"{url} says to wait: {message}")
            _expect_200(reply)
            match _json(reply):
                case {"fqdn": str(fqdn)} if fqdn:
                    return Assignment(fqdn, 443, tls=True)
                case {"host": str(host), "port": int(port), **more} if host:
                    return Assignment(host, port, tls=more.get("tls") is True or port == 443)
        raise ClientError(f"{url} assigned no combiner: {message}")

    async def package_checksum(self) -> str:
        """The sha256 of the active compute package, in hex."""
        async with self._request("GET", "/api/v1/packages/checksum") as reply:
            await reply.aread()
            _expect_package(reply)
            match _json(reply):
                case {"checksum": str(checksum)} if len(checksum) == 64:
                    return checksum.lower()
            raise ClientError(f"{shown(reply.url)} answered no checksum: {_message(reply)}")

    async def package(self, to: BinaryIO, *, max_bytes: int) -> str:
        """Writes the active compute package; its sha256, in hex."""
        digest, size_bytes = hashlib.sha256(), 0
        async with self._request("GET", "/api/v1/packages/download") as reply:
            if reply.status_code != 200:
                await reply.aread()
            _expect_package(reply)
            async for block in reply.aiter_bytes():
                size_bytes += len(block)
                if size_bytes > max_bytes:
                    raise ClientError(f"{shown(reply.url)} sends more than {max_bytes} bytes")
                digest.update(block)
                to.write(block)
        return digest.hexdigest()

    @asynccontextmanager
    async def _request(self, method: str, path: str, **content: Any) -> AsyncIterator[httpx.Response]:
        authorization = self._tokens.authorization
        headers = {"Authorization": authorization} if authorization else {}
        async with _reply(method, self._api_url + path, self._tls.context(), headers=headers, **content) as reply:
            yield reply


@asynccontextmanager
async def _reply(
    method: str, url: str, verify: ssl.SSLContext, what: str = "api_url", **content: Any
) -> AsyncIterator[httpx.Response]:
    """verify: over http, too: it may send us on to https."""
    try:
        async with (
            httpx.AsyncClient(timeout=_ASK_TIMEOUT_S, follow_redirects=True, mounts=_NO_PROXY, verify=verify) as http,
            http.stream(method, url, **content) as reply,
        ):
            yield reply
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as exc:
        raise ClientError(f"{what}: {shown(url)!r}: {exc}") from exc
    except httpx.HTTPError as exc:
        if isinstance(exc, httpx.RemoteProtocolError) and "illegal" in str(exc):  # gRPC's port, say
            raise ClientError(f"{shown(url)} is no REST API: what answers there speaks no HTTP/1.1") from exc
        raise Unreachable(f"{shown(url)} does not answer ({type(exc).__name__}: {exc})") from exc


def shown(url: object) -> str:
    """Without what may be a secret: user and password, and the query."""
    return re.sub(r"//[^/?#]*@", "//", str(url)).partition("?")[0]


async def renew(tokens: Tokens, tls: Tls) -> None:
    """A new access token, as FEDn's clients get it: POST {"refresh": …} answers {"access": …}.

    ClientError: the issuer refuses. Whatever else it answers, it may answer better later: Unreachable.
    """
    verify, body = tls.context(of_issuer=True), {"refresh": tokens.refresh}
    async with _reply("POST", tokens.refresh_uri, verify, "auth_refresh_token_uri", json=body) as reply:
        await reply.aread()
        if reply.status_code in (400, 401, 403):
            said = _message(reply).replace(tokens.refresh, "…")
            raise ClientError(f"{shown(reply.url)} answered {reply.status_code}: {said}")
        if reply.status_code not in (200, 201):
            raise Unreachable(f"{shown(reply.url)} answered {reply.status_code}, and no access token")
        try:
            tokens.take(*renewed(_json(reply)))
        except ValueError as exc:
            raise Unreachable(f"{shown(reply.url)}: {exc}") from None


def _expect_200(reply: httpx.Response) -> None:
    text = f"{shown(reply.url)} answered {reply.status_code}: {_message(reply)}"
    if reply.status_code in (500, 502, 503, 504, 408, 429):
        raise Unreachable(text)
    if reply.status_code == 401:
        raise TokenRefused(text)
    if reply.status_code != 200:
        raise ClientError(text)


def _expect_package(reply: httpx.Response) -> None:
    if reply.status_code == 404 and isinstance(body := _json(reply), dict) and "message" in body:
        raise Unreachable(f"{shown(reply.url)} has no compute package yet: {body['message']}")
    if reply.status_code != 200:
        _expect_200(reply)


def _message(reply: httpx.Response) -> str:
    match _json(reply):
        case {"message": str(message)}:
            return message
        case {"detail": str(detail)}:
            return detail
    return " ".join(reply.text.split())[:200] or reply.reason_phrase


def _json(reply: httpx.Response) -> object:
    """None if it is none."""
    try:
        body: object = reply.json()
    except ValueError:
        return None
    return body


# Our server leaves only UNAVAILABLE and the two of authentication; the others come from proxies and from FEDn's.
_AGAIN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)


@contextmanager
def _our_errors(call: str) -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as exc:
        text = f"{call}: {exc.code().name}: {exc.details()}"
        if exc.code() is grpc.StatusCode.UNAUTHENTICATED:
            raise TokenRefused(text) from exc
        if exc.code() is grpc.StatusCode.PERMISSION_DENIED:
            raise ClientError(text) from exc
        if exc.code() in _AGAIN:
            raise Unreachable(text) from exc
        raise CallRefused(text) from exc
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Unreachable(f"{call}: the channel was closed") from None  # grpc says so by a CancelledError, too


class TaskStream:
    """An attachment to the combiner. It ends by Unreachable or ClientError, never quietly."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def attached(self) -> bool:
        """Whether the server took us: it answers at once, or with the first task where it sends no metadata before."""
        with _our_errors("TaskStream"):
            await self._call.initial_metadata()
            return not self._call.done()

    async def task(self) -> pb.TaskRequest:
        try:
            with _our_errors("TaskStream"):
                request = await self._read()
        except CallRefused as exc:
            raise Unreachable(str(exc)) from exc
        if isinstance(request, pb.TaskRequest):
            return request
        raise Unreachable("TaskStream: the server ended it")

    async def _read(self) -> object:
        try:
            message: object = await self._call.read()
        except grpc.aio.AioRpcError as exc:
            if exc.code() is grpc.StatusCode.ABORTED and "attached again" in (exc.details() or ""):
                raise Replaced(f"another process with this client id took over: {exc.details()}") from exc
            raise
        return message

    def close(self) -> None:
        self._call.cancel()


class Link:
    """A channel to one combiner; it connects by itself, again and again. Closing it ends all calls as Unreachable.

    Transfers have no deadline: a combiner may take its time to admit one, and a dead peer is found by the pings.
    """

    def __init__(
        self, at: Assignment, client_id: str, tokens: Tokens, *, tls: Tls, base_s: float, cap_s: float
    ) -> None:
        self.at, self._tokens = at, tokens
        options = [
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),  # an idle task stream has no data, and must notice a dead peer
            ("grpc.use_local_subchannel_pool", 1),  # clients of one process do not share a connection
            ("grpc.initial_reconnect_backoff_ms", int(base_s * 1000)),
            ("grpc.max_reconnect_backoff_ms", int(cap_s * 1000)),
        ]
        if at.tls:
            self._channel = grpc.aio.secure_channel(str(at), tls.credentials(), options)
        else:
            self._channel = grpc.aio.insecure_channel(str(at), options)
        self._said = (("client", client_id), ("grpc-server", at.host))
        self._combiner = _stubs.CombinerStub(self._channel)
        self._connector = _stubs.ConnectorStub(self._channel)
        self._models = _stubs.ModelServiceStub(self._channel)

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        authorization = self._tokens.authorization
        return (*self._said, ("authorization", authorization)) if authorization else self._said

    async def close(self) -> None:
        await self._channel.close(None)

    def attach(self, sender: pb.Client) -> TaskStream:
        return TaskStream(self._combiner.TaskStream(pb.ClientAvailableMessage(sender=sender), metadata=self._metadata))

    async def download(self, model_id: str, sender: pb.Client, *, max_bytes: int) -> bytearray | None:
        """The model's bytes; None if there is no such model. Raises CallRefused above max_bytes."""
        data = bytearray()
        complete = False
        with _our_errors("Download"):
            call = self._models.Download(pb.ModelRequest(id=model_id, sender=sender), metadata=self._metadata)
            try:
                async for response in call:
                    match response.status:
                        case pb.ModelStatus.IN_PROGRESS:
                            data += response.data
                            if len(data) > max_bytes:
                                raise CallRefused(f"Download: model {model_id} is larger than {max_bytes} bytes")
                        case pb.ModelStatus.OK:
                            complete = True
                        case pb.ModelStatus.FAILED:
                            return None
            finally:
                call.cancel()
        if complete:
            return data
        raise Unreachable(f"Download: model {model_id} ended without its last message")

    async def upload(self, update_id: str, data: bytes) -> None:
        """Returns when the server has said that it is durable. Raises CallRefused with the server's reason."""

        async def requests() -> AsyncIterator[pb.ModelRequest]:
            for chunk in split(memoryview(data)):
                yield pb.ModelRequest(id=update_id, data=bytes(chunk), status=pb.ModelStatus.IN_PROGRESS)
            yield pb.ModelRequest(id=update_id, status=pb.ModelStatus.OK)

        with _our_errors("Upload"):
            response = await self._models.Upload(requests(), metadata=self._metadata)
        if response.status != pb.ModelStatus.OK:
            raise CallRefused(f"Upload: {response.message}")

    async def send_update(self, update: pb.ModelUpdate, timeout_s: float) -> pb.Response:
        with _our_errors("SendModelUpdate"):
            return _response(await self._combiner.SendModelUpdate(update, metadata=self._metadata, timeout=timeout_s))

    async def send_validation(self, validation: pb.ModelValidation, timeout_s: float) -> pb.Response:
        with _our_errors("SendModelValidation"):
            return _response(
                await self._combiner.SendModelValidation(validation, metadata=self._metadata, timeout=timeout_s)
            )

    async def send_prediction(self, prediction: pb.ModelPrediction, timeout_s: float) -> pb.Response:
        with _our_errors("SendModelPrediction"):
            return _response(
                await self._combiner.SendModelPrediction(prediction, metadata=self._metadata, timeout=timeout_s)
            )

    async def send_status(self, status: pb.Status, timeout_s: float) -> pb.Response:
        with _our_errors("SendStatus"):
            return _response(await self._connector.SendStatus(status, metadata=self._metadata, timeout=timeout_s))


def _response(message: Any) -> pb.Response:
    assert isinstance(message, pb.Response)
    return message
