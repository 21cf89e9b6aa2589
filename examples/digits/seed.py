"""Writes a seed model, from which a session starts: `python seed.py --out seed.npz`."""

from __future__ import annotations

import argparse
from pathlib import Path

from model import init

from fl_client.wire import codec


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the model from which a session starts.")
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    args.out.write_bytes(codec.encode(init(args.seed)))


if __name__ == "__main__":
    main()
