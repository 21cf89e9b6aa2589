"""Server optimizers: how the cohort's mean moves the global model.

Pure numpy, one function of (model, mean, state). The difference `mean - model` is the pseudo-gradient of Reddi et
al. 2021, "Adaptive Federated Optimization" (arXiv:2003.00295), Algorithm 2. Names and defaults of the settings are
FEDn's, and so is the arithmetic where the paper leaves it open: v starts at tau**2, m without bias correction.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from fl_server.core.aggregate import Parameters, blocks, result_dtype


class ServerOptimizer(Protocol):
    def step(
        self, model: Sequence[np.ndarray], mean: Parameters, state: Sequence[np.ndarray]
    ) -> tuple[Parameters, Parameters]:
        """The new model, and the state for the next round.

        mean: float64, of the model's shapes, C order; its memory is reused for the result. model, state: only read.
        state: what the former step of this session returned, or empty. Raises FloatingPointError if a result leaves
        its dtype's range.
        """


@dataclass(frozen=True, slots=True)
class FedAvg:
    """The mean is the new model, in the dtype of the old one (McMahan et al. 2017)."""

    def step(
        self, model: Sequence[np.ndarray], mean: Parameters, state: Sequence[np.ndarray]
    ) -> tuple[Parameters, Parameters]:
        with np.errstate(over="raise"):
            new = [new.astype(result_dtype(old.dtype), copy=False) for old, new in zip(model, mean, strict=True)]
        return new, []


@dataclass(frozen=True, slots=True)
class FedOpt:
    """FedAdam, FedYogi or FedAdagrad, float64. State: all first moments, then all second moments."""

    serveropt: str = "adam"
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99  # not used by adagrad
    tau: float = 1e-4

    def __post_init__(self) -> None:
        """Raises ValueError; the message begins with the field's name."""
        if self.serveropt not in ("adam", "yogi", "adagrad"):
            raise ValueError(f"serveropt: {self.serveropt!r} is unknown; known: adagrad, adam, yogi")
        for name in ("learning_rate", "tau"):
            if not _is_real(value := getattr(self, name)) or not 0 < value <= sys.float_info.max:
                raise ValueError(f"{name}: {value!r}, a finite number above 0 needed")
        for name in ("beta1", "beta2"):
            if not _is_real(value := getattr(self, name)) or not 0 <= value < 1:
                raise ValueError(f"{name}: {value!r}, a number in [0, 1) needed")

    def step(
        self, model: Sequence[np.ndarray], mean: Parameters, state: Sequence[np.ndarray]
    ) -> tuple[Parameters, Parameters]:
        count = len(model)
        assert len(mean) == count and len(state) in (0, 2 * count), f"{count} arrays, {len(state)} in the state"
        assert all(array.flags.c_contiguous for array in mean), "the result is written through flat views"
        if state:
            moments = [np.empty(array.shape) for array in (*mean, *mean)]
        else:
            moments = [np.full(array.shape, start) for start in (0.0, self.tau**2) for array in mean]
            state = moments  # moved in place
        with np.errstate(over="raise", invalid="raise"):
            for arrays in zip(model, mean, state[:count], state[count:], moments[:count], moments[count:], strict=True):
                for cut in blocks(*arrays):
                    self._move(*cut)
        return mean, moments

    def _move(
        self,
        old: np.ndarray,
        mean: np.ndarray,
        former_m: np.ndarray,
        former_v: np.ndarray,
        m: np.ndarray,
        v: np.ndarray,
    ) -> None:
        """One block: writes m, v (which may be the former ones), and the new model over the mean."""
        delta = np.subtract(mean, old)
        np.multiply(former_m, self.beta1, out=m)
        m += (1.0 - self.beta1) * delta
        squared = np.square(delta, out=delta)
        match self.serveropt:
            case "adam":
                np.multiply(former_v, self.beta2, out=v)
                v += (1.0 - self.beta2) * squared
            case "yogi":
                np.subtract(former_v, (1.0 - self.beta2) * np.sign(former_v - squared) * squared, out=v)
            case _:
                np.add(former_v, squared, out=v)
        np.add(old, self.learning_rate * m / (np.sqrt(v) + self.tau), out=mean)


_OPTIMIZERS: Mapping[str, type[FedAvg] | type[FedOpt]] = {"fedavg": FedAvg, "fedopt": FedOpt}


def parse(aggregator: str, kwargs: Mapping[str, Any] | str | None) -> ServerOptimizer:
    """Raises ValueError; the message begins with "aggregator: " or "aggregator_kwargs: " and names the key."""
    optimizer = _OPTIMIZERS.get(aggregator) if isinstance(aggregator, str) else None
    if optimizer is None:
        raise ValueError(f"aggregator: {aggregator!r} is unknown; known: {', '.join(sorted(_OPTIMIZERS))}")
    given = parse_kwargs(kwargs)
    known = [field.name for field in fields(optimizer)]
    for key in given:
        if key not in known:
            names = ", ".join(known) or "none"
            raise ValueError(f"aggregator_kwargs: {key} is unknown to {aggregator}; known: {names}")
    try:
        return optimizer(**given)
    except ValueError as wrong:
        raise ValueError(f"aggregator_kwargs: {wrong}") from None


def parse_kwargs(kwargs: Mapping[str, Any] | str | None) -> Mapping[str, Any]:
    """A mapping; or text that holds one in JSON, as FEDn passes it; or nothing. Raises ValueError as parse() does."""
    if kwargs is None or (isinstance(kwargs, str) and not kwargs.strip()):
        return {}
    if isinstance(kwargs, str):
        try:
            kwargs = json.loads(kwargs)
        except (ValueError, RecursionError) as wrong:
            raise ValueError(f"aggregator_kwargs: no JSON: {wrong}") from None
    if not isinstance(kwargs, Mapping):
        raise ValueError(f"aggregator_kwargs: {kwargs!r}, an object with named settings needed")
    return kwargs


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
