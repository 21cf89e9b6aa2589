"""How the updates of a round become one: the mean weighted by examples (McMahan et al. 2017, arXiv:1602.05629).

A contribution is a weighted sum that has `+`: updates stream in one by one, and partial sums from other hosts merge.
The order of folding shows in the last bit, so whoever must repeat a result folds in the cohort's order. Memory is one
float64 model whatever the number of updates; inputs are only read, block by block, and may be maps of files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

Parameters = list[np.ndarray]

BLOCK_ELEMENTS = 32_768  # of float64: accumulator, scratch and input stay in the cache of one core


class Abandoned(Exception):
    """The caller's stop() said that nobody waits for the result any more."""


class WeightedMean:
    """Sum of update * num_examples, and of num_examples, in float64; divided once, at the end.

    After a fold that raised, and after finish(), what is left is no sum of updates: any later use is an AssertionError.
    """

    def __init__(self) -> None:
        self.num_updates = 0
        self.weight = 0.0
        self._sums: Parameters | None = []  # None: spent, or spoiled by half a fold

    def fold(self, update: Sequence[np.ndarray], num_examples: float, stop: Callable[[], bool] | None = None) -> None:
        """Adds an update of the same shapes as those before it.

        Arrays of any real dtype, order and byte order. Raises Abandoned as soon as stop() is true (asked before each
        block), FloatingPointError if a sum leaves float64's range, TypeError for a dtype that is no real number.
        """
        sums = self._take()
        assert num_examples > 0, f"{num_examples} examples"
        if not self.num_updates:
            sums = [np.zeros(array.shape) for array in update]
        _assert_same_shapes(sums, update)
        scratch = np.empty(BLOCK_ELEMENTS)
        with np.errstate(over="raise"):
            for total, array in zip(sums, update, strict=True):
                for sum_block, block in blocks(total, array):
                    if stop is not None and stop():
                        raise Abandoned
                    product = scratch[: block.size]
                    np.multiply(block, num_examples, out=product, dtype=np.float64)
                    sum_block += product
        self.num_updates += 1
        self.weight += num_examples
        self._sums = sums

    def merge(self, other: WeightedMean) -> None:
        """Adds the updates folded into `other`, which is spent by it."""
        sums, others = self._take(), other._take()
        if self.num_updates and other.num_updates:
            _assert_same_shapes(sums, others)
            with np.errstate(over="raise"):
                for total, array in zip(sums, others, strict=True):
                    total += array
        self.num_updates += other.num_updates
        self.weight += other.weight
        self._sums = sums or others

    def finish(self) -> Parameters:
        """The mean, float64. Divides in place: the object is spent by it."""
        sums = self._take()
        assert self.num_updates, "a mean of no updates"
        for total in sums:
            total /= self.weight
        return sums

    def _take(self) -> Parameters:
        """The sums; whoever still has whole ones when done puts them back."""
        assert self._sums is not None, "spent, or spoiled by a fold that raised"
        sums, self._sums = self._sums, None
        return sums


def result_dtype(base: np.dtype) -> np.dtype:
    """The dtype of the new model: float16, 32 and 64 stay as the global model has them, all else becomes float64."""
    native = base.newbyteorder("=")
    return native if native in (np.float16, np.float32) else np.dtype(np.float64)


def blocks(*arrays: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Arrays of one shape, flattened in C order and cut at the same places.

    Views to write through where an array is C-contiguous; else copies, a block at a time.
    """
    flats = [array.reshape(-1) if array.flags.c_contiguous else array.flat for array in arrays]
    for start in range(0, arrays[0].size, BLOCK_ELEMENTS):
        yield [flat[start : start + BLOCK_ELEMENTS] for flat in flats]


def _assert_same_shapes(sums: Sequence[np.ndarray], update: Sequence[np.ndarray]) -> None:
    ours, theirs = [array.shape for array in sums], [array.shape for array in update]
    assert ours == theirs, f"shapes {theirs}, {ours} so far"
