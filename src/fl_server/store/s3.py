"""BlobStore in an S3 bucket, through aioboto3: any server that speaks plain S3 (AWS, MinIO, SeaweedFS, …).

An object has the blob's key and its plain bytes. What is read as a file is kept in a folder of its own, which is a
cache: it is emptied at the start, and bounded. Refused credentials and a missing bucket count as away, not as gone:
an operator can put them right, and nothing is lost meanwhile.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Executor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import aioboto3
import aiohttp
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from fl_server.errors import Corrupt, Invalid, Missing, Unavailable
from fl_server.store.disk import PART, disk_errors, make_folder, place

T = TypeVar("T")

PART_BYTES = 8 * 2**20  # of a multipart upload, and of what a download holds in memory; the driver copies each
MULTIPART_BYTES = 32 * 2**20  # larger blobs are put in parts
PARTS_AT_ONCE = 4
OPEN_TIMEOUT_S = 8.0
_CONNECT_TIMEOUT_S = 3.0
_READ_TIMEOUT_S = 30.0  # without a byte
_ATTEMPTS = 2
_READS_IN_VAIN = 2
_KEPT_FILES = 8  # the newest stay in the cache whatever their size: who was just given a path will open it

_KEY = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,200}")
_NO_OBJECT = {"NoSuchKey", "404", "NotFound"}
_HOPELESS = {"EntityTooLarge", "KeyTooLongError", "InvalidBucketName"}
_REFUSED = {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "Forbidden", "401"}


@dataclass(frozen=True, slots=True)
class S3:
    """A server. Without keys, those that AWS' own clients would find (environment, role)."""

    endpoint_url: str
    access_key: str = ""
    secret_key: str = field(default="", repr=False)
    region: str = "us-east-1"


