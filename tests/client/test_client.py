"""The client against a server that the test plays, on real ports."""

import asyncio
import hashlib
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from fl_client import Client, ClientError, TaskInfo, TrainResult
from fl_client.wire import fl_pb2 as pb
from fl_client.wire.codec import NUMPY, Parameters, decode, encode, read
from tests.client.server_double import FAST, WAIT_S, Combiner, RestApi, joined, running

MODEL = [np.arange(6.0, dtype=np.float32).reshape(2, 3), np.zeros(4)]


def task(task_id: str, kind: int = pb.StatusType.MODEL_UPDATE, **fields: Any) -> pb.TaskRequest:
    return pb.TaskRequest(
        sender=pb.Client(name="combiner", role=pb.Role.COMBINER),
        receiver=pb.Client(client_id="a", role=pb.Role.CLIENT),
        **{
            "model_id": "m0",
            "task_id": task_id,
            "correlation_id": f"correlation of {task_id}",
            "type": kind,
            "session_id": "s",
            "round": 3,
            "attempt": 2,
            "deadline": 99.5,
            "data": json.dumps({"client_settings": {"rate": 0.1}, "round_id": "3"}),
        }
        | fields,
    )


def train_one_more(parameters: Parameters, info: TaskInfo) -> TrainResult:
    return TrainResult([array + 1 for array in parameters], num_examples=10)


def client_of(combiner: Combiner, **arguments: Any) -> Client:
    combiner.models.setdefault("m0", encode(MODEL))
    return Client(
        **{
            "combiner": f"127.0.0.1:{combiner.port}",
            "client_id": "a",
            "name": "Ada",
            "train": train_one_more,
            "backoff": FAST,
            **arguments,
        }
    )


async def test_a_training_task_is_downloaded_trained_uploaded_and_reported_once(combiner: Combiner) -> None:
    seen: list[tuple[TaskInfo, str, str]] = []
    infos: list[TaskInfo] = []

    def train(parameters: Parameters, info: TaskInfo) -> TrainResult:
        infos.append(info)
        parameters[0] += 1  # its own, to change
        return TrainResult(parameters, num_examples=np.int64(10), metrics={"loss": np.float32(0.5), "worst": np.nan})

    combiner.models["m0"] = encode(MODEL, ["w", "b"])
    told = asyncio.Event()

    def on_report(info: TaskInfo, verdict: str, reason: str) -> None:
        seen.append((info, verdict, reason))
        told.set()

    async with joined(client_of(combiner, train=train, on_report=on_report, token="t")):
        attachment = await combiner.attachment()
        assert attachment.client_id == "a"
        assert attachment.metadata["client"] == "a"
        assert attachment.metadata["grpc-server"] == "127.0.0.1"
        assert attachment.metadata["authorization"] == "Bearer t"
        sent = task("t1")
        attachment.say(sent)
        update: pb.ModelUpdate = await combiner.report()
        await told.wait()

    [(upload_id, data)] = combiner.uploads
    assert update.model_update_id == upload_id
    assert update.sha256 == hashlib.sha256(data).hexdigest()
    assert update.size_bytes == len(data)
    assert (update.task_id, update.model_id, update.correlation_id) == ("t1", "m0", "correlation of t1")
    assert update.sender == pb.Client(name="Ada", role=pb.Role.CLIENT, client_id="a")
    assert update.receiver == pb.Client(name="combiner", role=pb.Role.COMBINER)
    assert update.failure == ""
    meta = json.loads(update.meta)
    assert meta["training_metadata"] == {"num_examples": 10, "loss": 0.5, "worst": None}
    assert meta["config"] == sent.data
    assert {"fetch_model", "processing_time", "upload_model"} < set(meta)
    assert [spec.name for spec in read(data, NUMPY, max_bytes=10_000).layout] == ["w", "b"]
    np.testing.assert_array_equal(decode(data)[0], MODEL[0] + 1)
    expected = TaskInfo("t1", "train", "s", 3, 2, "m0", "a", {"rate": 0.1}, 99.5)
    assert infos == [expected]
    assert seen == [(expected, "accepted", "")]


async def test_a_large_model_travels_in_chunks(combiner: Combiner) -> None:
    combiner.models["m0"] = encode([np.arange(400_000.0)])
    async with joined(
        client_of(combiner, train=lambda parameters, info: TrainResult([np.repeat(parameters[0], 1)], 1))
    ):
        (await combiner.attachment()).say(task("t1"))
        await combiner.report()
    assert decode(combiner.uploads[0][1])[0].sum() == np.arange(400_000.0).sum()


