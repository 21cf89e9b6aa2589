"""schemathesis over the OpenAPI document: no answer is a fault of the server, and each is as the document says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.openapi import from_dict
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from fl_server.app import openapi
from fl_server.testing import Federation
from tests.server.rest_world import tgz

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
EXAMPLES = 40  # of each operation and mode
ENDLESS = {"/api/v1/events/"}
NOT_SUPPORTED = {501}  # said in the document, and no fault


@pytest.mark.long
async def test_every_reply_is_as_the_openapi_document_says() -> None:
    async with Federation() as federation:
        known = await furnished(federation)
        told = await asyncio.to_thread(explored, openapi(), federation.server.api_url, known)
        assert (await federation.http.get("/ready")).status_code == 200
    assert not told, "\n\n".join(told)


def lie(document: dict[str, Any], about: str) -> None:
    """Of /ready and of a session that is not there."""
    ready = document["paths"]["/ready"]["get"]["responses"]
    match about:
        case "status":
            ready["418"] = ready.pop("200")
        case "content type":
            ready["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
        case "shape":
            document["components"]["schemas"]["Readiness"]["required"] = ["ready", "why"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("about", "said"),
    [("status", "Undocumented status code"), ("content type", "Content-Type"), ("shape", '"why" is a required')],
)
async def test_a_document_that_lies_is_found(about: str, said: str) -> None:
    document = openapi()
    document["paths"] = {"/ready": document["paths"]["/ready"]}
    lie(document, about)
    async with Federation() as federation:
        [told] = set(await asyncio.to_thread(explored, document, federation.server.api_url, []))
    assert told.startswith("GET /ready") and said in told


async def furnished(federation: Federation) -> list[str]:
    """Ids of one session, model, package, client, combiner, and so on."""
    model_id = await federation.add_seed([np.zeros(3)])
    session_id = await federation.create_session(model_id)
    package = {"files": {"file": ("p.tgz", tgz())}, "data": {"name": "p", "helper": "numpyhelper"}}
    package_id = await federation.call("POST", "/api/v1/packages/", "package_id", **package)
    await federation.call("POST", "/api/v1/clients/add", json={"name": "a", "client_id": "a"})
    for noun in ("attributes", "telemetry"):
        value = "1" if noun == "attributes" else 1.0
        sent = {"key": "k", "value": value, "sender": {"name": "a", "client_id": "a"}}
        await federation.call("POST", f"/api/v1/{noun}/", json=sent)
    [combiner] = (await federation.call("GET", "/api/v1/combiners/"))["result"]
    return [model_id, session_id, package_id, "a", combiner["combiner_id"]]


def explored(document: dict[str, Any], url: str, known: Sequence[str]) -> list[str]:
    """What is wrong with an operation, each in its words."""
    told = []
    schema = from_dict(document)
    schema.config.update(base_url=url)
    for operation in (found.ok() for found in schema.get_all_operations()):
        if operation.path in ENDLESS:
            continue
        for mode in GenerationMode:
            try:
                explore(operation, mode, known)
            except Unsatisfiable:
                pass  # negative: nothing that is sent would be wrong
            except (FailureGroup, BaseExceptionGroup) as group:
                told += [f"{operation.label}: {failure}"[:1500] for failure in group.exceptions]
            except Exception as failure:
                told.append(f"{operation.label}: {failure}"[:1500])
    return told


def explore(operation: Any, mode: GenerationMode, known: Sequence[str]) -> None:
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode), st.sampled_from([None, *known]))
    def test(case: Any, id: str | None) -> None:
        if id is not None and "id" in case.path_parameters:
            case.path_parameters["id"] = id
        response = case.call(timeout=30)
        case.validate_response(response, checks=CHECKS if response.status_code not in NOT_SUPPORTED else CHECKS[1:])

    test()
