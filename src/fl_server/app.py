"""The composition root: settings -> stores -> scheduler -> gRPC and REST, in one process and one TaskGroup.

Start: owner lock, recovery, gRPC port, REST port, ready: an update must never meet a server that has not loaded its
session. Stop: no new work, streams end with "come again", calls under way finish, stores close. What an aggregation
had done so far is left: recovery does it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import os
import resource
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fl_server.auth import HMAC, Failures, Gate, Verifier
from fl_server.combiner.downloads import Downloads
from fl_server.combiner.server import CombinerServer, WireLimits
from fl_server.combiner.servicer import Limits, Servicer
from fl_server.errors import Invalid, StoreError, Unavailable
from fl_server.rest.access import Pace
from fl_server.rest.app import create_app
from fl_server.rest.bodies import Desk
from fl_server.rest.bodies import Limits as RestLimits
from fl_server.rest.clients import Advertised
from fl_server.scheduler.aggregation import Workshop
from fl_server.scheduler.copies import Copies
from fl_server.scheduler.in_flight import InFlight
from fl_server.scheduler.intake import Intake
from fl_server.scheduler.packages import Packages
from fl_server.scheduler.scheduler import Patience, Scheduler
from fl_server.settings import Settings
from fl_server.store.ports import BlobStore, StateStore
from fl_server.store.spool import Spool
from fl_server.tls import Certificates, Made, private_certificates

if TYPE_CHECKING:  # a store's module is imported by the server that uses it
    from fl_server.store.files import FileBlobStore
    from fl_server.store.s3 import S3

logger = logging.getLogger(__name__)
RENEW_CERTIFICATES_S = 86_400.0
HEAPS = 2  # of malloc
KEPT_FREE_BYTES = 64 * 1024 * 1024  # of memory that was freed, at the end of a heap
MAPPED_FROM_BYTES = 32 * 1024 * 1024  # the largest that glibc takes
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h
COLLECT_AFTER = 700, 10, 4  # as Python has it, but for the last: a full collection looks at 10,000 to 30,000 objects
YOUNG_UP_TO_S, MOST_UNSEEN = 0.05, 10_000  # objects
COUNT_OBJECTS_EVERY_S = 600.0
QUIET_GROWTH, MOST_GROWTH = 50_000, 1_000_000  # objects of about 100 bytes


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
    rpcs: tuple[str, ...]  # package.Service/Method


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
    store = state_store(settings, pools)
    await store.open(owner_name(settings), standby=settings.standby)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        await stack.enter_async_context(kept(store))
        models, updates, archives = [await stack.enter_async_context(blobs) for blobs in blob_stores(settings, pools)]
        await _make_prediction_bucket(settings, pools)
        spool = Spool(data / "spool", pools.disk, max_bytes=settings.spool_max_bytes, fsync=fsync)
        await spool.open()
        work = data / "work"
        await asyncio.get_running_loop().run_in_executor(pools.disk, _empty, work)
        copies = Copies(updates, spool) if settings.durability == "site" else None
        workshop = Workshop(models, spool, pools.kernel, work, settings.max_model_bytes, copies)
        patience = Patience(
            rejoin_window_s=settings.rejoin_window_s,
            upload_ttl_s=settings.upload_ttl_s,
            telemetry_ttl_s=settings.telemetry_ttl_s,
            prediction_timeout_s=settings.prediction_timeout_s,
            drain_s=settings.drain_timeout_s,
        )
        scheduler = Scheduler(store, workshop, updates, clock, patience)
        packages = Packages(store, archives, scheduler.insist, clock)
        async with scheduler.running(), packages.running():
            yield scheduler, packages


def owner_name(settings: Settings, program: str = "flserve") -> str:
    return f"{program}, process {os.getpid()} on {socket.gethostname()}, data in {settings.data_dir.resolve()}"


def state_store(settings: Settings, pools: Executors) -> StateStore:
    url = settings.mongo_url.get_secret_value()
    if not url:
        from fl_server.store.sqlite import SqliteStateStore

        fsync = settings.durability != "process"
        return SqliteStateStore(settings.data_dir / "state.db", pools.state, fsync=fsync)
    from fl_server.store.mongo import MongoStateStore

    return MongoStateStore(url, settings.mongo_database)


async def database_clock_s(settings: Settings) -> float | None:
    """What MongoDB's clock says, in seconds since the epoch; None without one. It may be another's."""
    url = settings.mongo_url.get_secret_value()
    if not url:
        return None
    from fl_server.store.mongo import MongoStateStore

    return await MongoStateStore(url, settings.mongo_database).clock_s()


@asynccontextmanager
async def kept(store: StateStore) -> AsyncIterator[None]:
    """The ownership is renewed until the block is left. Raises Deposed, out of the block, when it is lost."""
    async with asyncio.TaskGroup() as tasks:
        keeping = tasks.create_task(store.keep(), name="keep the ownership")
        try:
            yield
        finally:
            keeping.cancel()


def blob_stores(
    settings: Settings, pools: Executors, *, below: str = ""
) -> list[contextlib.AbstractAsyncContextManager[BlobStore]]:
    """Models, updates that are kept, packages; each to be entered. below: in S3, before all their keys."""
    data, models, context = settings.data_dir, settings.s3_model_bucket, settings.s3_context_bucket
    fsync = settings.durability != "process"
    if not settings.s3_endpoint_url:
        from fl_server.store.files import FileBlobStore

        folders = ("models", "updates", "packages")
        return [_opened_files(FileBlobStore(data / folder, pools.disk, fsync=fsync)) for folder in folders]
    from fl_server.store.s3 import opened

    server = _s3(settings)
    return [
        opened(
            server,
            bucket,
            data / "cache" / name,
            pools.disk,
            cache_bytes=settings.s3_cache_bytes,
            prefix=below + prefix,
        )
        for name, bucket, prefix in (("models", models, ""), ("updates", models, "updates/"), ("packages", context, ""))
    ]


def _s3(settings: Settings) -> S3:
    from fl_server.store.s3 import S3

    secret_key = settings.s3_secret_key.get_secret_value()
    return S3(settings.s3_endpoint_url, settings.s3_access_key, secret_key, settings.s3_region)


async def _make_prediction_bucket(settings: Settings, pools: Executors) -> None:
    """FEDn's third bucket, for whoever looks for it. Nothing needs it: predictions are records."""
    if not settings.s3_endpoint_url:
        return
    from fl_server.store.s3 import opened

    cache = settings.data_dir / "cache" / "predictions"
    try:
        async with opened(_s3(settings), settings.s3_prediction_bucket, cache, pools.disk, cache_bytes=1):
            pass
    except StoreError as why:
        logger.warning("no prediction bucket", extra={"reason": str(why)})


