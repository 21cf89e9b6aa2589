"""Python functions as a client's runtime: parameters are decoded for them, and what they return is checked and encoded.

A plain function runs in the client's one thread, an async one on the loop. Whatever it raises is this task's failure.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from fl_client.task import TaskFailed, TaskInfo, TaskKind, Trained, checked_num_examples
from fl_client.wire.codec import BadModel, Layout, Parameters, encode, parameters_fault, read

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TrainResult:
    """parameters: count, order and shapes of the ones given; num_examples: finite, above 0, the weight in the mean."""

    parameters: Sequence[npt.ArrayLike]
    num_examples: float
    metrics: Mapping[str, Any] = field(default_factory=dict)  # JSON; a number that is not finite goes as null


Train = Callable[[Parameters, TaskInfo], TrainResult | Awaitable[TrainResult]]
Validate = Callable[[Parameters, TaskInfo], Mapping[str, float] | Awaitable[Mapping[str, float]]]
Predict = Callable[[Parameters, TaskInfo], object]


class Callbacks:
    """A Runtime. A plain function that runs cannot be interrupted: it holds the exit of the process."""

    package: Literal["local"] = "local"

    def __init__(
        self, train: Train, validate: Validate | None, predict: Predict | None, *, max_model_bytes: int, thread: str
    ) -> None:
        """thread: its name."""
        self._functions: Mapping[TaskKind, Callable[[Parameters, TaskInfo], object] | None] = {
            "train": train,
            "validate": validate,
            "predict": predict,
        }
        self._max_model_bytes = max_model_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=thread)

    async def prepare(self) -> None:
        pass

    def refusal(self, kind: TaskKind) -> str | None:
        return None if self._functions[kind] else f"this client has no {kind} callback"

    async def train(self, model: bytearray, task: TaskInfo) -> Trained:
        return await self._call(model, task, lambda returned, layout: _trained(returned, layout, task.helper))

    async def validate(self, model: bytearray, task: TaskInfo) -> str:
        return await self._call(model, task, lambda returned, layout: _validation_json(returned))

    async def predict(self, model: bytearray, task: TaskInfo) -> str:
        return await self._call(model, task, lambda returned, layout: _json(returned))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _call(self, model: bytearray, task: TaskInfo, use: Callable[[object, Layout], T]) -> T:
        """What `use` makes of what the function returns; `use` raises if it is unusable."""
        function = self._functions[task.kind]
        if function is None:
            raise TaskFailed(f"this client has no {task.kind} callback")
        try:
            parameters, layout = await self._in_thread(lambda: _decoded(model, task.helper, self._max_model_bytes))
        except (BadModel, MemoryError) as exc:
            raise TaskFailed(f"model {task.model_id}: {exc}") from exc
        try:
            returned = await self._in_thread(lambda: function(parameters, task))
            if inspect.isawaitable(returned):
                returned = await returned
            return await self._in_thread(lambda: use(returned, layout))
        except (Exception, asyncio.CancelledError) as exc:  # whatever the user's code raises is this task's failure
            me = asyncio.current_task()
            if isinstance(exc, asyncio.CancelledError) and me is not None and me.cancelling():
                raise
            raise TaskFailed(f"{type(exc).__name__}: {exc}") from exc

    async def _in_thread(self, compute: Callable[[], T]) -> T:
        def run() -> T:
            try:
                return compute()
            except StopIteration as exc:  # a future cannot carry it, see PEP 479
                raise RuntimeError("StopIteration was raised") from exc

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)


def _decoded(data: bytearray, helper: str, max_bytes: int) -> tuple[Parameters, Layout]:
    file = read(memoryview(data), helper, max_bytes=max_bytes)
    return file.copies(), file.layout


def _trained(returned: object, layout: Layout, helper: str) -> Trained:
    """Raises TypeError or ValueError for a result that the server would reject."""
    if not isinstance(returned, TrainResult):
        raise TypeError(f"train returned {type(returned).__name__}, expected TrainResult")
    arrays = [np.asarray(array) for array in returned.parameters]
    if (fault := parameters_fault(arrays, layout)) is not None:
        raise ValueError(f"train returned bad parameters: {fault}")
    examples = returned.num_examples
    num_examples = checked_num_examples(examples.item() if isinstance(examples, np.generic) else examples)
    metrics = {str(key): _finite_or_null(value) for key, value in returned.metrics.items()}
    metadata = json.loads(_json({**metrics, "num_examples": num_examples}))
    return Trained.of(encode(arrays, [spec.name for spec in layout], helper=helper), metadata)


def _validation_json(returned: object) -> str:
    if not isinstance(returned, Mapping):
        raise TypeError(f"validate returned {type(returned).__name__}, expected a dict of metrics")
    metrics: dict[str, float] = {}
    for key, value in returned.items():
        metrics[str(key)] = float(value)
        if not math.isfinite(metrics[str(key)]):
            raise ValueError(f"validate returned metric {key!r} = {value}, expected a finite number")
    return _json(metrics)


def _json(value: object) -> str:
    return json.dumps(value, default=_plain, allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON")


def _finite_or_null(value: object) -> object:
    return None if isinstance(value, float | np.floating) and not math.isfinite(value) else value
