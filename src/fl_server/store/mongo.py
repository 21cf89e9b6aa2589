"""StateStore in MongoDB, through motor: FEDn's collections, in the database that has the network's name.

Documents have FEDn's fields at their top. In their `fl` the store keeps, besides what it is given, the epoch of the
owner that wrote last and a round's reports; what it reads for others has neither. A value that BSON cannot hold is
kept as {"fl.json": its JSON}. Every write waits for the journal of a majority, and no call waits for ever.

One owner: a lease, renewed by keep(). An owner that could not renew it for LEASE_S writes nothing and confirms
nothing until it has; a lease on which no renewal was seen for TAKE_OVER_S, while the database answered, is taken by
who waits for it, with a higher epoch. Sessions and rounds are written only where no higher epoch is.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import math
import struct
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pymongo
from bson import Decimal128, Int64, ObjectId
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import UpdateOne, errors

from fl_server.errors import Corrupt, Deposed, Invalid, Owned, Unavailable
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

SCHEMA_VERSION = 1
TIMEOUT_S = 5.0  # of one call, in the driver and in the server
INDEXING_TIMEOUT_S = 3600.0  # a database that FEDn filled gets its indexes at the first start
RENEW_EVERY_S = 2.0
LEASE_S = 5.0  # by the owner's clock, from before the renewal was sent
TAKE_OVER_S = 6.0  # by another's clock, from after it saw one; more than LEASE_S: clocks do not run at one speed
_POLL_S = 1.0
_RETRY_S = 0.5

_DEPLOYMENT = "fl.deployment"  # two documents: the schema's version, and who owns the database
_FENCED = (Collection.SESSIONS, Collection.ROUNDS)
_UNFINISHED = {"status": "Pending"}  # FEDn's word, in a round's document, for a round that is not over
_HIDDEN = {"_id": 0, "fl.epoch": 0, "fl.reports": 0, "fl.reports_seq": 0}
_ATTEMPTS = 5  # of a conditional write that lost to nobody: its document came or went meanwhile

_ESCAPE = "fl.json"
_DEEPEST = 60  # of sub-documents: BSON allows 100
_LARGEST = 2**62  # of skip and limit; the server adds the two

_TOO_LARGE = {10334, 17419, 17420}
_REFUSED = {13: "not allowed", 18: "wrong user or password", 8000: "wrong user or password"}
_AWAY = {
    *_REFUSED,
    *(6, 7, 89, 9001),  # the network
    *(43, 46, 50, 112, 175, 262),  # given up: a lock, the time limit, a conflict, a cursor that died with its server
    *(64, 100, 134, 91, 189, 10107, 11600, 11602, 13435, 13436),  # the replica set, or a shutdown
    *(14031, 39),  # the disk
}

_now_s = functools.partial(time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class MongoStateStore:
    def __init__(self, url: str, database: str) -> None:
        """url: mongodb://…; it may hold a password and is in no message."""
        self._url, self._database = url, database
        self._where = f"MongoDB database {database}"
        self._client: Any = None  # motor has no types
        self._db: Any = None
        self._epoch = 0
        self._renewed_at_s = -math.inf
        self._deposed_by: str | None = None
        self._ids = _Ids(0, 0)
        self._doubtful: dict[tuple[Collection, str], ObjectId] = {}  # inserts of which nobody heard the outcome

    # ---- life, and ownership

    async def open(self, owner: str, *, standby: bool = False) -> None:
        if self._client is not None:
            raise AssertionError(f"{self._where} is open already")
        self._connect()
        try:
            await self._check_schema()
            await self._make_indexes()
            self._epoch = await self._acquire(owner, standby)
            await self._stamp()
            self._ids = _Ids(self._epoch, await self._newest_second())
        except BaseException:
            await self.close()
            raise

    async def clock_s(self) -> float:
        """The server's, in seconds since the epoch. For a store that is not open: nothing is owned by it."""
        self._connect()
        try:
            with self._driver_errors("asking for its time"):
                hello = await self._client.admin.command("hello")
        finally:
            await self.close()
        said: datetime = hello["localTime"]  # in UTC
        return said.replace(tzinfo=UTC).timestamp()

    def _connect(self) -> None:
        try:
            if not self._url.startswith(("mongodb://", "mongodb+srv://")):
                raise errors.InvalidURI
            self._where = f"MongoDB at {_hosts(self._url)}, database {self._database}"
            self._client = AsyncIOMotorClient(
                self._url,
                w="majority",
                journal=True,
                readConcernLevel="majority",
                timeoutMS=int(TIMEOUT_S * 1000),
                connectTimeoutMS=3000,
                appname="flserve",
            )
            self._db = self._client[self._database]
        except (errors.InvalidURI, errors.InvalidName, errors.ConfigurationError, ValueError, TypeError) as wrong:
            # the driver's own message may hold a part of the password
            raise Invalid(
                "mongo_url, mongo_database: no URL or name that MongoDB takes "
                f"(mongodb://user:password@host:port, user and password percent-encoded): {type(wrong).__name__}"
            ) from None

    async def _check_schema(self) -> None:
        written = {"$setOnInsert": {"schema_version": SCHEMA_VERSION}}
        with self._driver_errors("opening"):
            deployment = self._db[_DEPLOYMENT]
            schema = await deployment.find_one({"_id": "schema"})
            if schema is None:
                await deployment.update_one({"_id": "schema"}, written, upsert=True)
                schema = await deployment.find_one({"_id": "schema"})
        if schema["schema_version"] > SCHEMA_VERSION:
            raise Corrupt(
                f"{self._where} has schema version {schema['schema_version']}, this program knows {SCHEMA_VERSION}: "
                "start the newer program that wrote it"
            )

    async def _make_indexes(self) -> None:
        with pymongo.timeout(INDEXING_TIMEOUT_S), self._driver_errors("making indexes"):
            for collection in Collection:
                await self._db[collection.value].create_indexes(list(_indexes(collection)))

    async def _acquire(self, owner: str, standby: bool) -> int:
        """The epoch. Raises Owned, if another renews its lease and this one is not to wait."""
        lease_of, taken = self._db[_DEPLOYMENT], {"owner": _encode(owner), "renewals": 0, "held": True}
        seen, seen_at_s = None, 0.0
        while True:
            asked_at_s = _now_s()
            try:
                with self._driver_errors("reading who owns it"):
                    lease = await lease_of.find_one({"_id": "owner"})
                    if lease is None:
                        try:
                            await lease_of.insert_one({"_id": "owner", "epoch": 1, **taken})
                        except errors.DuplicateKeyError:
                            continue
                        self._renewed_at_s = asked_at_s
                        return 1
                    known = {key: lease[key] for key in ("epoch", "renewals", "held")}
                    expired = known == seen and asked_at_s - seen_at_s >= TAKE_OVER_S
                    if expired or not lease["held"]:
                        epoch = int(lease["epoch"]) + 1
                        won = await lease_of.update_one({"_id": "owner", **known}, {"$set": {"epoch": epoch, **taken}})
                        if won.matched_count:
                            self._renewed_at_s = asked_at_s
                            return epoch
                        continue
            except Unavailable:
                if not standby:
                    raise
                seen = None  # only the time in which the database answers counts against the owner
            else:
                answered_at_s = _now_s()
                if known != seen:
                    if seen is not None and not standby:
                        raise Owned(
                            f"{self._where} is owned by {_decode(lease['owner'])}: "
                            "stop that one, use another mongo_database, or wait for it with --standby"
                        )
                    seen, seen_at_s = known, answered_at_s
                elif answered_at_s - asked_at_s > _POLL_S:
                    seen = None
            await asyncio.sleep(_POLL_S)

    async def _stamp(self) -> None:
        """From here on the former owner changes no session and no unfinished round."""
        other = {"fl.epoch": {"$ne": self._epoch}}
        stamp = [{"$set": {"fl.epoch": self._epoch}}]
        with pymongo.timeout(INDEXING_TIMEOUT_S), self._driver_errors("taking it over"):
            await self._db[Collection.SESSIONS.value].update_many(other, stamp)
            await self._db[Collection.ROUNDS.value].update_many({**_UNFINISHED, **other}, stamp)

    async def _newest_second(self) -> int:
        """Of the documents' ids: those to come sort behind them, also if a clock was set back."""
        newest = 0
        with self._driver_errors("reading the newest ids"):
            for collection in Collection:
                last = await self._db[collection.value].find_one({}, {"_id": 1}, sort=[("_id", -1)])
                if last is not None and isinstance(last["_id"], ObjectId):
                    newest = max(newest, int.from_bytes(last["_id"].binary[:4], "big"))
        return newest

    async def keep(self) -> None:
        while True:
            asked_at_s = _now_s()
            try:
                with self._driver_errors("renewing the ownership"):
                    mine = {"_id": "owner", "epoch": self._epoch}
                    renewed = await self._db[_DEPLOYMENT].update_one(mine, {"$inc": {"renewals": 1}})
                    if not renewed.matched_count:
                        await self._raise_deposed()
            except Unavailable:  # who wants to write hears of it
                await asyncio.sleep(_RETRY_S)
            else:
                self._renewed_at_s = asked_at_s
                await asyncio.sleep(RENEW_EVERY_S)

    async def _raise_deposed(self) -> None:
        lease = await self._db[_DEPLOYMENT].find_one({"_id": "owner"})
        self._deposed_by = str(_decode(lease["owner"])) if lease else "nobody: the lease was deleted"
        self._check_ownership()

    def _check_ownership(self) -> None:
        """Before a write, and before its success is told. Raises Deposed; Unavailable while it is in doubt."""
        if self._client is None:
            raise AssertionError(f"{self._where} is not open")
        if self._deposed_by is not None:
            raise Deposed(f"{self._where} is now owned by {self._deposed_by}")
        age_s = _now_s() - self._renewed_at_s
        if age_s > LEASE_S:
            raise Unavailable(f"{self._where}: the ownership could not be renewed for {age_s:.0f} s")

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        try:
            if self._epoch and self._deposed_by is None:
                mine = {"_id": "owner", "epoch": self._epoch}
                with self._driver_errors("releasing it"):
                    await self._db[_DEPLOYMENT].update_one(mine, {"$set": {"held": False}})
        except Unavailable:
            pass  # the lease expires
        finally:
            self._epoch, self._deposed_by, self._renewed_at_s = 0, None, -math.inf
            with ThreadPoolExecutor(1) as thread:  # says good-bye to the server, and waits for it
                await asyncio.get_running_loop().run_in_executor(thread, client.close)

    # ---- writes

    async def save(self, writes: Sequence[Write]) -> None:
        steps: list[Callable[[], Awaitable[None]]] = []  # all are encoded before the first is sent
        for _, group in itertools.groupby(enumerate(writes), _written_together):
            together = [write for _, write in group]
            match together[0]:
                case Put(collection, document):
                    steps.append(functools.partial(self._put, collection, _encode(document)))
                case Patch(collection):
                    patches = [_changes(write) for write in together if isinstance(write, Patch) and write.changes]
                    steps.append(functools.partial(self._patch, collection, patches))
                case PutReport(round_id):
                    reports = [_report(write) for write in together if isinstance(write, PutReport)]
                    steps.append(functools.partial(self._put_reports, round_id, reports))
        self._check_ownership()
        for step in steps:
            await step()
        self._check_ownership()

    async def _put(self, collection: Collection, document: Document) -> None:
        fl = document["fl"]
        version = fl["version"]
        if not isinstance(version, int):
            raise AssertionError(f"{collection}: fl.version of a Put is {version!r}")
        id = {ID_FIELD[collection]: document[ID_FIELD[collection]]}
        older: Document = {"fl.version": {"$not": {"$gte": version}}}
        if collection in _FENCED:
            fl["epoch"] = self._epoch
            older |= self._not_deposed()
        if collection is Collection.ROUNDS:
            # what a former owner, already deposed, may have put under the next round's id
            older = {"$or": [older, {"fl.epoch": {"$lt": self._epoch}}]}
        kept = {"reports": "$fl.reports", "reports_seq": "$fl.reports_seq"}
        replaced = {
            "_id": {"$ifNull": ["$_id", self._ids.next()]},
            "fl": {"$mergeObjects": [{"$literal": fl}, kept if collection is Collection.ROUNDS else {}]},
        }
        pipeline = [{"$replaceWith": {"$mergeObjects": [{"$literal": document}, replaced]}}]
        for _ in range(_ATTEMPTS):
            with self._driver_errors(f"put into {collection}"):
                try:
                    await self._db[collection.value].update_one({**id, **older}, pipeline, upsert=True)
                    return
                except errors.DuplicateKeyError:
                    stored = await self._fl(collection, id)
            if stored is not None and (stored.get("version") or 0) >= version:
                return
        raise Unavailable(f"{self._where}: put into {collection}: somebody else writes {id}")

    async def _patch(self, collection: Collection, patches: Sequence[tuple[Document, Document]]) -> None:
        """patches: (which document, values by field)."""
        if not patches:
            return
        is_fenced = collection in _FENCED
        stamp: Document = {"fl.epoch": self._epoch} if is_fenced else {}
        updates = [
            # a pipeline: a plain $set is refused below a null
            UpdateOne(
                {**id, **(self._not_deposed() if is_fenced else {})},
                [{"$set": {field: {"$literal": value}}} for field, value in {**changes, **stamp}.items()],
            )
            for id, changes in patches
        ]
        with self._driver_errors(f"patch {collection}"):
            done = await self._db[collection.value].bulk_write(updates, ordered=True)
            if is_fenced and done.matched_count < len(updates):
                for id, _ in patches:
                    await self._fl(collection, id)

    async def _put_reports(self, round_id: str, reports: Sequence[Document]) -> None:
        """One atomic write. It is sent again only for what a read has shown to be missing."""
        rounds, id = self._db[Collection.ROUNDS.value], {"round_id": _encode(round_id)}
        missing = list(reports)
        seen: Document = {"$not": {"$gte": min(report["seq"] for report in reports)}}
        for _ in range(_ATTEMPTS):
            pushed = {
                "$push": {"fl.reports": {"$each": missing}},
                "$max": {"fl.reports_seq": max(report["seq"] for report in missing)},
                "$set": {"fl.epoch": self._epoch},
                "$setOnInsert": {"_id": self._ids.next()},
            }
            with self._driver_errors(f"report to round {round_id}"):
                try:
                    where = {**id, "fl.reports_seq": seen, **self._not_deposed()}
                    await rounds.update_one(where, pushed, upsert=True)
                    return
                except errors.DuplicateKeyError:
                    stored = await self._fl(Collection.ROUNDS, id) or {}
            newest = {key: int(report["seq"]) for key, report in _newest(stored.get("reports", [])).items()}
            missing = [report for report in reports if newest.get(_key(report), -math.inf) < report["seq"]]
            if not missing:
                return
            seen = {"$eq": stored.get("reports_seq")}
        raise Unavailable(f"{self._where}: report to round {round_id}: somebody else writes it")

    def _not_deposed(self) -> Document:
        return {"fl.epoch": {"$not": {"$gt": self._epoch}}}

    async def _fl(self, collection: Collection, id: Document) -> Document | None:
        """Ours of a stored document, with a round's reports but not what they say. Raises Deposed."""
        wanted = {"fl.version": 1, "fl.epoch": 1, "fl.reports_seq": 1}
        wanted |= {f"fl.reports.{name}": 1 for name in ("client", "update_id", "seq")}
        stored = await self._db[collection.value].find_one(id, wanted)
        if stored is None:
            return None
        fl: Document = stored.get("fl") or {}
        if collection in _FENCED and fl.get("epoch", 0) > self._epoch:
            await self._raise_deposed()
        return fl

    async def insert(self, collection: Collection, document: Document) -> bool:
        self._check_ownership()
        key = (collection, _id_of(collection, document))
        row = self._row(collection, document)
        row["_id"] = self._doubtful.setdefault(key, row["_id"])
        try:
            with self._driver_errors(f"insert into {collection}"):
                try:
                    await self._db[collection.value].insert_one(row)
                    inserted = True
                except errors.DuplicateKeyError:
                    stored = await self._db[collection.value].find_one({ID_FIELD[collection]: _encode(key[1])})
                    inserted = stored is not None and stored["_id"] == row["_id"]
            self._check_ownership()
        except Unavailable:  # asked again, the id of the row tells whether it was this one
            raise
        except BaseException:
            self._doubtful.pop(key, None)
            raise
        self._doubtful.pop(key, None)
        return inserted

    async def append(self, collection: Collection, documents: Sequence[Document]) -> None:
        rows = [self._row(collection, document) for document in documents]
        if not rows:
            return
        self._check_ownership()
        with self._driver_errors(f"append to {collection}"):
            try:
                await self._db[collection.value].insert_many(rows, ordered=False)
            except errors.BulkWriteError as some:
                if some.details["writeConcernErrors"] or any(
                    error["code"] != 11000 for error in some.details["writeErrors"]
                ):
                    raise
        self._check_ownership()

    def _row(self, collection: Collection, document: Document) -> Document:
        _id_of(collection, document)
        row: Document = {"_id": self._ids.next(), **_encode(document)}
        if collection in _FENCED and isinstance(row.get("fl"), dict):
            row["fl"]["epoch"] = self._epoch
        return row

    async def delete(self, collection: Collection, id: str) -> bool:
        self._check_ownership()
        wanted = {ID_FIELD[collection]: _encode(id)}
        fence = self._not_deposed() if collection in _FENCED else {}
        with self._driver_errors(f"delete from {collection}"):
            gone = await self._db[collection.value].delete_one({**wanted, **fence})
            deleted = bool(gone.deleted_count)
            if fence and not deleted:
                await self._fl(collection, wanted)
        self._check_ownership()
        return deleted

    async def delete_where(self, collection: Collection, where: tuple[Condition, ...], limit: int) -> int:
        if collection in _FENCED:
            raise AssertionError(f"{collection}: deleted one by one only")
        self._check_ownership()
        documents = self._db[collection.value]
        with self._driver_errors(f"delete from {collection}"):
            found = await documents.find(filter_of(where), {"_id": 1}, sort=[("_id", 1)], limit=limit).to_list(None)
            gone = await documents.delete_many({"_id": {"$in": [row["_id"] for row in found]}})
        self._check_ownership()
        return int(gone.deleted_count)

    # ---- reads

    async def get(self, collection: Collection, id: str) -> Document | None:
        with self._driver_errors(f"get from {collection}"):
            stored = await self._open_db()[collection.value].find_one({ID_FIELD[collection]: _encode(id)}, _HIDDEN)
        return None if stored is None else _shown(stored)

    async def find(self, collection: Collection, query: Query) -> list[Document]:
        with self._driver_errors(f"find in {collection}"):
            found = await self._open_db()[collection.value].find(**find_arguments(query)).to_list(None)
        return [_shown(stored) for stored in found]

    async def count(self, collection: Collection, where: tuple[Condition, ...] = ()) -> int:
        unequal = [condition for condition in where if condition.op == "ne"]
        if len({condition.field for condition in unequal}) != 1:
            return await self._count(collection, where)
        # no index finds what is unequal, so what is equal is taken off; documents that come meanwhile may count or not
        rest = tuple(condition for condition in where if condition.op != "ne")
        equal = Condition(unequal[0].field, "in", tuple(_scalar(condition) for condition in unequal))
        return max(0, await self._count(collection, rest) - await self._count(collection, (*rest, equal)))

    async def _count(self, collection: Collection, where: tuple[Condition, ...]) -> int:
        hint = {} if where else {"hint": "_id_"}  # without, the server reads all documents to count them
        with self._driver_errors(f"count in {collection}"):
            return int(await self._open_db()[collection.value].count_documents(filter_of(where), **hint))

    async def reports(self, round_id: str, client: str | None = None) -> list[Document]:
        reports: Any = "$fl.reports"
        if client is not None:
            wanted = {"$eq": ["$$report.client", {"$literal": _encode(client)}]}
            reports = {"$filter": {"input": {"$ifNull": [reports, []]}, "as": "report", "cond": wanted}}
        pipeline = [{"$match": {"round_id": _encode(round_id)}}, {"$project": {"_id": 0, "reports": reports}}]
        with self._driver_errors(f"reports of round {round_id}"):
            found = await self._open_db()[Collection.ROUNDS.value].aggregate(pipeline).to_list(None)
        stored = _newest(found[0].get("reports", []) if found else []).values()
        return [_decode(report["report"]) for report in sorted(stored, key=lambda report: report["seq"])]

    def _open_db(self) -> Any:
        if self._client is None:
            raise AssertionError(f"{self._where} is not open")
        return self._db

    @contextmanager
    def _driver_errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except errors.PyMongoError as exc:
            codes = _codes(exc)
            why = next((_REFUSED[code] for code in codes if code in _REFUSED), _short(exc))
            if isinstance(exc, errors.ConnectionFailure | errors.WTimeoutError) or exc.timeout or codes & _AWAY:
                raise Unavailable(f"{self._where}: {doing}: {why}") from exc
            if isinstance(exc, errors.DocumentTooLarge) or codes & _TOO_LARGE:
                raise Corrupt(f"{self._where}: {doing}: more than the 16 MB that a document may have") from exc
            raise  # a wrong statement: a bug of this file


