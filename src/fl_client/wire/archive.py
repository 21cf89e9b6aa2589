"""Compute packages as archives: checked before one is stored, unpacked on a device. Nothing in one is trusted.

A package comes from somebody else, and its code runs on the device; it must not reach beyond its own folder, nor fill
the disk or the memory. Each member is looked at before a byte of it is written, what a member really holds is counted
(not what it declares), and only regular files and folders are known. Tar is read here block by block: the standard
library's reader takes a long name, or a pax header, of any size into memory.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

_Stream = gzip.GzipFile | bz2.BZ2File
Format = Literal["gz", "bz2", "zip"]

MANIFEST = "fedn.yaml"
FORMATS: dict[str, Format] = {".tar.gz": "gz", ".tgz": "gz", ".tar.bz2": "bz2", ".zip": "zip"}  # by a file's extension
EXTENSIONS = ", ".join(FORMATS)
_BLOCK_BYTES = 1 << 18
_LISTED_BYTES = 256  # of a zip's directory, for each member
_EXTENSION_BYTES = 1 << 16  # of a tar's long name or pax header
_EXTENSIONS_IN_A_ROW = 4
_SAID = 200  # characters of the library's own words, which may hold a name of 64 kB
_NAME_BYTES = 1024
_PART_BYTES = 255  # what a file system takes
_EXTENSION_TYPES = {tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE}
_ODD = {
    tarfile.SYMTYPE: "is a link",
    tarfile.LNKTYPE: "is a link",
    tarfile.GNUTYPE_LONGLINK: "is a link",
    tarfile.CHRTYPE: "is a device",
    tarfile.BLKTYPE: "is a device",
    tarfile.FIFOTYPE: "is a pipe",
    tarfile.GNUTYPE_SPARSE: "is a sparse file",
}


class BadArchive(Exception):
    """The message is one sentence, for whoever made the archive."""


@dataclass(frozen=True, slots=True)
class Limits:
    total_bytes: int = 1 << 30  # of all that it holds, unpacked
    members: int = 10_000  # files and folders


@dataclass(frozen=True, slots=True)
class _Member:
    """`blocks` is read to its end before the next member is asked for."""

    name: str
    is_folder: bool
    is_executable: bool
    blocks: Iterator[bytes]


def extension(file_name: str) -> str | None:
    """The extension that says what the file holds, in lower case; None: no archive that we know."""
    return next((known for known in FORMATS if file_name.lower().endswith(known)), None)


def format_of(path: Path) -> Format:
    """By its first bytes. Raises BadArchive."""
    with path.open("rb") as file:
        first = file.read(4)
    if first.startswith(b"\x1f\x8b"):
        return "gz"
    if first.startswith(b"BZh"):
        return "bz2"
    if first in (b"PK\x03\x04", b"PK\x05\x06"):
        return "zip"
    raise BadArchive("it is neither a tar (gzip or bzip2) nor a zip")


def check(path: Path, limits: Limits) -> None:
    """Reads all of it and writes nothing. Raises BadArchive."""
    for _ in _checked(path, limits):
        pass


def unpack(path: Path, folder: Path, limits: Limits) -> Path:
    """Into `folder`, which must not exist; where fedn.yaml lies in it, nearest to its top.

    Files get mode 0644, or 0755 where their owner may run them. Raises BadArchive; then, as after any error, `folder`
    does not exist. Raises FileExistsError, and leaves what is there.
    """
    folder.mkdir(mode=0o755)
    homes: list[PurePosixPath] = []
    try:
        for member, name in _checked(path, limits):
            target = folder.joinpath(*name.parts)
            if member.is_folder:
                target.mkdir(mode=0o755, parents=True, exist_ok=True)
                continue
            target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            with target.open("xb") as file:
                for block in member.blocks:
                    file.write(block)
            target.chmod(0o755 if member.is_executable else 0o644)
            if name.name == MANIFEST:
                homes.append(name.parent)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return folder.joinpath(*min(homes, key=lambda home: (len(home.parts), home)).parts)


# ---- what both formats have in common


def _checked(path: Path, limits: Limits) -> Iterator[tuple[_Member, PurePosixPath]]:
    """Each member with its name inside the package, once it is known to be harmless. Raises BadArchive."""
    members = _zip_members if format_of(path) == "zip" else _tar_members
    files: set[str] = set()
    folders: set[str] = set()
    has_manifest = False
    for count, member in enumerate(members(path, limits), start=1):
        if count > limits.members:
            raise BadArchive(f"it has more than {limits.members} members")
        name = _safe_name(member.name)
        if not (name.parts or member.is_folder):
            raise BadArchive(f"{_shown(member.name)} is no name for a file")
        key, above = _key(name), {_key(parent) for parent in name.parents}
        if key in files or above & files or (not member.is_folder and key in folders | above):
            raise BadArchive(f"{_shown(member.name)} is in it twice, or differs from another name only in case")
        folders |= above
        (folders if member.is_folder else files).add(key)
        has_manifest |= name.name == MANIFEST and not member.is_folder
        yield member, name
        for _ in member.blocks:  # what the caller did not want is counted too
            pass
    if not has_manifest:
        raise BadArchive(f"there is no {MANIFEST} in it")


def _safe_name(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if not name or any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise BadArchive(f"{_shown(name)} is no name for a file")
    if path.is_absolute():
        raise BadArchive(f"{_shown(name)} is an absolute path")
    if "\\" in name or ":" in name:
        raise BadArchive(f"{_shown(name)} has a backslash or a colon, which not every system takes for a name")
    if ".." in path.parts:
        raise BadArchive(f"{_shown(name)} leads out of the package")
    if len(name.encode()) > _NAME_BYTES or any(len(part.encode()) > _PART_BYTES for part in path.parts):
        raise BadArchive(f"{_shown(name)} is too long for a name")
    return path


def _key(name: PurePosixPath) -> str:
    """Equal for names that some file system takes for the same."""
    return unicodedata.normalize("NFC", str(name)).casefold()


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:77]}...")


class _Budget:
    """The bytes that may still come out of the archive."""

    def __init__(self, limits: Limits) -> None:
        self._limit_bytes = self._left_bytes = limits.total_bytes

    def take(self, size_bytes: int) -> None:
        self._left_bytes -= size_bytes
        self.expect(0)

    def expect(self, size_bytes: int) -> None:
        """Refuses at once what declares more than may come."""
        if size_bytes > self._left_bytes:
            raise BadArchive(f"it holds more than {self._limit_bytes} bytes")


@contextmanager
def _reading() -> Iterator[None]:
    """What the standard library raises at bytes that are no archive, as BadArchive."""
    try:
        yield
    except (EOFError, zlib.error, zipfile.BadZipFile, tarfile.HeaderError, struct.error) as exc:
        raise BadArchive(f"it is damaged: {str(exc)[:_SAID]}") from None
    except (ValueError, OverflowError, RuntimeError) as exc:
        raise BadArchive(f"it cannot be read: {str(exc)[:_SAID]}") from None
    except OSError as exc:
        if exc.errno not in (None, errno.EINVAL):  # gzip and bz2 have no number; an offset below 0 is invalid
            raise
        raise BadArchive(f"it is damaged: {str(exc)[:_SAID]}") from None


# ---- zip


class _Bounded(io.FileIO):
    """Refuses to read the list of a zip's members into memory when it is longer than it need be."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        super().__init__(path)
        self._most_bytes = most_bytes

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self._most_bytes:
            raise BadArchive("its list of members is too long")
        return super().read(-1 if size is None else size)


