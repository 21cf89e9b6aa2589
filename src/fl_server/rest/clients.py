"""Joining, and what else concerns clients. POST clients/add never answers 5xx: any such code ends a FEDn client."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from ..auth import INVALID, Identity
from ..core.model import ClientId
from ..errors import Invalid, NotFound, Unauthorized, Unavailable
from ..scheduler.packages import Packages
from ..scheduler.scheduler import Scheduler
from ..store.ports import Collection, Condition
from .access import IDENTITY
from .bodies import BoundedRoute
from .records import answered
from .schemas import AddClient, Assignment, ClientConfig, Failure, Message

NETWORK_ID = "flserve"
ADD_S = 5.0  # a FEDn client gives up after 10
RETRY_STATUS = 203  # FEDn's clients come again 3 s after it

Join = Callable[[AddClient, Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Advertised:
    """Where clients reach the combiner."""

    host: str  # empty: the one by which they called
    port: int
    tls: bool = False
    fqdn: str = ""  # with one, FEDn's clients dial fqdn:443 over TLS, and send their token there


def joining(scheduler: Scheduler, packages: Packages, advertise: Callable[[], Advertised]) -> Join:
    async def join(body: AddClient, request: Request) -> Response:
        identity: Identity | None = request.scope.get(IDENTITY)
        own_id = identity.client_id if identity else None
        if own_id and body.client_id and body.client_id != own_id:
            raise Unauthorized(f"{INVALID}: it is not of client {body.client_id[:100]}")
        try:
            if reason := scheduler.unready():
                return _retry(reason)
            package = await packages.active()
            if body.package == "remote" and package is None:
                return _retry("No compute package found. Set package in controller.")
            preferred = body.combiner_preferred or body.preferred_combiner or None
            if preferred and not await scheduler.store.count(
                Collection.COMBINERS, (Condition("name", "eq", preferred),)
            ):
                raise Invalid(f"combiner_preferred: Combiner {preferred} not found or unavailable.")
            client_id = own_id or body.client_id or str(uuid.uuid4())
            ip = request.client.host if request.client else ""
            added = scheduler.add_client(
                ClientId(client_id), name=body.name, ip=ip, package=body.package, preferred=preferred
            )
            await answered(added, ADD_S)
        except Unavailable as exc:
            return _retry(str(exc))
        at = advertise()
        return JSONResponse(
            {
                "status": "assigned",
                "host": at.host or request.url.hostname,
                "fqdn": at.fqdn or None,
                "package": body.package,
                "ip": ip,
                "port": at.port,
                "tls": at.tls,
                "helper_type": package["helper"] if package and body.package == "remote" else "",
                "client_id": client_id,
            }
        )

    return join


def routes(scheduler: Scheduler, packages: Packages, join: Join) -> APIRouter:
    router = APIRouter(prefix="/api/v1/clients", tags=["clients"], route_class=BoundedRoute)

    @router.post(
        "/add",
        response_model=Assignment,
        operation_id="add_client",
        responses={RETRY_STATUS: {"model": Failure, "description": "not now: ask again in a few seconds"}},
    )
    async def add(body: AddClient, request: Request) -> Response:
        return await join(body, request)

    @router.get(
        "/config", response_model=ClientConfig, response_model_exclude_none=True, operation_id="get_client_config"
    )
    async def config(request: Request, checksum: bool = True) -> Response:
        """How a client finds this server: the address by which the caller did. And the active package's checksum."""
        url = request.url
        port = url.port or (443 if url.scheme == "https" else 80)
        answer = {"network_id": NETWORK_ID, "discover_host": url.hostname, "discover_port": port}
        if checksum and (package := await packages.active()):
            answer["checksum"] = package["fl"]["sha256"]
        return JSONResponse(answer)

    @router.delete("/{id}", response_model=Message, operation_id="delete_client")
    async def delete(id: str) -> Response:
        """Forgets what is recorded of it; a client that is attached stays so, and is noted again."""
        if not await answered(scheduler.remove_client(id)):
            raise NotFound(f"Entity with id: {id} not found")
        return JSONResponse({"message": "Client deleted"})

    return router


def _retry(reason: str) -> Response:
    return JSONResponse({"success": False, "status": "retry", "message": reason}, RETRY_STATUS)
