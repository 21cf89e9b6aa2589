"""No secret and no token in any log or error: a pytest plugin that looks at those of the whole suite.

Each record of each logger is looked at when it is made, ours at DEBUG too, whatever level the test has set; so are our
errors when they are made, and after each test the logs of the processes that it has started. A test that lets one out
fails in its tear-down, and so in any worker of xdist. Secrets become known when they are first used: by Settings,
Tokens, Verifier, an S3 server, the environment of a process. Any JSON Web Token is one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from pydantic import SecretStr

from fl_client.tokens import Tokens
from fl_client.transport import ClientError
from fl_server.auth import Verifier
from fl_server.errors import FlserveError
from fl_server.log import FactsFormatter
from fl_server.settings import Settings
from fl_server.store.s3 import S3
from fl_server.testing import ServerProcess

OURS = ("fl_server", "fl_client")
# The tests' own HTTP clients tell all that they send when a test asks for DEBUG; our log set-up never lets them.
NOT_OURS = ("httpcore", "hpack")
JWT = re.compile(r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*")
SECRET_NAMES = re.compile(r"SECRET|TOKEN|PASSWORD|MONGO_URL")
SHORTEST = 8  # characters; a shorter secret of a test ("x") is a part of any text

known: set[str] = set()
found: list[str] = []
logs: list[Path] = []
_formatter = FactsFormatter("%(levelname)s %(name)s: %(message)s")


def keep(secret: str) -> None:
    """From now on it may be told nowhere. Of a URL, the password; of a key in PEM, each of its lines."""
    if "://" in secret:
        secret = urlsplit(secret).password or ""
    for line in secret.replace("\\n", "\n").splitlines():
        if len(line) >= SHORTEST and not line.startswith("-----") and not JWT.fullmatch(line):
            known.add(line)


def look(text: str, where: str) -> None:
    leaked = [secret for secret in known if secret in text] + JWT.findall(text)
    if leaked:
        found.append(f"{where}: {text[:2000]}")


def _look_at_record(record: logging.LogRecord) -> None:
    if record.name.split(".")[0] not in NOT_OURS:
        look(f"{_formatter.format(record)} {record.__dict__}", "a log")


def _look_at_files(folder: Path | None) -> None:
    for path in {*logs, *(folder.rglob("*.log") if folder else ())}:
        if path.is_file():
            look(path.read_text(errors="replace"), str(path))
    logs.clear()


# ---- where they are looked for


def _is_ours(name: str) -> bool:
    return name.split(".")[0] in OURS


def _watch_logging() -> Iterator[tuple[Any, str, Any]]:
    """Records of ours are made whatever the level is; handled only where they would have been."""
    enabled, handle = logging.Logger.isEnabledFor, logging.Logger.handle

    def is_enabled_for(logger: logging.Logger, level: int) -> bool:
        return _is_ours(logger.name) or enabled(logger, level)

    def look_and_handle(logger: logging.Logger, record: logging.LogRecord) -> None:
        _look_at_record(record)
        if enabled(logger, record.levelno):
            handle(logger, record)

    yield logging.Logger, "isEnabledFor", is_enabled_for
    yield logging.Logger, "handle", look_and_handle


def _before(owner: Any, name: str, first: Callable[..., None]) -> tuple[Any, str, Any]:
    original = getattr(owner, name)

    def called(*given: Any, **named: Any) -> Any:
        first(*given, **named)
        return original(*given, **named)

    return owner, name, called


def _watch_secrets() -> Iterator[tuple[Any, str, Any]]:
    def of_settings(settings: Settings, context: Any) -> None:
        for value in settings.__dict__.values():
            if isinstance(value, SecretStr):
                keep(value.get_secret_value())

    def of_process(process: ServerProcess, data_dir: Path, *given: Any, **named: Any) -> None:
        logs.append(data_dir.parent / f"{data_dir.name}.log")
        for name, value in (named.get("environment") or {}).items():
            if SECRET_NAMES.search(name):
                keep(value)

    def of_tokens(tokens: Tokens, access: str = "", *, refresh: str = "", **named: Any) -> None:
        keep(access)
        keep(refresh)

    def of_error(error: Exception, *given: Any) -> None:
        look(" ".join(map(str, given)), f"an error, {type(error).__name__}")

    yield _before(Settings, "model_post_init", of_settings)
    yield _before(ServerProcess, "__init__", of_process)
    yield _before(Tokens, "__init__", of_tokens)
    yield _before(Tokens, "take", lambda tokens, access, refresh="": of_tokens(tokens, access, refresh=refresh))
    yield _before(S3, "__init__", lambda server, *given, **named: keep(named.get("secret_key", "".join(given[2:3]))))
    yield _before(Verifier, "of", lambda secret, **named: keep(secret))
    for kind in (FlserveError, ClientError):
        yield _before(kind, "__init__", of_error)


@pytest.hookimpl
def pytest_configure(config: pytest.Config) -> None:
    patch = pytest.MonkeyPatch()
    for owner, name, replacement in [*_watch_logging(), *_watch_secrets()]:
        patch.setattr(owner, name, replacement)
    config.add_cleanup(patch.undo)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    yield
    _look_at_files(getattr(item, "funcargs", {}).get("tmp_path"))
    told = found[:]
    found.clear()
    if told:
        pytest.fail("a secret was told:\n" + "\n".join(told), pytrace=False)
