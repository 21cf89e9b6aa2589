"""Models as bytes, by helper: FEDn's name of a model format. Shared by client and server; stdlib and numpy only.

The one place that knows which helpers there are. Whatever is read comes from a stranger: no size is believed before it
is compared with the file, every byte of the file must belong to an array, and all faults are BadModel.
"""

from __future__ import annotations

import hashlib
import io
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_client.wire import binary, safetensors
from fl_client.wire.layout import (
    ALIGN_BYTES,
    BLOCK_BYTES,
    MAX_ARRAYS,
    MAX_MODEL_BYTES,
    Array,
    ArraySpec,
    BadModel,
    Layout,
    ModelFile,
    Parameters,
    finite_blocks,
    layout_fault,
    parameters_fault,
    short,
)
from fl_client.wire.npz import Archive, NpzFile, NpzWriter

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
    wholes = [(array,) for array in given]
    if helper != NUMPY:
        return b"".join(_chunks(helper, layout, wholes))
    out = io.BytesIO()
    with Archive(out) as archive:
        for spec, whole in zip(layout, wholes, strict=True):
            archive.add(spec.name, spec.dtype, spec.shape, whole)
    return out.getvalue()


def decode(
    data: bytes | bytearray | memoryview, *, helper: str = NUMPY, max_bytes: int = MAX_MODEL_BYTES
) -> Parameters:
    """The arrays, writable, in C order, owning their memory.

    Order: by number if all names are numbers, else by N if all are arr_N, else as in an npz, by name in safetensors.
    max_bytes: of all arrays after inflation. Raises BadModel.
    """
    return read(memoryview(data), helper, max_bytes=max_bytes).copies()


def read(data: memoryview, helper: str, *, max_bytes: int) -> ModelFile:
    """max_bytes: of all arrays after inflation. Raises BadModel."""
    match helper:
        case "numpyhelper":
            return NpzFile(data, max_bytes=max_bytes)
        case "binaryhelper":
            return binary.read(data, max_bytes=max_bytes)
        case "safetensors":
            return safetensors.read(data, max_bytes=max_bytes)
    raise _unknown(helper)


def recognised(data: memoryview) -> str | None:
    """The helper whose format it is by its first bytes; None: binaryhelper's, which looks like anything, or none's."""
    if bytes(data[:4]) in (b"PK\3\4", b"PK\5\6"):
        return NUMPY
    return SAFETENSORS if safetensors.looks_like(data) else None


# ---- files


def recognised_file(path: Path) -> str | None:
    return recognised(_mapped(path))


def open_model(path: Path, helper: str, *, max_bytes: int) -> ModelFile:
    """The file, mapped. max_bytes: of all arrays after inflation. Raises BadModel, OSError."""
    return read(_mapped(path), helper, max_bytes=max_bytes)


def open_npz(path: Path, *, max_bytes: int) -> NpzFile:
    return NpzFile(_mapped(path), max_bytes=max_bytes)


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        try:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except ValueError:  # an empty file cannot be mapped
            return memoryview(b"")


def check_update(
    path: Path, expected: Layout | None, *, helper: str = NUMPY, max_bytes: int, stored_copy: Path | None = None
) -> str | None:
    """Why this file is no update of a model with this layout (None: of any), or None if it is one.

    One pass in flat memory. Names, count, order and shapes must be equal, every value finite; the dtype may differ.
    A good npz with deflated members is also written to `stored_copy`, in stored form and not synced; no other file is.
    Raises OSError.
    """
    try:
        with open_model(path, helper, max_bytes=max_bytes) as file:
            if expected is not None and (fault := layout_fault(file.layout, expected)) is not None:
                return fault
            if stored_copy is not None and isinstance(file, NpzFile) and file.deflated:
                _store(file, stored_copy, [spec.name for spec in file.layout])
            else:
                _check_finite(file)
            return None
    except BadModel as exc:
        return str(exc)


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
            return _store(file, target, file.numbered_names())
        _check_finite(file)
    path.rename(target)
    with target.open("rb") as moved:
        return hashlib.file_digest(moved, "sha256").hexdigest()


def _check_finite(file: ModelFile) -> None:
    for index in range(len(file.layout)):
        for _ in finite_blocks(file, index):
            pass


def _store(file: NpzFile, target: Path, names: Sequence[str]) -> str:
    with NpzWriter(target) as out:
        for index, (name, spec) in enumerate(zip(names, file.layout, strict=True)):
            blocks, order = finite_blocks(file, index), file.fortran_order(index)
            out.add(name, spec.dtype, spec.shape, blocks, fortran_order=order)
    return out.sha256


@dataclass(frozen=True, slots=True)
class Written:
    sha256: str
    size_bytes: int


def write(path: Path, helper: str, layout: Layout, arrays: Sequence[Iterable[Array]]) -> Written:
    """Writes a model at `path`, not synced, in flat memory; in case of a fault the file is gone.

    arrays: of each one the values in C order, in blocks of its dtype. They may be asked for in another order than the
    layout's. Raises BadModel for what the helper cannot hold, ValueError for blocks that do not fit.
    """
    if helper == NUMPY:
        with NpzWriter(path) as writer:
            for spec, blocks in zip(layout, arrays, strict=True):
                writer.add(spec.name, spec.dtype, spec.shape, blocks)
        return Written(writer.sha256, writer.size_bytes)
    digest, size_bytes = hashlib.sha256(), 0
    try:
        with path.open("wb") as file:
            for chunk in _chunks(helper, layout, arrays):
                file.write(chunk)
                digest.update(chunk)
                size_bytes += len(chunk)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Written(digest.hexdigest(), size_bytes)


def _chunks(helper: str, layout: Layout, arrays: Sequence[Iterable[Array]]) -> Iterator[bytes | memoryview]:
    match helper:
        case "binaryhelper":
            return binary.chunks(layout, arrays)
        case "safetensors":
            return safetensors.chunks(layout, arrays)
    raise _unknown(helper)


def _unknown(helper: Any) -> BadModel:
    return BadModel(f"helper {short(str(helper))} is unknown; known: {', '.join(sorted(HELPERS))}")
