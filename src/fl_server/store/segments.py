"""Small uploads, many in one file: what comes together, or while a write is under way, is written in one call.

A file of its own costs an upload of 100 kB thirty times as much as its bytes do. A segment is only appended to; when
nothing in it is needed any more its file is written over by a later one, for new pages cost more than their bytes. One
that holds little that is needed is emptied into the newest. After a crash it is read up to the last write that was
whole. What was dropped may be found again then: it is swept with what is too old. Methods are called on the loop, and
only there, except read() and lost().

A file begins with its segment's tag, and each record ends its own head with it: 16 random bytes, so that nothing of the
file's former contents, which strangers sent, is taken for a record. The head of a write's first record is written last,
and a file that is used again begins as an empty segment before it has its new name.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

from fl_server.errors import Unavailable
from fl_server.store.disk import PART, disk_errors, sync

SEGMENT_BYTES = 32 * 1024 * 1024  # a larger one is closed
RECENT_BYTES = 128 * 1024 * 1024  # of what was written last, still in memory
GATHERED_S = 0.003  # a write waits so long for more, if more are under way: it costs more than what it writes
_HEAD = struct.Struct("<8s16s")  # magic, tag
_MAGIC, _MAGIC_WITH_CRC = b"flserve\x02", b"flserve\x03"
_RECORD = struct.Struct("<IQ56s16s")  # CRC-32, number of bytes, name, tag
_SUMMED = struct.Struct("<Q56s")  # before the bytes, in the CRC
_NO_RECORD = bytes(_RECORD.size)
_FILE = re.compile(r"[0-9]{12}\.segment")
_MOST_GATHERED = 64
_MOST_PARTS = 512  # of one writev; IOV_MAX is 1024
_MOST_SPARES = 4  # files to be written over
_SPARE_BYTES = 2 * SEGMENT_BYTES  # a larger one is removed


@dataclass(slots=True)
class _Segment:
    path: Path
    spare: Path | None = None  # becomes the file
    end: int = _HEAD.size  # where the next record begins
    live: set[str] = field(default_factory=set)  # what is needed of it
    live_bytes: int = 0
    has_crc: bool = False  # each of its records
    is_damaged: bool = False  # what is needed of it cannot be read: there is nothing to move
    tag: bytes = field(default_factory=lambda: os.urandom(16))


@dataclass(frozen=True, slots=True)
class _Place:
    segment: _Segment
    start: int
    size_bytes: int
    crc: int | None  # None: not taken


@dataclass(slots=True)
class _Pending:
    name: str
    chunks: Sequence[bytes | memoryview]
    size_bytes: int
    done: asyncio.Future[None]


class Segments:
    """fsync: what append() has answered survives a loss of power, and not only the death of the process."""

    def __init__(self, folder: Path, executor: Executor, *, fsync: bool) -> None:
        self._folder, self._executor, self._fsync = folder, executor, fsync
        self._places: dict[str, _Place] = {}
        self._recent: OrderedDict[str, bytes | memoryview] = OrderedDict()
        self._recent_bytes = 0
        self._open: _Segment | None = None  # the one that is appended to
        self._closed: list[_Segment] = []
        self._spares: list[Path] = []
        self._last_number = 0
        self._pending: list[_Pending] = []
        self._writing = False
        self._gathering: asyncio.TimerHandle | None = None
        self.coming = 0  # uploads that may be appended soon

    def load(self) -> dict[str, int]:
        """What an earlier process left: bytes by name. Blocking, before all else."""
        for path in sorted(path for path in self._folder.iterdir() if _FILE.fullmatch(path.name)):
            self._last_number = int(path.name.partition(".")[0])
            segment = _Segment(path)
            with path.open("rb", buffering=0) as file:
                total_bytes = os.fstat(file.fileno()).st_size
                head = os.pread(file.fileno(), _HEAD.size, 0)
                segment.tag, segment.has_crc = head[len(_MAGIC) :], head.startswith(_MAGIC_WITH_CRC)
                is_one = len(head) == _HEAD.size and head.startswith((_MAGIC, _MAGIC_WITH_CRC))
                while is_one and len(head := os.pread(file.fileno(), _RECORD.size, segment.end)) == _RECORD.size:
                    crc, size_bytes, name, tag = _RECORD.unpack(head)
                    start = segment.end + _RECORD.size
                    if tag != segment.tag or start + size_bytes > total_bytes:
                        break
                    self._locate(name.rstrip(b"\0").decode("ascii", "replace"), segment, start, size_bytes, crc)
                    segment.end = start + size_bytes
            if total_bytes > segment.end:  # a former one's, or a write's that was cut off
                os.truncate(path, segment.end)
            self._closed.append(segment)
        for segment in list(self._closed):
            if not segment.live:
                self._closed.remove(segment)
                segment.path.unlink(missing_ok=True)
        return {name: place.size_bytes for name, place in self._places.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def recent(self, name: str) -> bytes | memoryview | None:
        return self._recent.get(name)

    def read(self, name: str) -> bytes | memoryview:
        """For any thread; blocking. Raises FileNotFoundError when it is not there, or not whole."""
        while (place := self._places.get(name)) is not None:
            if (recent := self._recent.get(name)) is not None:
                return recent
            try:
                data = _read(name, place)
            except FileNotFoundError:
                if self._places.get(name) is place:
                    raise
                continue  # it was moved meanwhile
            if self._places.get(name) is place:  # else another may have written over it
                return data
        raise FileNotFoundError(f"{name} is in no segment")

    def lost(self, names: Iterable[str]) -> set[str]:
        """Those whose bytes are not on the disk. For any thread; blocking."""
        ends: dict[Path, int] = {}
        lost = set()
        for name in names:
            while place := self._places.get(name):
                path = place.segment.path
                if path not in ends:
                    try:
                        ends[path] = path.stat().st_size
                    except FileNotFoundError:
                        ends[path] = 0
                if place.start + place.size_bytes <= ends[path]:
                    break
                if self._places.get(name) is place:  # else it was moved meanwhile
                    lost.add(name)
                    break
        return lost

    async def append(self, name: str, chunks: Sequence[bytes | memoryview]) -> None:
        """Returns when it is durable and found. Repeating it is allowed. Raises Unavailable.

        Cancelled, it may still be written: whoever does that drops the name.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.append(_Pending(name, chunks, sum(map(len, chunks)), done))
        self._gather()
        await done

    def drop(self, names: Iterable[str], *, more_follow: bool = False) -> None:
        """They are not needed any more; names that are not here are passed over."""
        for name in names:
            self._forget_recent(name)
            if place := self._places.pop(name, None):
                _leave(place, name)
        if not more_follow:
            self._write_next()

    # ---- one write at a time

    def _gather(self) -> None:
        if not self.coming or len(self._pending) >= _MOST_GATHERED:
            self._write_next()
        elif not (self._writing or self._gathering):
            self._gathering = asyncio.get_running_loop().call_later(GATHERED_S, self._write_next)

    def _write_next(self) -> None:
        if self._gathering:
            self._gathering.cancel()
            self._gathering = None
        if self._writing:
            return
        batch = [one for one in self._pending if not one.done.cancelled()]
        self._pending = []
        # by itself: on a disk with little room it may fail where an upload would fit
        moved = [] if batch else self._to_move()
        empty = [segment for segment in self._closed if not segment.live]
        if self._open and self._open.end > _HEAD.size and not self._open.live and not batch:
            empty.append(self._open)
            self._open = None
        self._closed = [segment for segment in self._closed if segment.live]
        if not (batch or moved or empty):
            return
        if (batch or moved) and (self._open is None or self._open.end > SEGMENT_BYTES):
            self._close_open()
        target = self._open
        to_spare, spares, left = self._to_spare(empty), list[Path](), list(empty)
        self._writing = True

        def work() -> list[tuple[str, int, int, int]]:
            with disk_errors(f"spool {self._folder}: write"):
                for segment in empty:
                    if not (segment in to_spare and _spare(segment.path, spares)):
                        segment.path.unlink(missing_ok=True)
                    left.remove(segment)
                records = [(one.name, one.chunks, one.size_bytes) for one in batch]
                for name, place in moved:
                    with contextlib.suppress(FileNotFoundError):  # whoever needs it will find that it is gone
                        records.append((name, [_read(name, place)], place.size_bytes))
                return self._append(target, records) if target and records else []

        try:
            writing = asyncio.get_running_loop().run_in_executor(self._executor, work)
        except RuntimeError:  # the pool takes no more: the process stops
            self._writing = False
            for one in batch:
                one.done.set_exception(Unavailable("the server stops; come again"))
            return
        writing.add_done_callback(lambda written: self._written(written, batch, moved, target, spares, left))

    def _to_spare(self, empty: Sequence[_Segment]) -> Sequence[_Segment]:
        small = [segment for segment in empty if segment.end <= _SPARE_BYTES and not segment.is_damaged]
        return small[: _MOST_SPARES - len(self._spares)]

    def take_spares(self) -> list[Path]:
        """To be removed by the caller."""
        spares, self._spares = self._spares, []
        return spares

    def _close_open(self) -> None:
        if self._open is not None:
            self._closed.append(self._open)
        self._last_number += 1
        spare = self._spares.pop() if self._spares else None
        self._open = _Segment(self._folder / f"{self._last_number:012}.segment", spare, has_crc=self._fsync)

    def _to_move(self) -> list[tuple[str, _Place]]:
        """Of the first closed segment of which less than a quarter is needed, a bounded part."""
        for segment in self._closed:
            if segment.live and segment.live_bytes * 4 < segment.end and not segment.is_damaged:
                return [(name, self._places[name]) for name in list(segment.live)[:_MOST_PARTS]]
        return []

    def _append(
        self, target: _Segment, records: Sequence[tuple[str, Sequence[bytes | memoryview], int]]
    ) -> list[tuple[str, int, int, int]]:
        """In the executor. Name, start, size and CRC of each."""
        written, heads, parts, at = [], list[bytes](), list[bytes | memoryview](), target.end
        for name, chunks, size_bytes in records:
            crc = 0
            if self._fsync:  # after a loss of power a record may be there whose bytes are not
                crc = zlib.crc32(_SUMMED.pack(size_bytes, name.encode("ascii")))
                for chunk in chunks:
                    crc = zlib.crc32(chunk, crc)
            heads.append(_RECORD.pack(crc, size_bytes, name.encode("ascii"), target.tag))
            parts += (heads[-1] if len(heads) > 1 else _NO_RECORD, *chunks)
            at += _RECORD.size
            written.append((name, at, size_bytes, crc))
            at += size_bytes
        head = _HEAD.pack(_MAGIC_WITH_CRC if self._fsync else _MAGIC, target.tag)
        if target.spare is not None:
            with contextlib.suppress(FileNotFoundError):  # somebody tidied up: a new one will do
                _begin(target.spare, head, fsync=self._fsync)
                target.spare.replace(target.path)
            target.spare = None
        is_new = target.end == _HEAD.size
        fd = os.open(target.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            try:
                if is_new:
                    write_all(fd, [head, *parts], 0)
                else:
                    write_all(fd, parts, target.end)
                write_all(fd, heads[:1], target.end)
                if self._fsync:
                    os.fsync(fd)
                if self._fsync and is_new:
                    sync(self._folder)
            except OSError:
                os.ftruncate(fd, target.end)
                raise
        finally:
            os.close(fd)
        return written

    def _written(
        self,
        writing: asyncio.Future[list[tuple[str, int, int, int]]],
        batch: Sequence[_Pending],
        moved: Sequence[tuple[str, _Place]],
        target: _Segment | None,
        spares: Sequence[Path],
        left: Sequence[_Segment],
    ) -> None:
        """left: of those to be removed."""
        self._writing = False
        self._spares += spares
        self._closed += left
        if writing.cancelled() or (why := writing.exception()) is not None:
            for one in batch:
                if not one.done.done():
                    if writing.cancelled():
                        one.done.cancel()
                    else:
                        one.done.set_exception(why)  # type: ignore[arg-type]
            if self._pending:
                self._gather()
            return
        waiting, places = {one.name: one for one in batch}, dict(moved)
        for name, start, size_bytes, crc in writing.result():
            assert target is not None
            target.end = start + size_bytes
            before = places.pop(name, None)
            if name in waiting:
                if waiting[name].done.cancelled():  # its bytes are nobody's
                    continue
                self._locate(name, target, start, size_bytes, crc)
                self._remember(waiting[name])
            elif self._places.get(name) is before:  # else it was dropped meanwhile
                self._locate(name, target, start, size_bytes, crc)
        for place in places.values():  # what was to be moved, and was not
            place.segment.is_damaged = True
        for one in batch:
            if not one.done.done():
                one.done.set_result(None)
        if self._pending:
            self._gather()
        else:
            self._write_next()

    def _locate(self, name: str, segment: _Segment, start: int, size_bytes: int, crc: int) -> None:
        if former := self._places.get(name):
            _leave(former, name)
        self._places[name] = _Place(segment, start, size_bytes, crc if segment.has_crc else None)
        segment.live.add(name)
        segment.live_bytes += size_bytes

    # ---- what is still in memory

    def _remember(self, one: _Pending) -> None:
        self._forget_recent(one.name)
        self._recent[one.name] = one.chunks[0] if len(one.chunks) == 1 else b"".join(one.chunks)
        self._recent_bytes += one.size_bytes
        while self._recent_bytes > RECENT_BYTES:
            _, oldest = self._recent.popitem(last=False)
            self._recent_bytes -= len(oldest)

    def _forget_recent(self, name: str) -> None:
        if (data := self._recent.pop(name, None)) is not None:
            self._recent_bytes -= len(data)


def _leave(place: _Place, name: str) -> None:
    place.segment.live.discard(name)
    place.segment.live_bytes -= place.size_bytes


def write_all(fd: int, parts: Sequence[bytes | memoryview], at: int) -> None:
    """All of them, one after the other, from this offset on."""
    for first in range(0, len(parts), _MOST_PARTS):
        left = [memoryview(part) for part in parts[first : first + _MOST_PARTS] if part]
        while left:
            written = os.pwritev(fd, left, at)
            at += written
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if left and written:
                left[0] = left[0][written:]


def _spare(path: Path, spares: list[Path]) -> bool:
    """Whether it could be: then it has another name, and is among them."""
    spare = path.with_suffix(f".spare{PART}")
    try:
        path.replace(spare)
    except OSError:  # gone, or no room for a name: unlink() says which
        return False
    spares.append(spare)
    return True


def _begin(path: Path, head: bytes, *, fsync: bool) -> None:
    """A segment without records, on the disk before it is one by its name. Raises FileNotFoundError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        write_all(fd, [head + _NO_RECORD], 0)
        if fsync:
            os.fsync(fd)
    finally:
        os.close(fd)


def _read(name: str, place: _Place) -> bytes:
    """Raises FileNotFoundError if it is not there, or not whole."""
    fd = os.open(place.segment.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(fd, place.size_bytes, place.start)
    finally:
        os.close(fd)
    is_whole = len(data) == place.size_bytes
    if is_whole and place.crc is not None:
        is_whole = zlib.crc32(data, zlib.crc32(_SUMMED.pack(place.size_bytes, name.encode("ascii")))) == place.crc
    if not is_whole:
        raise FileNotFoundError(f"{place.segment.path.name}: {place.size_bytes} bytes at {place.start} are not whole")
    return data
