"""What clients say of themselves, attributes and telemetry, when it comes over REST; and what holds of it now."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from ..errors import NotFound
from ..scheduler.scheduler import Scheduler
from ..store.ports import Collection, Condition, Document, Query
from .bodies import BoundedRoute
from .records import answered
from .schemas import (
    ATTRIBUTES,
    TELEMETRY,
    AddAttribute,
    AddTelemetry,
    AttributeObject,
    ChosenClients,
    CurrentAttributes,
    Entity,
    JsonObject,
    TelemetryObject,
)


def routes(scheduler: Scheduler) -> APIRouter:
    router = APIRouter(prefix="/api/v1", route_class=BoundedRoute)

    async def add(entity: Entity, body: AddAttribute | AddTelemetry) -> Response:
        at = scheduler.clock()
        document: Document = {
            entity.id_field: str(uuid.uuid4()),
            **body.model_dump(exclude={"timestamp"}),
            "timestamp": body.timestamp or datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z"),
            "committed_at": at,
            "updated_at": at,
            "fl": {"client": body.sender.client_id or body.sender.name},
        }
        await answered(scheduler.add_record(entity.collection, document))
        return JSONResponse(entity.answer(document), 201)

    @router.post(
        "/attributes/",
        response_model=AttributeObject,
        status_code=201,
        operation_id="add_attribute",
        tags=["attributes"],
    )
    async def add_attribute(body: AddAttribute) -> Response:
        return await add(ATTRIBUTES, body)

    @router.post(
        "/telemetry/",
        response_model=TelemetryObject,
        status_code=201,
        operation_id="add_telemetry",
        tags=["telemetry"],
    )
    async def add_telemetry(body: AddTelemetry) -> Response:
        return await add(TELEMETRY, body)

    @router.post(
        "/attributes/current",
        response_model=CurrentAttributes,
        operation_id="get_current_attributes",
        tags=["attributes"],
    )
    async def current(body: ChosenClients) -> Response:
        """Of each client the latest value of each key; a sentence for a client that is not known."""
        latest = await _latest(scheduler, body.client_ids)
        return JSONResponse(
            {id: latest.get(id, f"Entity with client_id: {id} not found") for id in dict.fromkeys(body.client_ids)}
        )

    @router.get(
        "/clients/{id}/attributes",
        response_model=dict[str, str],
        operation_id="get_client_attributes",
        tags=["clients"],
    )
    async def of_client(id: str) -> Response:
        """The latest value of each key."""
        latest = await _latest(scheduler, [id])
        if id not in latest:
            raise NotFound(f"Entity with id: {id} not found")
        return JSONResponse(latest[id])

    return router


async def _latest(scheduler: Scheduler, client_ids: Sequence[str]) -> dict[str, JsonObject]:
    """By client, of those that are known."""
    store, ids = scheduler.store, tuple(client_ids)
    known = await store.find(Collection.CLIENTS, Query((Condition("client_id", "in", ids),)))
    latest: dict[str, JsonObject] = {client["client_id"]: {} for client in known}
    oldest_first = Query((Condition("sender.client_id", "in", tuple(latest)),), (("committed_at", False),))
    for attribute in await store.find(Collection.ATTRIBUTES, oldest_first):
        latest[attribute["sender"]["client_id"]][attribute["key"]] = attribute["value"]
    return latest
