"""Bytes from strangers: each fault is a BadModel with one line that names it, and nothing else is ever raised."""

import io
import pickle
import struct
import tracemalloc
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from fl_client.wire import codec, npz
from fl_client.wire.codec import MAX_ARRAYS, BadModel, check_update, decode, encode
from tests.fuzz.messages import damaged


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=allow_pickle)
    return out.getvalue()


def header(text: str, values: bytes = b"") -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode("latin-1") + values


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return out.getvalue()


def patched(data: bytes, marker: bytes, offset: int, patch: bytes) -> bytes:
    """The bytes with `patch` at `offset` from the last `marker`."""
    at = data.rindex(marker) + offset
    return data[:at] + patch + data[at + len(patch) :]


def one(member: bytes) -> bytes:
    return zipped(("0.npy", member))


def shaped(shape: str) -> bytes:
    return header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({shape}), }}")


GOOD = zipped(("0.npy", npy(np.arange(4.0))))
TWO = zipped(("0.npy", npy(np.arange(4.0))), ("1.npy", npy(np.arange(5.0))))
DEFLATED = zipped(("0.npy", npy(np.arange(4000.0))), method=zipfile.ZIP_DEFLATED)
CENTRAL, END = b"PK\1\2", b"PK\5\6"


def declared(size_bytes: int, after: bytes = b"") -> bytes:
    """4000 zeros deflated, with this inflated size in directory and npy header; `after`: follows the deflate stream."""
    values = (size_bytes - 128) // 8
    head = npy(np.zeros(0))[:128].replace(b"(0,), }" + b" " * len(str(values)), f"({values},), }} ".encode())
    assert len(head) == 128
    raw = zlib.compressobj(wbits=-15)
    packed = raw.compress(head + bytes(32_000)) + raw.flush() + after
    data = zipped(("0.npy", packed))
    data = patched(data, b"PK\3\4", 8, struct.pack("<H", 8))
    data = patched(data, CENTRAL, 10, struct.pack("<H", 8))
    return patched(data, CENTRAL, 24, struct.pack("<L", size_bytes))


class Pipe(io.RawIOBase):
    """Where a zip is written to with data descriptors."""

    def __init__(self) -> None:
        self.written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.written += data
        return len(data)

    def tell(self) -> int:
        raise OSError("a pipe has no position")


def piped(**arrays: np.ndarray) -> bytes:
    pipe = Pipe()
    np.savez(pipe, **arrays)  # type: ignore[arg-type]
    return bytes(pipe.written)


PIPED = piped(a=np.arange(3.0), b=np.arange(4))

with pytest.warns(UserWarning, match="Duplicate name"):
    TWICE = zipped(("0.npy", npy(np.arange(4.0))), ("0.npy", npy(np.arange(4.0))))

FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not an npz"),
    "text": (b"hello, this is no model at all, sorry", "not an npz"),
    "pickle": (pickle.dumps([1, 2, 3]) * 10, "not an npz"),
    "npy without zip": (npy(np.zeros(3)), "not an npz"),
    "no members": (zipped(), "no arrays"),
    "cut in the data": (GOOD[:100], "cut off"),
    "cut in the end record": (GOOD[:-1], "cut off"),
    "trailing bytes": (GOOD + b"x", "cut off, or has bytes after its end"),
    "trailing zip": (GOOD + GOOD, "not where its end record says"),
    "leading bytes": (b"PK\3\4" + GOOD, "not where its end record says"),
    "bytes before the first member": (
        patched(
            patched(b"PK\3\4" + GOOD, CENTRAL, 42, struct.pack("<L", 4)),
            END,
            16,
            struct.pack("<L", GOOD.index(CENTRAL) + 4),
        ),
        "4 bytes before the zip's first member",
    ),
    "a byte between the members": (
        patched(GOOD.replace(CENTRAL, b"?" + CENTRAL), END, 16, struct.pack("<L", GOOD.index(CENTRAL) + 1)),
        "1 bytes after member '0.npy' belong to nothing",
    ),
    "an encrypted member": (patched(GOOD, CENTRAL, 8, b"\1\0"), "encrypted"),
    "bzip2": (zipped(("0.npy", npy(np.zeros(3))), method=zipfile.ZIP_BZIP2), "compressed by method 12"),
    "lzma": (zipped(("0.npy", npy(np.zeros(3))), method=zipfile.ZIP_LZMA), "compressed by method 14"),
    "not npy by name": (zipped(("0.npy", npy(np.zeros(3))), ("evil.pkl", b"x")), "'evil.pkl' is no .npy"),
    "not npy by content": (one(b"PKPKPKPKPKPKPKPK"), "no npy header"),
    "a directory": (zipped(("a/", b"")), "'a/' is no .npy"),
    "the same name twice": (TWICE, "two arrays are named '0'"),
    "one member for two names": (patched(TWO, CENTRAL, 42, struct.pack("<L", 0)), "overlaps another"),
    "a member beyond the file": (patched(GOOD, CENTRAL, 20, struct.pack("<LL", 10**6, 10**6)), "cut off"),
    "a member at no header": (patched(TWO, CENTRAL, 42, struct.pack("<L", 7)), "not where the zip's directory says"),
    "another name inside": (patched(GOOD, CENTRAL, 46, b"1.npy"), "contradicts"),
    "two sizes of stored data": (patched(GOOD, CENTRAL, 24, struct.pack("<L", 100)), "two sizes"),
    "a count above the members": (patched(GOOD, END, 8, struct.pack("<HH", 2, 2)), "shorter than its count"),
    "a count below the members": (patched(TWO, END, 8, struct.pack("<HH", 1, 1)), "longer than its count"),
    "several disks": (patched(GOOD, END, 4, struct.pack("<HH", 1, 1)), "split"),
    "an object array": (one(npy(np.array([{}], object), allow_pickle=True)), "dtype '|O'"),
    "a text array": (one(npy(np.array(["abc"]))), "dtype '<U3'"),
    "a bytes array": (one(npy(np.array([b"abc"]))), "dtype '|S3'"),
    "a void array": (one(npy(np.zeros(2, "V4"))), "dtype '|V4'"),
    "records": (one(npy(np.zeros(2, [("a", "f8"), ("b", "i4")]))), "no plain array"),
    "complex": (one(npy(np.zeros(2, complex))), "dtype '<c16'"),
    "bool": (one(npy(np.zeros(2, bool))), "dtype '|b1'"),
    "dates": (one(npy(np.zeros(2, "M8[s]"))), "dtype '<M8[s]'"),
    "too few values": (zipped(("0.npy", npy(np.arange(4.0))[:-1])), "has 31 bytes, expected 32"),
    "too many values": (zipped(("0.npy", npy(np.arange(4.0)) + b"x")), "has 33 bytes, expected 32"),
    "an unknown dtype": (one(header("{'descr': '<f9', 'fortran_order': False, 'shape': (), }")), "unknown dtype"),
    "code for a header": (one(header("__import__('os').getcwd()")), "no plain array"),
    "a nested header": (one(header("(" * 3000)), "no plain array"),
    "an endless header": (one(header(" " * 65_000)), "longer than its data or 4096"),
    "a header without shape": (
        one(header("{'descr': '<f8', 'fortran_order': False, 'descr': '<f8'}")),
        "no plain array",
    ),
    "a header beyond the data": (one(b"\x93NUMPY\1\0\xff\xff{}"), "longer than its data"),
    "an odd blank in the shape": (one(shaped("1\x1d,")), "no plain array"),
    "a huge shape": (one(shaped("9999999999, 9999999999")), "impossible shape"),
    "a huge empty shape": (one(shaped("0, 999999999999999999")), "impossible shape"),
    "too many dimensions": (one(shaped("1, " * 40)), "impossible shape"),
    "deflated to less than declared": (declared(40_000), "inflates to less"),
    "deflated to more than declared": (declared(8_000), "inflates to more"),
    "bytes after the deflate stream": (declared(32_128, after=b"x"), "bytes after its end"),
    "declared beyond deflate's reach": (declared(900_000), "cannot inflate to"),
    "declared beyond the limit": (declared(3_000_000), "larger than the 1000000 bytes allowed"),
    "a bomb": (
        zipped(*((f"{i}.npy", npy(np.zeros(50_000))) for i in range(3)), method=zipfile.ZIP_DEFLATED),
        "larger than the 1000000",
    ),
    "a broken deflate stream": (patched(DEFLATED, b"PK\3\4", 200, b"\xff" * 50), ""),
    "a wrong crc of deflated data": (patched(DEFLATED, CENTRAL, 16, b"\0\0\0\0"), "CRC differs"),
    "a nul in a name": (GOOD.replace(b"0.npy", b"\0.npy"), "cannot be named"),
}


