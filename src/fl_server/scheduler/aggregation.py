"""Carries out Aggregate, one after another, in the kernel's threads.

The model is a function of the set of updates that Aggregate names: they are folded in its order, at the close. Nothing
is folded early (updates arrive in no order: when 99% are there, 1% could be), so there is nothing to fold again.
Stripe of coordinates by stripe, all updates are read, folded and divided, the optimizer moves that part of the model,
and it is written: no model is in memory as a whole, whatever the number of updates.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import stat
import threading
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

import numpy as np

from fl_client.wire import codec
from fl_server.core import server_opt
from fl_server.core.aggregate import BLOCK_ELEMENTS, STRIPE_ELEMENTS, Abandoned, Piece, WeightedMean, stripes
from fl_server.core.events import Aggregate, Aggregated, Broken, Discard, EffectFailed, Event, Fold, UpdateLost
from fl_server.core.model import GlobalModel, ModelId, Report, SessionConfig, SessionId
from fl_server.errors import Missing, Unavailable
from fl_server.scheduler.copies import Copies
from fl_server.store.ports import BlobStore
from fl_server.store.spool import Spool

logger = logging.getLogger(__name__)
P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")
MOST_FILES, MOST_HELD_BYTES = 256, 64 << 20  # of updates folded together: only beyond is a sum of whole models kept
_WIDEST_BYTES = 16  # of a number
_AHEAD = 8  # stripes that are folded before they can be written, at most
_NAMESPACE = uuid.UUID("5b0d5c4e-2d0a-5d8e-8a53-9a9f6c1f0e77")


class Insist(Protocol):
    """Does it again for as long as its store is away."""

    async def __call__(self, work: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T: ...


class _ModelGone(Exception):
    pass


class LostUpdate(Exception):
    def __init__(self, report: Report, why: str) -> None:
        super().__init__(why)
        self.report = report


@dataclass(frozen=True, slots=True)
class Workshop:
    """What an aggregation works with; `folder` holds the files that it writes, on the blob store's disk if possible."""

    models: BlobStore
    spool: Spool
    kernel: Executor
    folder: Path
    max_model_bytes: int
    copies: Copies | None = None  # of accepted updates, elsewhere


@dataclass(frozen=True, slots=True)
class Made:
    """Files of a new model, ready to be put."""

    model: Path
    sha256: str
    moments: Path | None


