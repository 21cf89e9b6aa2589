"""Bytes from strangers, drawn by hypothesis; `make fuzz` goes on where this ends."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings

from fl_client.manifest import PackageError, read_manifest
from fl_client.wire import fl_pb2 as pb
from tests.fuzz.targets import LAUGHS, MERGES, METHODS, TARGETS, mutations, rest_api, rest_test, rpc_test, wire


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