def _zip_members(path: Path, limits: Limits) -> Iterator[_Member]:
    most_bytes = max(2 * _BLOCK_BYTES, limits.members * _LISTED_BYTES)
    with _Bounded(path, most_bytes) as file:
        with _reading():
            archive = zipfile.ZipFile(file)
        with archive:
            budget = _Budget(limits)
            if len(archive.infolist()) > limits.members:
                raise BadArchive(f"it has more than {limits.members} members")
            budget.expect(sum(info.file_size for info in archive.infolist()))
            for info in archive.infolist():
                mode = info.external_attr >> 16  # orig_filename is as it stands there: filename ends at a NUL
                if info.flag_bits & 0x1:
                    raise BadArchive(f"{_shown(info.filename)} is encrypted")
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise BadArchive(f"{_shown(info.filename)} is neither stored nor deflated")
                if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    what = "is a link" if stat.S_ISLNK(mode) else "is neither a file nor a folder"
                    raise BadArchive(f"{_shown(info.filename)} {what}")
                is_folder = info.orig_filename.endswith("/")
                if is_folder != stat.S_ISDIR(mode) and stat.S_IFMT(mode):
                    raise BadArchive(f"{_shown(info.filename)} is called a file and a folder")
                yield _Member(
                    info.orig_filename, is_folder, bool(mode & 0o100), _zip_blocks(archive, info, budget, is_folder)
                )