@asynccontextmanager
async def _opened_files(blobs: FileBlobStore) -> AsyncIterator[BlobStore]:
    await blobs.open()
    yield blobs


def gate(settings: Settings, clock: Callable[[], float] = time.time) -> Gate | None:
    """None: authentication is off. Raises Invalid."""
    if not settings.jwt_secret_key.get_secret_value():
        return None
    return Gate(
        Verifier.of(
            settings.jwt_secret_key.get_secret_value(),
            algorithm=settings.jwt_algorithm,
            scheme=settings.auth_scheme,
            claim_key=settings.jwt_custom_claim_key,
            claim_value=settings.jwt_custom_claim_value,
            clock=clock,
        ),
        Failures(settings.auth_failures_per_minute, time.monotonic),
        settings.auth_whitelist_url,
    )


def certificates(settings: Settings) -> Certificates | None:
    """None: both ports are plaintext. Raises Invalid."""
    given, key, client_ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    if settings.tls == "auto":
        if given or key:
            raise Invalid("tls: auto makes the certificate; tls_cert and tls_key are for one that is there")
        made = _private_certificates(settings)
        logger.info("private CA", extra={"ca": made.ca})
        given, key = made.certificate, made.key
    if given and key:
        return Certificates(given, key, client_ca)
    if given or key or client_ca:
        raise Invalid("tls_cert, tls_key: both are needed")
    return None


def _private_certificates(settings: Settings) -> Made:
    named = [settings.advertise_host, settings.grpc_trusted_proxy, settings.host]
    return private_certificates(settings.data_dir / "tls", [name for name in named if name not in ("0.0.0.0", "::")])


