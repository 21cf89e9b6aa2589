"""numpyhelper's format: npz, a zip of .npy members, read and written by ourselves.

Whatever is read comes from a stranger. Nothing is unpickled, no size is believed before it is compared with the file,
every byte of the file must belong to a member. The CRC of stored members is not checked (it costs as much as reading
them; a cut file is found by its sizes), that of deflated ones is.
Formats: PKWARE APPNOTE 6.3.10 (zip), numpy.lib.format (npy).
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from fl_client.wire.layout import (
    ALIGN_BYTES,
    BLOCK_BYTES,
    MAX_ARRAYS,
    Array,
    ArraySpec,
    BadModel,
    Layout,
    Parameters,
    by_number,
    is_impossible,
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


class NpzFile:
    """A ModelFile: an npz in memory or mapped.

    The constructor has checked all that can be known without inflating; arrays(), copies() and blocks() raise BadModel
    for a deflated member that is broken. A mapping lives as long as a view of it: close() gives up only our own hold.
    """

    def __init__(self, data: memoryview, *, max_bytes: int) -> None:
        if not data:
            raise BadModel("not an npz: 0 bytes")
        self._data = data.cast("B").toreadonly()
        self._members = _read_members(self._data, max_bytes)
        self.layout: Layout = tuple(member.spec for member in self._members)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._data = memoryview(b"")

    @property
    def deflated(self) -> bool:
        return any(member.deflated for member in self._members)

    def arrays(self) -> Parameters:
        """Read-only views of stored members (perhaps unaligned), writable copies of deflated ones."""
        return [self._inflated(member) if member.deflated else self._view(member) for member in self._members]

    def copies(self) -> Parameters:
        return [np.array(array, order="C", copy=None if array.flags.writeable else True) for array in self.arrays()]

    def blocks(self, index: int) -> Iterator[Array]:
        """The array's values in the order of the file, flat, at most BLOCK_BYTES at a time."""
        return self._blocks(self._members[index])

    def _blocks(self, member: _Member) -> Iterator[Array]:
        dtype = member.spec.dtype
        size_bytes = member.size_bytes - member.header_bytes
        step_bytes = BLOCK_BYTES // dtype.itemsize * dtype.itemsize
        if not member.deflated:
            flat = self._view(member).reshape(-1, order="A")
            for start in range(0, size_bytes, step_bytes):
                yield flat[start // dtype.itemsize : (start + step_bytes) // dtype.itemsize]
            return
        inflater = _Inflater(member.spec.name, self._data[member.start : member.end])
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

    def _view(self, member: _Member) -> Array:
        return np.ndarray(
            member.spec.shape,
            member.spec.dtype,
            buffer=self._data,
            offset=member.start + member.header_bytes,
            order="F" if member.fortran_order else "C",
        )

    def _inflated(self, member: _Member) -> Array:
        flat = np.empty(math.prod(member.spec.shape), member.spec.dtype)
        filled = 0
        for block in self._blocks(member):
            flat[filled : filled + block.size] = block
            filled += block.size
        return flat.reshape(member.spec.shape, order="F" if member.fortran_order else "C")


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

    @property
    def file_name(self) -> str:
        return self.raw_name.decode("utf-8" if self.flags & _UTF8 else "cp437", "backslashreplace")


def _read_members(data: memoryview, max_bytes: int) -> tuple[_Member, ...]:
    entries, directory = _read_directory(data)
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
        entry.offset: _data_start(data, entry, follower) for entry, follower in zip(by_offset, followers, strict=True)
    }
    members = [_read_member(data, entry, starts[entry.offset]) for entry in entries]
    names: set[str] = set()
    for member in members:
        if member.spec.name in names:
            raise BadModel(f"two arrays are named {short(member.spec.name)}")
        names.add(member.spec.name)
    order = by_number([member.spec.name for member in members])
    if order is not None:
        members = [members[index] for index in order]
    return tuple(members)


