"""Compute packages: kept, activated, found. And the helper that is set without one.

A package is a blob and a record, in this order. Records change one after another, by one task: of two activations at
once one is the last, for everybody. Nothing here opens an archive; what comes in is checked before.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fl_server.errors import Conflict, FlserveError
from fl_server.scheduler.aggregation import Insist
from fl_server.store.ports import BlobStore, Collection, Condition, Document, Patch, Put, Query, StateStore, Write

logger = logging.getLogger(__name__)
HELPER_ID = "active"  # the record of the helper alone, which FEDn keeps among the packages
ARE_PACKAGES = (Condition("package_id", "ne", HELPER_ID),)
QUEUE_SIZE = 64  # full: who wants a change waits
LITTER_TTL_S = 3600.0  # a blob that no record names by then is litter
SWEEP_EVERY_S = 600.0

Change = Callable[[], Awaitable[bool]]


class Packages:
    def __init__(self, store: StateStore, blobs: BlobStore, insist: Insist, clock: Callable[[], float]) -> None:
        """insist: does something again for as long as its store is away."""
        self.blobs = blobs
        self._store, self._insist, self._clock = store, insist, clock
        self._changes: asyncio.Queue[tuple[Change, asyncio.Future[bool]]] = asyncio.Queue(QUEUE_SIZE)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Packages]:
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(self._change_all(), name="packages"),
                tasks.create_task(self._sweep(), name="sweep packages"),
            ]
            yield self
            for task in background:
                task.cancel()

    # ---- for those who only read; they raise Unavailable

    async def active(self) -> Document | None:
        # after a crash in a store without transactions two may be called active: the newest is
        where = (*ARE_PACKAGES, Condition("active", "eq", True))
        found = await self._store.find(Collection.PACKAGES, Query(where, (("fl.activated_at", True),), limit=1))
        return found[0] if found else None

    async def stored_as(self, storage_file_name: str) -> Document | None:
        where = (*ARE_PACKAGES, Condition("storage_file_name", "eq", storage_file_name))
        found = await self._store.find(Collection.PACKAGES, Query(where, limit=1))
        return found[0] if found else None

    async def helper(self) -> str | None:
        """The active package's; without one, that which was set."""
        if package := await self.active():
            return str(package["helper"])
        document = await self._store.get(Collection.PACKAGES, HELPER_ID)
        return document["helper"] if document else None

    # ---- changes

    async def add(
        self,
        path: Path,
        *,
        name: str,
        description: str,
        file_name: str,
        extension: str,
        helper: str,
        sha256: str,
    ) -> Document:
        """The record of a new package, which is the active one, from a checked archive, which is taken."""
        package_id, at = str(uuid.uuid4()), self._clock()
        storage_file_name = f"{uuid.uuid4()}{extension}"
        await self._insist(self.blobs.put_file, storage_file_name, path)
        document: Document = {
            "package_id": package_id,
            "key": "package_trail",
            "name": name,
            "description": description,
            "file_name": file_name,
            "storage_file_name": storage_file_name,
            "helper": helper,
            "active": True,
            "committed_at": at,
            "updated_at": at,
            "fl": {"version": 1, "sha256": sha256, "activated_at": at},
        }

        async def put() -> bool:
            document["fl"]["activated_at"] = self._clock()
            await self._make_only(package_id, Put(Collection.PACKAGES, document))
            return True

        await self._changed(put)
        return document

    async def activate(self, package_id: str) -> bool:
        """False if there is no such package."""

        async def patch() -> bool:
            if package_id == HELPER_ID or not await self._insist(self._store.get, Collection.PACKAGES, package_id):
                return False
            at = self._clock()
            changes = {"active": True, "fl.activated_at": at, "updated_at": at}
            await self._make_only(package_id, Patch(Collection.PACKAGES, package_id, changes))
            return True

        return await self._changed(patch)

    async def deactivate(self) -> bool:
        """False if none is active."""

        async def patch() -> bool:
            if writes := await self._deactivations(but=HELPER_ID):
                await self._insist(self._store.save, writes)
            return bool(writes)

        return await self._changed(patch)

    async def set_helper(self, helper: str) -> None:
        """Raises Conflict if the active package has another one."""

        async def patch() -> bool:
            package = await self._insist(self.active)
            if package and package["helper"] != helper:
                raise Conflict(f"helper: that of the active package {package['name']} is {package['helper']}")
            at = self._clock()
            document = {"package_id": HELPER_ID, "key": HELPER_ID, "committed_at": at}
            await self._insist(self._store.append, Collection.PACKAGES, [document])
            changes = {"helper": helper, "updated_at": at}
            await self._insist(self._store.save, [Patch(Collection.PACKAGES, HELPER_ID, changes)])
            return True

        await self._changed(patch)

    async def _make_only(self, package_id: str, write: Write) -> None:
        """The new one first: in a store without transactions there is an active one all the time."""
        await self._insist(self._store.save, [write, *await self._deactivations(but=package_id)])

    async def _deactivations(self, *, but: str) -> list[Write]:
        where = (*ARE_PACKAGES, Condition("active", "eq", True), Condition("package_id", "ne", but))
        found = await self._insist(self._store.find, Collection.PACKAGES, Query(where))
        changes = {"active": False, "updated_at": self._clock()}
        return [Patch(Collection.PACKAGES, package["package_id"], changes) for package in found]

    async def _changed(self, change: Change) -> bool:
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        await self._changes.put((change, done))
        return await done

    async def _change_all(self) -> None:
        while True:
            change, done = await self._changes.get()
            try:
                outcome = await change()
            except FlserveError as refused:
                if not done.done():  # a caller that left is not waited for
                    done.set_exception(refused)
            else:
                if not done.done():
                    done.set_result(outcome)

    # ---- litter

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            litter = await self.litter()
            await self._insist(self.blobs.delete, litter)
            if litter:
                logger.info("swept", extra={"packages": len(litter)})

    async def litter(self) -> list[str]:
        """Blobs that no record names, and that nobody is about to name."""
        oldest = self._clock() - LITTER_TTL_S
        keys = [key for key, put_at in await self._insist(self.blobs.keys) if put_at < oldest]
        return [key for key in keys if await self._insist(self.stored_as, key) is None]
