"""Models: a seed comes in, checked before it is stored; models go out; the trail from one to the next. And the helper,
FEDn's name for the format of models.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse

from fl_client.wire import codec

from ..errors import Invalid, RequestError
from ..scheduler.packages import Packages
from ..scheduler.records import helper_of
from ..scheduler.scheduler import Scheduler
from ..store import ports
from ..store.ports import Collection, Condition, Document
from .bodies import BoundedRoute, Desk, FileBytes, limits_of
from .records import answered, changes, found
from .schemas import (
    MODELS,
    ActiveHelper,
    ChangeModel,
    Failure,
    Gone,
    Message,
    ModelAdded,
    ModelForm,
    ModelObject,
    Parameters,
    checked,
)

TRAIL_LENGTH = 10  # FEDn's, when no X-Limit is sent
MAX_PARAMETERS_BYTES = 64 << 20  # as numbers in JSON a model is about five times larger; above: download it
ZIP_BYTES = 1 << 20  # what an npz of the largest model may need besides its arrays

_FILE = "real, finite arrays: an npz, a safetensors file, or (binaryhelper) one flat array of float64, little-endian"
_HELPER = "the file's format; absent: what its first bytes say, else the active helper's"
TrailLimit = Annotated[int, Header(alias="X-Limit", description=f"models at most; 0 or absent: {TRAIL_LENGTH}")]
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": _FILE},
                        "name": {"type": "string"},
                        "helper": {"type": "string", "description": _HELPER},
                    },
                }
            }
        },
    }
}


def routes(scheduler: Scheduler, packages: Packages, desk: Desk) -> APIRouter:
    router = APIRouter(prefix="/api/v1/models", tags=["models"], route_class=BoundedRoute)
    loop = asyncio.get_running_loop

    @router.post(
        "/",
        response_model=ModelAdded,
        operation_id="add_model",
        openapi_extra=_FORM,
        responses={400: {"model": Failure}},
    )
    async def add(request: Request) -> Response:
        """A model to start sessions from. An npz keeps the order of its arrays; arr_0, arr_1, … become 0, 1, …"""
        limit = desk.max_model_bytes
        try:
            async with desk.receive(request, "file", limit + ZIP_BYTES, "max_model_bytes") as upload:
                form = checked(ModelForm, upload.fields)
                helper = known_helper(form.helper) if form.helper else None
                if helper is None:
                    helper = await loop().run_in_executor(desk.kernel, codec.recognised_file, upload.path)
                helper = helper or await packages.helper() or codec.NUMPY
                seed = upload.path.with_suffix(".seed")
                sha256 = await loop().run_in_executor(desk.kernel, _store_checked, upload.path, seed, helper, limit)
                document = await answered(
                    scheduler.add_model(seed, name=form.name or None, sha256=sha256, helper=helper)
                )
        except Invalid as wrong:
            return JSONResponse({"success": False, "message": str(wrong)}, 400)
        answer = {"success": True, "message": "Model added successfully", "model_id": document["model"]}
        return JSONResponse(answer)

    @router.api_route(
        "/active",
        methods=["GET"],
        response_model=Gone,
        status_code=410,
        operation_id="get_active_model",
        deprecated=True,
    )
    @router.api_route(
        "/active",
        methods=["PUT"],
        response_model=Gone,
        status_code=410,
        operation_id="set_active_model",
        deprecated=True,
    )
    async def active() -> Response:
        return JSONResponse({"error": "deprecated: a session names the model that it starts from"}, 410)

    @router.get("/leaf-nodes", response_model=list[ModelObject], operation_id="list_leaf_models")
    async def leaf_nodes(request: Request) -> Response:
        """Models that are nobody's parent, the newest first."""
        newest_first = ports.Query(sort=(("committed_at", True),))
        documents = await scheduler.store.find(Collection.MODELS, newest_first)
        parents = {document["parent_model"] for document in documents}
        leaves = [MODELS.answer(document) for document in documents if document["model"] not in parents]
        return JSONResponse(leaves[: limits_of(request).page_max_rows])

    @router.get(
        "/{id}/download",
        operation_id="download_model",
        response_class=Response,
        responses={200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}},
    )
    async def download(id: str) -> Response:
        document = await found(scheduler, MODELS, id)
        path = await scheduler.models.local(document["model"])
        return FileBytes(path, document["model"], desk.disk)

    @router.get("/{id}/parameters", response_model=Parameters, operation_id="get_model_parameters")
    async def parameters(id: str) -> Response:
        document = await found(scheduler, MODELS, id)
        path = await scheduler.models.local(document["model"])
        text = await loop().run_in_executor(desk.kernel, _parameters_json, path, helper_of(document))
        return Response(text, media_type="application/json")

    @router.get("/{id}/ancestors", response_model=list[ModelObject], operation_id="list_model_ancestors")
    async def ancestors(
        request: Request,
        id: str,
        include_self: Annotated[bool, Query()] = False,
        x_limit: TrailLimit = 0,
        x_reverse: Annotated[str | None, Header(description="true: the oldest first")] = None,
    ) -> Response:
        """The newest first; the model itself does not count towards the limit."""

        async def parent(document: Document) -> Document | None:
            parent_id = document["parent_model"]
            return await scheduler.store.get(Collection.MODELS, parent_id) if parent_id else None

        document = await found(scheduler, MODELS, id)
        trail = await _trail(document, parent, x_limit, limits_of(request).page_max_rows)
        if include_self:
            trail.insert(0, document)
        if (x_reverse or "").lower() == "true":
            trail.reverse()
        return JSONResponse([MODELS.answer(model) for model in trail])

    @router.get("/{id}/descendants", response_model=list[ModelObject], operation_id="list_model_descendants")
    async def descendants(request: Request, id: str, x_limit: TrailLimit = 0) -> Response:
        """The newest first. Where several models came from one, the newest of them is followed."""

        async def child(document: Document) -> Document | None:
            where = (Condition("parent_model", "eq", document["model"]),)
            newest = ports.Query(where, sort=(("committed_at", True),), limit=1)
            children = await scheduler.store.find(Collection.MODELS, newest)
            return children[0] if children else None

        document = await found(scheduler, MODELS, id)
        trail = await _trail(document, child, x_limit, limits_of(request).page_max_rows)
        return JSONResponse([MODELS.answer(model) for model in reversed(trail)])

    async def rename(id: str, body: ChangeModel, *, lenient: bool) -> Response:
        document = await found(scheduler, MODELS, id)
        sent = body.model_dump(exclude_unset=True)
        wanted = changes(MODELS, document, sent, allowed={"name"}, lenient=lenient)
        if wanted:
            await answered(scheduler.patch(Collection.MODELS, id, wanted))
        return JSONResponse(MODELS.answer(await found(scheduler, MODELS, id)))

    @router.patch("/{id}", response_model=ModelObject, operation_id="patch_model")
    async def patch(id: str, body: ChangeModel) -> Response:
        """Renames it. Unknown keys are passed over."""
        return await rename(id, body, lenient=True)

    @router.put("/{id}", response_model=ModelObject, operation_id="put_model")
    async def put(id: str, body: ChangeModel) -> Response:
        """Renames it; an unknown key is refused."""
        return await rename(id, body, lenient=False)

    return router


