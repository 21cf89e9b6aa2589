"""What every BlobStore promises, outcome by outcome. A new adapter is one more parameter."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest

from fl_server.errors import Missing
from fl_server.store import s3
from fl_server.store.files import FileBlobStore
from fl_server.store.ports import BlobStore
from fl_server.store.s3 import S3, S3BlobStore

KEY = "0b2e-model_1.npz"


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    """Several threads, as the application's: calls may meet."""
    with ThreadPoolExecutor(4) as executor:
        yield executor


@pytest.fixture(params=["files", "s3"])
def unopened(request: pytest.FixtureRequest, tmp_path: Path, executor: Executor) -> FileBlobStore | S3BlobStore:
    if request.param == "files":
        return FileBlobStore(tmp_path / "blobs", executor)
    server: S3 = request.getfixturevalue("s3_server")
    # one bucket for all tests, as a new one costs seconds; each has a folder in it
    return S3BlobStore(server, "fl-test", tmp_path / "c", executor, cache_bytes=2**30, prefix=f"{uuid.uuid4()}/")


@pytest.fixture
async def store(unopened: FileBlobStore | S3BlobStore) -> AsyncIterator[BlobStore]:
    await unopened.open()
    yield unopened
    if isinstance(unopened, S3BlobStore):
        await unopened.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "a local file"
    file.write_bytes(b"from a file")
    return file


async def keys(store: BlobStore) -> set[str]:
    return {key for key, _ in await store.keys()}


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 10_000])
async def test_a_blob_comes_back_byte_for_byte(store: BlobStore, data: bytes) -> None:
    await store.put(KEY, data)
    assert await store.get(KEY) == data
    assert (await store.local(KEY)).read_bytes() == data
    assert await store.size_bytes(KEY) == len(data)
    assert await keys(store) == {KEY}


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (1_000, 70_000), (2_559_990, 2_560_000), (0, 2_560_000)])
async def test_a_range_is_read_from_the_local_file(store: BlobStore, start: int, stop: int) -> None:
    """As downloads and kernels do, of a file that may be larger than memory."""
    data = bytes(range(256)) * 10_000
    await store.put(KEY, data)
    with (await store.local(KEY)).open("rb") as file:
        file.seek(start)
        assert file.read(stop - start) == data[start:stop]


async def test_a_file_above_the_multipart_threshold_comes_back(store: BlobStore, file: Path) -> None:
    size_bytes = s3.MULTIPART_BYTES + 1_000_000
    block = os.urandom(1_000_003)
    with file.open("wb") as written:
        while left := size_bytes - written.tell():
            written.write(block[:left])
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    await store.put_file(KEY, file)
    assert await store.size_bytes(KEY) == size_bytes
    with (await store.local(KEY)).open("rb") as found:
        assert hashlib.file_digest(found, "sha256").hexdigest() == digest


async def test_put_twice_is_put_once(store: BlobStore) -> None:
    await store.put(KEY, b"x")
    await store.put(KEY, b"x")
    assert await store.get(KEY) == b"x"
    assert await keys(store) == {KEY}


async def test_two_puts_at_once_leave_one_whole_blob(store: BlobStore) -> None:
    data = bytes(1_000_000)
    await asyncio.gather(*(store.put(KEY, data) for _ in range(5)))
    assert await store.get(KEY) == data
    assert await keys(store) == {KEY}


async def test_a_missing_blob(store: BlobStore) -> None:
    with pytest.raises(Missing, match=KEY):
        await store.get(KEY)
    with pytest.raises(Missing, match=KEY):
        await store.local(KEY)
    assert await store.size_bytes(KEY) is None
    assert await store.keys() == []


async def test_put_file_takes_the_file_away(store: BlobStore, file: Path) -> None:
    await store.put_file(KEY, file)
    assert await store.get(KEY) == b"from a file"
    assert not file.exists()


async def test_put_file_again_after_it_has_happened_is_success(store: BlobStore, file: Path) -> None:
    await store.put_file(KEY, file)
    await store.put_file(KEY, file)
    assert await store.get(KEY) == b"from a file"


async def test_put_file_again_while_file_and_blob_are_both_there_is_success(store: BlobStore, file: Path) -> None:
    await store.put(KEY, b"from a file")
    await store.put_file(KEY, file)
    assert await store.get(KEY) == b"from a file"
    assert not file.exists()


async def test_put_file_with_neither_file_nor_blob_is_missing(store: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(Missing, match=KEY):
        await store.put_file(KEY, tmp_path / "never was")
    assert await store.keys() == []


async def test_delete_passes_over_what_is_not_there(store: BlobStore) -> None:
    for key in ("a", "b", "c"):
        await store.put(key, b"x")
    await store.delete(key for key in ("a", "never-was", "b"))
    await store.delete(["a"])
    assert await keys(store) == {"c"}


async def test_a_blob_is_as_old_as_its_put_also_when_its_file_is_older(store: BlobStore, file: Path) -> None:
    os.utime(file, (1, 1))
    before = time.time() - 1  # the clocks of file systems are coarse
    await store.put("put", b"x")
    await store.put_file("put_file", file)
    assert all(before <= at <= time.time() + 1 for _, at in await store.keys())


@pytest.mark.parametrize(
    "key", ["", ".", "..", ".hidden", "../x", "a/b", "/etc/passwd", "a\0", "a\n", "é", "a b", "a" * 201, "a" * 10_000]
)
async def test_a_key_that_is_not_ours_is_a_bug(store: BlobStore, file: Path, key: str) -> None:
    with pytest.raises(AssertionError):
        await store.put(key, b"x")
    with pytest.raises(AssertionError):
        await store.put_file(key, file)
    with pytest.raises(AssertionError):
        await store.get(key)
    with pytest.raises(AssertionError):
        await store.local(key)
    with pytest.raises(AssertionError):
        await store.delete([key])
    assert file.exists()


async def test_the_longest_key_is_stored(store: BlobStore) -> None:
    await store.put("a" * 200, b"x")
    assert await store.get("a" * 200) == b"x"
