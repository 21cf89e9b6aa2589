"""The simulated federation with its state in a real mongod and its models in a real S3 server.

Time is real here, and hurried; a run mostly waits (for its servers, and for clients that come again), so many run side
by side on one loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from motor.motor_asyncio import AsyncIOMotorClient

from fl_server.errors import Unavailable
from fl_server.store.mongo import MongoStateStore
from fl_server.store.s3 import S3, S3BlobStore, opened
from tests.crash.simulation import RESTART_S, Ended, Federation, Places, Stores, simulated
from tests.crash.test_every_call import Undisturbed
from tests.virtual import hurried_loop

T = TypeVar("T")
NEVER_S = 3600.0  # no round is to end by a deadline because this machine has other things to do
SIDE_BY_SIDE = 12
MOST_MISSED = 0.2  # of the points: how many reports share a call depends on how busy the servers and this machine are


async def started(start: Callable[[], Awaitable[T]]) -> T:
    """As who starts a process that ends because a store did not answer in time: again."""
    while True:
        try:
            return await start()
        except Unavailable:
            await asyncio.sleep(RESTART_S)


@dataclass(frozen=True, slots=True)
class Services:
    """Each run has a database of its own, which is dropped at its end, and a folder of its own in the bucket."""

    mongo_url: str
    s3: S3
    bucket: str
    pool: ThreadPoolExecutor

    async def allocate(self, folder: Path) -> None:
        """The first write into a new bucket takes seconds."""
        async with opened(self.s3, self.bucket, folder, self.pool, cache_bytes=10**6) as models:
            await models.put("first", b"write")

    def places(self, name: str) -> Places:
        @contextlib.asynccontextmanager
        async def places(federation: Federation) -> AsyncIterator[Stores]:
            store = MongoStateStore(self.mongo_url, name)
            close = store.close
            await started(lambda: store.open("a test"))
            keeping = asyncio.ensure_future(store.keep())
            try:
                async with contextlib.AsyncExitStack() as stack:
                    models, updates = [
                        await started(
                            lambda blobs=blobs: stack.enter_async_context(self._opened(federation, blobs, name))
                        )
                        for blobs in ("models", "updates")
                    ]
                    yield store, models, updates
            finally:
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)
                await close()  # else each restart would wait for the lease: test_services.py does

        return places

    def _opened(
        self, federation: Federation, blobs: str, name: str
    ) -> contextlib.AbstractAsyncContextManager[S3BlobStore]:
        cache, prefix = federation.folder / f"cache of {blobs}", f"{name}/{blobs}/"
        return opened(self.s3, self.bucket, cache, self.pool, cache_bytes=10**8, prefix=prefix)

    async def simulated(self, folder: Path, *deaths: tuple[int, bool]) -> tuple[Federation, Ended]:
        name = f"fl-test-{uuid.uuid4()}"
        try:
            return await simulated(
                folder,
                deaths,
                places=self.places(name),
                round_timeout_s=NEVER_S,
                deadline_by_hand=True,
                pool=self.pool,
            )
        finally:
            client: AsyncIOMotorClient[object] = AsyncIOMotorClient(self.mongo_url)
            await client.drop_database(name)
            client.close()


class OnServices(Undisturbed):
    def __init__(self, folder: Path, services: Services) -> None:
        self._services = services
        with hurried_loop() as loop:
            loop.run_until_complete(services.allocate(folder / "first"))
            federation, ended = loop.run_until_complete(services.simulated(folder / "calm"))
        self.calls, self.result = federation.calls, ended.result
        self.check(federation, ended)

    def dies_at(self, points: Iterable[int], *, after: bool, folder: Path) -> None:
        """Each of these calls is the last of a run's first life; every run ends as the undisturbed one did.

        A run that had fewer calls than that lives once: reports that come together share a call.
        """
        turns, missed, tried = asyncio.Semaphore(SIDE_BY_SIDE), [], list(points)

        async def run(k: int) -> None:
            async with turns:
                federation, ended = await self._services.simulated(folder / str(k), (k, after))
            if federation.lives == 1:
                assert federation.calls < k, f"the process lived through call {k} of {federation.calls}"
                missed.append(k)
            self.check(federation, ended)

        async def side_by_side() -> list[BaseException | None]:
            return await asyncio.gather(*(run(k) for k in tried), return_exceptions=True)

        with hurried_loop() as loop:
            failed = [(k, e) for k, e in zip(tried, loop.run_until_complete(side_by_side()), strict=True) if e]
        if failed:
            said = "\n".join(f"call {k}: {type(error).__name__}: {error}"[:300] for k, error in failed)
            raise AssertionError(f"{len(failed)} of {len(tried)}:\n{said}") from failed[0][1]
        assert len(missed) <= MOST_MISSED * len(tried), f"calls {missed} of {self.calls} did not come"
