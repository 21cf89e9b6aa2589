from __future__ import annotations

import asyncio
import errno
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fl_server.errors import Missing, Unavailable
from fl_server.store.spool import Spool, SpoolFull, Upload

MIB = 1024 * 1024


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "spool"


async def opened(
    folder: Path,
    executor: Executor,
    *,
    max_bytes: int = 100 * MIB,
    fsync: bool = False,
    clock: Callable[[], float] | None = None,
) -> Spool:
    """Each upload is a file: small ones in segments are test_segments.py's."""
    spool = Spool(folder, executor, max_bytes=max_bytes, fsync=fsync, small_bytes=0, clock=clock or Clock())
    await spool.open()
    return spool


@pytest.fixture
async def spool(folder: Path, executor: Executor) -> Spool:
    return await opened(folder, executor)


async def received(spool: Spool, client: str, upload: str, *blocks: bytes) -> str:
    incoming = await spool.begin(client, upload)
    for block in blocks:
        await incoming.write(block)
    return await incoming.finish()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- one upload


@pytest.mark.parametrize(
    "blocks",
    [
        [],
        [b""],
        [b"a", b"", b"bc"],
        [bytes(2 * MIB)],
        [bytes(2 * MIB), b"x"],
        [bytes([n]) * MIB for n in range(7)],
        [bytes(5 * MIB)],
    ],
)
async def test_a_finished_upload_is_found_with_all_its_bytes(spool: Spool, folder: Path, blocks: list[bytes]) -> None:
    data = b"".join(blocks)
    name = await received(spool, "c", "u", *blocks)
    assert spool.find("c", "u") == name
    assert spool.path(name).read_bytes() == data
    assert spool.size_bytes(name) == spool.used_bytes == len(data)
    assert files(folder) == [name]


async def test_an_upload_is_not_found_before_it_is_finished(spool: Spool) -> None:
    upload = await spool.begin("c", "u")
    await upload.write(bytes(3 * MIB))
    assert spool.find("c", "u") is None
    assert upload.size_bytes == spool.used_bytes == 3 * MIB
    name = await upload.finish()
    assert spool.find("c", "u") == name == await upload.finish()
    assert upload.size_bytes == spool.used_bytes == 3 * MIB


async def test_an_upload_of_2_mib_costs_one_call_of_the_executor_and_larger_ones_go_in_large_blocks(
    folder: Path,
) -> None:
    class Counting(ThreadPoolExecutor):
        calls = 0

        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            self.calls += 1
            return super().submit(fn, *args, **kwargs)

    with Counting(1) as executor:
        spool = await opened(folder, executor)
        executor.calls = 0
        await received(spool, "c", "small", *[bytes(64 * 1024)] * 32)
        assert executor.calls == 1
        executor.calls = 0
        await received(spool, "c", "large", *[bytes(64 * 1024)] * 32 * 5)
        assert executor.calls <= 10


async def test_the_newest_of_the_same_ids_wins_and_none_overwrites_another(spool: Spool) -> None:
    first = await received(spool, "c", "u", b"first")
    second = await received(spool, "c", "u", b"second")
    assert first != second
    assert spool.find("c", "u") == second
    assert spool.path(first).read_bytes() == b"first"
    await spool.remove([second])
    assert spool.find("c", "u") == first


async def test_uploads_of_the_same_ids_at_once_are_all_kept(spool: Spool) -> None:
    names = await asyncio.gather(*(received(spool, "c", "u", b"%d" % n) for n in range(20)))
    assert len(set(names)) == 20
    assert spool.find("c", "u") == max(names)


async def test_the_newest_wins_also_after_a_restart_with_the_clock_set_back(folder: Path, executor: Executor) -> None:
    clock = Clock()
    old = await received(await opened(folder, executor, clock=clock), "c", "u", b"old")
    clock.now -= 500
    spool = await opened(folder, executor, clock=clock)
    assert spool.find("c", "u") == old
    new = await received(spool, "c", "u", b"new")
    assert spool.find("c", "u") == new
    assert (await opened(folder, executor, clock=clock)).find("c", "u") == new


