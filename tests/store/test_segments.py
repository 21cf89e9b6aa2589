"""Small uploads: the Spool's promises again, where many lie in one file."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_server.errors import Missing, Unavailable
from fl_server.store import segments
from fl_server.store.spool import Spool


async def opened(folder: Path, executor: Executor, *, fsync: bool = False) -> Spool:
    spool = Spool(folder, executor, max_bytes=10**9, fsync=fsync)
    await spool.open()
    return spool


async def received(spool: Spool, upload: str, data: bytes) -> str:
    incoming = await spool.begin("c", upload)
    assert incoming.buffer(data)
    return await incoming.finish()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".spare.part"))


def content(spool: Spool, name: str) -> bytes:
    found = spool.content(name)
    return found if isinstance(found, bytes) else found.read_bytes()


@pytest.mark.parametrize("recent_bytes", [0, segments.RECENT_BYTES], ids=["read again", "in memory"])
@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["put", "remove", "restart"])), max_size=25))
def test_what_was_put_and_not_removed_is_there_whatever_happened(
    recent_bytes: int, steps: list[tuple[int, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Segments so short that they are closed and emptied all the time."""

    async def walk(folder: Path, executor: Executor) -> None:
        spool = await opened(folder, executor)
        expected: dict[str, bytes] = {}
        for count, (key, what) in enumerate(steps):
            if what == "put":
                data = bytes([count]) * (key * 20)
                expected[await received(spool, f"{key}", data)] = data
            elif what == "remove":
                gone = list(expected)[: key + 1]
                await spool.remove(gone)
                for name in gone:
                    del expected[name]
            else:
                spool = await opened(folder, executor)
                await spool.remove([name for name in spool.stale(float("inf")) if name not in expected])
            assert {name: content(spool, name) for name in spool.stale(float("inf"))} == expected
            assert await spool.missing(expected) == set()
            assert spool.used_bytes == sum(map(len, expected.values()))
        spool = await opened(folder, executor)
        assert {name: content(spool, name) for name in expected} == expected

    with pytest.MonkeyPatch.context() as patched, ThreadPoolExecutor(1) as executor:
        patched.setattr(segments, "SEGMENT_BYTES", 400)
        patched.setattr(segments, "RECENT_BYTES", recent_bytes)
        asyncio.run(walk(tmp_path_factory.mktemp("spool"), executor))


async def test_nothing_stays_on_the_disk_when_all_is_removed(tmp_path: Path, executor: Executor) -> None:
    spool = await opened(tmp_path, executor)
    names = [await received(spool, f"{n}", bytes(1000)) for n in range(20)]
    assert len(files(tmp_path)) == 1
    await spool.remove(names)
    another = await received(spool, "another", b"x")  # its write comes after the removal
    assert len(list(tmp_path.iterdir())) == 1  # written over
    spool = await opened(tmp_path, executor)
    assert spool.stale(float("inf")) == [another]


async def test_a_file_is_written_over_and_its_former_contents_are_none(tmp_path: Path, executor: Executor) -> None:
    spool = await opened(tmp_path, executor)
    names = [await received(spool, f"{n}", b"%03d" % n * 100) for n in range(20)]
    [former] = files(tmp_path)
    inode = (tmp_path / former).stat().st_ino
    await spool.remove(names)
    later = [await received(spool, f"later {n}", b"%03d" % -n * 100) for n in range(3)]
    [again] = files(tmp_path)
    status = (tmp_path / again).stat()
    assert again != former
    assert (status.st_ino, status.st_size > 20 * 300) == (inode, True)
    spool = await opened(tmp_path, executor)
    assert {name: content(spool, name) for name in spool.stale(float("inf"))} == {
        name: b"%03d" % -n * 100 for n, name in enumerate(later)
    }


class Killed(BaseException):
    pass


