"""The weighted mean against a plain reference in longdouble, and the ways of folding it that must not matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_server.core.aggregate import BLOCK_ELEMENTS, Abandoned, Parameters, WeightedMean, result_dtype

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


def mean_of(updates: Sequence[Update]) -> Parameters:
    mean = WeightedMean()
    for update, num_examples in updates:
        mean.fold(update, num_examples)
    return mean.finish()


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
    parts = WeightedMean(), WeightedMean()
    for index, (update, num_examples) in enumerate(updates):
        parts[index >= cut].fold(update, num_examples)
    parts[0].merge(parts[1])
    assert (parts[0].num_updates, parts[0].weight) == (8, sum(weight for _, weight in updates))
    assert_is_mean(parts[0].finish(), updates)


@pytest.mark.parametrize("order", ["C", "F", "strided", "reversed"])
def test_the_memory_order_of_an_update_does_not_matter(order: str) -> None:
    size = 2 * BLOCK_ELEMENTS + 6
    plain = np.arange(size, dtype=np.float32).reshape(2, -1)
    laid_out = {
        "C": plain.copy(),
        "F": np.asfortranarray(plain),
        "strided": np.repeat(plain, 2, axis=1)[:, ::2],
        "reversed": plain[::-1].copy()[::-1],
    }[order]
    assert same_bits(mean_of([([laid_out], 3), ([plain], 1)]), [plain.astype(np.float64)])


def test_a_read_only_map_of_a_file_is_folded_as_it_is(tmp_path: Path) -> None:
    np.save(tmp_path / "update.npy", np.arange(6, dtype=np.float32).reshape(2, 3))
    mapped = np.load(tmp_path / "update.npy", mmap_mode="r")
    assert not mapped.flags.writeable
    assert mean_of([([mapped], 2.5)])[0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_inputs_are_left_as_they_were() -> None:
    update = [np.ones(4)]
    mean = WeightedMean()
    mean.fold(update, 7)
    mean.fold(update, 7)
    mean.finish()
    assert update[0].tolist() == [1, 1, 1, 1]


def _after(blocks: int) -> Callable[[], bool]:
    asked = iter([False] * blocks + [True])
    return lambda: next(asked)


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_stop_is_asked_before_each_block_and_what_is_half_folded_cannot_be_used(blocks: int) -> None:
    mean, update = WeightedMean(), [np.ones(2 * BLOCK_ELEMENTS), np.ones(2 * BLOCK_ELEMENTS)]
    mean.fold(update, 1)
    with pytest.raises(Abandoned):
        mean.fold(update, 1, stop=_after(blocks))
    with pytest.raises(AssertionError, match="spoiled"):
        mean.fold(update, 1)
    with pytest.raises(AssertionError, match="spoiled"):
        mean.finish()
    with pytest.raises(AssertionError, match="spoiled"):
        WeightedMean().merge(mean)


def test_a_fold_that_is_not_stopped_goes_through() -> None:
    mean = WeightedMean()
    mean.fold([np.ones(BLOCK_ELEMENTS + 1)], 2, stop=lambda: False)
    assert mean.num_updates == 1 and np.all(mean.finish()[0] == 1)


@pytest.mark.parametrize(
    ("second", "error"),
    [
        ([np.ones((2, 3)), np.ones(2)], AssertionError),
        ([np.ones(6)], AssertionError),
        ([np.ones((2, 3), dtype=np.complex128)], TypeError),
        ([np.full((2, 3), 1e308)], FloatingPointError),
    ],
    ids=["another count", "another shape", "complex", "out of float64's range"],
)
def test_what_cannot_be_added_raises_and_spoils_the_sum(second: Parameters, error: type[Exception]) -> None:
    mean = WeightedMean()
    mean.fold([np.ones((2, 3))], 1)
    with pytest.raises(error):
        mean.fold(second, 1000)
    with pytest.raises(AssertionError):
        mean.finish()


def test_a_mean_of_nothing_and_a_second_finish_are_bugs() -> None:
    with pytest.raises(AssertionError, match="no updates"):
        WeightedMean().finish()
    mean = WeightedMean()
    mean.fold([np.ones(2)], 1)
    mean.finish()
    with pytest.raises(AssertionError, match="spent"):
        mean.finish()


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
