"""A deployment looked at and emptied from outside: `flserve doctor` and `flserve reset`.

The doctor may run beside a server and changes nothing that is a server's: it becomes owner only where nobody is, and
what it writes lies under names of its own. A reset is refused while a server owns the deployment.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import httpx

from fl_server.app import (
    Executors,
    blob_stores,
    certificates,
    database_clock_s,
    executors,
    gate,
    kept,
    owner_name,
    state_store,
)
from fl_server.errors import Corrupt, FlserveError, Invalid, Owned, StoreError
from fl_server.settings import Settings
from fl_server.store.ports import ID_FIELD, BlobStore, Collection, Condition, Document, Query, StateStore

LATE_S = 60.0  # a clock that is off by more is wrong: deadlines and signatures hang on it
BLOBS = ("models", "updates", "packages")  # as blob_stores() gives them
ANSWERS_WITHIN_S = 20.0
_AT_ONCE = 500
_PROBE = b"written by flserve doctor"


class Health(StrEnum):
    OK = "ok"
    NOTE = "note"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """says: one line; for what is wrong, with what to do."""

    about: str
    health: Health
    says: str


async def examine(settings: Settings) -> AsyncIterator[Finding]:
    """One finding after another, as they are known; none raises."""
    yield _settings(settings)
    for name in ("api_port", "grpc_port"):
        yield await _port(settings, name)
    with executors() as pools:
        async with contextlib.AsyncExitStack() as stack:
            store = state_store(settings, pools)
            database, is_ours = await _database(settings, store)
            if is_ours:
                stack.push_async_callback(store.close)
            yield database
            async for finding in _buckets(settings, pools):
                yield finding
            yield await _clock(settings, store if is_ours else None, database.health is Health.OK)
            if not is_ours:
                yield _disk(settings, 0, 0)
                yield Finding("package", Health.NOTE, "not looked at: the state is not ours; flserve package list")
                return
            try:
                clients, model_bytes = await _largest_cohort(settings, pools, store)
                yield _disk(settings, clients, model_bytes)
                yield await _package(settings, pools, store)
            except FlserveError as why:
                yield Finding("package", Health.WRONG, f"{why}")


def _settings(settings: Settings) -> Finding:
    try:
        entry, tls = gate(settings), certificates(settings)
    except (Invalid, StoreError) as wrong:
        return Finding("settings", Health.WRONG, str(wrong))
    if settings.durability == "site" and not settings.s3_endpoint_url:
        why = "durability: site needs s3_endpoint_url: copies beside the spool are lost with it"
        return Finding("settings", Health.WRONG, why)
    state = "MongoDB" if settings.mongo_url.get_secret_value() else "SQLite"
    blobs = "S3" if settings.s3_endpoint_url else "files"
    security = f"authentication {'on' if entry else 'off'}, TLS {'on' if tls else 'off'}"
    return Finding(
        "settings", Health.OK, f"state in {state}, blobs in {blobs}, data in {settings.data_dir}, {security}"
    )


async def _port(settings: Settings, name: str) -> Finding:
    port = int(getattr(settings, name))
    try:
        with socket.create_server(
            (settings.host, port), family=socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        ):
            return Finding(name, Health.OK, f"{port} on {settings.host} is free")
    except OSError as taken:
        if await _is_flserve(settings):
            return Finding(name, Health.OK, f"{port} on {settings.host}: a server runs there")
        why = taken.strerror or str(taken)
        return Finding(name, Health.WRONG, f"{port} on {settings.host}: {why}: stop what is there, or set {name}, host")


async def _is_flserve(settings: Settings) -> bool:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    scheme = "https" if settings.tls or settings.tls_cert else "http"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.api_port}/ready"
    async with httpx.AsyncClient(verify=False, timeout=3) as http:
        try:
            return "ready" in (await http.get(url)).json()
        except (httpx.HTTPError, ValueError, TypeError):
            return False


async def _database(settings: Settings, store: StateStore) -> tuple[Finding, bool]:
    """Whether the store is open, and ours."""
    where = f"MongoDB database {settings.mongo_database}" if settings.mongo_url.get_secret_value() else "SQLite"
    try:
        async with asyncio.timeout(ANSWERS_WITHIN_S):
            await store.open(owner_name(settings, "flserve doctor"))
    except Owned as owned:
        owner = str(owned).partition(" is owned by ")[2].partition(": stop that one")[0]
        return Finding("database", Health.OK, f"{where} answers; its owner is {owner}"), False
    except TimeoutError:
        says = f"{where}: no answer within {ANSWERS_WITHIN_S:.0f} s: check mongo_url, and that it runs"
        return Finding("database", Health.WRONG, says), False
    except Corrupt as why:  # it says what to do
        return Finding("database", Health.WRONG, str(why)), False
    except FlserveError as why:
        return Finding("database", Health.WRONG, f"{why}: check mongo_url or data_dir, and that it runs"), False
    return Finding("database", Health.OK, f"{where} answers; no server owns it"), True


async def _buckets(settings: Settings, pools: Executors) -> AsyncIterator[Finding]:
    """Written, read and deleted in each, under names and in folders that are nobody's."""
    with contextlib.ExitStack() as stack:
        try:
            settings.data_dir.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="doctor-", dir=settings.data_dir))
        except OSError as refused:
            says = f"{settings.data_dir}: {refused.strerror or refused}: set data_dir to a folder that can be written"
            yield Finding("data_dir", Health.WRONG, says)
            return
        elsewhere = settings.model_copy(update={"data_dir": Path(folder)})
        for name, opening in zip(BLOBS, blob_stores(elsewhere, pools, below="flserve-doctor/"), strict=True):
            try:
                async with asyncio.timeout(ANSWERS_WITHIN_S), opening as blobs:
                    yield await _bucket(name, blobs)
            except TimeoutError:
                yield Finding(name, Health.WRONG, f"no answer within {ANSWERS_WITHIN_S:.0f} s: check s3_endpoint_url")
            except FlserveError as why:
                yield Finding(name, Health.WRONG, f"{why}: check the s3_* settings, and what the keys may do")


