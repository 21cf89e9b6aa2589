"""Predictions: every attached client is asked for one. They come back as records, of which a run has many."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from ..scheduler.predictions import Wanted
from ..scheduler.scheduler import Scheduler
from .bodies import BoundedRoute
from .records import answered
from .schemas import Message, StartPredictions


def routes(scheduler: Scheduler) -> APIRouter:
    router = APIRouter(prefix="/api/v1/predictions", tags=["predictions"], route_class=BoundedRoute)

    @router.post("/start", response_model=Message, operation_id="start_predictions")
    async def start(body: StartPredictions) -> Response:
        """Asks every client that is attached, or attaches before all have answered or the time is over.

        Answered once that is durable: it survives a restart of the server.
        """
        prediction_id = body.prediction_id or ""  # the schema refuses an absent one
        wanted = Wanted(prediction_id, body.model_id or None, body.timeout)
        await answered(scheduler.predictions.start(wanted))
        return JSONResponse({"message": "Prediction session started"})

    return router
