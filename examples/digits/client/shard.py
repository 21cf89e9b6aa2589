"""This client's own examples, as examples/digits/data.py has cut and written them; they never leave the device.

DIGITS_DATA is the folder; which file in it is ours, the number at the end of the client's name says: digits-3.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Examples = tuple[NDArray[np.float32], NDArray[np.int64]]  # (n, 64) pixels of mean 0 and variance 1; (n,) digits


def own_index() -> int:
    name = os.environ.get("FL_CLIENT_NAME", "")
    number = re.search(r"\d+$", name)
    if number is None:
        raise SystemExit(f"which shard? The client's name has to end with its number (digits-0), and is {name!r}")
    return int(number[0])


def load(split: Literal["train", "validation"]) -> Examples:
    data = os.environ.get("DIGITS_DATA")
    if not data:
        raise SystemExit("where are the examples? Set DIGITS_DATA to the folder that data.py wrote")
    return load_file(Path(data) / f"client-{own_index()}.npz", split)


def load_file(path: Path, split: str) -> Examples:
    try:
        with np.load(path) as arrays:
            return arrays[f"{split}_x"], arrays[f"{split}_y"]
    except FileNotFoundError:
        raise SystemExit(f"{path} is missing: data.py writes one file for each of its --clients") from None
