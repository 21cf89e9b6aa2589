"""The look-out for secrets sees what it should, in a run of its own; and what has a secret does not show it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fl_client import APIClient, Client, TrainResult
from fl_client.tokens import Tokens
from fl_server.app import gate
from fl_server.auth import Verifier
from fl_server.settings import Settings
from fl_server.store.mongo import MongoStateStore
from fl_server.store.s3 import S3

ROOT = Path(__file__).parents[1]
LEAKS = """
import logging
import pytest
from fl_client.tokens import Tokens
from fl_server.auth import Role, Verifier
from fl_server.errors import Invalid
from fl_server.settings import Settings

SECRET, REFRESH, PASSWORD = "the-secret-of-a-test-run", "a-refresh-token", "a-password"
ours = logging.getLogger("fl_server.somewhere")
said = Settings.load(None, {"jwt_secret_key": SECRET, "mongo_url": f"mongodb://u:{PASSWORD}@h"})
Tokens("opaque-token", refresh=REFRESH, refresh_uri="http://x")
token = Verifier.of(SECRET).sign(Role.ADMIN, client_id=None, lifetime_s=60)

def test_bad_debug(): ours.debug("step", extra={"key": SECRET})
def test_bad_argument(): ours.info("read %s", token)
def test_bad_traceback():
    try:
        raise ValueError(REFRESH)
    except ValueError:
        ours.exception("failed")
def test_bad_library(): logging.getLogger("pymongo").warning("url with %s", PASSWORD)
def test_bad_error():
    with pytest.raises(Invalid):
        raise Invalid(f"bad token: {token}")
def test_bad_process(tmp_path): (tmp_path / "server.log").write_text(f"INFO asked with {token}")
def test_good(tmp_path):
    ours.debug("step", extra={"key": "short"})
    (tmp_path / "server.log").write_text("INFO ready")
    (tmp_path / "token").write_text(token)
"""


def test_whatever_tells_a_secret_fails(tmp_path: Path) -> None:
    (tmp_path / "test_of_leaks.py").write_text(LEAKS)
    options = ("-p", "tests.leaks", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "--rootdir", tmp_path)
    command = [sys.executable, "-m", "pytest", *map(str, options), str(tmp_path / "test_of_leaks.py")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    failed = set(re.findall(r"^ERROR \S+::(\w+)", run.stdout, re.MULTILINE))
    assert failed == {f"test_bad_{what}" for what in ("debug", "argument", "traceback", "library", "error", "process")}
    assert "7 passed, 6 errors" in run.stdout


def test_no_repr_tells_a_secret(tmp_path: Path) -> None:
    secret, password, refresh = "the-secret-of-this-test", "the-password-of-this-test", "the-refresh-of-this-test"
    url = f"mongodb://user:{password}@localhost:1/"
    given = {"jwt_secret_key": secret, "mongo_url": url, "s3_secret_key": secret}
    settings = Settings.load(None, given)
    verifier = Verifier.of(secret)
    tokens = Tokens(secret, refresh=refresh, refresh_uri="http://localhost:1")

    def train(parameters: object, config: object) -> TrainResult:
        raise AssertionError

    client = Client(api_url="http://localhost:1", train=train, client_id="a", token=tokens)
    holders = [settings, verifier, gate(settings), tokens, client, client.__dict__, S3("http://x", "key", secret)]
    holders += [APIClient("localhost", token=secret), MongoStateStore(url, "a_database"), settings.mongo_url]
    for holder in holders:
        for shown in (repr(holder), str(holder), f"{holder}"):
            assert not any(told in shown for told in (secret, password, refresh)), type(holder)


@pytest.mark.parametrize("name", ["jwt_secret_key", "mongo_url", "s3_secret_key"])
def test_a_settings_error_does_not_tell_a_secret(name: str, tmp_path: Path) -> None:
    """The look-out would see it: errors are looked at."""
    secret = "the-secret-of-this-error"
    (tmp_path / "flserve.toml").write_text(f'{name} = ["{secret}"]\n')
    with pytest.raises(Exception, match=name) as refused:
        Settings.load(tmp_path / "flserve.toml", {})
    assert secret not in str(refused.value)
