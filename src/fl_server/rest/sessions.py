"""Sessions: create, start, continue, stop, rename, explain. The scheduler decides; here is only the asking."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from fl_client.wire.codec import HELPERS

from ..core.model import Outcome, Status
from ..errors import Conflict, Invalid, RequestError
from ..scheduler.records import WIRE_STATUS
from ..scheduler.scheduler import Scheduler
from ..store.ports import Collection
from .bodies import BoundedRoute
from .records import answered, changes, found
from .schemas import (
    SESSIONS,
    ChangeSession,
    CreateSession,
    Explanation,
    Message,
    SessionConfigBody,
    SessionObject,
    StartSession,
    session_config,
)

DEFAULT_HELPER = "numpyhelper"


def routes(scheduler: Scheduler) -> APIRouter:
    router = APIRouter(prefix="/api/v1/sessions", tags=["sessions"], route_class=BoundedRoute)

    @router.post("/", response_model=SessionObject, status_code=201, operation_id="create_session")
    async def create(body: CreateSession) -> Response:
        wanted = body.session_config
        if wanted.server_functions:
            raise Invalid("server_functions: not supported")
        config = session_config(wanted, await _helper(scheduler, wanted))
        start_model = wanted.model_id or body.seed_model_id
        if not start_model:
            raise Invalid("model_id: missing: the model to start from")
        for field, model_id in (("model_id", wanted.model_id), ("seed_model_id", body.seed_model_id)):
            if model_id and await scheduler.store.get(Collection.MODELS, model_id) is None:
                raise Invalid(f"{field}: no model {model_id}")
        document = await answered(
            scheduler.create(config, name=body.name, model_id=start_model, session_id=body.session_id)
        )
        return JSONResponse(SESSIONS.answer(document), 201)

    @router.post("/start", response_model=Message, operation_id="start_session")
    async def start(body: StartSession) -> Response:
        """Starts the session, or continues one that has ended. Answered once the start is durable."""
        session_id = body.session_id or ""  # the schema refuses an absent one
        if await scheduler.store.get(Collection.SESSIONS, session_id) is None:
            raise Invalid("Session with specified ID does not exist")
        outcome, reason = await answered(
            scheduler.start(
                session_id,
                rounds=body.rounds,
                round_timeout_s=body.round_timeout,
                wait_for_clients_s=body.wait_for_clients_s,
                client_ids=body.chosen_clients(),
                model_name_prefix=body.model_name_prefix or "",
            )
        )
        if outcome is Outcome.DONE:
            return JSONResponse({"message": "Session started"})
        raise RequestError("A session is already running!" if outcome is Outcome.CONFLICT else reason)

    async def change(id: str, body: ChangeSession, *, lenient: bool) -> Response:
        document = await found(scheduler, SESSIONS, id)
        allowed = {"name", "status"}
        if document["status"] == WIRE_STATUS[Status.RUNNING] and "session_config" in body.model_fields_set:
            allowed.add("session_config")  # to be refused below: not wrong, but not now
        wanted = changes(SESSIONS, document, body.model_dump(exclude_unset=True), allowed=allowed, lenient=lenient)
        if "session_config" in wanted:
            raise Conflict("session_config: the session is running")
        if "status" in wanted:
            if wanted["status"] != WIRE_STATUS[Status.TERMINATED]:
                raise Invalid("status: only Terminated can be set")
            outcome, reason = await answered(scheduler.stop(id))
            if outcome is not Outcome.DONE:
                raise Conflict(reason)
        if "name" in wanted:
            await answered(scheduler.rename(id, wanted["name"]))
        return JSONResponse(SESSIONS.answer(await found(scheduler, SESSIONS, id)))

    @router.patch("/{id}", response_model=SessionObject, operation_id="patch_session")
    async def patch(id: str, body: ChangeSession) -> Response:
        """`{"status": "Terminated"}` stops the session. Unknown keys are passed over."""
        return await change(id, body, lenient=True)

    @router.put("/{id}", response_model=SessionObject, operation_id="put_session")
    async def put(id: str, body: ChangeSession) -> Response:
        """As PATCH, but an unknown key is refused."""
        return await change(id, body, lenient=False)

    @router.get("/{id}/explain", response_model=Explanation, operation_id="explain_session")
    async def explain(id: str) -> Response:
        """Why the session is where it is."""
        return JSONResponse({"session_id": id, "sentences": await scheduler.explain(id)})

    return router


async def _helper(scheduler: Scheduler, wanted: SessionConfigBody) -> str:
    helper = wanted.helper_type or await answered(scheduler.active_helper()) or DEFAULT_HELPER
    if helper not in HELPERS:
        raise Invalid(f"helper_type: {helper!r} is unknown; known: {', '.join(sorted(HELPERS))}")
    return helper
