"""Server optimizers against vectors that FEDn 0.33 produces, and against the paper's formulas in longdouble."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_server.core.aggregate import BLOCK_ELEMENTS, Parameters, WeightedMean
from fl_server.core.server_opt import FedAvg, FedOpt, parse

# Model and updates behind FEDn's vectors: A with 10 examples, B with 30, in each round.
GLOBAL: Parameters = [np.array([1.0, 2.0, 3.0]), np.array([0.5])]
A: Parameters = [np.array([1.5, 2.0, 2.0]), np.array([1.5])]
B: Parameters = [np.array([0.5, 3.0, 4.0]), np.array([0.0])]

FEDN: dict[str, list[tuple[list[float], list[float]]]] = {
    "fedavg": [([0.75, 2.75, 3.5], [0.375])] * 2,
    "adam": [
        ([0.9003991920670071, 2.099866756442037, 3.099800201991812], [0.4007967685601115]),
        ([0.7716975664810344, 2.233621081999987, 3.2327512683722937], [0.292773027331885]),
    ],
    "yogi": [
        ([0.9003992000032001, 2.099866755555516, 3.0998001999998], [0.40079680005119844]),
        ([0.7721693377242571, 2.2332390728418576, 3.232346096914331], [0.2932883396395879]),
    ],
    "adagrad": [
        ([0.9900039992, 2.0099986667555556, 3.0099980002], [0.4900079968000005]),
        ([0.9765900580484083, 2.0234273735747372, 3.0234232854599155], [0.4766218916061972]),
    ],
}


def mean_of_a_and_b() -> Parameters:
    means = []
    for a, b in zip(A, B, strict=True):
        mean = WeightedMean(a.size)
        mean.fold([(a, 10), (b, 30)])
        means.append(mean.finish())
    return means


@pytest.mark.parametrize("name", FEDN)
def test_two_rounds_give_what_fedn_gives(name: str) -> None:
    kwargs = {"serveropt": name, "learning_rate": 0.1}
    optimizer = parse("fedavg", None) if name == "fedavg" else parse("fedopt", kwargs)
    model, state = GLOBAL, list[np.ndarray]()
    for vectors in FEDN[name]:
        model, state = optimizer.step(model, mean_of_a_and_b(), state)
        for array, vector in zip(model, vectors, strict=True):
            np.testing.assert_allclose(array, vector, rtol=1e-12, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["adam", "yogi", "adagrad"]), st.integers(1, 4))
def test_any_number_of_rounds_follows_algorithm_2_of_the_paper(seed: int, serveropt: str, rounds: int) -> None:
    rng, high = np.random.default_rng(seed), np.longdouble
    eta, beta1, beta2, tau = 0.05, 0.8, 0.95, 0.01
    optimizer = FedOpt(serveropt, eta, beta1, beta2, tau)
    model, state = [rng.standard_normal((3, 5))], list[np.ndarray]()
    exact, m, v = model[0].astype(high), np.zeros((3, 5), high), np.full((3, 5), high(tau) ** 2)
    for _ in range(rounds):
        mean = rng.standard_normal((3, 5))
        delta = mean.astype(high) - exact
        m = beta1 * m + (1 - high(beta1)) * delta
        match serveropt:
            case "adam":
                v = beta2 * v + (1 - high(beta2)) * delta**2
            case "yogi":
                v = v - (1 - high(beta2)) * np.sign(v - delta**2) * delta**2
            case "adagrad":
                v = v + delta**2
        exact = exact + eta * m / (np.sqrt(v) + tau)
        model, state = optimizer.step(model, [mean.copy()], state)
    # a dozen roundings a round, relative to numbers of order 1; the rounds before them feed in
    np.testing.assert_allclose(model[0], exact.astype(np.float64), rtol=0, atol=1e-12)
    np.testing.assert_allclose(state[0], m.astype(np.float64), rtol=0, atol=1e-12)
    np.testing.assert_allclose(state[1], v.astype(np.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("base", "result"), [("float16", "float16"), ("float32", "float32"), ("int64", "float64"), (">f8", "float64")]
)
def test_fedavg_gives_the_model_in_its_own_dtype_and_fedopt_in_float64(base: str, result: str) -> None:
    model = [array.astype(base) for array in GLOBAL]
    assert [array.dtype for array in FedAvg().step(model, mean_of_a_and_b(), [])[0]] == [result] * 2
    assert [array.dtype for array in FedOpt().step(model, mean_of_a_and_b(), [])[0]] == [np.float64] * 2


def test_the_former_model_and_state_are_only_read_and_the_means_memory_is_used_again() -> None:
    optimizer = FedOpt()
    _, state = optimizer.step(GLOBAL, mean_of_a_and_b(), [])
    model, kept = [array.copy() for array in GLOBAL], [array.copy() for array in state]
    for array in (*model, *state):
        array.flags.writeable = False
    mean = mean_of_a_and_b()
    new, _ = optimizer.step(model, mean, state)
    assert all(array is ours for array, ours in zip(new, mean, strict=True))
    for array, same in zip((*model, *state), (*GLOBAL, *kept), strict=True):
        np.testing.assert_array_equal(array, same)


def test_every_memory_order_and_every_shape_gives_the_same_model() -> None:
    rng = np.random.default_rng(1)
    plain = [rng.standard_normal((2, BLOCK_ELEMENTS + 3)), np.array(2.0), np.zeros((0, 3))]
    fortran = [np.asfortranarray(array) for array in plain]
    means = [rng.standard_normal(array.shape) for array in plain]
    results = []
    for model in (plain, fortran):
        new, state = FedOpt().step(model, [np.array(array) for array in means], [])
        results.append(FedOpt().step(model, new, state if model is plain else [np.asfortranarray(s) for s in state]))
    for one, other in zip(*((*model, *state) for model, state in results), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("optimizer", [FedAvg(), FedOpt("adagrad", 1.0)], ids=["fedavg", "fedopt"])
def test_a_result_out_of_range_raises(optimizer: FedAvg | FedOpt) -> None:
    with pytest.raises(FloatingPointError):
        optimizer.step([np.zeros(2, dtype=np.float16)], [np.array([1.0, 1e200])], [])


@pytest.mark.parametrize("nothing", [None, "", "  ", {}, "{}"])
def test_nothing_given_means_fedns_defaults(nothing: Any) -> None:
    assert parse("fedavg", nothing) == FedAvg()
    assert parse("fedopt", nothing) == FedOpt("adam", 1e-3, 0.9, 0.99, 1e-4)


@pytest.mark.parametrize("as_text", [False, True])
def test_settings_are_taken_from_a_mapping_or_from_json_text_and_whole_numbers_are_numbers(as_text: bool) -> None:
    given = {"serveropt": "yogi", "learning_rate": 1, "beta1": 0, "tau": 0.5}
    assert parse("fedopt", json.dumps(given) if as_text else given) == FedOpt("yogi", 1.0, 0.0, 0.99, 0.5)


@pytest.mark.parametrize(
    ("aggregator", "kwargs", "message"),
    [
        ("sgd", None, "aggregator: 'sgd' is unknown; known: fedavg, fedopt"),
        ("", None, "aggregator: '' is unknown; known: fedavg, fedopt"),
        ("fedavg", {"tau": 1.0}, "aggregator_kwargs: tau is unknown to fedavg; known: none"),
        ("fedopt", {"lr": 1.0}, "aggregator_kwargs: lr is unknown to fedopt; known: serveropt, "),
        ("fedopt", {"serveropt": "sgd"}, "aggregator_kwargs: serveropt: 'sgd' is unknown; known: adagrad, adam, yogi"),
        ("fedopt", {"serveropt": ["adam"]}, "aggregator_kwargs: serveropt: ['adam'] is unknown"),
        ("fedopt", {"learning_rate": 0}, "aggregator_kwargs: learning_rate: 0, "),
        ("fedopt", {"learning_rate": True}, "aggregator_kwargs: learning_rate: True, "),
        ("fedopt", {"learning_rate": float("inf")}, "aggregator_kwargs: learning_rate: inf, "),
        ("fedopt", {"learning_rate": 10**400}, "aggregator_kwargs: learning_rate: 1000"),
        ("fedopt", {"beta1": 1.0}, "aggregator_kwargs: beta1: 1.0, a number in [0, 1) needed"),
        ("fedopt", {"beta2": -0.1}, "aggregator_kwargs: beta2: -0.1, "),
        ("fedopt", {"beta2": "0.9"}, "aggregator_kwargs: beta2: '0.9', "),
        ("fedopt", {"tau": float("nan")}, "aggregator_kwargs: tau: nan, "),
        ("fedopt", '{"tau": NaN}', "aggregator_kwargs: tau: nan, "),
        ("fedopt", "{'tau': 1}", "aggregator_kwargs: no JSON: "),
        ("fedopt", "[" * 100_000, "aggregator_kwargs: no JSON: "),
        ("fedopt", "[1]", "aggregator_kwargs: [1], an object with named settings needed"),
        ("fedopt", 3, "aggregator_kwargs: 3, an object"),
    ],
)
def test_what_is_unknown_or_out_of_range_is_refused_by_its_name(aggregator: str, kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse(aggregator, kwargs)
    assert str(refused.value).startswith(message)
