"""numpyhelper's format: npz, a zip of .npy members, read and written by ourselves.

Whatever is read comes from a stranger. Nothing is unpickled, no size is believed before it is compared with the file,
every byte of the file must belong to a member. The CRC of stored members is not checked (it costs as much as reading
them; a cut file is found by its sizes), that of deflated ones is.
Formats: PKWARE APPNOTE 6.3.10 (zip), numpy.lib.format (npy).
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fl_client.wire.layout import (
    ALIGN_BYTES,
    BLOCK_BYTES,
    MAX_ARRAYS,
    Array,
    ArraySpec,
    BadModel,
    Disk,
    Layout,
    Memory,
    ModelFile,
    by_number,
    is_impossible,
    open_over,
    refuse_dtype,
    refuse_name,
    short,
)

_MAX_HEADER_BYTES = 4096  # of an npy header: 32 dimensions of 20 digits fit
_MAX_INFLATION = 1040  # deflate reaches 1032 : 1; more is a lie about the size


# ---- reading


@dataclass(frozen=True, slots=True)
class _Member:
    """A zip member, its npy header read."""

    spec: ArraySpec
    fortran_order: bool
    deflated: bool
    start: int  # of the compressed bytes, in the file
    end: int
    header_bytes: int  # of the npy header, within the inflated bytes
    size_bytes: int  # inflated, with the npy header
    crc: int

    @property
    def is_plain(self) -> bool:
        """The values lie as they are, in C order."""
        return not self.deflated and (not self.fortran_order or len(self.spec.shape) < 2)


@dataclass(frozen=True, slots=True)
class _Contents:
    """What the structure of an npz says: all that is not the values of its arrays."""

    members: tuple[_Member, ...]
    layout: Layout
    starts: tuple[int, ...]
    total_bytes: int  # inflated, with the npy headers
    all_plain: bool


class NpzFile(ModelFile):
    """The constructor has checked all that can be known without inflating.

    copies(), blocks() and hold() raise BadModel for a deflated member that is broken.
    """

    def __init__(self, source: Memory | Disk, *, max_bytes: int) -> None:
        if not source.size_bytes:
            raise BadModel("not an npz: 0 bytes")
        contents = _recognised(source, max_bytes) or _read_contents(source, max_bytes)
        super().__init__(source, contents.layout, contents.starts)
        self._members, self._all_plain = contents.members, contents.all_plain
        self._held: dict[int, Array] = {}

    @property
    def deflated(self) -> bool:
        return any(member.deflated for member in self._members)

    @property
    def held_bytes(self) -> int:
        others = (member.size_bytes for member in self._members if not member.is_plain)
        return super().held_bytes + (0 if self._all_plain else sum(others))

    def hold(self) -> None:
        for index, member in enumerate(self._members):
            if not member.is_plain:
                self._held[index] = self._copy(index).reshape(-1)

    def values(self, index: int, begin: int, end: int, buffer: Array) -> Array:
        if self._all_plain or self._members[index].is_plain:
            return self._stretch(index, begin, end, buffer)
        return self._held[index][begin:end]

    def blocks(self, index: int) -> Iterator[Array]:
        member = self._members[index]
        return self._inflated(member) if member.deflated else super().blocks(index)

    def _inflated(self, member: _Member) -> Iterator[Array]:
        dtype = member.spec.dtype
        size_bytes = member.size_bytes - member.header_bytes
        step_bytes = BLOCK_BYTES // dtype.itemsize * dtype.itemsize
        inflater = _Inflater(member.spec.name, self._source, member.start, member.end)
        inflater.read(member.header_bytes)
        for start in range(0, size_bytes, step_bytes):
            yield np.frombuffer(inflater.read(min(step_bytes, size_bytes - start)), dtype)
        inflater.finish(member.crc)

    def fortran_order(self, index: int) -> bool:
        return self._members[index].fortran_order

    def numbered_names(self) -> list[str]:
        """Those of the layout, but 0, 1, … where they are numbers or arr_0, arr_1, …"""
        names = [spec.name for spec in self.layout]
        return names if by_number(names) is None else [str(index) for index in range(len(names))]

    def close(self) -> None:
        super().close()
        self._held.clear()

    def _copy(self, index: int) -> Array:
        member = self._members[index]
        if member.is_plain:
            return super()._copy(index)
        flat = np.empty(math.prod(member.spec.shape), member.spec.dtype)
        filled = 0
        for block in self.blocks(index):
            flat[filled : filled + block.size] = block
            filled += block.size
        shaped = flat.reshape(member.spec.shape, order="F" if member.fortran_order else "C")
        return np.ascontiguousarray(shaped).reshape(member.spec.shape)


_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENCRYPTED, _HAS_DESCRIPTOR, _STRONGLY_ENCRYPTED, _UTF8, _MASKED = 1, 1 << 3, 1 << 6, 1 << 11, 1 << 13
_STORED, _DEFLATED = 0, 8


@dataclass(frozen=True, slots=True)
class _Entry:
    """A line of the zip's central directory, as the file has it: nothing of it is checked yet."""

    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed_bytes: int
    size_bytes: int
    offset: int
    listed_at: int  # where the line is

    @property
    def file_name(self) -> str:
        return self.raw_name.decode("utf-8" if self.flags & _UTF8 else "cp437", "backslashreplace")