@asynccontextmanager
async def _certificates_renewed(settings: Settings, pools: Executors) -> AsyncIterator[None]:
    """Those of --tls auto, by a server that runs longer than they last; both ports read them again."""

    async def renew() -> None:
        while True:
            await asyncio.sleep(RENEW_CERTIFICATES_S)
            try:
                await asyncio.get_running_loop().run_in_executor(pools.disk, _private_certificates, settings)
            except (Invalid, OSError) as wrong:
                logger.error("certificate not renewed", extra={"reason": wrong})

    async with asyncio.TaskGroup() as tasks:
        renewing = tasks.create_task(renew(), name="renew certificates") if settings.tls == "auto" else None
        try:
            yield
        finally:
            if renewing is not None:
                renewing.cancel()


def say_who_may_call(settings: Settings) -> None:
    """In the log, at the start."""
    secret = settings.jwt_secret_key.get_secret_value()
    has_tls = bool(settings.tls_cert or settings.tls)
    if not secret:
        logger.warning("authentication is off: whoever reaches the ports may do all; jwt_secret_key turns it on")
        return
    logger.info("authentication is on", extra={"algorithm": settings.jwt_algorithm})
    if settings.jwt_algorithm in HMAC and len(secret.encode()) < 32:
        logger.warning("jwt_secret_key is short: 32 random bytes cannot be guessed, this one may be")
    if not has_tls and not settings.grpc_trusted_proxy:
        logger.warning(
            "gRPC is plaintext: tokens can be read on the way, and FEDn's own client sends none there and is refused; "
            "tls_cert, or grpc_trusted_proxy where a proxy ends TLS"
        )
    elif settings.grpc_port != 443 and not settings.grpc_trusted_proxy:
        logger.info("FEDn's own client uses TLS on port 443 alone: grpc_port, or grpc_trusted_proxy")


@asynccontextmanager
async def serving(settings: Settings, clock: Callable[[], float] = time.time) -> AsyncIterator[Server]:
    """A server that is ready, until the block is left. Raises Owned, Unavailable (a port is taken), Invalid."""
    entry, tls = gate(settings), certificates(settings)
    with executors() as pools:
        async with (
            _certificates_renewed(settings, pools),
            scheduling(settings, pools, clock) as (scheduler, packages),
        ):
            limits = Limits(
                max_model_bytes=settings.max_model_bytes,
                uploads_at_once=settings.uploads_at_once,
                upload_idle_timeout_s=settings.upload_idle_timeout_s,
                upload_max_chunks=settings.upload_max_chunks,
                upload_min_bytes_per_s=settings.upload_min_bytes_per_s,
                max_clients=settings.max_clients,
                max_streams_per_peer=settings.max_streams_per_peer,
                store_patience_s=settings.store_patience_s,
            )
            downloads = Downloads(scheduler, pools.disk, kept_bytes=settings.download_cache_bytes)
            in_flight = InFlight(settings.uploads_in_flight_bytes, settings.store_patience_s)
            servicer = Servicer(scheduler, Intake(scheduler), downloads, limits, in_flight)
            combiner = CombinerServer(
                servicer,
                scheduler,
                upload_window=settings.grpc_upload_window,
                limits=WireLimits(
                    settings.grpc_max_message_bytes,
                    settings.grpc_max_metadata_bytes,
                    settings.grpc_request_timeout_s,
                    settings.grpc_idle_timeout_s,
                    settings.max_calls_per_peer,
                    settings.http_header_timeout_s,
                ),
                gate=entry,
                credentials=tls.credentials() if tls else None,
            )
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
                    in_flight=in_flight,
                )
                fqdn = settings.grpc_trusted_proxy or (settings.advertise_host if tls and grpc_port == 443 else "")
                at = Advertised(settings.advertise_host, grpc_port, tls=tls is not None, fqdn=fqdn)
                rest = create_app(
                    scheduler,
                    packages,
                    desk,
                    advertise=lambda: at,
                    gate=entry,
                    url_prefix=settings.custom_url_prefix,
                    pace=Pace(settings.upload_idle_timeout_s, settings.upload_min_bytes_per_s),
                    limits=RestLimits(
                        settings.http_max_header_bytes,
                        settings.json_max_bytes,
                        settings.json_max_depth,
                        settings.page_max_rows,
                    ),
                )
                async with _http(rest, settings, tls) as api_port:
                    api_url = f"{'https' if tls else 'http'}://{_dialled(settings.host)}:{api_port}"
                    yield Server(api_url, grpc_port, scheduler, tuple(combiner.rpcs))
                    scheduler.stop_serving()
            finally:
                scheduler.stop_serving()
                await combiner.stop(settings.drain_timeout_s)


