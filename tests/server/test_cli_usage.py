"""flserve without a server, and with a wrong one: help texts, wrong command lines, exit codes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fl_server import commands
from fl_server.cli import app
from tests.client.api_double import answering, as_json
from tests.server.cli_runner import run


def all_commands() -> Iterator[tuple[str, ...]]:
    for command in app.registered_commands:
        assert command.callback is not None
        yield ((command.name or command.callback.__name__),)
    for noun, group in commands.GROUPS.items():
        for command in group.registered_commands:
            yield noun, command.name or ""


COMMANDS = sorted(all_commands())
ON_THEIR_OWN = ("up", "settings", "openapi", "demo", "doctor", "reset")
AGAINST_A_SERVER = [path for path in COMMANDS if path[0] not in ON_THEIR_OWN]
ARGUMENTS = {
    ("model", "upload"): ["seed.npz"],
    ("model", "download"): ["x", "-o", "out.npz"],
    ("package", "upload"): ["package.tgz", "--name", "n"],
    ("package", "activate"): ["x"],
    ("session", "stop"): ["x"],
}


def arguments_of(path: tuple[str, ...]) -> list[str]:
    return [*path, *ARGUMENTS.get(path, ["x"] if path[-1] == "get" else [])]


def test_every_noun_can_be_listed_and_got() -> None:
    nouns = ["client", "combiner", "model", "package", "round", "run", "session", "status", "validation"]
    assert sorted(commands.GROUPS) == nouns
    assert {(noun, verb) for noun in nouns for verb in ("list", "get")} <= set(COMMANDS)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_a_help_text_with_an_example_that_begins_as_it_is_called(path: tuple[str, ...]) -> None:
    said = run(*path, "--help")
    assert said.code == 0
    (example,) = [line for line in said.out.splitlines() if "Example:" in line]
    assert f"flserve {' '.join(path)}" in example or path == ("settings",)
    common = ("--api-url", "--token", "--format", "--tls-ca", "--tls-cert", "--tls-key", "The server's REST address.")
    assert all(option in said.out for option in common if path in AGAINST_A_SERVER)


def test_the_help_text_says_the_exit_codes() -> None:
    said = " ".join(run("--help").out.split())
    for meaning in ("0 done", "1 the server says no", "2 the command line", "3 no server", "130 interrupted"):
        assert meaning in said
    assert "--install-completion" in said


def test_a_help_text_waits_for_no_server_and_no_http_library() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from fl_server.cli import app; "
        "result = CliRunner().invoke(app, ['session', '--help']); assert result.exit_code == 0; "
        "print(sorted({'httpx', 'fastapi', 'grpc', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


@pytest.mark.parametrize("path", AGAINST_A_SERVER, ids=" ".join)
def test_without_a_server_each_command_is_one_line_and_exit_code_3(
    path: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("seed.npz", "package.tgz"):
        (tmp_path / name).touch()
    with answering() as gone:
        port = gone.port
    said = run(*arguments_of(path), api_url=f"http://127.0.0.1:{port}")
    assert (said.code, said.out) == (3, "")
    (line,) = said.err.splitlines()
    assert line.startswith("flserve: ") and f"http://127.0.0.1:{port}/" in line and "no server answers" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["package.tgz", "seed.npz"]


@pytest.mark.parametrize("path", AGAINST_A_SERVER, ids=" ".join)
def test_a_server_that_is_not_flserve_is_said_in_one_line(
    path: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("seed.npz", "package.tgz"):
        (tmp_path / name).touch()
    with answering() as other:
        other.answer = lambda request: (200, "text/html", b"<html>welcome</html>")
        said = run(*arguments_of(path), api_url=f"http://127.0.0.1:{other.port}")
    assert (said.code, said.out) == (3, "")
    (line,) = said.err.splitlines()
    assert "what answers there is no flserve" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["model", "list"],
        ["model", "trail"],
        ["explain"],
        ["explain", "x"],
        ["session", "start"],
        ["session", "stop", "x"],
    ],
    ids=" ".join,
)
def test_json_of_another_server_is_said_in_one_line(arguments: list[str]) -> None:
    with answering() as other:
        other.answer = lambda request: as_json({"hello": "world"})
        said = run(*arguments, api_url=f"http://127.0.0.1:{other.port}")
    assert (said.code, said.out) == (3, "")
    (line,) = said.err.splitlines()
    assert "what answers there is no flserve" in line


WRONG = [
    (["model", "list", "--format", "xml"], "--format"),
    (["model", "list", "--limit", "0"], "--limit"),
    (["model", "list", "--filter", "name"], "--filter: name: field=value needed"),
    (["model", "list", "--api-url", "ftp://here"], "--api-url: ftp://here: http:// or https:// needed"),
    (["model", "list", "--api-url", "http://:80"], "names no host"),
    (["model", "list", "--api-url", "http://a:b"], "host: "),
    (["model", "list", "--token", "ä"], "token: "),
    (["model", "get"], "Missing argument"),
    (["model", "upload", "nowhere.npz"], "nowhere.npz: No such file or directory"),
    (["model", "upload", "seed.pt"], "seed.pt: a model ends in one of .npz"),
    (["model", "upload", "folder.npz"], "folder.npz: Is a directory"),
    (["package", "upload", "nowhere.tgz", "--name", "n"], "nowhere.tgz: No such file or directory"),
    (["package", "upload", "nowhere.tgz"], "--name"),
    (["session", "start", "--rounds", "0"], "--rounds"),
    (["session", "start", "--rounds", "many"], "--rounds"),
    (["session", "start", "--client-settings", "[1"], "--client-settings: no JSON"),
    (["session", "start", "--client-settings", "[1]"], "--client-settings: a JSON object needed"),
    (["session", "start", "--aggregator-kwargs", "x"], "--aggregator-kwargs: no JSON"),
    (["events", "--after", "-1"], "--after"),
    (["session", "begin"], "begin"),
    (["demo", "--format", "xml"], "--format"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_a_wrong_command_line_is_exit_code_2_and_names_what_is_wrong(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seed.pt").touch()
    (tmp_path / "folder.npz").mkdir()
    said = run(*arguments)
    assert (said.code, said.out) == (2, "")
    assert words in said.err and "Traceback" not in said.err


def test_a_token_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering() as double:
        double.answer = lambda request: as_json({"count": 0, "result": []})
        url = f"http://127.0.0.1:{double.port}"
        assert run("model", "list", "--token", "abc", api_url=url).code == 0
        assert run("model", "list", api_url=url).code == 0
    with_token, without = double.asked
    assert with_token.headers["authorization"] == "Bearer abc"
    assert "authorization" not in without.headers


def test_a_scheme_may_be_left_out() -> None:
    with answering() as double:
        double.answer = lambda request: as_json({"count": 0, "result": []})
        assert run("model", "list", "--api-url", f"127.0.0.1:{double.port}/prefix/").code == 0
    assert double.asked[0].line.startswith("GET /prefix/api/v1/models/")


def test_control_characters_of_others_do_not_reach_the_terminal() -> None:
    with answering() as double:
        status = {"status": "\x1b[31mred\n" + "x" * 500, "timestamp": "now"}
        double.answer = lambda request: as_json({"count": 3, "result": [status]})
        said = run("status", "list", api_url=f"http://127.0.0.1:{double.port}")
        whole = run("status", "get", "x", api_url=f"http://127.0.0.1:{double.port}")
    assert len(said.out.splitlines()) == 2 and "\x1b" not in said.out and " [31mred xxx" in said.out and "…" in said.out
    assert said.err == "1 of 3 shown: --limit, --filter\n"
    assert "\x1b" not in whole.out


def test_completion_is_offered() -> None:
    shown = CliRunner().invoke(app, [], prog_name="flserve", env={"_FLSERVE_COMPLETE": "source_bash"})
    assert "_FLSERVE_COMPLETE=complete_bash" in shown.output
    assert isinstance(app, typer.Typer)


def test_packages_are_uploaded_and_activated(tmp_path: Path) -> None:
    (tmp_path / "package.tgz").write_text("package")
    with answering() as double:
        double.answer = lambda request: as_json({"message": "done"})
        url = f"http://127.0.0.1:{double.port}"
        upload = ("package", "upload", tmp_path / "package.tgz", "--name", "digits", "--description", "of 1998")
        uploaded = run(*upload, api_url=url)
        activated = run("package", "activate", "p1", "--format", "json", api_url=url)
    assert (uploaded.code, uploaded.out) == (0, "package digits is the active one\n")
    assert (activated.code, activated.json) == (0, {"message": "done"})
    first, second = double.asked
    assert (first.line, first.form) == (
        "POST /api/v1/packages/",
        {"file": "package", "name": "digits", "helper": "numpyhelper", "description": "of 1998"},
    )
    assert (second.line, second.json) == ("PUT /api/v1/packages/active", {"id": "p1"})
