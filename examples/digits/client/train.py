"""train.py MODEL TRAINED: some epochs on this client's own examples.

The result depends on nothing but the model, the client's number, the round and the session's settings: a task that is
done twice gives the same bytes. Run in the package's folder.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: see model.py

import json
import sys
from pathlib import Path

import model
import numpy as np
import shard


def main(given: str, trained: str) -> None:
    x, y = shard.load("train")
    settings = model.TrainSettings.from_json(json.loads(Path(f"{given}-metadata").read_text()))
    number = int(os.environ.get("FL_ROUND", "1"))
    rng = np.random.default_rng([settings.seed, shard.own_index(), number])
    parameters = model.train(model.load(Path(given)), x, y, settings, rng)
    model.save(parameters, Path(trained))
    metrics = model.evaluate(parameters, x, y)
    Path(f"{trained}-metadata").write_text(json.dumps({"num_examples": len(y), **metrics}))
    print(f"round {number}: {len(y)} examples, loss {metrics['loss']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
