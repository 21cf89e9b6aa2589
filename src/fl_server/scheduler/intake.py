"""From "my update is uploaded" to its verdict: find the bytes, check them once, submit.

The check runs in the kernel pool; its result travels in the event as `fault`, and the core alone decides. An update of
a task that is closed or over is not checked: the record is asked before the content.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_client.wire import codec
from fl_server.core.model import GlobalModel, ModelId, ModelUpdate, Task, UpdateId
from fl_server.errors import Missing
from fl_server.scheduler.calls import Reply
from fl_server.scheduler.scheduler import Scheduler

LAYOUTS_KEPT = 64
MOST_EXAMPLES = 2**53  # float64 counts them exactly


@dataclass(frozen=True, slots=True)
class Announced:
    """What the client says of an upload; 0 and "" are not compared."""

    update_id: UpdateId
    num_examples: Any  # JSON, unchecked
    size_bytes: int = 0
    sha256: str = ""
    failure: str = ""  # the client could not train, and why


class Intake:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler, self._work = scheduler, scheduler.workshop
        self._checks = itertools.count()
        self._layouts: OrderedDict[ModelId, codec.Layout] = OrderedDict()

    async def receive(self, task: Task, announced: Announced) -> Reply:
        """The update's verdict, durable. Waits while the store is away: the caller puts its patience around it."""
        model = self._scheduler.wants(task)
        if model is None:
            return await self._submit(task, announced, "", None)
        if announced.failure:
            return await self._submit(task, announced, "", f"the client could not train: {announced.failure}")
        spool = self._work.spool
        blob = spool.find(task.client, announced.update_id)
        if blob is None:
            fault: str | None = f"no upload {announced.update_id} of client {task.client}"
        elif fault := examples_fault(announced.num_examples):
            pass
        else:
            fault = await self._check(blob, model, announced)
        return await self._submit(task, announced, blob or "", fault)

    async def _submit(self, task: Task, announced: Announced, blob: str, fault: str | None) -> Reply:
        valid = examples_fault(announced.num_examples) is None
        update = ModelUpdate(announced.update_id, blob, float(announced.num_examples) if valid else 0.0)
        return await self._scheduler.update(task, update, fault)

    async def _check(self, blob: str, model: GlobalModel, announced: Announced) -> str | None:
        loop, spool = asyncio.get_running_loop(), self._work.spool
        layout = await self._layout(model)
        # a call sent again may be checked beside the first one: each writes a file of its own
        stored = self._work.folder / f"{blob}.{next(self._checks)}.stored"
        fault = await loop.run_in_executor(self._work.kernel, self._fault, spool.path(blob), layout, announced, stored)
        if fault is None and await loop.run_in_executor(self._work.kernel, stored.exists):
            await spool.replace(blob, stored)
        return fault

    def _fault(self, path: Path, layout: codec.Layout, announced: Announced, stored: Path) -> str | None:
        try:
            size_bytes = path.stat().st_size
            if announced.size_bytes and announced.size_bytes != size_bytes:
                return f"{size_bytes} bytes were uploaded, {announced.size_bytes} announced"
            if announced.sha256:
                with path.open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                if sha256 != announced.sha256:
                    return f"sha256 {sha256}, {announced.sha256} announced"
            limit = self._work.max_model_bytes
            return codec.check_update(path, layout, max_bytes=limit, stored_copy=stored)
        except FileNotFoundError:
            return f"upload {path.name} is gone"

    async def _layout(self, model: GlobalModel) -> codec.Layout:
        """Names, dtypes and shapes of the model; read once for all its updates."""
        if (known := self._layouts.get(model.id)) is None:
            try:
                path = await self._scheduler.insist(self._work.models.local, model.id)
            except Missing:
                return ()  # the session hears of it from its Aggregate; until then nothing fits
            loop = asyncio.get_running_loop()
            known = await loop.run_in_executor(self._work.kernel, self._read_layout, path)
            self._layouts[model.id] = known
            while len(self._layouts) > LAYOUTS_KEPT:
                self._layouts.popitem(last=False)
        return known

    def _read_layout(self, path: Path) -> codec.Layout:
        with codec.open_npz(path, max_bytes=self._work.max_model_bytes) as file:
            return file.layout


def examples_fault(num_examples: Any) -> str | None:
    """num_examples is a finite number in (0, 2**53]; a bool or a text is none."""
    is_number = isinstance(num_examples, int | float) and not isinstance(num_examples, bool)
    if not is_number or not 0 < num_examples <= MOST_EXAMPLES:  # so written, NaN and integers beyond float are none
        return f"num_examples: {num_examples!r:.100}, a finite number above 0 and at most 2**53 needed"
    return None
