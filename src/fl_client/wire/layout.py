"""What every model format shares: named arrays, what is refused in them, and a file of them as it is read.

Stdlib and numpy only. All faults are BadModel, whose message is one line for whoever sent the bytes.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Parameters = list[Array]

MAX_ARRAYS = 100_000
MAX_MODEL_BYTES = 16 << 30  # for readers whose caller has no better limit
BLOCK_BYTES = 1 << 18  # of one array, checked or copied at a time: it stays in the cache of one core
ALIGN_BYTES = 64  # of each array's data in what we write, so that bytes in memory are read at full speed

_MAX_NAME_BYTES = 1024
_MAX_DIMENSIONS = 32
_UNALIGNED_BYTES = 16_384  # so many cost numpy less where they lie than copied to an even address
_AHEAD_BYTES = 8192  # a zip's header and an npy's fit
_SHRUNK = "the file has become shorter while it was read"
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: has no bytes


class BadModel(ValueError):
    """The bytes or arrays are no model that we take; the message says why, in one line."""


@dataclass(frozen=True, slots=True)
class ArraySpec:
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


Layout = tuple[ArraySpec, ...]


class Memory:
    """A model's bytes in memory."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self.data = memoryview(data).cast("B").toreadonly()
        self.size_bytes = len(self.data)

    def read(self, at: int, size_bytes: int) -> bytes:
        """Fewer only at the end."""
        return bytes(self.data[at : at + size_bytes])

    def view(self, at: int, count: int, dtype: np.dtype[Any]) -> Array | None:
        """Values where they lie; None: they lie at an odd address, and are so many that a copy is worth it."""
        found = np.ndarray(count, dtype, self.data, at)
        return found if found.flags.aligned or found.nbytes <= _UNALIGNED_BYTES else None

    def fill(self, out: Array, at: int) -> None:
        """out: bytes."""
        out[:] = np.ndarray(out.size, np.uint8, self.data, at)

    def close(self) -> None:
        self.data = memoryview(b"")


class Disk:
    """A model's bytes in a file, which is read and not mapped.

    A read into a buffer that is used again costs no more than the faults of a mapping, the values come aligned, what
    the kernel keeps of the file is not this process's memory, and a file that shrinks is a BadModel and not a signal.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.size_bytes = os.fstat(self._file.fileno()).st_size
        self._ahead, self._ahead_at = b"", 0

    def read(self, at: int, size_bytes: int) -> bytes:
        """Fewer only at the end. A little more is read: headers lie side by side."""
        size_bytes = max(0, min(size_bytes, self.size_bytes - at))
        begin = at - self._ahead_at
        if 0 <= begin <= len(self._ahead) - size_bytes:
            return self._ahead[begin : begin + size_bytes]
        wanted_bytes = min(max(size_bytes, _AHEAD_BYTES), self.size_bytes - at)
        found = os.pread(self._file.fileno(), wanted_bytes, at)
        if len(found) < wanted_bytes:
            raise BadModel(_SHRUNK)
        if wanted_bytes <= _AHEAD_BYTES:
            self._ahead, self._ahead_at = found, at
        return found[:size_bytes]

    def view(self, at: int, count: int, dtype: np.dtype[Any]) -> Array | None:
        return None

    def fill(self, out: Array, at: int) -> None:
        filled = 0
        while filled < out.size:
            got = os.preadv(self._file.fileno(), [out[filled:].data], at + filled)
            if not got:
                raise BadModel(_SHRUNK)
            filled += got

    def close(self) -> None:
        self._file.close()


class ModelFile:
    """A model in memory or in a file. What it is made from was checked; nothing may be believed before that.

    Here the values lie as they are, in C order, each array in one piece; NpzFile knows of others. values()
    may be called by several threads at once.
    """

    def __init__(self, source: Memory | Disk, layout: Layout, starts: Sequence[int]) -> None:
        """starts: where each array's values begin in the source."""
        self._source, self.layout, self._starts = source, layout, starts

    @property
    def is_open(self) -> bool:
        """As a file: it takes one of those that a process may have open."""
        return isinstance(self._source, Disk)

    @property
    def held_bytes(self) -> int:
        """What it keeps in memory, after hold()."""
        return self._source.size_bytes if isinstance(self._source, Memory) else 0

    def hold(self) -> None:
        """Brings what cannot be read from its middle into memory: values() needs it. Raises BadModel, OSError."""

    def values(self, index: int, begin: int, end: int, buffer: Array) -> Array:
        """The array's values from `begin` to `end` in C order, flat; aligned if many. Raises BadModel, OSError.

        buffer: bytes, large enough; the values may lie in it.
        """
        return self._stretch(index, begin, end, buffer)

    def _stretch(self, index: int, begin: int, end: int, buffer: Array) -> Array:
        """As they lie."""
        dtype = self.layout[index].dtype
        at = self._starts[index] + begin * dtype.itemsize
        found = self._source.view(at, end - begin, dtype)
        if found is None:
            raw = buffer[: (end - begin) * dtype.itemsize]
            self._source.fill(raw, at)
            found = raw.view(dtype)
        return found

    def blocks(self, index: int) -> Iterator[Array]:
        """The array's values in the order of the file, flat, at most BLOCK_BYTES at a time.

        A block is gone when the next one is asked for.
        """
        spec = self.layout[index]
        size, step = math.prod(spec.shape), BLOCK_BYTES // spec.dtype.itemsize
        buffer = np.empty(min(size, step) * spec.dtype.itemsize, np.uint8)
        for begin in range(0, size, step):
            yield self._stretch(index, begin, min(begin + step, size), buffer)

    def copies(self) -> Parameters:
        """Writable, in C order, owning their memory."""
        return [self._copy(index) for index in range(len(self.layout))]

    def _copy(self, index: int) -> Array:
        spec = self.layout[index]
        whole = np.empty(spec.shape, spec.dtype)
        self._source.fill(whole.reshape(-1).view(np.uint8), self._starts[index])
        return whole

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ---- what is refused


