"""Sessions: create, start, continue, stop, rename, explain. The scheduler decides; here is only the asking."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from fl_client.wire.codec import HELPERS

from ..core.model import Outcome, SessionConfig, Status
from ..errors import Conflict, Invalid, RequestError
from ..scheduler.records import WIRE_STATUS, helper_of
from ..scheduler.scheduler import Scheduler
from ..store.ports import Collection, Document
from .bodies import BoundedRoute
from .records import answered, changes, found
from .schemas import (
    MODELS,
    SESSIONS,
    ChangeSession,
    CreateSession,
    Explanation,
    JsonObject,
    Message,
    SessionConfigBody,
    SessionObject,
    StartSession,
    checked,
    session_config,
)


def routes(scheduler: Scheduler) -> APIRouter:
    router = APIRouter(prefix="/api/v1/sessions", tags=["sessions"], route_class=BoundedRoute)

    def accepted(wanted: SessionConfigBody, model: Document) -> SessionConfig:
        if wanted.server_functions:
            raise Invalid("server_functions: not supported")
        helper = wanted.helper_type or helper_of(model)
        if helper not in HELPERS:
            raise Invalid(f"helper_type: {helper!r} is unknown; known: {', '.join(sorted(HELPERS))}")
        return session_config(wanted, helper)

    @router.post("/", response_model=SessionObject, status_code=201, operation_id="create_session")
    async def create(body: CreateSession) -> Response:
        wanted = body.session_config
        start_model = wanted.model_id or body.seed_model_id
        if not start_model:
            raise Invalid("model_id: missing: the model to start from")
        for field, model_id in (("seed_model_id", body.seed_model_id), ("model_id", start_model)):
            model = await scheduler.store.get(Collection.MODELS, model_id) if model_id else None
            if model_id and model is None:
                raise Invalid(f"{field}: no model {model_id}")
        assert model is not None
        config = accepted(wanted, model)
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

    @router.post(
        "/start_splitlearning_session",
        response_model=Message,
        status_code=501,
        operation_id="start_splitlearning_session",
        deprecated=True,
    )
    async def start_split_learning() -> Response:
        return JSONResponse({"message": "Split learning is not supported"}, 501)

    async def reconfigured(document: Document, sent: JsonObject) -> SessionConfig:
        """The whole configuration that was sent. Raises Invalid."""
        wanted = checked(SessionConfigBody, sent)
        if wanted.model_id and wanted.model_id != document["session_config"]["model_id"]:
            raise Invalid("model_id: cannot be changed; a new session starts from another model")
        return accepted(wanted, await found(scheduler, MODELS, document["session_config"]["model_id"]))

    async def change(id: str, body: ChangeSession, *, lenient: bool) -> Response:
        document = await found(scheduler, SESSIONS, id)
        sent = body.model_dump(exclude_unset=True)
        if lenient and sent.get("session_config"):
            sent["session_config"] = SESSIONS.answer(document)["session_config"] | sent["session_config"]
        allowed = {"name", "status", "session_config"}
        wanted = changes(SESSIONS, document, sent, allowed=allowed, lenient=lenient)
        if wanted.get("status", WIRE_STATUS[Status.TERMINATED]) != WIRE_STATUS[Status.TERMINATED]:
            raise Invalid("status: only Terminated can be set")
        if wanted.keys() >= {"status", "session_config"}:
            raise Conflict("session_config: cannot change in the request that stops the session")
        if "session_config" in wanted:
            config = await reconfigured(document, wanted["session_config"] or {})
            outcome, reason = await answered(scheduler.configure(id, config))
            if outcome is not Outcome.DONE:
                raise Conflict(f"session_config: {reason}")
        if "status" in wanted:
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