@pytest.mark.parametrize("text", ["../x", "/etc/passwd", "\0", "a\0b", "", ".", "é", "\ud800", "a" * 10_240, "a\n"])
async def test_no_text_of_a_client_is_in_a_path(spool: Spool, folder: Path, text: str) -> None:
    name = await received(spool, text, text, b"x")
    assert spool.find(text, text) == name
    assert spool.find(text, "other") is spool.find("other", text) is None
    assert files(folder) == [name]
    assert spool.path(name).parent == folder


async def test_ids_that_are_one_text_together_are_kept_apart(spool: Spool) -> None:
    name = await received(spool, "a", "b\0c", b"x")
    assert spool.find("a\0b", "c") is None
    assert spool.find("a", "b\0c") == name


@pytest.mark.parametrize("name", ["", "../x", "x", "0" * 32, "0" * 32 + "." + "0" * 20 + "\n", "0" * 32 + ".part"])
async def test_a_name_that_is_not_ours_is_a_bug(spool: Spool, name: str) -> None:
    with pytest.raises(AssertionError):
        spool.path(name)


# ---- restart


async def test_a_restart_finds_the_complete_uploads_only(folder: Path, executor: Executor) -> None:
    spool = await opened(folder, executor)
    complete = await received(spool, "c", "complete", b"whole")
    open_upload = await spool.begin("c", "open")
    await open_upload.write(bytes(3 * MIB))
    (folder / f"{complete}.part").write_bytes(b"an inflated form, half written")
    spool = await opened(folder, executor)
    assert spool.find("c", "complete") == complete
    assert spool.find("c", "open") is None
    assert spool.used_bytes == spool.size_bytes(complete) == 5
    assert files(folder) == [complete]


async def test_a_file_that_somebody_put_there_is_left_alone(folder: Path, executor: Executor) -> None:
    await opened(folder, executor)
    (folder / "README").write_text("what is this folder?")
    spool = await opened(folder, executor)
    assert spool.used_bytes == 0
    assert files(folder) == ["README"]


# ---- capacity


async def test_what_does_not_fit_is_refused_with_the_numbers_and_nothing_is_taken(
    folder: Path, executor: Executor
) -> None:
    spool = await opened(folder, executor, max_bytes=10)
    await received(spool, "c", "u", b"123456")
    upload = await spool.begin("d", "u")
    await upload.write(b"123")
    with pytest.raises(SpoolFull, match=r"9 of 10 bytes used, 2 more .*spool_max_bytes"):
        await upload.write(b"45")
    assert spool.used_bytes == 9
    await upload.write(b"4")
    assert spool.path(await upload.finish()).read_bytes() == b"1234"
    assert spool.used_bytes == 10
    assert not issubclass(SpoolFull, Unavailable), "it is no outage"
    assert SpoolFull.grpc_status is Unavailable.grpc_status


async def test_room_comes_by_removal_of_what_is_over(folder: Path, executor: Executor) -> None:
    spool = await opened(folder, executor, max_bytes=10)
    names = [await received(spool, "c", f"{n}", b"12345") for n in range(2)]
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task((await spool.begin("c", "w")).wait_for_room(7))
        await spool.remove(names[:1])
        assert not waiting.done()
        await spool.remove(names[1:])
    assert waiting.done()


async def test_room_comes_by_an_abort(folder: Path, executor: Executor) -> None:
    spool = await opened(folder, executor, max_bytes=10)
    upload = await spool.begin("c", "u")
    await upload.write(b"123456")
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        tasks.create_task((await spool.begin("c", "w")).wait_for_room(10))
        await upload.abort()
    assert spool.used_bytes == 0


async def test_a_wait_for_room_ends_at_the_callers_deadline_and_leaves_nothing(
    folder: Path, executor: Executor
) -> None:
    spool = await opened(folder, executor, max_bytes=10)
    name = await received(spool, "c", "u", b"123456")
    upload = await spool.begin("c", "w")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await upload.wait_for_room(5)
    await spool.remove([name])
    await upload.wait_for_room(10)


