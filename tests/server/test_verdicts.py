"""Every update has one verdict, in words and in fields, whenever it is asked: in its round, after it, after the session
and after a restart of the server. What is not accepted is in no model, and nothing of it is a gRPC error."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_client.wire import codec
from fl_client.wire import fl_pb2 as pb
from fl_server.scheduler import intake
from fl_server.testing import Federation
from tests.server.wire_client import (
    WireClient,
    clients,
    committed,
    filled,
    online,
    port,
    result,
    started,
    update_of,
)

TEXT = {
    pb.VERDICT_ACCEPTED: "accepted",
    pb.VERDICT_DUPLICATE: "duplicate",
    pb.VERDICT_NOT_SELECTED: "not_selected",
    pb.VERDICT_LATE: "late",
    pb.VERDICT_REJECTED: "rejected",
}


def said(reply: pb.Response, update_id: str, client: str) -> tuple[str, str]:
    """The verdict and its reason, which the text says too."""
    verdict, reason = TEXT[reply.verdict], reply.reason
    because = f" ({reason})" if reason else ""
    assert reply.response == f"RECEIVED ModelUpdate {update_id} from client {client}: {verdict}{because}"
    assert bool(reason) == (verdict != "accepted")
    return verdict, reason


def npz(*arrays: Any, **named: Any) -> bytes:
    out = io.BytesIO()
    np.savez(out, **{str(index): array for index, array in enumerate(arrays)}, **named)
    return out.getvalue()


def deflated(parameters: Sequence[np.ndarray]) -> bytes:
    """As FEDn's numpyhelper writes it."""
    out = io.BytesIO()
    np.savez_compressed(out, **{str(index): array for index, array in enumerate(parameters)})  # type: ignore[arg-type]
    return out.getvalue()


def spoilt(value: float) -> bytes:
    parameters = filled(1)
    parameters[1][1, 2] = value
    return codec.encode(parameters)


# ---- what is at fault

CONTENTS = {
    "wrong shape": (codec.encode([np.ones(4), np.ones((3, 2))]), "array '1' has shape (3, 2), expected (2, 3)"),
    "a missing array": (codec.encode(filled(1)[:1]), "1 arrays, expected 2"),
    "an array too many": (codec.encode([*filled(1), np.ones(1)]), "3 arrays, expected 2"),
    "another name": (codec.encode(filled(1), ["0", "2"]), "array 1 is named '2', expected '1'"),
    "NaN": (spoilt(np.nan), "array '1' is not finite: nan at flat index 5"),
    "infinity": (spoilt(-np.inf), "array '1' is not finite: -inf at flat index 5"),
    "cut off": (codec.encode(filled(1))[:-9], "the npz is cut off, or has bytes after its end"),
    "NaN, deflated": (deflated([np.ones(4), np.full((2, 3), np.nan)]), "array '1' is not finite: nan at flat index 0"),
    "complex numbers": (
        npz(np.ones(4), np.ones((2, 3)) * 1j),
        "array '1' has dtype '<c16', only real floats and integers are taken",
    ),
    "Python objects": (
        npz(np.ones(4), np.array([{}] * 6, object).reshape(2, 3)),
        "array '1' has dtype '|O', only real floats and integers are taken",
    ),
    "a pickle": (pickle.dumps(filled(1)), "not an npz: no zip"),
    "text": (b"no model", "not an npz: no zip"),
    "nothing": (b"", "not an npz: 0 bytes"),
}


async def judged(faults: Mapping[str, tuple[bytes, Callable[[pb.ModelUpdate], None]]]) -> dict[str, tuple[str, str]]:
    """The verdict of an upload and report with each fault, one client each; it is the same when asked again.

    All are in one round with a good update of 3, which alone is counted.
    """
    verdicts = {}
    ids = [f"bad{index}" for index in range(len(faults))]
    async with Federation() as federation, clients(federation, *ids, "good") as (*everybody, good):
        session_id = await started(federation)
        sent = []
        for client, (fault, (data, change)) in zip(everybody, faults.items(), strict=True):
            assert (await client.upload(data, "u")).status == pb.OK
            update = update_of(await client.task(), "u")
            change(update)
            sent.append((client, update))
            verdicts[fault] = said(await client.send(update), "u", client.id)
            assert said(await client.send(update), "u", client.id) == verdicts[fault]
        await good.train(await good.task(), 3)
        assert await result(federation, session_id) == 3
        assert [said(await client.send(update), "u", client.id) for client, update in sent] == list(verdicts.values())
    return verdicts


