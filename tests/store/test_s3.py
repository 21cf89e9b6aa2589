"""What is S3's alone: what a user sees in the bucket, multipart, lost answers, refusals, the cache on local disk."""

from __future__ import annotations

import asyncio
import hashlib
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aioboto3
import pytest

from fl_server.errors import FlserveError, Invalid, Missing, Unavailable
from fl_server.store import s3
from fl_server.store.s3 import S3, S3BlobStore, opened
from tests.proxy import Proxy, proxied

BUCKET = "fl-test"
WAIT_S = 60.0


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


@pytest.fixture
def prefix() -> str:
    return f"{uuid.uuid4()}/"


@pytest.fixture
def opening(s3_server: S3, prefix: str, tmp_path: Path, executor: Executor) -> Callable[..., Any]:
    def opening(server: S3 = s3_server, prefix: str = prefix, cache_bytes: int = 2**30, bucket: str = BUCKET) -> Any:
        return opened(server, bucket, tmp_path / "cache", executor, cache_bytes=cache_bytes, prefix=prefix)

    return opening


@pytest.fixture
async def store(opening: Callable[..., Any]) -> AsyncIterator[S3BlobStore]:
    async with opening() as store:
        yield store


@pytest.fixture
async def bucket(s3_server: S3) -> AsyncIterator[Any]:
    """As another program sees it."""
    keys = {"aws_access_key_id": s3_server.access_key, "aws_secret_access_key": s3_server.secret_key}
    session = aioboto3.Session(**keys, region_name=s3_server.region)
    async with session.resource("s3", endpoint_url=s3_server.endpoint_url) as resource:
        yield await resource.Bucket(BUCKET)


@asynccontextmanager
async def behind_proxy(opening: Callable[..., Any], server: S3) -> AsyncIterator[tuple[S3BlobStore, Proxy]]:
    async with (
        proxied(server.endpoint_url) as proxy,
        opening(replace(server, endpoint_url=proxy.url)) as store,
    ):
        yield store, proxy


async def again(work: Callable[[], Any]) -> Any:
    """As the scheduler: until its outcome is known."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return await work()
            except Unavailable:
                await asyncio.sleep(0)


def big_file(path: Path, size_bytes: int) -> str:
    """Its sha256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        while file.tell() < size_bytes:
            data = os.urandom(min(2**22, size_bytes - file.tell()))
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


# ---- what a user sees


async def test_an_object_has_the_blobs_key_and_its_plain_bytes(store: S3BlobStore, bucket: Any, prefix: str) -> None:
    await store.put("model", b"npz")
    seen = await (await bucket.Object(f"{prefix}model")).get()
    assert await seen["Body"].read() == b"npz"
    assert seen["ContentType"] == "application/octet-stream"


async def test_stores_in_one_bucket_do_not_see_each_other(opening: Callable[..., Any], prefix: str) -> None:
    async with opening() as outer, opening(prefix=f"{prefix}updates/") as inner:
        await outer.put("a", b"outer")
        await inner.put("b", b"inner")
        await inner.put("a", b"inner")
        assert [key for key, _ in await outer.keys()] == ["a"]
        assert sorted(key for key, _ in await inner.keys()) == ["a", "b"]
        await inner.delete(["a"])
        assert await outer.get("a") == b"outer"


@pytest.mark.long
async def test_more_blobs_than_a_page_of_the_server_are_listed(store: S3BlobStore) -> None:
    names = [f"{n:04}" for n in range(1010)]
    for start in range(0, len(names), 100):
        await asyncio.gather(*(store.put(name, b"x") for name in names[start : start + 100]))
    assert [key for key, _ in await store.keys()] == names


async def test_a_bucket_that_is_not_there_is_made(opening: Callable[..., Any]) -> None:
    async with opening(bucket=f"fl-test-{uuid.uuid4()}", prefix="") as store:
        await store.put("a", b"x")
        assert await store.get("a") == b"x"


# ---- multipart


async def test_a_large_file_is_put_in_parts_and_comes_back(
    store: S3BlobStore, tmp_path: Path, bucket: Any, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "MULTIPART_BYTES", 10 * 2**20)
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)  # the smallest that S3 takes
    file, size_bytes = tmp_path / "file", 12 * 2**20
    sha256 = big_file(file, size_bytes)
    await store.put_file("large", file)
    assert not file.exists()
    assert await store.size_bytes("large") == size_bytes
    assert (await (await bucket.Object(f"{prefix}large")).e_tag).strip('"').endswith("-3"), "three parts"
    assert hashlib.sha256(await store.get("large")).hexdigest() == sha256
    await store._forget("large")
    assert hashlib.sha256((await store.local("large")).read_bytes()).hexdigest() == sha256