def _read_directory(data: memoryview) -> tuple[list[_Entry], int]:
    """The entries in their order, and where the directory begins. It must end where the file's end records begin."""
    end = len(data) - _END.size
    if end < 0 or _magic(data, end) != b"PK\5\6" or bytes(data[-2:]) != b"\0\0":
        if _magic(data, 0) in (b"PK\3\4", b"PK\5\6"):
            raise BadModel("the npz is cut off, or has bytes after its end")
        raise BadModel("not an npz: no zip")
    _, disk, directory_disk, _, count, size_bytes, start, _ = _END.unpack_from(data, end)
    locator = end - _END64_LOCATOR.size
    if locator >= 0 and _magic(data, locator) == b"PK\6\7":
        _, _, end, _ = _END64_LOCATOR.unpack_from(data, locator)
        if end != locator - _END64.size or _magic(data, end) != b"PK\6\6":
            raise BadModel("the zip's 64-bit end record is not where it should be")
        _, _, _, _, disk, directory_disk, _, count, size_bytes, start = _END64.unpack_from(data, end)
    if disk != 0 or directory_disk != 0:
        raise BadModel("the zip is split over several files")
    if count > MAX_ARRAYS:
        raise BadModel(f"{count} arrays, at most {MAX_ARRAYS} allowed")
    if start + size_bytes != end:
        raise BadModel("the zip's directory is not where its end record says")
    entries = []
    at = start
    for _ in range(count):
        if at + _CENTRAL.size > end or _magic(data, at) != b"PK\1\2":
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
        ) = _CENTRAL.unpack_from(data, at)
        at += _CENTRAL.size
        following = at + name_bytes + extra_bytes + comment_bytes
        if following > end or disk not in (0, 0xFFFF):
            raise BadModel("the zip's directory is damaged")
        extra = bytes(data[at + name_bytes : at + name_bytes + extra_bytes])
        size, packed, offset = _wide(extra, size, packed, offset)
        entries.append(_Entry(bytes(data[at : at + name_bytes]), flags, method, crc, packed, size, offset))
        at = following
    if at != end:
        raise BadModel("the zip's directory is longer than its count")
    return entries, start


def _magic(data: memoryview, at: int) -> bytes:
    return bytes(data[at : at + 4])


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


def _data_start(data: memoryview, entry: _Entry, follower: int) -> int:
    """Where the member's bytes begin. `follower`: where the next member begins, or the directory."""
    shown = short(entry.file_name)
    if entry.flags & (_ENCRYPTED | _STRONGLY_ENCRYPTED | _MASKED):
        raise BadModel(f"member {shown} is encrypted")
    if entry.method not in (_STORED, _DEFLATED):
        raise BadModel(f"member {shown} is compressed by method {entry.method}, only stored and deflated are read")
    if entry.offset + _LOCAL.size > follower or _magic(data, entry.offset) != b"PK\3\4":
        raise BadModel(f"member {shown} is not where the zip's directory says, or overlaps another")
    _, _, _, method, _, _, _, _, _, name_bytes, extra_bytes = _LOCAL.unpack_from(data, entry.offset)
    name_at = entry.offset + _LOCAL.size
    if data[name_at : name_at + name_bytes] != entry.raw_name or method != entry.method:
        raise BadModel(f"member {shown} contradicts the zip's directory")
    start: int = name_at + name_bytes + extra_bytes
    gap = follower - (start + entry.packed_bytes)
    if gap < 0:
        raise BadModel(f"member {shown} is cut off, or overlaps another")
    if gap not in ((12, 16, 20, 24) if entry.flags & _HAS_DESCRIPTOR else (0,)):
        raise BadModel(f"{gap} bytes after member {shown} belong to nothing")
    return start