async def test_an_update_whose_content_is_at_fault_is_rejected_with_the_reason_and_not_counted() -> None:
    verdicts = await judged({content: (data, lambda update: None) for content, (data, _) in CONTENTS.items()})
    for content, (_, reason) in CONTENTS.items():
        assert verdicts[content] == ("rejected", reason), content


COUNTS = [None, 0, -1, "10", True, [1], 0.0, -0.5, float("nan"), float("inf"), 2**53 + 1, 2**60, 10**400]


async def test_an_update_without_a_usable_num_examples_is_rejected_and_not_counted() -> None:
    def saying(training_metadata: Any) -> Callable[[pb.ModelUpdate], None]:
        def change(update: pb.ModelUpdate) -> None:
            update.meta = json.dumps({**json.loads(update.meta), "training_metadata": training_metadata})

        return change

    said_instead: list[Any] = [*({"num_examples": count} for count in COUNTS), {}, 5, None]
    faults = {f"{said!r:.40}": (codec.encode(filled(9)), saying(said)) for said in said_instead}
    for fault, (verdict, reason) in (await judged(faults)).items():
        assert verdict == "rejected", fault
        assert reason.startswith("num_examples: "), fault
        assert reason.endswith(", a finite number above 0 and at most 2**53 needed"), fault


async def test_an_update_whose_meta_cannot_be_read_is_taken_for_the_clients_open_task_and_rejected() -> None:
    def saying(meta: str) -> Callable[[pb.ModelUpdate], None]:
        return lambda update: setattr(update, "meta", meta)

    metas = ["", "no JSON", "[1]", "null", "[" * 100_000, '{"training_metadata": 5}', '{"config": 5}', "1" * 5000]
    verdicts = await judged({meta[:20]: (codec.encode(filled(9)), saying(meta)) for meta in metas})
    reason = "num_examples: None, a finite number above 0 and at most 2**53 needed"
    assert set(verdicts.values()) == {("rejected", reason)}


async def test_an_update_that_is_not_what_the_client_announced_is_rejected() -> None:
    data = codec.encode(filled(9))

    def saying(**announced: Any) -> Callable[[pb.ModelUpdate], None]:
        return lambda update: update.MergeFrom(pb.ModelUpdate(**announced))

    faults = {"size": saying(size_bytes=7), "sha256": saying(sha256="00"), "failure": saying(failure="no data")}
    assert await judged({fault: (data, change) for fault, change in faults.items()}) == {
        "size": ("rejected", f"{len(data)} bytes were uploaded, 7 announced"),
        "sha256": ("rejected", f"sha256 {hashlib.sha256(data).hexdigest()}, 00 announced"),
        "failure": ("rejected", "the client could not train: no data"),
    }


async def test_an_update_that_was_never_uploaded_is_rejected_and_stays_so_when_it_comes_after_all() -> None:
    async with Federation() as federation, clients(federation, "bad", "good") as (bad, good):
        session_id = await started(federation)
        task = await bad.task()
        first = said(await bad.report(task, "u1"), "u1", "bad")
        assert first == ("rejected", "no upload u1 of client bad")
        await bad.upload(codec.encode(filled(9)), "u1")
        assert said(await bad.report(task, "u1"), "u1", "bad") == first
        await good.train(await good.task(), 3)
        assert await result(federation, session_id) == 3


async def test_an_upload_without_its_closing_message_is_refused_and_its_update_rejected() -> None:
    async with Federation() as federation, clients(federation, "bad", "good") as (bad, good):
        session_id = await started(federation)
        task = await bad.task()
        reply = await bad.upload(codec.encode(filled(9)), "u1", closing=False)
        assert (reply.status, reply.message) == (pb.FAILED, "the upload ended without its closing message (status OK)")
        assert said(await bad.report(task, "u1"), "u1", "bad") == ("rejected", "no upload u1 of client bad")
        await good.train(await good.task(), 3)
        assert await result(federation, session_id) == 3