def _read_contents(source: Memory | Disk, max_bytes: int) -> _Contents:
    entries, directory = _read_directory(source)
    if not entries:
        raise BadModel("the npz holds no arrays")
    total_bytes = 0
    for entry in entries:
        total_bytes += entry.size_bytes
        if total_bytes > max_bytes:
            raise BadModel(f"the model's arrays are larger than the {max_bytes} bytes allowed")
    by_offset = sorted(entries, key=lambda entry: entry.offset)
    followers = [entry.offset for entry in by_offset[1:]] + [directory]
    if by_offset[0].offset != 0:
        raise BadModel(f"{by_offset[0].offset} bytes before the zip's first member")
    starts = {
        entry.offset: _data_start(source, entry, follower) for entry, follower in zip(by_offset, followers, strict=True)
    }
    members = [_read_member(source, entry, starts[entry.offset]) for entry in entries]
    names: set[str] = set()
    for member in members:
        if member.spec.name in names:
            raise BadModel(f"two arrays are named {short(member.spec.name)}")
        names.add(member.spec.name)
    order = by_number([member.spec.name for member in members])
    ordered = tuple(members if order is None else (members[index] for index in order))
    contents = _Contents(
        ordered,
        tuple(member.spec for member in ordered),
        tuple(member.start + member.header_bytes for member in ordered),
        total_bytes,
        all(member.is_plain for member in ordered),
    )
    if isinstance(source, Memory):
        _remember(source, contents, list(zip(entries, members, strict=True)), directory)
    return contents


# The updates of a round have one structure, and differ in their values alone: comparing it costs a twentieth of reading
# it. More is compared than is read, so whatever is recognised would have been read as the same.
_REMEMBERED, _MOST_STRUCTURE_BYTES = 8, 1 << 16


@dataclass(frozen=True, slots=True)
class _Structure:
    positions: npt.NDArray[np.intp]  # of all bytes that are not values, times, CRCs or data descriptors
    found: bytes  # there
    contents: _Contents


_structures: dict[int, _Structure] = {}  # by a file's length; replaced as a whole, since threads read it


def _recognised(source: Memory | Disk, max_bytes: int) -> _Contents | None:
    if not isinstance(source, Memory) or (known := _structures.get(source.size_bytes)) is None:
        return None
    if np.frombuffer(source.data, np.uint8).take(known.positions).tobytes() != known.found:
        return None
    return known.contents if known.contents.total_bytes <= max_bytes else None


def _remember(source: Memory, contents: _Contents, read: list[tuple[_Entry, _Member]], directory: int) -> None:
    if any(member.deflated for member in contents.members):
        return  # their CRCs count
    size_bytes = source.size_bytes - directory + sum(member.start - entry.offset for entry, member in read)
    if size_bytes + sum(member.header_bytes for _, member in read) > _MOST_STRUCTURE_BYTES:
        return
    ranges, at = [], directory
    for entry, member in read:
        ranges += [(entry.offset, entry.offset + 10), (entry.offset + 18, member.start + member.header_bytes)]
        ranges.append((at, entry.listed_at + 12))
        at = entry.listed_at + 20
    ranges.append((at, source.size_bytes))
    positions = np.concatenate([np.arange(begin, end, dtype=np.intp) for begin, end in ranges])
    found = np.frombuffer(source.data, np.uint8)[positions].tobytes()
    global _structures
    others = [item for item in _structures.items() if item[0] != source.size_bytes]
    _structures = {**dict(others[1 - _REMEMBERED :]), source.size_bytes: _Structure(positions, found, contents)}


