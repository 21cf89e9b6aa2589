"""The weighted mean against a plain reference in longdouble, and the ways of folding it that must not matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_server.core.aggregate import (
    BLOCK_ELEMENTS,
    STRIPE_ELEMENTS,
    Abandoned,
    Parameters,
    WeightedMean,
    result_dtype,
    stripes,
)

Update = tuple[Parameters, float]

# n products and n sums, each rounded once to 2**-53 of its size; the values of one coordinate may cancel, so the bound
# is relative to the mean of their absolute values, not to the mean.
TOLERANCE_PER_UPDATE = 4 * 2.0**-53

SHAPES = [(3, 4), (), (0, 5), (7,), (2, 1, 3)]


def some_updates(seed: int, count: int, dtype: str = "float32") -> list[Update]:
    rng = np.random.default_rng(seed)
    return [
        ([(rng.standard_normal(shape) * 10 ** rng.uniform(-3, 3)).astype(dtype) for shape in SHAPES], float(weight))
        for weight in rng.integers(1, 1000, count)
    ]


def sums_of(updates: Sequence[Update]) -> list[WeightedMean]:
    """One of each array."""
    sums = [WeightedMean(int(np.prod(shape))) for shape in SHAPES]
    for index, mean in enumerate(sums):
        mean.fold((update[index].reshape(-1), num_examples) for update, num_examples in updates)
    return sums


def mean_of(updates: Sequence[Update]) -> Parameters:
    return [mean.finish().reshape(shape) for mean, shape in zip(sums_of(updates), SHAPES, strict=True)]


def assert_is_mean(mean: Parameters, updates: Sequence[Update]) -> None:
    weight = np.longdouble(sum(num_examples for _, num_examples in updates))
    for index, array in enumerate(mean):
        terms = [update[index].astype(np.longdouble) * num_examples for update, num_examples in updates]
        exact, size = sum(terms) / weight, sum(map(np.abs, terms)) / weight
        assert array.dtype == np.float64 and array.shape == updates[0][0][index].shape
        assert np.all(np.abs(array - exact) <= TOLERANCE_PER_UPDATE * len(updates) * size)


def same_bits(one: Parameters, other: Parameters) -> bool:
    return [array.tobytes() for array in one] == [array.tobytes() for array in other]


seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 12), st.sampled_from(["float16", "float32", "float64", "int32", "uint64", "bool", ">f4"]))
def test_it_is_the_mean_weighted_by_examples(seed: int, count: int, dtype: str) -> None:
    updates = some_updates(seed, count, "float32")
    if dtype in ("uint64", "bool"):
        updates = [([np.abs(array) for array in update], weight) for update, weight in updates]
    updates = [([array.astype(dtype) for array in update], weight) for update, weight in updates]
    assert_is_mean(mean_of(updates), updates)


@settings(max_examples=60, deadline=None)
@given(seeds, st.permutations(range(8)))
def test_any_order_of_arrival_gives_the_same_bits_when_folded_in_cohort_order(seed: int, arrival: list[int]) -> None:
    cohort = some_updates(seed, 8, "float64")
    arrived = {index: cohort[index] for index in arrival}
    assert same_bits(mean_of([arrived[index] for index in sorted(arrived)]), mean_of(cohort))


@settings(max_examples=60, deadline=None)
@given(seeds, st.permutations(range(8)))
def test_another_order_of_folding_stays_within_the_tolerance(seed: int, order: list[int]) -> None:
    cohort = some_updates(seed, 8, "float64")
    assert_is_mean(mean_of([cohort[index] for index in order]), cohort)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(0, 8))
def test_merged_partial_sums_are_the_mean_of_all(seed: int, cut: int) -> None:
    updates = some_updates(seed, 8)
    mean = []
    for one, other, shape in zip(sums_of(updates[:cut]), sums_of(updates[cut:]), SHAPES, strict=True):
        one.merge(other)
        assert (one.num_updates, one.weight) == (8, sum(weight for _, weight in updates))
        mean.append(one.finish().reshape(shape))
    assert_is_mean(mean, updates)


def test_inputs_are_left_as_they_were_and_may_be_read_only() -> None:
    update = np.ones(4)
    update.flags.writeable = False
    mean = WeightedMean(4)
    mean.fold([(update, 7), (update, 7)])
    mean.finish()
    assert update.tolist() == [1, 1, 1, 1]


def test_an_update_may_be_gone_when_the_next_one_comes() -> None:
    """As when all are read into one buffer."""
    buffer = np.empty(2 * BLOCK_ELEMENTS + 1, np.float32)

    def read() -> Iterator[tuple[np.ndarray, float]]:
        for value in (1.0, 2.0, 6.0):
            buffer[:] = value
            yield buffer, 1

    mean = WeightedMean(buffer.size)
    mean.fold(read())
    assert np.all(mean.finish() == 3)


def _after(updates: int) -> Callable[[], bool]:
    asked = iter([False] * updates + [True])
    return lambda: next(asked)


@pytest.mark.parametrize("updates", [0, 1, 3])
def test_stop_is_asked_before_each_update_and_what_is_half_folded_cannot_be_used(updates: int) -> None:
    mean, update = WeightedMean(3), (np.ones(3), 1)
    mean.fold([update])
    with pytest.raises(Abandoned):
        mean.fold([update] * 4, stop=_after(updates))
    with pytest.raises(AssertionError, match="spoiled"):
        mean.fold([update])
    with pytest.raises(AssertionError, match="spoiled"):
        mean.finish()
    with pytest.raises(AssertionError, match="spoiled"):
        WeightedMean(3).merge(mean)


def test_a_fold_that_is_not_stopped_goes_through() -> None:
    mean = WeightedMean(BLOCK_ELEMENTS + 1)
    mean.fold([(np.ones(BLOCK_ELEMENTS + 1), 2)], stop=lambda: False)
    assert mean.num_updates == 1 and np.all(mean.finish() == 1)


@pytest.mark.parametrize(
    ("second", "error"),
    [
        (np.ones(5), AssertionError),
        (np.ones((2, 3)), AssertionError),
        (np.ones(6, dtype=np.complex128), TypeError),
        (np.full(6, 1e308), FloatingPointError),
    ],
    ids=["another size", "another shape", "complex", "out of float64's range"],
)
def test_what_cannot_be_added_raises_and_spoils_the_sum(second: np.ndarray, error: type[Exception]) -> None:
    mean = WeightedMean(6)
    mean.fold([(np.ones(6), 1)])
    with pytest.raises(error):
        mean.fold([(second, 1000)])
    with pytest.raises(AssertionError):
        mean.finish()


def test_a_mean_of_nothing_and_a_second_finish_are_bugs() -> None:
    with pytest.raises(AssertionError, match="no updates"):
        WeightedMean(2).finish()
    mean = WeightedMean(2)
    mean.fold([(np.ones(2), 1)])
    mean.finish()
    with pytest.raises(AssertionError, match="spent"):
        mean.finish()


@given(st.lists(st.integers(0, 3 * STRIPE_ELEMENTS), max_size=6), st.randoms())
def test_stripes_hold_every_value_once_in_the_order_asked_for_and_are_full_but_for_the_last(
    sizes: list[int], random: Random
) -> None:
    order = list(range(len(sizes)))
    random.shuffle(order)
    cut = list(stripes(sizes, order))
    at = dict.fromkeys(order, 0)
    for piece in (piece for stripe in cut for piece in stripe):
        assert piece.begin == at[piece.index] < piece.end
        at[piece.index] = piece.end
    assert at == dict(enumerate(sizes))
    met = [piece.index for stripe in cut for piece in stripe]
    assert list(dict.fromkeys(met)) == [index for index in order if sizes[index]]
    full = {sum(piece.size for piece in stripe) for stripe in cut[:-1]}
    assert len(full) <= 1
    assert all(BLOCK_ELEMENTS <= size <= STRIPE_ELEMENTS for size in full)
    assert not full or len(cut) >= 2
    assert sum(sizes) < 4 * BLOCK_ELEMENTS or len(cut) >= 4


@pytest.mark.parametrize(
    ("base", "result"),
    [
        ("float16", "float16"),
        ("float32", "float32"),
        (">f4", "=f4"),
        ("float64", "float64"),
        ("int8", "float64"),
        ("uint64", "float64"),
        ("bool", "float64"),
        ("longdouble", "float64"),
    ],
)
def test_a_float_model_keeps_its_dtype_and_all_else_becomes_float64(base: str, result: str) -> None:
    assert result_dtype(np.dtype(base)) == np.dtype(result)
    assert result_dtype(np.dtype(base)).isnative
