"""Bodies to the core's nouns, documents to bodies."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import HTTPException

from fl_server.core.model import InvalidConfig, SessionConfig
from fl_server.errors import Invalid
from fl_server.rest.bodies import Limits, parsed_json
from fl_server.rest.schemas import (
    ENTITIES,
    MODELS,
    SESSIONS,
    AddClient,
    Body,
    CreateSession,
    SessionConfigBody,
    StartSession,
    checked,
    session_config,
)

APICLIENT_BODY = {  # what fedn.APIClient.start_session sends
    "aggregator": "fedavg",
    "aggregator_kwargs": None,
    "round_timeout": 180,
    "buffer_size": -1,
    "model_id": "m",
    "delete_models_storage": True,
    "clients_required": 1,
    "requested_clients": 8,
    "validate": True,
    "helper_type": "numpyhelper",
    "server_functions": None,
}


def config_of(**fields: Any) -> SessionConfig:
    return session_config(checked(SessionConfigBody, fields), "numpyhelper")


def test_the_body_of_fedns_api_client_becomes_a_config_of_five_rounds() -> None:
    assert config_of(**APICLIENT_BODY) == SessionConfig(rounds=5, min_clients=1, requested_clients=8)


def test_every_field_reaches_the_core_under_its_own_name() -> None:
    assert config_of(
        aggregator="fedopt",
        aggregator_kwargs={"learning_rate": 0.1},
        round_timeout=10,
        buffer_size=2,
        rounds=7,
        delete_models_storage=False,
        clients_required=3,
        requested_clients=4,
        validate=False,
        client_settings={"epochs": 2},
        validation_timeout=11,
        selection_timeout=12.5,
        rejoin_window=0,
        round_retries=1,
        retry_wait=0.5,
    ) == SessionConfig(
        rounds=7,
        min_clients=3,
        requested_clients=4,
        buffer_size=2,
        validate=False,
        aggregator="fedopt",
        aggregator_kwargs={"learning_rate": 0.1},
        delete_models_storage=False,
        client_settings={"epochs": 2},
        round_timeout_s=10,
        validation_timeout_s=11,
        selection_timeout_s=12.5,
        rejoin_window_s=0,
        round_retries=1,
        retry_wait_s=0.5,
    )


def test_validation_has_as_long_as_a_round_when_nothing_else_is_said() -> None:
    assert config_of(round_timeout=42).validation_timeout_s == 42


@pytest.mark.parametrize(
    "said", [{"learning_rate": 0.1}, '{"learning_rate": 0.1}', "{'learning_rate': 0.1}"], ids=["object", "JSON", "text"]
)
def test_aggregator_kwargs_may_be_an_object_or_the_text_of_one(said: object) -> None:
    assert config_of(aggregator="fedopt", aggregator_kwargs=said).aggregator_kwargs == {"learning_rate": 0.1}


@pytest.mark.parametrize("said", [None, "", "None", "null", {}])
def test_aggregator_kwargs_may_be_nothing_in_all_of_fedns_ways(said: object) -> None:
    assert config_of(aggregator_kwargs=said).aggregator_kwargs == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rounds", True),
        ("rounds", "5"),
        ("rounds", 5.0),
        ("rounds", 0),
        ("rounds", -1),
        ("rounds", 2**31),
        ("rounds", [5]),
        ("clients_required", 0),
        ("clients_required", None),
        ("requested_clients", "8"),
        ("buffer_size", 0),
        ("buffer_size", -2),
        ("round_timeout", 0),
        ("round_timeout", True),
        ("round_timeout", "180"),
        ("round_timeout", 1e300),
        ("validate", 1),
        ("validate", "true"),
        ("delete_models_storage", None),
        ("aggregator", "nope"),
        ("aggregator", ""),
        ("aggregator", 5),
        ("aggregator_kwargs", 5),
        ("aggregator_kwargs", [1]),
        ("aggregator_kwargs", '{"tau": "\\ud800"}'),
        ("aggregator_kwargs", '{"tau": 1e999}'),
        ("requested_clients", -1),
        ("aggregator_kwargs", "__import__('os')"),
        ("aggregator_kwargs", "(" * 5000),
        ("helper_type", 5),
        ("model_id", ["m"]),
        ("client_settings", "x"),
        ("validation_timeout", -1),
        ("selection_timeout", 0),
        ("rejoin_window", -0.1),
        ("round_retries", -1),
        ("round_retries", True),
        ("retry_wait", "5"),
        ("unknown", 1),
    ],
)
def test_a_wrong_value_is_refused_naming_its_field(field: str, value: object) -> None:
    with pytest.raises((Invalid, InvalidConfig)) as refused:
        config_of(**{field: value})
    assert field in str(refused.value).split(": ", 2)[0 if field != "unknown" else 1]


def test_a_cap_on_clients_below_the_number_needed_is_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"^requested_clients: "):
        config_of(clients_required=5, requested_clients=4)


@pytest.mark.parametrize(
    ("shape", "body", "message"),
    [
        (CreateSession, {}, "session_config: missing"),
        (CreateSession, {"session_config": []}, "session_config: a JSON object needed"),
        (CreateSession, {"session_config": {}, "colour": 1}, "Invalid object: unknown key 'colour'"),
        (CreateSession, {"session_config": {"colour": 1}}, "Invalid object: unknown key 'colour'"),
        (CreateSession, {"session_config": {}, "session_id": "a/b"}, "session_id: "),
        (CreateSession, {"session_config": {}, "status": "Started"}, "status: "),
        (CreateSession, {"session_config": {}, "name": "\0"}, "name: no control characters"),
        (StartSession, {"client_ids": ["a"]}, "client_ids must be a comma separated string"),
        (StartSession, {}, "Session ID is required"),
        (StartSession, {"session_id": ""}, "Session ID is required"),
        (StartSession, {"session_id": 5}, "session_id: "),
        (StartSession, {"session_id": "s", "rounds": "5"}, "rounds: "),
        (StartSession, {"session_id": "s", "rounds": True}, "rounds: "),
        (StartSession, {"session_id": "s", "rounds": 0}, "rounds: "),
        (StartSession, {"session_id": "s", "round_timeout": 0}, "round_timeout: "),
        (StartSession, {"session_id": "s", "wait_for_clients_s": -1}, "wait_for_clients_s: "),
        (AddClient, {}, "name: missing"),
        (AddClient, {"name": ""}, "name: "),
        (AddClient, {"name": 5}, "name: "),
        (AddClient, {"name": "a\nb"}, "name: no control characters"),
        (AddClient, {"name": "n" * 257}, "name: "),
        (AddClient, {"name": "n", "client_id": "é"}, "client_id: ASCII"),
        (AddClient, {"name": "n", "client_id": " a"}, "client_id: ASCII"),
        (AddClient, {"name": "n", "client_id": "a\0"}, "client_id: no control characters"),
        (AddClient, {"name": "n", "package": "cloud"}, "package: "),
    ],
)
def test_a_body_that_is_wrong_is_refused_in_one_sentence(shape: type[Body], body: Any, message: str) -> None:
    with pytest.raises(Invalid) as refused:
        checked(shape, body)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("said", "chosen"), [(None, None), ("", None), (" , ", None), ("a, b,,a", frozenset({"a", "b"}))]
)
def test_client_ids_are_a_set_or_nothing(said: str | None, chosen: frozenset[str] | None) -> None:
    assert checked(StartSession, {"session_id": "s", "client_ids": said}).chosen_clients() == chosen


# ---- JSON

MAX_JSON_DEPTH = Limits().json_max_depth


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "nan",
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '"\\ud800"',
        "\udc80",
        "9" * 5000,
        "[" * (MAX_JSON_DEPTH + 1) + "]" * (MAX_JSON_DEPTH + 1),
        "[" * 100_000,
        '{"a":' * 5000 + "1" + "}" * 5000,
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_what_is_no_sane_json_is_a_bad_request(text: str) -> None:
    with pytest.raises(HTTPException) as refused:
        parsed_json(text.encode("utf-8", "surrogateescape"), MAX_JSON_DEPTH)
    assert refused.value.status_code == 400
    assert refused.value.detail.startswith("body: ")


def test_json_as_deep_as_allowed_is_taken() -> None:
    assert parsed_json(b"[" * MAX_JSON_DEPTH + b"]" * MAX_JSON_DEPTH, MAX_JSON_DEPTH)


# ---- documents


@pytest.mark.parametrize("entity", ENTITIES, ids=lambda entity: entity.noun)
def test_an_answer_has_every_key_of_its_shape_and_nothing_of_ours(entity: Any) -> None:
    answer = entity.answer({entity.id_field: "x", "fl": {"version": 1}, "key": "k"})
    assert answer.keys() == entity.shape.model_fields.keys()
    assert "fl" not in answer
    entity.shape.model_validate(answer)


def test_dates_are_rfc_1123_and_timestamps_stay_iso() -> None:
    validations = next(entity for entity in ENTITIES if entity.noun == "validations")
    answer = validations.answer({"committed_at": 1_795_485_241.9, "timestamp": "2026-11-24T01:55:06.324398Z"})
    assert answer["committed_at"] == "Tue, 24 Nov 2026 01:54:01 GMT"
    assert answer["timestamp"] == "2026-11-24T01:55:06.324398Z"


def test_a_model_has_its_id_under_both_names() -> None:
    answer = MODELS.answer({"model": "m", "key": "models"})
    assert (answer["model_id"], answer["model"]) == ("m", "m")
    assert "key" not in answer


def test_objects_inside_have_all_of_fedns_keys() -> None:
    validations = next(entity for entity in ENTITIES if entity.noun == "validations")
    assert validations.answer({"sender": {"name": "n"}})["sender"] == {"name": "n", "role": None, "client_id": None}
    config = SESSIONS.answer({"session_config": {"rounds": 3, "retry_wait": 5}})["session_config"]
    assert config["rounds"] == 3
    assert config["retry_wait"] == 5
    assert config["validate"] is None


def test_a_number_that_json_cannot_say_is_null() -> None:
    metrics = next(entity for entity in ENTITIES if entity.noun == "metrics")
    assert metrics.answer({"value": float("nan")})["value"] is None
