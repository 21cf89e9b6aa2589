"""What the digits example's clients train on, and the model that an undisturbed run ends with."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fl_client.wire.codec import encode
from tests.crash.processes import CLIENTS, DIGITS, WAIT_S, federation


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
