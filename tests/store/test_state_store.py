"""What every StateStore promises, outcome by outcome. A new adapter is one more Place and one more parameter."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from motor.motor_asyncio import AsyncIOMotorClient

from fl_server.errors import Owned
from fl_server.store.mongo import MongoStateStore
from fl_server.store.ports import (
    ID_FIELD,
    Collection,
    Condition,
    Document,
    Patch,
    Put,
    PutReport,
    Query,
    StateStore,
    Write,
)
from fl_server.store.sqlite import SqliteStateStore

SESSIONS, STATUSES, CLIENTS = Collection.SESSIONS, Collection.STATUSES, Collection.CLIENTS


class Place(Protocol):
    """Where stores keep their data: all that connect() makes share it."""

    def connect(self) -> StateStore: ...

    async def clear(self) -> None:
        """Nothing is stored there."""


class SqlitePlace:
    def __init__(self, folder: Path, executor: Executor) -> None:
        self.folder, self.executor = folder, executor

    def connect(self) -> StateStore:
        return SqliteStateStore(self.folder / "state.db", self.executor)

    async def clear(self) -> None:
        """The folder is new."""


class MongoPlace:
    """One database for all tests: its indexes take longer than a test."""

    def __init__(self, url: str) -> None:
        self.url = url

    def connect(self) -> StateStore:
        return MongoStateStore(self.url, MONGO_DATABASE)

    async def clear(self) -> None:
        client: AsyncIOMotorClient[Document] = AsyncIOMotorClient(self.url, timeoutMS=10_000)
        database = client[MONGO_DATABASE]
        for name in await database.list_collection_names():
            await database[name].delete_many({})
        client.close()


MONGO_DATABASE = f"fl-test-{os.getpid()}"


@pytest.fixture(params=["sqlite", "mongo"])
def any_place(request: pytest.FixtureRequest, tmp_path: Path, executor: Executor) -> Place:
    if request.param == "mongo":
        return MongoPlace(request.getfixturevalue("mongo_url"))
    return SqlitePlace(tmp_path, executor)


@pytest.fixture
async def place(any_place: Place) -> Place:
    await any_place.clear()
    return any_place


@pytest.fixture
async def store(place: Place) -> AsyncIterator[StateStore]:
    store = place.connect()
    await store.open("the test")
    keeping = asyncio.create_task(store.keep())
    yield store
    keeping.cancel()
    await asyncio.wait([keeping])
    await store.close()


def session(version: int, id: str = "s", **fields: Any) -> Document:
    return {"session_id": id, "fl": {"version": version}, **fields}


def status(id: str, **fields: Any) -> Document:
    return {"status_id": id, **fields}


async def ids(store: StateStore, *where: Condition, collection: Collection = STATUSES, **query: Any) -> list[str]:
    found = await store.find(collection, Query(where, **query))
    return [document[ID_FIELD[collection]] for document in found]


# ---- documents by id


async def test_a_document_comes_back_as_it_was_given(store: StateStore) -> None:
    document = status("a", text='é "\\\n\0\ud800', number=10**30, real=0.1, nested={"é.b": [None, True, {}]}, empty="")
    assert await store.insert(STATUSES, document)
    assert await store.get(STATUSES, "a") == document


async def test_what_was_never_stored_is_none(store: StateStore) -> None:
    assert await store.get(STATUSES, "a") is None


@pytest.mark.parametrize("collection", Collection)
async def test_each_collection_keeps_its_own_ids(store: StateStore, collection: Collection) -> None:
    document = {ID_FIELD[collection]: "x"}
    assert await store.insert(collection, document)
    assert await store.get(collection, "x") == document
    assert [other for other in Collection if await store.get(other, "x") is not None] == [collection]


async def test_insert_of_an_existing_id_is_false_and_changes_nothing(store: StateStore) -> None:
    assert await store.insert(STATUSES, status("a", data=1))
    assert not await store.insert(STATUSES, status("a", data=2))
    assert await store.get(STATUSES, "a") == status("a", data=1)


async def test_append_stores_each_id_once_also_within_one_call(store: StateStore) -> None:
    await store.append(STATUSES, [status("a", data=1), status("b", data=1), status("a", data=2)])
    await store.append(STATUSES, [status("b", data=3), status("c", data=3)])
    assert [(d["status_id"], d["data"]) for d in await store.find(STATUSES, Query())] == [("a", 1), ("b", 1), ("c", 3)]


async def test_append_keeps_ids_and_values_of_any_text_in_their_order(store: StateStore) -> None:
    for ids in (["a", 'quo"te', "\\u0000", "x\ty"], ["a b", "ä", "\u2028", "plain"]):
        texts = ["\0", "\\", '"', "\U0001f600 ä \x7f"]
        await store.append(STATUSES, [status(id, data=text) for id, text in zip(ids, texts, strict=True)])
        for id, text in zip(ids, texts, strict=True):
            found = await store.get(STATUSES, id)
            assert found is not None
            assert found["data"] == text
    stored = [document["status_id"] for document in await store.find(STATUSES, Query())]
    assert stored == ["a", 'quo"te', "\\u0000", "x\ty", "a b", "ä", "\u2028", "plain"]


async def test_append_of_nothing_is_allowed(store: StateStore) -> None:
    await store.append(STATUSES, [])
    assert await store.count(STATUSES) == 0


async def test_delete_says_whether_there_was_one(store: StateStore) -> None:
    await store.insert(CLIENTS, {"client_id": "c"})
    assert await store.delete(CLIENTS, "c")
    assert not await store.delete(CLIENTS, "c")
    assert await store.get(CLIENTS, "c") is None


async def test_delete_where_takes_the_first_inserted_and_no_more_than_it_may(store: StateStore) -> None:
    await store.append(STATUSES, [status(id, data=number) for number, id in enumerate("abcde")])
    old = (Condition("data", "lt", 4),)
    assert await store.delete_where(STATUSES, old, 3) == 3
    assert await ids(store) == ["d", "e"]
    assert await store.delete_where(STATUSES, old, 3) == 1
    assert await store.delete_where(STATUSES, old, 3) == 0
    assert await ids(store) == ["e"]


async def test_delete_where_leaves_other_collections_and_takes_all_without_a_condition(store: StateStore) -> None:
    await store.append(STATUSES, [status("a"), status("b")])
    await store.insert(CLIENTS, {"client_id": "a"})
    assert await store.delete_where(STATUSES, (), 10) == 2
    assert await store.count(CLIENTS) == 1


async def test_a_document_that_comes_again_after_its_deletion_is_the_last(store: StateStore) -> None:
    await store.append(STATUSES, [status("a"), status("b")])
    await store.delete(STATUSES, "a")
    await store.append(STATUSES, [status("a")])
    assert await ids(store) == ["b", "a"]


# ---- save


async def test_put_writes_where_none_is_and_over_a_lower_version(store: StateStore) -> None:
    await store.save([Put(SESSIONS, session(1, name="one", gone=1))])
    await store.save([Put(SESSIONS, session(3, name="three"))])
    assert await store.get(SESSIONS, "s") == session(3, name="three")


@pytest.mark.parametrize("version", [0, 2, 3])
async def test_a_late_or_repeated_put_succeeds_and_undoes_nothing(store: StateStore, version: int) -> None:
    await store.save([Put(SESSIONS, session(3, name="newer"))])
    await store.save([Put(SESSIONS, session(version, name="late"))])
    assert await store.get(SESSIONS, "s") == session(3, name="newer")


async def test_put_wins_over_an_inserted_document_without_a_version(store: StateStore) -> None:
    await store.insert(SESSIONS, {"session_id": "s"})
    await store.save([Put(SESSIONS, session(0))])
    assert await store.get(SESSIONS, "s") == session(0)


async def test_put_over_a_document_keeps_its_place_in_the_order(store: StateStore) -> None:
    await store.save([Put(SESSIONS, session(1, "a")), Put(SESSIONS, session(1, "b"))])
    await store.save([Put(SESSIONS, session(2, "a"))])
    assert await ids(store, collection=SESSIONS) == ["a", "b"]


async def test_patch_sets_fields_and_reaches_into_sub_documents(store: StateStore) -> None:
    await store.insert(SESSIONS, {"session_id": "s", "a": 1, "sub": {"x": 1, "y": {"z": 1}}})
    await store.save([Patch(SESSIONS, "s", {"a": [1, {"b": None}], "sub.y.z": 2, "sub.new.deep": "n", "top": True})])
    assert await store.get(SESSIONS, "s") == {
        "session_id": "s",
        "a": [1, {"b": None}],
        "sub": {"x": 1, "y": {"z": 2}, "new": {"deep": "n"}},
        "top": True,
    }


async def test_patch_below_a_null_makes_it_a_sub_document(store: StateStore) -> None:
    await store.insert(SESSIONS, {"session_id": "s", "round_data": None})
    await store.save([Patch(SESSIONS, "s", {"round_data.reduce.time_s": 1.5})])
    assert await store.get(SESSIONS, "s") == {"session_id": "s", "round_data": {"reduce": {"time_s": 1.5}}}


async def test_patch_of_a_missing_document_does_nothing(store: StateStore) -> None:
    await store.save([Patch(SESSIONS, "s", {"name": "x"}), Put(SESSIONS, session(1, "other"))])
    assert await ids(store, collection=SESSIONS) == ["other"]


async def test_writes_of_one_save_happen_in_order(store: StateStore) -> None:
    await store.save(
        [Put(SESSIONS, session(1, name="a")), Patch(SESSIONS, "s", {"name": "b"}), Patch(SESSIONS, "s", {"name": "c"})]
    )
    assert await store.get(SESSIONS, "s") == session(1, name="c")


async def test_saving_again_is_saving_once(store: StateStore) -> None:
    writes: list[Write] = [
        Put(SESSIONS, session(1, name="a")),
        PutReport("r", "c", "u", 1, {"verdict": "accepted"}),
        Patch(SESSIONS, "s", {"name": "b"}),
    ]
    await store.save(writes)
    await store.save(writes)
    assert await store.find(SESSIONS, Query()) == [session(1, name="b")]
    assert await store.reports("r") == [{"verdict": "accepted"}]


async def test_a_save_with_a_value_that_is_no_json_writes_nothing(store: StateStore) -> None:
    await store.save([Put(SESSIONS, session(1, name="before"))])
    with pytest.raises(ValueError):
        await store.save(
            [
                Patch(SESSIONS, "s", {"name": "after"}),
                PutReport("r", "c", "u", 1, {}),
                Put(SESSIONS, session(1, "t", loss=float("nan"))),
            ]
        )
    assert await store.find(SESSIONS, Query()) == [session(1, name="before")]
    assert await store.reports("r") == []
    await store.save([Put(SESSIONS, session(2, name="the store goes on"))])
    assert await store.get(SESSIONS, "s") == session(2, name="the store goes on")


async def test_an_append_with_a_value_that_is_no_json_stores_nothing(store: StateStore) -> None:
    with pytest.raises(ValueError):
        await store.append(STATUSES, [status("a"), status("b", value=float("inf"))])
    assert await store.count(STATUSES) == 0


async def test_what_was_saved_is_there_for_the_next_owner(place: Place) -> None:
    first = place.connect()
    await first.open("first")
    await first.save([Put(SESSIONS, session(1)), PutReport("r", "c", "u", 1, {"n": 1})])
    await first.append(STATUSES, [status("b"), status("a")])
    await first.close()
    second = place.connect()
    await second.open("second")
    assert await second.get(SESSIONS, "s") == session(1)
    assert await second.reports("r") == [{"n": 1}]
    assert await ids(second) == ["b", "a"]
    await second.close()


# ---- reports


async def test_reports_are_listed_by_seq(store: StateStore) -> None:
    await store.save([PutReport("r", f"c{seq}", "u", seq, {"seq": seq}) for seq in (3, 10, 1, 2)])
    assert [report["seq"] for report in await store.reports("r")] == [1, 2, 3, 10]


async def test_reports_of_one_round_and_of_one_client_in_it(store: StateStore) -> None:
    await store.save(
        [
            PutReport("r", "a", "u1", 1, {"n": 1}),
            PutReport("r", "b", "u1", 2, {"n": 2}),
            PutReport("r", "a", "u2", 3, {"n": 3}),
            PutReport("other", "a", "u1", 1, {"n": 4}),
        ]
    )
    assert await store.reports("r", "a") == [{"n": 1}, {"n": 3}]
    assert await store.reports("r") == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert await store.reports("other") == [{"n": 4}]
    assert await store.reports("r", "") == await store.reports("none") == []


async def test_the_reports_of_a_round_go_with_it(store: StateStore) -> None:
    """After a reset, the next round has its id."""
    await store.save(
        [Put(Collection.ROUNDS, {"round_id": "r", "fl": {"version": 1}}), PutReport("r", "a", "u", 1, {"n": 1})]
    )
    assert await store.delete(Collection.ROUNDS, "r")
    assert await store.reports("r") == []
    await store.save([Put(Collection.ROUNDS, {"round_id": "r", "fl": {"version": 1}})])
    assert await store.reports("r") == []


async def test_a_lost_report_is_written_over_the_accepted_one_and_moves_behind(store: StateStore) -> None:
    await store.save([PutReport("r", "a", "u", 1, {"lost": False}), PutReport("r", "b", "u", 2, {"lost": False})])
    await store.save([PutReport("r", "a", "u", 3, {"lost": True})])
    assert await store.reports("r") == [{"lost": False}, {"lost": True}]


@pytest.mark.parametrize("seq", [0, 3])
async def test_a_late_report_does_not_undo_a_newer_one(store: StateStore, seq: int) -> None:
    await store.save([PutReport("r", "a", "u", 3, {"lost": True})])
    await store.save([PutReport("r", "a", "u", seq, {"lost": False})])
    assert await store.reports("r") == [{"lost": True}]


# ---- filters


VALUES = {
    "null": None,
    "true": True,
    "false": False,
    "zero": 0,
    "one": 1,
    "one_point_zero": 1.0,
    "text_one": "1",
    "text_one_point_zero": "1.0",
    "text_true": "true",
    "text_null": "null",
    "empty": "",
    "big": 2**70,
    "list": [1],
    "object": {"x": 1},
}


@pytest.fixture
async def values(store: StateStore) -> StateStore:
    """One status each under "type" (a usual filter) and under "unusual.field"; "absent" has neither."""
    await store.append(
        STATUSES,
        [status(id, type=value, unusual={"field": value}) for id, value in VALUES.items()] + [status("absent")],
    )
    return store


@pytest.mark.parametrize("field", ["type", "unusual.field"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, {"null", "absent"}),
        (True, {"true"}),
        (False, {"false"}),
        (0, {"zero"}),
        (1, {"one", "one_point_zero"}),
        (1.0, {"one", "one_point_zero"}),
        ("1", {"text_one"}),
        ("1.0", {"text_one_point_zero"}),
        ("true", {"text_true"}),
        ("null", {"text_null"}),
        ("", {"empty"}),
        (2**70, {"big"}),
        ("[1]", set()),
        ('{"x":1}', set()),
        ("\ud800", set()),
        (float("nan"), set()),
        (float("inf"), set()),
    ],
)
async def test_equality_tells_types_apart(values: StateStore, field: str, value: Any, expected: set[str]) -> None:
    everything = {*VALUES, "absent"}
    assert set(await ids(values, Condition(field, "eq", value))) == expected
    assert set(await ids(values, Condition(field, "in", (value,)))) == expected
    assert set(await ids(values, Condition(field, "ne", value))) == everything - expected
    assert await values.count(STATUSES, (Condition(field, "ne", value),)) == len(everything - expected)


@pytest.mark.parametrize("field", ["type", "unusual.field"])
async def test_in_takes_values_of_all_types_at_once(values: StateStore, field: str) -> None:
    wanted = Condition(field, "in", (None, True, 1, 0, "1", "", "nothing"))
    assert set(await ids(values, wanted)) == {
        "null",
        "absent",
        "true",
        "one",
        "one_point_zero",
        "zero",
        "text_one",
        "empty",
    }
    assert await ids(values, Condition(field, "in", ())) == []


@pytest.mark.parametrize(
    ("op", "value", "expected"),
    [
        ("lt", 1, {"zero"}),
        ("lte", 1, {"zero", "one", "one_point_zero"}),
        ("gt", 0.5, {"one", "one_point_zero", "big"}),
        ("gte", 2**70, {"big"}),
        ("lt", float("inf"), {"zero", "one", "one_point_zero", "big"}),
        ("gt", float("nan"), set()),
        ("lt", "1", {"empty"}),
        ("gte", "1.0", {"text_one_point_zero", "text_true", "text_null"}),
        ("lt", True, {"false"}),
        ("gt", None, set()),
        ("gte", None, {"null", "absent"}),
    ],
)
async def test_order_is_asked_only_among_values_of_a_kind(
    values: StateStore, op: Any, value: Any, expected: set[str]
) -> None:
    assert set(await ids(values, Condition("type", op, value))) == expected
    assert set(await ids(values, Condition("unusual.field", op, value))) == expected


async def test_conditions_are_all_needed_and_dotted_names_reach_into_sub_documents(store: StateStore) -> None:
    await store.append(
        STATUSES,
        [
            status("a", session_id="s", sender={"name": "x", "role": "CLIENT"}),
            status("b", session_id="t", sender={"name": "x", "role": "CLIENT"}),
            status("c", session_id="s", sender={"name": "y", "role": "CLIENT"}),
            status("d", session_id="s", sender=None, **{"sender.name": "x"}),
            status("e", session_id="s", sender="x"),
        ],
    )
    assert await ids(store, Condition("session_id", "eq", "s"), Condition("sender.name", "eq", "x")) == ["a"]
    assert await ids(store, Condition("sender.role", "eq", "CLIENT"), Condition("session_id", "ne", "t")) == ["a", "c"]
    assert await ids(store, Condition("sender.name", "eq", None)) == ["d", "e"]


async def test_a_digit_only_id_is_found_as_a_text_and_not_as_a_number(store: StateStore) -> None:
    await store.insert(Collection.ROUNDS, {"round_id": "1"})
    assert await store.count(Collection.ROUNDS, (Condition("round_id", "eq", "1"),)) == 1
    assert await store.count(Collection.ROUNDS, (Condition("round_id", "eq", 1),)) == 0


@pytest.mark.parametrize(
    "field",
    [
        "x') or 1=1 --",
        "type\"') = '' or ('1'='1",
        '"; drop table "control.status"; --',
        '$."type"',
        "$where",
        "$or",
        "type[0]",
        "#",
        "'",
        '"',
        "\\",
        "\\u0074ype",
        "",
        ".",
        "..",
        "type.",
        ".type",
        "\0",
        "type\0",
        "\ud800",
        "é",
        "a" * 10_000,
        ".".join("a" * 1000),
    ],
)
async def test_a_hostile_field_name_is_a_field_that_no_document_has(store: StateStore, field: str) -> None:
    await store.append(STATUSES, [status("a", type="t"), status("b", type="")])
    for value in ("t", "", 1, True):
        assert await ids(store, Condition(field, "eq", value)) == []
        assert await ids(store, Condition(field, "ne", value)) == ["a", "b"]
        assert await ids(store, Condition(field, "in", (value, "other"))) == []
        assert await ids(store, Condition(field, "gt", value)) == []
    assert await ids(store, Condition(field, "eq", None)) == ["a", "b"]
    assert await ids(store, sort=((field, True),)) == ["b", "a"]
    assert await store.count(STATUSES) == 2


@pytest.mark.parametrize("value", ["' or 1=1 --", '"', "\\", "\0", "%", "é\n", "[1]", "9" * 400, "a" * 100_000])
async def test_a_hostile_value_is_found_where_it_is_stored_and_nowhere_else(store: StateStore, value: str) -> None:
    await store.append(STATUSES, [status("a", type=value), status("b", type="t"), status("c", type=value + "x")])
    assert await ids(store, Condition("status_id", "ne", "c"), Condition("type", "eq", value)) == ["a"]
    assert await ids(store, Condition("status_id", "ne", "c"), Condition("type", "in", (value, "u"))) == ["a"]


@pytest.mark.parametrize("name", ["é", "a\\b", "a b", "'", "$x", "a[0]", "\n", "日本", ""])
async def test_unusual_names_of_fields_are_found(store: StateStore, name: str) -> None:
    await store.append(STATUSES, [status("a", **{name: 1}), status("b", sub={name: 1}), status("c")])
    assert await ids(store, Condition(name, "eq", 1)) == ["a"]
    assert await ids(store, Condition(f"sub.{name}", "eq", 1)) == ["b"]


# ---- order and pages


async def test_without_a_sort_documents_come_in_the_order_of_first_insertion(store: StateStore) -> None:
    await store.append(STATUSES, [status(id) for id in ("c", "a", "b")])
    assert await ids(store) == ["c", "a", "b"]


async def test_ties_come_in_the_order_of_insertion_reversed_when_the_last_pair_descends(store: StateStore) -> None:
    await store.append(STATUSES, [status(id, type=id[0], committed_at="now") for id in ("b1", "a1", "b2", "a2")])
    assert await ids(store, sort=(("committed_at", False),)) == ["b1", "a1", "b2", "a2"]
    assert await ids(store, sort=(("committed_at", True),)) == ["a2", "b2", "a1", "b1"]
    assert await ids(store, sort=(("type", False), ("committed_at", True))) == ["a2", "a1", "b2", "b1"]
    assert await ids(store, sort=(("type", True), ("committed_at", False))) == ["b1", "b2", "a1", "a2"]
    assert await ids(store, sort=(("nobody.has.it", True),)) == ["a2", "b2", "a1", "b1"]


async def test_values_of_mixed_types_sort_without_error_the_absent_ones_first(values: StateStore) -> None:
    ascending = await ids(values, sort=(("type", False),))
    assert ascending[:2] == ["null", "absent"]
    assert sorted(ascending) == sorted([*VALUES, "absent"])
    position = {id: index for index, id in enumerate(ascending)}
    assert position["zero"] < position["one"] < position["one_point_zero"] < position["big"]
    assert position["empty"] < position["text_one"] < position["text_one_point_zero"] < position["text_null"]
    assert await ids(values, sort=(("type", True),)) == ascending[::-1]


async def test_pages_cut_the_order_and_count_ignores_them(store: StateStore) -> None:
    await store.append(STATUSES, [status(f"{n}") for n in range(5)])
    assert await ids(store, skip=1, limit=2) == ["1", "2"]
    assert await ids(store, skip=3) == ["3", "4"]
    assert await ids(store, limit=2) == ["0", "1"]
    assert await ids(store, skip=9, limit=2) == []
    assert await ids(store, skip=10**30, limit=10**30) == []
    assert await store.count(STATUSES) == 5


@pytest.mark.parametrize("descending", [False, True])
async def test_ten_thousand_records_are_listed_in_pages_each_once(store: StateStore, descending: bool) -> None:
    """Many tie on the sort key, as records of one group commit do."""
    records = [status(f"{n:05}", session_id="s", committed_at=f"2026-01-01T00:{n // 997:02}") for n in range(10_000)]
    await store.append(STATUSES, records)
    listed: list[str] = []
    for skip in range(0, 10_000, 1000):
        listed += await ids(
            store, Condition("session_id", "eq", "s"), sort=(("committed_at", descending),), skip=skip, limit=1000
        )
    expected = [record["status_id"] for record in records]
    assert listed == (expected[::-1] if descending else expected)


# ---- against a list in memory

SCALARS: list[Any] = [None, True, False, 0, 1, -1, 1.0, 1.5, 10, 2**53, "", "1", "1.0", "10", "a", "b", "é", "true"]
FIELDS = ["type", "session_id", "sender.name", "sender.extra.deep", "other"]
EXAMPLES = itertools.count()


def looked_up(document: Document, field: str) -> Any:
    value: Any = document
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def kind(value: Any) -> str:
    return "bool" if isinstance(value, bool) else "number" if isinstance(value, int | float) else type(value).__name__


def equal(value: Any, wanted: Any) -> bool:
    return kind(value) == kind(wanted) and value == wanted


def holds(document: Document, condition: Condition) -> bool:
    value, wanted = looked_up(document, condition.field), condition.value
    match condition.op:
        case "eq":
            return equal(value, wanted)
        case "ne":
            return not equal(value, wanted)
        case "in":
            assert isinstance(wanted, tuple)
            return any(equal(value, one) for one in wanted)
    if kind(value) != kind(wanted):
        return False
    if wanted is None:
        return condition.op in ("lte", "gte")
    return bool(
        {"lt": value < wanted, "lte": value <= wanted, "gt": value > wanted, "gte": value >= wanted}[condition.op]
    )


def listed(documents: list[Document], query: Query) -> list[Document]:
    found = [document for document in documents if all(holds(document, condition) for condition in query.where)]
    if query.sort and query.sort[-1][1]:
        found.reverse()
    for field, descending in reversed(query.sort):
        found.sort(
            key=lambda document: ((value := looked_up(document, field)) is not None, 0 if value is None else value),
            reverse=descending,
        )
    return found[query.skip :][: query.limit or None]


scalars = st.sampled_from(SCALARS)
anything = scalars | st.sampled_from([[], [1], {}, {"name": 1}])
documents = st.fixed_dictionaries(
    {},
    optional={
        "type": anything,
        "session_id": anything,
        "other": anything,
        "sender": anything
        | st.fixed_dictionaries({"name": anything, "extra": st.fixed_dictionaries({"deep": anything})}),
        "number": st.none() | st.integers(-3, 3) | st.floats(-3, 3),
        "text": st.none() | st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"]), max_size=3),
    },
)
conditions = st.builds(
    Condition, st.sampled_from(FIELDS), st.sampled_from(["eq", "ne", "lt", "lte", "gt", "gte"]), scalars
) | st.builds(Condition, st.sampled_from(FIELDS), st.just("in"), st.lists(scalars, max_size=4).map(tuple))
queries = st.builds(
    Query,
    where=st.lists(conditions, max_size=2).map(tuple),
    sort=st.lists(st.tuples(st.sampled_from(["number", "text", "committed_at"]), st.booleans()), max_size=2).map(tuple),
    skip=st.integers(0, 3),
    limit=st.integers(0, 4),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(documents, max_size=8), st.lists(queries, min_size=1, max_size=5))
async def test_queries_answer_as_a_list_in_memory_would(
    store: StateStore, found: list[Document], asked: list[Query]
) -> None:
    example = next(EXAMPLES)
    stored = [{**document, "status_id": f"{example}/{n}", "example": example} for n, document in enumerate(found)]
    await store.append(STATUSES, stored)
    of_this_example = Condition("example", "eq", example)
    for query in asked:
        where = (*query.where, of_this_example)
        assert await store.find(STATUSES, Query(where, query.sort, query.skip, query.limit)) == listed(stored, query)
        assert await store.count(STATUSES, where) == len(listed(stored, Query(query.where)))


# ---- owner


async def test_a_second_owner_is_refused_and_hears_who_the_first_is(place: Place, store: StateStore) -> None:
    other = place.connect()
    with pytest.raises(Owned, match="the test"):
        await other.open("the other")
    await store.save([Put(SESSIONS, session(1))])
    assert await store.get(SESSIONS, "s") == session(1)


async def test_the_next_owner_is_let_in_when_the_first_has_closed(place: Place) -> None:
    for name in ("first", "second"):
        store = place.connect()
        await store.open(name)
        await store.close()


async def test_close_is_allowed_twice_and_before_open(place: Place) -> None:
    store = place.connect()
    await store.close()
    await store.open("the test")
    await store.close()
    await store.close()