class _Ids:
    """ObjectIds in the order in which they are asked for, also from owner to owner: what is listed without a sort, or
    ties, is in the order of first insertion."""

    def __init__(self, epoch: int, not_before_s: int) -> None:
        self._epoch, self._second, self._count = epoch, not_before_s, itertools.count()

    def next(self) -> ObjectId:
        self._second = max(self._second, int(time.time()))
        return ObjectId(struct.pack(">III", self._second, self._epoch, next(self._count)))


def _hosts(url: str) -> str:
    """For messages: without user, password and options."""
    return url.partition("://")[2].partition("/")[0].partition("?")[0].rpartition("@")[2]


def _codes(exc: errors.PyMongoError) -> set[int]:
    details = getattr(exc, "details", None) or {}
    found = [getattr(exc, "code", None)]
    found += [error.get("code") for error in details.get("writeErrors", []) if isinstance(error, dict)]
    found += [error.get("code") for error in details.get("writeConcernErrors", []) if isinstance(error, dict)]
    return {code for code in found if code is not None and code != 11000}


def _short(exc: errors.PyMongoError) -> str:
    """Without the topology and the settings, which the driver appends."""
    text = str(exc).partition(", Timeout: ")[0].partition(" (configured timeouts")[0].partition(", full error: ")[0]
    return text or type(exc).__name__