def _patient(settings: Settings) -> type[H11Protocol]:
    connections: Counter[str] = Counter()  # open, by address
    most, most_of_peer = settings.http_max_connections, settings.http_max_connections_per_peer

    class Patient(H11Protocol):
        """Hangs up on a connection whose next request does not come to the end of its headers (slow loris), and on one
        that does not take what it is sent. Of too many, each is told so when it asks.
        """

        _hang_up: asyncio.TimerHandle | None = None
        _give_up_writing: asyncio.TimerHandle | None = None
        _peer = ""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            # whatever waits to be read has its time; high is not 0, at which asyncio's TLS pauses for nothing
            transport.set_write_buffer_limits(high=1, low=0)
            self._peer = self.client[0] if self.client else ""
            connections[self._peer] += 1
            self._time_headers()

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            if self.cycle is None and connections[self._peer] > most_of_peer:
                self._refuse(429, f"http_max_connections_per_peer ({most_of_peer}) are open; come again")
            elif self.cycle is None and connections.total() > most:
                self._refuse(503, f"http_max_connections ({most}) are open; come again")
            else:
                super().data_received(data)
                self._time_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            connections[self._peer] -= 1
            if not connections[self._peer]:
                del connections[self._peer]
            self._stop_timing()
            self.resume_writing()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            patience_s = self.transport.get_write_buffer_size() / settings.upload_min_bytes_per_s
            patience_s += settings.upload_idle_timeout_s
            self._give_up_writing = self.loop.call_later(patience_s, self.transport.abort)

        def resume_writing(self) -> None:
            if self._give_up_writing is not None:
                self._give_up_writing.cancel()
                self._give_up_writing = None
            super().resume_writing()

        def send_400_response(self, msg: str) -> None:
            waiting_bytes = len(self.conn.trailing_data[0])
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # in the midst of an answer
                self.transport.close()
            elif waiting_bytes > settings.http_max_header_bytes:
                self._refuse(431, f"headers: more than http_max_header_bytes ({settings.http_max_header_bytes})")
            else:
                self._refuse(400, msg)

        def _refuse(self, status: int, message: str) -> None:
            body = json.dumps({"message": message}).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", f"{len(body)}"),
                ("connection", "close"),
            ]
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._time_headers()

        def _next_is_due(self) -> bool:
            """Also while a body still comes that was answered before its end."""
            return self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE

        def _time_headers(self) -> None:
            if not self._next_is_due():
                self._stop_timing()
            elif self._hang_up is None:
                self._hang_up = self.loop.call_later(settings.http_header_timeout_s, self._give_up)

        def _stop_timing(self) -> None:
            if self._hang_up is not None:
                self._hang_up.cancel()
                self._hang_up = None

        def _give_up(self) -> None:
            self._hang_up = None
            if self._next_is_due() and not self.transport.is_closing():
                self.transport.close()

    return Patient


def openapi() -> dict[str, Any]:
    """The REST API's description. No store is opened for it and nothing runs."""
    from fl_server.store.files import FileBlobStore
    from fl_server.store.sqlite import SqliteStateStore

    nowhere = Path("nowhere")
    with executors() as pools:
        models, updates, archives = (FileBlobStore(nowhere, pools.disk) for _ in range(3))
        store, spool = SqliteStateStore(nowhere, pools.state), Spool(nowhere, pools.disk, max_bytes=1)
        scheduler = Scheduler(store, Workshop(models, spool, pools.kernel, nowhere, 1), updates, time.time)
        packages = Packages(store, archives, scheduler.insist, time.time)
        desk = Desk(nowhere, pools.kernel, pools.disk, 1, 1, 1, InFlight(1, 1.0))
        return create_app(scheduler, packages, desk, advertise=lambda: Advertised("", 0)).openapi()


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
async def _http(app: object, settings: Settings, tls: Certificates | None) -> AsyncIterator[int]:
    host, port = settings.host, settings.api_port
    try:
        listening = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as taken:
        raise Unavailable(f"REST port {port} on {host} is taken: {taken.strerror or taken}") from taken
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=_patient(settings),
        h11_max_incomplete_event_size=settings.http_max_header_bytes,
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=2,
        server_header=False,
    )
    config.load()
    if tls is not None:
        config.ssl = tls.context()
    server = _Uvicorn(config)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve(sockets=[listening]), name="rest")
        async with asyncio.timeout(30):
            await server.up.wait()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True


