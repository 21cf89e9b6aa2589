"""The files of compose/, as far as they can be read without a Docker engine."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from fl_server.settings import ALIASES, PREFIX, Settings

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "compose"
VARIABLE = re.compile(r"\$\$|\$\{(\w+)(?:(:[?-])([^}]*))?\}")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """What `make compose-env` writes."""
    tree = tmp_path_factory.mktemp("tree")
    (tree / "compose").mkdir()
    shutil.copy(ROOT / "Makefile", tree)
    make = ["make", "--silent", "compose-env", f"PYTHON={sys.executable}"]
    subprocess.run(make, cwd=tree, check=True)
    written = tree / "compose" / ".env"
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    text = written.read_text()
    subprocess.run(make, cwd=tree, check=True)
    assert written.read_text() == text, "one that is there stays"
    return dict(line.split("=", 1) for line in text.splitlines())


def interpolated(value: Any, environment: Mapping[str, str]) -> Any:
    """As compose does it. Raises AssertionError for a variable that must be there and is not."""
    if isinstance(value, dict):
        return {name: interpolated(inner, environment) for name, inner in value.items()}
    if isinstance(value, list):
        return [interpolated(inner, environment) for inner in value]
    if not isinstance(value, str):
        return value

    def named(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        name, operator, text = found.groups()
        assert name in environment or operator == ":-", f"{name} is in no .env: {text}"
        return environment.get(name) or (text if operator == ":-" else "")

    return VARIABLE.sub(named, value)


@pytest.fixture(scope="module", params=[("compose.yaml",), ("compose.yaml", "compose.client.yaml")], ids=" + ".join)
def project(request: pytest.FixtureRequest, environment: Mapping[str, str]) -> dict[str, Any]:
    """The files merged: no service is in both."""
    merged: dict[str, Any] = {"services": {}, "volumes": {}}
    for name in request.param:
        read = interpolated(yaml.safe_load((COMPOSE / name).read_text()), environment)
        assert not merged["services"].keys() & read["services"].keys()
        for key in ("services", "volumes"):
            merged[key] |= read.pop(key)
        merged |= read
    return merged


def test_compose_accepts_the_files(project: dict[str, Any]) -> None:
    assert sorted(PyCompose.from_yaml(yaml.safe_dump(project)).service_names()) == sorted(project["services"])


def test_each_service_waits_for_what_it_needs(project: dict[str, Any]) -> None:
    services = project["services"]
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            match how["condition"]:
                case "service_healthy":
                    assert "healthcheck" in services[needed], f"{name} waits for the health of {needed}"
                case "service_completed_successfully":
                    assert services[needed]["restart"] == "no", f"{name} waits for the end of {needed}"


def test_what_is_kept_lies_in_named_volumes(project: dict[str, Any]) -> None:
    mounted = {
        volume.split(":")[0] for service in project["services"].values() for volume in service.get("volumes", ())
    }
    assert {volume for volume in mounted if not volume.startswith(".")} == set(project["volumes"])
    for name in ("mongo", "s3", "api-server"):
        assert project["services"][name]["volumes"], name


def test_nothing_is_published_beyond_this_machine_unless_asked(project: dict[str, Any]) -> None:
    ports = [port for service in project["services"].values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_servers_settings_are_settings(project: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(PREFIX)] + list(ALIASES):
        monkeypatch.delenv(name, raising=False)
    for name, value in project["services"]["api-server"]["environment"].items():
        monkeypatch.setenv(name, value)
    settings = Settings.load(None, {})
    assert settings.s3_endpoint_url == "http://s3:8333"
    assert "@mongo:27017" in settings.mongo_url.get_secret_value()


def test_passwords_are_random_and_git_never_sees_them(environment: Mapping[str, str]) -> None:
    secrets = [value for name, value in environment.items() if not name.endswith("_USER")]
    assert len(set(secrets)) == len(secrets) == 4
    assert all(len(secret) == 32 for secret in secrets)
    for name in (".env", ".env.part"):
        subprocess.run(["git", "check-ignore", "--quiet", f"compose/{name}"], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("given", "run"),
    [
        ("flserve up --standby", "flserve up --standby"),
        ("flclient join --name a", "flclient join --name a"),
        ("client start -in client.yaml --name client1", "flclient client start -in client.yaml --name client1"),
    ],
)
def test_the_entry_point_takes_both_programs_and_fedns_words(given: str, run: str, tmp_path: Path) -> None:
    for program in ("flserve", "flclient"):
        stand_in = tmp_path / program
        stand_in.write_text(f'#!/bin/sh\necho {program} "$@"\n')
        stand_in.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [str(COMPOSE / "entrypoint"), *given.split()]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout == f"{run}\n"


def test_the_image_is_built_of_files_that_are_there_and_runs_as_nobody_special() -> None:
    dockerfile = (COMPOSE / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", dockerfile, re.M)
    assert stages[-1] == ("base", ""), "the last one is what is built"
    base = dockerfile.partition("AS base")[2].partition("\nFROM")[0]
    assert "USER flserve" in base
    sent = {line[1:] for line in (COMPOSE / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    for options, files in re.findall(r"^COPY ((?:--\S+ )*)(.+)$", dockerfile, re.M):
        for file in files.split()[:-1] if "--from" not in options else []:
            assert (ROOT / file).exists(), file
            assert any(file == allowed or file.startswith(f"{allowed}/") for allowed in sent), f"{file} is not sent"