class Aggregation:
    def __init__(
        self,
        session: SessionId,
        config: Callable[[], SessionConfig],
        workshop: Workshop,
        insist: Insist,
        tell: Callable[[Event], Awaitable[None]],
    ) -> None:
        self._session, self._config, self._workshop = session, config, workshop
        self._insist, self._tell = insist, tell
        self._work: asyncio.Queue[Aggregate] = asyncio.Queue()  # unbounded: the core orders one at a time
        self._over = (0, 0)  # attempts up to this one are abandoned
        self._stopping = False

    def order(self, effect: Fold | Aggregate) -> None:
        match effect:
            case Aggregate():
                self._work.put_nowait(effect)
            case Fold():  # what may be done early is done with its Aggregate
                pass

    def abandon(self, ended: Discard) -> None:
        self._over = (ended.round, ended.attempt)

    def stop(self) -> None:
        """The kernel thread leaves at its next block; recovery does the work again."""
        self._stopping = True

    async def run(self) -> None:
        """Never raises: how an Aggregate ended is an event."""
        while True:
            if event := await self._aggregate(await self._work.get()):
                await self._tell(event)

    async def _aggregate(self, job: Aggregate) -> Event | None:
        work, config, fetched = self._workshop, self._config(), set[str]()

        async def make() -> Made:
            """Asks for the paths each time: a cache may have dropped the files before they were opened."""
            try:
                base, state = await work.models.local(job.base.id), None
                if job.base.optimizer_state and job.base.round:
                    state = await work.models.local(job.base.optimizer_state)
            except Missing as gone:
                raise _ModelGone(f"the global model is gone: {gone}") from gone
            loop = asyncio.get_running_loop()
            while True:
                try:
                    spare = work.spool.take_spare(self._model_bytes(job))
                    return await loop.run_in_executor(work.kernel, self._make, job, config, base, state, spare)
                except LostUpdate as lost:
                    blob = lost.report.update.blob
                    if work.copies is None or blob in fetched or not await work.copies.fetch(lost.report):
                        raise
                    fetched.add(blob)

        try:
            made = await self._insist(make)
            name = f"{self._session}/{job.round}/{job.attempt}/{made.sha256}"
            model_id = ModelId(str(uuid.uuid5(_NAMESPACE, name)))
            moments_key = ""
            if moments := made.moments:
                moments_key = f"{model_id}.moments"
                await self._insist(work.models.put_file, moments_key, moments)
            await self._insist(work.models.put_file, model_id, made.model)
        except _ModelGone as gone:
            return Broken(str(gone))
        except LostUpdate as lost:
            return UpdateLost(lost.report.task, lost.report.update.update_id, str(lost))
        except Abandoned:
            return None
        except Exception as bug:  # an aggregator's: it ends this attempt and is its reason
            incident = uuid.uuid4().hex[:8]
            logger.exception("aggregation failed", extra={"incident": incident, "round": job.round})
            return EffectFailed(job.round, job.attempt, f"aggregation failed (incident {incident}): {bug!r}")
        model = GlobalModel(model_id, job.round, job.attempt, job.base.id, made.sha256, len(job.reports), moments_key)
        return Aggregated(model)

    def _model_bytes(self, job: Aggregate) -> int:
        """About: an update is as large as a model."""
        try:
            return self._workshop.spool.size_bytes(job.reports[0].update.blob)
        except Missing:
            return 0

    def _make(self, job: Aggregate, config: SessionConfig, base: Path, state: Path | None, spare: Path | None) -> Made:
        """In a kernel thread. spare: a file to write over; it is gone afterwards."""
        attempt = (job.round, job.attempt)
        stem = f"{self._session}-{job.round}-{job.attempt}"
        close = _Close(self._workshop, config, job.reports, stem, lambda: self._stopping or attempt <= self._over)
        try:
            return close.make(base, state, spare)
        except OSError as full:
            raise Unavailable(f"write the model of round {job.round}: {full}") from full
        finally:
            if spare is not None:
                spare.unlink(missing_ok=True)


