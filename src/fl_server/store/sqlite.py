"""StateStore in one SQLite file: the embedded default.

One connection, used in the executor's one thread only, and a lock on a file beside the database that makes this
process its owner. Names of fields come from users: in SQL they are bound JSON paths, never text of it.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import json
import math
import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, assert_never

from fl_server.errors import Corrupt, Owned, Unavailable
from fl_server.store.disk import disk_errors, make_folder
from fl_server.store.ports import (
    ID_FIELD,
    INDEXED,
    Collection,
    Condition,
    Document,
    Patch,
    Put,
    PutReport,
    Query,
    Write,
)

T = TypeVar("T")

SCHEMA_VERSION = 1
_BUSY_TIMEOUT_S = 1.0  # only someone who looks into the file by hand can hold it
_STANDBY_POLL_S = 1.0
_LARGEST_INTEGER = 2**63 - 1

_COMPARISONS = {"lt": "<", "lte": "<=", "gt": ">", "gte": ">="}
_PUT_REPORT = """
    insert into reports {rows} on conflict do update set seq = excluded.seq, report = excluded.report
    where seq < excluded.seq"""
# Rows as one bound JSON array: a statement a row gives the GIL away and asks for it again each time, which cost the
# event loop more than SQLite's own work.
_ROWS = "select {columns} from json_each(?) where true"
_LARGEST_GROUP = 16 * 1024 * 1024  # characters: SQLite takes no value above a billion bytes, and copies it
_PLAIN = re.compile(r"[ -~]*")  # what comes out of SQLite's JSON as it went in; it ends a text at NUL
_AWAY = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL,
}


class SqliteStateStore:
    """fsync: what save() has answered survives a loss of power, and not only the death of the process."""

    def __init__(self, path: Path, executor: Executor, *, fsync: bool = False) -> None:
        self._path, self._executor, self._fsync = path, executor, fsync
        self._db: sqlite3.Connection | None = None
        self._lock_fd: int | None = None

    async def open(self, owner: str, *, standby: bool = False) -> None:
        while True:
            try:
                return await asyncio.get_running_loop().run_in_executor(self._executor, self._open, owner)
            except Owned:
                if not standby:
                    raise
            await asyncio.sleep(_STANDBY_POLL_S)

    async def keep(self) -> None:
        """The lock goes with the process."""
        await asyncio.get_running_loop().create_future()

    def _open(self, owner: str) -> None:
        if self._db is not None:
            raise AssertionError(f"{self._path} is open already")
        with disk_errors(f"opening {self._path}"):
            make_folder(self._path.parent, fsync=self._fsync)
            self._lock_fd = self._lock(owner)
        try:
            with self._driver_errors():
                self._db = self._connect()
        finally:
            if self._db is None:
                self._unlock()

    def _lock(self, owner: str) -> int:
        lock = Path(f"{self._path}.lock")
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.write(fd, owner.encode("utf-8", "backslashreplace"))
        except BlockingIOError as exc:
            os.close(fd)
            other = lock.read_text("utf-8", "replace")
            raise Owned(f"{self._path} is owned by {other}: stop that one, or use another data directory") from exc
        except OSError:
            os.close(fd)
            raise
        return fd

    def _unlock(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def _connect(self) -> sqlite3.Connection:
        # The executor's thread may be another one after a while, but there is one at a time.
        db = sqlite3.connect(
            self._path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, cached_statements=512
        )
        try:
            (version,) = db.execute("pragma user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise Corrupt(
                    f"{self._path} has schema version {version}, this program knows {SCHEMA_VERSION}: "
                    "start the newer program that wrote it"
                )
            db.execute("pragma journal_mode = wal")
            db.execute(f"pragma synchronous = {'full' if self._fsync else 'normal'}")
            if version < SCHEMA_VERSION:
                with db:
                    db.execute("begin immediate")
                    for statement in _schema():
                        db.execute(statement)
                    db.execute(f"pragma user_version = {SCHEMA_VERSION}")
        except BaseException:
            db.close()
            raise
        return db

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, self._close)

    def _close(self) -> None:
        db, self._db = self._db, None
        try:
            with self._driver_errors():
                if db is not None:
                    db.close()
        finally:
            self._unlock()

    async def save(self, writes: Sequence[Write]) -> None:
        def work(db: sqlite3.Connection) -> None:
            with db:
                db.execute("begin immediate")
                for kind, group in itertools.groupby(writes, type):
                    if kind is PutReport:
                        _put_reports(db, [write for write in group if isinstance(write, PutReport)])
                    else:
                        for write in group:
                            _write(db, write)

        await self._run(work)

    async def insert(self, collection: Collection, document: Document) -> bool:
        sql = _insert(collection)
        return await self._run(lambda db: db.execute(sql, _row(collection, document)).rowcount == 1)

    async def append(self, collection: Collection, documents: Sequence[Document]) -> None:
        def work(db: sqlite3.Connection) -> None:
            with db:
                db.execute("begin immediate")
                _insert_all(db, collection, [_row(collection, document) for document in documents])

        await self._run(work)

    async def get(self, collection: Collection, id: str) -> Document | None:
        return await self._run(lambda db: _get(db, collection, id))

    async def find(self, collection: Collection, query: Query) -> list[Document]:
        sql, bound = find_sql(collection, query)
        return await self._run(lambda db: [json.loads(text) for (text,) in db.execute(sql, bound).fetchall()])

    async def count(self, collection: Collection, where: tuple[Condition, ...] = ()) -> int:
        filters = _Filters(collection)
        sql = f'select count(*) from "{collection}" where {filters.all(where)}'
        return await self._run(lambda db: int(db.execute(sql, filters.bound).fetchone()[0]))

    async def delete(self, collection: Collection, id: str) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            with db:
                db.execute("begin immediate")
                if collection is Collection.ROUNDS:
                    db.execute("delete from reports where round_id = ?", (id,))
                return db.execute(f'delete from "{collection}" where id = ?', (id,)).rowcount == 1

        return await self._run(work)

    async def delete_where(self, collection: Collection, where: tuple[Condition, ...], limit: int) -> int:
        filters = _Filters(collection)
        found = f'select seq from "{collection}" where {filters.all(where)} order by seq limit {filters.bind(limit)}'
        sql = f'delete from "{collection}" where seq in ({found})'
        return await self._run(lambda db: db.execute(sql, filters.bound).rowcount)

    async def reports(self, round_id: str, client: str | None = None) -> list[Document]:
        sql = "select report from reports where round_id = ?"
        bound = [round_id] if client is None else [round_id, client]
        sql += " order by seq" if client is None else " and client = ? order by seq"
        return await self._run(lambda db: [json.loads(text) for (text,) in db.execute(sql, bound).fetchall()])

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def on_thread() -> T:
            if self._db is None:
                raise AssertionError(f"{self._path} is not open")
            with self._driver_errors():
                return work(self._db)

        return await asyncio.get_running_loop().run_in_executor(self._executor, on_thread)

    @contextmanager
    def _driver_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as exc:
            code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_MISUSE) & 0xFF  # without the extension
            if code in _AWAY:
                raise Unavailable(f"{self._path}: {exc}") from exc
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise Corrupt(f"{self._path}: {exc}") from exc
            raise  # a wrong statement: a bug of this file


def _schema() -> Iterator[str]:
    for collection in Collection:
        yield (
            f'create table if not exists "{collection}"'
            " (seq integer primary key autoincrement, id text not null unique, document text not null)"
        )
        newest = f"json_extract(document, '{_path('committed_at')}')"
        yield f'create index if not exists "{collection}:committed_at" on "{collection}" ({newest})'
        for field in INDEXED[collection]:
            value = f"json_extract(document, '{_path(field)}')"
            yield f'create index if not exists "{collection}:{field}" on "{collection}" ({value}, {newest})'
    yield (
        "create table if not exists reports (round_id text, client text, update_id text, seq integer not null,"
        " report text not null, primary key (round_id, client, update_id)) without rowid"
    )


# ---- writes


def _write(db: sqlite3.Connection, write: Write) -> None:
    match write:
        case Put(collection, document):
            if not isinstance(document["fl"]["version"], int):
                raise AssertionError(f"{collection}: fl.version of a Put is {document['fl']['version']!r}")
            db.execute(_put(collection), _row(collection, document))
        case Patch(collection, id, changes):
            document_now = _get(db, collection, id)
            if document_now is not None:
                for field, value in changes.items():
                    _set(document_now, field, value)
                db.execute(f'update "{collection}" set document = ? where id = ?', (_dump(document_now), id))
        case PutReport():
            _put_reports(db, [write])
        case _:
            assert_never(write)


def _insert(collection: Collection, rows: str = "values (?, ?)") -> str:
    return f'insert into "{collection}" (id, document) {rows} on conflict do nothing'


def _insert_all(db: sqlite3.Connection, collection: Collection, rows: Sequence[tuple[str, str]]) -> None:
    is_small = sum(len(text) for _, text in rows) <= _LARGEST_GROUP
    if len(rows) > 1 and is_small and all(_PLAIN.fullmatch(id) for id, _ in rows):
        db.execute(_insert(collection, _columns(2)), (_dump(rows),))
    else:
        db.executemany(_insert(collection), rows)


def _put_reports(db: sqlite3.Connection, writes: Sequence[PutReport]) -> None:
    rows = [(one.round_id, one.client, one.update_id, one.seq, _dump(one.report)) for one in writes]
    if len(rows) > 1 and all(_PLAIN.fullmatch(id) for row in rows for id in row[:3]):
        db.execute(_PUT_REPORT.format(rows=_columns(5)), (_dump(rows),))
    else:
        db.executemany(_PUT_REPORT.format(rows="values (?, ?, ?, ?, ?)"), rows)


def _columns(count: int) -> str:
    return _ROWS.format(columns=", ".join(f"json_extract(value, '$[{index}]')" for index in range(count)))


def _put(collection: Collection) -> str:
    """A stored document without a version is older than any: insert() put it there."""
    return (
        f'insert into "{collection}" (id, document) values (?, ?)'
        " on conflict do update set document = excluded.document"
        f" where coalesce(json_extract(\"{collection}\".document, '$.fl.version'), -1)"
        " < json_extract(excluded.document, '$.fl.version')"
    )


def _get(db: sqlite3.Connection, collection: Collection, id: str) -> Document | None:
    row = db.execute(f'select document from "{collection}" where id = ?', (id,)).fetchone()
    return None if row is None else json.loads(row[0])


def _set(document: Document, field: str, value: Any) -> None:
    """Not by json_set(): it does nothing, silently, where the parent is null."""
    *parents, name = field.split(".")
    for parent in parents:
        if not isinstance(document.get(parent), dict):
            document[parent] = {}
        document = document[parent]
    document[name] = value


def _row(collection: Collection, document: Document) -> tuple[str, str]:
    id = document[ID_FIELD[collection]]
    if not isinstance(id, str):
        raise AssertionError(f"{collection}: the id is {id!r}")
    return id, _dump(document)


_dump: Callable[[Any], str] = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


# ---- queries


def find_sql(collection: Collection, query: Query) -> tuple[str, Mapping[str, str | int]]:
    filters = _Filters(collection)
    where = filters.all(query.where)
    order = [f"{filters.value(field)} {'desc' if descending else 'asc'}" for field, descending in query.sort]
    order.append("seq desc" if query.sort and query.sort[-1][1] else "seq asc")
    sql = f'select document from "{collection}" where {where} order by {", ".join(order)}'
    if query.limit or query.skip:
        limit = filters.bind(min(query.limit, _LARGEST_INTEGER) or -1)
        sql += f" limit {limit} offset {filters.bind(min(query.skip, _LARGEST_INTEGER))}"
    return sql, filters.bound


class _Filters:
    """SQL of conditions, and the values bound in it.

    Values are bound as JSON, so that SQLite reads them as it reads documents (integers beyond 64 bits, unpaired
    surrogates). It ends a text at NUL: in filters "a" and "a\\0b" are the same.
    """

    def __init__(self, collection: Collection) -> None:
        self._literal = {*INDEXED[collection], "committed_at"}  # an index is only used for a path that is not bound
        self.bound: dict[str, str | int] = {}

    def bind(self, value: str | int) -> str:
        name = f"v{len(self.bound)}"
        self.bound[name] = value
        return f":{name}"

    def value(self, field: str) -> str:
        return f"json_extract(document, {self._field(field)})"

    def all(self, where: tuple[Condition, ...]) -> str:
        return " and ".join(f"({self._one(condition)})" for condition in where) or "true"

    def _one(self, condition: Condition) -> str:
        field, op, value = condition.field, condition.op, condition.value
        if op == "in":
            if not isinstance(value, tuple):
                raise AssertionError(f"{field} in {value!r}: a tuple is needed")
            return self._among(field, value)
        if isinstance(value, tuple):
            raise AssertionError(f"{field} {op} {value!r}: a scalar is needed")
        if op == "eq":
            return self._equals(field, value)
        if op == "ne":
            return f"({self._equals(field, value)}) is not true"
        if value is None:  # null is equal to itself, and neither more nor less
            return self._equals(field, None) if op in ("lte", "gte") else "false"
        return self._compares(field, _COMPARISONS[op], value)

    def _equals(self, field: str, value: str | int | float | bool | None) -> str:
        return f"{self.value(field)} is null" if value is None else self._compares(field, "=", value)

    def _compares(self, field: str, comparison: str, value: str | int | float | bool) -> str:
        bound = f"json_extract({self.bind(_scalar(value))}, '$')"
        return f"{self.value(field)} {comparison} {bound} and {self._type(field)} in {_types(value)}"

    def _among(self, field: str, values: tuple[str | int | float | bool | None, ...]) -> str:
        kinds: dict[str, list[str]] = {}
        for value in values:
            if value is not None:
                kinds.setdefault(_types(value), []).append(_scalar(value))
        terms = [self._equals(field, None)] if None in values else []
        for types, scalars in kinds.items():
            listed = f"select value from json_each({self.bind('[' + ','.join(scalars) + ']')})"
            terms.append(f"{self.value(field)} in ({listed}) and {self._type(field)} in {types}")
        return " or ".join(terms) or "false"

    def _type(self, field: str) -> str:
        return f"json_type(document, {self._field(field)})"

    def _field(self, field: str) -> str:
        return f"'{_path(field)}'" if field in self._literal else self.bind(_path(field))


def _path(field: str) -> str:
    """SQLite compares the names in a path with a document's as they are written: escaped, as _dump() does."""
    if '"' in field:
        return "$[0]"  # cannot be said in a path; absent, as this is from every document
    return "$" + "".join(f".{json.dumps(name)}" for name in field.split("."))


def _types(value: str | int | float | bool) -> str:
    """What json_type() says of its like: 1 equals 1.0, but neither "1" nor true."""
    if isinstance(value, bool):
        return "('true', 'false')"
    return "('text')" if isinstance(value, str) else "('integer', 'real')"


def _scalar(value: str | int | float | bool) -> str:
    if isinstance(value, float) and not math.isfinite(value):  # a user's filter may say so: no number equals NaN
        return "null" if math.isnan(value) else "9e999" if value > 0 else "-9e999"
    return json.dumps(value)
