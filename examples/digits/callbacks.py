"""The same client as a program of its own: Python functions instead of a compute package, in one process.

`python callbacks.py --api-url URL --data DIR --index I`, after data.py has written DIR. Gives the same bytes as
client/train.py does.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: see client/model.py

import argparse
import asyncio
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from client.model import Parameters, TrainSettings, evaluate, train
from client.shard import Examples, load_file

from fl_client import Client, TaskInfo, TrainResult


@dataclass(frozen=True, slots=True)
class Work:
    """What this client can be asked to do."""

    index: int
    examples: Examples
    validation: Examples

    def train(self, parameters: Parameters, task: TaskInfo) -> TrainResult:
        settings = TrainSettings.from_json(task.settings)
        rng = np.random.default_rng([settings.seed, self.index, task.round])
        trained = train(parameters, *self.examples, settings, rng)
        return TrainResult(trained, len(self.examples[1]), evaluate(trained, *self.examples))

    def validate(self, parameters: Parameters, task: TaskInfo) -> dict[str, float]:
        return evaluate(parameters, *self.validation)


def main() -> None:
    parser = argparse.ArgumentParser(description="One client of the digits federation, without a compute package.")
    parser.add_argument("--api-url", required=True, help="where the server answers, such as http://127.0.0.1:8092")
    parser.add_argument("--data", type=Path, required=True, help="the folder that data.py wrote")
    parser.add_argument("--index", type=int, required=True, help="which shard is ours, from 0")
    parser.add_argument("--name", help="how lists call this client; also its id (default: digits-INDEX)")
    args = parser.parse_args()
    name = args.name or f"digits-{args.index}"
    shard = args.data / f"client-{args.index}.npz"
    work = Work(args.index, load_file(shard, "train"), load_file(shard, "validation"))
    client = Client(api_url=args.api_url, train=work.train, validate=work.validate, name=name, client_id=name)
    asyncio.run(client.run())


if __name__ == "__main__":
    main()