async def test_an_upload_that_broke_off_is_sent_again_under_the_same_id_and_starts_afresh() -> None:
    async with Federation() as federation, clients(federation, "a") as (client,):
        session_id = await started(federation)
        task = await client.task()
        data = codec.encode(filled(3))
        await client.upload(data[:50], "u1", closing=False)
        assert (await client.upload(data, "u1", chunk_bytes=100)).status == pb.OK
        assert said(await client.report(task, "u1"), "u1", "a") == ("accepted", "")
        assert await result(federation, session_id) == 3


async def test_another_clients_upload_cannot_be_reported() -> None:
    async with Federation() as federation, clients(federation, "bad", "good") as (bad, good):
        session_id = await started(federation)
        task = await bad.task()
        await good.upload(codec.encode(filled(3)), "u1")
        assert said(await bad.report(task, "u1"), "u1", "bad") == ("rejected", "no upload u1 of client bad")
        assert said(await good.report(await good.task(), "u1"), "u1", "good") == ("accepted", "")
        assert await result(federation, session_id) == 3


async def test_an_upload_above_the_largest_model_is_refused_with_the_limit() -> None:
    async with Federation(max_model_bytes=1000) as federation, clients(federation, "a") as (client,):
        reply = await client.upload(bytes(1001), "u1", chunk_bytes=400)
        assert reply.status == pb.FAILED
        assert reply.message.startswith("more than max_model_bytes (1000)")
        await started(federation)
        assert said(await client.report(await client.task(), "u1"), "u1", "a")[1] == "no upload u1 of client a"


# ---- what is accepted


async def test_updates_are_counted_by_their_examples_and_each_is_told_so() -> None:
    async with Federation() as federation, clients(federation, "a", "b") as (a, b):
        session_id = await started(federation)
        assert said(await a.train(await a.task(), 1, update_id="u1"), "u1", "a") == ("accepted", "")
        assert said(await b.train(await b.task(), 4, num_examples=2, update_id="u2"), "u2", "b") == ("accepted", "")
        assert await result(federation, session_id) == 3  # (1 * 1 + 2 * 4) / 3


async def test_size_and_digest_that_are_right_are_accepted() -> None:
    data = codec.encode(filled(3))
    async with Federation() as federation, clients(federation, "a") as (client,):
        session_id = await started(federation)
        task = await client.task()
        await client.upload(data, "u1")
        announced = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert said(await client.report(task, "u1", **announced), "u1", "a") == ("accepted", "")
        assert await result(federation, session_id) == 3


async def test_a_deflated_npz_counts_as_a_stored_one() -> None:
    models = []
    for write in (codec.encode, deflated):
        async with Federation() as federation, clients(federation, "a", "b") as (a, b):
            session_id = await started(federation)
            for client, value in ((a, 0.1), (b, 0.7)):
                task = await client.task()
                await client.upload(write(filled(value)), "u")
                assert said(await client.report(task, "u"), "u", client.id) == ("accepted", "")
            session = await federation.ended(session_id)
            models.append(await federation.parameters(session["session_config"]["model_id"]))
    assert all(np.array_equal(stored, inflated) for stored, inflated in zip(*models, strict=True))
    assert models[0][0].dtype == np.float32


async def test_a_report_that_is_sent_again_while_the_first_is_being_checked_is_accepted_too_and_counted_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copies: list[Path] = []
    check = codec.check_update

    def noted(path: Path, expected: codec.Layout | None, **said: Any) -> codec.Checked:
        if expected is not None:  # not the seed
            copies.append(said["stored_copy"])
        return check(path, expected, **said)

    monkeypatch.setattr(codec, "check_update", noted)
    monkeypatch.setattr(intake, "CHECKED_AT_ONCE_BYTES", 0)
    monkeypatch.setattr(intake, "INFLATED_TWICE_BYTES", 0)
    async with Federation() as federation, clients(federation, "a", "b") as everybody:
        session_id = await started(federation)
        for client, value in zip(everybody, (1, 3), strict=True):
            task = await client.task()
            await client.upload(deflated(filled(value)), "u")
            replies = await asyncio.gather(*(client.report(task, "u") for _ in range(8)))
            assert {said(reply, "u", client.id) for reply in replies} == {("accepted", "")}
        assert await result(federation, session_id) == 2
    assert len(set(copies)) == len(copies), "two checks wrote the same file"


