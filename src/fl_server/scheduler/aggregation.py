"""Carries out Fold and Aggregate, one after another, in a kernel thread.

The accumulator is soft: Aggregate names every update that counts, and if what was folded before is no prefix of
that (an update was withdrawn, a restart), it starts again from the spool. Either way the model is the same. Models are
read from mapped files and written block by block: memory does not grow with the number of updates.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from fl_client.wire import codec
from fl_server.core import server_opt
from fl_server.core.aggregate import Abandoned, Parameters, WeightedMean, blocks
from fl_server.core.events import Aggregate, Aggregated, Broken, Discard, EffectFailed, Event, Fold, UpdateLost
from fl_server.core.model import GlobalModel, ModelId, Report, SessionConfig, SessionId
from fl_server.errors import Missing, Unavailable
from fl_server.scheduler.copies import Copies
from fl_server.store.ports import BlobStore
from fl_server.store.spool import Spool

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
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
        # unbounded: at most one Fold a client of a cohort
        self._work: asyncio.Queue[Fold | Aggregate | Discard] = asyncio.Queue()
        self._over = (0, 0)  # attempts up to this one are abandoned
        self._stopping = False
        self._restart()

    def order(self, effect: Fold | Aggregate) -> None:
        self._work.put_nowait(effect)

    def abandon(self, ended: Discard) -> None:
        self._over = (ended.round, ended.attempt)
        self._work.put_nowait(ended)

    def stop(self) -> None:
        """The kernel thread leaves at its next block; recovery does the work again."""
        self._stopping = True

    async def run(self) -> None:
        """Never raises: how an Aggregate ended is an event."""
        loop = asyncio.get_running_loop()
        while True:
            match await self._work.get():
                case Fold(report):
                    await loop.run_in_executor(self._workshop.kernel, self._fold_early, report)
                case Aggregate() as job:
                    if event := await self._aggregate(job):
                        await self._tell(event)
                case Discard():
                    self._restart()  # or an ended session would hold a sum, a model in float64, for ever

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
                    return await loop.run_in_executor(work.kernel, self._make, job, config, base, state)
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

    # ---- in a kernel thread, one at a time

    def _restart(self) -> None:
        self._folded: list[str] = []
        self._attempt = (0, 0)
        self._mean = WeightedMean()

    def _fold_early(self, report: Report) -> None:
        with contextlib.suppress(Exception):  # Aggregate will meet the same and say so
            self._fold(report)

    def _fold(self, report: Report) -> None:
        attempt = (report.task.round, report.task.attempt)
        if not self._folded or self._attempt != attempt:
            self._restart()
            self._attempt = attempt
        path = self._workshop.spool.path(report.update.blob)
        try:
            with codec.open_model(path, self._config().helper, max_bytes=self._workshop.max_model_bytes) as file:
                self._mean.fold(file.arrays(), report.update.num_examples, lambda: self._abandoned(attempt))
        except BaseException as why:  # half folded: what is there cannot be used
            self._restart()
            match why:
                case FileNotFoundError():
                    raise LostUpdate(report, "it is not in the spool") from None
                case codec.BadModel():
                    raise LostUpdate(report, f"its file is damaged: {why}") from None
                case OSError():
                    raise Unavailable(f"read {path.name}: {why}") from why
                case _:
                    raise
        self._folded.append(report.update.blob)

    def _abandoned(self, attempt: tuple[int, int]) -> bool:
        return self._stopping or attempt <= self._over

    def _make(self, job: Aggregate, config: SessionConfig, base: Path, state: Path | None) -> Made:
        blobs = [report.update.blob for report in job.reports]
        if self._folded != blobs[: len(self._folded)] or self._attempt != (job.round, job.attempt):
            self._restart()
        for report in job.reports[len(self._folded) :]:
            self._fold(report)
        mean = self._mean.finish()
        self._restart()
        try:
            return self._write(job, config, base, state, mean)
        except OSError as full:
            raise Unavailable(f"write the model of round {job.round}: {full}") from full

    def _write(self, job: Aggregate, config: SessionConfig, base: Path, state: Path | None, mean: Parameters) -> Made:
        optimizer = server_opt.parse(config.aggregator, config.aggregator_kwargs)
        limit = self._workshop.max_model_bytes
        with codec.open_model(base, config.helper, max_bytes=limit) as file:
            layout = file.layout
            if state is None:
                model, moments = optimizer.step(file.arrays(), mean, [])
            else:
                with codec.open_npz(state, max_bytes=4 * limit) as former:
                    model, moments = optimizer.step(file.arrays(), mean, former.arrays())
            stem = f"{self._session}-{job.round}-{job.attempt}"
            target = self._workshop.folder / f"{stem}{codec.SUFFIXES[config.helper]}"
            made = tuple(
                codec.ArraySpec(spec.name, array.dtype, spec.shape) for spec, array in zip(layout, model, strict=True)
            )
            out = codec.write(target, config.helper, made, [_blocks(array) for array in model])
        if not moments:
            return Made(target, out.sha256, None)
        moments_target = self._workshop.folder / f"{stem}.moments"
        with codec.NpzWriter(moments_target) as second:
            for index, array in enumerate(moments):
                second.add(str(index), array.dtype, array.shape, _blocks(array))
        return Made(target, out.sha256, moments_target)


def _blocks(array: codec.Array) -> Iterator[codec.Array]:
    return (block for [block] in blocks(array))
