"""The commands of the guide's "Backup and restore", while clients train: the session goes on as if nothing had been."""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from motor.motor_asyncio import AsyncIOMotorClient

from fl_server.services import Mongod
from fl_server.store.s3 import S3
from fl_server.testing import ServerProcess
from tests.crash.processes import CLIENTS, WAIT_S, Run, run_of
from tests.docs.test_commands import GUIDE, blocks

PAGE = GUIDE / "production.md"
LAST = CLIENTS - 1


def commands(word: str) -> str:
    """The one block of the page that holds it."""
    [found] = [block.text for block in blocks(PAGE) if word in block.text and block.file_name is None]
    return found


async def type(text: str, folder: Path, environment: Mapping[str, str]) -> None:
    """As a reader does, at a terminal in this folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FL_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    shell = await asyncio.create_subprocess_exec(
        *("bash", "-euc", text), cwd=folder, env={**kept, **environment, "PATH": path}, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await shell.communicate()
    assert shell.returncode == 0, out.decode()


@asynccontextmanager
async def running(mongod: Mongod) -> AsyncIterator[Mongod]:
    await mongod.start()
    try:
        yield mongod
    finally:
        await mongod.kill()


async def make_replica_set(mongod: Mongod) -> None:
    client: AsyncIOMotorClient[Any] = AsyncIOMotorClient(mongod.url, directConnection=True, timeoutMS=30_000)
    members = [{"_id": 0, "host": mongod.url.removeprefix("mongodb://")}]
    await client.admin.command("replSetInitiate", {"_id": "rs0", "members": members})
    client.close()


async def open_round(run: Run, seed: bytes) -> None:
    """The session has rounds behind it, and one that the last client holds open."""
    await run.start(seed)
    await run.accepted(2 * CLIENTS)
    run.pause(LAST)
    await run.accepted(2 * CLIENTS + 1)


@pytest.mark.long
@pytest.mark.parametrize("database", ["a replica set, running", "a single mongod, stopped"])
async def test_a_session_goes_on_from_a_backup_of_mongodb_and_s3(
    undisturbed: bytes, shards: Path, seed: bytes, tmp_path: Path, s3_server: S3, database: str
) -> None:
    is_running = database.endswith("running")
    (tmp_path / "backup.py").write_text(next(block.text for block in blocks(PAGE) if block.file_name == "backup.py"))
    name = f"fl-test-{uuid.uuid4()}"
    environment = {
        "FL_DATA_DIR": str(tmp_path / "data"),
        "FL_API_PORT": "0",
        "FL_GRPC_PORT": "0",
        "FL_MONGO_DATABASE": name,
        "FL_S3_ENDPOINT_URL": s3_server.endpoint_url,
        "FL_S3_ACCESS_KEY": s3_server.access_key,
        "FL_S3_SECRET_KEY": s3_server.secret_key,
        "FL_S3_MODEL_BUCKET": f"{name}-models",
        "FL_S3_CONTEXT_BUCKET": f"{name}-context",
    }
    mongod = Mongod(tmp_path / "mongod", options=("--replSet", "rs0") if is_running else ())
    async with asyncio.timeout(2 * WAIT_S), running(mongod):
        environment["FL_MONGO_URL"] = mongod.url
        if is_running:
            await make_replica_set(mongod)
        async with (
            ServerProcess(tmp_path / "data", environment=environment) as server,
            run_of(server, shards, tmp_path) as run,
        ):
            await open_round(run, seed)
            if not is_running:
                await server.stop()
            await type(commands("backup.py save"), tmp_path, environment)
            if not is_running:
                await server.start()
            run.resume(LAST)
            assert await run.until_ended(), "what comes after the backup is to be forgotten"
            await server.stop()
            await type(commands("backup.py restore"), tmp_path, environment)
            await server.start()
            assert await run.until_ended()
            assert await run.final_model() == undisturbed


@pytest.mark.long
async def test_a_session_goes_on_from_a_copy_of_the_data_folder(
    undisturbed: bytes, shards: Path, seed: bytes, tmp_path: Path
) -> None:
    async with asyncio.timeout(WAIT_S):
        async with (
            ServerProcess(tmp_path / "flserve-data") as server,
            run_of(server, shards, tmp_path) as run,
        ):
            await open_round(run, seed)
            await server.stop()
            await type(commands("cp -a flserve-data"), tmp_path, {})
            await server.start()
            run.resume(LAST)
            assert await run.until_ended()
            await server.stop()
            await type(commands("cp -a backup"), tmp_path, {})
            await server.start()
            assert await run.until_ended()
            assert await run.final_model() == undisturbed