async def test_plain_callbacks_share_one_thread_and_async_ones_run_on_the_loop(combiner: Combiner) -> None:
    threads: list[threading.Thread] = []

    def train(parameters: Parameters, info: TaskInfo) -> TrainResult:
        threads.append(threading.current_thread())
        return TrainResult(parameters, 1)

    async def validate(parameters: Parameters, info: TaskInfo) -> dict[str, float]:
        threads.append(threading.current_thread())
        await asyncio.sleep(0)
        return {"accuracy": 1.0}

    async with joined(client_of(combiner, train=train, validate=validate)):
        attachment = await combiner.attachment()
        for sent in (task("t1"), task("v1", pb.StatusType.MODEL_VALIDATION), task("t2")):
            attachment.say(sent)
            await combiner.report()
    assert threads[0] is threads[2] is not threading.current_thread()
    assert threads[1] is threading.current_thread()


async def test_tasks_are_worked_in_order(combiner: Combiner) -> None:
    async with joined(client_of(combiner)):
        attachment = await combiner.attachment()
        for number in range(40):  # more than the client queues
            attachment.say(task(f"t{number}"))
        assert [(await combiner.report()).task_id for _ in range(40)] == [f"t{number}" for number in range(40)]


def raises(kind: type[BaseException], text: str) -> Callable[[Parameters, TaskInfo], TrainResult]:
    def train(parameters: Parameters, info: TaskInfo) -> TrainResult:
        raise kind(text)

    return train


async def raises_later(parameters: Parameters, info: TaskInfo) -> TrainResult:
    raise KeyError("later")


async def cancels_itself(parameters: Parameters, info: TaskInfo) -> TrainResult:
    raise asyncio.CancelledError("not by the client")


