"""The REST API: the routes put together, one place for errors, and what FEDn's clients expect of paths.

Thin: parse, submit, answer. It decides nothing and writes nothing itself.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..auth import Gate
from ..core.model import InvalidConfig
from ..errors import FlserveError, Invalid
from ..scheduler.packages import Packages
from ..scheduler.scheduler import Scheduler
from . import clients, combiners, feed, legacy, models, packages, predictions, records, reports, sessions
from .access import ASKED_PATH, Access, Pace
from .bodies import BoundedRoute, Desk, Limits
from .schemas import ControllerStatus, Failure, Readiness, problem

logger = logging.getLogger(__name__)

MAX_MESSAGE = 1000  # characters of an error

_FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Failure, "description": "the request is wrong, or not possible now"},
    "5XX": {"model": Failure, "description": "503: the store is away, ask again; 500: a fault of the server"},
}


def create_app(
    scheduler: Scheduler,
    kept: Packages,
    desk: Desk,
    *,
    advertise: Callable[[], clients.Advertised],
    gate: Gate | None = None,
    url_prefix: str = "",
    pace: Pace = Pace(),  # noqa: B008  it is frozen
    limits: Limits = Limits(),  # noqa: B008
) -> FastAPI:
    """advertise: where clients reach the combiner. gate: None lets everybody in. url_prefix: "" or "/internal"."""
    app = FastAPI(
        title="flserve",
        description="The REST API of FEDn 0.33, and what flserve adds to it. When authentication is on, "
        "each call needs a header `Authorization: Bearer <token>`, but for /health and /ready.",
        version=version("flserve"),
        redirect_slashes=False,
        redoc_url=None,
        responses=_FAILURES,
    )
    app.state.limits = limits
    # before the entities' own: /models/active is no model's id
    join = clients.joining(scheduler, kept, advertise)
    app.include_router(clients.routes(scheduler, kept, join))
    app.include_router(combiners.routes(scheduler))
    app.include_router(models.routes(scheduler, kept, desk))
    app.include_router(models.helper_routes(kept))
    app.include_router(packages.routes(kept, desk))
    app.include_router(sessions.routes(scheduler))
    app.include_router(predictions.routes(scheduler))
    app.include_router(reports.routes(scheduler))
    app.include_router(feed.routes(scheduler.feed))
    for router in records.every_entity(scheduler, desk.disk):
        app.include_router(router)
    app.include_router(legacy.routes(join))
    app.include_router(_standing(scheduler))
    app.add_exception_handler(FlserveError, _answer_ours)
    app.add_exception_handler(InvalidConfig, _answer_invalid_config)
    app.add_exception_handler(RequestValidationError, _answer_invalid_request)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_middleware(Access, gate=gate, pace=pace, max_header_bytes=limits.http_max_header_bytes)
    app.add_middleware(FednPaths, url_prefix=url_prefix)
    app.add_middleware(Incidents)  # the last is the outermost
    return app


def _standing(scheduler: Scheduler) -> APIRouter:
    router = APIRouter(tags=["server"], route_class=BoundedRoute)

    @router.head("/health", include_in_schema=False)
    @router.get(
        "/health",
        response_class=Response,
        operation_id="health",
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def health() -> Response:
        """The process is alive."""
        return PlainTextResponse("OK")

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", response_model=Readiness, operation_id="ready", responses={503: {"model": Readiness}})
    async def ready() -> Response:
        """Whether it can take work, and if not, why."""
        if reason := scheduler.unready():
            return JSONResponse({"ready": False, "reason": reason}, 503)
        return JSONResponse({"ready": True, "reason": None})

    @router.get("/get_controller_status", response_model=ControllerStatus, operation_id="get_controller_status")
    async def controller_status() -> Response:
        return JSONResponse({"state": "monitoring" if scheduler.any_running() else "idle"})

    return router


# ---- errors


async def _answer_ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, FlserveError)
    # FEDn has no 422
    status = 400 if isinstance(error, Invalid) else error.http_status
    if status == 500:
        raise error
    return _answer(str(error), status)


async def _answer_invalid_config(request: Request, error: Exception) -> Response:
    return _answer(str(error), 400)


async def _answer_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _answer(problem(error.errors()), 400)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: f"no such path: {request.url.path}", 405: f"{request.method} is not allowed here"}
    message = said.get(error.status_code, error.detail)
    return _answer(message, error.status_code, error.headers)


def _answer(message: str, status: int, headers: Mapping[str, str] | None = None) -> Response:
    """Messages tell what was sent, which may be a key of a megabyte."""
    shown = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}…"
    return JSONResponse({"message": shown}, status, headers=headers)


class Incidents:
    """An error that nobody expected: logged once, answered with the id under which it was."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answering = False

        async def note_and_send(message: Message) -> None:
            nonlocal answering
            answering = True
            await send(message)

        try:
            await self._app(scope, receive, note_and_send)
        except ClientDisconnect:
            return  # it left before it had said all: nobody waits for an answer
        except Exception:
            incident = uuid.uuid4().hex
            where = {"method": scope["method"], "path": scope["path"]}
            logger.exception("request failed", extra={"incident": incident, **where})
            if not answering:  # else the server closes the connection: the answer is cut off, and seen to be
                answer = {"message": "An unexpected error occurred", "incident": incident}
                await JSONResponse(answer, 500)(scope, receive, send)


# ---- paths

_COLLECTION = re.compile(r"/api/v1/[^/]+")


class FednPaths:
    """Every path in one spelling: single slashes, one at the end of a collection, none at the end of others.

    FEDn's clients and CLI write them in all ways; a redirect would cost a round trip, and some do not follow it.
    With a prefix, every path works with and without it.
    """

    def __init__(self, app: ASGIApp, url_prefix: str) -> None:
        self._app, self._prefix = app, url_prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            asked = path = re.sub(r"/{2,}", "/", scope["path"]).rstrip("/") or "/"
            if self._prefix and path.startswith(f"{self._prefix}/"):
                path = path.removeprefix(self._prefix)
            path = f"{path}/" if _COLLECTION.fullmatch(path) else path
            scope = {**scope, "path": path, ASKED_PATH: asked}
        await self._app(scope, receive, send)
