"""Uploaded updates on local disk, found by (client, upload id) until their round is over, also after a restart.

A name is a hash of both ids and the time at which the upload was complete: no client's text is in a path, and a second
upload never overwrites an accepted one. A small one lies in a segment with others, a large one is a file. Methods are
called on the loop, and only there, but for content(); the disk is touched in the executor.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import hashlib
import itertools
import os
import re
import shutil
import stat
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from fl_server.errors import Missing, StoreError, Unavailable
from fl_server.store.disk import PART, disk_errors, make_folder, place, sync
from fl_server.store.segments import Segments, write_all

T = TypeVar("T")

_PIECE_BYTES = 2 * 1024 * 1024  # of a large upload, written at a time
_MOST_SPARES = 16  # files of removed uploads, to be written over: new pages cost three times as much as their bytes
_REMOVED_AT_ONCE = 256  # then others get their turn, on the loop and in the executor
_NAME = re.compile(r"[0-9a-f]{32}\.[0-9]{20}")
_REPLACED_MODE = 0o440  # uploads can be written, replaced files cannot: a mark that is set with the name


class SpoolFull(StoreError):
    """It does not fit now: wait_for_room(), and again. Not Unavailable: the disk is well, and time goes on."""

    code = Unavailable.code
    http_status = Unavailable.http_status
    grpc_status = Unavailable.grpc_status


class Spool:
    """max_bytes: what complete and open uploads may hold together.

    fsync: what finish() has answered survives a loss of power, and not only the death of the process.
    small_bytes: an upload that is no larger lies in a segment; 0: each one is a file.
    clock: seconds since the epoch; it decides which upload of the same ids is the newest, and stale().
    """

    def __init__(
        self,
        folder: Path,
        executor: Executor,
        *,
        max_bytes: int,
        fsync: bool = False,
        small_bytes: int = _PIECE_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._executor, self._fsync = folder, executor, fsync
        self._small_bytes = min(small_bytes, _PIECE_BYTES)
        self._max_bytes, self._clock = max_bytes, clock
        self._sizes: dict[str, int] = {}  # complete uploads: bytes by name
        self._names: dict[str, set[str]] = {}  # the same: names by stem
        self._used_bytes = 0
        self._last_nonce = 0
        self._parts = itertools.count()
        self._held: Counter[str] = Counter()
        self._spares: dict[Path, int] = {}  # their bytes; with the uploads' they are within max_bytes
        self._segments = Segments(folder, executor, fsync=fsync)
        self._waiting: dict[Upload, Waiter] = {}
        self._failed_bytes = 0  # what an upload needs that met a disk without room, until another one is complete

    async def open(self) -> None:
        """Finds what an earlier process left: complete uploads stay, all files whose names end in ".part" go."""

        def work() -> tuple[dict[str, int], dict[str, int]]:
            make_folder(self._folder, fsync=self._fsync)
            files = {}
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    if entry.name.endswith(PART):
                        os.unlink(entry.path)
                    elif _NAME.fullmatch(entry.name):
                        files[entry.name] = entry.stat().st_size
            return self._segments.load(), files

        small, files = await self._run("open", work)
        # a file has replaced what its segment still holds
        self._segments.drop([name for name in small if name in files or not _NAME.fullmatch(name)])
        for name, size_bytes in {**small, **files}.items():
            if _NAME.fullmatch(name):
                self._keep(name, size_bytes)

    async def begin(self, client: str, upload: str) -> Upload:
        """Nothing is on disk yet. Whoever begins calls finish() or, in `finally`, abort()."""
        return Upload(self, next(self._parts), _stem(client, upload))

    def find(self, client: str, upload: str) -> str | None:
        """The newest complete one."""
        return max(self._names.get(_stem(client, upload), ()), default=None)

    def path(self, name: str) -> Path:
        """Where it lies, unless it is in a segment."""
        if not _NAME.fullmatch(name):
            raise AssertionError(f"{name[:100]!r} is no name of ours")
        return self._folder / name

    def content(self, name: str) -> Path | bytes | memoryview:
        """The upload as a file or, a small one, as its bytes. For any thread; may touch the disk.

        Raises FileNotFoundError, or the open of the path does, when it is gone.
        """
        path = self.path(name)
        if name not in self._segments:
            return path
        try:
            return self._segments.read(name)
        except FileNotFoundError:
            if path.exists():  # replaced meanwhile
                return path
            raise

    def in_memory(self, name: str) -> bytes | memoryview | None:
        """The bytes of a small upload that came not long ago: no disk is touched."""
        return self._segments.recent(name)

    def size_bytes(self, name: str) -> int:
        """Raises Missing."""
        if name not in self._sizes:
            raise Missing(f"there is no upload {name} in the spool")
        return self._sizes[name]

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    async def probe(self) -> None:
        """Raises Unavailable if the disk takes nothing, or has no room for what an upload failed of.

        It is asked while a store is away, maybe for want of room: what is spared makes room first.
        """
        await self._drop_spares()
        part = self._folder / f"{next(self._parts)}{PART}"
        needed_bytes = self._failed_bytes

        def work() -> None:
            try:
                part.write_bytes(bytes(min(max(needed_bytes, 1), _PIECE_BYTES)))
                if needed_bytes > _PIECE_BYTES + shutil.disk_usage(self._folder).free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                part.unlink(missing_ok=True)

        await self._run(f"write {needed_bytes} bytes", work)

    async def replace(self, name: str, path: Path) -> None:
        """The file at `path`, in the spool's file system, takes the place of the upload; it is gone afterwards.

        It counts against max_bytes, but is never refused. Repeating it is allowed. Raises Missing if there is neither.
        is_replaced() is true of it from then on, also after a restart.
        """
        target = self.path(name)

        def work() -> int:
            if path.exists():
                path.chmod(_REPLACED_MODE)
                place(path, target, fsync=self._fsync)
            elif not target.exists():
                raise Missing(f"replace {name}: neither {path} nor the upload is there")
            elif self._fsync:  # moved by a call whose outcome nobody heard
                sync(self._folder)
            return target.stat().st_size

        def count(placed: asyncio.Future[int]) -> None:
            if not placed.cancelled() and placed.exception() is None:
                self._keep(name, placed.result())
                self._segments.drop([name])

        placing = self._start(f"replace {name}", work)
        try:
            await asyncio.shield(placing)
        except asyncio.CancelledError:  # the thread goes on, and what it places counts
            placing.add_done_callback(count)
            raise
        count(placing)

    @asynccontextmanager
    async def linked(self, name: str) -> AsyncIterator[Path]:
        """The file under a second name, which may be moved away, until the block is left. Raises Missing."""
        link = self._folder / f"{name}.{next(self._parts)}{PART}"

        def work() -> None:
            try:
                content = self.content(name)
                if not isinstance(content, Path):
                    link.write_bytes(content)
                    return
                try:
                    os.link(content, link)
                except FileNotFoundError:
                    raise
                except OSError:  # not every file system has links
                    shutil.copyfile(content, link)
            except FileNotFoundError:
                raise Missing(f"there is no upload {name} in the spool") from None

        try:
            await self._run(f"link {name}", work)
            yield link
        finally:
            await self._run(f"link {name}", lambda: link.unlink(missing_ok=True))

    async def restore(self, name: str, path: Path) -> None:
        """A copy of the file at `path` takes the place of a lost upload. As replace(), it is never refused."""
        part = self._folder / f"{name}.{next(self._parts)}{PART}"
        try:
            await self._run(f"restore {name}", lambda: shutil.copyfile(path, part))
            await self.replace(name, part)
        finally:
            await self._run(f"restore {name}", lambda: part.unlink(missing_ok=True))

    async def missing(self, names: Iterable[str]) -> set[str]:
        """Those whose bytes are not on the disk; no name, no bytes."""
        names = set(names)
        small = {name for name in names if name in self._segments}
        paths = {name: self.path(name) if name else None for name in names if name not in small}

        def work() -> set[str]:
            gone = {name for name, path in paths.items() if path is None or not path.exists()}
            return gone | self._segments.lost(small)

        return await self._run("missing", work)

    async def remove(self, names: Iterable[str]) -> None:
        """Empty names, and names of uploads that are gone, are passed over."""
        large = await self._remove_small([name for name in names if name])
        for start in range(0, len(large), _REMOVED_AT_ONCE):
            batch = large[start : start + _REMOVED_AT_ONCE]
            spares = {self.path(name): self._folder / f"{next(self._parts)}{PART}" for name in self._to_spare(batch)}
            removing = self._start("remove", partial(_remove, [self.path(name) for name in batch], spares))
            removing.add_done_callback(self._keep_spares)
            await asyncio.shield(removing)  # whoever is cancelled here, the thread goes on
            for name in batch:
                self._forget(name)

    async def _remove_small(self, names: Sequence[str]) -> list[str]:
        """Those that are in segments, some of them at a time: 10,000 would hold the loop for 30 ms. The others."""
        large: list[str] = []
        try:
            for start in range(0, len(names), _REMOVED_AT_ONCE):
                if start:
                    await asyncio.sleep(0)
                small: list[str] = []
                for name in names[start : start + _REMOVED_AT_ONCE]:  # asked now: replace() makes a file of one
                    (small if name in self._segments else large).append(name)
                # nothing is moved out of a segment from which more is about to go
                self._segments.drop(small, more_follow=True)
                for name in small:
                    self._forget(name)
        finally:
            self._segments.drop(())
        return large

    def _to_spare(self, names: Sequence[str]) -> list[str]:
        """The first of them, as many as there may be."""
        spared: list[str] = []
        room_bytes = self._max_bytes - self._used_bytes - sum(self._spares.values())
        for name in names:
            if (size_bytes := self._sizes.get(name, 0)) < _PIECE_BYTES:
                continue
            room_bytes -= size_bytes
            if room_bytes < 0 or len(self._spares) + len(spared) == _MOST_SPARES:
                break
            spared.append(name)
        return spared

    def _keep_spares(self, removing: asyncio.Future[dict[Path, int]]) -> None:
        if not removing.cancelled() and removing.exception() is None:
            self._spares.update(removing.result())

    def take_spare(self, about_bytes: int) -> Path | None:
        """A file that is the caller's from now on, to be written over by one of about that many bytes, or removed."""
        if not self._spares or about_bytes < _PIECE_BYTES:
            return None
        nearest = min(self._spares, key=lambda spare: abs(self._spares[spare] - about_bytes))
        del self._spares[nearest]
        return nearest

    def _take_spare(self) -> Path | None:
        """The last one is left for the round's model: nobody waits longer for an upload that makes a new file."""
        return self._spares.popitem()[0] if len(self._spares) > 1 else None

    async def _drop_spares(self) -> None:
        if spares := [*self._spares, *self._segments.take_spares()]:
            self._spares = {}
            await self._run("remove spares", partial(_unlink, spares))

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """It is in use, and not stale, until the block is left."""
        self._held[name] += 1
        try:
            yield
        finally:
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]

    def stale(self, older_than: float) -> list[str]:
        """Complete before this time, seconds since the epoch, and not held; oldest first."""
        old = (name for name in self._sizes if _nonce(name) < older_than * 1e9 and name not in self._held)
        return sorted(old, key=_nonce)

    def _new_name(self, stem: str) -> str:
        """Sorts behind all of this process, and of its stem, also if the clock was set back."""
        newest = max((_nonce(name) for name in self._names.get(stem, ())), default=0)
        self._last_nonce = max(int(self._clock() * 1e9), self._last_nonce + 1, newest + 1)
        return f"{stem}.{self._last_nonce:020}"

    def _keep(self, name: str, size_bytes: int) -> None:
        self._release(self._sizes.get(name, 0) - size_bytes)
        self._sizes[name] = size_bytes
        self._names.setdefault(_stem_of(name), set()).add(name)

    def _forget(self, name: str) -> None:
        if name in self._sizes:
            self._release(self._sizes.pop(name))
            siblings = self._names[_stem_of(name)]
            siblings.discard(name)
            if not siblings:
                del self._names[_stem_of(name)]

    def _reserve(self, size_bytes: int) -> None:
        if self._used_bytes + size_bytes > self._max_bytes:
            raise SpoolFull(
                f"the spool is full: {self._used_bytes} of {self._max_bytes} bytes used, {size_bytes} more do not fit; "
                "wait until a round is over, or raise spool_max_bytes"
            )
        self._used_bytes += size_bytes

    def _release(self, size_bytes: int) -> None:
        self._used_bytes -= size_bytes
        for upload in sorted(self._waiting, key=lambda upload: upload.number):  # the oldest comes first
            if not (room := self._waiting[upload].room).done():
                room.set_result(None)

    def _let_oldest_on(self) -> None:
        """If what younger ones hold that wait, too, is what the oldest needs, they give way.

        Else those that each hold a part would wait for each other, all in vain, and do so again when they come again.
        """
        oldest, *younger = sorted(self._waiting, key=lambda upload: upload.number)
        lacking_bytes = self._used_bytes + self._waiting[oldest].size_bytes - self._max_bytes
        if lacking_bytes > sum(upload.size_bytes for upload in younger):
            return
        for upload in reversed(younger):
            if lacking_bytes > 0 and upload.size_bytes:
                lacking_bytes -= upload.size_bytes
                if not (room := self._waiting[upload].room).done():
                    room.set_exception(SpoolFull("the spool is full, and an upload that began before needs the room"))

    def _start(self, doing: str, work: Callable[[], T]) -> asyncio.Future[T]:
        def on_thread() -> T:
            with disk_errors(f"spool {self._folder}: {doing}"):
                return work()

        return asyncio.get_running_loop().run_in_executor(self._executor, on_thread)

    async def _run(self, doing: str, work: Callable[[], T]) -> T:
        return await self._start(doing, work)