def parameters_fault(parameters: Sequence[Array], expected: Layout) -> str | None:
    """Why these arrays are no update of a model with this layout, or None. Dtypes may differ."""
    names = [spec.name for spec in expected] if len(parameters) == len(expected) else map(str, range(len(parameters)))
    layout = tuple(ArraySpec(name, array.dtype, array.shape) for name, array in zip(names, parameters, strict=True))
    try:
        for spec in layout:
            refuse_dtype(spec.name, spec.dtype)
    except BadModel as exc:
        return str(exc)
    if (fault := layout_fault(layout, expected)) is not None:
        return fault
    for spec, array in zip(layout, parameters, strict=True):
        flat = array.reshape(-1)
        step = max(1, BLOCK_BYTES // array.itemsize)
        for start in range(0, flat.size, step):
            if (fault := finite_fault(spec.name, flat[start : start + step], start)) is not None:
                return fault
    return None


def layout_fault(actual: Layout, expected: Layout) -> str | None:
    """How names, count, order or shapes differ, or None. Dtypes may differ."""
    if len(actual) != len(expected):
        return f"{len(actual)} arrays, expected {len(expected)}"
    for index, (ours, theirs) in enumerate(zip(expected, actual, strict=True)):
        if ours.name != theirs.name:
            return f"array {index} is named {short(theirs.name)}, expected {short(ours.name)}"
        if ours.shape != theirs.shape:
            return f"array {short(ours.name)} has shape {theirs.shape}, expected {ours.shape}"
    return None


def finite_blocks(file: ModelFile, index: int) -> Iterator[Array]:
    """The array's blocks. Raises BadModel at the first value that is not finite."""
    checked = 0
    for block in file.blocks(index):
        if (fault := finite_fault(file.layout[index].name, block, checked)) is not None:
            raise BadModel(fault)
        checked += block.size
        yield block


def finite_fault(name: str, block: Array, offset: int) -> str | None:
    """block: flat; offset: of its first value in the array."""
    if block.dtype.kind != "f":
        return None
    if block.itemsize in (4, 8):
        with np.errstate(all="ignore"):
            if squares_are_finite(block):
                return None
    finite = np.isfinite(block)
    if finite.all():  # the squares had overflowed
        return None
    first = int(np.argmin(finite))
    return f"array {short(name)} is not finite: {block[first]} at flat index {offset + first}"


def squares_are_finite(block: Array) -> bool:
    """False at once for what is not finite: one pass at the speed of memory, no temporary.

    Also false where the squares overflow, of which numpy warns.
    """
    return math.isfinite(np.dot(block, block))


def refuse_dtype(name: str, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "fiu":
        raise BadModel(f"array {short(name)} has dtype {dtype}, only real floats and integers are taken")


def refuse_name(name: str) -> None:
    if "\0" in name or len(name.encode("utf-8", "replace")) > _MAX_NAME_BYTES or _SURROGATE.search(name):
        raise BadModel(f"an array cannot be named {short(name)}")


def short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")


def is_impossible(shape: Sequence[int]) -> bool:
    return len(shape) > _MAX_DIMENSIONS or math.prod(max(length, 1) for length in shape) >= 1 << 56


# ---- order and bytes


def by_number(names: Sequence[str]) -> list[int] | None:
    """The order of arrays that are named 0, 1, … or arr_0, arr_1, …, as indices; None if they are not."""
    for prefix in ("", "arr_"):
        if all(re.fullmatch(rf"{prefix}[0-9]{{1,9}}", name) for name in names):
            return sorted(range(len(names)), key=lambda index: int(names[index].removeprefix(prefix)))
    return None


def open_over(path: Path) -> FileIO:
    """To be written over and then cut: a new file, or one that has its pages already, which saves most of the time."""
    return FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")


def plain_bytes(spec: ArraySpec, blocks: Iterable[Array], dtype: np.dtype[Any]) -> Iterator[memoryview]:
    """The values of an array that comes in blocks, as this dtype. Raises ValueError if there are more or fewer."""
    expected, given = math.prod(spec.shape), 0
    for block in blocks:
        given += block.size
        if block.size:
            with np.errstate(all="ignore"):  # what leaves float64's range is found when it is read
                values = np.ascontiguousarray(block, dtype)
            yield values.reshape(-1).view(np.uint8).data
    if given != expected:
        raise ValueError(f"array {short(spec.name)}: blocks of {given} values, expected {expected}")
