"""scikit-learn's digits, cut into one non-IID shard a client, and the test split that no client sees.

`python data.py --out DIR --clients 5` writes client-0.npz … client-4.npz and test.npz, once: importing scikit-learn
takes over a second, and training (client/shard.py) and scoring need numpy alone.
Labels are spread over the clients by a Dirichlet distribution, after Hsu et al. 2019, arXiv:1909.06335.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

TEST_SHARE = 0.2
VALIDATION_SHARE = 0.1
SMALLEST_SHARD = 20
PIXEL_MEAN, PIXEL_STD = 4.88, 6.02  # of the whole data set; a pixel is 0 to 16


class Examples(NamedTuple):
    """x: (n, 64), pixels of mean 0 and variance 1; y: (n,), digits 0 to 9."""

    x: Floats
    y: Labels


class Shard(NamedTuple):
    train: Examples
    validation: Examples


def test_split() -> Examples:
    """A fifth of each digit, always the same, whatever the clients' seed is."""
    examples, test = _digits()
    return Examples(examples.x[test], examples.y[test])


def shard(index: int, of: int, *, seed: int = 7, alpha: float = 0.5) -> Shard:
    """The examples of client `index`; the shards of all `of` clients are disjoint and make up the train split.

    alpha: the smaller, the fewer digits each client has.
    """
    examples, _ = _digits()
    mine = shard_indices(of, seed=seed, alpha=alpha)[index]
    held_back = max(1, round(VALIDATION_SHARE * len(mine)))
    validation, train = mine[:held_back], mine[held_back:]
    return Shard(
        train=Examples(examples.x[train], examples.y[train]),
        validation=Examples(examples.x[validation], examples.y[validation]),
    )


def shard_indices(of: int, *, seed: int = 7, alpha: float = 0.5) -> list[NDArray[np.intp]]:
    """One array of shuffled row numbers a client; raises ValueError if not everybody can get SMALLEST_SHARD rows."""
    examples, test = _digits()
    rows = np.setdiff1d(np.arange(len(examples.y)), test)
    if not 1 <= of <= len(rows) // SMALLEST_SHARD:
        raise ValueError(f"clients: {of}, between 1 and {len(rows) // SMALLEST_SHARD} needed")
    rng = np.random.default_rng(seed)
    parts: list[list[NDArray[np.intp]]] = [[] for _ in range(of)]
    for digit in range(10):
        of_digit = rng.permutation(rows[examples.y[rows] == digit])
        shares = rng.dirichlet(np.full(of, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(of_digit)).astype(int)
        for part, piece in zip(parts, np.split(of_digit, cuts), strict=True):
            part.append(piece)
    shards = [rng.permutation(np.concatenate(part)) for part in parts]
    return _with_smallest(shards, SMALLEST_SHARD)


def _with_smallest(shards: list[NDArray[np.intp]], smallest: int) -> list[NDArray[np.intp]]:
    """The poorest take from the richest until each has `smallest` rows."""
    while len(shards[poorest := int(np.argmin([len(s) for s in shards]))]) < smallest:
        richest = int(np.argmax([len(s) for s in shards]))
        missing = smallest - len(shards[poorest])
        count = min(missing, len(shards[richest]) - smallest)
        given, kept = np.split(shards[richest], [count])
        shards[poorest], shards[richest] = np.concatenate([shards[poorest], given]), kept
    return shards


@cache
def _digits() -> tuple[Examples, NDArray[np.intp]]:
    """All examples, and the row numbers of the test split."""
    from sklearn.datasets import load_digits  # a second to import: only who writes the shards pays it

    x, y = load_digits(return_X_y=True)
    examples = Examples(((x - PIXEL_MEAN) / PIXEL_STD).astype(np.float32), y.astype(np.int64))
    rng = np.random.default_rng(20)
    rows_by_digit = [rng.permutation(np.flatnonzero(examples.y == digit)) for digit in range(10)]
    test = np.sort(np.concatenate([rows[: round(TEST_SHARE * len(rows))] for rows in rows_by_digit]))
    return examples, test


def write(out: Path, *, clients: int, seed: int = 7, alpha: float = 0.5) -> None:
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "test.npz", **test_split()._asdict())
    for index in range(clients):
        train, validation = shard(index, clients, seed=seed, alpha=alpha)
        arrays = {"train_x": train.x, "train_y": train.y, "validation_x": validation.x, "validation_y": validation.y}
        np.savez(out / f"client-{index}.npz", **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes each client's shard of the digits, and the test split.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--alpha", type=float, default=0.5, help="the smaller, the fewer digits each client has")
    args = parser.parse_args()
    try:
        write(args.out, clients=args.clients, seed=args.seed, alpha=args.alpha)
    except ValueError as exc:
        parser.error(str(exc))


if __name__ == "__main__":
    main()