@pytest.mark.parametrize("lost", ["request", "answer"])
async def test_a_file_whose_put_in_parts_was_cut_is_whole_when_repeated(
    opening: Callable[..., Any],
    s3_server: S3,
    tmp_path: Path,
    bucket: Any,
    monkeypatch: pytest.MonkeyPatch,
    lost: Any,
) -> None:
    monkeypatch.setattr(s3, "MULTIPART_BYTES", 0)
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)  # the smallest that S3 takes
    file = tmp_path / "file"
    sha256 = big_file(file, 12 * 2**20)
    async with behind_proxy(opening, s3_server) as (store, proxy):
        proxy.lose(lost, b"partNumber=2", times=10)
        with pytest.raises(Unavailable, match="put large"):
            await store.put_file("large", file)
        assert file.exists() and await store.size_bytes("large") is None
        proxy.lose(lost, b"POST", times=1)
        await again(lambda: store.put_file("large", file))
        assert hashlib.sha256(await store.get("large")).hexdigest() == sha256


async def test_uploads_that_an_earlier_process_began_are_ended(
    opening: Callable[..., Any], bucket: Any, prefix: str
) -> None:
    await (await bucket.Object(f"{prefix}half")).initiate_multipart_upload()
    other = await (await bucket.Object(f"{prefix}sub/other")).initiate_multipart_upload()
    async with opening():
        left = [upload.object_key async for upload in bucket.multipart_uploads.filter(Prefix=prefix)]
    assert left == [f"{prefix}sub/other"]
    await other.abort()


# ---- lost requests and answers


@pytest.mark.parametrize("lost", ["request", "answer"])
async def test_a_put_whose_outcome_is_unknown_is_unavailable_and_done_when_repeated(
    opening: Callable[..., Any], s3_server: S3, tmp_path: Path, lost: Any
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"from a file")
    async with behind_proxy(opening, s3_server) as (store, proxy):
        proxy.lose(lost, b"PUT", times=10)  # the driver tries more than once
        with pytest.raises(Unavailable, match="put a"):
            await store.put_file("a", file)
        assert file.exists()
        proxy.times = 0
        await store.put_file("a", file)
        assert await store.get("a") == b"from a file"
        proxy.lose(lost, b"PUT", times=10)
        with pytest.raises(Unavailable, match="put b"):
            await store.put("b", b"x")
        proxy.times = 0
        await store.put("b", b"x")
        assert await store.get("b") == b"x"


async def test_a_read_that_is_cut_leaves_no_half_file(
    opening: Callable[..., Any], s3_server: S3, tmp_path: Path
) -> None:
    data = os.urandom(3 * 2**20)
    async with behind_proxy(opening, s3_server) as (store, proxy):
        await store.put("a", data)
        for lost, read in (("answer", store.local), ("rest", store.get)):
            proxy.lose(lost, b"GET", times=10)
            with pytest.raises(Unavailable, match="get a"):
                await read("a")
            assert [*(tmp_path / "cache").iterdir()] == []
        proxy.times = 0
        assert (await store.local("a")).read_bytes() == data


async def test_a_file_whose_read_was_cut_is_read_on_from_there(opening: Callable[..., Any], s3_server: S3) -> None:
    data = os.urandom(3 * 2**20)
    async with behind_proxy(opening, s3_server) as (store, proxy):
        await store.put("a", data)
        proxy.lose("rest", b"GET", times=2)
        assert (await store.local("a")).read_bytes() == data
        assert proxy.times == 0


