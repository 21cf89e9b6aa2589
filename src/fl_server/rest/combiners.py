"""Combiners: this process runs the one there is."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from ..errors import NotFound
from ..scheduler.scheduler import Scheduler
from ..store.ports import Collection, Condition, Query
from .bodies import BoundedRoute
from .queries import Filters
from .records import answered
from .schemas import ClientsPerCombiner, Message


def routes(scheduler: Scheduler) -> APIRouter:
    router = APIRouter(prefix="/api/v1/combiners", tags=["combiners"], route_class=BoundedRoute)

    @router.post(
        "/clients/count",
        response_model=ClientsPerCombiner,
        operation_id="count_clients_of_combiners",
    )
    async def clients_count(filters: Filters) -> Response:
        """Body: `combiners`, a comma separated list of names; absent: all. Counts the clients that are online."""
        named = [name.strip() for name in str(filters.get("combiners") or "").split(",") if name.strip()]
        combiners = await scheduler.store.find(Collection.COMBINERS, Query())
        counts = []
        for name in named or [combiner["name"] for combiner in combiners]:
            where = (Condition("combiner", "eq", name), Condition("status", "eq", "online"))
            counts.append({"id": name, "count": await scheduler.store.count(Collection.CLIENTS, where)})
        return JSONResponse({"result": counts})

    @router.delete("/{id}", response_model=Message, operation_id="delete_combiner")
    async def delete(id: str) -> Response:
        """Forgets one that runs no more."""
        if not await answered(scheduler.remove_combiner(id)):
            raise NotFound(f"Entity with id: {id} not found")
        return JSONResponse({"message": "Combiner deleted"})

    return router
