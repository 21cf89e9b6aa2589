"""What the digits example's clients train on, and the model that an undisturbed run ends with."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fl_client.wire.codec import encode
from fl_server.store import s3
from fl_server.store.s3 import S3
from tests.crash.on_services import OnServices, Services
from tests.crash.processes import CLIENTS, DIGITS, WAIT_S, federation
from tests.virtual import HurriedLoop


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    script = [sys.executable, str(DIGITS / "data.py"), "--out", str(folder), "--clients", str(CLIENTS)]
    subprocess.run(script, check=True, timeout=WAIT_S)
    return folder


@pytest.fixture(scope="session")
def seed() -> bytes:
    sys.path.insert(0, str(DIGITS / "client"))
    try:
        import model  # the example is no package
    finally:
        sys.path.remove(str(DIGITS / "client"))
    return encode(model.init(7))


@pytest.fixture(scope="session")
def undisturbed(shards: Path, seed: bytes, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    model, killed = asyncio.run(federation(tmp_path_factory.mktemp("calm") / "run", shards, seed, []))
    assert killed == 0
    return model


@pytest.fixture(scope="module")
def on_services(tmp_path_factory: pytest.TempPathFactory, mongo_url: str, s3_server: S3) -> Iterator[OnServices]:
    with ThreadPoolExecutor(4) as pool, pytest.MonkeyPatch.context() as patched:
        for name in ("OPEN_TIMEOUT_S", "_CONNECT_TIMEOUT_S", "_READ_TIMEOUT_S"):  # hurried, as all time is there
            patched.setattr(s3, name, HurriedLoop.SPEED * getattr(s3, name))
        services = Services(mongo_url, s3_server, f"fl-test-{uuid.uuid4()}", pool)
        yield OnServices(tmp_path_factory.mktemp("on-services"), services)
