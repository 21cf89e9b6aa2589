"""The models that travel: the same values in each of the forms that clients send."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_client.wire import codec

MB = 1_000_000  # of float32 values, as in the table of claims
_SHARES = (0.5, 0.25, 0.125, 0.125)  # of the layers


def layers(model_bytes: int, seed: int = 1) -> list[npt.NDArray[np.float32]]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(int(model_bytes * share) // 4, dtype=np.float32) for share in _SHARES]


def encoded(form: str, model_bytes: int) -> bytes:
    """form: "ours" (stored, values aligned), "stored" (numpy.savez), "deflated" (numpy.savez_compressed)."""
    arrays: Sequence[Any] = layers(model_bytes)
    if form == "ours":
        return codec.encode(arrays)
    file = io.BytesIO()
    save = np.savez if form == "stored" else np.savez_compressed
    save(file, **{str(index): array for index, array in enumerate(arrays)})
    return file.getvalue()
