"""The OpenAPI document is good enough to live on: it is complete, and a generator makes an SDK of it that works."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fl_client import TrainResult
from fl_client.wire import codec
from fl_server import cli
from fl_server.app import openapi
from fl_server.rest import schemas
from fl_server.testing import Federation
from tests.interop.fedn_venv import sdk_generator_venv

PROGRAM = Path(__file__).parents[1] / "interop" / "sdk_program.py"
GENERATE_S = 120.0


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return openapi()


def operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        yield from path.values()


def test_every_operation_says_what_it_does_takes_and_answers(document: dict[str, Any]) -> None:
    for operation in operations(document):
        name = operation["operationId"]
        assert operation["summary"] and operation["tags"], name
        for code, answer in operation["responses"].items():
            assert answer["description"] and answer["content"], (name, code)
            for content in answer["content"].values():
                assert content["schema"], (name, code)
        for code in ("4XX", "5XX"):
            schema = operation["responses"][code]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Failure"}, name
        for content in operation.get("requestBody", {}).get("content", {}).values():
            assert content["schema"], name


def test_every_json_body_has_an_example_that_the_server_takes(document: dict[str, Any]) -> None:
    bodies = {
        content["schema"]["$ref"].rsplit("/", 1)[1]
        for operation in operations(document)
        for content in operation.get("requestBody", {}).get("content", {}).values()
        if "$ref" in content["schema"]
    }
    assert len(bodies) >= 10
    for name in bodies:
        examples = document["components"]["schemas"][name]["examples"]
        for example in examples:
            getattr(schemas, name).model_validate(example)


def test_it_is_what_a_server_serves_and_is_written_without_one(
    tmp_path: Path, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def served() -> Any:
        async with Federation() as federation:
            return await federation.call("GET", "/openapi.json")

    assert asyncio.run(served()) == document
    monkeypatch.chdir(tmp_path)
    printed = CliRunner().invoke(cli.app, ["openapi"])
    assert (printed.exit_code, json.loads(printed.stdout)) == (0, document)
    written = CliRunner().invoke(cli.app, ["openapi", "--output", "openapi.json"])
    assert (written.exit_code, written.stdout) == (0, "")
    assert json.loads((tmp_path / "openapi.json").read_text()) == document
    assert [path.name for path in tmp_path.iterdir()] == ["openapi.json"]
    refused = CliRunner().invoke(cli.app, ["openapi", "--output", "no/such/folder.json"])
    assert refused.exit_code == 2 and "no/such/folder.json" in refused.output


async def test_a_generated_sdk_creates_and_starts_a_session_and_downloads_the_model(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    (tmp_path / "config.yml").write_text("post_hooks: []\n")
    binaries = sdk_generator_venv() / "bin"
    said = await _run(
        str(binaries / "openapi-python-client"), "generate", "--path", "openapi.json", "--output-path", "sdk",
        "--config", "config.yml", cwd=tmp_path,
    )  # fmt: skip
    assert "WARNING" not in said.upper(), said

    def train(parameters: Sequence[np.ndarray], settings: dict[str, Any]) -> TrainResult:
        return TrainResult([array + 1 for array in parameters], num_examples=1)

    (tmp_path / "seed.npz").write_bytes(codec.encode([np.zeros(3, np.float32)]))
    python = (str(binaries / "python"), str(PROGRAM))
    async with Federation(train=train, clients=1) as federation:
        url = federation.server.api_url
        session_id = (await _run(*python, "start", url, "seed.npz", cwd=tmp_path)).strip()
        await federation.ended(session_id)
        await _run(*python, "download", url, session_id, "model.npz", cwd=tmp_path)
    [array] = codec.decode((tmp_path / "model.npz").read_bytes())
    np.testing.assert_array_equal(array, np.full(3, 2, np.float32))


async def _run(*command: str, cwd: Path) -> str:
    """What it prints."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": "sdk", "HOME": str(cwd)}
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    async with asyncio.timeout(GENERATE_S):
        said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    return said.decode()
