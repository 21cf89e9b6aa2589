"""validate.py MODEL METRICS: loss and accuracy on the examples that this client keeps back from training."""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: see model.py

import json
import sys
from pathlib import Path

import model
import shard


def main(given: str, metrics: str) -> None:
    x, y = shard.load("validation")
    Path(metrics).write_text(json.dumps(model.evaluate(model.load(Path(given)), x, y)))


if __name__ == "__main__":
    main(*sys.argv[1:])