def _read_member(data: memoryview, entry: _Entry, start: int) -> _Member:
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
    head = _Inflater(name, data[start:end]).read(known_bytes) if deflated else bytes(data[start : start + known_bytes])
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

    def __init__(self, name: str, packed: memoryview) -> None:
        self._name = name
        self._packed = packed
        self._at = 0
        self._crc = 0
        self._zlib = zlib.decompressobj(-zlib.MAX_WBITS)

    def read(self, size_bytes: int) -> bytearray:
        """Exactly so many bytes. Raises BadModel if there are fewer."""
        out = bytearray()
        while len(out) < size_bytes:
            part = self._some(size_bytes - len(out))
            if not part and (self._zlib.eof or self._at >= len(self._packed)):
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
            if not self._zlib.eof and self._at >= len(self._packed):
                raise BadModel(f"array {short(self._name)} is cut off")
        if self._zlib.unused_data or self._at < len(self._packed):
            raise BadModel(f"array {short(self._name)} has bytes after its end")
        if crc != self._crc:
            raise BadModel(f"array {short(self._name)} is damaged: its CRC differs")

    def _some(self, max_bytes: int) -> bytes:
        source = self._zlib.unconsumed_tail
        if not source:
            source = bytes(self._packed[self._at : self._at + 65536])
            self._at += len(source)
        try:
            return self._zlib.decompress(source, max_bytes)
        except zlib.error as exc:
            raise BadModel(f"array {short(self._name)} cannot be inflated: {exc}") from None


# ---- writing


class Archive:
    """A stored npz, written member by member: fixed times, aligned data."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._zip = zipfile.ZipFile(out, "w", zipfile.ZIP_STORED)
        self._names: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()

    def add(
        self,
        name: str,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        blocks: Iterable[Array],
        *,
        fortran_order: bool = False,
    ) -> None:
        refuse_dtype(name, dtype)
        refuse_name(name)
        if name in self._names:
            raise BadModel(f"two arrays are named {short(name)}")
        self._names.add(name)
        header = _npy_header(dtype, shape, fortran_order)
        values_bytes = math.prod(shape) * dtype.itemsize
        info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
        info.create_system = 3  # the same bytes on every system
        info.CRC = 0  # completed with the data, as the sizes are
        info.file_size = len(header) + values_bytes
        wide = info.file_size * 1.05 > zipfile.ZIP64_LIMIT  # when zipfile takes the 64-bit header
        info.extra = _padding(self._out.tell() + len(info.FileHeader(zip64=wide)))
        written_bytes = 0
        with self._zip.open(info, "w", force_zip64=wide) as member:
            member.write(header)
            for block in blocks:
                if block.dtype != dtype:
                    raise ValueError(f"array {short(name)}: a block of {block.dtype}, expected {dtype}")
                written_bytes += block.nbytes
                if block.size:
                    member.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        if written_bytes != values_bytes:
            raise ValueError(f"array {short(name)}: blocks of {written_bytes} bytes, expected {values_bytes}")


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


class NpzWriter:
    """Writes a stored npz at `path`, array by array and block by block, in flat memory.

    After the with block `sha256` (hex) and `size_bytes` are those of the whole file, which is not synced. Leaving the
    block by an exception removes the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.sha256 = ""
        self.size_bytes = 0

    def __enter__(self) -> Self:
        self._file = self._path.open("w+b")
        self._archive = Archive(self._file)
        return self

    def add(
        self,
        name: str,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        blocks: Iterable[Array],
        *,
        fortran_order: bool = False,
    ) -> None:
        """blocks: of this dtype; their values, one after the other, are the array's in C (or Fortran) order.

        Raises BadModel for a name that is taken or a dtype that is no number, ValueError for blocks that do not fit.
        """
        self._archive.add(name, dtype, shape, blocks, fortran_order=fortran_order)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._file:
                self._archive.__exit__(kind, exc, trace)
                if kind is None:
                    self.size_bytes = self._file.seek(0, io.SEEK_END)
                    self._file.seek(0)  # read again: the headers were completed after their data
                    self.sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
        except BaseException:
            self._path.unlink()
            raise
        if kind is not None:
            self._path.unlink()