def _indexes(collection: Collection) -> Iterator[pymongo.IndexModel]:
    """One a filter that lists have, in their order: the newest first, ties in the order of insertion."""
    id_field = ID_FIELD[collection]
    # FEDn's own predictions have no record_id
    sparse = collection is Collection.PREDICTIONS
    yield pymongo.IndexModel([(id_field, 1)], name="fl id", unique=True, **({"sparse": True} if sparse else {}))
    for field in ("committed_at", *INDEXED[collection]):
        keys = [field, *(["committed_at"] if field != "committed_at" else []), "_id"]
        yield pymongo.IndexModel([(key, 1) for key in keys], name=f"fl {field}")
    if collection is Collection.ROUNDS:
        yield pymongo.IndexModel([("fl.ordinal", 1), ("_id", 1)], name="fl newest")


# ---- writes


def _written_together(numbered: tuple[int, Write]) -> tuple[object, ...]:
    """Writes that are neighbours and have the same key are one call of the driver."""
    number, write = numbered
    match write:
        case Patch(collection):
            return (collection,)
        case PutReport(round_id):
            return ("report", round_id)
        case Put():
            return (number,)


def _changes(write: Patch) -> tuple[Document, Document]:
    id = {ID_FIELD[write.collection]: _encode(write.id)}
    return id, {field: _encode(value, 1) for field, value in write.changes.items()}


