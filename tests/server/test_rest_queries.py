"""FEDn's filters and headers as conditions of the store."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fastapi import Request

from fl_server.errors import Invalid
from fl_server.rest.bodies import Limits
from fl_server.rest.queries import Paging, conditions_of_body, conditions_of_query, paging
from fl_server.rest.schemas import CLIENTS, ENTITIES, MODELS, SESSIONS
from fl_server.store.ports import Condition, Query

MAX_PAGE = 7
REQUEST = Request(
    {"type": "http", "app": SimpleNamespace(state=SimpleNamespace(limits=Limits(page_max_rows=MAX_PAGE)))}
)
BY_NOUN = {entity.noun: entity for entity in ENTITIES}
VALIDATIONS, ROUNDS, METRICS = BY_NOUN["validations"], BY_NOUN["rounds"], BY_NOUN["metrics"]


@pytest.mark.parametrize(
    ("key", "text", "condition"),
    [
        ("status", "online", Condition("status", "eq", "online")),
        ("name", "null", Condition("name", "eq", None)),
        ("name", "5", Condition("name", "in", ("5", 5))),
        ("name", "-0.5", Condition("name", "in", ("-0.5", -0.5))),
        ("name", "true", Condition("name", "in", ("true", True))),
        ("name", "nan", Condition("name", "eq", "nan")),
        ("name", "1" * 30, Condition("name", "eq", "1" * 30)),
        ("name", "a,b", Condition("name", "eq", "a,b")),
        ("name__ne", "x", Condition("name", "ne", "x")),
        ("name__eq", "x", Condition("name", "eq", "x")),
        ("name__gte", "5", Condition("name", "gte", "5")),
        ("last_seen__lt", "1795485241", Condition("last_seen", "lt", 1795485241.0)),
        ("last_seen__lte", "2026-11-24T01:54:01Z", Condition("last_seen", "lte", 1795485241.0)),
        ("last_seen__gt", "Tue, 24 Nov 2026 01:54:01 GMT", Condition("last_seen", "gt", 1795485241.0)),
        ("last_seen", "null", Condition("last_seen", "eq", None)),
    ],
)
def test_a_query_parameter_is_one_condition(key: str, text: str, condition: Condition) -> None:
    assert conditions_of_query(CLIENTS, [(key, text)]) == (condition,)


@pytest.mark.parametrize(
    ("noun", "key", "text", "condition"),
    [
        ("models", "model_id", "m", Condition("model", "eq", "m")),
        ("models", "model", "m", Condition("model", "eq", "m")),
        ("models", "session_id", "s/", Condition("session_id", "eq", "s")),
        ("validations", "sessionId", "s", Condition("session_id", "eq", "s")),
        ("validations", "modelId", "m", Condition("model_id", "eq", "m")),
        ("validations", "correlationId", "c", Condition("correlation_id", "eq", "c")),
        ("validations", "sender.name", "n", Condition("sender.name", "eq", "n")),
        ("rounds", "round_config.session_id", "s", Condition("round_config.session_id", "eq", "s")),
        ("rounds", "round_id", "1", Condition("round_id", "in", ("1", 1))),
        ("metrics", "value__gt", "0.5", Condition("value", "gt", 0.5)),
        ("sessions", "session_config.rounds__gt", "3", Condition("session_config.rounds", "gt", 3)),
    ],
)
def test_fedns_spellings_reach_the_stored_field(noun: str, key: str, text: str, condition: Condition) -> None:
    assert conditions_of_query(BY_NOUN[noun], [(key, text)]) == (condition,)


def test_several_parameters_must_all_hold() -> None:
    assert conditions_of_query(CLIENTS, [("status", "online"), ("name__ne", "5")]) == (
        Condition("status", "eq", "online"),
        Condition("name", "ne", "5"),
        Condition("name", "ne", 5),
    )


@pytest.mark.parametrize(
    "key", ["colour", "name__near", "fl", "fl.record", "name.first", "sender.$where", "sender.", "", "__eq", "key"]
)
def test_a_field_that_the_entity_does_not_have_is_refused_by_name(key: str) -> None:
    with pytest.raises(Invalid, match="have no such field") as refused:
        conditions_of_query(MODELS, [(key, "x")])
    assert str(refused.value).startswith(f"{key}: ")


def test_a_date_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(Invalid, match=r"^committed_at__gt: 'yesterday' is no date"):
        conditions_of_query(CLIENTS, [("committed_at__gt", "yesterday")])


def test_a_body_gives_alternatives_with_commas_or_lists() -> None:
    body = {"status": "online, offline", "name": ["a", "5", None], "package": "local"}
    assert conditions_of_body(CLIENTS, body) == (
        Condition("status", "in", ("online", "offline")),
        Condition("name", "in", ("a", "5", 5, None)),
        Condition("package", "eq", "local"),
    )


def test_json_scalars_in_a_body_are_taken_as_they_are() -> None:
    assert conditions_of_body(METRICS, {"step": 3, "value": 0.5, "key": None}) == (
        Condition("step", "eq", 3),
        Condition("value", "eq", 0.5),
        Condition("key", "eq", None),
    )


@pytest.mark.parametrize("value", [{"a": 1}, [[1]], 2**63])
def test_a_filter_value_that_no_field_can_have_is_refused_by_name(value: object) -> None:
    with pytest.raises(Invalid, match=r"^name: "):
        conditions_of_body(SESSIONS, {"name": value})


async def test_without_headers_the_newest_come_first_and_a_page_is_bounded() -> None:
    page = await paging(REQUEST)
    assert page.query(SESSIONS, ()) == Query((), (("committed_at", True),), 0, MAX_PAGE)


async def test_the_headers_set_limit_skip_and_order() -> None:
    page = await paging(REQUEST, x_limit=5, x_skip=2, x_sort_key="model_id", x_sort_order="ASC")
    assert page.query(MODELS, ()) == Query((), (("model", False), ("committed_at", False)), 2, 5)


@pytest.mark.parametrize("limit", [0, -3])
async def test_no_limit_means_the_largest_page(limit: int) -> None:
    page = await paging(REQUEST, x_limit=limit, x_skip=-1)
    assert (page.limit, page.skip) == (MAX_PAGE, 0)


@pytest.mark.parametrize("limit", [MAX_PAGE + 1, 10**30])
async def test_a_larger_page_is_refused_by_the_settings_name(limit: int) -> None:
    with pytest.raises(Invalid, match=r"^X-Limit: more than page_max_rows \(7\)"):
        await paging(REQUEST, x_limit=limit)


def test_an_unknown_sort_key_is_refused_by_name() -> None:
    with pytest.raises(Invalid, match=r"^X-Sort-Key: colour: rounds have no such field"):
        Paging(1, 0, "colour", True).query(ROUNDS, ())
