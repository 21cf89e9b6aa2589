"""Compute packages on a device: made into an archive, fetched from the server, run entry point by entry point.

FEDn's contract of files (train: model in, model out, `-metadata` beside each). A package's code is a process of its
own: it must not end the client, hold it beyond a task's deadline, or leave a process or a file behind.
"""

from __future__ import annotations

import asyncio
import fnmatch
import gzip
import json
import logging
import math
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from fl_client.command import CommandFailed, in_shell, run
from fl_client.environment import cache_folder, virtual_environment
from fl_client.manifest import EntryPoint, PackageError, find_folder, read_manifest
from fl_client.task import TaskFailed, TaskInfo, TaskKind, Trained, checked_num_examples
from fl_client.transport import RestApi
from fl_client.wire.archive import BadArchive, Limits, check, unpack
from fl_client.wire.codec import SUFFIXES

logger = logging.getLogger(__name__)

IGNORE_FILE = ".fednignore"
MAX_ARCHIVE_BYTES = 1 << 30
_NEVER_PACKED = ("__pycache__", ".git", IGNORE_FILE)
_NOT_HANDED_ON = ("FL_TOKEN", "FEDN_AUTH_TOKEN", "PYTHONHOME")  # secrets; and what would defeat a virtual environment


# ---- running


class Package:
    """A Runtime on a folder with fedn.yaml. The folder is read anew for each task: an edit counts from the next one."""

    package: Literal["local", "remote"] = "local"

    def __init__(self, folder: Path, *, client_name: str = "", helper_type: str = "") -> None:
        """Raises PackageError if there is no fedn.yaml in it, nor in a folder below."""
        self.folder = find_folder(folder).resolve()
        self._variables = {"FL_CLIENT_NAME": client_name, "FL_HELPER_TYPE": helper_type}

    async def prepare(self) -> None:
        manifest = read_manifest(self.folder)
        manifest.command("train")
        if manifest.python_env:
            await virtual_environment(manifest.python_env)
        if "startup" in manifest.commands:
            try:
                await self.run("startup")
            except CommandFailed as exc:
                raise PackageError(f"startup {exc}{_last_of(exc)}") from exc

    def refusal(self, kind: TaskKind) -> str | None:
        try:
            read_manifest(self.folder).command(kind)
        except PackageError as exc:
            return str(exc)
        return None

    async def train(self, model: bytearray, task: TaskInfo) -> Trained:
        with _room() as room:
            suffix = SUFFIXES.get(task.helper, "")
            given, made = room / f"model{suffix}", room / f"trained{suffix}"
            await asyncio.to_thread(given.write_bytes, model)
            _metadata_of(given).write_text(json.dumps(task.settings))
            await self._work(task, given, made)
            return await asyncio.to_thread(_trained, made)

    async def validate(self, model: bytearray, task: TaskInfo) -> str:
        with _room() as room:
            given, made = room / f"model{SUFFIXES.get(task.helper, '')}", room / "metrics.json"
            await asyncio.to_thread(given.write_bytes, model)
            await self._work(task, given, made)
            return json.dumps(_json_object(made, task.kind))

    async def predict(self, model: bytearray, task: TaskInfo) -> str:
        with _room() as room:
            given, made = room / f"model{SUFFIXES.get(task.helper, '')}", room / "prediction.json"
            await asyncio.to_thread(given.write_bytes, model)
            await self._work(task, given, made)
            return json.dumps(_json(made, task.kind))

    def close(self) -> None:
        pass

    async def _work(self, task: TaskInfo, *arguments: Path) -> None:
        try:
            await self.run(task.kind, *arguments, task=task)
        except CommandFailed as exc:
            raise TaskFailed(f"{task.kind} {exc}{_last_of(exc)}", exc.last_lines) from None
        except PackageError as exc:
            raise TaskFailed(str(exc)) from None

    async def run(self, entry: EntryPoint, *arguments: Path, task: TaskInfo | None = None) -> None:
        """One entry point, its output in the log. Raises CommandFailed, PackageError."""
        manifest = read_manifest(self.folder)
        line = in_shell(manifest.command(entry), *arguments)
        venv = await virtual_environment(manifest.python_env) if manifest.python_env else None
        variables = {name: value for name, value in os.environ.items() if name not in _NOT_HANDED_ON}
        first = venv / "bin" if venv else Path(sys.executable).parent
        variables["PATH"] = os.pathsep.join([str(first), variables.get("PATH", os.defpath)])
        variables.setdefault("PYTHONUNBUFFERED", "1")  # its lines are heard when they are said
        if venv:
            variables["VIRTUAL_ENV"] = str(venv)
        variables |= {name: value for name, value in self._variables.items() if value}
        if task:
            variables.setdefault("FL_HELPER_TYPE", task.helper)
            variables |= {
                "FL_ROUND": str(task.round),
                "FL_CLIENT_ID": task.client_id,
                "FL_SESSION_ID": task.session_id,
                "FL_TASK_ID": task.task_id,
            }
        await run(
            line,
            cwd=self.folder,
            environment=variables,
            say=lambda said: logger.info("%s: %s", entry, said),
            due=task.due if task else None,
        )