def _report(write: PutReport) -> Document:
    return {
        "client": _encode(write.client),
        "update_id": _encode(write.update_id),
        "seq": write.seq,
        "report": _encode(write.report),
    }


def _key(report: Document) -> tuple[str, str]:
    return _decode(report["client"]), _decode(report["update_id"])


def _newest(reports: Sequence[Document]) -> dict[tuple[str, str], Document]:
    newest: dict[tuple[str, str], Document] = {}
    for report in reports:
        former = newest.get(_key(report))
        if former is None or former["seq"] < report["seq"]:
            newest[_key(report)] = report
    return newest


# ---- JSON as BSON


def _id_of(collection: Collection, document: Document) -> str:
    id = document[ID_FIELD[collection]]
    if not isinstance(id, str):
        raise AssertionError(f"{collection}: the id is {id!r}")
    return id


def _encode(value: Any, depth: int = 0) -> Any:
    """Raises ValueError or TypeError, as json.dumps() does, for what is no JSON."""
    match value:
        case None | bool():
            return value
        case str():
            return str(value) if _is_text(value) else _escaped(value)
        case int():
            if -(2**63) <= value < 2**63:
                return int(value)
            return Decimal128(str(value)) if abs(value) < 10**34 else _escaped(value)
        case float():
            if not math.isfinite(value):
                raise ValueError(f"{value} is no JSON")
            return float(value)
        case list() | tuple() if depth <= _DEEPEST:
            return [_encode(item, depth + 1) for item in value]
        case dict() if (depth <= _DEEPEST and all(map(_is_name, value)) and [*value] != [_ESCAPE]) or depth == 0:
            return {name: _encode(item, depth + 1) for name, item in value.items()}
        case _:
            return _escaped(value)


