"""What FEDn 0.33.0 calls things, ours is called too: asked of the real package, not of a list that we wrote."""

from __future__ import annotations

import inspect
import json
import subprocess
from typing import Any

import pytest
import typer

from fl_client import APIClient, cli
from tests.interop.fedn_venv import fedn_venv

SHOW = """
import inspect, json
from fedn import APIClient
from fedn.cli.client_cmd import client_start_v2_cmd
flags = {option: bool(p.is_flag) for p in client_start_v2_cmd.params for option in p.opts}
methods = {
    name: [[p.name, p.default is not p.empty, repr(p.default)] for p in inspect.signature(method).parameters.values()]
    for name, method in inspect.getmembers(APIClient, inspect.isfunction)
    if not name.startswith("_") or name == "__init__"
}
print(json.dumps([flags, methods]))
"""


@pytest.fixture(scope="module")
def fedns() -> tuple[dict[str, bool], dict[str, list[list[Any]]]]:
    """Options of `fedn client start` (True: takes no value), and methods of APIClient with their parameters."""
    shown = subprocess.run([fedn_venv() / "bin" / "python", "-c", SHOW], check=True, capture_output=True, timeout=60)
    flags, methods = json.loads(shown.stdout)
    return flags, methods


@pytest.mark.parametrize("path", [["join"], ["client", "start"]], ids=" ".join)
def test_flclient_has_every_option_of_fedn_client_start(
    path: list[str], fedns: tuple[dict[str, bool], dict[str, list[list[Any]]]]
) -> None:
    command: Any = typer.main.get_command(cli.app)
    for name in path:
        command = command.commands[name]
    ours = {
        option: parameter.is_flag
        for parameter in command.params
        if hasattr(parameter, "is_flag")
        for option in parameter.opts
    }
    assert fedns[0].items() <= ours.items()


def test_api_client_has_every_method_of_fedns_with_its_signature(
    fedns: tuple[dict[str, bool], dict[str, list[list[Any]]]],
) -> None:
    for name, theirs in fedns[1].items():
        parameters = list(inspect.signature(getattr(APIClient, name)).parameters.values())
        ours = [[p.name, p.default is not p.empty, repr(p.default)] for p in parameters]
        assert ours[: len(theirs)] == theirs, name
        assert all(has_default for _, has_default, _ in ours[len(theirs) :]), name
