"""Prints how good a model file is on the test split, as one line of JSON: {"loss": …, "accuracy": …}."""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
from pathlib import Path

import numpy as np
from client.model import evaluate, load


def main() -> None:
    parser = argparse.ArgumentParser(description="Scores a model on the test split.")
    parser.add_argument("--model", type=Path, required=True, help="an .npz file, as the server hands it out")
    parser.add_argument("--data", type=Path, required=True, help="the folder that data.py wrote")
    args = parser.parse_args()
    with np.load(args.data / "test.npz") as test:
        print(json.dumps(evaluate(load(args.model), test["x"], test["y"])))


if __name__ == "__main__":
    main()
