"""What every model format shares: named arrays, what is refused in them, and a file of them as it is read.

Stdlib and numpy only. All faults are BadModel, whose message is one line for whoever sent the bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Parameters = list[Array]

MAX_ARRAYS = 100_000
MAX_MODEL_BYTES = 16 << 30  # for readers whose caller has no better limit
BLOCK_BYTES = 1 << 20  # of one array, checked or copied at a time
ALIGN_BYTES = 64  # of each array's data in what we write, so that a mapped file is read at full speed

_MAX_NAME_BYTES = 1024
_MAX_DIMENSIONS = 32
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: has no bytes


class BadModel(ValueError):
    """The bytes or arrays are no model that we take; the message says why, in one line."""


@dataclass(frozen=True, slots=True)
class ArraySpec:
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


Layout = tuple[ArraySpec, ...]


class ModelFile(Protocol):
    """A model in memory or mapped. What it is made from was checked; nothing may be believed before that.

    A mapping lives as long as a view of it: close() gives up only our own hold.
    """

    layout: Layout

    def arrays(self) -> Parameters:
        """Read-only views where that is possible (perhaps unaligned), else copies."""

    def copies(self) -> Parameters:
        """Writable, in C order, owning their memory."""

    def blocks(self, index: int) -> Iterator[Array]:
        """The array's values in the order of the file, flat, at most BLOCK_BYTES at a time."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class PlainFile:
    """A ModelFile of values that lie as they are, in C order, each array in one piece."""

    def __init__(self, data: memoryview, layout: Layout, starts: Sequence[int]) -> None:
        """starts: where each array's values begin in the data."""
        self._data, self.layout, self._starts = data, layout, starts

    def arrays(self) -> Parameters:
        return [
            np.ndarray(spec.shape, spec.dtype, buffer=self._data, offset=start)
            for spec, start in zip(self.layout, self._starts, strict=True)
        ]

    def copies(self) -> Parameters:
        return [array.copy() for array in self.arrays()]

    def blocks(self, index: int) -> Iterator[Array]:
        spec = self.layout[index]
        flat = np.ndarray(math.prod(spec.shape), spec.dtype, buffer=self._data, offset=self._starts[index])
        step = BLOCK_BYTES // spec.dtype.itemsize
        for start in range(0, flat.size, step):
            yield flat[start : start + step]

    def close(self) -> None:
        self._data = memoryview(b"")

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
            # The sum of squares is finite only if every value is: one pass at the speed of memory, no temporary.
            if math.isfinite(np.dot(block, block)):
                return None
    finite = np.isfinite(block)
    if finite.all():  # the squares had overflowed
        return None
    first = int(np.argmin(finite))
    return f"array {short(name)} is not finite: {block[first]} at flat index {offset + first}"


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