async def test_another_dtype_is_counted_and_the_model_keeps_its_own() -> None:
    async with Federation() as federation, clients(federation, "a") as (client,):
        session_id = await started(federation)
        task = await client.task()
        await client.upload(codec.encode([array.astype(np.int16) for array in filled(3)]), "u1")
        assert said(await client.report(task, "u1"), "u1", "a") == ("accepted", "")
        session = await federation.ended(session_id)
        parameters = await federation.parameters(session["session_config"]["model_id"])
        assert [array.dtype for array in parameters] == [np.float32, np.float64]
        assert await result(federation, session_id) == 3


# ---- what is not asked for, or not any more


async def test_an_update_that_the_round_did_not_wait_for_is_late_then_and_ever_after() -> None:
    async with Federation() as federation, clients(federation, "quick", "slow") as (quick, slow):
        session_id = await started(federation, buffer_size=1)
        task = await slow.task()
        await slow.upload(codec.encode(filled(9)), "u1")
        await quick.train(await quick.task(), 3)
        verdicts = [said(await slow.report(task, "u1"), "u1", "slow")]  # while the model is made, or just after
        assert await result(federation, session_id) == 3
        verdicts.append(said(await slow.report(task, "u1"), "u1", "slow"))
        assert verdicts == [("late", "round 1 is over")] * 2


async def test_a_second_update_for_a_task_is_a_duplicate_that_names_the_first() -> None:
    async with Federation() as federation, clients(federation, "a", "b") as (a, b):
        session_id = await started(federation)
        task = await a.task()
        await a.train(task, 3, update_id="first")
        duplicate = said(await a.train(task, 9, update_id="second"), "second", "a")
        assert duplicate == ("duplicate", "the task was closed by update first")
        await b.train(await b.task(), 3)
        assert await result(federation, session_id) == 3
        assert said(await a.report(task, "second"), "second", "a") == duplicate


async def test_the_same_update_uploaded_again_with_other_bytes_keeps_its_verdict_and_its_first_bytes() -> None:
    async with Federation() as federation, clients(federation, "a", "b") as (a, b):
        session_id = await started(federation)
        task = await a.task()
        await a.train(task, 3, update_id="u1")
        assert said(await a.train(task, 9, update_id="u1"), "u1", "a") == ("accepted", "")
        await b.train(await b.task(), 3)
        assert await result(federation, session_id) == 3


UNKNOWN = {
    "another attempt": "{session}/1/2/train/a",
    "a later round": "{session}/2/1/train/a",
    "a round before the first": "{session}/0/1/train/a",
    "a validation": "{session}/1/1/validate/a",
    "an unknown session": "nowhere/1/1/train/a",
    "another client": "{session}/1/1/train/b",
    "a number that no store can hold": "{session}/99999999999999999999/1/train/a",
    "a number below all": "{session}/-99999999999999999999/1/train/a",
    "a number below all, nowhere": "nowhere/-99999999999999999999/1/train/a",
    "half a character": "\ud800/1/1/train/a",
}


async def test_an_update_for_a_task_that_its_client_was_not_given_is_not_selected() -> None:
    async with Federation() as federation, clients(federation, "a", "b") as (a, b):
        session_id = await started(federation)
        task = await a.task()
        await a.upload(codec.encode(filled(9)), "u1")
        wrong = {
            unknown: pb.TaskRequest(data=json.dumps({"_task_id": task_id.format(session=session_id)}))
            for unknown, task_id in UNKNOWN.items()
        }
        first = {unknown: said(await a.report(wrong[unknown], "u1"), "u1", "a") for unknown in wrong}
        assert {verdict for verdict, _ in first.values()} == {"not_selected"}
        await a.train(task, 3)
        await b.train(await b.task(), 3)
        assert await result(federation, session_id) == 3
        assert {unknown: said(await a.report(wrong[unknown], "u1"), "u1", "a") for unknown in wrong} == first


