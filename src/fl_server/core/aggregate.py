"""How the updates of a round become one: the mean weighted by examples (McMahan et al. 2017, arXiv:1602.05629).

A contribution is a weighted sum that has `+`: updates stream in one by one, and partial sums from other hosts merge.
The order of folding shows in the last bit, so whoever must repeat a result folds in the cohort's order. Nothing here
looks at more than one stripe of coordinates: several threads take several, and a model is never in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Parameters = list[np.ndarray]

BLOCK_ELEMENTS = 65_536  # of float64: they stay in a core's cache, and a call is worth its waits for the GIL
STRIPE_ELEMENTS = 4 * BLOCK_ELEMENTS  # read from one update at a time
LEAST_STRIPES = 4  # of a model that is not very small


class Abandoned(Exception):
    """The caller's stop() said that nobody waits for the result any more."""


class WeightedMean:
    """Of some coordinates: sum of update * num_examples, and of num_examples, in float64; divided once, at the end.

    After a fold that raised, and after finish(), what is left is no sum of updates: any later use is an AssertionError.
    """

    def __init__(self, size: int) -> None:
        self.num_updates = 0
        self.weight = 0.0
        self._sum: np.ndarray | None = np.zeros(size)  # None: spent, or spoiled by half a fold

    def fold(
        self,
        updates: Iterable[tuple[np.ndarray, float]],
        stop: Callable[[], bool] | None = None,
        scratch: np.ndarray | None = None,
    ) -> None:
        """Adds updates, each with its num_examples: flat, of any real dtype; one is not looked at after the next came.

        Raises Abandoned as soon as stop() is true (asked before each), FloatingPointError if a sum leaves float64's
        range, TypeError for a dtype that is no real number. scratch: BLOCK_ELEMENTS of float64.
        """
        total = self._take()
        scratch = np.empty(BLOCK_ELEMENTS) if scratch is None else scratch
        cuts = []
        for start in range(0, total.size, BLOCK_ELEMENTS):
            cut = slice(start, min(start + BLOCK_ELEMENTS, total.size))
            cuts.append((scratch[: cut.stop - start], total[cut], cut))
        with np.errstate(over="raise"):
            for values, num_examples in updates:
                assert num_examples > 0, f"{num_examples} examples"
                assert values.shape == total.shape, f"shape {values.shape}, {total.shape} so far"
                if stop is not None and stop():
                    raise Abandoned
                for product, sums, cut in cuts:
                    # A copy that casts, then a product in place: faster than a product that casts.
                    np.copyto(product, values[cut], casting="same_kind")
                    product *= num_examples
                    sums += product
                self.num_updates += 1
                self.weight += num_examples
        self._sum = total

    def merge(self, other: WeightedMean) -> None:
        """Adds the updates folded into `other`, which is spent by it."""
        total, others = self._take(), other._take()
        with np.errstate(over="raise"):
            total += others
        self.num_updates += other.num_updates
        self.weight += other.weight
        self._sum = total

    def finish(self) -> np.ndarray:
        """The mean, float64. Divides in place: the object is spent by it."""
        total = self._take()
        assert self.num_updates, "a mean of no updates"
        total /= self.weight
        return total

    def _take(self) -> np.ndarray:
        """The sum; whoever still has a whole one when done puts it back."""
        assert self._sum is not None, "spent, or spoiled by a fold that raised"
        total, self._sum = self._sum, None
        return total


def result_dtype(base: np.dtype) -> np.dtype:
    """The dtype of the new model: float16, 32 and 64 stay as the global model has them, all else becomes float64."""
    native = base.newbyteorder("=")
    return native if native in (np.float16, np.float32) else np.dtype(np.float64)


@dataclass(frozen=True, slots=True)
class Piece:
    """Values of one array, in C order."""

    index: int
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


def stripes(sizes: Sequence[int], order: Iterable[int]) -> Iterator[list[Piece]]:
    """All values of arrays of these sizes, taken in this order, cut into full stripes and a last one.

    Of at most STRIPE_ELEMENTS; of fewer where else there were not enough for all threads.
    """
    full = min(max(BLOCK_ELEMENTS, -(-sum(sizes) // LEAST_STRIPES)), STRIPE_ELEMENTS)
    stripe: list[Piece] = []
    room = full
    for index in order:
        begin = 0
        while begin < sizes[index]:
            end = min(sizes[index], begin + room)
            stripe.append(Piece(index, begin, end))
            room -= end - begin
            begin = end
            if not room:
                yield stripe
                stripe, room = [], full
    if stripe:
        yield stripe


def blocks(*arrays: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Arrays of one shape, flattened in C order and cut at the same places.

    Views to write through where an array is C-contiguous; else copies, a block at a time.
    """
    flats = [array.reshape(-1) if array.flags.c_contiguous else array.flat for array in arrays]
    for start in range(0, arrays[0].size, BLOCK_ELEMENTS):
        yield [flat[start : start + BLOCK_ELEMENTS] for flat in flats]