def read(data: bytes) -> list[np.ndarray]:
    return decode(data, max_bytes=1_000_000)


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_bytes_are_refused_with_the_reason(fault: str, tmp_path: Path) -> None:
    data, reason = FAULTS[fault]
    with pytest.raises(BadModel) as refusal:
        read(data)
    message = str(refusal.value)
    assert reason in message
    assert "\n" not in message and len(message) < 250
    path = tmp_path / "update"
    path.write_bytes(data)
    said = check_update(path, None, max_bytes=1_000_000, stored_copy=tmp_path / "stored").fault
    assert check_update(data, None, max_bytes=1_000_000).fault == said
    assert said is not None and reason in said
    assert not (tmp_path / "stored").exists()


def test_an_absurd_count_is_refused_before_it_is_read() -> None:
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, MAX_ARRAYS + 1, MAX_ARRAYS + 1, 0, 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1)
    end = struct.pack("<4s4H2LH", END, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    with pytest.raises(BadModel, match="100001 arrays, at most 100000"):
        read(record + locator + end)


def test_zip64_archives_are_read() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for index in range(70_000):  # more than 16 bits can count
            archive.writestr(f"{index}.npy", HEAD_OF_NOTHING)
    assert len(codec.read(out.getvalue(), codec.NUMPY, max_bytes=100_000_000).layout) == 70_000


HEAD_OF_NOTHING = npy(np.zeros(0))


def test_64_bit_sizes_are_read() -> None:
    data = patched(GOOD, CENTRAL, 20, struct.pack("<LL", 0xFFFFFFFF, 0xFFFFFFFF))
    size_bytes = 128 + 32
    extra = struct.pack("<HHQQ", 1, 16, size_bytes, size_bytes)
    data = patched(data, CENTRAL, 30, struct.pack("<H", len(extra)))
    end = data.index(END)
    data = data[:end] + extra + data[end:]
    data = patched(data, END, 12, struct.pack("<L", end + len(extra) - data.index(CENTRAL)))
    np.testing.assert_array_equal(read(data)[0], np.arange(4.0))
    with pytest.raises(BadModel, match="64-bit size is missing"):
        read(patched(GOOD, CENTRAL, 20, struct.pack("<LL", 0xFFFFFFFF, 0xFFFFFFFF)))


def test_a_lie_about_the_size_costs_no_memory() -> None:
    lies = [
        declared(4_000_000_000),
        one(shaped("500000000,")),
    ]
    tracemalloc.start()
    try:
        for data in lies:
            with pytest.raises(BadModel):
                decode(data, max_bytes=1 << 40)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


DAMAGED = damaged(st.sampled_from([GOOD, TWO, DEFLATED, encode([np.zeros((2, 2)), np.zeros(3)], ["a", "b"])]))


def verdict(data: bytes) -> object:
    try:
        return codec.read(data, codec.NUMPY, max_bytes=100_000)._members  # type: ignore[attr-defined]
    except BadModel as refusal:
        return str(refusal)


def unrecognised(data: bytes) -> object:
    """As by a process that has read no npz before."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(npz, "_structures", {})
        return verdict(data)


@settings(max_examples=1000)
@given(st.data())
def test_an_npz_like_the_one_before_is_read_as_if_there_had_been_none(data: st.DataObject) -> None:
    """Times and CRCs are not looked at, nor is a descriptor's content; any other byte counts as ever."""
    original = data.draw(st.sampled_from([GOOD, TWO, encode([np.ones((2, 2)), np.ones(3)], ["a", "b"]), PIPED]))
    verdict(original)
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 2))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    found, expected = verdict(bytes(changed)), unrecognised(bytes(changed))
    assert without_crc(found) == without_crc(expected)


def test_every_byte_of_the_structure_counts() -> None:
    for original in (TWO, PIPED):
        for at in range(len(original)):
            verdict(original)
            changed = original[:at] + bytes([original[at] ^ 0x41]) + original[at + 1 :]
            assert without_crc(verdict(changed)) == without_crc(unrecognised(changed)), at


def test_a_model_that_is_recognised_may_be_larger_than_another_caller_allows() -> None:
    verdict(TWO)
    with pytest.raises(BadModel, match="larger than the 100 bytes"):
        codec.read(TWO, codec.NUMPY, max_bytes=100)


def test_only_the_last_few_structures_are_remembered() -> None:
    for size in range(30):
        verdict(encode([np.zeros(size)]))
    assert len(npz._structures) <= 8


def without_crc(members: object) -> object:
    """Of stored members it is not looked at."""
    if isinstance(members, str):
        return members
    assert isinstance(members, tuple)
    return [replace(member, crc=0) if not member.deflated else member for member in members]


@settings(max_examples=500)
@given(DAMAGED)
def test_damage_is_a_bad_model_or_a_model_and_never_another_error(broken: bytes) -> None:
    try:
        read(broken)
    except BadModel:
        pass