def _read_directory(source: Memory | Disk) -> tuple[list[_Entry], int]:
    """The entries in their order, and where the directory begins. It must end where the file's end records begin."""
    end = source.size_bytes - _END.size
    if end < 0 or _magic(source, end) != b"PK\5\6" or source.read(end + 20, 2) != b"\0\0":
        if _magic(source, 0) in (b"PK\3\4", b"PK\5\6"):
            raise BadModel("the npz is cut off, or has bytes after its end")
        raise BadModel("not an npz: no zip")
    _, disk, directory_disk, _, count, size_bytes, start, _ = _END.unpack(source.read(end, _END.size))
    locator = end - _END64_LOCATOR.size
    if locator >= 0 and _magic(source, locator) == b"PK\6\7":
        _, _, end, _ = _END64_LOCATOR.unpack(source.read(locator, _END64_LOCATOR.size))
        if end != locator - _END64.size or _magic(source, end) != b"PK\6\6":
            raise BadModel("the zip's 64-bit end record is not where it should be")
        _, _, _, _, disk, directory_disk, _, count, size_bytes, start = _END64.unpack(source.read(end, _END64.size))
    if disk != 0 or directory_disk != 0:
        raise BadModel("the zip is split over several files")
    if count > MAX_ARRAYS:
        raise BadModel(f"{count} arrays, at most {MAX_ARRAYS} allowed")
    if start + size_bytes != end:
        raise BadModel("the zip's directory is not where its end record says")
    entries = []
    at = start
    for _ in range(count):
        if at + _CENTRAL.size > end or _magic(source, at) != b"PK\1\2":
            raise BadModel("the zip's directory is shorter than its count")
        (
            _,
            _,
            _,
            flags,
            method,
            _,
            _,
            crc,
            packed,
            size,
            name_bytes,
            extra_bytes,
            comment_bytes,
            disk,
            _,
            _,
            offset,
        ) = _CENTRAL.unpack(source.read(at, _CENTRAL.size))
        name_at = at + _CENTRAL.size
        following = name_at + name_bytes + extra_bytes + comment_bytes
        if following > end or disk not in (0, 0xFFFF):
            raise BadModel("the zip's directory is damaged")
        name = source.read(name_at, name_bytes)
        size, packed, offset = _wide(source.read(name_at + name_bytes, extra_bytes), size, packed, offset)
        entries.append(_Entry(name, flags, method, crc, packed, size, offset, at))
        at = following
    if at != end:
        raise BadModel("the zip's directory is longer than its count")
    return entries, start


def _magic(source: Memory | Disk, at: int) -> bytes:
    return source.read(at, 4)


def _wide(extra: bytes, *fields: int) -> tuple[int, int, int]:
    """size, packed size, offset, each replaced by its 64-bit form where it is all ones (APPNOTE 4.5.3)."""
    wide = b""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + length]
        at += 4 + length
    values = []
    for field in fields:
        if field == 0xFFFFFFFF:
            if len(wide) < 8:
                raise BadModel("a 64-bit size is missing in the zip's directory")
            field, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        values.append(field)
    size, packed, offset = values
    return size, packed, offset


def _data_start(source: Memory | Disk, entry: _Entry, follower: int) -> int:
    """Where the member's bytes begin. `follower`: where the next member begins, or the directory."""
    shown = short(entry.file_name)
    if entry.flags & (_ENCRYPTED | _STRONGLY_ENCRYPTED | _MASKED):
        raise BadModel(f"member {shown} is encrypted")
    if entry.method not in (_STORED, _DEFLATED):
        raise BadModel(f"member {shown} is compressed by method {entry.method}, only stored and deflated are read")
    if entry.offset + _LOCAL.size > follower or _magic(source, entry.offset) != b"PK\3\4":
        raise BadModel(f"member {shown} is not where the zip's directory says, or overlaps another")
    _, _, _, method, _, _, _, _, _, name_bytes, extra_bytes = _LOCAL.unpack(source.read(entry.offset, _LOCAL.size))
    name_at = entry.offset + _LOCAL.size
    if source.read(name_at, name_bytes) != entry.raw_name or method != entry.method:
        raise BadModel(f"member {shown} contradicts the zip's directory")
    start: int = name_at + name_bytes + extra_bytes
    gap = follower - (start + entry.packed_bytes)
    if gap < 0:
        raise BadModel(f"member {shown} is cut off, or overlaps another")
    if gap not in ((12, 16, 20, 24) if entry.flags & _HAS_DESCRIPTOR else (0,)):
        raise BadModel(f"{gap} bytes after member {shown} belong to nothing")
    return start