@pytest.mark.parametrize("write", [1, 2], ids=["the first in its file", "behind another"])
@pytest.mark.parametrize("over", [False, True], ids=["a new file", "over a former one"])
async def test_of_a_write_that_was_cut_off_nothing_is_found(
    tmp_path: Path, write: int, over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each of its bytes; two uploads are in it, and as large ones were there before."""

    async def together(spool: Spool, *uploads: str) -> list[str]:
        begun = [await spool.begin("c", upload) for upload in uploads]  # so they wait for each other
        for upload, incoming in zip(uploads, begun, strict=True):
            assert incoming.buffer(upload.encode() * 9)
        return await asyncio.gather(*(incoming.finish() for incoming in begun))

    async def life(folder: Path, cut: int) -> tuple[set[str], set[str], int]:
        """What was answered, what is found in the next life, and how many bytes were written at last."""
        writing = 0

        def cut_off(fd: int, parts: Any, at: int) -> None:
            nonlocal writing
            data = b"".join(parts)
            if cut >= 0:
                data = data[: max(0, cut - writing)]
            os.pwrite(fd, data, at)
            writing += len(b"".join(parts))
            if writing > cut >= 0:
                raise Killed

        with ThreadPoolExecutor(1) as executor, monkeypatch.context() as patched:
            spool = await opened(folder, executor)
            if over:
                await spool.remove(await together(spool, "u", "v", "w", "x", "y", "z"))
            answered = set(await together(spool, "a", "b")) if write == 2 else set[str]()
            patched.setattr(segments, "write_all", cut_off)
            try:
                answered |= set(await together(spool, "c", "d"))
            except Killed:
                pass
            patched.undo()
            spool = await opened(folder, executor)
            found = spool.stale(float("inf"))
            assert all(content(spool, name) in (b"a" * 9, b"b" * 9, b"c" * 9, b"d" * 9) for name in found)
            return answered, set(found), writing

    answered, found, size_bytes = await life(tmp_path / "whole", -1)
    assert size_bytes > 2 * 84
    assert answered == found
    assert len(found) == 2 * write
    for cut in range(size_bytes):
        answered, found, _ = await life(tmp_path / f"{cut}", cut)
        assert answered == found


async def test_one_that_is_moved_while_it_is_read_is_read_again(
    tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its former place may be written over by then."""
    monkeypatch.setattr(segments, "RECENT_BYTES", 0)
    spool = await opened(tmp_path, executor)
    name = await received(spool, "a", b"bytes")
    place = spool._segments._places[name]
    read = segments._read

    def moved(name: str, found: Any) -> bytes:
        if found is place:
            spool._segments._places[name] = segments._Place(place.segment, place.start, place.size_bytes, None)
            return b"other"
        return read(name, found)

    monkeypatch.setattr(segments, "_read", moved)
    assert content(spool, name) == b"bytes"


async def test_spared_files_make_room_where_a_disk_has_none(tmp_path: Path, executor: Executor) -> None:
    spool = await opened(tmp_path, executor)
    await spool.remove([await received(spool, "a", b"bytes")])
    async with asyncio.timeout(30):
        while not spool._segments._spares:
            await asyncio.sleep(0.001)
    assert list(tmp_path.glob("*.spare.part"))
    await spool.probe()
    assert list(tmp_path.iterdir()) == []
    name = await received(spool, "b", b"b")
    assert content(spool, name) == b"b"


async def test_a_large_file_is_not_spared(tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_SPARE_BYTES", 1000)
    spool = await opened(tmp_path, executor)
    await spool.remove([await received(spool, "a", bytes(1000))])
    another = await received(spool, "b", b"b")
    assert content(spool, another) == b"b"
    assert len(list(tmp_path.iterdir())) == 1


async def test_a_file_that_cannot_be_spared_is_removed(
    tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "no room for a name")

    spool = await opened(tmp_path, executor)
    name = await received(spool, "a", bytes(1000))
    monkeypatch.setattr(Path, "replace", refused)
    await spool.remove([name])
    another = await received(spool, "b", b"b")
    assert content(spool, another) == b"b"
    assert [path.name for path in tmp_path.iterdir()] == ["000000000002.segment"]


async def test_what_could_not_be_removed_is_removed_later(
    tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = await opened(tmp_path, executor)
    name = await received(spool, "a", bytes(1000))

    def refused(self: Path, *_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, "the disk is ill")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refused)
        patched.setattr(Path, "unlink", refused)
        await spool.remove([name])
        incoming = await spool.begin("c", "b")
        assert incoming.buffer(b"b")
        while spool._segments._writing:
            await asyncio.sleep(0)
        with pytest.raises(Unavailable):  # it goes with the removal
            await incoming.finish()
    assert await incoming.finish()
    await received(spool, "c", b"c")
    assert files(tmp_path) == ["000000000002.segment"]


async def test_a_write_that_failed_leaves_the_file_as_it_was(
    tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its bytes were written and could not be synced."""

    def refused(fd: int) -> None:
        raise OSError(errno.EIO, "the disk is ill")

    spool = await opened(tmp_path, executor, fsync=True)
    first = await received(spool, "a", bytes(1000))
    [file] = files(tmp_path)
    size_bytes = (tmp_path / file).stat().st_size
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refused)
        with pytest.raises(Unavailable):
            await received(spool, "b", b"b" * 1000)
    assert (tmp_path / file).stat().st_size == size_bytes
    spool = await opened(tmp_path, executor, fsync=True)
    assert spool.stale(float("inf")) == [first]


async def test_where_it_syncs_bytes_under_another_head_are_not_whole(
    tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss of power a head may be there in part, in front of it what was there before."""
    monkeypatch.setattr(segments, "RECENT_BYTES", 0)
    spool = await opened(tmp_path, executor, fsync=True)
    name = await received(spool, "a", bytes(1000))
    [file] = files(tmp_path)
    data = bytearray((tmp_path / file).read_bytes())
    for begin, end, size_bytes in [(24, 28, 1000), (24, 36, 0)]:  # the CRC; the CRC and the size
        (tmp_path / file).write_bytes(data[:begin] + bytes(end - begin) + data[end:])
        spool = await opened(tmp_path, executor, fsync=True)
        assert spool.size_bytes(name) == size_bytes
        with pytest.raises(FileNotFoundError, match="not whole"):
            spool.content(name)


async def test_a_write_that_finds_no_room_gives_up_what_is_spared(
    tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 100)
    spool = await opened(tmp_path, executor)
    await spool.remove([await received(spool, f"{n}", bytes(100)) for n in range(4)])
    while spool._segments._writing:
        await asyncio.sleep(0)
    assert len(list(tmp_path.glob("*.spare.part"))) == 4

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no room")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", full)
        with pytest.raises(Unavailable):
            await received(spool, "more", b"x")
    assert list(tmp_path.glob("*.spare.part")) == [tmp_path / "000000000004.spare.part"]  # its own
    await received(spool, "more", b"x")


async def test_an_upload_that_comes_while_the_process_stops_is_told_to_come_again(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as executor:
        spool = await opened(tmp_path, executor)
    async with asyncio.timeout(30):
        with pytest.raises(Unavailable, match="come again"):
            await received(spool, "a", b"a")


async def test_more_uploads_than_go_into_one_call_are_written_together(tmp_path: Path) -> None:
    with Counting(1) as executor:
        spool = await opened(tmp_path, executor)
        begun = [await spool.begin("c", f"{n}") for n in range(600)]
        for number, incoming in enumerate(begun):
            for part in b"%03d" % number, b"%03d" % -number:
                assert incoming.buffer(part)
        names = await asyncio.gather(*(incoming.finish() for incoming in begun))
        spool = await opened(tmp_path, executor)
        assert [content(spool, name) for name in names] == [b"%03d%03d" % (n, -n) for n in range(600)]


class Counting(ThreadPoolExecutor):
    calls = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.calls += 1
        return super().submit(fn, *args, **kwargs)


async def test_a_removal_of_many_lets_others_have_their_turn_and_moves_nothing_that_is_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 100)  # each of these uploads fills one
    with Counting(1) as executor:
        spool = await opened(tmp_path, executor)
        names = [await received(spool, f"{n}", bytes(100)) for n in range(600)]
        executor.calls = 0
        removing = asyncio.create_task(spool.remove(names))
        left = set()
        while not removing.done():
            await asyncio.sleep(0)
            left.add(spool.used_bytes // 100)
        assert left == {600 - 256, 600 - 2 * 256, 0}
        assert executor.calls == 1
    assert files(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 4  # to be written over


async def test_uploads_that_come_while_one_is_written_are_written_together(tmp_path: Path) -> None:
    with Counting(1) as executor:
        spool = await opened(tmp_path, executor)
        executor.calls = 0
        names = await asyncio.gather(*(received(spool, f"{n}", b"%d" % n) for n in range(50)))
        assert executor.calls == 2
        assert [content(spool, name) for name in names] == [b"%d" % n for n in range(50)]


async def test_an_upload_waits_for_those_that_are_coming_and_not_for_nobody(
    tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "GATHERED_S", 1e6)  # for ever: only what has come lets a write begin
    spool, written = await opened(tmp_path, executor), []
    append = spool._segments._append

    def counted(target: Any, records: Any) -> Any:
        written.append(len(records))
        return append(target, records)

    monkeypatch.setattr(spool._segments, "_append", counted)
    await received(spool, "alone", b"x")
    coming = [await spool.begin("c", f"{index}") for index in range(5)]
    for upload in coming:
        assert upload.buffer(b"y")
    first = [asyncio.ensure_future(upload.finish()) for upload in coming[:3]]
    await asyncio.sleep(0)
    assert not any(one.done() for one in first) and written == [1]
    await coming[3].abort()
    await coming[4].finish()
    await asyncio.gather(*first)
    assert written == [1, 4]
    assert spool._segments.coming == 0


async def test_an_upload_does_not_wait_long_for_one_that_does_not_come(tmp_path: Path, executor: Executor) -> None:
    spool = await opened(tmp_path, executor)
    late = await spool.begin("c", "late")
    name = await asyncio.wait_for(received(spool, "here", b"x"), 60)
    assert content(spool, name) == b"x"
    await late.abort()


@pytest.mark.parametrize("cut_bytes", [1, 50, 99, 100, 150])
async def test_a_record_that_is_not_whole_is_not_there_after_a_restart(
    tmp_path: Path, executor: Executor, cut_bytes: int
) -> None:
    spool = await opened(tmp_path, executor)
    whole, cut = [await received(spool, text, text.encode() * 100) for text in "ab"]
    [file] = tmp_path.iterdir()
    os.truncate(file, file.stat().st_size - cut_bytes)
    assert await spool.missing([whole, cut]) == {cut}
    spool = await opened(tmp_path, executor)
    assert spool.find("c", "b") is None
    assert content(spool, whole) == b"a" * 100
    new = await received(spool, "b", b"again")
    assert content(await opened(tmp_path, executor), new) == b"again"


async def test_with_fsync_bytes_that_a_loss_of_power_took_are_missed(tmp_path: Path, executor: Executor) -> None:
    name = await received(await opened(tmp_path, executor, fsync=True), "a", b"a" * 100)
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes().replace(b"a" * 100, bytes(100)))
    spool = await opened(tmp_path, executor, fsync=True)
    with pytest.raises(FileNotFoundError):
        spool.content(name)


async def test_with_fsync_a_group_is_on_the_disk_before_any_answer(
    tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = await opened(tmp_path, executor, fsync=True)
    done: list[str] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        done.append("folder" if os.fstat(fd).st_ino == tmp_path.stat().st_ino else "bytes")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    await received(spool, "a", b"x")
    assert done == ["bytes", "folder"]
    await asyncio.gather(*(received(spool, f"{n}", b"x") for n in range(20)))
    assert done == ["bytes", "folder", "bytes", "bytes"]


async def test_a_disk_that_was_full_for_a_moment_leaves_no_trace(
    tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = await opened(tmp_path, executor)
    before = await received(spool, "a", b"before")
    pwritev = os.pwritev

    def half(fd: int, parts: list[memoryview], at: int) -> int:
        pwritev(fd, [parts[0]], at)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    upload = await spool.begin("c", "b")
    assert upload.buffer(b"after")
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", half)
        with pytest.raises(Unavailable, match="No space left"):
            await upload.finish()
    assert spool.find("c", "b") is None
    name = await upload.finish()
    spool = await opened(tmp_path, executor)
    assert [content(spool, one) for one in (before, name)] == [b"before", b"after"]


async def test_an_upload_cancelled_while_it_is_written_is_not_found(tmp_path: Path) -> None:
    go_on = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        spool = await opened(tmp_path, executor)
        executor.submit(go_on.wait, 30)
        upload = await spool.begin("c", "u")
        upload.buffer(b"x")
        finishing = asyncio.ensure_future(upload.finish())
        await asyncio.sleep(0)  # its write is in the pool
        finishing.cancel()
        await asyncio.gather(finishing, return_exceptions=True)
        await upload.abort()
        go_on.set()
        name = await received(spool, "v", b"y")
        assert spool.find("c", "u") is None
        assert (spool.used_bytes, content(spool, name)) == (1, b"y")


async def test_one_that_is_replaced_is_a_file_from_then_on(tmp_path: Path, executor: Executor) -> None:
    spool = await opened(tmp_path / "spool", executor)
    name = await received(spool, "a", b"deflated")
    (tmp_path / "inflated").write_bytes(b"inflated, and longer")
    await spool.replace(name, tmp_path / "inflated")
    for one in (spool, await opened(tmp_path / "spool", executor)):
        assert (one.content(name), one.used_bytes) == (spool.path(name), 20)


async def test_a_replaced_one_is_the_file_also_beside_others_after_a_restart_and_goes_with_it(
    tmp_path: Path, executor: Executor
) -> None:
    """Its segment stays for the other's sake, and still holds what was replaced."""
    spool = await opened(tmp_path / "spool", executor)
    name, other = [await received(spool, upload, b"deflated") for upload in "ab"]
    (tmp_path / "inflated").write_bytes(b"inflated, and longer")
    await spool.replace(name, tmp_path / "inflated")
    spool = await opened(tmp_path / "spool", executor)
    assert (spool.content(name), spool.used_bytes) == (spool.path(name), 28)
    await spool.remove([name])
    assert not spool.path(name).exists()
    assert content(spool, other) == b"deflated"


async def test_one_that_is_replaced_while_it_is_read_is_the_file(
    tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = await opened(tmp_path, executor)
    name = await received(spool, "a", b"deflated")
    spool.path(name).write_bytes(b"inflated")

    def moved(self: segments.Segments, name: str) -> bytes:
        raise FileNotFoundError

    monkeypatch.setattr(segments.Segments, "read", moved)
    assert spool.content(name) == spool.path(name)


async def test_what_is_not_whole_is_not_moved_and_spoils_nothing(
    tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1000)
    monkeypatch.setattr(segments, "RECENT_BYTES", 0)
    spool = await opened(tmp_path, executor)
    first, cut = [await received(spool, upload, bytes(2000)) for upload in "ab"]
    await received(spool, "c", b"c")
    os.truncate(tmp_path / "000000000002.segment", 1000)
    whole = await received(spool, "d", b"d" * 50)
    await spool.remove([first])
    for segment in spool._segments._closed:  # as if others had left it
        segment.end *= 10
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 10**6)  # what comes next lies behind what was moved
    later = [await received(spool, upload, upload.encode() * 50) for upload in "efgh"]
    assert await spool.missing([cut, whole, *later]) == {cut}
    spool = await opened(tmp_path, executor)
    assert spool.find("c", "b") is None, "it came back, with bytes that it never had"
    assert [content(spool, name) for name in (whole, *later)] == [char * 50 for char in (b"d", b"e", b"f", b"g", b"h")]


async def test_one_that_is_moved_while_it_is_looked_for_is_not_lost(
    tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = await opened(tmp_path, executor)
    name = await received(spool, "a", b"bytes")
    former = spool._segments._places[name]
    gone = segments._Place(segments._Segment(tmp_path / "gone.segment"), 0, 5, None)
    found = iter([gone, former, former])
    places = type("Places", (dict,), {"get": lambda self, name: next(found)})
    monkeypatch.setattr(spool._segments, "_places", places())
    assert spool._segments.lost([name]) == set()


async def test_its_copy_may_be_moved_away_and_it_is_restored_from_one(tmp_path: Path, executor: Executor) -> None:
    spool = await opened(tmp_path / "spool", executor)
    name = await received(spool, "a", b"bytes")
    async with spool.linked(name) as link:
        link.rename(tmp_path / "copy")
    [segment] = (tmp_path / "spool").iterdir()
    segment.unlink()
    assert await spool.missing([name]) == {name}
    spool = await opened(tmp_path / "spool", executor)
    with pytest.raises(Missing):
        async with spool.linked(name):
            raise AssertionError
    await spool.restore(name, tmp_path / "copy")
    assert (await spool.missing([name]), content(spool, name)) == (set(), b"bytes")


async def test_memory_holds_only_the_last_ones(
    tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "RECENT_BYTES", 2500)
    spool = await opened(tmp_path, executor)
    names = [await received(spool, f"{n}", bytes([n]) * 1000) for n in range(5)]
    assert [spool.in_memory(name) is not None for name in names] == [False] * 3 + [True] * 2
    assert [content(spool, name) for name in names] == [bytes([n]) * 1000 for n in range(5)]
