"""A package's python_env as a virtual environment, made once for all packages and clients of this machine.

It lies under a name that is its content's; it is complete when its stamp is there, which is written last. Virtual
environments cannot be moved, so it is made in place, under a lock that other processes wait for.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fl_client.command import CommandFailed, run
from fl_client.manifest import PackageError, read_python_env

logger = logging.getLogger(__name__)

_STAMP = ".complete"
_LOCK_POLL_S = 0.2


def cache_folder() -> Path:
    """Of this user and program."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flserve"


async def virtual_environment(spec: Path) -> Path:
    """Its folder; made if it is not there. Raises PackageError."""
    python_env = read_python_env(spec)
    folder = cache_folder() / "envs" / _content_of(spec)
    if not (folder / _STAMP).exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            async with _locked(folder.with_suffix(".lock")):
                if not (folder / _STAMP).exists():
                    logger.info("making the environment %s of %s", python_env.name or spec.name, spec)
                    await _make(folder, spec.parent, [python_env.build_dependencies, python_env.dependencies])
        except CommandFailed as exc:
            last = next((line for line in reversed(exc.last_lines) if line.strip()), "")
            raise PackageError(f"{spec}: making the environment {exc}: {last.strip()}") from exc
        except OSError as exc:
            raise PackageError(f"{exc.filename}: {exc.strerror}") from exc
    return folder


def _content_of(spec: Path) -> str:
    """A hash of what is installed, and for which Python."""
    return hashlib.sha256(spec.read_bytes() + f"\n{sys.version}\n{sys.base_prefix}".encode()).hexdigest()


async def _make(folder: Path, package: Path, steps: Sequence[Sequence[str]]) -> None:
    """steps: requirements to install, one pip after the other; relative paths in them are the package's."""
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed half-way
    quiet = {**os.environ, "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    async def step(*argv: str) -> None:
        await run(argv, cwd=package, environment=quiet, say=lambda line: logger.info("pip: %s", line))

    try:
        await step(sys.executable, "-m", "venv", str(folder))
        for requirements in steps:
            if requirements:
                with tempfile.NamedTemporaryFile("w", prefix="flclient-", suffix=".txt") as file:
                    file.write("\n".join(requirements) + "\n")
                    file.flush()
                    await step(str(folder / "bin" / "python"), "-m", "pip", "install", "-r", file.name)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    (folder / _STAMP).touch()


@asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    with path.open("w") as file:
        is_said = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not is_said:
                    logger.info("another process makes the environment %s: waiting for it", path.stem)
                    is_said = True
            await asyncio.sleep(_LOCK_POLL_S)  # a file's lock cannot be awaited
        yield
