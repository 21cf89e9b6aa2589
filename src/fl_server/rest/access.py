"""The door of the REST API: who calls, by the table in auth.py; and how slowly a body may come.

FEDn's routes keep FEDn's code for a token of another role, 401: its client knows no other.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..auth import EXPIRED, INVALID, NOBODY, Gate, Identity, Role, roles_of_route
from ..errors import FlserveError, Forbidden

IDENTITY = "flserve.identity"  # in a request's scope: whose token it has
ASKED_PATH = "flserve.asked_path"  # in a request's scope: the path with the prefix that it was called by
_OURS = ("/api/v1/events/", "/docs", "/openapi.json")
_EVERY_ROLE = frozenset(Role)
_READS = ("GET", "HEAD")
_DRAIN_BYTES, _DRAIN_S = 1 << 16, 2.0  # of a body that nobody wants: enough for its sender to hear the answer


@dataclass(frozen=True, slots=True)
class Pace:
    """How slowly a body may come: never nothing for idle_s, and on average, idle_s apart, min_bytes_per_s."""

    idle_s: float = 60.0
    min_bytes_per_s: float = 1024.0


class Access:
    def __init__(self, app: ASGIApp, gate: Gate | None, pace: Pace, max_header_bytes: int) -> None:
        """gate: None lets everybody in."""
        self._app, self._gate, self._pace, self._max_header_bytes = app, gate, pace, max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # nothing here speaks anything else, and the table knows of nothing else
        if _header_bytes(scope) > self._max_header_bytes:
            await _refuse(_LargeHeaders(self._max_header_bytes), scope, receive, send)
            return
        identity: Identity | None = None
        if self._gate is None and _is_of_another_site(scope):
            refused = _OtherSite("a page of another site may not do that while authentication is off")
            await _refuse(refused, scope, receive, send)
            return
        if self._gate is not None and not self._gate.is_open(scope.get(ASKED_PATH, scope["path"])):
            try:
                identity = self._admitted(self._gate, scope)
            except FlserveError as why:
                await _refuse(why, scope, receive, send)
                return
        left_s = math.inf
        if self._gate is not None and identity is not None:
            left_s = identity.expires_at - self._gate.verifier.clock()
        await self._app({**scope, IDENTITY: identity}, _paced(receive, self._pace, left_s), send)

    def _admitted(self, gate: Gate, scope: Scope) -> Identity | None:
        headers = [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]
        header = ", ".join(headers)  # two are none
        peer = scope["client"][0] if scope.get("client") else ""
        roles = roles_of_route(scope["method"], scope["path"])
        identity = gate.admit(roles or _EVERY_ROLE, header, peer)
        if roles is NOBODY:
            raise _NoSuchPath(f"no such path: {scope['method']} {scope['path']}")
        return identity


class _NoSuchPath(FlserveError):
    http_status = 404


class _OtherSite(FlserveError):
    http_status = 403


def _is_of_another_site(scope: Scope) -> bool:
    """Whether a browser sends it for a page that is not ours: without tokens, any page could write here."""
    headers = {name: value for name, value in scope["headers"] if name in (b"origin", b"host")}
    origin = headers.get(b"origin")
    return origin is not None and scope["method"] not in _READS and origin.partition(b"://")[2] != headers.get(b"host")


class _LargeHeaders(FlserveError):
    http_status = 431

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"headers: more than http_max_header_bytes ({max_bytes}), the path included")


def _header_bytes(scope: Scope) -> int:
    """As they stand in the request, about."""
    asked = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    return asked + sum(len(name) + len(value) for name, value in scope["headers"])


async def _refuse(refused: FlserveError, scope: Scope, receive: Receive, send: Send) -> None:
    path = str(scope["path"])
    status, message = refused.http_status, str(refused)
    if isinstance(refused, Forbidden) and not (path.startswith(_OURS) or path.endswith("/explain")):
        status, message = 401, INVALID
    headers = {"www-authenticate": "Bearer"} if status == 401 else {}
    if not await _drained(receive):
        headers["connection"] = "close"
    await JSONResponse({"message": message}, status, headers)(scope, receive, send)


async def _drained(receive: Receive) -> bool:
    """Whether the body has come to its end."""
    received_bytes = 0
    try:
        async with asyncio.timeout(_DRAIN_S):
            while received_bytes <= _DRAIN_BYTES:
                message = await receive()
                received_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return True
    except TimeoutError:
        pass
    return False


def _paced(receive: Receive, pace: Pace, left_s: float) -> Receive:
    """left_s: then the caller counts as gone, which ends streams. Raises HTTPException 408, and 401 at left_s."""
    loop = asyncio.get_running_loop()
    valid_until_s = loop.time() + left_s
    waited_s, received_bytes, complete = 0.0, 0, False

    async def paced() -> Message:
        nonlocal waited_s, received_bytes, complete
        begun_s = loop.time()
        earned_s = received_bytes / pace.min_bytes_per_s - waited_s
        slow_at_s = math.inf if complete else begun_s + pace.idle_s + min(0.0, earned_s)
        until_s = min(slow_at_s, valid_until_s)
        try:
            async with asyncio.timeout_at(until_s if until_s < math.inf else None):
                message = await receive()
        except TimeoutError:
            if until_s == valid_until_s:
                if complete:
                    return {"type": "http.disconnect"}
                raise HTTPException(401, EXPIRED, {"www-authenticate": "Bearer", "connection": "close"}) from None
            raise HTTPException(408, "body: it comes too slowly", {"connection": "close"}) from None
        waited_s += loop.time() - begun_s
        received_bytes += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        return message

    return paced
