"""A small multilayer perceptron in plain numpy: 64 pixels, 64 hidden units (ReLU), 10 digits (softmax).

Everything here is a function of its arguments: the same parameters, examples, settings and generator give the
same result bit for bit. Parameters are a list of float32 arrays [w1, b1, w2, b2]. Set OPENBLAS_NUM_THREADS=1
before numpy is imported: several threads are slower on matrices this small, and may sum in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Parameters = list[Floats]

PIXELS, HIDDEN, DIGITS = 64, 64, 10


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What a session's `client_settings` may say; what it does not say has these defaults."""

    seed: int = 7
    epochs: int = 8
    batch_size: int = 8
    learning_rate: float = 0.02
    momentum: float = 0.9
    noise: float = 0.6  # standard deviation of what is added to each pixel, anew in each epoch

    @classmethod
    def from_json(cls, settings: Mapping[str, object]) -> TrainSettings:
        """Other keys are ignored; numbers may be strings. Raises ValueError if a value is no number of its kind."""
        default = cls()
        known = {f.name: type(getattr(default, f.name)) for f in fields(cls)}
        return cls(**{name: kind(settings[name]) for name, kind in known.items() if name in settings})


def init(seed: int) -> Parameters:
    """Weights after He et al. 2015, zero biases."""
    rng = np.random.default_rng(seed)
    w1 = rng.normal(0.0, np.sqrt(2 / PIXELS), (PIXELS, HIDDEN)).astype(np.float32)
    w2 = rng.normal(0.0, np.sqrt(2 / HIDDEN), (HIDDEN, DIGITS)).astype(np.float32)
    return [w1, np.zeros(HIDDEN, np.float32), w2, np.zeros(DIGITS, np.float32)]


def load(path: Path) -> Parameters:
    with np.load(path) as arrays:
        return [arrays[str(index)] for index in range(len(arrays.files))]


def save(parameters: Parameters, path: Path) -> None:
    """As numpyhelper has it: an .npz with the arrays "0", "1", …"""
    np.savez(path, **{str(index): array for index, array in enumerate(parameters)})


def train(
    parameters: Parameters, x: Floats, y: Labels, settings: TrainSettings, rng: np.random.Generator
) -> Parameters:
    """New parameters after `settings.epochs` of minibatch SGD on noisy copies of the examples.

    The momentum starts at zero. The parameters given are not changed.
    """
    trained = [p.astype(np.float32, copy=True) for p in parameters]
    velocity = [np.zeros_like(p) for p in trained]
    for _ in range(settings.epochs):
        order = rng.permutation(len(y))
        noisy = x + np.float32(settings.noise) * rng.standard_normal(x.shape, np.float32)
        for start in range(0, len(y), settings.batch_size):
            batch = order[start : start + settings.batch_size]
            for p, v, g in zip(trained, velocity, _gradients(trained, noisy[batch], y[batch]), strict=True):
                v *= np.float32(settings.momentum)
                v += g
                p -= np.float32(settings.learning_rate) * v
    return trained


def evaluate(parameters: Parameters, x: Floats, y: Labels) -> dict[str, float]:
    """{"loss": mean cross-entropy in nats, "accuracy": in [0, 1]}."""
    _, log_p = _forward(parameters, x)
    return {
        "loss": float(-log_p[np.arange(len(y)), y].mean()),
        "accuracy": float((log_p.argmax(axis=1) == y).mean()),
    }


def predict(parameters: Parameters, x: Floats) -> list[int]:
    """The likeliest digit of each row."""
    _, log_p = _forward(parameters, x)
    return [int(digit) for digit in log_p.argmax(axis=1)]


def _forward(parameters: Parameters, x: Floats) -> tuple[Floats, Floats]:
    """The hidden activations and the log-probabilities, one row an example."""
    w1, b1, w2, b2 = parameters
    hidden = np.maximum(x @ w1 + b1, 0)
    logits = hidden @ w2 + b2
    logits = logits - logits.max(axis=1, keepdims=True)
    return hidden, logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def _gradients(parameters: Parameters, x: Floats, y: Labels) -> Parameters:
    hidden, log_p = _forward(parameters, x)
    d_logits = np.exp(log_p)
    d_logits[np.arange(len(y)), y] -= 1
    d_logits /= np.float32(len(y))
    d_hidden = (d_logits @ parameters[2].T) * (hidden > 0)
    return [x.T @ d_hidden, d_hidden.sum(axis=0), hidden.T @ d_logits, d_logits.sum(axis=0)]
