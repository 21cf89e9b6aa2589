"""From "my update is uploaded" to its verdict: find the bytes, check them once, submit.

The check runs in the kernel pool; its result travels in the event as `fault`, and the core alone decides. An update of
a task that is closed or over is not checked: the record is asked before the content.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import itertools
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from fl_client.wire import codec
from fl_server.core.model import ModelId, ModelUpdate, SessionRecord, Task, UpdateId
from fl_server.errors import Missing, Unavailable
from fl_server.scheduler.calls import Reply
from fl_server.scheduler.scheduler import Scheduler
from fl_server.store.spool import is_replaced

P = ParamSpec("P")
T = TypeVar("T")
LAYOUTS_KEPT = 64
CHECKED_AT_ONCE_BYTES = 128 * 1024  # a hop to the kernel pool and back costs more than to check so much
INFLATED_TWICE_BYTES = 1024 * 1024  # at the check and at the close: cheaper than a file of its own for the stored form
UNCHECKED = "its task was not open when it came"  # heard only if the task is opened before it is decided
MOST_EXAMPLES = 2**53  # float64 counts them exactly


@dataclass(frozen=True, slots=True)
class Announced:
    """What the client says of an upload; 0 and "" are not compared."""

    update_id: UpdateId
    num_examples: Any  # JSON, unchecked
    size_bytes: int = 0
    sha256: str = ""
    failure: str = ""  # the client could not train, and why


class _ReaderLeft(Exception):
    """Whoever was reading the layout was cancelled or failed: the next one reads it itself."""


class Intake:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler, self._work = scheduler, scheduler.workshop
        self._checks = itertools.count()
        self._layouts: OrderedDict[ModelId, asyncio.Future[codec.Layout]] = OrderedDict()
        scheduler.preparers.append(self._layout)

    async def receive(self, task: Task, announced: Announced, patience_s: float) -> Reply:
        """The update's verdict, durable. Raises TimeoutError when a store is away for longer than patience_s.

        The check takes what it takes: cut off, it would begin anew each time that the client comes again.
        """
        wanted = self._scheduler.wants(task)
        if wanted is None:
            return await self._submit(task, announced, "", UNCHECKED, patience_s)
        if announced.failure:
            fault: str | None = f"the client could not train: {announced.failure}"
            return await self._submit(task, announced, "", fault, patience_s)
        spool = self._work.spool
        blob = spool.find(task.client, announced.update_id)
        if blob is None:
            fault = f"no upload {announced.update_id} of client {task.client}"
            return await self._submit(task, announced, "", fault, patience_s)
        with spool.held(blob):
            fault = examples_fault(announced.num_examples) or await self._check(blob, wanted, announced, patience_s)
            if fault is None:
                fault = await self._copy(task, blob, patience_s)
            return await self._submit(task, announced, blob, fault, patience_s)

    async def _submit(self, task: Task, announced: Announced, blob: str, fault: str | None, patience_s: float) -> Reply:
        valid = examples_fault(announced.num_examples) is None
        update = ModelUpdate(announced.update_id, blob, float(announced.num_examples) if valid else 0.0)
        with self._scheduler.deadlines.within(patience_s):
            return await self._scheduler.update(task, update, fault)

    async def _copy(self, task: Task, blob: str, patience_s: float) -> str | None:
        if (copies := self._work.copies) is None:
            return None
        try:
            await self._insist(patience_s, copies.add, task, blob)
        except Missing as gone:
            return str(gone)
        return None

    async def _insist(self, patience_s: float, work: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Only what follows a failure is cut off: a copy takes what it takes, and so does a check."""
        try:
            return await work(*args, **kwargs)
        except Unavailable:
            with self._scheduler.deadlines.within(patience_s):
                return await self._scheduler.insist(work, *args, **kwargs)

    async def _check(self, blob: str, wanted: SessionRecord, announced: Announced, patience_s: float) -> str | None:
        loop, spool = asyncio.get_running_loop(), self._work.spool
        try:
            with self._scheduler.deadlines.within(patience_s):
                layout = await self._layout(wanted)
        except Missing as gone:
            return f"the global model is gone: {gone}"
        if (data := spool.in_memory(blob)) is not None and len(data) <= CHECKED_AT_ONCE_BYTES >= layout_bytes(layout):
            limit = self._work.max_model_bytes
            said = bytes_fault(data, announced)
            return said or codec.check_update(data, layout, helper=wanted.config.helper, max_bytes=limit).fault
        # a call sent again may be checked beside the first one: each writes a file of its own
        stored = self._work.folder / f"{blob}.{next(self._checks)}.stored"

        async def check() -> codec.Checked:
            left = threading.Event()
            work = functools.partial(self._checked, blob, wanted.config.helper, layout, announced, stored, left)
            try:
                return await loop.run_in_executor(self._work.kernel, work)
            except asyncio.CancelledError:  # the thread goes on
                left.set()
                raise

        checked = await self._insist(patience_s, check)
        if checked.stored:
            try:
                with self._scheduler.deadlines.within(patience_s):
                    await self._scheduler.insist(spool.replace, blob, stored)
            except BaseException:
                await loop.run_in_executor(self._work.kernel, functools.partial(stored.unlink, missing_ok=True))
                raise
        return checked.fault

    def _checked(
        self,
        blob: str,
        helper: str,
        layout: codec.Layout,
        announced: Announced,
        stored: Path,
        left: threading.Event,
    ) -> codec.Checked:
        """left: nobody waits for the result any more, and `stored` is litter."""
        try:
            content = self._work.spool.content(blob)
            said = file_fault(content, announced) if isinstance(content, Path) else bytes_fault(content, announced)
            if said:
                return codec.Checked(said)
            is_large = isinstance(content, Path) or layout_bytes(layout) > INFLATED_TWICE_BYTES
            return codec.check_update(
                content,
                layout,
                helper=helper,
                max_bytes=self._work.max_model_bytes,
                stored_copy=stored if is_large else None,
            )
        except FileNotFoundError:
            return codec.Checked(f"upload {blob} is gone")
        except OSError as away:
            stored.unlink(missing_ok=True)  # a part of it, on a disk that is full
            raise Unavailable(f"check {blob}: {away}") from away
        finally:
            if left.is_set():
                stored.unlink(missing_ok=True)

    async def _layout(self, wanted: SessionRecord) -> codec.Layout:
        """Names, dtypes and shapes of the session's model; read once for all its updates. Raises Missing."""
        model = wanted.model
        while (known := self._layouts.get(model.id)) is not None:
            with contextlib.suppress(_ReaderLeft):
                return await asyncio.shield(known)
        read: asyncio.Future[codec.Layout]
        read = self._layouts[model.id] = asyncio.get_running_loop().create_future()
        while len(self._layouts) > LAYOUTS_KEPT:
            self._layouts.popitem(last=False)
        try:
            path = await self._scheduler.insist(self._work.models.local, model.id)
            work = functools.partial(self._read_layout, path, wanted.config.helper)
            read.set_result(await asyncio.get_running_loop().run_in_executor(self._work.kernel, work))
        except BaseException:
            if self._layouts.get(model.id) is read:
                del self._layouts[model.id]
            read.set_exception(_ReaderLeft())
            read.exception()  # there may be nobody who waits for it
            raise
        return read.result()

    def _read_layout(self, path: Path, helper: str) -> codec.Layout:
        with codec.open_model(path, helper, max_bytes=self._work.max_model_bytes) as file:
            return file.layout