def _read_member(source: Memory | Disk, entry: _Entry, start: int) -> _Member:
    shown = short(entry.file_name)
    deflated = entry.method == _DEFLATED
    if not entry.file_name.endswith(".npy"):
        raise BadModel(f"member {shown} is no .npy")
    end = start + entry.packed_bytes
    if deflated and entry.size_bytes > entry.packed_bytes * _MAX_INFLATION:
        raise BadModel(f"member {shown} cannot inflate to the {entry.size_bytes} bytes that it declares")
    if not deflated and entry.size_bytes != entry.packed_bytes:
        raise BadModel(f"member {shown} is stored with two sizes, {entry.packed_bytes} and {entry.size_bytes}")
    name = entry.file_name.removesuffix(".npy")
    refuse_name(name)
    known_bytes = min(entry.size_bytes, 12 + _MAX_HEADER_BYTES)
    head = _Inflater(name, source, start, end).read(known_bytes) if deflated else source.read(start, known_bytes)
    dtype, shape, fortran_order, header_bytes = _read_npy_header(name, bytes(head))
    values_bytes = math.prod(shape) * dtype.itemsize
    if header_bytes + values_bytes != entry.size_bytes:
        raise BadModel(
            f"array {short(name)} has {entry.size_bytes - header_bytes} bytes, "
            f"expected {values_bytes} for {dtype} {shape}"
        )
    return _Member(
        spec=ArraySpec(name, dtype, shape),
        fortran_order=fortran_order,
        deflated=deflated,
        start=start,
        end=end,
        header_bytes=header_bytes,
        size_bytes=entry.size_bytes,
        crc=entry.crc,
    )


# numpy evaluates the header as a Python literal; the three entries that a plain array needs are matched instead.
_NPY_HEADER = re.compile(
    r"""\s*\{(?:\s*(?:
        'descr'\s*:\s*'(?P<descr>[^']{1,16})'
      | 'fortran_order'\s*:\s*(?P<fortran>True|False)
      | 'shape'\s*:\s*\((?P<shape>[0-9,\s]*)\)
    )\s*(?:,|(?=\}))){3}\s*\}\s*""",
    re.VERBOSE | re.ASCII,
)
_NPY_NUMBER = re.compile(r"[<>|=]?[fiu][0-9]{1,2}")
_NPY_SHAPE = re.compile(r"\s*(?:[0-9]{1,19}\s*,\s*)*(?:[0-9]{1,19}\s*)?", re.ASCII)


def _read_npy_header(name: str, head: bytes) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """dtype, shape, whether in Fortran order, and the header's length."""
    shown = f"array {short(name)}"
    if len(head) < 10 or head[:6] != b"\x93NUMPY" or head[6] not in (1, 2, 3):
        raise BadModel(f"{shown} has no npy header")
    length_bytes = 2 if head[6] == 1 else 4
    begin = 8 + length_bytes
    header_bytes = begin + int.from_bytes(head[8:begin], "little")
    if header_bytes > len(head) or header_bytes > begin + _MAX_HEADER_BYTES:
        raise BadModel(f"{shown} has an npy header longer than its data or {_MAX_HEADER_BYTES} bytes")
    text = head[begin:header_bytes].decode("latin-1")
    match = _NPY_HEADER.fullmatch(text)
    if match is None or None in (match["descr"], match["fortran"], match["shape"]):
        raise BadModel(f"{shown} has an npy header that describes no plain array: {short(text)}")
    if not _NPY_SHAPE.fullmatch(match["shape"]):
        raise BadModel(f"{shown} has an impossible shape: {short(match['shape'])}")
    shape = tuple(int(length) for length in match["shape"].split(",") if length.strip())
    if is_impossible(shape):
        raise BadModel(f"{shown} has an impossible shape: {short(match['shape'])}")
    if not _NPY_NUMBER.fullmatch(match["descr"]):
        raise BadModel(f"{shown} has dtype {short(match['descr'])}, only real floats and integers are taken")
    try:
        dtype = np.dtype(match["descr"])
    except TypeError:  # a float of 128 bits, which not every machine has
        raise BadModel(f"{shown} has the unknown dtype {match['descr']!r}") from None
    return dtype, shape, match["fortran"] == "True", header_bytes