async def test_only_the_range_that_is_missing_is_read_again(
    store: S3BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, begun, write = os.urandom(3 * 2**20), [], store._write

    async def cut_once(part: Path, body: Any, at: int) -> None:
        begun.append(at)
        if len(begun) == 1:
            part.write_bytes(await body.read(2**16))
            raise Unavailable("cut")
        await write(part, body, at)

    await store.put("a", data)
    monkeypatch.setattr(store, "_write", cut_once)
    assert (await store.local("a")).read_bytes() == data
    assert len(begun) == 2 and 0 < begun[1] <= 2**16


async def test_a_server_that_comes_back_is_used_again(opening: Callable[..., Any], s3_server: S3) -> None:
    async with behind_proxy(opening, s3_server) as (store, proxy):
        await store.put("a", b"x")
        await proxy.down()
        for call in (
            store.get("a"),
            store.put("a", b"x"),
            store.size_bytes("a"),
            store.keys(),
            store.delete(["a"]),
            store.local("a"),
        ):
            with pytest.raises(Unavailable, match=BUCKET):
                await call
        await proxy.up()
        assert await store.get("a") == b"x"


async def test_answers_of_an_overloaded_server_are_unavailable(opening: Callable[..., Any], s3_server: S3) -> None:
    async with behind_proxy(opening, s3_server) as (store, proxy):
        for status in (b"500 Internal Server Error", b"503 Slow Down"):
            proxy.answer(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
            with pytest.raises(Unavailable, match=status[:3].decode()):
                await store.put("a", b"x")
            with pytest.raises(Unavailable, match=status[:3].decode()):
                await store.size_bytes("a")
        proxy.answer(b"")
        await store.put("a", b"x")


# ---- what is refused at the start


async def refused(opening: Callable[..., Any], server: S3, **other: Any) -> FlserveError:
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(FlserveError) as caught:
            async with opening(server, **other):
                pass
    return caught.value


@pytest.mark.parametrize("wrong", [{"secret_key": "hush"}, {"access_key": "nobody"}])
async def test_refused_credentials_are_said_and_not_repeated(
    opening: Callable[..., Any], s3_server: S3, wrong: dict[str, str]
) -> None:
    why = await refused(opening, replace(s3_server, **wrong))
    assert isinstance(why, Unavailable) and "check s3_access_key and s3_secret_key" in str(why)
    assert "hush" not in str(why) + repr(replace(s3_server, **wrong))


async def test_a_server_that_is_not_there_is_unavailable_by_its_url(
    opening: Callable[..., Any], s3_server: S3, unused_tcp_port: int
) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}"
    why = await refused(opening, replace(s3_server, endpoint_url=url))
    assert isinstance(why, Unavailable) and url in str(why)


async def test_a_server_that_says_nothing_is_given_up(
    opening: Callable[..., Any], s3_server: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "OPEN_TIMEOUT_S", 1.0)
    async with proxied(s3_server.endpoint_url) as proxy:
        proxy.lose("wait", b"", times=1000)
        why = await refused(opening, replace(s3_server, endpoint_url=proxy.url))
    assert isinstance(why, Unavailable) and "no answer within 1 s" in str(why)


async def test_what_is_no_url_is_invalid(opening: Callable[..., Any], s3_server: S3) -> None:
    why = await refused(opening, replace(s3_server, endpoint_url="nowhere"))
    assert isinstance(why, Invalid) and str(why).startswith("s3_endpoint_url")


async def test_a_store_that_is_not_open_says_so(s3_server: S3, tmp_path: Path, executor: Executor) -> None:
    store = S3BlobStore(s3_server, BUCKET, tmp_path, executor, cache_bytes=1)
    with pytest.raises(AssertionError, match="not open"):
        await store.get("a")
    await store.close()


# ---- the cache


async def test_a_file_that_was_put_or_read_is_not_fetched_again(
    opening: Callable[..., Any], s3_server: S3, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"from a file")
    async with behind_proxy(opening, s3_server) as (store, proxy):
        await store.put_file("put", file)
        await store.put("read", b"x")
        await store.local("read")
        await proxy.down()
        assert (await store.local("put")).read_bytes() == b"from a file"
        assert (await store.local("read")).read_bytes() == b"x"
        (tmp_path / "cache" / "put").unlink()
        with pytest.raises(Unavailable):
            await store.local("put")
        await proxy.up()
        assert (await store.local("put")).read_bytes() == b"from a file"
        await store.delete(["put"])
        with pytest.raises(Missing):
            await store.local("put")


async def test_the_cache_is_bounded_but_keeps_the_last_few(opening: Callable[..., Any], tmp_path: Path) -> None:
    async with opening(cache_bytes=1) as store:
        for n in range(12):
            await store.put(f"{n}", b"0123456789")
            await store.local(f"{n}")
            await store.local("0")  # used again and again
        assert {path.name for path in (tmp_path / "cache").iterdir()} == {"0", *map(str, range(5, 12))}
    async with opening(cache_bytes=10**6):
        assert [*(tmp_path / "cache").iterdir()] == []


async def test_a_file_on_another_disk_goes_when_it_is_put(
    store: S3BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_disk(*_: Any, **__: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    file = tmp_path / "file"
    file.write_bytes(b"from a file")
    with monkeypatch.context() as patched:
        patched.setattr(s3, "place", other_disk)
        await store.put_file("a", file)
    assert not file.exists()
    assert (await store.local("a")).read_bytes() == b"from a file"
