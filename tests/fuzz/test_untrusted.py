"""Bytes from strangers, drawn by hypothesis; `make fuzz` goes on where this ends."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import grpc
import httpx
import pytest
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings

from fl_client.manifest import PackageError, read_manifest
from fl_client.wire import fl_pb2 as pb
from fl_server.combiner import convert
from fl_server.combiner.servicer import Servicer, token_of
from fl_server.testing import Federation
from tests.fuzz.messages import HOSTILE_IDS
from tests.fuzz.targets import LAUGHS, MERGES, METHODS, TARGETS, mutations, rest_api, rest_test, rpc_test, wire
from tests.server.tokens import token
from tests.server.wire_client import WireClient, port


@pytest.mark.parametrize("name", ["codec", "package", "jwt"])
def test_hostile_bytes_break_no_promise(name: str) -> None:
    with TARGETS[name]() as target:

        @settings(max_examples=300, deadline=None)
        @given(mutations(target.seeds))
        def thrown(data: bytes) -> None:
            target.throw(data)

        for seed in target.seeds:
            target.throw(seed)
        thrown()


def test_no_call_of_a_client_changes_what_is_not_its_own_or_ends_as_none_may() -> None:
    with wire(gated=True) as opened:
        for rpc in METHODS:
            rpc_test(opened, [rpc], gated=True, examples=25)()


def test_no_call_ends_as_none_may_where_authentication_is_off() -> None:
    with wire(gated=False) as opened:
        for rpc in METHODS:
            rpc_test(opened, [rpc], gated=False, examples=25)()


FOUND = {  # by fuzzing, once: a message of a client that the server answered with an incident, and so without an end
    "a time beyond the calendar": pb.Status(timestamp=Timestamp(seconds=253_402_300_800)),
    "a time before it": pb.ModelValidation(timestamp=Timestamp(seconds=-(2**63))),
    "nanoseconds beyond a second": pb.ModelPrediction(timestamp=Timestamp(seconds=1, nanos=2**31 - 1)),
    "a role of a newer client": pb.ModelMetric(sender={"role": 99}, metrics=[{"key": "loss"}]),
    "a level of a newer client": pb.Status(log_level=99, type=99),
}


@pytest.mark.parametrize("message", FOUND.values(), ids=FOUND)
def test_what_fuzzing_found_is_stored(message: Message) -> None:
    [rpc] = (rpc for rpc, method in METHODS.items() if method.input_type is message.DESCRIPTOR)
    with wire(gated=False) as opened:
        assert opened.send(rpc, [message.SerializeToString()], [("client", "a")]) is grpc.StatusCode.OK


def test_bytes_that_are_no_message_are_answered_come_again_and_only_behind_the_gate() -> None:
    """gRPC itself would say UNKNOWN, with a traceback in the log, to whoever sends them."""
    with wire(gated=True) as opened:
        for rpc in METHODS:
            assert opened.send(rpc, [b"\xff"], []) is grpc.StatusCode.UNAUTHENTICATED
    with wire(gated=False) as opened:
        for rpc, method in METHODS.items():
            unread = method.client_streaming and not hasattr(opened.made.servicer, method.name)
            expected = grpc.StatusCode.UNIMPLEMENTED if unread else grpc.StatusCode.UNAVAILABLE
            assert opened.send(rpc, [b"\xff"], [("client", "a")]) is expected, rpc


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (LAUGHS, r"entry_points: \[\[\["),
        (MERGES, r"no YAML: merge keys"),
        (b"#" * 300_000, r"more than 262144 bytes"),
        (b"? " + b"k" * 200_000 + b"\n: 1", r"k: unknown"),
    ],
    ids=["aliases", "merges", "long", "a long key"],
)
def test_a_manifest_cannot_grow_beyond_its_size(manifest: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "fedn.yaml").write_bytes(manifest)
    with pytest.raises(PackageError, match=said) as refused:
        read_manifest(tmp_path)
    assert len(str(refused.value)) < 1000


def test_no_request_is_a_fault_of_the_server_and_one_that_is_refused_changes_nothing() -> None:
    with rest_api() as opened:
        rest_test(opened, examples=300)()


async def test_no_id_on_the_wire_reaches_a_file_or_ends_anything(tmp_path: Path) -> None:
    """Of client, model and upload; in metadata, messages, paths and bodies, over both ports."""
    codes, statuses = set(), set()
    async with Federation(data_dir=tmp_path / "data") as federation:
        for id in HOSTILE_IDS:
            name = id if id.isprintable() and id.isascii() and id.strip() == id else "named"
            async with WireClient(port(federation), id, name=name) as client:
                stream = client.attach()
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await stream.wait_for_connection()
                answered = await client.upload(b"no model", id) if id else None
                assert answered is None or answered.status in (pb.OK, pb.FAILED)
                assert [found.status for found in await client.download(id)] == [pb.FAILED]
                update = pb.ModelUpdate(model_update_id=id, task_id=id, model_id=id, meta="{}")
                assert (await client.send(update)).verdict == pb.VERDICT_NOT_SELECTED
                codes |= {await stream.code()} if stream.done() else set()
            path = quote(id, safe="")
            for route in ("clients/{}", "models/{}/download", "sessions/{}", "packages/{}", "predictions/{}"):
                url = httpx.URL(federation.server.api_url).copy_with(raw_path=f"/api/v1/{route.format(path)}".encode())
                statuses.add((await federation.http.get(url)).status_code)
            added = await federation.http.post("/api/v1/clients/add", json={"name": "n", "client_id": id})
            statuses.add(added.status_code)
        assert codes <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert statuses <= {200, 400, 404}
        assert (await federation.http.get("/ready")).status_code == 200
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert all(len(path.name) < 100 and path.name.isascii() for path in (tmp_path / "data").rglob("*"))


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_atheris_finds_nothing_in_a_few_thousand_runs(name: str, tmp_path: Path) -> None:
    """`make fuzz` goes on for longer."""
    runs = "2000" if name in ("rpcs", "rest") else "10000"
    command = [sys.executable, "-m", "tests.fuzz", name, "--runs", runs, "--seconds", "300", "--folder", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, timeout=590, check=False)
    said = ended.stderr.decode(errors="replace")
    assert ended.returncode == 0, said[-3000:]
    assert f"Done {runs} runs" in said


def test_a_server_that_believes_what_a_caller_calls_itself_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Servicer, "check_owner", lambda self, context, sender: token_of.set(None))
    until = int(time.time()) + 60
    said = [("client", "a"), ("authorization", f"Bearer {token('client', client_id='x', exp=until)}")]
    with pytest.raises(AssertionError), wire(gated=True) as opened:  # noqa: PT012  said when it is left
        lie = pb.ModelUpdate(task_id=opened.tasks[0].task_id, failure="a lie")
        opened.send("fedn.Combiner/SendModelUpdate", [lie.SerializeToString()], said)


def test_a_fault_in_a_handler_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "json_object", json.loads)
    with wire(gated=False) as opened, pytest.raises(AssertionError, match="rpc failed"):
        opened.send("fedn.Combiner/SendModelUpdate", [pb.ModelUpdate(meta="{").SerializeToString()], [])