def bytes_fault(data: bytes | memoryview, announced: Announced) -> str | None:
    """How they differ from what was announced, if they do."""
    if announced.size_bytes and announced.size_bytes != len(data):
        return _other_size(len(data), announced)
    if announced.sha256 and (sha256 := hashlib.sha256(data).hexdigest()) != announced.sha256:
        return _other_sha256(sha256, announced)
    return None


def file_fault(path: Path, announced: Announced) -> str | None:
    """As bytes_fault(). Raises OSError."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if is_replaced(status):  # no longer what the client sent, and compared before
            return None
        if announced.size_bytes and announced.size_bytes != status.st_size:
            return _other_size(status.st_size, announced)
        if announced.sha256 and (sha256 := hashlib.file_digest(file, "sha256").hexdigest()) != announced.sha256:
            return _other_sha256(sha256, announced)
    return None


def _other_size(size_bytes: int, announced: Announced) -> str:
    return f"{size_bytes} bytes were uploaded, {announced.size_bytes} announced"


def _other_sha256(sha256: str, announced: Announced) -> str:
    return f"sha256 {sha256}, {announced.sha256} announced"


def layout_bytes(layout: codec.Layout) -> int:
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in layout)


def examples_fault(num_examples: Any) -> str | None:
    """num_examples is a finite number in (0, 2**53]; a bool or a text is none."""
    is_number = isinstance(num_examples, int | float) and not isinstance(num_examples, bool)
    if not is_number or not 0 < num_examples <= MOST_EXAMPLES:  # so written, NaN and integers beyond float are none
        return f"num_examples: {num_examples!r:.100}, a finite number above 0 and at most 2**53 needed"
    return None
