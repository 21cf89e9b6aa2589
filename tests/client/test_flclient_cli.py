"""The command line of flclient: where an option may be said, what a wrong one is answered, and packages by hand."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from fl_client import cli
from fl_client.cli import JoinOptions
from fl_server.app import serving
from fl_server.settings import Settings
from fl_server.tls import private_certificates
from tests.client.api_double import answering, as_json
from tests.client.flclient_process import COMMAND, clean_environment, flclient
from tests.client.server_double import Combiner
from tests.server.tokens import SECRET, token

LOCAL = ("--local-package", "--combiner", "127.0.0.1", "--combiner-port", "1")
COPY = """cp "$1" "$2"; echo '{"num_examples": 3}' > "$2-metadata" """


def run(*arguments: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=clean_environment(cwd / "cache", **variables),
        capture_output=True,
        text=True,
        timeout=60,
    )


def make_client(folder: Path, **scripts: str) -> None:
    (folder / "client").mkdir()
    points = {}
    for name, script in scripts.items():
        (folder / "client" / f"{name}.sh").write_text(script)
        points[name] = {"command": f"sh {name}.sh"}
    (folder / "client" / "fedn.yaml").write_text(json.dumps({"entry_points": points}))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with nothing said in the environment; for commands that are run in this process."""
    for name in [name for name in os.environ if name.startswith(("FL_", "FEDN_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(logging, "basicConfig", lambda **arguments: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


# ---- help


def test_it_says_its_version(tmp_path: Path) -> None:
    said = run("--version", cwd=tmp_path)
    assert said.returncode == 0 and said.stdout.startswith("flclient 0.")


@pytest.mark.parametrize("entry", ["build", "startup", "train", "validate", "predict"])
@pytest.mark.parametrize("group", ["package", "run"])
def test_each_entry_point_has_a_help_text_with_an_example(here: Path, group: str, entry: str) -> None:
    said = invoke(group, entry, "--help")
    assert said.exit_code == 0 and f"Example: flclient package {entry} " in said.output


@pytest.mark.parametrize("command", ["join", "run client", "client start", "package create"])
def test_each_other_command_has_one_too(here: Path, command: str) -> None:
    said = invoke(*command.split(), "--help")
    assert said.exit_code == 0 and "Example: flclient " in said.output


# ---- where options come from


@pytest.mark.parametrize(
    ("options", "url"),
    [
        (JoinOptions(api_url="http://a:1/"), "http://a:1"),
        (JoinOptions(api_url="http://localhost", api_port=8092), "http://localhost:8092"),
        (JoinOptions(api_url="localhost", api_port=8092), "http://localhost:8092"),
        (JoinOptions(api_url="localhost"), "http://localhost"),
        (JoinOptions(api_url="api-server", api_port=8092), "http://api-server:8092"),
        (JoinOptions(api_url="api-server:8092", api_port=8092), "http://api-server:8092"),
        (JoinOptions(api_url="fl.example.org"), "https://fl.example.org"),
        (JoinOptions(api_url="fl.example.org", api_port=443), "https://fl.example.org:443"),
        (JoinOptions(api_url="https://fl.example.org/prefix/"), "https://fl.example.org/prefix"),
        (JoinOptions(api_url="http://[::1]", api_port=80), "http://[::1]:80"),
        (JoinOptions(), ""),
    ],
)
def test_the_servers_address_is_put_together(options: JoinOptions, url: str) -> None:
    assert cli._api_url(options) == url


def test_fedns_url_prefix_is_appended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDN_CUSTOM_URL_PREFIX", "/internal")
    assert cli._api_url(JoinOptions(api_url="http://a:1")) == "http://a:1/internal"


def test_the_command_line_comes_before_the_file_and_the_file_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FL_TOKEN", "ours")
    monkeypatch.setenv("FEDN_AUTH_TOKEN", "fedn's")
    monkeypatch.setenv("FL_CLIENT_NAME", "of the environment")
    monkeypatch.setenv("FL_CLIENT_ID", "id of the environment")
    monkeypatch.setenv("FEDN_PACKAGE_EXTRACT_DIR", "packages")
    monkeypatch.setenv("FL_LOCAL_PACKAGE", "yes")
    (tmp_path / "client.yaml").write_text(
        "network_id: fedn-network\nrefresh_token: x\nname: of the file\nclient_id: 17\ntoken:\n"
        "discover_host: api-server\ndiscover_port: 8092\n"
    )
    said = JoinOptions(client_id="of the command line")
    options = said.over(cli._from_file(tmp_path / "client.yaml")).over(cli._from_environment())
    assert options == JoinOptions(
        api_url="api-server",
        api_port=8092,
        token="ours",
        name="of the file",
        client_id="of the command line",
        package_dir="packages",
        local_package=True,
    )


def test_of_another_server_in_the_file_nothing_is_taken() -> None:
    there = JoinOptions(api_url="a", api_port=1, combiner="b", combiner_port=2, name="n")
    assert JoinOptions(api_url="c").over(there) == JoinOptions(api_url="c", name="n")


def test_fedns_own_keys_come_before_the_seeds(tmp_path: Path) -> None:
    (tmp_path / "client.yaml").write_text("discover_host: a\napi_url: b\n")
    assert cli._from_file(tmp_path / "client.yaml") == JoinOptions(api_url="b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("api_port: abc", "client.yaml: api_port: 'abc' is not a port"),
        ("discover_port: 99999", "client.yaml: discover_port: 99999 is not a port"),
        ("combiner_port: true", "client.yaml: combiner_port: True is not a port"),
        ("name: [a]", "client.yaml: name: ['a'] is not a text"),
        ("token: {a: b}", "client.yaml: token: {'a': 'b'} is not a text"),
        ("local_package: maybe", "client.yaml: local_package: 'maybe' is neither true nor false"),
        ("- a", "client.yaml: a mapping is needed"),
        ("a: [", "client.yaml: no YAML: "),
        (None, "client.yaml: No such file or directory"),
    ],
)
def test_a_client_yaml_that_is_wrong_is_refused_with_the_key(
    tmp_path: Path, text: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "client.yaml").write_text(text)
    with pytest.raises(typer.Exit) as ended:
        cli._from_file(tmp_path / "client.yaml")
    assert ended.value.exit_code == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


# ---- what is wrong is one line


def one_line(said: Result, code: int, message: str) -> None:
    assert said.exit_code == code, said.stderr
    [line] = said.stderr.splitlines()
    assert line.startswith("flclient: ") and message in line


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "where is the server?"),
        (("--combiner", "a", "--local-package"), 2, "--combiner needs --combiner-port"),
        (("--combiner", "a", "--combiner-port", "1"), 2, "--combiner alone knows no package"),
        (("-u", "ftp://a"), 2, "--api-url: ftp://a: http://host or https://host is needed"),
        (("-u", "http://"), 2, "--api-url: http://: "),
        (("-u", "http://a:x"), 2, "--api-url: http://a:x: "),
        (("-u", "http://a:1", "-p", "2"), 2, "--api-url says port 1, --api-port says 2"),
        (("-u", "http://a", "--log-level", "LOUD"), 2, "--log-level: LOUD"),
        (("-u", "http://a", "--local-package"), 2, "neither client/fedn.yaml nor fedn.yaml is in "),
        (("-u", "http://a", "-in", "none.yaml"), 2, "none.yaml: No such file or directory"),
        (("-u", "http://127.0.0.1:9", "-i", "Åsa"), 1, "client_id: 'Åsa' is not printable ASCII"),
    ],
)
def test_a_join_that_cannot_be_is_one_line(here: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    one_line(invoke("join", *arguments), code, message)


def test_a_local_package_that_is_wrong_is_one_line(here: Path) -> None:
    make_client(here, validate="true")
    one_line(invoke("join", *LOCAL), 1, "client/fedn.yaml: entry_points.train: missing")


@contextmanager
def other_server(status: int, body: bytes) -> Iterator[str]:
    """An HTTP server that has nothing to do with us; its address."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, b"<h1>Not\nFound</h1>", "answered 404: <h1>Not Found</h1>"),
        (501, b"no POST here", "answered 501: no POST here"),
        (200, b"<html>welcome</html>", "assigned no combiner: <html>welcome</html>"),
        (401, b'{"message": "Token expired"}', "answered 401: Token expired"),
    ],
)
def test_a_server_that_is_not_flserve_or_refuses_is_one_line(
    here: Path, status: int, body: bytes, message: str
) -> None:
    with other_server(status, body) as url:
        one_line(invoke("join", "-u", url), 1, message)


async def test_the_grpc_port_taken_for_the_rest_api_is_one_line(tmp_path: Path, combiner: Combiner) -> None:
    async with flclient("join", "-u", f"http://127.0.0.1:{combiner.port}", cwd=tmp_path) as client:
        assert await client.exit_code() == 1
        await client.said("is no REST API: what answers there speaks no HTTP/1.1")
    assert len(client.lines) == 1


# ---- packages by hand


def test_a_package_is_built_packed_and_tried_without_a_network(tmp_path: Path) -> None:
    make_client(
        tmp_path,
        build="printf seed > ../seed.npz",
        startup="echo started",
        train=COPY,
        validate="""echo '{"accuracy": 1}' > "$2" """,
        predict="""echo '[1]' > "$2" """,
    )
    built = run("package", "build", "--path", "client", cwd=tmp_path)
    assert (built.returncode, built.stdout) == (0, "seed model: seed.npz\n")
    made = run("package", "create", "--path", "client", cwd=tmp_path)
    assert (made.returncode, made.stdout) == (0, "package.tgz: 6 files\n")
    started = run("run", "startup", "-p", "client", "-v", cwd=tmp_path)
    assert started.returncode == 0 and "startup: started" in started.stderr
    trained = run("package", "train", "--path", "client", "-i", "seed.npz", "-o", "out.npz", cwd=tmp_path)
    assert (trained.returncode, trained.stdout) == (0, "out.npz\n")
    assert (tmp_path / "out.npz").read_bytes() == b"seed"
    assert json.loads((tmp_path / "out.npz-metadata").read_text()) == {"num_examples": 3}
    for group, entry, expected in (("package", "validate", {"accuracy": 1}), ("run", "predict", [1])):
        said = run(group, entry, "--path", "client", "--input", "out.npz", "--output", entry, cwd=tmp_path)
        assert said.returncode == 0, said.stderr
        assert json.loads((tmp_path / entry).read_text()) == expected


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("build", "--path", "none"), 2, "--path: none: no such folder"),
        (("build", "--path", "empty"), 2, "--path: empty: no fedn.yaml in it"),
        (("build", "--path", "client"), 1, "client/fedn.yaml: entry_points.build: missing"),
        (("create", "--path", "none"), 2, "--path: none: not a folder"),
        (("create", "--path", "empty"), 1, "empty: no fedn.yaml in it"),
        (("create", "--path", "client", "-o", "none"), 1, "none: no such folder"),
        (("train", "--path", "client", "-i", "none.npz", "-o", "out.npz"), 1, "none.npz: No such file or directory"),
        (("train", "--path", "client", "-i", "seed.npz", "-o", "out.npz"), 1, "train ended with exit code 7"),
        (("train", "--path", "client", "-i", "empty", "-o", "out.npz"), 1, "empty: Is a directory"),
        (("validate", "--path", "client", "-i", "seed.npz", "-o", "out"), 1, "validate ended well, but wrote nothing"),
        (("predict", "--path", "client", "-i", "seed.npz", "-o", "none/out"), 1, "none/out: No such file or directory"),
    ],
)
def test_what_is_wrong_with_a_package_is_one_line_and_nothing_is_written(
    here: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    make_client(here, train=f"{COPY}; exit 7", validate="true", predict="""echo 1 > "$2" """)
    (here / "empty").mkdir()
    (here / "seed.npz").touch()
    one_line(invoke("package", *arguments), code, message)
    assert {path.name for path in here.iterdir()} <= {"client", "empty", "seed.npz", "cache"}


# ---- certificates and an issuer


async def test_it_joins_with_a_certificate_and_the_issuers_first_token(tmp_path: Path) -> None:
    made, theirs = (private_certificates(tmp_path / name, []) for name in ("server", "device"))
    settings = {"tls_cert": made.certificate, "tls_key": made.key, "tls_client_ca": theirs.ca, "jwt_secret_key": SECRET}
    given = {"api_port": 0, "grpc_port": 0, "data_dir": tmp_path / "data", **settings}
    make_client(tmp_path, train=COPY)
    with answering() as issuer:
        issuer.answer = lambda request: as_json({"access": token("client", sub="a")})
        refresh = {
            "FEDN_AUTH_REFRESH_TOKEN": "again",
            "FL_AUTH_REFRESH_TOKEN_URI": f"http://127.0.0.1:{issuer.port}/refresh",
        }
        async with serving(Settings.load(None, given)) as server:
            who = ("join", "--local-package", "--client-id", "a", "--tls-ca", made.ca)
            shown = ("--tls-cert", theirs.certificate, "--tls-key", theirs.key)
            where = ("--combiner", "localhost", "--combiner-port", server.grpc_port)
            for at in (("--api-url", server.api_url), where):
                async with flclient(*who, *shown, *at, cwd=tmp_path, **refresh) as client:
                    await client.said("attached to combiner")
            async with flclient(*who, "--api-url", server.api_url, cwd=tmp_path, **refresh) as client:
                await client.said("waiting for the server")