def _escaped(value: Any) -> Document:
    return {_ESCAPE: json.dumps(value, separators=(",", ":"), allow_nan=False)}


def _is_text(value: str) -> bool:
    """An unpaired surrogate is none."""
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def _is_name(name: object) -> bool:
    """The driver would make something of its own out of a sub-document with $ref."""
    return isinstance(name, str) and "\0" not in name and name != "$ref" and _is_text(name)


def _decode(value: Any) -> Any:
    match value:
        case dict():
            if len(value) == 1 and _ESCAPE in value:
                return json.loads(value[_ESCAPE])
            return {name: _decode(item) for name, item in value.items()}
        case list():
            return [_decode(item) for item in value]
        case Decimal128():
            return int(value.to_decimal())
        case Int64():
            return int(value)
        case _:
            return value


def _shown(stored: Document) -> Document:
    document: Document = _decode(stored)
    if document.get("fl") == {}:  # it held what the store keeps there for itself
        del document["fl"]
    return document


# ---- queries


def find_arguments(query: Query) -> Mapping[str, Any]:
    order: dict[str, int] = {}
    for field, descending in query.sort:
        if _is_plain(field):
            order.setdefault(field, -1 if descending else 1)
    order["_id"] = -1 if query.sort and query.sort[-1][1] else 1
    return {
        "filter": filter_of(query.where),
        "projection": _HIDDEN,
        "sort": [*order.items()],
        "skip": min(query.skip, _LARGEST),
        "limit": min(query.limit, _LARGEST),
    }


