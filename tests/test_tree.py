"""Rules of the tree that import-linter cannot see (what it can see is in .importlinter), read from the sources.

Each test lists all offenders, as path:line.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = ("fl_server", "fl_client")
GENERATED = "fl_pb2"
NOT_OURS = {"__pycache__", "dist", "flserve-data"}

# Third-party code that will be exchanged one day, or that no other file may know: the only file that imports it.
ONE_IMPORTER = {
    "sqlite3": "src/fl_server/store/sqlite.py",
    "motor": "src/fl_server/store/mongo.py",
    "pymongo": "src/fl_server/store/mongo.py",
    "aioboto3": "src/fl_server/store/s3.py",
    "botocore": "src/fl_server/store/s3.py",
    "jose": "src/fl_server/auth.py",
}
CHOSEN_STORES = tuple(f"fl_server.store.{name}" for name in ("mongo", "s3", "sqlite", "files"))
# The machine on which this was written: its folders, and its package indexes. Spelt so that this file does not match.
OF_ONE_MACHINE = re.compile(r"/[w]ork/|[f]ile:///|[i]ndex-url|[f]ind-links|//\S+/[s]imple\b")
LOOP = re.compile(r"loop(\(\))?$")


def sources(*directories: str) -> Iterator[tuple[str, ast.Module]]:
    for directory in directories:
        for path in sorted((ROOT / directory).rglob("*.py")):
            if not path.name.startswith(GENERATED):
                yield str(path.relative_to(ROOT)), ast.parse(path.read_text(), str(path))


def imports(tree: ast.AST) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """Every import with the top-level package that it names; a relative import names one of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            yield node, OURS[0] if node.level else (node.module or "").partition(".")[0]


def test_our_own_modules_are_not_imported_inside_functions() -> None:
    """That is how a cycle hides. Two may, to start fast: cli.py, which nobody imports, and app.py the stores of
    which a server uses two."""
    offenders = [
        f"{path}:{node.lineno} in {function.name}()"
        for path, tree in sources("src")
        if path not in ("src/fl_server/cli.py", "src/fl_client/cli.py")
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node, package in imports(function)
        if package in OURS and not (path == "src/fl_server/app.py" and getattr(node, "module", "") in CHOSEN_STORES)
    ]
    assert offenders == []


def test_a_driver_is_imported_by_one_file_only() -> None:
    offenders = [
        f"{path}:{node.lineno} imports {package}"
        for path, tree in sources("src")
        for node, package in imports(tree)
        if ONE_IMPORTER.get(package, path) != path
    ]
    assert offenders == []


def test_nothing_blocks_in_time_sleep() -> None:
    offenders = []
    for path, tree in sources("src", "examples", "tests"):
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name(id="time"), attr="sleep"):
                    offenders.append(f"{path}:{node.lineno}")
                case ast.ImportFrom(module="time", names=names) if any(alias.name == "sleep" for alias in names):
                    offenders.append(f"{path}:{node.lineno}")
    assert offenders == []


def test_no_state_has_two_owners_and_no_task_is_without_one() -> None:
    """A lock means two owners; a task outside a TaskGroup loses its error and is waited for by nobody."""
    offenders = []
    for path, tree in sources("src", "examples"):
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name(id="asyncio"), attr="Lock" | "create_task" | "ensure_future" as name):
                    if path != "src/fl_server/testing.py":  # set-up and tear-down in different tasks: see Federation
                        offenders.append(f"{path}:{node.lineno} asyncio.{name}")
                case ast.Attribute(value=owner, attr="create_task") if LOOP.search(ast.unparse(owner)):
                    offenders.append(f"{path}:{node.lineno} {ast.unparse(node)}")
                case ast.ImportFrom(module="asyncio", names=names):
                    offenders.append(f"{path}:{node.lineno} names {', '.join(a.name for a in names)} without asyncio.")
    assert offenders == []


def test_the_core_draws_from_seeded_generators_only() -> None:
    offenders = []
    for path, tree in sources("src/fl_server/core"):
        seeded = {
            id(node.func)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "random.Random" and node.args
        }
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name(id="random")) if id(node) not in seeded:
                    offenders.append(f"{path}:{node.lineno} {ast.unparse(node)}")
                case ast.Attribute(value=ast.Name(id="np" | "numpy"), attr="random"):
                    offenders.append(f"{path}:{node.lineno} {ast.unparse(node)}")
                case ast.ImportFrom(module="random" | "numpy.random"):
                    offenders.append(f"{path}:{node.lineno} {ast.unparse(node)}")
    assert offenders == []


def test_no_file_names_the_machine_it_was_written_on() -> None:
    offenders = []
    tops = [path for path in ROOT.iterdir() if path.name == ".ci" or path.is_file() or not path.name.startswith(".")]
    for top in sorted(tops):
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and not NOT_OURS.intersection(path.relative_to(ROOT).parts):
                for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
                    if OF_ONE_MACHINE.search(line):
                        offenders.append(f"{path.relative_to(ROOT)}:{number}")
    assert offenders == []