@contextmanager
def _room() -> Iterator[Path]:
    """A folder for the files of one task."""
    with tempfile.TemporaryDirectory(prefix="flclient-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _metadata_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-metadata")


def _trained(made: Path) -> Trained:
    try:
        data = made.read_bytes()
    except FileNotFoundError:
        raise TaskFailed("train ended well, but wrote no model to its second argument") from None
    metadata = _json_object(_metadata_of(made), "train")
    try:
        checked_num_examples(metadata.get("num_examples"))
    except (TypeError, ValueError) as exc:
        raise TaskFailed(f"train wrote to its -metadata {exc}") from None
    return Trained.of(data, metadata)


def _json_object(path: Path, entry: EntryPoint) -> dict[str, Any]:
    value = _json(path, entry)
    if not isinstance(value, dict):
        raise TaskFailed(f"{entry} wrote no JSON object to {path.name}")
    return value


def _json(path: Path, entry: EntryPoint) -> object:
    """A number that is not finite is null: JSON has no other word for it."""
    try:
        return _finite(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise TaskFailed(f"{entry} ended well, but wrote no {path.name}") from None
    except (ValueError, RecursionError) as exc:
        raise TaskFailed(f"{entry} wrote no JSON to {path.name}: {exc}") from None


def _finite(value: object) -> object:
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list():
            return [_finite(inner) for inner in value]
    return value


def _last_of(failed: CommandFailed) -> str:
    last = next((line.strip() for line in reversed(failed.last_lines) if line.strip()), "")
    return f": {last}" if last else ""


# ---- the server's package


class RemotePackage:
    """A Runtime on the server's active compute package: fetched, checked, unpacked, and kept by its checksum."""

    package: Literal["local", "remote"] = "remote"

    def __init__(
        self,
        api: RestApi,
        folder: Path | None = None,
        *,
        checksum: str = "",
        client_name: str = "",
        helper_type: str = "",
    ) -> None:
        """folder: where packages are kept; by default this user's cache. checksum: the only one that is taken."""
        self._api = api
        self._kept = folder or cache_folder() / "packages"
        self._wanted = checksum.lower()
        self._client_name, self._helper_type = client_name, helper_type
        self._checksum = ""
        self._current: Package | None = None
        self._fault = ""

    async def prepare(self) -> None:
        """A client that has had none ends with a package that cannot be used; later, its tasks fail with the reason."""
        checksum = await self._api.package_checksum()
        if checksum == self._checksum and self._current:
            return
        if self._wanted not in ("", checksum):
            raise PackageError(f"the active package has sha256 {checksum}, expected {self._wanted}")
        try:
            package = Package(
                await self._folder_of(checksum), client_name=self._client_name, helper_type=self._helper_type
            )
            await package.prepare()
        except PackageError as exc:
            if self._current is None:
                raise
            logger.error("the new package cannot be used: %s", exc)
            self._fault = str(exc)
        else:
            self._current, self._fault = package, ""
        self._checksum = checksum
        logger.info("compute package %s in %s", checksum, self._kept / checksum)

    async def _folder_of(self, checksum: str) -> Path:
        folder = self._kept / checksum
        if folder.is_dir():
            return folder
        try:
            self._kept.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="part-", dir=self._kept, ignore_cleanup_errors=True) as part:
                archive, unpacked = Path(part) / "archive", Path(part) / "unpacked"
                with archive.open("xb") as file:
                    got = await self._api.package(file, max_bytes=MAX_ARCHIVE_BYTES)
                if got != checksum:
                    raise PackageError(f"the package has sha256 {got}, the server says {checksum}")
                await asyncio.to_thread(unpack, archive, unpacked, Limits())
                try:
                    unpacked.rename(folder)
                except OSError:
                    if not folder.is_dir():  # else another client of this machine was first
                        raise
        except BadArchive as exc:
            raise PackageError(f"the server's package cannot be unpacked: {exc}") from exc
        except OSError as exc:
            raise PackageError(f"{exc.filename}: {exc.strerror}") from exc
        return folder

    def refusal(self, kind: TaskKind) -> str | None:
        return self._fault or self._ready().refusal(kind)

    async def train(self, model: bytearray, task: TaskInfo) -> Trained:
        return await self._ready().train(model, task)

    async def validate(self, model: bytearray, task: TaskInfo) -> str:
        return await self._ready().validate(model, task)

    async def predict(self, model: bytearray, task: TaskInfo) -> str:
        return await self._ready().predict(model, task)

    def close(self) -> None:
        pass

    def _ready(self) -> Package:
        assert self._current is not None, "prepare() comes first"
        return self._current


