"""BlobStore in one directory: the embedded default. A blob is a file with its key as name.

Files appear whole, by a rename; what begins with a dot is being written. One process uses the directory: the owner of
the StateStore beside it.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from pathlib import Path
from typing import TypeVar

from fl_server.errors import Missing
from fl_server.store.disk import PART, disk_errors, make_folder, place, sync

T = TypeVar("T")

_KEY = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,200}")


class FileBlobStore:
    """fsync: what put() has answered survives a loss of power, and not only the death of the process."""

    def __init__(self, folder: Path, executor: Executor, *, fsync: bool = False) -> None:
        self._folder, self._executor, self._fsync = folder, executor, fsync
        self._parts = itertools.count()

    async def open(self) -> None:
        """Makes the folder, and removes what a process that died was writing."""

        def work() -> None:
            make_folder(self._folder, fsync=self._fsync)
            for part in self._folder.glob(f".*{PART}"):
                part.unlink(missing_ok=True)

        await self._run(f"opening {self._folder}", work)

    async def put(self, key: str, data: bytes) -> None:
        blob, part = self._path(key), self._part(key)

        def work() -> None:
            try:
                part.write_bytes(data)
                place(part, blob, fsync=self._fsync)
            finally:
                part.unlink(missing_ok=True)

        await self._run(f"put {key}", work)

    async def put_file(self, key: str, path: Path) -> None:
        blob, part = self._path(key), self._part(key)

        def work() -> None:
            if not path.exists():
                if not blob.exists():
                    raise Missing(f"put {key}: neither {path} nor the blob is there")
                if self._fsync:  # moved by a call whose outcome nobody heard
                    sync(self._folder)
                return
            os.utime(path)  # a blob's age counts from its put
            try:
                place(path, blob, fsync=self._fsync)
            except OSError as exc:
                if exc.errno != errno.EXDEV:
                    raise
                try:
                    shutil.copyfile(path, part)
                    place(part, blob, fsync=self._fsync)
                finally:
                    part.unlink(missing_ok=True)
                path.unlink(missing_ok=True)

        await self._run(f"put {key}", work)

    async def local(self, key: str) -> Path:
        blob = self._path(key)
        if not await self._run(f"local {key}", blob.exists):
            raise Missing(f"there is no blob {key}")
        return blob

    async def get(self, key: str) -> bytes:
        blob = self._path(key)

        def work() -> bytes:
            try:
                return blob.read_bytes()
            except FileNotFoundError:
                raise Missing(f"there is no blob {key}") from None

        return await self._run(f"get {key}", work)

    async def size_bytes(self, key: str) -> int | None:
        blob = self._path(key)

        def work() -> int | None:
            try:
                return blob.stat().st_size
            except FileNotFoundError:
                return None

        return await self._run(f"size of {key}", work)

    async def delete(self, keys: Iterable[str]) -> None:
        blobs = [self._path(key) for key in keys]

        def work() -> None:
            for blob in blobs:
                blob.unlink(missing_ok=True)

        await self._run(f"delete {len(blobs)} blobs", work)

    async def keys(self) -> list[tuple[str, float]]:
        def work() -> list[tuple[str, float]]:
            found = []
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    if _KEY.fullmatch(entry.name):
                        try:
                            found.append((entry.name, entry.stat().st_mtime))
                        except FileNotFoundError:  # deleted meanwhile
                            continue
            return found

        return await self._run(f"keys of {self._folder}", work)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise AssertionError(f"{key[:250]!r} is no key of ours")
        return self._folder / key

    def _part(self, key: str) -> Path:
        """A new one each time: a call that was given up may still be writing to the last one."""
        return self._folder / f".{key}.{next(self._parts)}{PART}"

    async def _run(self, doing: str, work: Callable[[], T]) -> T:
        def on_thread() -> T:
            with disk_errors(doing):
                return work()

        return await asyncio.get_running_loop().run_in_executor(self._executor, on_thread)
