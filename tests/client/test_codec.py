"""The codec's promises to those who write and read good models."""

import hashlib
import io
import os
from pathlib import Path
from random import Random
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from fl_client.wire import codec
from fl_client.wire.chunks import CHUNK_BYTES, split
from fl_client.wire.codec import (
    BLOCK_BYTES,
    BadModel,
    NpzWriter,
    check_update,
    decode,
    encode,
    open_npz,
    parameters_fault,
)

numbers = st.one_of(
    hnp.floating_dtypes(sizes=(16, 32, 64), endianness="?"),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
)
arrays = hnp.arrays(numbers, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


def savez(compressed: bool = False, **members: Any) -> bytes:
    out = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(out, **members)
    return out.getvalue()


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(actual, expected)


@given(st.lists(arrays, min_size=1, max_size=5))
def test_what_is_encoded_decodes_to_the_same_arrays(parameters: list[np.ndarray]) -> None:
    for actual, expected in zip(decode(encode(parameters)), parameters, strict=True):
        assert_same(actual, expected)
        assert actual.flags.writeable and actual.flags.c_contiguous and actual.flags.aligned


@given(st.lists(arrays, min_size=1, max_size=5))
def test_numpy_reads_what_we_encode_by_index_names(parameters: list[np.ndarray]) -> None:
    with np.load(io.BytesIO(encode(parameters)), allow_pickle=False) as npz:
        assert len(npz.files) == len(parameters)
        for index, expected in enumerate(parameters):
            assert_same(npz[str(index)], expected)


@given(st.lists(arrays, min_size=1, max_size=5), st.booleans())
def test_we_decode_what_numpy_writes(parameters: list[np.ndarray], compressed: bool) -> None:
    data = savez(compressed, **{str(index): array for index, array in enumerate(parameters)})
    for actual, expected in zip(decode(data), parameters, strict=True):
        assert_same(actual, expected)
        assert actual.flags.writeable and actual.flags.c_contiguous and actual.flags.aligned


@given(st.lists(names, min_size=1, max_size=5, unique=True))
def test_any_text_can_name_an_array(chosen: list[str]) -> None:
    data = encode([np.array(float(index)) for index in range(len(chosen))], chosen)
    layout = codec.read(data, codec.NUMPY, max_bytes=10_000).layout
    assert {spec.name for spec in layout} == set(chosen)
    with np.load(io.BytesIO(data)) as npz:
        assert set(npz.files) == set(chosen)


@given(st.lists(arrays, min_size=1, max_size=3))
def test_equal_models_have_equal_bytes(parameters: list[np.ndarray]) -> None:
    assert encode(parameters) == encode([np.asfortranarray(array).reshape(array.shape) for array in parameters])


def test_an_empty_model_is_refused_when_read() -> None:
    with pytest.raises(BadModel, match="no arrays"):
        decode(encode([]))


@pytest.mark.parametrize(
    ("given_order", "read_order"),
    [
        (["10", "9", "0"], ["0", "9", "10"]),
        (["arr_10", "arr_9"], ["arr_9", "arr_10"]),
        (["w2", "w1", "0"], ["w2", "w1", "0"]),
    ],
)
def test_arrays_come_by_number_or_else_in_the_order_of_the_file(given_order: list[str], read_order: list[str]) -> None:
    data = savez(**{name: np.zeros(1) for name in given_order})
    assert [spec.name for spec in codec.read(data, codec.NUMPY, max_bytes=10_000).layout] == read_order


def test_positional_numpy_files_are_read_in_order() -> None:
    out = io.BytesIO()
    np.savez(out, *[np.full(1, float(index)) for index in range(12)])
    assert [array[0] for array in decode(out.getvalue())] == list(range(12))


def test_fortran_order_is_read_as_the_same_array() -> None:
    matrix = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    for compressed in (False, True):
        assert_same(decode(savez(compressed, a=matrix))[0], matrix)


def test_npz_written_to_a_pipe_has_data_descriptors_and_is_read() -> None:
    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.written = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.written += data
            return len(data)

        def tell(self) -> int:
            raise OSError("a pipe has no position")

    pipe = Pipe()
    np.savez(pipe, a=np.arange(3.0), b=np.arange(4))
    assert [array.size for array in decode(bytes(pipe.written))] == [3, 4]


@given(st.lists(arrays, min_size=1, max_size=4))
def test_data_is_aligned_in_what_we_write(parameters: list[np.ndarray]) -> None:
    base = np.frombuffer(data := encode(parameters), np.uint8).ctypes.data
    file = codec.read(data, codec.NUMPY, max_bytes=1 << 20)
    for index, array in enumerate(parameters):
        view = file.values(index, 0, array.size, np.empty(0, np.uint8))
        assert view.size == 0 or (view.ctypes.data - base) % 64 == 0


@given(st.lists(arrays, min_size=1, max_size=3), st.sampled_from(["stored", "deflated", "fortran"]), st.data())
def test_any_stretch_of_values_is_read_in_c_order(
    tmp_path_factory: pytest.TempPathFactory, parameters: list[np.ndarray], form: str, data: st.DataObject
) -> None:
    laid_out = [np.asfortranarray(array) for array in parameters] if form == "fortran" else parameters
    raw = savez(form == "deflated", **{str(index): array for index, array in enumerate(laid_out)})
    path = tmp_path_factory.mktemp("model") / "model"
    path.write_bytes(raw)
    for content in (raw, path):
        with codec.open_model(content, codec.NUMPY, max_bytes=1 << 20) as file:
            file.hold()
            for index, array in enumerate(parameters):
                begin = data.draw(st.integers(0, array.size))
                end = data.draw(st.integers(begin, array.size))
                values = file.values(index, begin, end, np.empty(array.nbytes, np.uint8))
                assert_same(values, array.reshape(-1)[begin:end])


def test_many_values_come_aligned_from_wherever_they_lie(tmp_path: Path) -> None:
    raw = savez(a=np.arange(5000.0), b=np.arange(5000.0))
    (tmp_path / "model").write_bytes(raw)
    for content in (raw, tmp_path / "model"):
        with codec.open_model(content, codec.NUMPY, max_bytes=1 << 20) as file:
            for index in range(2):
                values = file.values(index, 1, 5000, np.empty(40_000, np.uint8))
                assert values.flags.aligned
                np.testing.assert_array_equal(values, np.arange(1.0, 5000))


def test_a_file_that_shrinks_while_it_is_read_is_a_bad_model(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(encode([np.arange(100_000.0)]))
    with open_npz(path, max_bytes=1 << 20) as npz:
        os.truncate(path, 50_000)
        with pytest.raises(BadModel, match="shorter"):
            npz.copies()


def test_blocks_are_the_whole_array_in_bounded_pieces(tmp_path: Path) -> None:
    big = np.arange(3 * BLOCK_BYTES // 8 + 5, dtype=np.float64)
    for compressed in (False, True):
        path = tmp_path / "model"
        path.write_bytes(savez(compressed, a=big, b=np.zeros(0)))
        with open_npz(path, max_bytes=1 << 30) as npz:
            blocks = [block.copy() for block in npz.blocks(0)]
            assert max(block.nbytes for block in blocks) <= BLOCK_BYTES
            np.testing.assert_array_equal(np.concatenate(blocks), big)
            assert list(npz.blocks(1)) == []


def test_written_by_blocks_is_byte_for_byte_what_encode_makes(tmp_path: Path) -> None:
    matrix = np.arange(30.0, dtype=np.float32).reshape(5, 6)
    path = tmp_path / "model"
    layout = (codec.ArraySpec("0", matrix.dtype, matrix.shape), codec.ArraySpec("1", np.dtype(np.int64), (1,)))
    with NpzWriter(path, layout) as writer:
        writer.write(0, matrix[0])
        writer.write(1, np.array([7]))  # arrays may come in turn
        for row in matrix[1:]:
            writer.write(0, row)
    data = path.read_bytes()
    assert data == encode([matrix, np.array([7])])
    assert writer.sha256 == hashlib.sha256(data).hexdigest()
    assert writer.size_bytes == len(data)


@given(st.randoms())
def test_the_digest_is_the_files_in_whatever_order_the_blocks_come(
    tmp_path_factory: pytest.TempPathFactory, random: Random
) -> None:
    path = tmp_path_factory.mktemp("model") / "model"
    whole = [np.arange(size, dtype=np.int64) for size in (60_000, 0, 3, 100_000, 0)]
    layout = tuple(codec.ArraySpec(str(index), array.dtype, array.shape) for index, array in enumerate(whole))
    left = {index: np.array_split(array, 5) for index, array in enumerate(whole)}
    with NpzWriter(path, layout) as writer:
        while left:
            index = random.choice(list(left))
            writer.write(index, left[index].pop(0))
            if not left[index]:
                del left[index]
    assert path.read_bytes() == encode(whole)
    assert writer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("helper", codec.HELPERS)
def test_a_larger_file_is_written_over_and_cut(tmp_path: Path, helper: str) -> None:
    new, old, values = tmp_path / "new", tmp_path / "old", np.arange(5.0)
    old.write_bytes(b"x" * 10_000)
    number = old.stat().st_ino
    layout = tuple(codec.ArraySpec(f"{index}", values.dtype, (5 - index,)) for index in range(6))
    arrays = [[values[index:]] for index in range(6)]
    written = [codec.write(path, helper, layout, arrays) for path in (new, old)]
    assert written[0] == written[1]
    assert (old.read_bytes(), old.stat().st_ino) == (new.read_bytes(), number)


def test_blocks_that_do_not_fit_leave_no_file(tmp_path: Path) -> None:
    path = tmp_path / "model"
    layout = (codec.ArraySpec("0", np.dtype(np.float64), (2,)),)
    for block, fault in (
        (np.zeros(1), "blocks of 8 bytes, expected 16"),
        (np.zeros(3), "blocks of 24 bytes, expected 16"),
        (np.zeros(2, np.float32), "a block of float32, expected float64"),
    ):
        with pytest.raises(ValueError, match=fault), NpzWriter(path, layout) as writer:
            writer.write(0, block)
    assert not path.exists()


@pytest.mark.parametrize("array", [np.array([None]), np.array(["a"]), np.array([1j]), np.array([True])])
def test_only_numbers_are_encoded(array: np.ndarray) -> None:
    with pytest.raises(BadModel, match="only real floats and integers"):
        encode([array])


def test_two_arrays_of_one_name_are_not_encoded() -> None:
    with pytest.raises(BadModel, match="two arrays are named 'a'"):
        encode([np.zeros(1), np.zeros(1)], ["a", "a"])


MODEL = [np.zeros((2, 3), np.float32), np.zeros(4)]


def checked(tmp_path: Path, data: bytes, expected: list[np.ndarray] | None = None) -> str | None:
    path = tmp_path / "update"
    path.write_bytes(data)
    layout = codec.read(encode(MODEL if expected is None else expected), codec.NUMPY, max_bytes=1 << 30).layout
    said = check_update(path, layout, max_bytes=1 << 30, stored_copy=tmp_path / "stored")
    assert check_update(data, layout, max_bytes=1 << 30).fault == said.fault
    assert said.stored == (tmp_path / "stored").exists()
    return said.fault


def test_an_update_may_have_other_dtypes(tmp_path: Path) -> None:
    assert checked(tmp_path, encode([np.ones((2, 3), np.int8), np.ones(4, np.float16)])) is None
    assert not (tmp_path / "stored").exists()


def test_a_deflated_update_is_kept_in_stored_form(tmp_path: Path) -> None:
    weights = np.asfortranarray(np.arange(6.0, dtype=np.float32).reshape(2, 3))
    assert checked(tmp_path, savez(True, **{"0": weights, "1": np.arange(4)})) is None
    with open_npz(tmp_path / "stored", max_bytes=10_000) as npz:
        assert not npz.deflated
        first, second = npz.copies()
        np.testing.assert_array_equal(first, weights)
        np.testing.assert_array_equal(second, np.arange(4))


@pytest.mark.parametrize(
    ("arrays_sent", "names_sent", "fault"),
    [
        ([np.zeros((2, 3))], None, "1 arrays, expected 2"),
        ([np.zeros((2, 3)), np.zeros(5)], None, "array '1' has shape (5,), expected (4,)"),
        ([np.zeros((3, 2)), np.zeros(4)], None, "array '0' has shape (3, 2), expected (2, 3)"),
        ([np.zeros((2, 3)), np.zeros(4)], ["0", "2"], "array 1 is named '2', expected '1'"),
        ([np.zeros((2, 3)), np.array([0, 0, np.nan, 0])], None, "array '1' is not finite: nan at flat index 2"),
        ([np.array([[0, 0, 0], [0, -np.inf, 0]]), np.zeros(4)], None, "array '0' is not finite: -inf at flat index 4"),
        ([np.zeros((2, 3)), np.full(4, np.inf, np.float16)], None, "array '1' is not finite: inf at flat index 0"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_the_fault_of_an_update_is_named(
    tmp_path: Path, arrays_sent: list[np.ndarray], names_sent: list[str] | None, fault: str, compressed: bool
) -> None:
    labels = names_sent or [str(index) for index in range(len(arrays_sent))]
    assert checked(tmp_path, savez(compressed, **dict(zip(labels, arrays_sent, strict=True)))) == fault
    assert not (tmp_path / "stored").exists()


def test_values_whose_squares_overflow_are_finite(tmp_path: Path) -> None:
    huge = [np.full((2, 3), 3e38, np.float32), np.full(4, 1e308)]
    assert checked(tmp_path, encode(huge)) is None
    assert parameters_fault(huge, codec.read(encode(MODEL), codec.NUMPY, max_bytes=1000).layout) is None


def test_a_nan_in_a_late_block_is_found_where_it_is(tmp_path: Path) -> None:
    big = np.zeros(BLOCK_BYTES)
    big[-2] = np.nan
    fault = f"array '0' is not finite: nan at flat index {big.size - 2}"
    assert checked(tmp_path, encode([big]), [big]) == fault
    layout = codec.read(encode([big]), codec.NUMPY, max_bytes=1 << 30).layout
    assert parameters_fault([big], layout) == fault


def test_any_layout_is_taken_where_none_is_expected(tmp_path: Path) -> None:
    path = tmp_path / "seed"
    path.write_bytes(encode([np.ones(3)]))
    assert check_update(path, None, max_bytes=10_000).fault is None


@given(st.binary(max_size=50), st.integers(1, 20))
def test_chunks_are_the_data_in_order_and_at_most_their_size(data: bytes, size_bytes: int) -> None:
    chunks = list(split(memoryview(data), size_bytes))
    assert b"".join(chunks) == data
    assert all(0 < len(chunk) <= size_bytes for chunk in chunks)
    assert CHUNK_BYTES == 1024 * 1024
