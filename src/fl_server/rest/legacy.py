"""FEDn's older routes: one that its guide still names works, the others say what to use instead.

Left out of the OpenAPI document: nobody is to write a client for them.
"""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from .bodies import BoundedRoute
from .clients import Join
from .schemas import AddClient

_API = "/api/v1"
MOVED: dict[str, tuple[tuple[str, ...], str]] = {  # path -> its methods, and what to use instead
    "/download_package": (("GET",), f"{_API}/packages/download"),
    "/get_package_checksum": (("GET",), f"{_API}/packages/checksum"),
    "/get_model_trail": (("GET",), f"{_API}/models/"),
    "/get_model_ancestors": (("GET",), f"{_API}/models/{{id}}/ancestors"),
    "/get_model_descendants": (("GET",), f"{_API}/models/{{id}}/descendants"),
    "/list_models": (("GET",), f"{_API}/models/"),
    "/get_model": (("GET",), f"{_API}/models/{{id}}"),
    "/get_latest_model": (("GET",), f"{_API}/models/ with X-Limit: 1"),
    "/get_initial_model": (("GET",), f"{_API}/models/ with X-Limit: 1 and X-Sort-Order: asc"),
    "/list_clients": (("GET",), f"{_API}/clients/"),
    "/get_active_clients": (("GET",), f"{_API}/clients/?status=online"),
    "/get_client_config": (("GET",), f"{_API}/clients/config"),
    "/list_combiners": (("GET",), f"{_API}/combiners/"),
    "/get_combiner": (("GET",), f"{_API}/combiners/{{id}}"),
    "/list_combiners_data": (("POST",), f"{_API}/combiners/clients/count"),
    "/list_rounds": (("GET",), f"{_API}/rounds/"),
    "/get_round": (("GET",), f"{_API}/rounds/{{id}}"),
    "/list_sessions": (("GET",), f"{_API}/sessions/"),
    "/get_session": (("GET",), f"{_API}/sessions/{{id}}"),
    "/start_session": (("GET", "POST"), f"{_API}/sessions/start"),
    "/get_package": (("GET",), f"{_API}/packages/{{id}}"),
    "/list_compute_packages": (("GET",), f"{_API}/packages/"),
    "/set_active_package": (("PUT",), f"{_API}/packages/active"),
    "/set_package": (("POST",), f"{_API}/packages/"),
    "/set_current_model": (("PUT",), f"{_API}/sessions/, which names the model that it starts from,"),
    "/set_initial_model": (("POST",), f"{_API}/models/"),
    "/get_events": (("GET",), f"{_API}/statuses/ or {_API}/events"),
    "/list_validations": (("GET",), f"{_API}/validations/"),
    f"{_API}/graphql/": (("GET", "POST"), f"the REST API under {_API}, which /docs describes,"),
}
NOT_HERE = {  # path -> why not
    "/add_combiner": "Several combiners are not supported: this server runs its own.",
    "/delete_model_trail": "Not implemented",
}


def routes(join: Join) -> APIRouter:
    router = APIRouter(route_class=BoundedRoute, include_in_schema=False)

    @router.post("/add_client")
    async def add_client(body: AddClient, request: Request) -> Response:
        return await join(body, request)

    for path, (methods, instead) in MOVED.items():
        text = f"This endpoint is deprecated. Use {instead} instead."
        router.add_api_route(path, _says(text, 410), methods=list(methods))
    for path, why in NOT_HERE.items():
        router.add_api_route(path, _says(why, 501), methods=["GET", "POST"])
    return router


def _says(message: str, status: int) -> Callable[[], Response]:
    def answer() -> Response:
        return JSONResponse({"message": message}, status)

    return answer