@pytest.mark.parametrize(
    ("train", "failure"),
    [
        (raises(RuntimeError, "no\nmemory " + "x" * 1000), "RuntimeError: no memory xxx"),
        (raises(StopIteration, ""), "RuntimeError: StopIteration was raised"),
        (raises(asyncio.CancelledError, "odd"), "CancelledError: "),
        (raises_later, "KeyError: 'later'"),
        (cancels_itself, "CancelledError: "),
        (lambda parameters, info: None, "TypeError: train returned NoneType, expected TrainResult"),
        (
            lambda parameters, info: TrainResult(parameters[:1], 1),
            "train returned bad parameters: 1 arrays, expected 2",
        ),
        (
            lambda parameters, info: TrainResult([parameters[0].T, parameters[1]], 1),
            "array '0' has shape (3, 2), expected (2, 3)",
        ),
        (
            lambda parameters, info: TrainResult([parameters[0], parameters[1] * np.nan], 1),
            "array '1' is not finite: nan at flat index 0",
        ),
        (lambda parameters, info: TrainResult(["a", parameters[1]], 1), "array '0' has dtype <U1"),
        (lambda parameters, info: TrainResult(parameters, 0), "num_examples 0, expected a finite number above 0"),
        (lambda parameters, info: TrainResult(parameters, float("nan")), "num_examples nan"),
        (lambda parameters, info: TrainResult(parameters, True), "num_examples True, expected a number"),
        (lambda parameters, info: TrainResult(parameters, 1, {"a": object()}), "TypeError: object is no JSON"),
    ],
)
async def test_a_task_that_fails_is_reported_with_its_reason_and_the_client_lives_on(
    combiner: Combiner, train: Any, failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    tries = [train, train_one_more]
    with caplog.at_level(logging.ERROR, "fl_client"):
        async with joined(client_of(combiner, train=lambda parameters, info: tries.pop(0)(parameters, info))):
            attachment = await combiner.attachment()
            attachment.say(task("t1"))
            report: pb.ModelUpdate = await combiner.report()
            assert report.task_id == "t1"
            assert failure in report.failure
            assert "\n" not in report.failure and len(report.failure) <= 500
            assert report.model_update_id and not combiner.uploads
            attachment.say(task("t2"))
            assert (await combiner.report()).failure == ""
    assert any(record.exc_info for record in caplog.records)


async def test_a_model_that_is_not_there_or_unusable_is_reported(combiner: Combiner) -> None:
    combiner.models["bad"] = b"no zip"
    combiner.models["big"] = encode([np.zeros(10_000)])
    async with joined(client_of(combiner, max_model_bytes=10_000)):
        attachment = await combiner.attachment()
        for model_id, failure in (
            ("gone", "no model gone"),
            ("bad", "model bad: not an npz: no zip"),
            ("big", "model big: Download: model big is larger than 10000 bytes"),
        ):
            attachment.say(task(model_id, model_id=model_id))
            assert (await combiner.report()).failure == failure


async def test_a_validation_sends_its_metrics_or_its_failure(combiner: Combiner) -> None:
    answers = [{"accuracy": np.float32(0.5)}, {"loss": float("nan")}, None]
    async with joined(client_of(combiner, validate=lambda parameters, info: answers.pop(0))):
        attachment = await combiner.attachment()
        reports = []
        for number in range(3):
            attachment.say(task(f"v{number}", pb.StatusType.MODEL_VALIDATION, data=""))
            reports.append(await combiner.report())
    assert json.loads(reports[0].data) == {"accuracy": 0.5}
    assert (reports[0].task_id, reports[0].session_id, reports[0].failure) == ("v0", "s", "")
    assert reports[0].correlation_id == "correlation of v0"
    assert reports[0].timestamp.seconds > 0
    assert reports[1].failure == "ValueError: validate returned metric 'loss' = nan, expected a finite number"
    assert reports[2].failure.startswith("TypeError: validate returned NoneType")
    assert reports[1].data == reports[2].data == ""


async def test_a_prediction_is_sent_as_json(combiner: Combiner) -> None:
    answers: list[Any] = [{"classes": np.arange(3)}, object()]
    async with joined(client_of(combiner, predict=lambda parameters, info: answers.pop(0))):
        attachment = await combiner.attachment()
        attachment.say(task("p", pb.StatusType.MODEL_PREDICTION, session_id="prediction"))
        report: pb.ModelPrediction = await combiner.report()
        assert json.loads(report.data) == {"classes": [0, 1, 2]}
        assert report.prediction_id == "prediction"
        attachment.say(task("q", pb.StatusType.MODEL_PREDICTION))
        report = await combiner.report()
        assert report.data == "null"
        assert json.loads(report.meta) == {"failure": "TypeError: object is no JSON"}


async def test_a_missing_callback_is_reported_and_an_unknown_kind_ignored(combiner: Combiner) -> None:
    async with joined(client_of(combiner)):
        attachment = await combiner.attachment()
        attachment.say(task("f", pb.StatusType.FORWARD))
        attachment.say(task("v", pb.StatusType.MODEL_VALIDATION))
        report = await combiner.report()
        assert report.task_id == "v"
        assert report.failure == "this client has no validate callback"


class Held:
    """A train callback that says when it began, and returns when it is let go."""

    def __init__(self) -> None:
        self.begun: asyncio.Queue[str] = asyncio.Queue()
        self.go = asyncio.Event()

    async def __call__(self, parameters: Parameters, info: TaskInfo) -> TrainResult:
        self.begun.put_nowait(info.task_id)
        await self.go.wait()
        return TrainResult(parameters, 1)


@pytest.mark.parametrize(
    "end",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.OK,
        grpc.StatusCode.UNIMPLEMENTED,
    ],
)
async def test_a_task_that_is_issued_again_while_it_is_queued_or_worked_is_done_once(
    combiner: Combiner, end: grpc.StatusCode
) -> None:
    held = Held()
    async with joined(client_of(combiner, train=held)):
        attachment = await combiner.attachment()
        attachment.say(task("t1"))
        attachment.say(task("t2"))
        assert await held.begun.get() == "t1"
        attachment.say((end, "for the test"))
        attachment = await combiner.attachment()
        attachment.say(task("t1"))
        attachment.say(task("t2"))
        attachment.say(task("t3"))
        held.go.set()
        assert [(await combiner.report()).task_id for _ in range(3)] == ["t1", "t2", "t3"]


async def test_a_task_that_is_issued_again_after_its_report_is_done_again(combiner: Combiner) -> None:
    told: asyncio.Queue[str] = asyncio.Queue()
    client = client_of(combiner, on_report=lambda info, verdict, reason: told.put_nowait(f"{verdict} {reason}"))
    async with joined(client):
        attachment = await combiner.attachment()
        attachment.say(task("t1"))
        first = await combiner.report()
        assert await told.get() == "accepted "
        combiner.answer = pb.Response(verdict=pb.Verdict.VERDICT_DUPLICATE, reason="closed by another")
        attachment.say(task("t1"))
        second = await combiner.report()
        assert await told.get() == "duplicate closed by another"
    assert first.task_id == second.task_id
    assert first.model_update_id != second.model_update_id


async def test_tasks_of_a_server_without_task_ids_are_told_apart_by_their_correlation_id(combiner: Combiner) -> None:
    async with joined(client_of(combiner)):
        attachment = await combiner.attachment()
        attachment.say(task("", correlation_id="c1"))
        attachment.say(task("", correlation_id="c2"))
        reports = [await combiner.report(), await combiner.report()]
    assert [(report.task_id, report.correlation_id) for report in reports] == [("", "c1"), ("", "c2")]


