"""A client that is slower than its session: rounds that are over are not worked, or it would never catch up."""

from __future__ import annotations

import asyncio

from fl_client import TaskInfo, TrainResult
from fl_client.wire import fl_pb2 as pb
from fl_client.wire.codec import Parameters
from tests.client.server_double import Combiner, joined
from tests.client.test_client import client_of, task


async def test_of_the_training_tasks_that_wait_only_the_newest_of_a_session_is_worked(combiner: Combiner) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def train(parameters: Parameters, info: TaskInfo) -> TrainResult:
        begun.set()
        await go_on.wait()
        return TrainResult(parameters, num_examples=1)

    async def validate(parameters: Parameters, info: TaskInfo) -> dict[str, float]:
        return {"loss": 1.0}

    client, all_taken = client_of(combiner, train=train, validate=validate), asyncio.Event()
    take = client._take

    async def taken(request: pb.TaskRequest) -> None:
        await take(request)
        if request.task_id == "last":
            all_taken.set()

    client._take = taken  # type: ignore[method-assign]
    async with joined(client):
        attachment = await combiner.attachment()
        attachment.say(task("r1", round=1, attempt=1))
        await begun.wait()
        attachment.say(task("v1", pb.StatusType.MODEL_VALIDATION, round=1, attempt=1))
        attachment.say(task("r2", round=2, attempt=1))
        attachment.say(task("other", session_id="another", round=1, attempt=1))
        attachment.say(task("r2 again", round=2, attempt=2))
        attachment.say(task("unsaid", session_id="fedn", round=0, attempt=0))
        attachment.say(task("unsaid too", session_id="fedn", round=0, attempt=0))
        attachment.say(task("last", session_id="third", round=1, attempt=1))
        await all_taken.wait()
        go_on.set()
        worked = []
        while not worked or worked[-1] != "last":
            worked.append((await combiner.report()).task_id)
    assert worked == ["r1", "v1", "other", "r2 again", "unsaid", "unsaid too", "last"]
