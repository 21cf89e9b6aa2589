"""`flserve up` and `flserve token` about who may call: what is refused, what is said, what never is."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from fl_server.app import say_who_may_call
from fl_server.auth import Role, Verifier
from fl_server.cli import app
from fl_server.settings import Settings
from fl_server.testing import ServerProcess
from tests.server.tokens import SECRET, bad_headers, key_pair

VARIABLES = {name: None for name in os.environ if name.startswith(("FL_", "FEDN_"))}


def flserve(*arguments: str, **environment: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments), env={**VARIABLES, **environment})
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_it_does_not_listen_beyond_this_machine_without_authentication(host: str) -> None:
    code, out, err = flserve("up", "--host", host)
    assert (code, out) == (2, "")
    assert err.startswith(f"flserve: host: {host} is beyond this machine, and authentication is off")
    assert "--insecure" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("FL_JWT_ALGORITHM", "none", "jwt_algorithm: 'none' is not supported"),
        ("FL_JWT_SECRET_KEY", "short", "jwt_secret_key: shorter than 16 bytes"),
        ("FL_JWT_ALGORITHM", "RS256", "jwt_secret_key: no public key in PEM for RS256"),
        ("FL_JWT_CUSTOM_CLAIM_KEY", "x", "jwt_custom_claim_key: "),
        ("FL_AUTH_SCHEME", "two words", "auth_scheme: "),
        ("FL_TLS_CERT", "cert.pem", "tls_cert, tls_key: both are needed"),
    ],
)
def test_what_cannot_be_verified_with_is_refused_at_the_start(
    variable: str, value: str, said: str, tmp_path: Path
) -> None:
    environment = {"FL_JWT_SECRET_KEY": SECRET, variable: value}
    code, out, err = flserve("up", "--data-dir", str(tmp_path), **environment)
    assert (code, out) == (2, "")
    assert err.startswith(f"flserve: {said}")
    assert SECRET not in err


async def test_insecure_listens_everywhere_and_the_log_says_that_nobody_is_asked(tmp_path: Path) -> None:
    async with ServerProcess(tmp_path / "data", "--host", "0.0.0.0", "--insecure") as server:
        await server.stop()
    [line] = [line for line in server.log.read_text().splitlines() if "authentication" in line]
    assert "authentication is off: whoever reaches the ports may do all" in line


async def test_with_a_secret_nobody_gets_in_without_a_token_and_no_secret_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "fl.toml"
    config.write_text(f'jwt_secret_key = "{SECRET}"\n')
    arguments = ("--host", "0.0.0.0", "--config", str(config), "--log-level", "DEBUG")
    code, signed, _ = flserve("token", "create", "--role", "admin", "--expires", "5m", "--config", str(config))
    assert code == 0
    sent = [
        signed.strip(),
        *(header.split()[-1] for kind, (header, _) in bad_headers().items() if header and kind != "wrong scheme"),
    ]
    async with ServerProcess(tmp_path / "data", *arguments) as server, httpx.AsyncClient() as http:
        url = f"{server.api_url}/api/v1/clients/"
        for word in sent:
            answer = await http.get(url, headers={"Authorization": f"Bearer {word}"})
            assert answer.status_code == (200 if word == sent[0] else 401)
        assert await server._end(signal.SIGTERM) == 0
    log = server.log.read_text()
    assert "authentication is on algorithm=HS256" in log
    assert "FEDn's own client sends none there" in log
    for secret in (SECRET, *(word for word in sent if len(word) > 40)):
        assert secret not in log


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, ["authentication is on", "gRPC is plaintext"]),
        ({"tls": "auto"}, ["authentication is on", "FEDn's own client uses TLS on port 443 alone"]),
        ({"tls": "auto", "grpc_port": 443}, ["authentication is on"]),
        ({"grpc_trusted_proxy": "fl.example.org"}, ["authentication is on"]),
        ({"jwt_secret_key": "sixteen bytes it is"}, ["authentication is on", "jwt_secret_key is short", "gRPC is"]),
        ({"jwt_secret_key": ""}, ["authentication is off"]),
    ],
)
def test_the_start_says_what_callers_meet(
    settings: dict[str, Any], said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    say_who_may_call(Settings.load(None, {"jwt_secret_key": SECRET, **settings}))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))


# ---- token create


def test_a_created_token_is_good_for_the_server_of_the_same_settings() -> None:
    arguments = ("token", "create", "--role", "client", "--client-id", "hospital-a", "--expires", "2h")
    code, out, err = flserve(*arguments, FEDN_JWT_SECRET_KEY=SECRET)
    assert (code, err) == (0, "")
    said = Verifier.of(SECRET).verify(f"Bearer {out.strip()}")
    assert (said.role, said.client_id) == (Role.CLIENT, "hospital-a")


def test_a_created_token_lasts_as_long_as_was_said_and_comes_as_json_too() -> None:
    for expires, lasts_s in (("30s", 30), ("5m", 300), ("2h", 7200), ("30d", 30 * 86_400), ("", 30 * 86_400)):
        arguments = ["--role", "admin", "--format", "json", *(["--expires", expires] if expires else [])]
        before = time.time()
        code, out, err = flserve("token", "create", *arguments, FL_JWT_SECRET_KEY=SECRET, FL_AUTH_SCHEME="Token")
        said = json.loads(out)
        assert (code, err, said["role"], said["client_id"]) == (0, "", "admin", None)
        assert before + lasts_s <= said["expires_at"] <= time.time() + lasts_s + 1
        assert Verifier.of(SECRET).verify(f"Bearer {said['token']}").role is Role.ADMIN


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--role", "root"), "--role: root: one of admin, combiner, client is needed"),
        (("--role", "client"), "--client-id: missing"),
        (("--role", "admin", "--expires", "never"), "--expires: never: "),
        (("--role", "admin", "--expires", "0d"), "--expires: 0d: "),
    ],
)
def test_a_token_that_makes_no_sense_is_refused(arguments: tuple[str, ...], said: str) -> None:
    code, out, err = flserve("token", "create", *arguments, FL_JWT_SECRET_KEY=SECRET)
    assert (code, out) == (2, "")
    assert err.startswith(f"flserve: {said}")


def test_without_a_secret_or_with_an_issuers_key_none_is_created() -> None:
    assert flserve("token", "create", "--role", "admin")[2].startswith("flserve: jwt_secret_key: not set")
    _, public = key_pair("ES256")
    code, _, err = flserve("token", "create", "--role", "admin", FL_JWT_SECRET_KEY=public, FL_JWT_ALGORITHM="ES256")
    assert (code, "the issuer signs tokens" in err) == (2, True)