class _Close:
    """The making of one new model. Its methods run in the kernel's threads."""

    def __init__(
        self, workshop: Workshop, config: SessionConfig, reports: Sequence[Report], stem: str, stop: Callable[[], bool]
    ) -> None:
        self._workshop, self._config, self._reports, self._stop = workshop, config, reports, stop
        self._target = workshop.folder / f"{stem}{codec.SUFFIXES[config.helper]}"
        self._moments_target = workshop.folder / f"{stem}.moments"
        self._optimizer = server_opt.parse(config.aggregator, config.aggregator_kwargs)
        self._group: list[tuple[Report, codec.ModelFile]] = []  # of updates: open, and folded together
        self._sums: dict[Piece, WeightedMean] = {}  # of the groups before
        self._compared: codec.Layout = ()  # an update's that is as the model's
        self._room = _Room()

    def make(self, base: Path, state: Path | None, spare: Path | None) -> Made:
        """Raises Abandoned, LostUpdate, Unavailable; OSError for a file of ours."""
        limit = self._workshop.max_model_bytes
        with ExitStack() as opened:
            self._model = opened.enter_context(codec.open_model(base, self._config.helper, max_bytes=limit))
            self._former = opened.enter_context(codec.open_npz(state, max_bytes=4 * limit)) if state else None
            for file in (self._model, self._former):
                if file is not None:
                    file.hold()
            layout, moments_layout = self._layouts()
            sizes = [math.prod(spec.shape) for spec in layout]
            work = list(stripes(sizes, codec.writing_order(self._config.helper, layout)))
            for is_last in opened.enter_context(contextlib.closing(self._groups())):
                if is_last:
                    if spare is not None:
                        self._write_over(spare)
                    try:
                        return self._write(work, layout, moments_layout)
                    except BaseException:
                        self._target.unlink(missing_ok=True)
                        raise
                for sums in _in_order(self._workshop.kernel, self._fold, work):
                    self._sums.update(sums)
        raise AssertionError("a round without updates")

    def _layouts(self) -> tuple[codec.Layout, codec.Layout]:
        """Of the new model, and of the optimizer's moments."""
        specs = self._model.layout
        # a step of nothing says what dtypes the results have
        model, moments = self._optimizer.step(
            [np.zeros(0, spec.dtype) for spec in specs], [np.zeros(0) for _ in specs], []
        )
        return (
            tuple(
                codec.ArraySpec(spec.name, array.dtype, spec.shape) for spec, array in zip(specs, model, strict=True)
            ),
            tuple(
                codec.ArraySpec(str(index), array.dtype, specs[index % len(specs)].shape)
                for index, array in enumerate(moments)
            ),
        )

    def _groups(self) -> Generator[bool]:
        """Opens the updates, in order, as many at once as may be; whether these are the last."""
        files = held_bytes = 0
        try:
            for report in self._reports:
                file = self._open(report)
                is_full = held_bytes + file.held_bytes > MOST_HELD_BYTES or files + file.is_open > MOST_FILES
                if self._group and is_full:
                    with contextlib.ExitStack() as stack:
                        stack.callback(file.close)
                        yield False
                        stack.pop_all()
                    self._close_group()
                    files = held_bytes = 0
                self._group.append((report, file))
                files, held_bytes = files + file.is_open, held_bytes + file.held_bytes
                try:
                    file.hold()
                except (OSError, codec.BadModel) as why:
                    raise _told(report, why) from why
            if self._group:
                yield True
        finally:
            self._close_group()

    def _open(self, report: Report) -> codec.ModelFile:
        limit = self._workshop.max_model_bytes
        try:
            content = self._workshop.spool.content(report.update.blob)
            file = codec.open_model(content, self._config.helper, max_bytes=limit)
        except (OSError, codec.BadModel) as why:
            raise _told(report, why) from why
        if file.layout is not self._compared:  # the updates of a round share one, as a rule
            if (fault := codec.layout_fault(file.layout, self._model.layout)) is not None:
                file.close()
                raise _told(report, codec.BadModel(fault))
            self._compared = file.layout
        return file

    def _close_group(self) -> None:
        for _, file in self._group:
            file.close()
        self._group.clear()

    def _write_over(self, spare: Path) -> None:
        """The spare becomes the file that the model is written to, with the mode of a new one; or it is left."""
        with contextlib.suppress(OSError):  # somebody tidied up, or it is on another disk: a new file will do
            self._target.touch()
            spare.chmod(stat.S_IMODE(self._target.stat().st_mode))
            self._target.unlink()  # renamed over a file, ext4 would write all of the spare to the disk first
            spare.replace(self._target)

    def _write(self, work: Sequence[list[Piece]], layout: codec.Layout, moments_layout: codec.Layout) -> Made:
        with ExitStack() as writing:
            made = writing.enter_context(contextlib.closing(_in_order(self._workshop.kernel, self._step, work)))
            parts = itertools.chain.from_iterable(made)
            moments_file: codec.NpzWriter | None = None
            if moments_layout:
                moments_file = codec.NpzWriter(self._moments_target, moments_layout, digest=False)
                writing.enter_context(moments_file)

            def blocks(size: int) -> Iterator[codec.Array]:
                while size:
                    piece, array, moments = next(parts)
                    if moments_file is not None:
                        for kind, moment in enumerate(moments):
                            moments_file.write(kind * len(layout) + piece.index, moment)
                    size -= piece.size
                    yield array

            arrays = [blocks(math.prod(spec.shape)) for spec in layout]
            out = codec.write(self._target, self._config.helper, layout, arrays)
        return Made(self._target, out.sha256, self._moments_target if moments_layout else None)

    # ---- by several threads at once, each with stripes of its own

    def _fold(self, stripe: list[Piece]) -> dict[Piece, WeightedMean]:
        """Adds the group's updates to the sums of those before."""
        sums = {}
        for piece in stripe:
            sums[piece] = mean = self._sums.get(piece) or WeightedMean(piece.size)
            mean.fold(self._values(piece), self._stop, self._room.scratch)
        return sums

    def _step(self, stripe: list[Piece]) -> list[tuple[Piece, codec.Array, list[codec.Array]]]:
        """These values of the new model, and of the optimizer's moments."""
        parts = []
        for piece in stripe:
            mean = self._sums.pop(piece, None) or WeightedMean(piece.size)
            mean.fold(self._values(piece), self._stop, self._room.scratch)
            old, *former = self._before(piece)
            [new], moments = self._optimizer.step([old], [mean.finish()], former)
            parts.append((piece, new, moments))
        return parts

    def _values(self, piece: Piece) -> Iterator[tuple[codec.Array, float]]:
        for report, file in self._group:
            try:
                values = file.values(piece.index, piece.begin, piece.end, self._room.buffers[0])
            except (OSError, codec.BadModel) as why:
                raise _told(report, why) from why
            yield values, report.update.num_examples

    def _before(self, piece: Piece) -> Iterator[codec.Array]:
        """The values of the global model and, if there are any, of its moments."""
        buffers = iter(self._room.buffers)
        yield self._model.values(piece.index, piece.begin, piece.end, next(buffers))
        if self._former is not None:
            for index in range(piece.index, len(self._former.layout), len(self._model.layout)):
                yield self._former.values(index, piece.begin, piece.end, next(buffers))