class _Inflater:
    """Reads a deflated member forward, never more than it is asked for."""

    def __init__(self, name: str, source: Memory | Disk, start: int, end: int) -> None:
        self._name, self._source = name, source
        self._at, self._end = start, end
        self._crc = 0
        self._zlib = zlib.decompressobj(-zlib.MAX_WBITS)

    def read(self, size_bytes: int) -> bytearray:
        """Exactly so many bytes. Raises BadModel if there are fewer."""
        out = bytearray()
        while len(out) < size_bytes:
            part = self._some(size_bytes - len(out))
            if not part and (self._zlib.eof or self._at >= self._end):
                raise BadModel(f"array {short(self._name)} inflates to less than it declares")
            out += part
        self._crc = zlib.crc32(out, self._crc)
        return out

    def finish(self, crc: int) -> None:
        """Raises BadModel if there is more, or if what was read has not this CRC."""
        while not self._zlib.eof:
            part = self._some(1)
            if part:
                raise BadModel(f"array {short(self._name)} inflates to more than it declares")
            if not self._zlib.eof and self._at >= self._end:
                raise BadModel(f"array {short(self._name)} is cut off")
        if self._zlib.unused_data or self._at < self._end:
            raise BadModel(f"array {short(self._name)} has bytes after its end")
        if crc != self._crc:
            raise BadModel(f"array {short(self._name)} is damaged: its CRC differs")

    def _some(self, max_bytes: int) -> bytes:
        source = self._zlib.unconsumed_tail
        if not source:
            source = self._source.read(self._at, min(65536, self._end - self._at))
            self._at += len(source)
        try:
            return self._zlib.decompress(source, max_bytes)
        except zlib.error as exc:
            raise BadModel(f"array {short(self._name)} cannot be inflated: {exc}") from None


