"""One client of the digits federation: trains and validates on its own shard, and sends parameters only.

`python client.py --api-url URL --data DIR --index I`, after data.py has written DIR. An update depends on nothing
but the model, the client's index, the round and the session's settings: a task done twice gives the same bytes.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: see model.py

import argparse
import asyncio
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from data import Shard, load_shard
from model import Parameters, TrainSettings, evaluate, train

from fl_client import Client, TaskInfo, TrainResult


@dataclass(frozen=True, slots=True)
class Work:
    """What this client can be asked to do."""

    index: int
    shard: Shard

    def train(self, parameters: Parameters, task: TaskInfo) -> TrainResult:
        settings = TrainSettings.from_json(task.settings)
        rng = np.random.default_rng([settings.seed, self.index, task.round])
        trained = train(parameters, *self.shard.train, settings, rng)
        return TrainResult(trained, len(self.shard.train.y), evaluate(trained, *self.shard.train))

    def validate(self, parameters: Parameters, task: TaskInfo) -> dict[str, float]:
        return evaluate(parameters, *self.shard.validation)


def main() -> None:
    parser = argparse.ArgumentParser(description="One client of the digits federation.")
    parser.add_argument("--api-url", required=True, help="where the server answers, such as http://127.0.0.1:8092")
    parser.add_argument("--data", type=Path, required=True, help="the folder that data.py wrote")
    parser.add_argument("--index", type=int, required=True, help="which shard is ours, from 0")
    parser.add_argument("--name", help="how lists call this client; also its id (default: digits-INDEX)")
    args = parser.parse_args()
    name = args.name or f"digits-{args.index}"
    work = Work(args.index, load_shard(args.data, args.index))
    client = Client(api_url=args.api_url, train=work.train, validate=work.validate, name=name, client_id=name)
    asyncio.run(client.run())


if __name__ == "__main__":
    main()
