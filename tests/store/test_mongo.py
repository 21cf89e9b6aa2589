"""What is MongoDB's alone: what a user sees there, indexes, lost answers, who owns it. Against a real mongod."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from motor.motor_asyncio import AsyncIOMotorClient

from fl_server.errors import Corrupt, Deposed, FlserveError, Invalid, Owned, Unavailable
from fl_server.services import Mongod
from fl_server.store import mongo
from fl_server.store.mongo import MongoStateStore, find_arguments
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
from tests.proxy import Proxy, proxied

SESSIONS, ROUNDS, STATUSES, CLIENTS = Collection.SESSIONS, Collection.ROUNDS, Collection.STATUSES, Collection.CLIENTS
DATABASE = f"fl-test-mongo-{os.getpid()}"
WAIT_S = 60.0


@pytest.fixture
async def database(mongo_url: str) -> AsyncIterator[Any]:
    """As a user with pymongo sees it; empty, but for its indexes."""
    client: AsyncIOMotorClient[Document] = AsyncIOMotorClient(mongo_url, timeoutMS=10_000)
    found = client[DATABASE]
    for name in await found.list_collection_names():
        await found[name].delete_many({})
    yield found
    client.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners are given up soon, but not while a disk is slow."""
    for name, value_s in {"RENEW_EVERY_S": 0.1, "LEASE_S": 1.5, "TAKE_OVER_S": 2.0, "_POLL_S": 0.1}.items():
        monkeypatch.setattr(mongo, name, value_s)


@asynccontextmanager
async def kept(store: MongoStateStore, owner: str = "the test") -> AsyncIterator[MongoStateStore]:
    """Open, and its ownership renewed."""
    await store.open(owner)
    keeping = asyncio.create_task(store.keep())
    try:
        yield store
    finally:
        keeping.cancel()
        await asyncio.wait([keeping])
        await store.close()


@pytest.fixture
async def store(mongo_url: str, database: Any) -> AsyncIterator[MongoStateStore]:
    async with kept(MongoStateStore(mongo_url, DATABASE)) as store:
        yield store


def session(version: int, id: str = "s", **fields: Any) -> Document:
    return {"session_id": id, **fields, "fl": {"version": version}}


def round(version: int, id: str = "1", **fields: Any) -> Document:
    return {"round_id": id, "status": "Pending", **fields, "fl": {"version": version}}


# ---- what a user sees


async def test_documents_have_fedns_fields_at_their_top_and_ours_in_fl(store: MongoStateStore, database: Any) -> None:
    await store.save([Put(ROUNDS, round(1, round_config={"rounds": 1})), PutReport("1", "c", "u", 1, {"seq": 1})])
    await store.append(STATUSES, [{"status_id": "a", "sender": {"name": "c"}, "data": 1}])
    seen = await database["control.rounds"].find_one({"round_id": "1"})
    assert isinstance(seen.pop("_id"), ObjectId)
    assert seen.pop("fl") == {
        "version": 1,
        "epoch": 1,
        "reports": [{"client": "c", "update_id": "u", "seq": 1, "report": {"seq": 1}}],
        "reports_seq": 1,
    }
    assert seen == {"round_id": "1", "status": "Pending", "round_config": {"rounds": 1}}
    [seen] = await database["control.status"].find({}, {"_id": 0}).to_list(None)
    assert seen == {"status_id": "a", "sender": {"name": "c"}, "data": 1}


async def test_what_the_store_keeps_in_fl_is_in_no_document_that_it_gives(store: MongoStateStore) -> None:
    document = round(1)
    await store.save([Put(ROUNDS, document), PutReport("1", "c", "u", 1, {})])
    assert await store.get(ROUNDS, "1") == document
    assert await store.find(ROUNDS, Query()) == [document]


async def test_a_put_keeps_the_reports_of_its_round(store: MongoStateStore) -> None:
    await store.save([Put(ROUNDS, round(1)), PutReport("1", "c", "u", 1, {"n": 1}), Put(ROUNDS, round(2))])
    assert await store.reports("1") == [{"n": 1}]
    assert await store.get(ROUNDS, "1") == round(2)