# ---- making one


def create(folder: Path, output: Path) -> int:
    """Packs the folder's content into a .tgz: the same files give the same bytes. Returns how many files are in it.

    Left out: what .fednignore names (glob patterns on names and relative paths), .git and __pycache__.
    Raises PackageError; then output is as it was.
    """
    read_manifest(find_folder(folder))
    if not output.parent.is_dir():
        raise PackageError(f"{output.parent}: no such folder")
    part = output.with_name(f".{output.name}.part")
    try:
        names = sorted(_packed(folder, leave_out={output.resolve(), part.resolve()}))
        with (
            part.open("wb") as raw,
            gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar,
        ):
            for name in names:
                path = folder / name
                info = tarfile.TarInfo(name)
                info.size = path.stat().st_size
                info.mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
                with path.open("rb") as content:
                    tar.addfile(info, content)
        check(part, Limits())
        part.replace(output)
    except BadArchive as exc:
        raise PackageError(f"{folder}: cannot be a package: {exc}") from exc
    except OSError as exc:
        raise PackageError(f"{exc.filename}: {exc.strerror}") from exc
    finally:
        part.unlink(missing_ok=True)
    return len(names)


def _packed(folder: Path, leave_out: set[Path]) -> Iterator[str]:
    """Relative names of the files that go in."""
    patterns = _ignore_patterns(folder / IGNORE_FILE)

    def ignored(relative: Path, is_folder: bool) -> bool:
        names = (relative.name, relative.as_posix())
        return relative.name in _NEVER_PACKED or any(
            fnmatch.fnmatchcase(name, pattern.rstrip("/"))
            for pattern in patterns
            if is_folder or not pattern.endswith("/")
            for name in names
        )

    for top, folders, files in os.walk(folder, onerror=_raise):
        relative = Path(top).relative_to(folder)
        folders[:] = [name for name in folders if not ignored(relative / name, is_folder=True)]
        files = [name for name in files if not ignored(relative / name, is_folder=False)]
        for name in [*folders, *files]:
            if (Path(top) / name).is_symlink():
                raise PackageError(f"{Path(top) / name}: a link, which a package cannot hold; name it in {IGNORE_FILE}")
        for name in files:
            path = Path(top) / name
            if not path.is_file():
                raise PackageError(f"{path}: neither a file nor a folder")
            if path.resolve() not in leave_out:
                yield (relative / name).as_posix()


def _ignore_patterns(path: Path) -> Sequence[str]:
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return ()
    except ValueError as exc:
        raise PackageError(f"{path}: {exc}") from exc
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _raise(error: OSError) -> None:
    raise error