async def _bucket(name: str, blobs: BlobStore) -> Finding:
    key = f"probe-{time.time_ns()}"
    await blobs.put(key, _PROBE)
    try:
        if await blobs.get(key) != _PROBE:
            return Finding(name, Health.WRONG, "what was written is not what is read: do not use this store")
    finally:
        await blobs.delete([key])
    if await blobs.size_bytes(key) is not None:
        return Finding(
            name, Health.WRONG, "what was deleted is still there: the keys may not delete, or a lock holds it"
        )
    return Finding(name, Health.OK, "written, read and deleted")


async def _clock(settings: Settings, store: StateStore | None, database_answers: bool) -> Finding:
    """A server that does not answer says no time: its own finding says so."""
    now = time.time()
    others = {"the S3 server's": await _s3_clock_s(settings)}
    if database_answers:
        others["MongoDB's"] = await _database_clock_s(settings)
    for whose, said_s in others.items():
        off_s = 0.0 if said_s is None else said_s - time.time()
        if abs(off_s) > LATE_S:
            says = f"{whose} is {off_s:+.0f} s off ours: set both by NTP; S3 refuses signatures 15 min off"
            return Finding("clock", Health.WRONG, says)
    if store is not None:
        newest = await _newest(store, Collection.SESSIONS)
        ahead_s = float(newest.get("updated_at") or 0) - now if newest else 0.0
        if ahead_s > LATE_S:
            says = f"a session was saved {ahead_s:.0f} s in our future: set it by NTP, or deadlines will be late"
            return Finding("clock", Health.WRONG, says)
    return Finding("clock", Health.OK, time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)))


async def _s3_clock_s(settings: Settings) -> float | None:
    if not settings.s3_endpoint_url:
        return None
    async with httpx.AsyncClient(timeout=5) as http:
        try:
            said = (await http.head(settings.s3_endpoint_url)).headers.get("date", "")
            return email.utils.parsedate_to_datetime(said).timestamp()
        except (httpx.HTTPError, ValueError, TypeError):
            return None