def filter_of(where: tuple[Condition, ...]) -> Document:
    return {"$and": [_filter(condition) for condition in where]} if where else {}


def _filter(condition: Condition) -> Document:
    field, op, value = condition.field, condition.op, condition.value
    if op == "in":
        if not isinstance(value, tuple):
            raise AssertionError(f"{field} in {value!r}: a tuple is needed")
        there = [_bound(one) for one in value if one is not None]
        terms = [_compare(field, "in", there)] if there else []
        terms += [_is_null(field)] if None in value else []
        return {"$or": terms} if terms else {"$alwaysFalse": 1}
    value = _scalar(condition)
    if op == "ne":
        return {"$nor": [_filter(Condition(field, "eq", value))]}
    if value is None:  # null is equal to itself, and neither more nor less
        return _is_null(field) if op in ("eq", "lte", "gte") else {"$alwaysFalse": 1}
    return _compare(field, op, _bound(value))


def _compare(field: str, op: str, value: Any) -> Document:
    """The server compares among values of a kind; it looks into lists, which the guards take back."""
    if _is_plain(field):
        return {field: {f"${op}": value, **_NO_LIST}, **dict.fromkeys(_parents(field), _NO_LIST)}
    if not _is_nameable(field):
        return {"$alwaysFalse": 1}
    found = _get_field(field)
    values = value if op == "in" else [value]
    comparison = "eq" if op == "in" else op
    return {
        "$expr": {
            "$or": [{"$and": [_is_kind(found, one), {f"${comparison}": [found, {"$literal": one}]}]} for one in values]
        }
    }