# ---- writing


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a member goes in a file: known before its values are."""

    spec: ArraySpec
    raw_name: bytes
    flags: int
    offset: int
    extra: bytes
    npy_header: bytes

    @property
    def values_bytes(self) -> int:
        return math.prod(self.spec.shape) * self.spec.dtype.itemsize

    @property
    def size_bytes(self) -> int:
        return len(self.npy_header) + self.values_bytes

    @property
    def start(self) -> int:
        """Of the values."""
        return self.offset + _LOCAL.size + len(self.raw_name) + len(self.extra) + len(self.npy_header)

    @property
    def end(self) -> int:
        return self.start + self.values_bytes

    def header(self, crc: int) -> bytes:
        """All that is before the values."""
        version, size_bytes = _version(self.size_bytes), min(self.size_bytes, _MOST_32)
        if size_bytes < self.size_bytes:
            size_bytes = 0xFFFFFFFF
        numbers = (_STORED, 0, _FIRST_OF_1980, crc, size_bytes, size_bytes, len(self.raw_name), len(self.extra))
        return _LOCAL.pack(b"PK\3\4", version, self.flags, *numbers) + self.raw_name + self.extra + self.npy_header

    def line(self, crc: int) -> bytes:
        """Of the directory."""
        size_bytes, offset, wide = self.size_bytes, self.offset, b""
        if size_bytes > _MOST_32:
            wide += struct.pack("<QQ", size_bytes, size_bytes)
            size_bytes = 0xFFFFFFFF
        if offset > _MOST_32:
            wide += struct.pack("<Q", offset)
            offset = 0xFFFFFFFF
        padding = self.extra[: len(self.extra) - _WIDE.size] if self.size_bytes > _MOST_32 else self.extra
        extra = (struct.pack("<HH", 1, len(wide)) + wide if wide else b"") + padding
        version = _version(self.size_bytes, self.offset)
        numbers = (_STORED, 0, _FIRST_OF_1980, crc, size_bytes, size_bytes, len(self.raw_name), len(extra))
        rest = (0, 0, 0, 0o600 << 16, offset)
        return _CENTRAL.pack(b"PK\1\2", version | _UNIX, version, self.flags, *numbers, *rest) + self.raw_name + extra


_WIDE = struct.Struct("<HHQQ")
_MOST_32 = zipfile.ZIP64_LIMIT  # as zipfile draws it: some readers take the numbers as signed
_FIRST_OF_1980 = 1 << 5 | 1
_UNIX = 3 << 8  # the same bytes on every system


def _version(*numbers: int) -> int:
    return 45 if max(numbers) > _MOST_32 else 20


def _places(layout: Layout, fortran_order: Container[int] = ()) -> list[_Place]:
    """Of a stored npz: fixed times, aligned values. Raises BadModel."""
    places: list[_Place] = []
    names: set[str] = set()
    at = 0
    for index, spec in enumerate(layout):
        refuse_dtype(spec.name, spec.dtype)
        refuse_name(spec.name)
        if spec.name in names:
            raise BadModel(f"two arrays are named {short(spec.name)}")
        names.add(spec.name)
        file_name = f"{spec.name}.npy"
        flags = 0 if file_name.isascii() else _UTF8
        raw_name, npy_header = file_name.encode(), _npy_header(spec.dtype, spec.shape, index in fortran_order)
        size_bytes = len(npy_header) + math.prod(spec.shape) * spec.dtype.itemsize
        wide = _WIDE.pack(1, 16, size_bytes, size_bytes) if size_bytes > _MOST_32 else b""
        extra = _padding(at + _LOCAL.size + len(raw_name) + len(wide)) + wide
        places.append(_Place(spec, raw_name, flags, at, extra, npy_header))
        at = places[-1].end
    return places


def _directory(places: Sequence[_Place], crcs: Sequence[int]) -> bytes:
    """With the file's end records."""
    start = places[-1].end if places else 0
    lines = b"".join(place.line(crc) for place, crc in zip(places, crcs, strict=True))
    count, size_bytes, records = len(places), len(lines), b""
    if count > 0xFFFF or max(start, size_bytes) > _MOST_32:
        end = start + size_bytes
        records = _END64.pack(b"PK\6\6", 44, 45, 45, 0, 0, count, count, size_bytes, start)
        records += _END64_LOCATOR.pack(b"PK\6\7", 0, end, 1)
        count, size_bytes, start = min(count, 0xFFFF), min(size_bytes, 0xFFFFFFFF), min(start, 0xFFFFFFFF)
    return lines + records + _END.pack(b"PK\5\6", 0, 0, count, count, size_bytes, start, 0)


