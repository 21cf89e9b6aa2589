"""What is the directory adapter's alone: its temporary files, its errors, its order of fsync and rename."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest

from fl_server.errors import Unavailable
from fl_server.store.files import FileBlobStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "blobs"


async def opened(folder: Path, executor: Executor, *, fsync: bool = False) -> FileBlobStore:
    store = FileBlobStore(folder, executor, fsync=fsync)
    await store.open()
    return store


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


async def test_open_removes_what_a_dead_process_was_writing_and_keeps_the_blobs(
    folder: Path, executor: Executor
) -> None:
    await (await opened(folder, executor)).put("model", b"x")
    (folder / ".model.0.part").write_bytes(b"half")
    store = await opened(folder, executor)
    assert [path.name for path in folder.iterdir()] == ["model"]
    assert await store.get("model") == b"x"


async def test_what_is_being_written_is_no_blob(folder: Path, executor: Executor) -> None:
    store = await opened(folder, executor)
    (folder / ".model.0.part").write_bytes(b"half")
    assert await store.keys() == []


@pytest.mark.parametrize("failing", ["fsync", "replace"])
async def test_a_disk_that_is_full_is_unavailable_and_leaves_the_old_blob_and_no_part(
    folder: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    store = await opened(folder, executor, fsync=True)
    await store.put("model", b"x")
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, no_space)
        with pytest.raises(Unavailable, match="put model: No space left"):
            await store.put("model", b"x")
    assert [path.name for path in folder.iterdir()] == ["model"]
    await store.put("model", b"x")
    assert await store.get("model") == b"x"


async def test_a_folder_that_is_gone_is_unavailable_and_not_a_missing_blob(folder: Path, executor: Executor) -> None:
    store = await opened(folder, executor)
    folder.rmdir()
    with pytest.raises(Unavailable):
        await store.put("model", b"x")
    with pytest.raises(Unavailable):
        await store.keys()


async def test_put_file_from_another_file_system_copies_and_removes(
    folder: Path, executor: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await opened(folder, executor)
    file, replace = tmp_path / "elsewhere", os.replace
    file.write_bytes(b"from far away")

    def replace_within(source: Path, target: Path) -> None:
        if source.parent != target.parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_within)
    await store.put_file("model", file)
    assert await store.get("model") == b"from far away"
    assert not file.exists()
    assert [path.name for path in folder.iterdir()] == ["model"]


async def put_bytes(store: FileBlobStore, file: Path) -> None:
    await store.put("model", file.read_bytes())


async def put_the_file(store: FileBlobStore, file: Path) -> None:
    await store.put_file("model", file)


@pytest.mark.parametrize("put", [put_bytes, put_the_file])
async def test_with_fsync_the_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_answer(
    folder: Path, executor: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put: Callable[..., Any]
) -> None:
    store = await opened(folder, executor, fsync=True)
    file = tmp_path / "file"
    file.write_bytes(b"x")
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(fd: int) -> None:
        done.append("folder" if os.fstat(fd).st_ino == folder.stat().st_ino else "bytes")
        fsync(fd)

    def recorded_replace(source: Path, target: Path) -> None:
        done.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    await put(store, file)
    assert done == ["bytes", "name", "folder"]