def _zip_blocks(archive: zipfile.ZipFile, info: zipfile.ZipInfo, budget: _Budget, is_folder: bool) -> Iterator[bytes]:
    with _reading():
        member = archive.open(info)
    with member:
        while True:
            with _reading():
                block = member.read(_BLOCK_BYTES)
            if not block:
                return
            if is_folder:
                raise BadArchive(f"{_shown(info.filename)} is a folder with contents")
            budget.take(len(block))
            yield block


# ---- tar


def _tar_members(path: Path, limits: Limits) -> Iterator[_Member]:
    with gzip.GzipFile(path) if format_of(path) == "gz" else bz2.BZ2File(path) as stream:
        budget = _Budget(limits)
        named, extensions = "", 0  # a name that is too long for a header comes before it
        while True:
            header = _header(stream)
            if header is None:
                break
            if header.type in _EXTENSION_TYPES:
                extensions += 1
                if extensions > _EXTENSIONS_IN_A_ROW or not 0 <= header.size <= _EXTENSION_BYTES:
                    raise BadArchive("it has a header that is too long")
                data = b"".join(_tar_blocks(stream, header.size, budget))
                if header.type == tarfile.GNUTYPE_LONGNAME:
                    named = data.removesuffix(b"\0").decode("utf-8", "surrogateescape")
                elif (pax_name := _pax_name(data)) is not None:
                    if header.type == tarfile.XGLTYPE:
                        raise BadArchive("it gives one name to all of its members")
                    named = pax_name
                continue
            name = named or header.name
            named, extensions = "", 0
            if header.type in _ODD:
                raise BadArchive(f"{_shown(name)} {_ODD[header.type]}")
            if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
                raise BadArchive(f"{_shown(name)} is neither a file nor a folder")
            is_folder = header.type == tarfile.DIRTYPE
            if header.size < 0 or (is_folder and header.size):
                raise BadArchive(f"{_shown(name)} has a size that makes no sense")
            if not is_folder and name.endswith("/"):
                raise BadArchive(f"{_shown(name)} is called a file and a folder")
            budget.expect(header.size)
            yield _Member(name, is_folder, bool(header.mode & 0o100), _tar_blocks(stream, header.size, budget))
        while rest := _read(stream, _BLOCK_BYTES):
            budget.take(len(rest))
            if rest.strip(b"\0"):
                raise BadArchive("it goes on after its end")


def _header(stream: _Stream) -> tarfile.TarInfo | None:
    """The next one; None at the end, which is a block of zeros."""
    block = _read(stream, tarfile.BLOCKSIZE)
    if not block:
        raise BadArchive("it is damaged: it ends too early")
    if not block.strip(b"\0"):
        return None
    with _reading():
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")


def _tar_blocks(stream: _Stream, size_bytes: int, budget: _Budget) -> Iterator[bytes]:
    padding_bytes = -size_bytes % tarfile.BLOCKSIZE
    while size_bytes:
        block = _read(stream, min(size_bytes, _BLOCK_BYTES))
        if not block:
            raise BadArchive("it is damaged: it ends too early")
        size_bytes -= len(block)
        budget.take(len(block))
        yield block
    if len(_read(stream, padding_bytes)) < padding_bytes:
        raise BadArchive("it is damaged: it ends too early")


def _read(stream: _Stream, size_bytes: int) -> bytes:
    """Fewer only at the end."""
    with _reading():
        return stream.read(size_bytes)


def _pax_name(data: bytes) -> str | None:
    """The name that a pax header gives to the next member, if it gives one. Each record: "length key=value\\n"."""
    name, at = None, 0
    data = data.rstrip(b"\0")
    while at < len(data):
        blank = data.find(b" ", at, at + 8)
        with _reading():
            end = at + int(data[at:blank])
        key, equals, value = data[blank + 1 : end].partition(b"=")
        if blank < at or end <= blank or not equals or not value.endswith(b"\n"):
            raise BadArchive("it is damaged: a pax header cannot be read")
        if key == b"path":
            name = value[:-1].decode("utf-8", "surrogateescape")
        elif key in (b"size", b"linkpath", b"hdrcharset") or key.startswith(b"GNU.sparse"):
            raise BadArchive(f"it has a pax header {key.decode('ascii', 'replace')[:40]}, which is not taken")
        at = end
    return name