class _Room(threading.local):
    """What a thread works in: used again for each stripe, or fresh pages would cost as much as the folding."""

    def __init__(self) -> None:
        self.scratch = np.empty(BLOCK_ELEMENTS)
        self.buffers = [np.empty(STRIPE_ELEMENTS * _WIDEST_BYTES, np.uint8) for _ in range(3)]


def _told(report: Report, why: OSError | codec.BadModel) -> LostUpdate | Unavailable:
    """What went wrong with an update's bytes."""
    match why:
        case FileNotFoundError():
            return LostUpdate(report, "it is not in the spool")
        case codec.BadModel():
            return LostUpdate(report, f"its file is damaged: {why}")
        case OSError():
            return Unavailable(f"read {report.update.blob}: {why}")


def _in_order(kernel: Executor, work: Callable[[S], T], items: Sequence[S]) -> Generator[T]:
    """The results, in order, made by this thread and by those of the kernel that are free. Closed by its caller.

    This thread is one of the kernel's: it never waits for what no thread has begun.
    """
    if len(items) == 1:
        yield work(items[0])
        return
    left = iter(items)
    begun: deque[tuple[S, Future[T]]] = deque()
    try:
        while True:
            for item in itertools.islice(left, _AHEAD + 1 - len(begun)):
                begun.append((item, _submitted(kernel, work, item)))
            if not begun:
                return
            while not begun[0][1].done():
                mine = next((index for index, (_, future) in enumerate(begun) if future.cancel()), None)
                if mine is None:
                    break  # all are done, or in the hands of others
                item, done = begun[mine][0], Future[T]()
                done.set_result(work(item))
                begun[mine] = (item, done)
            yield begun.popleft()[1].result()
    finally:
        for _, future in begun:
            future.cancel()
        wait([future for _, future in begun if not future.cancelled()])  # they read files that are closed next


def _submitted(kernel: Executor, work: Callable[[S], T], item: S) -> Future[T]:
    try:
        return kernel.submit(work, item)
    except RuntimeError:  # the pool takes no more: the process stops
        return Future()