def deep(levels: int) -> Any:
    return {"d": deep(levels - 1)} if levels else "bottom"


@pytest.mark.parametrize(
    "value",
    [
        10**33,
        -(10**40),
        2**63,
        -(2**63),
        {"$ref": "a", "$id": 1},
        {"a\0b": 1},
        {"\ud800": 1},
        {"fl.json": "1"},
        {"fl.json": 1},
        [{"fl.json": "[]"}],
        deep(200),
        [[[["\ud800"]]]],
        {"$set": {"": {".": ["$x"]}}},
    ],
    ids=lambda value: str(value)[:30].encode("ascii", "backslashreplace").decode(),
)
async def test_json_that_bson_cannot_hold_comes_back_as_it_was(store: MongoStateStore, value: Any) -> None:
    await store.append(STATUSES, [{"status_id": "a", "data": value}])
    await store.save([Put(SESSIONS, session(1, data=value)), Patch(SESSIONS, "s", {"more": value})])
    assert (await store.get(STATUSES, "a") or {})["data"] == value
    assert await store.get(SESSIONS, "s") == {**session(1, data=value), "more": value}


async def test_an_id_that_bson_cannot_hold_is_found(store: MongoStateStore) -> None:
    assert await store.insert(CLIENTS, {"client_id": "\ud800"})
    assert not await store.insert(CLIENTS, {"client_id": "\ud800"})
    assert await store.get(CLIENTS, "\ud800") == {"client_id": "\ud800"}


async def test_lists_look_into_no_list(store: MongoStateStore) -> None:
    await store.append(STATUSES, [{"status_id": "a", "sender": [{"name": "x"}]}, {"status_id": "b", "type": ["x"]}])
    for field in ("sender.name", "type", "sender.0.name", "type.0"):
        assert await store.find(STATUSES, Query((Condition(field, "eq", "x"),))) == []
        assert await store.count(STATUSES, (Condition(field, "ne", "x"),)) == 2