async def test_an_update_of_a_client_that_the_round_did_not_ask_is_not_selected_then_and_ever_after() -> None:
    async with Federation() as federation, clients(federation, "asked") as (asked,):
        session_id = await started(federation)
        task = await asked.task()
        async with WireClient(port(federation), "stranger") as stranger:
            theirs = pb.TaskRequest(data=task.data.replace("/train/asked", "/train/stranger"))
            first = said(await stranger.train(theirs, 9, update_id="u1"), "u1", "stranger")
            assert first == ("not_selected", "no such task was issued")
            await asked.train(task, 3)
            assert await result(federation, session_id) == 3
            assert said(await stranger.report(theirs, "u1"), "u1", "stranger") == first


async def test_an_update_out_of_nowhere_is_not_selected() -> None:
    async with Federation() as federation, clients(federation, "a") as (client,):
        echoes = [{}, {"session_id": "nowhere", "round_id": "1"}, {"session_id": "\ud800", "round_id": "\ud800"}]
        for echo in (*echoes, {"_task_id": "garbage"}, {"_task_id": 5}):
            nothing = pb.TaskRequest(model_id="none", data=json.dumps(echo))
            verdict = said(await client.train(nothing, 9, update_id="u1"), "u1", "a")
            assert verdict == ("not_selected", "no such task was issued to this client")


async def test_an_update_of_round_1_sent_in_round_2_is_judged_by_round_1() -> None:
    async with Federation() as federation, clients(federation, "a", "b") as (a, b):
        session_id = await started(federation, rounds=2, buffer_size=1)
        missed, first = await a.task(), await b.task()
        await b.train(first, 3)
        await committed(federation, session_id, 1)
        second = await a.task()
        assert second.round == 2
        late = said(await a.train(missed, 9, update_id="u1"), "u1", "a")
        assert late == ("late", "round 1 is over")
        again = said(await b.train(first, 9, update_id="u2"), "u2", "b")
        assert again[0] == "duplicate"
        await a.train(second, 5)
        assert await result(federation, session_id) == 5
        assert said(await a.report(missed, "u1"), "u1", "a") == late
        assert said(await b.report(first, "u2"), "u2", "b") == again


async def test_a_verdict_outlives_its_round_its_session_and_the_server(tmp_path: Path) -> None:
    heard: dict[str, list[tuple[str, str]]] = {"kept": [], "bad": [], "second": [], "slow": [], "none": []}

    async def ask(good: WireClient, bad: WireClient, slow: WireClient) -> None:
        for client, update_id, task in (
            (good, "kept", tasks[0]),
            (good, "second", tasks[0]),
            (bad, "bad", tasks[1]),
            (slow, "slow", tasks[2]),
            (slow, "none", pb.TaskRequest(data=tasks[0].data)),
        ):
            heard[update_id].append(said(await client.report(task, update_id), update_id, client.id))

    async with (
        Federation(data_dir=tmp_path) as federation,
        clients(federation, "good", "bad", "slow") as (good, bad, slow),
    ):
        session_id = await started(federation, rounds=2, buffer_size=1)
        tasks = [await good.task(), await bad.task(), await slow.task()]
        await bad.upload(spoilt(np.nan), "bad")
        await bad.report(tasks[1], "bad")
        await good.train(tasks[0], 3, update_id="kept")
        await committed(federation, session_id, 1)
        await ask(good, bad, slow)
        await good.train(await good.task(), 5)
        assert await result(federation, session_id) == 5
        await ask(good, bad, slow)
    async with (
        Federation(data_dir=tmp_path) as federation,
        clients(federation, "good", "bad", "slow") as (good, bad, slow),
    ):
        await ask(good, bad, slow)
        assert await result(federation, session_id) == 5
    assert {update_id: set(verdicts) for update_id, verdicts in heard.items()} == {
        "kept": {("accepted", "")},
        "second": {("duplicate", "the task was closed by update kept")},
        "bad": {("rejected", "array '1' is not finite: nan at flat index 5")},
        "slow": {("late", "round 1 is over")},
        "none": {("not_selected", "no such task was issued to this client")},
    }