def keep_freed_memory() -> None:
    """For the next messages of 1 MiB: given back to the kernel, and faulted in page by page again, an upload's cost a
    fifth of a round. glibc would give back all above twice what was last mapped and freed.

    Whoever sets one of these in the environment knows better. Other libraries have no mallopt.
    """
    if not any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        _mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)  # else, once the other is set, all from 128 KiB are mapped
        _mallopt(M_TRIM_THRESHOLD, KEPT_FREE_BYTES)


def share_heaps() -> None:
    """Of all threads: glibc makes a heap for each that allocates, up to 8 a core, and what one had stays with it.

    With parts of an object for S3 on their way in each that is 130 MB; keep_freed_memory() keeps as much of each heap.
    """
    if not any(name in os.environ for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")):
        _mallopt(M_ARENA_MAX, HEAPS)


def _mallopt(parameter: int, value: int) -> None:
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(parameter, value)


def _raise_file_limit(settings: Settings) -> None:
    """Each connection is an open file, and a soft limit of 1024 is common."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or soft < hard:
        with contextlib.suppress(ValueError, OSError):  # where infinity is not allowed
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    wanted = settings.max_clients + settings.http_max_connections
    if soft != resource.RLIM_INFINITY and soft < wanted:
        logger.warning("few open files are allowed", extra={"limit": soft, "clients_and_connections": wanted})


@asynccontextmanager
async def short_collections(is_quiet: Callable[[], bool]) -> AsyncIterator[None]:
    """What a full collection of garbage found in use is not looked at by the next ones: with 10,000 clients attached
    each of them would hold the loop for 0.5 s, several times a round.

    Cycles that become garbage among that are found when all is looked at: once it has grown, and nothing runs.
    """

    def leave_alone(phase: str, collection: dict[str, int]) -> None:
        if phase == "stop" and collection["generation"] == 2:
            gc.freeze()

    async def look_at_all(known: int) -> None:
        while True:
            await asyncio.sleep(COUNT_OBJECTS_EVERY_S)
            if gc.get_freeze_count() - known > (QUIET_GROWTH if is_quiet() else MOST_GROWTH):
                gc.unfreeze()
                gc.collect()
                known = gc.get_freeze_count()

    async def look_at_young() -> None:
        """Python counts objects that come less those that go: with calls that follow each other it may look at none
        for a second, and then at 50,000, for 30 to 50 ms.
        """
        while True:
            await asyncio.sleep(YOUNG_UP_TO_S)
            gc.collect(2 if len(gc.get_objects(generation=2)) > MOST_UNSEEN else 1)

    thresholds = gc.get_threshold()
    gc.set_threshold(*COLLECT_AFTER)
    gc.freeze()
    gc.callbacks.append(leave_alone)
    async with asyncio.TaskGroup() as tasks:
        looking = [
            tasks.create_task(look_at_all(gc.get_freeze_count()), name="look at all objects"),
            tasks.create_task(look_at_young(), name="look at young objects"),
        ]
        try:
            yield
        finally:
            for task in looking:
                task.cancel()
            gc.callbacks.remove(leave_alone)
            gc.unfreeze()
            gc.set_threshold(*thresholds)


async def run(settings: Settings, ready: Callable[[Server], None]) -> None:
    """Serves until SIGINT or SIGTERM; `ready` is called once."""
    keep_freed_memory()
    if settings.s3_endpoint_url:
        share_heaps()
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
            say_who_may_call(settings)
            _raise_file_limit(settings)
            async with short_collections(lambda: not server.scheduler.any_running()):
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
