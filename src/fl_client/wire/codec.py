"""Models as bytes, by helper: FEDn's name of a model format. Shared by client and server; stdlib and numpy only.

The one place that knows which helpers there are. Whatever is read comes from a stranger: no size is believed before it
is compared with the file, every byte of the file must belong to an array, and all faults are BadModel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_client.wire import binary, npz, safetensors
from fl_client.wire.layout import (
    ALIGN_BYTES,
    BLOCK_BYTES,
    MAX_ARRAYS,
    MAX_MODEL_BYTES,
    Array,
    ArraySpec,
    BadModel,
    Disk,
    Layout,
    Memory,
    ModelFile,
    Parameters,
    finite_blocks,
    finite_fault,
    layout_fault,
    open_over,
    parameters_fault,
    short,
    squares_are_finite,
)
from fl_client.wire.npz import NpzFile, NpzWriter

__all__ = [
    "ALIGN_BYTES",
    "BINARY",
    "BLOCK_BYTES",
    "HELPERS",
    "MAX_ARRAYS",
    "MAX_MODEL_BYTES",
    "NUMPY",
    "SAFETENSORS",
    "SUFFIXES",
    "Array",
    "ArraySpec",
    "BadModel",
    "Checked",
    "Layout",
    "ModelFile",
    "NpzFile",
    "NpzWriter",
    "Parameters",
    "Written",
    "check_update",
    "decode",
    "encode",
    "layout_fault",
    "open_model",
    "open_npz",
    "parameters_fault",
    "read",
    "recognised",
    "recognised_file",
    "store_seed",
    "write",
    "writing_order",
]

NUMPY, BINARY, SAFETENSORS = "numpyhelper", "binaryhelper", "safetensors"
SUFFIXES: Mapping[str, str] = {NUMPY: ".npz", BINARY: ".bin", SAFETENSORS: ".safetensors"}  # of files, by helper
HELPERS = frozenset(SUFFIXES)


# ---- in memory


def encode(arrays: Sequence[npt.ArrayLike], names: Sequence[str] | None = None, *, helper: str = NUMPY) -> bytes:
    """A model: the same arrays and names give the same bytes.

    names: "0", "1", … by default, as FEDn's numpyhelper wants them. Raises BadModel for arrays that are no numbers, or
    that the helper cannot hold.
    """
    if names is None:
        names = [str(index) for index in range(len(arrays))]
    if len(names) != len(arrays):
        raise BadModel(f"{len(names)} names for {len(arrays)} arrays")
    given = [np.asarray(array) for array in arrays]
    layout = tuple(ArraySpec(name, array.dtype, array.shape) for name, array in zip(names, given, strict=True))
    if helper == NUMPY:
        return npz.encode(layout, given)
    return b"".join(_chunks(helper, layout, [(array,) for array in given]))


def decode(
    data: bytes | bytearray | memoryview, *, helper: str = NUMPY, max_bytes: int = MAX_MODEL_BYTES
) -> Parameters:
    """The arrays, writable, in C order, owning their memory.

    Order: by number if all names are numbers, else by N if all are arr_N, else as in an npz, by name in safetensors.
    max_bytes: of all arrays after inflation. Raises BadModel.
    """
    return read(data, helper, max_bytes=max_bytes).copies()


def read(data: bytes | bytearray | memoryview, helper: str, *, max_bytes: int) -> ModelFile:
    """max_bytes: of all arrays after inflation. Raises BadModel."""
    return _read(Memory(data), helper, max_bytes)


def _read(source: Memory | Disk, helper: str, max_bytes: int) -> ModelFile:
    match helper:
        case "numpyhelper":
            return NpzFile(source, max_bytes=max_bytes)
        case "binaryhelper":
            return binary.read(source, max_bytes=max_bytes)
        case "safetensors":
            return safetensors.read(source, max_bytes=max_bytes)
    raise _unknown(helper)


def recognised(data: bytes | bytearray | memoryview) -> str | None:
    """The helper whose format it is by its first bytes; None: binaryhelper's, which looks like anything, or none's."""
    return _recognised(Memory(data))


def _recognised(source: Memory | Disk) -> str | None:
    if source.read(0, 4) in (b"PK\3\4", b"PK\5\6"):
        return NUMPY
    return SAFETENSORS if safetensors.looks_like(source) else None


# ---- files


def recognised_file(path: Path) -> str | None:
    with closing(Disk(path)) as source:
        return _recognised(source)


def open_model(content: Path | bytes | memoryview, helper: str, *, max_bytes: int) -> ModelFile:
    """A file, or what would be in one. max_bytes: of all arrays after inflation. Raises BadModel, OSError."""
    source = Disk(content) if isinstance(content, Path) else Memory(content)
    try:
        return _read(source, helper, max_bytes)
    except BaseException:
        source.close()
        raise


def open_npz(path: Path, *, max_bytes: int) -> NpzFile:
    source = Disk(path)
    try:
        return NpzFile(source, max_bytes=max_bytes)
    except BaseException:
        source.close()
        raise


@dataclass(frozen=True, slots=True)
class Checked:
    fault: str | None
    stored: bool = False  # the stored copy was written


def check_update(
    content: Path | bytes | memoryview,
    expected: Layout | None,
    *,
    helper: str = NUMPY,
    max_bytes: int,
    stored_copy: Path | None = None,
) -> Checked:
    """Why this file (or its bytes) is no update of a model with this layout (None: of any); None if it is one.

    One pass in flat memory. Names, count, order and shapes must be equal, every value finite; the dtype may differ.
    A good npz with deflated members is also written to `stored_copy`, in stored form and not synced; no other file is.
    Raises OSError.
    """
    try:
        with open_model(content, helper, max_bytes=max_bytes) as file:
            if expected is not None and (fault := layout_fault(file.layout, expected)) is not None:
                return Checked(fault)
            if stored_copy is not None and isinstance(file, NpzFile) and file.deflated:
                _store(file, stored_copy, file.layout, digest=False)
                return Checked(None, stored=True)
            _check_finite(file)
            return _GOOD
    except BadModel as exc:
        return Checked(str(exc))


_GOOD = Checked(None)


def store_seed(path: Path, target: Path, helper: str, *, max_bytes: int) -> str:
    """Puts a model that a user gives to `target`, in the form that all of a session's models have; its sha256 (hex).

    An npz is rewritten: stored, and named 0, 1, … if it was arr_0, arr_1, … (FEDn's numpyhelper reads the former,
    numpy.savez writes the latter). Others are moved. Raises BadModel, OSError.
    """
    found = recognised_file(path)
    if found not in (None, helper):
        raise BadModel(f"the file is in the format of {found}, not of {helper}")
    with open_model(path, helper, max_bytes=max_bytes) as file:
        if isinstance(file, NpzFile):
            named = zip(file.numbered_names(), file.layout, strict=True)
            layout = tuple(ArraySpec(name, spec.dtype, spec.shape) for name, spec in named)
            return _store(file, target, layout, digest=True)
        _check_finite(file)
    path.rename(target)
    with target.open("rb") as moved:
        return hashlib.file_digest(moved, "sha256").hexdigest()


def _check_finite(file: ModelFile) -> None:
    """Raises BadModel."""
    with np.errstate(all="ignore"):
        for index, spec in enumerate(file.layout):
            is_quick = spec.dtype.kind == "f" and spec.dtype.itemsize in (4, 8)
            checked = 0
            for block in file.blocks(index):
                is_finite = is_quick and squares_are_finite(block)
                if not is_finite and (fault := finite_fault(spec.name, block, checked)) is not None:
                    raise BadModel(fault)
                checked += block.size


def _store(file: NpzFile, target: Path, layout: Layout, *, digest: bool) -> str:
    in_fortran_order = {index for index in range(len(layout)) if file.fortran_order(index)}
    with NpzWriter(target, layout, fortran_order=in_fortran_order, digest=digest) as out:
        for index in range(len(layout)):
            for block in finite_blocks(file, index):
                out.write(index, block)
    return out.sha256


@dataclass(frozen=True, slots=True)
class Written:
    sha256: str
    size_bytes: int


def write(path: Path, helper: str, layout: Layout, arrays: Sequence[Iterable[Array]]) -> Written:
    """Writes a model at `path`, over what is there, not synced, in flat memory; in case of a fault the file is gone.

    arrays: of each one the values in C order, in blocks of its dtype, asked for in writing_order(). Raises
    BadModel for what the helper cannot hold, ValueError for blocks that do not fit.
    """
    if helper == NUMPY:
        with NpzWriter(path, layout) as writer:
            for index, blocks in enumerate(arrays):
                for block in blocks:
                    writer.write(index, block)
        return Written(writer.sha256, writer.size_bytes)
    digest, size_bytes = hashlib.sha256(), 0
    try:
        with BufferedWriter(open_over(path)) as file:
            for chunk in _chunks(helper, layout, arrays):
                file.write(chunk)
                digest.update(chunk)
                size_bytes += len(chunk)
            file.truncate(size_bytes)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Written(digest.hexdigest(), size_bytes)


def writing_order(helper: str, layout: Layout) -> Sequence[int]:
    """In which order write() asks for the arrays."""
    return safetensors.writing_order(layout) if helper == SAFETENSORS else range(len(layout))


def _chunks(helper: str, layout: Layout, arrays: Sequence[Iterable[Array]]) -> Iterator[bytes | memoryview]:
    match helper:
        case "binaryhelper":
            return binary.chunks(layout, arrays)
        case "safetensors":
            return safetensors.chunks(layout, arrays)
    raise _unknown(helper)


def _unknown(helper: Any) -> BadModel:
    return BadModel(f"helper {short(str(helper))} is unknown; known: {', '.join(sorted(HELPERS))}")