async def test_a_restart_in_mid_round_keeps_verdicts_uploads_and_open_tasks(tmp_path: Path) -> None:
    async with Federation(data_dir=tmp_path) as federation, clients(federation, "a", "b", "c") as (a, b, c):
        session_id = await started(federation)
        tasks = [await a.task(), await b.task(), await c.task()]
        await a.train(tasks[0], 1, update_id="u1")
        await b.upload(spoilt(np.inf), "u2")
        rejected = said(await b.report(tasks[1], "u2"), "u2", "b")
        await c.upload(codec.encode(filled(5)), "u3")  # its report is lost with the server
    async with Federation(data_dir=tmp_path) as federation, clients(federation, "a", "b", "c") as (a, b, c):
        assert (await c.task()).correlation_id == tasks[2].correlation_id
        assert said(await a.report(tasks[0], "u1"), "u1", "a") == ("accepted", "")
        assert said(await b.report(tasks[1], "u2"), "u2", "b") == rejected
        assert said(await c.report(tasks[2], "u3"), "u3", "c") == ("accepted", "")
        assert await result(federation, session_id) == 3


# ---- which task it is


async def test_a_task_is_named_by_its_id_in_the_echo_or_found_by_session_and_round() -> None:
    names = ["meta", "object", "config", "round", "model", "field"]
    async with Federation() as federation, clients(federation, *names) as everybody:
        session_id = await started(federation)
        for client in everybody:
            task = await client.task()
            echo = json.loads(task.data)
            assert echo.pop("_task_id") == task.task_id
            how: dict[str, dict[str, Any]] = {
                "meta": {},
                "object": {"meta": {"config": json.loads(task.data)}},
                "config": {"meta": {"config": None}, "config": task.data},  # as C++ clients
                "round": {"meta": {"config": json.dumps(echo)}},
                "model": {"meta": {"config": None}},  # the client's one open task of the model
                "field": {"meta": {"config": None}, "model_id": "", "task_id": task.task_id},
            }
            await client.upload(codec.encode(filled(3)), "u")
            verdict = said(await client.report(task, "u", **how[client.id]), "u", client.id)
            assert verdict == ("accepted", ""), client.id
        assert await result(federation, session_id) == 3


async def test_an_update_that_could_answer_two_open_tasks_is_not_guessed() -> None:
    async with Federation() as federation, clients(federation, "a") as (client,):
        seed = await federation.add_seed(filled(0))
        sessions = [await federation.create_session(seed, rounds=1) for _ in range(2)]
        for session_id in sessions:
            await federation.start(session_id)
        tasks = [await client.task(), await client.task()]
        await client.upload(codec.encode(filled(9)), "u1")
        verdict, reason = said(await client.report(tasks[0], "u1", meta={"config": None}), "u1", "a")
        assert (verdict, reason) == ("not_selected", "no such task was issued to this client")
        for value, task in enumerate(tasks, start=1):
            await client.train(task, value)
        assert [await result(federation, session_id) for session_id in sessions] == [1, 2]


async def test_an_sdk_client_that_calls_itself_by_its_name_is_known_by_the_id_of_its_stream() -> None:
    async with Federation() as federation, WireClient(port(federation), "id-1", name="Site 1") as client:
        client.attach()
        await online(federation, "id-1")
        session_id = await started(federation, rounds=2, validate=True)
        for value in (1, 2):
            task = await client.task()
            assert (task.type, task.receiver.client_id) == (pb.MODEL_UPDATE, "id-1")
            verdict = said(await client.train(task, value, update_id=f"u{value}"), f"u{value}", "id-1")
            assert verdict == ("accepted", "")
            validation = await client.task()
            assert validation.type == pb.MODEL_VALIDATION
            await client.validate(validation, loss=0.5)
        assert await result(federation, session_id) == 2
        found = await federation.call("GET", "/api/v1/validations/", "result")
        assert [validation["sender"]["client_id"] for validation in found] == ["id-1"] * 2


async def test_an_sdk_client_is_known_by_its_name_before_its_stream_is_back(tmp_path: Path) -> None:
    async with Federation(data_dir=tmp_path) as federation, WireClient(port(federation), "id-1", name="Site") as client:
        client.attach()
        await online(federation, "id-1")
        session_id = await started(federation)
        task = await client.task()
    async with Federation(data_dir=tmp_path) as federation, WireClient(port(federation), "id-1", name="Site") as client:
        assert said(await client.train(task, 3, update_id="u1"), "u1", "id-1") == ("accepted", "")
        assert await result(federation, session_id) == 3