@dataclass(frozen=True, slots=True)
class Waiter:
    size_bytes: int  # more are needed
    room: asyncio.Future[None]


class Upload:
    """One upload while it comes in; one task uses it.

    A write() that raised took nothing and may be repeated, and so may finish(); after a cancelled one only abort().
    """

    def __init__(self, spool: Spool, number: int, stem: str) -> None:
        """number: grows from one to the next."""
        self._spool, self.number, self._stem = spool, number, stem
        self._is_coming = True  # as far as the segments know
        spool._segments.coming += 1
        self._chunks: list[bytes | memoryview] = []  # behind what is in the part file
        self._chunks_bytes = 0
        self._flushed_bytes = 0
        self._spare: Path | None = None  # becomes the part file
        self._name = ""  # once finish() was called
        self._finished = self._aborted = self._touched_disk = False

    @property
    def size_bytes(self) -> int:
        return self._flushed_bytes + self._chunks_bytes

    @functools.cached_property
    def _part(self) -> Path:
        return self._spool._folder / f"{self.number}{PART}"

    def _has_come(self) -> None:
        if self._is_coming:
            self._is_coming = False
            self._spool._segments.coming -= 1

    def buffer(self, data: bytes | memoryview) -> bool:
        """write() where that touches no disk; False: nothing was taken, and write() is needed."""
        fits = self._spool._used_bytes + len(data) <= self._spool._max_bytes
        if not fits or self._name or self._aborted or self._chunks_bytes + len(data) > _PIECE_BYTES:
            return False
        self._spool._used_bytes += len(data)
        self._chunks.append(data)
        self._chunks_bytes += len(data)
        return True

    async def write(self, data: bytes | memoryview) -> None:
        """Raises SpoolFull."""
        if self._name or self._aborted:
            raise AssertionError("write after finish or abort")
        self._spool._reserve(len(data))
        self._chunks.append(data)
        self._chunks_bytes += len(data)
        if self._chunks_bytes > _PIECE_BYTES:
            try:
                await self._run("write", self._flush)
            except Unavailable:
                self._chunks.pop()
                self._chunks_bytes -= len(data)
                self._spool._release(len(data))
                raise
            self._flushed_bytes, self._chunks, self._chunks_bytes = self.size_bytes, [], 0

    async def wait_for_room(self, size_bytes: int) -> None:
        """Returns when that many bytes more fit; nothing is set aside.

        Raises SpoolFull if they never will, or if an older upload that waits needs what this one holds.
        """
        spool = self._spool
        if self.size_bytes + size_bytes > spool._max_bytes:
            raise SpoolFull(
                f"{self.size_bytes + size_bytes} bytes will never fit into a spool of {spool._max_bytes}: "
                "raise spool_max_bytes"
            )
        while spool._used_bytes + size_bytes > spool._max_bytes:
            waiter = Waiter(size_bytes, asyncio.get_running_loop().create_future())
            spool._waiting[self] = waiter
            try:
                spool._let_oldest_on()
                await waiter.room
            finally:
                del spool._waiting[self]

    async def finish(self) -> str:
        """Returns its name: it is durable, and found."""
        if self._aborted:
            raise AssertionError("finish after abort")
        self._name = self._name or self._spool._new_name(self._stem)
        name = self._name

        def work() -> None:
            path = self._spool.path(name)
            if path.exists():  # a repeated call: what failed was the fsync of the folder
                sync(path.parent)
                return
            self._flush()
            place(self._part, path, fsync=self._spool._fsync)

        if not self._finished:
            if self._touched_disk or self.size_bytes > self._spool._small_bytes or not self._spool._small_bytes:
                await self._run("finish", work)
            else:
                self._has_come()
                with self._needing_room():
                    try:
                        await self._spool._segments.append(name, self._chunks)
                    except Unavailable:
                        await self._spool._drop_spares()
                        raise
            self._finished = True
            self._spool._failed_bytes = 0
            self._spool._release(self.size_bytes)
            self._spool._keep(name, self.size_bytes)
            self._flushed_bytes, self._chunks, self._chunks_bytes = self.size_bytes, [], 0
        return name

    async def abort(self) -> None:
        """Nothing of it stays. After finish() it does nothing."""
        if self._finished:
            return
        if not self._aborted:
            self._aborted = True
            self._has_come()
            self._spool._release(self.size_bytes)
            self._chunks, self._chunks_bytes = [], 0
        if self._touched_disk:
            # gRPC cancels a handler twice: the second time here
            await asyncio.shield(self._spool._start("abort", self._discard))
        elif self._name:  # its write, if it is under way, cannot be called back
            self._spool._segments.drop([self._name])

    def _flush(self) -> None:
        """Behind what is there for certain: a flush that failed, or another upload, may have left bytes there."""
        if self._spare is not None:
            with suppress(FileNotFoundError):  # somebody tidied up: a new one will do
                self._spare.replace(self._part)
            self._spare = None
        fd = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            write_all(fd, self._chunks, self._flushed_bytes)
            if self._name:
                os.ftruncate(fd, self.size_bytes)
        finally:
            os.close(fd)

    def _discard(self) -> None:
        _unlink([path for path in (self._part, self._spare, self._name and self._spool.path(self._name)) if path])

    async def _run(self, doing: str, work: Callable[[], None]) -> None:
        if not self._touched_disk:
            self._touched_disk, self._spare = True, self._spool._take_spare()
            self._has_come()

        def on_thread() -> None:
            try:
                work()
            finally:
                if self._aborted:  # its call was cancelled, and abort() may have found nothing to remove yet
                    self._discard()

        with self._needing_room():
            try:
                await self._spool._run(doing, on_thread)
            except Unavailable:
                await self._spool._drop_spares()
                raise

    @contextmanager
    def _needing_room(self) -> Iterator[None]:
        """What it needs is known while the disk has no room for it."""
        try:
            yield
        except Unavailable:
            largest_bytes = max(self._spool._sizes.values(), default=0)  # it may be the first piece that failed
            self._spool._failed_bytes = max(self._spool._failed_bytes, self.size_bytes, largest_bytes)
            raise


def is_replaced(status: os.stat_result) -> bool:
    """Of a file in a spool: whether replace() has put it there."""
    return not status.st_mode & stat.S_IWUSR


def _stem(client: str, upload: str) -> str:
    """The length keeps ("a", "b\\0c") and ("a\\0b", "c") apart."""
    return hashlib.sha256(f"{len(client)}\0{client}\0{upload}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _stem_of(name: str) -> str:
    return name.partition(".")[0]


def _nonce(name: str) -> int:
    """Nanoseconds since the epoch, about."""
    return int(name.partition(".")[2])


def _remove(paths: Sequence[Path], spares: Mapping[Path, Path]) -> dict[Path, int]:
    """All of these, or moves them to where they are spared; those that were, and their bytes."""
    kept = {}
    for path in paths:
        try:
            status = path.stat()
            # under a second name it is somebody's who keeps it; what has replaced an upload cannot be written
            if path in spares and status.st_nlink == 1 and not is_replaced(status):
                path.replace(spares[path])
                kept[spares[path]] = status.st_size
            else:
                path.unlink()
        except FileNotFoundError:
            pass
    return kept


def _unlink(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
