"""What the image does when it is built and run, done by hand: its steps in a clean virtual environment, no Docker."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from fl_server.store.s3 import S3

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "compose"
WAIT_S = 180.0
PATH = re.compile(r"(?<![\w.$])/(opt|home|data|etc/fl|var/lib)\b")
STAGE = r"^FROM .* AS {}$(.*?)(?=^FROM|\Z)"
STEP = re.compile(r"^(COPY|RUN) ((?:.*\\\n)*.*)$", re.M)


@dataclass(frozen=True)
class Image:
    """Absolute paths of the image lie below root."""

    root: Path

    def at(self, text: str) -> str:
        return PATH.sub(lambda found: f"{self.root}{found[0]}", text)

    def environment(self, **more: str) -> dict[str, str]:
        """Nothing of the developer's but how pip finds its index."""
        kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
        path = os.pathsep.join([f"{self.root}/opt/flserve/bin", os.defpath])
        return {**kept, "HOME": f"{self.root}/home", "PATH": path, "OPENBLAS_NUM_THREADS": "1", **more}

    def build(self, *stages: str) -> None:
        """The steps of these stages of the Dockerfile, in a copy of what is sent to it."""
        source = self.root / "src"
        source.mkdir(parents=True)
        python = Path(sys.executable).parent  # as python:slim has it, by that name
        environment = self.environment(PATH=os.pathsep.join([str(python), os.defpath]))
        for stage in stages:
            text = re.search(STAGE.format(stage), (COMPOSE / "Dockerfile").read_text(), re.M | re.S)
            assert text, stage
            for instruction, rest in STEP.findall(text[1]):
                if instruction == "COPY":
                    *names, target = rest.split()
                    for name in names:
                        copy(ROOT / name, source / target / (name if target.endswith("/") else ""))
                else:
                    subprocess.run(["sh", "-euc", self.at(rest)], cwd=source, env=environment, check=True)

    async def run(self, folder: Path, *command: str, **environment: str) -> asyncio.subprocess.Process:
        """Through the image's entry point."""
        return await asyncio.create_subprocess_exec(
            *(str(COMPOSE / "entrypoint"), *map(self.at, command)),
            cwd=folder,
            env=self.environment(**environment),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )

    async def done(self, folder: Path, *command: str, **environment: str) -> str:
        process = await self.run(folder, *command, **environment)
        out, _ = await process.communicate()
        assert process.returncode == 0, (command, out.decode())
        return out.decode()


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


@asynccontextmanager
async def running(process: asyncio.subprocess.Process) -> AsyncIterator[asyncio.subprocess.Process]:
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


@pytest.fixture
def services() -> Mapping[str, Any]:
    read = [yaml.safe_load((COMPOSE / name).read_text()) for name in ("compose.yaml", "compose.client.yaml")]
    return {name: service for file in read for name, service in file["services"].items()}


@pytest.mark.long
async def test_the_images_steps_make_a_federation_of_the_compose_files_commands(
    tmp_path: Path, mongo_url: str, s3_server: S3, services: Mapping[str, Any]
) -> None:
    image, name = Image(tmp_path), f"fl-test-{uuid.uuid4()}"
    await asyncio.to_thread(image.build, "build", "build-digits")
    digits = tmp_path / "home" / "flserve" / "digits"
    copy(ROOT / "examples" / "digits", digits)
    server = {
        "FL_API_PORT": "0",
        "FL_GRPC_PORT": "0",
        "FL_DATA_DIR": str(tmp_path / "var" / "lib" / "flserve"),
        "FL_MONGO_URL": mongo_url,
        "FL_MONGO_DATABASE": name,
        "FL_S3_ENDPOINT_URL": s3_server.endpoint_url,
        "FL_S3_ACCESS_KEY": s3_server.access_key,
        "FL_S3_SECRET_KEY": s3_server.secret_key,
        "FL_S3_MODEL_BUCKET": name,
        "FL_S3_CONTEXT_BUCKET": name,
    }
    async with asyncio.timeout(WAIT_S), AsyncExitStack() as stack:
        assert "pytest" not in await image.done(tmp_path, "pip", "list"), "what developers need is not in it"
        ready = tmp_path / "ready"
        up = await image.run(tmp_path, *services["api-server"]["command"], "--ready-file", str(ready), **server)
        await stack.enter_async_context(running(up))
        assert up.stdout
        while b"flserve is ready" not in (line := await up.stdout.readline()):
            assert line, "it ended"
        api_url = json.loads(ready.read_text())["api_url"]

        await image.done(digits, *services["digits-data"]["command"])
        package = services["digits-package"]
        script = package["command"][0].replace("$$", "$")
        await image.done(digits, *package["entrypoint"], script, FL_API_URL=api_url)

        config = yaml.safe_load((COMPOSE / "client.yaml").read_text())
        config |= {"discover_host": "127.0.0.1", "discover_port": int(api_url.rpartition(":")[2])}
        (tmp_path / "etc" / "fl").mkdir(parents=True)
        (tmp_path / "etc" / "fl" / "client.yaml").write_text(yaml.safe_dump(config))
        for client in ("digits-0", "digits-1", "digits-2"):
            command, data = services[client]["command"], services[client]["environment"]["DIGITS_DATA"]
            process = await image.run(digits, *command, DIGITS_DATA=image.at(data))
            await stack.enter_async_context(running(process))

        started = ("session", "start", "--rounds", "2", "--min-clients", "3", "--wait-for-clients", "120", "--watch")
        said = await image.done(digits, "flserve", *started, FL_API_URL=api_url)
        assert "is Finished; 2 rounds" in said