def _is_null(field: str) -> Document:
    if _is_plain(field):
        absent = [{parent: {"$type": "array"}} for parent in _parents(field)]
        null = {field: {"$eq": None, **_NO_LIST}}
        return {"$or": [null, *absent]} if absent else null
    if not _is_nameable(field):
        return {"$alwaysTrue": 1}
    return {"$expr": {"$in": [{"$type": _get_field(field)}, ["missing", "null"]]}}


_NO_LIST: Mapping[str, Any] = {"$not": {"$type": "array"}}


def _parents(field: str) -> list[str]:
    """Those that may be lists; `fl` is ours and is none."""
    names = field.split(".")
    return [".".join(names[:count]) for count in range(2 if names[0] == "fl" else 1, len(names))]


def _scalar(condition: Condition) -> str | int | float | bool | None:
    if isinstance(condition.value, tuple):
        raise AssertionError(f"{condition.field} {condition.op} {condition.value!r}: a scalar is needed")
    return condition.value


def _is_nameable(field: str) -> bool:
    """Whether a document can have it."""
    return _is_text(field) and "\0" not in field and field.count(".") <= _DEEPEST and field.split(".")[0] != "_id"


def _is_plain(field: str) -> bool:
    """Whether the server's path language can name it."""
    return _is_nameable(field) and all(name and name[0] != "$" for name in field.split("."))


def _get_field(field: str) -> Any:
    found: Any = "$$ROOT"
    for name in field.split("."):
        found = {"$getField": {"field": {"$literal": name}, "input": found}}
    return found


def _is_kind(found: Any, value: Any) -> Document:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal128):
        return {"$eq": [{"$type": found}, {"$type": {"$literal": value}}]}
    return {"$isNumber": found}


def _bound(value: str | int | float | bool) -> Any:
    """A user may ask for a number that no document has."""
    if isinstance(value, float):
        return value
    if isinstance(value, int) and abs(value) >= 10**34:
        return math.copysign(math.inf, value)
    return _encode(value)
