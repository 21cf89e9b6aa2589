"""predict.py MODEL PREDICTION: the digits that the model sees in this client's validation examples."""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: see model.py

import json
import sys
from pathlib import Path

import model
import shard


def main(given: str, prediction: str) -> None:
    x, _ = shard.load("validation")
    Path(prediction).write_text(json.dumps({"digits": model.predict(model.load(Path(given)), x)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