async def test_the_order_of_insertion_survives_a_clock_that_was_set_back(
    mongo_url: str, database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, at_s in enumerate((2_000_000_000, 1_000_000_000, 1_500_000_000)):
        monkeypatch.setattr(mongo.time, "time", lambda at_s=at_s: at_s)
        async with kept(MongoStateStore(mongo_url, DATABASE)) as store:
            await store.append(STATUSES, [{"status_id": f"{number}{n}"} for n in range(3)])
            found = await store.find(STATUSES, Query())
    assert [document["status_id"] for document in found] == ["00", "01", "02", "10", "11", "12", "20", "21", "22"]


# ---- indexes


async def test_fedns_own_predictions_without_our_id_are_no_obstacle(mongo_url: str, database: Any) -> None:
    await database["control.predictions"].insert_many([{"prediction_id": "p"}, {"prediction_id": "q"}])
    async with kept(MongoStateStore(mongo_url, DATABASE)) as store:
        await store.append(Collection.PREDICTIONS, [{"record_id": "r", "prediction_id": "p"}] * 2)
        assert await store.count(Collection.PREDICTIONS) == 3


async def test_no_list_and_no_query_of_the_server_scans_a_collection(store: MongoStateStore, database: Any) -> None:
    newest = (("committed_at", True),)
    for collection, fields in INDEXED.items():
        queries = [Query((), newest, limit=10), Query((), (("committed_at", False),)), Query()]
        for field in fields:
            is_x, among = Condition(field, "eq", "x"), Condition(field, "in", ("x", "y"))
            queries += [Query((is_x,), newest, limit=10), Query((among,), newest), Query((is_x,))]
            queries += [Query((), ((field, True), *newest), limit=10)]
        if collection is ROUNDS:
            queries += [Query((), (("fl.ordinal", True),), limit=1)]
        for query in queries:
            arguments = find_arguments(query)
            command = {"find": collection.value, **arguments, "sort": dict(arguments["sort"])}
            plan = await explained(database, command)
            assert "COLLSCAN" not in plan, (query, plan)
            if query.sort and all(one.op == "eq" and one.field != ID_FIELD[collection] for one in query.where):
                assert "'SORT'" not in plan, (query, plan)
        counted = [(mongo.filter_of(query.where), {} if query.where else {"hint": "_id_"}) for query in queries]
        for match, hint in counted:
            count = [{"$match": match}, {"$group": {"_id": 1, "n": {"$sum": 1}}}]
            plan = await explained(database, {"aggregate": collection.value, "pipeline": count, "cursor": {}, **hint})
            assert "COLLSCAN" not in plan, (match, plan)


async def explained(database: Any, command: Document) -> str:
    said = await database.command({"explain": command, "verbosity": "queryPlanner"})
    said.pop("command")
    return str(said)


# ---- what is promised of each call


async def test_every_write_waits_for_the_journal_of_a_majority_and_no_call_for_ever(
    mongo_url: str, database: Any, heard: list[Document]
) -> None:
    await database["fl.deployment"].delete_many({})
    async with kept(MongoStateStore(mongo_url, DATABASE)) as store:
        await store.save(
            [
                Put(SESSIONS, session(1)),
                Put(ROUNDS, round(1)),
                PutReport("1", "c", "u", 1, {}),
                Patch(SESSIONS, "s", {"name": "x"}),
                Patch(CLIENTS, "c", {"name": "x"}),
            ]
        )
        await store.insert(CLIENTS, {"client_id": "c"})
        await store.append(STATUSES, [{"status_id": f"{n}"} for n in range(3)])
        await store.delete(STATUSES, "0")
        await store.delete_where(STATUSES, (), 10)
        await store.get(SESSIONS, "s")
        await store.find(SESSIONS, Query())
        await store.count(SESSIONS)
        await store.reports("1")
        async with asyncio.timeout(60):
            while not any("renewals" in str(command) for command in heard):
                await asyncio.sleep(0.01)
    writes = [command for command in heard if not command.keys() & {"find", "aggregate"}]
    assert {next(iter(command)) for command in writes} == {"createIndexes", "insert", "update", "delete"}
    renewed = [update["u"] for command in writes if "update" in command for update in command["updates"]]
    assert {"$inc": {"renewals": 1}} in renewed and {"$set": {"held": False}} in renewed
    assert [command["writeConcern"] for command in writes] == [{"w": "majority", "j": True}] * len(writes)
    longest_s = {"createIndexes": mongo.INDEXING_TIMEOUT_S, "update": mongo.INDEXING_TIMEOUT_S}
    for command in heard:
        limit_s = longest_s.get(next(iter(command)), mongo.TIMEOUT_S)
        assert 0 < command["maxTimeMS"] <= limit_s * 1000, command


async def test_calls_that_hear_nothing_end_with_their_time(
    proxy: Proxy, database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the driver: the server's own limit does not help when the request never arrives."""
    monkeypatch.setattr(mongo, "TIMEOUT_S", 1.0)
    async with kept(MongoStateStore(proxy.url, DATABASE)) as store:
        proxy.lose("wait", b"control.s", times=100)
        async with asyncio.timeout(WAIT_S):
            ends = await asyncio.gather(
                store.save([Put(SESSIONS, session(1))]),
                store.insert(SESSIONS, session(1)),
                store.append(STATUSES, [{"status_id": "a"}]),
                store.delete(SESSIONS, "s"),
                store.delete_where(STATUSES, (), 1),
                store.get(SESSIONS, "s"),
                store.find(SESSIONS, Query()),
                store.count(SESSIONS),
                return_exceptions=True,
            )
        assert [type(end) for end in ends] == [Unavailable] * 8
        proxy.times = 0


# ---- lost requests and answers


@pytest.fixture
async def proxy(mongo_url: str) -> AsyncIterator[Proxy]:
    async with proxied(mongo_url) as proxy:
        yield proxy


@pytest.fixture
async def behind_proxy(proxy: Proxy, database: Any) -> AsyncIterator[MongoStateStore]:
    async with kept(MongoStateStore(proxy.url, DATABASE)) as store:
        yield store


async def again(work: Callable[[], Awaitable[Any]]) -> Any:
    """As the scheduler: until its outcome is known."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return await work()
            except Unavailable:
                await asyncio.sleep(0)


@pytest.mark.parametrize("lost", ["request", "answer"])
@pytest.mark.parametrize("times", [1, 3])
async def test_a_save_whose_outcome_is_unknown_is_unavailable_and_saved_once_when_repeated(
    behind_proxy: MongoStateStore, proxy: Proxy, lost: Any, times: int
) -> None:
    writes: list[Write] = [
        Put(SESSIONS, session(1)),
        Put(ROUNDS, round(1)),
        PutReport("1", "a", "u", 1, {"n": 1}),
        PutReport("1", "b", "u", 2, {"n": 2}),
        Patch(SESSIONS, "s", {"name": "patched"}),
    ]
    proxy.lose(lost, b"control.sessions", times)
    with pytest.raises(Unavailable, match=DATABASE):
        await behind_proxy.save(writes)
    await again(lambda: behind_proxy.save(writes))
    assert proxy.times == 0
    assert await behind_proxy.get(SESSIONS, "s") == {**session(1), "name": "patched"}
    assert await behind_proxy.reports("1") == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize("lost", ["request", "answer"])
async def test_reports_whose_outcome_is_unknown_are_there_once_when_repeated_among_others(
    behind_proxy: MongoStateStore, proxy: Proxy, database: Any, lost: Any
) -> None:
    reports: list[Write] = [PutReport("1", f"c{n}", "u", n, {"n": n}) for n in range(1, 5)]
    await behind_proxy.save([Put(ROUNDS, round(1)), reports[0]])
    proxy.lose(lost, b"$push")
    with pytest.raises(Unavailable):
        await behind_proxy.save(reports[:3])
    await behind_proxy.save([reports[3]])
    await again(lambda: behind_proxy.save(reports[:3]))
    assert await behind_proxy.reports("1") == [{"n": 1}, {"n": 2}, {"n": 3}, {"n": 4}]
    seen = await database["control.rounds"].find_one({"round_id": "1"})
    assert len(seen["fl"]["reports"]) == 4


@pytest.mark.parametrize("lost", ["request", "answer"])
async def test_an_insert_whose_outcome_is_unknown_is_true_when_repeated_and_false_for_others(
    behind_proxy: MongoStateStore, proxy: Proxy, lost: Any
) -> None:
    proxy.lose(lost, b"insert")
    with pytest.raises(Unavailable):
        await behind_proxy.insert(SESSIONS, session(1))
    assert await again(lambda: behind_proxy.insert(SESSIONS, session(1)))
    assert not await behind_proxy.insert(SESSIONS, session(1))
    assert await behind_proxy.count(SESSIONS) == 1


@pytest.mark.parametrize("lost", ["request", "answer"])
async def test_an_append_whose_outcome_is_unknown_stores_each_once_when_repeated(
    behind_proxy: MongoStateStore, proxy: Proxy, lost: Any
) -> None:
    records = [{"status_id": f"{n}"} for n in range(5)]
    proxy.lose(lost, b"insert")
    with pytest.raises(Unavailable):
        await behind_proxy.append(STATUSES, records)
    await again(lambda: behind_proxy.append(STATUSES, records))
    assert await behind_proxy.find(STATUSES, Query()) == records


async def test_a_cancelled_save_may_be_repeated(store: MongoStateStore) -> None:
    saving = asyncio.ensure_future(store.save([Put(ROUNDS, round(1)), PutReport("1", "c", "u", 1, {"n": 1})]))
    await asyncio.sleep(0)
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    await store.save([Put(ROUNDS, round(1)), PutReport("1", "c", "u", 1, {"n": 1})])
    assert await store.reports("1") == [{"n": 1}]


async def test_a_database_that_comes_back_is_used_again(
    proxy: Proxy, database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mongo, "TIMEOUT_S", 1.0)
    async with kept(MongoStateStore(proxy.url, DATABASE)) as store:
        await comes_back(store, proxy)


async def comes_back(behind_proxy: MongoStateStore, proxy: Proxy) -> None:
    await proxy.down()
    with pytest.raises(Unavailable, match="refused"):
        await behind_proxy.get(SESSIONS, "s")
    await proxy.up()
    await again(lambda: behind_proxy.save([Put(SESSIONS, session(1))]))
    assert await behind_proxy.get(SESSIONS, "s") == session(1)


# ---- who owns it


async def test_an_owner_that_does_not_renew_writes_nothing_until_it_has(
    mongo_url: str, database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MongoStateStore(mongo_url, DATABASE)
    await store.open("the test")
    monkeypatch.setattr(mongo, "LEASE_S", -1.0)
    writes: list[Callable[[], Awaitable[Any]]] = [
        lambda: store.save([Put(SESSIONS, session(1))]),
        lambda: store.insert(CLIENTS, {"client_id": "c"}),
        lambda: store.append(STATUSES, [{"status_id": "a"}]),
        lambda: store.delete(STATUSES, "a"),
        lambda: store.delete_where(STATUSES, (), 1),
    ]
    for write in writes:
        with pytest.raises(Unavailable, match="ownership"):
            await write()
    assert await store.count(SESSIONS) == await store.count(CLIENTS) == await store.count(STATUSES) == 0
    monkeypatch.setattr(mongo, "LEASE_S", 60.0)
    for write in writes:
        await write()
    await store.close()


@pytest.mark.usefixtures("quick")
async def test_an_owner_that_died_is_followed_and_the_next_epoch_stamped(mongo_url: str, database: Any) -> None:
    dead = MongoStateStore(mongo_url, DATABASE)
    await dead.open("the dead")
    await dead.save([Put(SESSIONS, session(1)), Put(ROUNDS, round(1)), Put(ROUNDS, round(1, "0", status="Finished"))])
    async with asyncio.timeout(WAIT_S), kept(MongoStateStore(mongo_url, DATABASE)) as store:
        assert await store.get(SESSIONS, "s") == session(1)
        assert (await database["control.sessions"].find_one({}))["fl"]["epoch"] == 2
        assert (await database["control.rounds"].find_one({"round_id": "1"}))["fl"]["epoch"] == 2
        with pytest.raises(Deposed, match="the test"):
            await dead.keep()
        with pytest.raises(Deposed, match="the test"):
            await dead.save([Put(SESSIONS, session(2))])
        with pytest.raises(Deposed):
            await dead.append(STATUSES, [{"status_id": "a"}])
        await dead.close()
        await store.save([Put(SESSIONS, session(2))])  # the close of a deposed one releases nothing
    async with kept(MongoStateStore(mongo_url, DATABASE)) as store:
        assert await store.get(SESSIONS, "s") == session(2)


@pytest.mark.parametrize(
    "write",
    [
        Put(SESSIONS, session(9)),
        Put(ROUNDS, round(9)),
        Patch(SESSIONS, "s", {"name": "x"}),
        Patch(ROUNDS, "1", {"status": "x"}),
        PutReport("1", "c", "u", 9, {}),
    ],
    ids=lambda write: f"{type(write).__name__} {getattr(write, 'collection', '')}",
)
async def test_a_write_that_was_under_way_when_another_took_over_changes_nothing(
    mongo_url: str, database: Any, monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    """Its time is not over by its own clock: only the epoch in the document stops it."""
    monkeypatch.setattr(mongo, "LEASE_S", math.inf)
    monkeypatch.setattr(mongo, "TAKE_OVER_S", 0.0)
    monkeypatch.setattr(mongo, "_POLL_S", 0.01)
    stopped = MongoStateStore(mongo_url, DATABASE)
    await stopped.open("the stopped")
    await stopped.save([Put(SESSIONS, session(1)), Put(ROUNDS, round(1)), PutReport("1", "a", "u", 1, {})])
    successor = MongoStateStore(mongo_url, DATABASE)
    async with asyncio.timeout(WAIT_S):
        await successor.open("the successor", standby=True)

    async def stored() -> list[list[Document]]:
        return [await database[name].find().to_list(None) for name in ("control.sessions", "control.rounds")]

    before = await stored()
    with pytest.raises(Deposed, match="the successor"):
        await stopped.save([write])
    assert await stored() == before
    await stopped.close()
    await successor.close()


async def test_a_round_that_a_deposed_owner_began_gives_way_to_the_owners(
    mongo_url: str, database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mongo, "LEASE_S", math.inf)
    monkeypatch.setattr(mongo, "TAKE_OVER_S", 0.0)
    monkeypatch.setattr(mongo, "_POLL_S", 0.01)
    stopped, successor = MongoStateStore(mongo_url, DATABASE), MongoStateStore(mongo_url, DATABASE)
    await stopped.open("the stopped")
    await successor.open("the successor", standby=True)
    await stopped.save([Put(ROUNDS, round(3, "7", of="the stopped"))])
    await successor.save([Put(ROUNDS, round(1, "7", of="the successor"))])
    assert await successor.get(ROUNDS, "7") == round(1, "7", of="the successor")
    with pytest.raises(Deposed):
        await stopped.save([PutReport("7", "c", "u", 1, {})])
    await stopped.close()
    await successor.close()


@pytest.mark.usefixtures("quick")
async def test_a_standby_waits_while_the_owner_lives_and_takes_over_when_it_closes(
    mongo_url: str, database: Any
) -> None:
    standby = MongoStateStore(mongo_url, DATABASE)
    async with asyncio.timeout(WAIT_S), kept(MongoStateStore(mongo_url, DATABASE), "the owner") as owner:
        waiting = asyncio.ensure_future(standby.open("the standby", standby=True))
        for version in range(1, 10):
            await owner.save([Put(SESSIONS, session(version))])
            await asyncio.wait([waiting], timeout=mongo.TAKE_OVER_S / 4)
            assert not waiting.done()
    async with asyncio.timeout(WAIT_S):
        await waiting
    assert await standby.get(SESSIONS, "s") == session(9)
    await standby.close()


@pytest.mark.long
@pytest.mark.usefixtures("quick")
async def test_an_outage_of_the_database_deposes_nobody(
    proxy: Proxy, database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mongo, "_RETRY_S", 0.05)
    monkeypatch.setattr(mongo, "TIMEOUT_S", 2.0)
    standby = MongoStateStore(proxy.url, DATABASE)
    async with asyncio.timeout(WAIT_S), kept(MongoStateStore(proxy.url, DATABASE), "the owner") as owner:
        waiting = asyncio.ensure_future(standby.open("the standby", standby=True))
        await asyncio.wait([waiting], timeout=mongo.TAKE_OVER_S)
        await proxy.down()
        await asyncio.wait([waiting], timeout=2 * mongo.TAKE_OVER_S)
        with pytest.raises(Unavailable):
            await owner.save([Put(SESSIONS, session(1))])
        await proxy.up()
        await again(lambda: owner.save([Put(SESSIONS, session(1))]))
        await asyncio.wait([waiting], timeout=2 * mongo.TAKE_OVER_S)
        assert not waiting.done()
        await owner.save([Put(SESSIONS, session(2))])
        waiting.cancel()
        await asyncio.wait([waiting])


async def test_close_while_the_database_is_away_is_allowed(
    proxy: Proxy, database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mongo, "TIMEOUT_S", 1.0)
    async with kept(MongoStateStore(proxy.url, DATABASE)):
        await proxy.down()
    await proxy.up()


async def test_an_owner_says_who_it_is_to_the_one_that_it_keeps_out(store: MongoStateStore, mongo_url: str) -> None:
    other = MongoStateStore(mongo_url, DATABASE)
    with pytest.raises(Owned, match=r"127\.0\.0\.1.*owned by the test.*--standby"):
        await other.open("the other")
    with pytest.raises(AssertionError, match="not open"):
        await other.get(SESSIONS, "s")


# ---- what is refused at the start


async def refused(url: str, database: str = DATABASE) -> FlserveError:
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(FlserveError) as caught:
            await MongoStateStore(url, database).open("the test")
    return caught.value


async def test_a_newer_schema_is_refused_and_owned_by_nobody(mongo_url: str, database: Any) -> None:
    await database["fl.deployment"].insert_one({"_id": "schema", "schema_version": 99})
    for _ in range(2):
        why = await refused(mongo_url)
        assert isinstance(why, Corrupt) and "99" in str(why)
    assert await database["fl.deployment"].find_one({"_id": "owner"}) is None
    await database["fl.deployment"].delete_one({"_id": "schema"})


async def test_a_wrong_password_is_said_and_not_repeated(mongo_url: str) -> None:
    why = await refused(mongo_url.replace("mongodb://", "mongodb://fl:hush@"))
    assert isinstance(why, Unavailable) and "wrong user or password" in str(why)
    assert "hush" not in str(why) and "\n" not in str(why)


@pytest.mark.parametrize("url", ["http://x", "mongodb://u:hu@sh@h", "mongodb://h:hush/", "hush", "mongodb://"])
async def test_a_url_that_is_none_is_invalid_and_not_repeated(url: str) -> None:
    why = await refused(url)
    assert isinstance(why, Invalid) and str(why).startswith("mongo_url") and "sh" not in str(why).split("(")[0]


async def test_a_server_that_is_not_there_is_unavailable_by_its_address(
    unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mongo, "TIMEOUT_S", 1.0)
    why = await refused(f"mongodb://fl:hush@127.0.0.1:{unused_tcp_port}/?appName=x")
    assert isinstance(why, Unavailable) and f"127.0.0.1:{unused_tcp_port}, database" in str(why)
    assert "hush" not in str(why)


# ---- a mongod of its own


@pytest.mark.long
async def test_what_was_answered_survives_the_death_of_mongod(tmp_path: Path) -> None:
    mongod = Mongod(tmp_path)
    await mongod.start()
    try:
        async with kept(MongoStateStore(mongod.url, DATABASE)) as store:
            await store.save([Put(ROUNDS, round(1))])
            answered: list[str] = []

            async def write() -> None:
                while True:
                    number = len(answered) + 1
                    await store.save([PutReport("1", f"c{number}", "u", number, {"n": number})])
                    await store.append(STATUSES, [{"status_id": f"{number}"}])
                    answered.append(f"{number}")

            writing = asyncio.ensure_future(write())
            async with asyncio.timeout(WAIT_S):
                while len(answered) < 200:
                    await asyncio.wait([writing], timeout=0.05)
            await mongod.kill()
            with pytest.raises(Unavailable):
                await writing
            await mongod.start()
            found = await again(lambda: store.find(STATUSES, Query()))
            reports = await again(lambda: store.reports("1"))
            assert [document["status_id"] for document in found][: len(answered)] == answered
            assert [str(report["n"]) for report in reports][: len(answered)] == answered
            await again(lambda: store.save([Put(SESSIONS, session(1))]))
    finally:
        await mongod.kill()


@pytest.mark.long
async def test_a_round_of_ten_thousand_reports_fits_and_is_read_by_client(store: MongoStateStore) -> None:
    id = "0" * 36
    await store.save([Put(ROUNDS, round(1, cohort=[id] * 10_000))])
    for start in range(0, 10_000, 250):
        await store.save(
            [
                PutReport("1", f"{n:036}", id, n, {"task": [id, 1, 1, "train", id], "blob": "0" * 53, "n": n})
                for n in range(start, start + 250)
            ]
        )
    assert [report["n"] for report in await store.reports("1")] == [*range(10_000)]
    assert [report["n"] for report in await store.reports("1", f"{777:036}")] == [777]
