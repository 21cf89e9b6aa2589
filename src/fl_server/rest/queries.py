"""FEDn's filters and paging headers as the store's queries (fedn-interface.md 2.0).

A text that reads as a number, true or false matches the text as well as the value: FEDn guessed one of the two and so
never found round_id=1. A field that the entity does not have is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Annotated, Any, get_args
from urllib.parse import parse_qsl

from fastapi import Depends, Header, Request

from ..errors import Invalid
from ..store.ports import Condition, Operator, Query
from .bodies import limits_of
from .schemas import DATES, OBJECTS, Entity

Scalar = str | int | float | bool | None

_CAMEL = {"sessionId": "session_id", "modelId": "model_id", "correlationId": "correlation_id"}  # FEDn's CLI, APIClient
_OPERATORS: dict[str, Operator] = {"eq": "eq", "ne": "ne", "gt": "gt", "gte": "gte", "lt": "lt", "lte": "lte"}
MAX_CONDITIONS = 100  # a store's query language nests them
_INSIDE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")  # nothing that a store's path language would read as its own
_INT = re.compile(r"-?[0-9]{1,18}")
_FLOAT = re.compile(r"-?[0-9]+\.[0-9]+([eE][+-]?[0-9]{1,3})?")


# ---- filters


def conditions_of_query(entity: Entity, pairs: Iterable[tuple[str, str]]) -> tuple[Condition, ...]:
    return _few([condition for key, text in pairs for condition in _conditions(entity, key, _readings(text))])


def conditions_of_body(entity: Entity, body: dict[str, Any]) -> tuple[Condition, ...]:
    """Text with commas is a list of alternatives; other JSON scalars, and lists of them, are taken as they are."""
    found: list[Condition] = []
    for key, value in body.items():
        alternatives = value if isinstance(value, list) else value.split(",") if isinstance(value, str) else [value]
        readings: list[Scalar] = []
        for alternative in alternatives:
            if isinstance(alternative, dict | list):
                raise Invalid(f"{key}: text, a number, true, false, null or a list of these needed")
            if isinstance(alternative, int) and abs(alternative) >= 2**63:
                raise Invalid(f"{key}: {alternative} is too large")
            readings.extend(_readings(alternative.strip()) if isinstance(alternative, str) else [alternative])
        found.extend(_conditions(entity, key, tuple(readings)))
    return _few(found)


def _few(conditions: list[Condition]) -> tuple[Condition, ...]:
    if len(conditions) > MAX_CONDITIONS:
        raise Invalid(f"{conditions[-1].field}: more than {MAX_CONDITIONS} conditions in one question")
    return tuple(conditions)


def _conditions(entity: Entity, key: str, readings: tuple[Scalar, ...]) -> list[Condition]:
    name, _, suffix = key.rpartition("__")
    operator: Operator = "eq"
    if name and suffix in _OPERATORS:
        operator = _OPERATORS[suffix]
    else:
        name = key
    field = stored_field(entity, name, key)
    if field.endswith("session_id"):  # FEDn's `model list -s` sends a stray slash
        readings = tuple(value.rstrip("/") if isinstance(value, str) else value for value in readings)
    if field in DATES:
        readings = tuple(_seconds(key, value) for value in readings)
    match operator:
        case "eq" if len(readings) == 1:
            return [Condition(field, "eq", readings[0])]
        case "eq":
            return [Condition(field, "in", readings)]
        case "ne":
            return [Condition(field, "ne", value) for value in readings]
        case _:
            return [Condition(field, operator, _comparable(entity, field, readings))]


def stored_field(entity: Entity, name: str, said: str) -> str:
    """`said`: what the caller wrote, for the message. Raises Invalid if the entity has no such field."""
    name = _CAMEL.get(name, name)
    root, dot, inside = name.partition(".")
    if root not in entity.shape.model_fields or (dot and (root not in OBJECTS or not _INSIDE.fullmatch(inside))):
        raise Invalid(f"{said}: {entity.noun} have no such field")
    return entity.stored_name(name)


def _readings(text: str) -> tuple[Scalar, ...]:
    """All values that this text may stand for, the text itself first."""
    if text == "null":
        return (None,)
    if text in ("true", "false"):
        return (text, text == "true")
    if _INT.fullmatch(text):
        return (text, int(text))
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return (text, float(text))
    return (text,)


def _comparable(entity: Entity, field: str, readings: tuple[Scalar, ...]) -> Scalar:
    """Less and greater take one value: a number, but for a field that holds text."""
    declared = entity.shape.model_fields.get(field)
    is_text = (
        field not in DATES and declared is not None and str in (get_args(declared.annotation) or (declared.annotation,))
    )
    return readings[0] if is_text or field in DATES else readings[-1]


def _seconds(key: str, value: Scalar) -> float | None:
    """A date filter: seconds since the epoch, ISO 8601 or RFC 1123, to what the store holds."""
    if value is None:
        return None
    if not isinstance(value, str):
        return float(value)
    if _INT.fullmatch(value) or _FLOAT.fullmatch(value):
        return float(value)
    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            date = parse(value)
            return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            continue
    raise Invalid(f"{key}: {value!r} is no date")


# ---- paging


@dataclass(frozen=True, slots=True)
class Paging:
    limit: int
    skip: int
    sort_key: str
    descending: bool

    def query(self, entity: Entity, where: tuple[Condition, ...]) -> Query:
        field = stored_field(entity, self.sort_key, f"X-Sort-Key: {self.sort_key}")
        fields = (field,) if field == "committed_at" else (field, "committed_at")
        return Query(where, tuple((name, self.descending) for name in fields), self.skip, self.limit)


async def paging(
    request: Request,
    x_limit: Annotated[
        int, Header(description="rows at most; 0 or absent: the server's page_max_rows, and no more than these")
    ] = 0,  # not nullable: generated SDKs cannot write such a header
    x_skip: Annotated[int, Header(description="rows passed over")] = 0,
    x_sort_key: Annotated[str | None, Header(description="a field's name; committed_at if absent")] = None,
    x_sort_order: Annotated[str | None, Header(description="asc; anything else is descending")] = None,
) -> Paging:
    """FEDn's headers. Absent: the newest first. Raises Invalid for a page that the server does not give."""
    max_rows = limits_of(request).page_max_rows
    if x_limit > max_rows:
        raise Invalid(f"X-Limit: more than page_max_rows ({max_rows}); ask page by page, with X-Skip")
    return Paging(
        limit=x_limit if x_limit > 0 else max_rows,
        skip=min(max(x_skip, 0), 2**62),
        sort_key=x_sort_key or "committed_at",
        descending=(x_sort_order or "").lower() != "asc",
    )


async def filter_body(request: Request) -> dict[str, Any]:
    """The filters of a POST: a JSON object, FEDn's other way a form, or nothing."""
    body = await request.body()
    if not body:
        return {}
    if request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        try:
            return dict(parse_qsl(body.decode(), keep_blank_values=True, errors="strict"))
        except ValueError as exc:
            raise Invalid("body: a form in UTF-8 needed") from exc
    value = await request.json()
    if not isinstance(value, dict):
        raise Invalid(f"body: a JSON object needed, not {json.dumps(value)[:40]}")
    return value


Pages = Annotated[Paging, Depends(paging)]
Filters = Annotated[dict[str, Any], Depends(filter_body)]