async def _database_clock_s(settings: Settings) -> float | None:
    try:
        async with asyncio.timeout(ANSWERS_WITHIN_S):
            return await database_clock_s(settings)
    except (FlserveError, TimeoutError):
        return None


async def _newest(store: StateStore, collection: Collection, *where: Condition) -> Document | None:
    found = await store.find(collection, Query(where, (("committed_at", True),), limit=1))
    return found[0] if found else None


async def _largest_cohort(settings: Settings, pools: Executors, store: StateStore) -> tuple[int, int]:
    """Clients that are known, and the bytes of the newest model."""
    model = await _newest(store, Collection.MODELS)
    if model is None:
        return 0, 0
    async with blob_stores(settings, pools)[0] as models:
        size_bytes = await models.size_bytes(str(model["model"])) or 0
    return await store.count(Collection.CLIENTS), size_bytes


def _disk(settings: Settings, clients: int, model_bytes: int) -> Finding:
    folder = next(
        folder for folder in (settings.data_dir.resolve(), *settings.data_dir.resolve().parents) if folder.exists()
    )
    free, needed = shutil.disk_usage(folder).free, clients * model_bytes
    has = f"{_gib(free)} GiB free in {settings.data_dir}"
    if needed > min(free, settings.spool_max_bytes):
        says = (
            f"{has}, {_gib(settings.spool_max_bytes)} for the spool, but {clients} updates of {_gib(model_bytes)} GiB"
        )
        return Finding("disk", Health.WRONG, f"{says}: a larger disk, spool_max_bytes, or fewer requested_clients")
    if free < settings.spool_max_bytes:
        says = f"{has}, less than spool_max_bytes ({_gib(settings.spool_max_bytes)}): uploads may fill it"
        return Finding("disk", Health.NOTE, says)
    return Finding("disk", Health.OK, has)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f}"


async def _package(settings: Settings, pools: Executors, store: StateStore) -> Finding:
    active = await _newest(store, Collection.PACKAGES, Condition("active", "eq", True))
    key = str(active.get("storage_file_name") or "") if active else ""
    if active is None or not key:
        return Finding("package", Health.NOTE, "none is active: clients run code of their own")
    async with blob_stores(settings, pools)[2] as archives:
        if await archives.size_bytes(key) is None:
            return Finding("package", Health.WRONG, f"the bytes of {active['name']} are gone: flserve package upload")
    return Finding("package", Health.OK, f"{active['name']} is active")


# ---- reset


async def purge(settings: Settings) -> dict[str, int]:
    """Deletes all records, blobs and uploads; how many there were. Raises Owned, naming the server that runs."""
    gone: dict[str, int] = {}
    with executors() as pools:
        store = state_store(settings, pools)
        await store.open(owner_name(settings, "flserve reset"))
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(store.close)
            await stack.enter_async_context(kept(store))
            gone["records"] = sum([await _empty(store, collection) for collection in Collection])
            for name, opening in zip(BLOBS, blob_stores(settings, pools), strict=True):
                async with opening as blobs:
                    keys = [key for key, _ in await blobs.keys()]
                    await blobs.delete(keys)
                    gone[name] = len(keys)
            for folder in ("spool", "work", "cache"):
                await asyncio.get_running_loop().run_in_executor(pools.disk, _remove, settings.data_dir / folder)
    return gone


async def _empty(store: StateStore, collection: Collection) -> int:
    """Sessions and rounds go one by one: their deletion is fenced."""
    gone = 0
    if collection in (Collection.SESSIONS, Collection.ROUNDS):
        while found := await store.find(collection, Query(limit=_AT_ONCE)):
            for document in found:
                gone += await store.delete(collection, str(document[ID_FIELD[collection]]))
        return gone
    while deleted := await store.delete_where(collection, (), _AT_ONCE):
        gone += deleted
    return gone


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