async def test_what_will_never_fit_is_not_waited_for(folder: Path, executor: Executor) -> None:
    spool = await opened(folder, executor, max_bytes=10)
    upload = await spool.begin("c", "u")
    await upload.write(b"123456")
    with pytest.raises(SpoolFull, match="11 bytes will never fit"):
        await upload.wait_for_room(5)


async def begun(spool: Spool, *sizes: int) -> list[Upload]:
    uploads = [await spool.begin("c", f"{index}") for index, _ in enumerate(sizes)]
    for upload, size_bytes in zip(uploads, sizes, strict=True):
        await upload.write(b"x" * size_bytes)
    return uploads


async def writing(tasks: asyncio.TaskGroup, uploads: list[Upload], size_bytes: int) -> list[asyncio.Task[bool]]:
    """Each ends with whether it could, or had to give up what it held; the oldest begins to wait last."""

    async def wait(upload: Upload) -> bool:
        while True:
            try:
                await upload.write(b"x" * size_bytes)
                return True
            except SpoolFull:
                try:
                    await upload.wait_for_room(size_bytes)
                except SpoolFull:
                    await upload.abort()
                    return False

    begun = [tasks.create_task(wait(upload)) for upload in reversed(uploads)]
    await asyncio.sleep(0)
    return begun[::-1]


async def test_of_those_that_hold_the_room_together_the_oldest_gets_it(folder: Path, executor: Executor) -> None:
    spool = await opened(folder, executor, max_bytes=10)
    uploads = await begun(spool, 2, 4, 4)
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        first, second, third = await writing(tasks, uploads, 4)
        assert (await first, await third) == (True, False)
        assert not second.done(), "it waits: what the third held was enough"
        await uploads[0].abort()
        assert await second


async def test_nobody_gives_way_where_that_would_not_help(folder: Path, executor: Executor) -> None:
    spool = await opened(folder, executor, max_bytes=10)
    name = await received(spool, "d", "complete", b"123456")
    uploads = await begun(spool, 2, 2)
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        both = await writing(tasks, uploads, 3)
        assert not any(task.done() for task in both)
        await spool.remove([name])
        assert [await task for task in both] == [True, True]


async def test_uploads_found_at_a_restart_count(folder: Path, executor: Executor) -> None:
    await received(await opened(folder, executor), "c", "u", b"123456")
    spool = await opened(folder, executor, max_bytes=10)
    with pytest.raises(SpoolFull):
        await (await spool.begin("d", "u")).write(b"12345")


# ---- abort and failure


@pytest.mark.parametrize("size_bytes", [0, 3, 3 * MIB])
async def test_abort_leaves_nothing_however_often(spool: Spool, folder: Path, size_bytes: int) -> None:
    upload = await spool.begin("c", "u")
    await upload.write(bytes(size_bytes))
    await upload.abort()
    await upload.abort()
    assert spool.used_bytes == 0
    assert files(folder) == []
    with pytest.raises(AssertionError, match="abort"):
        await upload.finish()
    with pytest.raises(AssertionError, match="abort"):
        await upload.write(b"x")


async def test_abort_after_finish_does_nothing(spool: Spool) -> None:
    upload = await spool.begin("c", "u")
    await upload.write(b"x")
    name = await upload.finish()
    await upload.abort()
    assert spool.find("c", "u") == name
    assert spool.path(name).read_bytes() == b"x"
    assert spool.used_bytes == 1


