"""The local disk as files.py and spool.py see it: a whole file under its name or none, and its errors as ours.

Blocking: called in executor threads only. Knows nothing of what the files are for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fl_server.errors import Unavailable

PART = ".part"  # the end of the name of a file that is not whole: after a restart it is nobody's


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Full, read-only, broken, unmounted: whatever the disk says may be over later."""
    try:
        yield
    except OSError as exc:
        raise Unavailable(f"{doing}: {exc.strerror or exc}") from exc


def sync(path: Path) -> None:
    """What is in this file, or the names in this folder, survive a loss of power."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path, *, fsync: bool) -> None:
    if folder.is_dir():
        return
    make_folder(folder.parent, fsync=fsync)
    folder.mkdir(exist_ok=True)
    if fsync:
        sync(folder.parent)


def place(part: Path, path: Path, *, fsync: bool) -> None:
    """`part` takes the name `path`, over what was there; both in one file system. Bytes are durable before the name."""
    if fsync:
        sync(part)
    os.replace(part, path)
    if fsync:
        sync(path.parent)