async def test_what_the_server_did_not_answer_is_sent_again_under_the_same_update_id(combiner: Combiner) -> None:
    combiner.broken["Download"] = [grpc.StatusCode.UNAVAILABLE]
    combiner.broken["Upload"] = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED]
    combiner.broken["SendModelUpdate"] = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED]
    combiner.cut_downloads = 1
    trained: list[str] = []

    def train(parameters: Parameters, info: TaskInfo) -> TrainResult:
        trained.append(info.task_id)
        return TrainResult(parameters, 1)

    async with joined(client_of(combiner, train=train)):
        (await combiner.attachment()).say(task("t1"))
        update = await combiner.report()
    assert trained == ["t1"]
    assert combiner.update_ids == [update.model_update_id] * 3
    assert [upload_id for upload_id, _ in combiner.uploads] == [update.model_update_id]


async def test_a_task_survives_a_restart_of_the_server(combiner: Combiner) -> None:
    held = Held()
    async with joined(client_of(combiner, train=held)):
        (await combiner.attachment()).say(task("t1"))
        await held.begun.get()
        await combiner.stop()
        held.go.set()
        await combiner.start()
        (await combiner.attachment()).say(task("t1"))
        update = await combiner.report()
        assert update.task_id == "t1"
        assert decode(dict(combiner.uploads)[update.model_update_id])[1].size == 4
    assert held.begun.empty()


async def test_a_refused_upload_or_report_is_the_end_of_its_task_only(combiner: Combiner) -> None:
    combiner.upload_refusal = "no room"
    async with joined(client_of(combiner)):
        attachment = await combiner.attachment()
        attachment.say(task("t1"))
        assert (await combiner.report()).failure == "Upload: no room"
        combiner.upload_refusal = ""
        combiner.broken["SendModelUpdate"] = [grpc.StatusCode.INVALID_ARGUMENT]
        attachment.say(task("t2"))
        attachment.say(task("t3"))
        assert (await combiner.report()).task_id == "t3"


@pytest.mark.parametrize(
    ("code", "details", "message"),
    [
        (
            grpc.StatusCode.ABORTED,
            "attached again from ipv4:1.2.3.4:5",
            "took over: attached again from ipv4:1.2.3.4:5",
        ),
        (grpc.StatusCode.UNAUTHENTICATED, "token expired", "UNAUTHENTICATED: token expired"),
        (grpc.StatusCode.PERMISSION_DENIED, "not a client", "PERMISSION_DENIED: not a client"),
    ],
)
async def test_a_client_that_is_replaced_or_refused_ends_with_the_reason(
    combiner: Combiner, code: grpc.StatusCode, details: str, message: str
) -> None:
    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
        run = group.create_task(run_expecting(client_of(combiner), message))
        (await combiner.attachment()).say((code, details))
        await run


async def run_expecting(client: Client, message: str) -> None:
    with pytest.raises(ClientError) as ended:
        await client.run()
    assert message in str(ended.value)


async def test_refused_during_a_task_ends_the_client(combiner: Combiner) -> None:
    combiner.broken["Upload"] = [grpc.StatusCode.UNAUTHENTICATED]
    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
        group.create_task(run_expecting(client_of(combiner), "Upload: UNAUTHENTICATED"))
        (await combiner.attachment()).say(task("t1"))


async def test_stop_reports_the_task_that_is_worked_and_leaves_the_others(combiner: Combiner) -> None:
    held = Held()
    client = client_of(combiner, train=held)
    async with joined(client) as run:
        attachment = await combiner.attachment()
        attachment.say(task("t1"))
        attachment.say(task("t2"))
        await held.begun.get()
        client.stop()
        held.go.set()
        await run
    assert (await combiner.report()).task_id == "t1"
    assert combiner.reports.empty()


async def test_stop_ends_a_client_that_is_idle_or_waits_for_the_server(combiner: Combiner) -> None:
    idle = client_of(combiner)
    async with joined(idle) as run:
        await combiner.attachment()
        idle.stop()
        await run
    lost = Client(api_url="http://127.0.0.1:9", train=train_one_more)
    async with joined(lost) as run:
        lost.stop()
        await run


