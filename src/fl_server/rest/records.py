"""The routes that all of FEDn's entities share: list, query, count, get. They read documents and change nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from concurrent.futures import Executor
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from ..errors import Invalid, NotFound, Unavailable
from ..scheduler.scheduler import Scheduler
from ..store.ports import Condition, Document, Query
from .bodies import BoundedRoute
from .queries import Filters, Pages, Paging, conditions_of_body, conditions_of_query
from .schemas import ENTITIES, Entity, JsonObject, Page

_FILTERS = (
    "Every query parameter is a filter on the field of that name: equal, or with a suffix __ne, __gt, __gte, __lt, "
    "__lte. Dotted names reach inside (sender.name). `null` matches what is absent."
)
_QUERY = "As the list, with the filters in the body."
_COUNT_BY = "How many match the filters in the body."
_BODY_FILTERS = {
    "requestBody": {
        "required": False,
        "description": "filters by field name (suffixes as in the query); commas or a list give alternatives",
        "content": {
            "application/json": {"schema": {"type": "object", "additionalProperties": True}},
            "application/x-www-form-urlencoded": {"schema": {"type": "object", "additionalProperties": True}},
        },
    }
}


ANSWER_S = 30.0  # the scheduler waits for a store that is away, whoever asked over HTTP does not

T = TypeVar("T")


async def answered(work: Awaitable[T], within_s: float = ANSWER_S) -> T:
    """Raises Unavailable when the scheduler has no answer by then; what was asked may still happen."""
    try:
        async with asyncio.timeout(within_s):
            return await work
    except TimeoutError as exc:
        raise Unavailable(f"no answer within {within_s:.0f} s, the store may be away; it may have happened") from exc


async def found(scheduler: Scheduler, entity: Entity, id: str) -> Document:
    """Raises NotFound, in FEDn's words."""
    document = await scheduler.store.get(entity.collection, id)
    if document is None and entity.shared_id:
        where = (*entity.where, Condition(entity.shared_id, "eq", id))
        newest = Query(where, sort=(("committed_at", True),), limit=1)
        document = next(iter(await scheduler.store.find(entity.collection, newest)), None)
    if document is None:
        raise NotFound(f"Entity with id: {id} not found")
    return document


def changes(entity: Entity, document: Document, body: JsonObject, *, allowed: set[str], lenient: bool) -> JsonObject:
    """What the body would change. Keys may come along with their present values.

    lenient: as FEDn's PATCH, unknown keys and ids are passed over. Raises Invalid, naming the key.
    """
    present = entity.answer(document)
    changed: JsonObject = {}
    for key, value in body.items():
        if key not in present:
            if not lenient:
                raise Invalid(f"Invalid object: unknown key {key!r}")
        elif value != present[key] and not (lenient and key.endswith("_id")):
            if key not in allowed:
                raise Invalid(f"{key}: cannot be changed")
            changed[key] = value
    return changed


def routes(scheduler: Scheduler, entity: Entity, disk: Executor) -> APIRouter:
    """disk: writes a page's text too, which may take a quarter of a second."""
    router = APIRouter(prefix=f"/api/v1/{entity.noun}", tags=[entity.noun], route_class=BoundedRoute)
    shape: Any = entity.shape  # a value, not a type, to mypy
    page: Any = Page[shape]

    async def counted(where: tuple[Condition, ...]) -> Response:
        return JSONResponse(await scheduler.store.count(entity.collection, (*entity.where, *where)))

    async def listed(where: tuple[Condition, ...], paging: Paging) -> Response:
        where = (*entity.where, *where)
        query = paging.query(entity, where)
        count = await scheduler.store.count(entity.collection, where)
        documents = await scheduler.store.find(entity.collection, query)
        text = await asyncio.get_running_loop().run_in_executor(disk, _page_text, entity, count, documents)
        return Response(text, media_type="application/json")

    @router.get("/", response_model=page, operation_id=f"list_{entity.noun}", description=_FILTERS)
    async def list_all(request: Request, paging: Pages) -> Response:
        return await listed(conditions_of_query(entity, request.query_params.multi_items()), paging)

    @router.post(
        "/list",
        response_model=page,
        operation_id=f"query_{entity.noun}",
        openapi_extra=_BODY_FILTERS,
        description=_QUERY,
    )
    async def query(filters: Filters, paging: Pages) -> Response:
        return await listed(conditions_of_body(entity, filters), paging)

    @router.get("/count", response_model=int, operation_id=f"count_{entity.noun}", description=_FILTERS)
    async def count(request: Request) -> Response:
        return await counted(conditions_of_query(entity, request.query_params.multi_items()))

    @router.post(
        "/count",
        response_model=int,
        operation_id=f"count_{entity.noun}_by",
        openapi_extra=_BODY_FILTERS,
        description=_COUNT_BY,
    )
    async def count_by(filters: Filters) -> Response:
        return await counted(conditions_of_body(entity, filters))

    @router.get("/{id}", response_model=shape, operation_id=f"get_{entity.singular}_by_id")
    async def get(id: str) -> Response:
        return JSONResponse(entity.answer(await found(scheduler, entity, id)))

    return router


def every_entity(scheduler: Scheduler, disk: Executor) -> list[APIRouter]:
    return [routes(scheduler, entity, disk) for entity in ENTITIES]


def _page_text(entity: Entity, count: int, documents: list[Document]) -> bytes:
    # FEDn's CLI takes the two values by position
    return bytes(JSONResponse({"count": count, "result": [entity.answer(document) for document in documents]}).body)