def helper_routes(packages: Packages) -> APIRouter:
    router = APIRouter(prefix="/api/v1/helpers", tags=["helpers"], route_class=BoundedRoute)

    @router.get("/active", response_model=str, operation_id="get_active_helper")
    async def get() -> Response:
        helper = await packages.helper()
        if helper is None:
            raise RequestError("No active helper")  # 400, where FEDn's 404 makes its own start_session give up
        return JSONResponse(helper)

    @router.put("/active", response_model=Message, operation_id="set_active_helper")
    async def put(body: ActiveHelper) -> Response:
        await answered(packages.set_helper(known_helper(body.helper)))
        return JSONResponse({"message": "Active helper set"})

    return router


def known_helper(helper: str) -> str:
    """It. Raises Invalid if there is no such helper."""
    if helper not in codec.HELPERS:
        raise Invalid(f"helper: {helper[:100]!r} is unknown; known: {', '.join(sorted(codec.HELPERS))}")
    return helper


async def _trail(
    document: Document, following: Callable[[Document], Awaitable[Document | None]], limit: int, max_rows: int
) -> list[Document]:
    # not refused above max_rows: FEDn's client asks for as many as there are models
    most = min(limit if limit > 0 else TRAIL_LENGTH, max_rows)
    trail: list[Document] = []
    seen = {document["model"]}
    step = await following(document)
    while step is not None and len(trail) < most and step["model"] not in seen:
        trail.append(step)
        seen.add(step["model"])
        step = await following(step)
    return trail


# ---- in an executor


def _store_checked(upload: Path, seed: Path, helper: str, max_bytes: int) -> str:
    """Its sha256. Raises Invalid."""
    try:
        return codec.store_seed(upload, seed, helper, max_bytes=max_bytes)
    except codec.BadModel as wrong:
        raise Invalid(f"file: {wrong}") from None


def _parameters_json(path: Path, helper: str) -> bytes:
    if path.stat().st_size > MAX_PARAMETERS_BYTES:
        raise RequestError(f"the model is larger than {MAX_PARAMETERS_BYTES} bytes: download it")
    with codec.open_model(path, helper, max_bytes=MAX_PARAMETERS_BYTES) as file:
        return json.dumps({"array": [array.tolist() for array in file.copies()]}).encode()
