"""The composition root: settings -> stores -> scheduler -> gRPC and REST, in one process and one TaskGroup.

Start: owner lock, recovery, gRPC port, REST port, ready: an update must never meet a server that has not loaded its
session. Stop: no new work, streams end with "come again", calls under way finish, stores close. What an aggregation
had done so far is left: recovery does it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from fl_server.combiner.downloads import Downloads
from fl_server.combiner.server import CombinerServer
from fl_server.combiner.servicer import Limits, Servicer
from fl_server.errors import Unavailable
from fl_server.rest.app import create_app
from fl_server.rest.bodies import Desk
from fl_server.scheduler.aggregation import Workshop
from fl_server.scheduler.intake import Intake
from fl_server.scheduler.packages import Packages
from fl_server.scheduler.scheduler import Patience, Scheduler
from fl_server.settings import Settings
from fl_server.store.files import FileBlobStore
from fl_server.store.ports import BlobStore, StateStore
from fl_server.store.spool import Spool
from fl_server.store.sqlite import SqliteStateStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Executors:
    """Never the loop's default pool: a save must not wait behind inflations."""

    state: ThreadPoolExecutor
    disk: ThreadPoolExecutor
    kernel: ThreadPoolExecutor


@contextmanager
def executors() -> Iterator[Executors]:
    made = Executors(
        ThreadPoolExecutor(1, thread_name_prefix="state"),
        ThreadPoolExecutor(4, thread_name_prefix="disk"),
        ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="kernel"),
    )
    try:
        yield made
    finally:
        for pool in (made.state, made.disk, made.kernel):
            pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is ready."""

    api_url: str
    grpc_port: int
    scheduler: Scheduler


@asynccontextmanager
async def scheduling(
    settings: Settings, pools: Executors, clock: Callable[[], float]
) -> AsyncIterator[tuple[Scheduler, Packages]]:
    """The stores opened and the scheduler recovered, without ports."""
    data, fsync = settings.data_dir, settings.durability != "process"
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as refused:
        raise Unavailable(f"data_dir: {data} cannot be made: {refused.strerror or refused}") from refused
    store = _state_store(settings, pools, fsync=fsync)
    owner = f"flserve, process {os.getpid()} on {socket.gethostname()}, data in {data.resolve()}"
    await store.open(owner, standby=settings.standby)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        await stack.enter_async_context(_kept(store))
        models, updates, archives = [
            await stack.enter_async_context(blobs) for blobs in _blob_stores(settings, pools, fsync=fsync)
        ]
        spool = Spool(data / "spool", pools.disk, max_bytes=settings.spool_max_bytes, fsync=fsync)
        await spool.open()
        work = data / "work"
        await asyncio.get_running_loop().run_in_executor(pools.disk, _empty, work)
        workshop = Workshop(models, spool, pools.kernel, work, settings.max_model_bytes)
        patience = Patience(
            rejoin_window_s=settings.rejoin_window_s,
            upload_ttl_s=settings.upload_ttl_s,
            telemetry_ttl_s=settings.telemetry_ttl_s,
        )
        scheduler = Scheduler(store, workshop, updates, clock, patience)
        packages = Packages(store, archives, scheduler.insist, clock)
        async with scheduler.running(), packages.running():
            yield scheduler, packages


def _state_store(settings: Settings, pools: Executors, *, fsync: bool) -> StateStore:
    url = settings.mongo_url.get_secret_value()
    if not url:
        return SqliteStateStore(settings.data_dir / "state.db", pools.state, fsync=fsync)
    from fl_server.store.mongo import MongoStateStore

    return MongoStateStore(url, settings.mongo_database)


@asynccontextmanager
async def _kept(store: StateStore) -> AsyncIterator[None]:
    """The ownership is renewed until the block is left. Raises Deposed, out of the block, when it is lost."""
    async with asyncio.TaskGroup() as tasks:
        keeping = tasks.create_task(store.keep(), name="keep the ownership")
        try:
            yield
        finally:
            keeping.cancel()


def _blob_stores(
    settings: Settings, pools: Executors, *, fsync: bool
) -> list[contextlib.AbstractAsyncContextManager[BlobStore]]:
    """Models, updates that are kept, packages; each to be entered."""
    data, models, context = settings.data_dir, settings.s3_model_bucket, settings.s3_context_bucket
    if not settings.s3_endpoint_url:
        folders = ("models", "updates", "packages")
        return [_opened_files(FileBlobStore(data / folder, pools.disk, fsync=fsync)) for folder in folders]
    from fl_server.store.s3 import S3, opened

    server = S3(
        settings.s3_endpoint_url,
        settings.s3_access_key,
        settings.s3_secret_key.get_secret_value(),
        settings.s3_region,
    )
    return [
        opened(server, bucket, data / "cache" / name, pools.disk, cache_bytes=settings.s3_cache_bytes, prefix=prefix)
        for name, bucket, prefix in (("models", models, ""), ("updates", models, "updates/"), ("packages", context, ""))
    ]


@asynccontextmanager
async def _opened_files(blobs: FileBlobStore) -> AsyncIterator[BlobStore]:
    await blobs.open()
    yield blobs


@asynccontextmanager
async def serving(settings: Settings, clock: Callable[[], float] = time.time) -> AsyncIterator[Server]:
    """A server that is ready, until the block is left. Raises Owned, Unavailable (a port is taken)."""
    with executors() as pools:
        async with scheduling(settings, pools, clock) as (scheduler, packages):
            limits = Limits(
                max_model_bytes=settings.max_model_bytes,
                uploads_at_once=settings.uploads_at_once,
                upload_idle_timeout_s=settings.upload_idle_timeout_s,
                store_patience_s=settings.store_patience_s,
            )
            downloads = Downloads(scheduler, pools.disk, kept_bytes=settings.download_cache_bytes)
            servicer = Servicer(scheduler, Intake(scheduler), downloads, limits)
            combiner = CombinerServer(servicer, upload_window=settings.grpc_upload_window)
            grpc_port = await combiner.start(settings.host, settings.grpc_port)
            try:
                advertised = settings.advertise_host or _dialled(settings.host)
                await scheduler.announce_combiner(advertised, grpc_port)
                desk = Desk(
                    settings.data_dir / "work",
                    pools.kernel,
                    pools.disk,
                    max_model_bytes=settings.max_model_bytes,
                    max_package_bytes=settings.package_max_bytes,
                    max_unpacked_bytes=settings.package_unpacked_max_bytes,
                )
                rest = create_app(scheduler, packages, desk, advertise=lambda: (settings.advertise_host, grpc_port))
                async with _http(rest, settings.host, settings.api_port) as api_port:
                    yield Server(_url(_dialled(settings.host), api_port), grpc_port, scheduler)
                    scheduler.stop_serving()
            finally:
                scheduler.stop_serving()
                await combiner.stop(settings.drain_timeout_s)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us, and says when it is up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.up.set()


@asynccontextmanager
async def _http(app: object, host: str, port: int) -> AsyncIterator[int]:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as taken:
        raise Unavailable(f"REST port {port} on {host} is taken: {taken.strerror or taken}") from taken
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=2,
        server_header=False,
    )
    server = _Uvicorn(config)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve(sockets=[listening]), name="rest")
        async with asyncio.timeout(30):
            await server.up.wait()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True


async def run(settings: Settings, ready: Callable[[Server], None]) -> None:
    """Serves until SIGINT or SIGTERM; `ready` is called once."""
    stopped = asyncio.Event()
    loop, starting = asyncio.get_running_loop(), asyncio.current_task()

    def stop() -> None:
        stopped.set()
        if starting is not None:
            starting.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        async with serving(settings) as server:
            starting = None
            ready(server)
            await stopped.wait()
            logger.info("stopping")
    except asyncio.CancelledError:  # told to stop while it was starting, as a standby does for ever
        if not stopped.is_set():
            raise


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _dialled(host: str) -> str:
    """An address that reaches a server that listens there."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def _empty(folder: Path) -> None:
    """What a former life was writing there is of no use."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