async def test_the_rest_api_is_asked_until_it_assigns_a_combiner(combiner: Combiner) -> None:
    rest = RestApi(
        (203, {"status": "retry", "message": "starting"}),
        (503, "not ready"),
        (200, {"status": "assigned", "host": "127.0.0.1", "port": combiner.port, "fqdn": None}),
    )
    async with running(rest):
        client = Client(
            api_url=f"http://127.0.0.1:{rest.port}/",
            train=train_one_more,
            name="Ada",
            client_id="a",
            token="t",
            preferred_combiner="c",
            backoff=FAST,
        )
        async with joined(client):
            await combiner.attachment()
    assert len(rest.requests) == 3
    head, body = rest.requests[0]
    assert head.startswith("POST /api/v1/clients/add HTTP/1.1")
    assert "authorization: bearer t" in head.lower()
    assert body == {"name": "Ada", "client_id": "a", "package": "local", "preferred_combiner": "c"}


async def test_a_server_that_is_not_there_yet_is_waited_for_and_named_once(
    combiner: Combiner, caplog: pytest.LogCaptureFixture
) -> None:
    rest = RestApi((200, {"host": "127.0.0.1", "port": combiner.port}))
    async with running(rest):
        pass  # now its port is known, and nobody listens there
    waits = 0
    enough = asyncio.Event()

    class Counted(type(FAST)):  # type: ignore[misc]
        def wait_s(self, failures: int) -> float:
            nonlocal waits
            waits += 1
            if waits == 3:
                enough.set()
            return 0.001

    client = Client(
        api_url=f"http://127.0.0.1:{rest.port}", train=train_one_more, client_id="a", backoff=Counted(0.001, 0.01)
    )
    with caplog.at_level(logging.INFO, "fl_client"):
        async with joined(client):
            await enough.wait()
            async with running(rest):
                await combiner.attachment()
    messages = [record.message for record in caplog.records if "waiting for the server" in record.message]
    assert len(messages) == 1
    assert "does not answer" in messages[0]


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, {"message": "no such combiner", "success": False}, "answered 400: no such combiner"),
        (401, {"message": "token expired"}, "answered 401: token expired"),
        (404, "<h1>not\nhere</h1>", "answered 404: <h1>not here</h1>"),
        (200, [{"message": "FEDn's own slip"}, 400], "assigned no combiner"),
        (200, "a login page", "assigned no combiner: a login page"),
    ],
)
async def test_a_refusal_of_the_rest_api_ends_the_client_with_its_message(status: int, body: Any, message: str) -> None:
    rest = RestApi((status, body))
    async with asyncio.timeout(WAIT_S), running(rest):
        await run_expecting(Client(api_url=f"http://127.0.0.1:{rest.port}", train=train_one_more), message)


async def test_a_combiner_that_moved_is_followed(combiner: Combiner) -> None:
    other = Combiner()
    rest = RestApi((200, {"host": "127.0.0.1", "port": combiner.port}))
    async with running(rest), running(other):
        client = Client(api_url=f"http://127.0.0.1:{rest.port}", train=train_one_more, client_id="a", backoff=FAST)
        async with joined(client):
            await combiner.attachment()
            rest.answers[-1] = (200, {"host": "127.0.0.1", "port": other.port})
            await combiner.stop()
            await other.attachment()


async def test_an_upload_that_hangs_at_the_former_combiner_is_sent_to_the_new_one(combiner: Combiner) -> None:
    other = Combiner()
    combiner.models["m0"] = encode(MODEL)
    rest = RestApi((200, {"host": "127.0.0.1", "port": combiner.port}))
    async with running(rest), running(other):
        client = Client(api_url=f"http://127.0.0.1:{rest.port}", train=train_one_more, client_id="a", backoff=FAST)
        async with joined(client):
            attachment = await combiner.attachment()
            combiner.hold_uploads = asyncio.Event()
            attachment.say(task("t1"))
            await combiner.hold_uploads.wait()
            rest.answers[-1] = (200, {"host": "127.0.0.1", "port": other.port})
            combiner.broken["TaskStream"] = [grpc.StatusCode.UNAVAILABLE] * 10
            attachment.say((grpc.StatusCode.UNAVAILABLE, "draining"))
            assert (await other.report()).task_id == "t1"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"api_url": "http://a", "combiner": "b:1"},
        {"combiner": "host"},
        {"combiner": "host:port"},
        {"combiner": "host:1", "client_id": "Åsa"},
    ],
)
def test_a_client_that_cannot_work_is_not_made(arguments: dict[str, str]) -> None:
    with pytest.raises(ClientError):
        Client(train=train_one_more, **arguments)


def test_the_wire_is_imported_without_httpx_and_grpc() -> None:
    code = "import sys, fl_client.wire.codec; assert not {'httpx', 'grpc', 'fl_client.client'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
