"""A large chunk of an upload is found where it lies: as protobuf reads it, whatever the message looks like."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from fl_client.wire import fl_pb2 as pb
from fl_server.combiner import convert

LARGE = b"\x1a\xff" * convert.LARGE_CHUNK_BYTES  # looks like tags of the field, too


def read(message: bytes) -> tuple[str, bytes, int]:
    chunk = convert.chunk(message)
    return chunk.id, bytes(chunk.data), chunk.status


def read_by_protobuf(message: bytes) -> tuple[str, bytes, int]:
    whole = pb.ModelRequest.FromString(message)
    return whole.id, whole.data, whole.status


def test_large_data_are_not_copied() -> None:
    message = pb.ModelRequest(id="u", data=LARGE, status=pb.IN_PROGRESS).SerializeToString()
    data = convert.chunk(message).data
    assert isinstance(data, memoryview)
    assert data.obj is message
    assert read(message) == ("u", LARGE, pb.IN_PROGRESS)


def test_data_that_would_keep_a_larger_message_in_memory_are_copied() -> None:
    beside = b"\x7a" + b"\x80\x80\x40" + bytes(1 << 20)  # a field 15 that is unknown, of 1 MiB
    message = pb.ModelRequest(id="u", data=LARGE, status=pb.OK).SerializeToString() + beside
    assert isinstance(convert.chunk(message).data, bytes)
    assert read(message) == ("u", LARGE, pb.OK)


@given(
    st.lists(
        st.sampled_from(
            [
                pb.ModelRequest(data=LARGE),
                pb.ModelRequest(data=b"small"),
                pb.ModelRequest(id="u"),
                pb.ModelRequest(id="v" * 300),
                pb.ModelRequest(status=pb.OK),
                pb.ModelRequest(sender=pb.Client(name="n" * 200)),
            ]
        ),
        max_size=5,
    )
)
def test_fields_in_any_order_and_more_than_once_are_read_as_protobuf_reads_them(parts: list[Any]) -> None:
    message = b"".join(part.SerializeToString() for part in parts)
    assert read(message) == read_by_protobuf(message)


@given(st.binary(max_size=12), st.binary(max_size=12), st.integers(0, 2 * len(LARGE)))
def test_what_protobuf_refuses_is_refused(before: bytes, after: bytes, cut: int) -> None:
    message = (before + pb.ModelRequest(data=LARGE).SerializeToString())[:cut] + after
    try:
        expected = read_by_protobuf(message)
    except DecodeError:
        with pytest.raises(DecodeError):
            convert.chunk(message)
    else:
        assert read(message) == expected


@pytest.mark.parametrize(
    "flood",
    [
        pb.ModelRequest(status=pb.FAILED).SerializeToString() * 100_000,
        b"\x80" * 100_000 + b"\x01",
        b"\x28" + b"\xff" * 100_000,
    ],
    ids=["fields", "a tag without an end", "a number without an end"],
)
def test_a_flood_of_fields_or_of_a_numbers_bytes_is_left_to_protobuf(flood: bytes) -> None:
    assert convert._data_field(flood + pb.ModelRequest(data=LARGE).SerializeToString()) is None
