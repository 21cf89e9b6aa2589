"""The k-th call again, with the state in a real mongod and the models in a real S3 server: the process dies before the
call has effect and after. Time is real here and hurried; the points are a sample, each a second or two."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fl_server.store import s3
from fl_server.store.mongo import MongoStateStore
from fl_server.store.s3 import S3, opened
from tests.crash.simulation import Federation, Places, Stores, simulate_on
from tests.crash.test_every_call import Undisturbed
from tests.virtual import hurried_loop

ROUND_TIMEOUT_S = 60.0  # hurried: six real seconds, for a machine that has other things to do


def on_services(mongo_url: str, s3_server: S3, bucket: str) -> Places:
    """A database of its own, and a folder of its own in the bucket."""
    name = f"fl-test-{uuid.uuid4()}"

    @contextlib.asynccontextmanager
    async def places(federation: Federation) -> AsyncIterator[Stores]:
        store = MongoStateStore(mongo_url, name)
        close = store.close
        await store.open("a test")
        keeping = asyncio.ensure_future(store.keep())
        cache = {"cache_bytes": 10**8}
        try:
            async with (
                opened(s3_server, name, federation.folder / "cache", federation.pool, **cache) as models,
                opened(
                    s3_server, name, federation.folder / "kept", federation.pool, prefix="updates/", **cache
                ) as kept,
            ):
                yield store, models, kept
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            await close()  # else each restart would wait for the lease: test_services.py does

    return places


async def allocate(s3_server: S3, bucket: str, folder: Path, pool: ThreadPoolExecutor) -> None:
    """The first write into a new bucket takes seconds."""
    async with opened(s3_server, bucket, folder, pool, cache_bytes=10**6) as models:
        await models.put("first", b"write")


class OnServices(Undisturbed):
    def __init__(self, folder: Path, mongo_url: str, s3_server: S3, pool: ThreadPoolExecutor) -> None:
        bucket = f"fl-test-{uuid.uuid4()}"
        asyncio.run(allocate(s3_server, bucket, folder / "first", pool))
        self._services, self._pool = (mongo_url, s3_server, bucket), pool
        federation, ended = self.simulate(folder)
        self.calls, self.result = federation.calls, ended.result
        self.check(federation, ended)

    def simulate(self, folder: Path, *deaths: tuple[int, bool]) -> Any:
        places = on_services(*self._services)
        options = {"places": places, "round_timeout_s": ROUND_TIMEOUT_S, "pool": self._pool}
        return simulate_on(hurried_loop, folder, deaths, **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, mongo_url: str, s3_server: S3) -> Any:
    with ThreadPoolExecutor(4) as pool, pytest.MonkeyPatch.context() as patched:
        patched.setattr(s3, "OPEN_TIMEOUT_S", 80.0)  # hurried too
        yield OnServices(tmp_path_factory.mktemp("calm"), mongo_url, s3_server, pool)


@pytest.mark.long
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_the_process_dies_at_its_kth_call_on_mongodb_and_s3(
    undisturbed: OnServices, after: bool, tmp_path: Path
) -> None:
    for k in range(9 + 4 * after, undisturbed.calls, 29):
        federation, ended = undisturbed.simulate(tmp_path / str(k), (k, after))
        assert federation.lives == 2, f"call {k} of {undisturbed.calls} did not come"
        undisturbed.check(federation, ended)
