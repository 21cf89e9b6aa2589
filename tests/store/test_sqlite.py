"""What is the SQLite adapter's alone: its file, its lock, its errors, its plans."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import sys
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from pathlib import Path

import pytest

from fl_server.errors import Corrupt, Owned, Unavailable
from fl_server.store.ports import INDEXED, Collection, Condition, Put, Query
from fl_server.store.sqlite import SCHEMA_VERSION, SqliteStateStore, find_sql

OWNER = """
import asyncio, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from fl_server.store.ports import Collection
from fl_server.store.sqlite import SqliteStateStore

async def main():
    store = SqliteStateStore(Path(sys.argv[1]), ThreadPoolExecutor(1))
    await store.open("process 4711 on host x")
    await store.insert(Collection.CLIENTS, {"client_id": "saved by the one that dies"})
    print("owns it", flush=True)
    sys.stdin.read()

asyncio.run(main())
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "state.db"


@pytest.fixture
async def store(path: Path, executor: Executor) -> AsyncIterator[SqliteStateStore]:
    store = SqliteStateStore(path, executor)
    await store.open("the test")
    yield store
    await store.close()


async def test_the_owner_is_another_process_until_it_is_killed(path: Path, executor: Executor) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, str(path), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    store = SqliteStateStore(path, executor)
    try:
        async with asyncio.timeout(30):
            assert process.stdout is not None and await process.stdout.readline() == b"owns it\n"
            with pytest.raises(Owned, match="process 4711 on host x"):
                await store.open("the test")
    finally:
        process.kill()
        await process.communicate()
    await store.open("the test")
    assert await store.get(Collection.CLIENTS, "saved by the one that dies") is not None
    await store.close()


async def test_a_newer_schema_is_refused_untouched_and_lets_the_lock_go(path: Path, executor: Executor) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as newer:
        newer.execute("pragma user_version = 99")
    newer.close()
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(Corrupt, match=rf"99.*{SCHEMA_VERSION}"):
            await SqliteStateStore(path, executor).open("the test")
    assert path.read_bytes() == before


async def test_a_file_that_is_no_database_is_corrupt(path: Path, executor: Executor) -> None:
    path.parent.mkdir()
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(Corrupt, match="not a database"):
        await SqliteStateStore(path, executor).open("the test")


async def test_damaged_pages_are_corrupt(path: Path, executor: Executor) -> None:
    store = SqliteStateStore(path, executor)
    await store.open("the test")
    await store.append(Collection.STATUSES, [{"status_id": f"{n}", "data": "x" * 500} for n in range(100)])
    await store.close()
    reader = sqlite3.connect(path)
    (size,) = reader.execute("pragma page_size").fetchone()
    (page,) = reader.execute("select rootpage from sqlite_schema where name = 'control.status'").fetchone()
    reader.close()
    sound = path.read_bytes()
    path.write_bytes(sound[: (page - 1) * size] + b"\xff" * size + sound[page * size :])
    await store.open("the test")
    with pytest.raises(Corrupt, match="malformed"):
        await store.find(Collection.STATUSES, Query())
    await store.close()


async def test_a_folder_that_cannot_be_made_is_unavailable(tmp_path: Path, executor: Executor) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match=r"state\.db"):
        await SqliteStateStore(tmp_path / "file" / "state.db", executor).open("the test")


async def test_a_database_that_somebody_else_holds_is_unavailable_until_he_lets_go(
    path: Path, store: SqliteStateStore
) -> None:
    somebody = sqlite3.connect(path, isolation_level=None)
    somebody.execute("begin immediate")
    put = Put(Collection.SESSIONS, {"session_id": "s", "fl": {"version": 1}})
    with pytest.raises(Unavailable, match="locked"):
        await store.save([put])
    somebody.execute("rollback")
    somebody.close()
    await store.save([put])
    assert await store.count(Collection.SESSIONS) == 1


async def test_a_full_disk_is_unavailable_and_leaves_nothing_half_written(store: SqliteStateStore) -> None:
    assert store._db is not None  # the limit is the connection's own
    (pages,) = store._db.execute("pragma page_count").fetchone()
    store._db.execute(f"pragma max_page_count = {pages + 5}").fetchone()
    with pytest.raises(Unavailable, match="full"):
        await store.append(Collection.STATUSES, [{"status_id": f"{n}", "data": "x" * 1000} for n in range(100)])
    assert await store.count(Collection.STATUSES) == 0
    store._db.execute("pragma max_page_count = 1000000").fetchone()
    await store.append(Collection.STATUSES, [{"status_id": f"{n}", "data": "x" * 1000} for n in range(100)])
    assert await store.count(Collection.STATUSES) == 100


@pytest.mark.parametrize(("fsync", "level"), [(False, 1), (True, 2)])
async def test_fsync_makes_every_commit_reach_the_disk(path: Path, executor: Executor, fsync: bool, level: int) -> None:
    store = SqliteStateStore(path, executor, fsync=fsync)
    await store.open("the test")
    assert store._db is not None
    assert store._db.execute("pragma synchronous").fetchone() == (level,)
    assert store._db.execute("pragma journal_mode").fetchone() == ("wal",)
    await store.close()


async def test_a_store_that_is_not_open_says_so(path: Path, executor: Executor) -> None:
    with pytest.raises(AssertionError, match="not open"):
        await SqliteStateStore(path, executor).get(Collection.SESSIONS, "s")


async def test_usual_filters_are_searched_and_newest_first_needs_no_sorting(
    path: Path, store: SqliteStateStore
) -> None:
    newest = (("committed_at", True),)
    reader = sqlite3.connect(path)
    for collection, fields in INDEXED.items():
        wheres = [(Condition(field, "eq", "x"),) for field in fields]
        for where in [(), *wheres]:
            plan = plan_of(reader, collection, Query(where, newest, limit=10))
            assert f"SCAN {collection} USING INDEX" in plan if not where else "SCAN" not in plan, plan
            assert "TEMP B-TREE" not in plan, plan
        for field in fields:
            plan = plan_of(reader, collection, Query((Condition(field, "in", ("x", "y")),)))
            assert not re.search(r"SCAN (?!json_each)", plan), plan
    reader.close()


def plan_of(reader: sqlite3.Connection, collection: Collection, query: Query) -> str:
    sql, bound = find_sql(collection, query)
    return "; ".join(row[3] for row in reader.execute(f"explain query plan {sql}", bound))
