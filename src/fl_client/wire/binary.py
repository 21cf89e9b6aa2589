"""binaryhelper's format, for clients without numpy: one flat array of little-endian float64, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from fl_client.wire.layout import (
    Array,
    ArraySpec,
    BadModel,
    Disk,
    Layout,
    Memory,
    ModelFile,
    plain_bytes,
    refuse_dtype,
    short,
)

DTYPE = np.dtype("<f8")


def read(source: Memory | Disk, *, max_bytes: int) -> ModelFile:
    """One array, named "0". Raises BadModel."""
    size_bytes = source.size_bytes
    if size_bytes % DTYPE.itemsize or not size_bytes:
        raise BadModel(f"{size_bytes} bytes are no flat array of float64: a multiple of {DTYPE.itemsize} needed")
    if size_bytes > max_bytes:
        raise BadModel(f"the model's arrays are larger than the {max_bytes} bytes allowed")
    return ModelFile(source, (ArraySpec("0", DTYPE, (size_bytes // DTYPE.itemsize,)),), [0])


def chunks(layout: Layout, arrays: Sequence[Iterable[Array]]) -> Iterator[memoryview]:
    """Flat arrays, one after the other, whatever their names, cast to float64. Raises BadModel, before any piece."""
    for spec in layout:
        refuse_dtype(spec.name, spec.dtype)
        if len(spec.shape) != 1:
            raise BadModel(f"binaryhelper takes flat arrays; array {short(spec.name)} has shape {spec.shape}")
    if not sum(spec.shape[0] for spec in layout):
        raise BadModel("binaryhelper needs a value at least")
    for spec, blocks in zip(layout, arrays, strict=True):
        yield from plain_bytes(spec, blocks, DTYPE)
