"""binaryhelper and safetensors: what is written is read again, bytes from strangers are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from fl_client.wire import codec
from fl_client.wire.codec import BINARY, HELPERS, NUMPY, SAFETENSORS, BadModel, decode, encode
from fl_client.wire.safetensors import MAX_HEADER_BYTES

numbers = st.one_of(
    hnp.floating_dtypes(sizes=(16, 32, 64), endianness="?"),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
)
arrays = hnp.arrays(numbers, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
flat = hnp.arrays(np.float64, st.integers(1, 20), elements=st.floats(allow_nan=False, allow_infinity=False))
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)

# From the format's own library (safetensors 0.8): {"a": float32 0 1 2, "b": [[1.5]]}
THEIRS = (
    b'p\0\0\0\0\0\0\0{"b":{"dtype":"F64","shape":[1,1],"data_offsets":[0,8]},'
    b'"a":{"dtype":"F32","shape":[3],"data_offsets":[8,20]}}  '
    b"\0\0\0\0\0\0\xf8?\0\0\0\0\0\0\x80?\0\0\0@"
)


def layout_of(data: bytes, helper: str) -> codec.Layout:
    return codec.read(data, helper, max_bytes=10_000).layout


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@given(st.lists(arrays, min_size=1, max_size=12))
def test_safetensors_decodes_to_what_was_encoded_in_the_order_of_the_numbers(parameters: list[np.ndarray]) -> None:
    data = encode(parameters, helper=SAFETENSORS)
    for actual, expected in zip(decode(data, helper=SAFETENSORS), parameters, strict=True):
        assert actual.dtype == expected.dtype.newbyteorder("<") and actual.shape == expected.shape
        np.testing.assert_array_equal(actual, expected)
        assert actual.flags.writeable and actual.flags.c_contiguous and actual.flags.aligned


@given(st.lists(texts.filter(lambda name: name != "__metadata__"), min_size=1, max_size=5, unique=True))
def test_any_text_can_name_an_array_of_a_safetensors_file_and_the_order_is_theirs(names: list[str]) -> None:
    data = encode([np.array(float(index)) for index in range(len(names))], names, helper=SAFETENSORS)
    found = [spec.name for spec in layout_of(data, SAFETENSORS)]
    assert set(found) == set(names)
    if not all(name.isascii() and name.isdigit() for name in names):
        assert found == sorted(names)


def test_what_the_formats_own_library_writes_is_read() -> None:
    a, b = decode(THEIRS, helper=SAFETENSORS)
    assert (a.tolist(), a.dtype, b.tolist(), b.dtype) == ([0, 1, 2], np.float32, [[1.5]], np.float64)
    with_texts = safetensors({"__metadata__": {"format": "pt", 'a"}': "{[\\"}, "a": entry()}, bytes(8))
    assert [spec.name for spec in layout_of(with_texts, SAFETENSORS)] == ["a"]


@given(st.lists(flat, min_size=1, max_size=4))
def test_binary_is_the_flat_arrays_one_after_the_other(parameters: list[np.ndarray]) -> None:
    data = encode(parameters, helper=BINARY)
    assert data == np.concatenate(parameters).astype("<f8").tobytes()
    [array] = decode(data, helper=BINARY)
    np.testing.assert_array_equal(array, np.concatenate(parameters))
    assert array.flags.writeable


def test_binary_takes_only_flat_arrays_of_real_numbers_and_casts_them() -> None:
    assert decode(encode([np.arange(3, dtype=">i2")], helper=BINARY), helper=BINARY)[0].tolist() == [0, 1, 2]
    for wrong, said in (
        ([np.zeros((2, 3))], "shape (2, 3)"),
        ([np.array(["a"])], "dtype <U1"),
        ([], "a value at least"),
    ):
        with pytest.raises(BadModel, match=said.replace("(", r"\(").replace(")", r"\)")):
            encode(wrong, helper=BINARY)


@pytest.mark.parametrize(
    ("array", "name", "said"),
    [
        (np.zeros(2, bool), "a", "dtype bool"),
        (np.zeros(2, complex), "a", "dtype complex128"),
        (np.zeros(2, np.longdouble), "a", "cannot be in a safetensors file"),
        (np.zeros(2), "__metadata__", "cannot be in a safetensors file"),
        (np.zeros(2), "a\0", "cannot be named"),
    ],
)
def test_what_a_safetensors_file_cannot_hold_is_refused(array: np.ndarray, name: str, said: str) -> None:
    with pytest.raises(BadModel, match=said):
        encode([array], [name], helper=SAFETENSORS)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "0 bytes"),
    "a length alone": (bytes(8), "no JSON object"),
    "text": (b"hello, this is no model", "a header of"),
    "a header beyond the file": (safetensors({"a": entry()})[:20], "longer than the file"),
    "a header above the limit": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "at most 100000000 allowed"),
    "a list": (safetensors(b"[1]"), "no JSON object"),
    "no arrays": (safetensors({}), "no arrays"),
    "metadata alone": (safetensors({"__metadata__": {"a": "b"}}), "no arrays"),
    "metadata of numbers": (safetensors({"__metadata__": {"a": 1}}), "more than texts"),
    "deep JSON": (safetensors(b'{"a":' + b"[" * 200_000 + b"}"), "not described by"),
    "deep objects": (safetensors(b'{"a":' * 200_000), "not described by"),
    "cut JSON": (safetensors(b'{"a"'), "no JSON object of arrays at byte 1"),
    "two values without a comma": (
        safetensors(b'{"a":' + json.dumps(entry()).encode() + b'"b":', bytes(8)),
        "no JSON object of arrays",
    ),
    "text after the header": (
        safetensors(json.dumps({"a": entry()}).encode() + b" x", bytes(8)),
        "no JSON object of arrays",
    ),
    "the same name twice": (
        safetensors(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}", bytes(8)),
        "two arrays are named 'a'",
    ),
    "the same name, spelt otherwise": (
        safetensors(
            b'{"a":' + json.dumps(entry()).encode() + b',"\\u0061":' + json.dumps(entry()).encode() + b"}", bytes(8)
        ),
        "two arrays are named 'a'",
    ),
    "half a character": (
        safetensors(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", bytes(8)),
        "cannot be named",
    ),
    "no UTF-8": (safetensors(b'{"\xff":' + json.dumps(entry()).encode() + b"}", bytes(8)), "cannot be named"),
    "a long name": (safetensors({"n" * 2000: entry()}, bytes(8)), "cannot be named"),
    "a missing field": (safetensors({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "not described by"),
    "a field twice": (
        safetensors(b'{"a":{"dtype":"F32","dtype":"F32","data_offsets":[0,8]}}', bytes(8)),
        "not described by",
    ),
    "a field too many": (safetensors({"a": {**entry(), "x": 1}}, bytes(8)), "not described by"),
    "a trailing comma": (
        safetensors(b'{"a":{"dtype":"F32","shape":[2,],"data_offsets":[0,8]}}', bytes(8)),
        "described",
    ),
    "a negative length": (safetensors({"a": entry(shape=(-2,))}, bytes(8)), "not described by"),
    "a broken length": (safetensors({"a": entry(shape=(2.0,))}, bytes(8)), "not described by"),
    "bfloat16": (safetensors({"a": entry("BF16", (4,))}, bytes(8)), "bfloat16"),
    "bool": (safetensors({"a": entry("BOOL", (8,))}, bytes(8)), "dtype BOOL, only real floats and integers"),
    "float8": (safetensors({"a": entry("F8_E4M3", (8,))}, bytes(8)), "dtype F8_E4M3"),
    "a huge shape": (safetensors({"a": entry(shape=(10**10, 10**10))}, bytes(8)), "impossible shape"),
    "a huge empty shape": (safetensors({"a": entry(shape=(0, 10**18), offsets=(0, 0))}), "impossible shape"),
    "40 dimensions": (safetensors({"a": entry(shape=(1,) * 40, offsets=(0, 4))}, bytes(4)), "impossible shape"),
    "offsets that lie": (safetensors({"a": entry(offsets=(0, 4))}, bytes(8)), "has 4 bytes, expected 8"),
    "offsets backwards": (safetensors({"a": entry(offsets=(8, 0))}, bytes(8)), "has -8 bytes"),
    "huge offsets": (safetensors({"a": entry(offsets=(2**62, 2**62 + 8))}, bytes(8)), "expected 0"),
    "unaligned": (
        safetensors({"b": entry("U8", (1,), (0, 1)), "a": entry(offsets=(1, 9))}, bytes(9)),
        "byte 1 of the data, which is not aligned",
    ),
    "overlapping": (safetensors({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "begins at byte 4"),
    "the same bytes twice": (safetensors({"a": entry(), "b": entry()}, bytes(8)), "begins at byte 0 of the data"),
    "a hole": (safetensors({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "begins at byte 12"),
    "cut off": (safetensors({"a": entry()}, bytes(7)), "cut off, or has bytes after its end"),
    "bytes after the end": (safetensors({"a": entry()}, bytes(9)), "cut off, or has bytes after its end"),
    "too large": (
        safetensors({"a": entry(shape=(5000,), offsets=(0, 20_000))}, bytes(20_000)),
        "larger than the 10000",
    ),
}


@pytest.mark.parametrize(("data", "said"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_safetensors_file_is_refused_by_name(data: bytes, said: str) -> None:
    with pytest.raises(BadModel) as refused:
        layout_of(data, SAFETENSORS)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


GOOD = encode([np.arange(6.0).reshape(2, 3), np.arange(4, dtype=np.float32)], helper=SAFETENSORS)


@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=4))
def test_a_changed_byte_gives_a_model_or_bad_model_and_nothing_else(at: int, patch: bytes) -> None:
    damaged = GOOD[:at] + patch + GOOD[at + len(patch) :]
    try:
        decode(damaged, helper=SAFETENSORS, max_bytes=10_000)
    except BadModel:
        pass


@given(st.binary(max_size=200), st.sampled_from(sorted(HELPERS)))
def test_random_bytes_give_a_model_or_bad_model_and_nothing_else(data: bytes, helper: str) -> None:
    try:
        decode(data, helper=helper, max_bytes=10_000)
    except BadModel:
        pass


@pytest.mark.parametrize(("data", "said"), [(b"", "0 bytes"), (bytes(9), "9 bytes"), (bytes(20_000), "larger than")])
def test_binary_bytes_that_are_no_float64_are_refused(data: bytes, said: str) -> None:
    with pytest.raises(BadModel, match=said):
        layout_of(data, BINARY)


def test_an_unknown_helper_is_refused_by_name() -> None:
    for ask in (lambda: decode(b"", helper="nope"), lambda: encode([np.zeros(1)], helper="nope")):
        with pytest.raises(BadModel, match="helper 'nope' is unknown; known: binaryhelper, numpyhelper, safetensors"):
            ask()


def test_a_format_is_recognised_by_its_first_bytes_but_for_binary() -> None:
    for helper in HELPERS:
        data = memoryview(encode([np.arange(5.0)], helper=helper))
        assert codec.recognised(data) == (None if helper == BINARY else helper)
    assert codec.recognised(memoryview(b"")) is None


# ---- files


@pytest.mark.parametrize("helper", sorted(HELPERS))
def test_what_is_written_block_by_block_is_what_is_encoded(tmp_path: Path, helper: str) -> None:
    given = [np.arange(10.0), np.arange(6, dtype=np.float64)]
    layout = tuple(codec.ArraySpec(str(index), array.dtype, array.shape) for index, array in enumerate(given))
    blocks = [iter([array[:4], array[4:]]) for array in given]
    written = codec.write(tmp_path / "model", helper, layout, blocks)
    data = (tmp_path / "model").read_bytes()
    assert data == encode(given, helper=helper)
    assert written.size_bytes == len(data)
    with pytest.raises(ValueError):
        codec.write(tmp_path / "short", helper, layout, [iter([given[0]]), iter([given[1][:2]])])
    assert not (tmp_path / "short").exists()


CASES: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "good": (lambda: encode([np.arange(4.0)], helper=SAFETENSORS), None),
    "another dtype": (lambda: encode([np.arange(4, dtype=np.int8)], helper=SAFETENSORS), None),
    "another shape": (lambda: encode([np.zeros(5)], helper=SAFETENSORS), "array '0' has shape (5,), expected (4,)"),
    "another name": (lambda: encode([np.zeros(4)], ["w"], helper=SAFETENSORS), "array 0 is named 'w', expected '0'"),
    "a NaN": (
        lambda: encode([np.array([0, 1, np.nan, 3], np.float16)], helper=SAFETENSORS),
        "array '0' is not finite: nan at flat index 2",
    ),
    "an npz": (lambda: encode([np.arange(4.0)]), "a header of"),
}


@pytest.mark.parametrize(("data", "fault"), CASES.values(), ids=CASES.keys())
def test_an_update_in_safetensors_is_checked_as_any(
    tmp_path: Path, data: Callable[[], bytes], fault: str | None
) -> None:
    path = tmp_path / "update"
    path.write_bytes(data())
    expected = layout_of(encode([np.zeros(4)], helper=SAFETENSORS), SAFETENSORS)
    stored = tmp_path / "stored"
    found = codec.check_update(path, expected, helper=SAFETENSORS, max_bytes=1000, stored_copy=stored).fault
    assert not stored.exists()
    assert found == fault or (fault is not None and found is not None and found.startswith(fault))


def test_an_update_in_binary_has_the_models_count_and_only_finite_values(tmp_path: Path) -> None:
    expected = layout_of(bytes(32), BINARY)
    path = tmp_path / "update"
    for values, fault in (
        (np.arange(4.0), None),
        (np.arange(5.0), "array '0' has shape (5,), expected (4,)"),
        (np.array([0, np.inf, 0, 0]), "array '0' is not finite: inf at flat index 1"),
    ):
        path.write_bytes(values.tobytes())
        assert codec.check_update(path, expected, helper=BINARY, max_bytes=1000).fault == fault


def test_a_seed_is_moved_as_it_is_but_an_npz_is_stored_anew(tmp_path: Path) -> None:
    for helper, names in ((SAFETENSORS, ["w", "b"]), (BINARY, None), (NUMPY, ["arr_0", "arr_1"])):
        path, target = tmp_path / "given", tmp_path / "seed"
        path.write_bytes(encode([np.arange(4.0), np.ones(2)], names, helper=helper))
        given = path.read_bytes()
        codec.store_seed(path, target, helper, max_bytes=1000)
        assert (target.read_bytes() == given) is (helper != NUMPY)
    assert [spec.name for spec in layout_of((tmp_path / "seed").read_bytes(), NUMPY)] == ["0", "1"]
    path.write_bytes(encode([np.arange(4.0)], helper=SAFETENSORS))
    with pytest.raises(BadModel, match="in the format of safetensors, not of binaryhelper"):
        codec.store_seed(path, target, BINARY, max_bytes=1000)
