"""fedn.yaml and the file of its python_env: what a compute package says about itself, read strictly.

FEDn's format; an error names the file and the key. Nothing is run here, and nothing written. The file comes from
somebody else: neither what is made of it nor what is said of it grows beyond its own size.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from fl_client.transport import ClientError
from fl_client.wire.archive import MANIFEST

EntryPoint = Literal["build", "startup", "train", "validate", "predict"]

_MAX_BYTES = 1 << 18
_shown = reprlib.Repr()  # aliases make a thing of a few bytes that it takes gigabytes to write down
_shown.maxlevel, _shown.maxstring, _shown.maxother = 2, 80, 80
_KNOWN = ("build", "startup", "train", "validate", "predict", "forward", "backward")


class PackageError(ClientError):
    """The package is at fault; the message is one sentence."""


class _Loader(yaml.SafeLoader):
    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merged mappings are copied: each level of them may double what the one before had."""
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("merge keys (<<) are not taken")


@dataclass(frozen=True, slots=True)
class Manifest:
    path: Path
    python_env: Path | None
    commands: Mapping[str, str]  # by entry point

    def command(self, entry: EntryPoint) -> str:
        if entry not in self.commands:
            raise PackageError(f"{self.path}: entry_points.{entry}: missing")
        return self.commands[entry]


@dataclass(frozen=True, slots=True)
class PythonEnv:
    """Requirements as pip's requirements files have them; the build dependencies are installed first."""

    name: str
    build_dependencies: tuple[str, ...]
    dependencies: tuple[str, ...]


def find_folder(folder: Path) -> Path:
    """Where fedn.yaml lies: the folder itself, or the one below that is nearest to its top."""
    if not folder.is_dir():
        raise PackageError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    level = [folder]
    while level:
        for found in level:
            if (found / MANIFEST).is_file():
                return found
        level = sorted(
            Path(entry.path)
            for above in level
            for entry in _entries(above)
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
        )
    raise PackageError(f"{folder}: no {MANIFEST} in it")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except PermissionError:  # not ours, so not the package either
        return []


def read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    document = read_mapping(path)
    for key in document:
        if key not in ("python_env", "entry_points"):
            raise PackageError(f"{path}: {key[:80]}: unknown; python_env and entry_points are known")
    python_env = document.get("python_env")
    if python_env is not None and (not isinstance(python_env, str) or not python_env):
        raise PackageError(f"{path}: python_env: {_shown.repr(python_env)} is not the name of a file")
    points = document.get("entry_points")
    if not isinstance(points, dict):
        what = "missing" if points is None else f"{_shown.repr(points)} is not a mapping"
        raise PackageError(f"{path}: entry_points: {what}")
    commands = {}
    for name, point in points.items():
        if name not in _KNOWN:
            shown = name[:80] if isinstance(name, str) else _shown.repr(name)
            raise PackageError(f"{path}: entry_points.{shown}: unknown; known are {', '.join(_KNOWN)}")
        command = point.get("command") if isinstance(point, dict) else None
        if not isinstance(command, str) or not command.strip():
            raise PackageError(f"{path}: entry_points.{name}.command: a command line is needed")
        commands[name] = command.strip()
    return Manifest(path, folder / python_env if python_env else None, commands)


def read_python_env(path: Path) -> PythonEnv:
    document = read_mapping(path)
    name = document.get("name", "")
    if not isinstance(name, str):
        raise PackageError(f"{path}: name: {_shown.repr(name)} is not a text")
    return PythonEnv(
        name, _requirements(path, document, "build_dependencies"), _requirements(path, document, "dependencies")
    )


def _requirements(path: Path, document: Mapping[str, Any], key: str) -> tuple[str, ...]:
    lines = document.get(key)
    if lines is None:
        return ()
    if not isinstance(lines, list) or not all(isinstance(line, str) and "\n" not in line for line in lines):
        raise PackageError(f"{path}: {key}: {_shown.repr(lines)} is not a list of requirements")
    return tuple(cast("list[str]", lines))


def read_mapping(path: Path) -> dict[str, Any]:
    """The one YAML mapping of a file. Raises PackageError, also where the file cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as exc:
        raise PackageError(f"{path}: {exc.strerror}") from exc
    if len(data) > _MAX_BYTES:
        raise PackageError(f"{path}: more than {_MAX_BYTES} bytes")
    try:
        document = yaml.load(data, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise PackageError(f"{path}: no YAML: {str(exc)[:500]}") from exc
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise PackageError(f"{path}: a mapping is needed, such as `key: value`")
    return document