@pytest.fixture
def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After this call the next flush writes a half of its bytes and fails; then there is space again."""
    flush, full = Upload._flush, threading.Event()

    def half(upload: Upload) -> None:
        if not full.is_set():
            flush(upload)
            return
        full.clear()
        whole, data = upload._chunks, b"".join(upload._chunks)
        upload._chunks = [data[: len(data) // 2]]
        flush(upload)
        upload._chunks = whole
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Upload, "_flush", half)
    return full.set


@pytest.mark.parametrize("before_bytes", [0, 5, 4 * MIB])
async def test_a_write_that_failed_took_nothing_and_may_be_repeated(
    spool: Spool, fill_the_disk: Callable[[], None], before_bytes: int
) -> None:
    upload = await spool.begin("c", "u")
    await upload.write(b"a" * before_bytes)
    fill_the_disk()
    with pytest.raises(Unavailable, match="No space left"):
        await upload.write(b"b" * 5 * MIB)
    assert spool.used_bytes == upload.size_bytes == before_bytes
    await upload.write(b"c" * 3 * MIB)
    await upload.write(b"d")
    assert spool.path(await upload.finish()).read_bytes() == b"a" * before_bytes + b"c" * 3 * MIB + b"d"


@pytest.mark.parametrize("before_bytes", [0, 3 * MIB])
async def test_a_finish_that_failed_may_be_repeated(
    spool: Spool, fill_the_disk: Callable[[], None], before_bytes: int
) -> None:
    upload = await spool.begin("c", "u")
    await upload.write(b"a" * before_bytes)
    await upload.write(b"bcde")
    fill_the_disk()
    with pytest.raises(Unavailable):
        await upload.finish()
    assert spool.find("c", "u") is None
    assert spool.path(await upload.finish()).read_bytes() == b"a" * before_bytes + b"bcde"


@pytest.mark.parametrize("before_bytes", [0, 3 * MIB])
async def test_a_disk_without_room_for_what_failed_is_away_until_it_has_it(
    spool: Spool, folder: Path, fill_the_disk: Callable[[], None], before_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    await spool.probe()
    upload = await spool.begin("c", "u")
    await upload.write(b"a" * before_bytes)
    await upload.write(b"b")
    fill_the_disk()
    with pytest.raises(Unavailable):
        await upload.finish()
    free = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=before_bytes - 2 * MIB))
    if before_bytes:
        with pytest.raises(Unavailable, match=f"write {before_bytes + 1} bytes: No space left"):
            await spool.probe()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    await spool.probe()
    await upload.abort()
    assert files(folder) == []


async def test_abort_after_a_failed_finish_leaves_nothing(
    spool: Spool, folder: Path, fill_the_disk: Callable[[], None]
) -> None:
    upload = await spool.begin("c", "u")
    await upload.write(b"abcd")
    fill_the_disk()
    with pytest.raises(Unavailable):
        await upload.finish()
    await upload.abort()
    assert spool.used_bytes == 0
    assert files(folder) == []


async def test_a_finish_whose_folder_was_not_synced_may_be_repeated(
    folder: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = await opened(folder, executor, fsync=True)
    upload = await spool.begin("c", "u")
    await upload.write(bytes(3 * MIB))
    fsync = os.fsync

    def not_the_folder(fd: int) -> None:
        if os.fstat(fd).st_ino == folder.stat().st_ino:
            raise OSError(errno.EIO, "Input/output error")
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", not_the_folder)
        with pytest.raises(Unavailable):
            await upload.finish()
    assert spool.find("c", "u") is None
    name = await upload.finish()
    assert spool.find("c", "u") == name
    assert spool.used_bytes == spool.path(name).stat().st_size == 3 * MIB


@pytest.mark.parametrize("cancelled_in", ["write", "finish"])
async def test_a_call_cancelled_while_its_thread_works_leaves_nothing_after_abort(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cancelled_in: str
) -> None:
    """abort() runs in a second thread, before the first has made the file."""
    entered, gate, loop, flush = asyncio.Event(), threading.Event(), asyncio.get_running_loop(), Upload._flush

    def late(upload: Upload) -> None:
        loop.call_soon_threadsafe(entered.set)
        assert gate.wait(10)
        flush(upload)

    monkeypatch.setattr(Upload, "_flush", late)
    with ThreadPoolExecutor(2) as executor:
        spool = await opened(folder, executor)
        upload = await spool.begin("c", "u")
        if cancelled_in == "finish":
            await upload.write(b"x")
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            call = upload.write(bytes(3 * MIB)) if cancelled_in == "write" else upload.finish()
            task: asyncio.Task[Any] = tasks.create_task(call)
            await entered.wait()
            task.cancel()
        await upload.abort()
        gate.set()
    assert spool.used_bytes == 0
    assert spool.find("c", "u") is None
    assert files(folder) == []


async def test_with_fsync_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_answer(
    folder: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = await opened(folder, executor, fsync=True)
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
    await received(spool, "c", "u", b"x")
    assert done == ["bytes", "name", "folder"]


# ---- replace, missing, remove, stale


async def test_replace_puts_a_file_in_the_place_of_the_upload(spool: Spool, folder: Path) -> None:
    name = await received(spool, "c", "u", b"deflated")
    inflated = folder / f"{name}.part"
    inflated.write_bytes(b"inflated, and longer")
    for _ in range(2):
        await spool.replace(name, inflated)
        assert spool.path(name).read_bytes() == b"inflated, and longer"
        assert spool.size_bytes(name) == spool.used_bytes == 20
        assert files(folder) == [name]
    assert spool.find("c", "u") == name


async def test_replace_with_neither_file_nor_upload_is_missing(spool: Spool, folder: Path) -> None:
    name = await received(spool, "c", "u", b"x")
    await spool.remove([name])
    with pytest.raises(Missing, match=name):
        await spool.replace(name, folder / f"{name}.part")
    assert spool.used_bytes == 0


async def test_missing_asks_the_disk(spool: Spool) -> None:
    names = [await received(spool, "c", f"{n}", b"x") for n in range(3)]
    spool.path(names[1]).unlink()
    never = "0" * 32 + "." + "0" * 20
    assert await spool.missing([*names, never, ""]) == {names[1], never, ""}
    assert await spool.missing([]) == set()


async def test_remove_passes_over_empty_names_and_what_is_gone(spool: Spool, folder: Path) -> None:
    names = [await received(spool, "c", f"{n}", b"x") for n in range(600)]
    await spool.remove(["", *names[:599], ""])
    await spool.remove(names[:2])
    assert files(folder) == names[599:]
    assert spool.used_bytes == 1
    assert spool.find("c", "0") is None
    with pytest.raises(Missing):
        spool.size_bytes(names[0])


async def test_stale_names_what_was_complete_before_a_time_oldest_first(folder: Path, executor: Executor) -> None:
    clock = Clock()
    spool = await opened(folder, executor, clock=clock)
    names = []
    for clock.now in (1_000.0, 2_000.0, 3_000.0):
        names.append(await received(spool, f"c{clock.now}", "u", b"x"))
    slow = await spool.begin("slow", "u")
    assert spool.stale(1_000.0) == []
    assert spool.stale(2_500.0) == names[:2]
    clock.now = 4_000.0
    assert await slow.finish() not in spool.stale(4_000.0)
    assert (await opened(folder, executor)).stale(3_500.0) == names


# ---- copies


async def test_a_linked_upload_may_be_moved_away_and_stays(spool: Spool, folder: Path, tmp_path: Path) -> None:
    name = await received(spool, "a", "u", b"bytes")
    async with spool.linked(name) as link:
        link.rename(tmp_path / "copy")
    async with spool.linked(name):
        pass
    assert (tmp_path / "copy").read_bytes() == spool.path(name).read_bytes() == b"bytes"
    assert files(folder) == [name]


async def test_an_upload_is_copied_where_the_file_system_has_no_links(
    spool: Spool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    name = await received(spool, "a", "u", b"bytes")
    async with spool.linked(name) as copy:
        assert copy.read_bytes() == b"bytes"
    assert files(folder) == [name]


async def test_an_upload_that_is_gone_has_no_link(spool: Spool, folder: Path) -> None:
    name = await received(spool, "a", "u", b"bytes")
    spool.path(name).unlink()
    with pytest.raises(Missing):
        async with spool.linked(name):
            raise AssertionError
    assert files(folder) == []


async def test_a_lost_upload_is_restored_from_a_copy_which_stays(spool: Spool, folder: Path, tmp_path: Path) -> None:
    name = await received(spool, "a", "u", b"bytes")
    copy = tmp_path / "copy"
    copy.write_bytes(b"bytes")
    spool.path(name).unlink()
    await spool.restore(name, copy)
    assert await spool.missing([name]) == set()
    assert (spool.find("a", "u"), spool.used_bytes, files(folder)) == (name, 5, [name])
    assert copy.read_bytes() == b"bytes"


# ---- files that are written over

LARGE = 3 * MIB


async def test_a_removed_uploads_file_is_written_over_by_the_next_one(folder: Path, executor: Executor) -> None:
    spool = await opened(folder, executor)
    names = [await received(spool, "c", f"{number}", b"a" * (LARGE + 5)) for number in range(2)]
    numbers = {spool.path(name).stat().st_ino for name in names}
    await spool.remove(names)
    assert spool.used_bytes == 0
    next_one = await received(spool, "c", "v", b"b" * LARGE)
    assert spool.path(next_one).stat().st_ino in numbers
    assert spool.path(next_one).read_bytes() == b"b" * LARGE
    assert len(files(folder)) == 2


async def test_the_last_file_to_write_over_is_left_for_the_rounds_model(folder: Path, executor: Executor) -> None:
    spool = await opened(folder, executor)
    names = [await received(spool, "c", f"{size}", b"a" * size) for size in (LARGE, 2 * LARGE)]
    numbers = [spool.path(name).stat().st_ino for name in names]
    await spool.remove(names)
    assert spool.take_spare(10) is None, "a small file is not worth it"
    assert (nearest := spool.take_spare(LARGE + 5)) is not None
    assert nearest.stat().st_ino == numbers[0]
    uploaded = await received(spool, "c", "v", b"b" * LARGE)
    assert spool.path(uploaded).stat().st_ino != numbers[1]
    assert (last := spool.take_spare(LARGE)) is not None
    assert last.stat().st_ino == numbers[1]
    assert spool.take_spare(LARGE) is None


async def test_what_somebody_keeps_is_not_written_over(folder: Path, executor: Executor) -> None:
    spool = await opened(folder, executor)
    name, kept = await received(spool, "c", "u", b"a" * LARGE), folder.parent / "kept"
    async with spool.linked(name) as link:
        link.rename(kept)
    await spool.remove([name])
    await received(spool, "c", "v", b"b" * LARGE)
    assert kept.read_bytes() == b"a" * LARGE


async def test_files_to_write_over_are_within_the_spools_size_and_go_at_a_restart(
    folder: Path, executor: Executor
) -> None:
    spool = await opened(folder, executor, max_bytes=2 * LARGE)
    names = [await received(spool, "c", f"{number}", b"a" * LARGE) for number in range(2)]
    await spool.remove(names[:1])
    assert len(files(folder)) == 1  # the other one is still there
    await spool.remove(names[1:])
    assert len(files(folder)) == 1
    await opened(folder, executor)
    assert files(folder) == []


async def test_a_file_to_write_over_that_somebody_has_removed_is_not_missed(folder: Path, executor: Executor) -> None:
    spool = await opened(folder, executor)
    await spool.remove([await received(spool, "c", f"{number}", b"a" * LARGE) for number in range(2)])
    for path in folder.iterdir():
        path.unlink()
    name = await received(spool, "c", "v", b"b" * LARGE)
    assert spool.path(name).read_bytes() == b"b" * LARGE


async def test_a_disk_that_is_probed_for_room_gets_that_of_files_to_write_over(
    folder: Path, executor: Executor
) -> None:
    spool = await opened(folder, executor)
    await spool.remove([await received(spool, "c", "u", b"a" * LARGE)])
    await spool.probe()
    assert files(folder) == []


async def test_a_file_is_written_over_also_if_whoever_removed_it_was_cancelled(
    folder: Path, executor: Executor
) -> None:
    spool = await opened(folder, executor)
    names = [await received(spool, "c", f"{number}", b"a" * LARGE) for number in range(2)]
    numbers = {spool.path(name).stat().st_ino for name in names}
    removing = asyncio.create_task(spool.remove(names))
    await asyncio.sleep(0)
    removing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await removing
    await spool.missing([])  # behind it in the executor
    next_one = await received(spool, "c", "v", b"b" * LARGE)
    assert spool.path(next_one).stat().st_ino in numbers