class S3BlobStore:
    """prefix: of the objects' names ("updates/"); what lies deeper in the bucket belongs to others."""

    def __init__(
        self, server: S3, bucket: str, cache: Path, executor: Executor, *, cache_bytes: int, prefix: str = ""
    ) -> None:
        self._server, self._bucket, self._prefix = server, bucket, prefix
        self._cache, self._executor, self._cache_bytes = cache, executor, cache_bytes
        self._cached: dict[str, int] = {}  # bytes by key, the last used last
        self._parts = itertools.count()
        self._client: Any = None  # aioboto3 has no types
        self._closing = AsyncExitStack()

    # ---- life

    async def open(self) -> None:
        """Makes the bucket if there is none, and ends uploads that an earlier process began."""

        def work() -> None:
            make_folder(self._cache, fsync=False)
            for path in self._cache.iterdir():
                path.unlink(missing_ok=True)

        await self._run(f"emptying {self._cache}", work)
        config = Config(
            signature_version="s3v4",
            # signing the bytes too would hash them on the loop; TLS does better what it is for
            s3={"addressing_style": "path", "payload_signing_enabled": False},
            connect_timeout=_CONNECT_TIMEOUT_S,
            read_timeout=_READ_TIMEOUT_S,
            retries={"total_max_attempts": _ATTEMPTS, "mode": "standard"},
            request_checksum_calculation="when_required",  # trailing checksums are not for every server
            response_checksum_validation="when_required",
        )
        server = self._server
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S), self._errors("opening"):
                session = aioboto3.Session(
                    aws_access_key_id=server.access_key or None,
                    aws_secret_access_key=server.secret_key or None,
                    region_name=server.region,
                )
                opening = session.client("s3", endpoint_url=server.endpoint_url, config=config)
                self._client = await self._closing.enter_async_context(opening)
                await self._make_bucket()
                await self._end_uploads()
        except ValueError as wrong:
            await self.close()
            raise Invalid(f"s3_endpoint_url: {wrong}") from None
        except Missing:
            await self.close()
            raise Unavailable(f"{self._where()}: what answers there is no S3 server") from None
        except TimeoutError:
            await self.close()
            raise Unavailable(f"{self._where()}: no answer within {OPEN_TIMEOUT_S:.0f} s") from None
        except BaseException:
            await self.close()
            raise

    async def _make_bucket(self) -> None:
        try:
            await self._client.head_bucket(Bucket=self._bucket)
        except ClientError as exc:
            if _code(exc) not in {*_NO_OBJECT, "NoSuchBucket"}:
                raise
            where = {} if self._server.region == "us-east-1" else {"LocationConstraint": self._server.region}
            made = {"CreateBucketConfiguration": where} if where else {}
            await self._client.create_bucket(Bucket=self._bucket, **made)

    async def _end_uploads(self) -> None:
        listing = self._client.get_paginator("list_multipart_uploads")
        async for page in listing.paginate(Bucket=self._bucket, Prefix=self._prefix):
            for upload in page.get("Uploads", []):
                if self._is_ours(upload["Key"]):
                    await self._abort(upload["Key"], upload["UploadId"])

    async def close(self) -> None:
        self._client = None
        await self._closing.aclose()

    # ---- blobs

    async def put(self, key: str, data: bytes) -> None:
        name = self._name(key)
        async with self._errors(f"put {key}"):
            await self._open_client().put_object(
                Bucket=self._bucket, Key=name, Body=data, ContentType="application/octet-stream"
            )

    async def put_file(self, key: str, path: Path) -> None:
        name = self._name(key)

        def size() -> int | None:
            return path.stat().st_size if path.exists() else None

        size_bytes = await self._run(f"put {key}", size)
        if size_bytes is None:
            if await self.size_bytes(key) is None:
                raise Missing(f"put {key}: neither {path} nor the blob is there")
            return
        if size_bytes > MULTIPART_BYTES:
            async with self._errors(f"put {key}"):
                await self._put_parts(name, path, size_bytes)
        else:
            await self.put(key, await self._run(f"put {key}", path.read_bytes))
        await self._keep(key, path)

    async def _put_parts(self, name: str, path: Path, size_bytes: int) -> None:
        client = self._open_client()
        begun = await client.create_multipart_upload(
            Bucket=self._bucket, Key=name, ContentType="application/octet-stream"
        )
        upload = {"Bucket": self._bucket, "Key": name, "UploadId": begun["UploadId"]}
        numbers = iter(range(1, -(-size_bytes // PART_BYTES) + 1))
        etags: dict[int, str] = {}

        def read(number: int) -> bytes:
            with path.open("rb") as file:
                file.seek((number - 1) * PART_BYTES)
                return file.read(PART_BYTES)

        async def put_some() -> None:
            for number in numbers:
                data = await self._run(f"put {name}", partial(read, number))
                part = await client.upload_part(**upload, PartNumber=number, Body=data)
                etags[number] = part["ETag"]

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(PARTS_AT_ONCE):
                    tasks.create_task(put_some(), name=f"put {name}")
            parts = [{"PartNumber": number, "ETag": etags[number]} for number in sorted(etags)]
            await client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except BaseException as why:
            if not isinstance(why, asyncio.CancelledError):  # then open() ends it, at the next start
                await self._abort(name, begun["UploadId"])
            if isinstance(why, BaseExceptionGroup):  # what one of the parts met
                raise why.exceptions[0] from None
            raise

    async def _abort(self, name: str, upload_id: str) -> None:
        """Its parts cost room until then; if it fails, the next open() does it."""
        try:
            await self._open_client().abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload_id)
        except (ClientError, BotoCoreError, aiohttp.ClientError, TimeoutError, OSError):
            pass

    async def local(self, key: str) -> Path:
        """Stays while it is among the last few that were asked for, or fits: open it at once. Raises Missing."""
        name, path = self._name(key), self._cache / key
        if key in self._cached and await self._run(f"local {key}", path.exists):
            self._use(key, self._cached[key])
            return path
        part = self._cache / f".{key}.{next(self._parts)}{PART}"
        try:
            await self._fetch(key, name, part)
            await self._keep(key, part)
        finally:
            await self._run(f"get {key}", lambda: part.unlink(missing_ok=True))
        return path

    async def _fetch(self, key: str, name: str, part: Path) -> None:
        """A read that was cut goes on where it was: the first tries that bring nothing end it."""
        size_bytes, in_vain = 0, 0
        same: dict[str, str] = {}
        while True:
            more = {**same, "Range": f"bytes={size_bytes}-"} if size_bytes else {}
            try:
                async with self._errors(f"get {key}"):
                    got = await self._open_client().get_object(Bucket=self._bucket, Key=name, **more)
                    async with got["Body"]:
                        same = {"IfMatch": got["ETag"]}
                        await self._write(part, got["Body"], size_bytes if "ContentRange" in got else 0)
                    return
            except Unavailable:
                former, size_bytes = size_bytes, await self._run(f"get {key}", lambda: _size_bytes(part))
                in_vain = 0 if size_bytes > former else in_vain + 1
                if not same or in_vain > _READS_IN_VAIN:
                    raise

    async def _write(self, part: Path, body: Any, at: int) -> None:
        """Behind the first `at` bytes. It comes in pieces as small as the network's, and is written in larger ones.

        No file is open between two: who is cancelled could not close one that a thread is opening.
        """

        def append(data: bytearray, at: int) -> None:
            with part.open("ab" if at else "wb") as file:
                file.write(data)

        doing, buffer = f"write {part.name}", bytearray()
        try:
            while data := await body.read(PART_BYTES):
                buffer += data
                if len(buffer) >= PART_BYTES:
                    await self._run(doing, partial(append, buffer, at))
                    at += len(buffer)
                    buffer = bytearray()
        except Exception:  # cut: what has come is where the next read begins
            await self._run(doing, partial(append, buffer, at))
            raise
        await self._run(doing, partial(append, buffer, at))

    async def get(self, key: str) -> bytes:
        name = self._name(key)
        async with self._errors(f"get {key}"):
            got = await self._open_client().get_object(Bucket=self._bucket, Key=name)
            async with got["Body"]:
                return bytes(await got["Body"].read())

    async def size_bytes(self, key: str) -> int | None:
        name = self._name(key)
        try:
            async with self._errors(f"size of {key}"):
                return int((await self._open_client().head_object(Bucket=self._bucket, Key=name))["ContentLength"])
        except Missing:
            return None

    async def delete(self, keys: Iterable[str]) -> None:
        names = {key: self._name(key) for key in keys}
        for key, name in names.items():  # one by one: not every server takes a list
            try:
                async with self._errors(f"delete {key}"):
                    await self._open_client().delete_object(Bucket=self._bucket, Key=name)
            except Missing:
                pass
            await self._forget(key)

    async def keys(self) -> list[tuple[str, float]]:
        found: list[tuple[str, float]] = []
        async with self._errors("list"):
            listing = self._open_client().get_paginator("list_objects_v2")
            async for page in listing.paginate(Bucket=self._bucket, Prefix=self._prefix, Delimiter="/"):
                found += [
                    (blob["Key"][len(self._prefix) :], blob["LastModified"].timestamp())
                    for blob in page.get("Contents", [])
                    if self._is_ours(blob["Key"])
                ]
        return found

    def _name(self, key: str) -> str:
        if not _KEY.fullmatch(key):
            raise AssertionError(f"{key[:250]!r} is no key of ours")
        return self._prefix + key

    def _is_ours(self, name: str) -> bool:
        return name.startswith(self._prefix) and bool(_KEY.fullmatch(name[len(self._prefix) :]))

    # ---- the cache

    async def _keep(self, key: str, path: Path) -> None:
        """The file, whose bytes are the blob's, moves into the cache; elsewhere than on its disk, it goes."""
        target = self._cache / key

        def work() -> int | None:
            size_bytes = path.stat().st_size
            try:
                place(path, target, fsync=False)
            except OSError:
                path.unlink()
                return None
            return size_bytes

        size_bytes = await self._run(f"keep {key}", work)
        if size_bytes is not None:
            self._use(key, size_bytes)
            while sum(self._cached.values()) > self._cache_bytes and len(self._cached) > _KEPT_FILES:
                await self._forget(next(iter(self._cached)))

    def _use(self, key: str, size_bytes: int) -> None:
        self._cached.pop(key, None)
        self._cached[key] = size_bytes

    async def _forget(self, key: str) -> None:
        if self._cached.pop(key, None) is not None:
            await self._run(f"forget {key}", lambda: (self._cache / key).unlink(missing_ok=True))

    async def _run(self, doing: str, work: Callable[[], T]) -> T:
        def on_thread() -> T:
            with disk_errors(doing):
                return work()

        return await asyncio.get_running_loop().run_in_executor(self._executor, on_thread)

    # ---- the driver

    def _open_client(self) -> Any:
        if self._client is None:
            raise AssertionError(f"{self._where()} is not open")
        return self._client

    def _where(self) -> str:
        return f"S3 at {self._server.endpoint_url}, bucket {self._bucket}"

    @asynccontextmanager
    async def _errors(self, doing: str) -> AsyncIterator[None]:
        try:
            yield
        except ClientError as exc:
            code = _code(exc)
            if code in _NO_OBJECT:
                raise Missing(f"{self._where()}: {doing}: there is no such blob") from exc
            if code in _HOPELESS:
                raise Corrupt(f"{self._where()}: {doing}: {code}") from exc
            hint = ": check s3_access_key and s3_secret_key" if code in _REFUSED else ""
            raise Unavailable(f"{self._where()}: {doing}: {code}{hint}") from exc
        except (BotoCoreError, aiohttp.ClientError, TimeoutError, ConnectionError) as exc:
            raise Unavailable(f"{self._where()}: {doing}: {exc or type(exc).__name__}") from exc


@asynccontextmanager
async def opened(
    server: S3, bucket: str, cache: Path, executor: Executor, *, cache_bytes: int, prefix: str = ""
) -> AsyncIterator[S3BlobStore]:
    store = S3BlobStore(server, bucket, cache, executor, cache_bytes=cache_bytes, prefix=prefix)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


def _size_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _code(exc: ClientError) -> str:
    return str(exc.response.get("Error", {}).get("Code", exc.response["ResponseMetadata"]["HTTPStatusCode"]))