def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...], fortran_order: bool) -> bytes:
    """Version 1.0, padded so that the values are aligned when the member is."""
    text = f"{{'descr': {dtype.str!r}, 'fortran_order': {fortran_order}, 'shape': {tuple(map(int, shape))!r}, }}"
    length = -(-(10 + len(text) + 1) // ALIGN_BYTES) * ALIGN_BYTES - 10
    return b"\x93NUMPY\1\0" + length.to_bytes(2, "little") + text.ljust(length - 1).encode("ascii") + b"\n"


def _padding(start: int) -> bytes:
    """An extra field that moves a member's data from `start` to the next multiple of ALIGN_BYTES.

    Field 0xD935, as Android's zipalign writes it: the alignment, then zeros.
    """
    zeros = -(start + 6) % ALIGN_BYTES
    return struct.pack("<HHH", 0xD935, 2 + zeros, ALIGN_BYTES) + bytes(zeros)


def _raw(block: Array) -> Array:
    return np.ascontiguousarray(block).reshape(-1).view(np.uint8)


def encode(layout: Layout, arrays: Sequence[Array]) -> bytes:
    """A stored npz of these arrays. Raises BadModel."""
    places = _places(layout)
    pieces: list[bytes | memoryview] = []
    crcs = []
    for place, array in zip(places, arrays, strict=True):
        raw = _raw(array).data if array.size else b""
        crcs.append(zlib.crc32(raw, zlib.crc32(place.npy_header)))
        pieces += [place.header(crcs[-1]), raw]
    return b"".join([*pieces, _directory(places, crcs)])


class NpzWriter:
    """Writes a stored npz at `path`, over what is there, block by block, in flat memory.

    After the with block `sha256` (hex; "" without digest) and `size_bytes` are those of the whole file, which is not
    synced. Leaving the block by an exception removes the file. One thread uses it.
    """

    def __init__(self, path: Path, layout: Layout, *, fortran_order: Container[int] = (), digest: bool = True) -> None:
        """fortran_order: the indices of arrays whose values come in that order. Raises BadModel."""
        self._path, self._places = path, _places(layout, fortran_order)
        self._written_bytes, self._is_whole = [0] * len(layout), [False] * len(layout)
        self._crcs = [zlib.crc32(place.npy_header) for place in self._places]
        self._digest = hashlib.sha256() if digest else None
        self._digested = self._digested_bytes = 0  # members, and bytes of the file
        self._buffer = memoryview(bytearray(BLOCK_BYTES if digest else 0))
        self.sha256 = ""
        self.size_bytes = 0

    def __enter__(self) -> Self:
        self._file = open_over(self._path)
        return self

    def write(self, index: int, block: Array) -> None:
        """The next values of this array; those of several may come in turn. Raises ValueError if they do not fit."""
        place = self._places[index]
        if block.dtype != place.spec.dtype:
            raise ValueError(f"array {short(place.spec.name)}: a block of {block.dtype}, expected {place.spec.dtype}")
        if not block.size:
            return
        raw, at = _raw(block), self._written_bytes[index]
        self._written_bytes[index] += raw.size
        if self._written_bytes[index] > place.values_bytes:
            self._refuse(index)
        self._put(raw.data, place.start + at)
        self._crcs[index] = zlib.crc32(raw.data, self._crcs[index])
        if self._written_bytes[index] == place.values_bytes:
            self._complete(index)
        self._digest_on(2 * raw.size)  # not all at once: whoever makes the next blocks would wait

    def _complete(self, index: int) -> None:
        place = self._places[index]
        self._put(memoryview(place.header(self._crcs[index])), place.offset)
        self._is_whole[index] = True

    def _digest_on(self, most_bytes: int | None = None) -> None:
        """Over members that are whole, read again: the header, which is before the values, holds their CRC."""
        if self._digest is None:
            return
        while self._digested < len(self._places):
            if not self._is_whole[self._digested]:
                if self._places[self._digested].values_bytes:
                    return
                self._complete(self._digested)
            end = self._places[self._digested].end
            while self._digested_bytes < end:
                if most_bytes is not None and most_bytes <= 0:
                    return
                got = os.preadv(self._file.fileno(), [self._buffer[: end - self._digested_bytes]], self._digested_bytes)
                if not got:
                    raise OSError(f"{self._path} has become shorter while it was written")
                self._digest.update(self._buffer[:got])
                self._digested_bytes += got
                most_bytes = most_bytes and most_bytes - got
            self._digested += 1

    def _put(self, raw: memoryview, at: int) -> None:
        while raw:
            done = os.pwrite(self._file.fileno(), raw, at)
            raw, at = raw[done:], at + done

    def _refuse(self, index: int) -> None:
        place, given = self._places[index], self._written_bytes[index]
        raise ValueError(f"array {short(place.spec.name)}: blocks of {given} bytes, expected {place.values_bytes}")

    def _finish(self) -> None:
        for index, is_whole in enumerate(self._is_whole):
            if not is_whole:
                if self._written_bytes[index] != self._places[index].values_bytes:
                    self._refuse(index)
                self._complete(index)  # an empty one
        self._digest_on()
        directory = _directory(self._places, self._crcs)
        start = self._places[-1].end if self._places else 0
        self._put(memoryview(directory), start)
        self.size_bytes = start + len(directory)
        self._file.truncate(self.size_bytes)
        if self._digest is not None:
            self._digest.update(directory)
            self.sha256 = self._digest.hexdigest()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._file:
                if kind is None:
                    self._finish()
        except BaseException:
            self._path.unlink()
            raise
        if kind is not None:
            self._path.unlink()
