"""Runs the commands of README.md and of docs/guide/ as a reader does, one after the other.

What a fenced block is, by its language:

- `sh`: run by bash. All blocks of a walk run in one shell: its variables and background processes go on.
- `python`: run by python where it stands.
- a first line `# folder/name.ext`, in any language: the block is written to that file, and not run.
- anything else: to be read. Output is `console`; make, docker, apt, a firewall, another machine are `text`.

A walk is README.md; the chapters of the guide, in the order of their list in docs/guide/README.md; each other page of
the guide. It begins in a folder with nothing but a copy of examples/. Ports 8092 and 12080 are free ones, 192.168.1.20
is this machine. After `flserve up … &` the walk goes on when the server is ready. A command that fails ends it, and at
its end what runs in the background is stopped.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GUIDE = ROOT / "docs" / "guide"
INDEX = GUIDE / "README.md"
LIMIT_S = 400.0  # for a walk that hangs; one that goes takes less than a minute
STOP_S = 20.0

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
FILE_NAME = re.compile(r"# ((?:[\w.-]+/)*[\w-]*\.\w+)\n")
CHAPTER = re.compile(r"^\d+\. \[[^]]+\]\((\S+\.md)\)", re.M)
MAP_CELL = re.compile(r"^\| (`(?:src|protos|examples|benchmarks|tests|docs)/[^|]*)\|", re.M)
QUOTED = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
SERVER = re.compile(r"^((?:\w+=\S+ )*flserve up\b[^\n]*?)\s*&$", re.M)
READS_ONLY = re.compile(r"^\s*(make|docker|apt|apt-get|sudo|sleep|pkill|killall|curl)\b", re.M)


@dataclass(frozen=True, slots=True)
class Block:
    place: str  # as "docs/guide/models.md:12"
    language: str
    text: str

    @property
    def file_name(self) -> str | None:
        named = FILE_NAME.match(self.text)
        return named[1] if named else None


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(f"{page.relative_to(ROOT)}:{line}", found[1], found[2])


def chapters() -> list[Path]:
    return [GUIDE / name for name in CHAPTER.findall(INDEX.read_text())]


def other_pages() -> list[Path]:
    """Those that have something to run."""
    pages = set(GUIDE.glob("*.md")) - {INDEX, *chapters()}
    return sorted(page for page in pages if any(_as_bash(block) for block in blocks(page)))


# ---- a walk as one bash script


def script(pages: Sequence[Path], changed: Mapping[str, str]) -> str:
    """changed: words of the pages, and what stands for them here."""
    head = [
        "set -eu -o pipefail",
        """trap 'echo "$AT: failed: $BASH_COMMAND" >&2' ERR""",
        "trap 'CODE=$?; trap - ERR; set +e; kill $(jobs -p) 2> /dev/null; wait; exit $CODE' EXIT",
        "READY=$PWD/ready; mkfifo $READY",
    ]
    lines = [line for page in pages for block in blocks(page) for line in _steps(block)]
    text = "\n".join(head + lines) + "\n"
    for word, instead in changed.items():
        text = re.sub(rf"(?<![\w.]){re.escape(word)}(?!\w)", instead, text)
    return text


def _steps(block: Block) -> list[str]:
    run = _as_bash(block)
    return [f'AT={shlex.quote(block.place)}; echo "--- $AT, $SECONDS s"', run] if run else []


def _as_bash(block: Block) -> str:
    """What has to be done for it; nothing for one that is only read."""
    if name := block.file_name:
        return f"mkdir -p {shlex.quote(str(Path(name).parent))}\n{_here(f'cat > {shlex.quote(name)}', block.text)}"
    match block.language:
        case "sh":
            return SERVER.sub(r"\1 > $READY &" + '\nread -r SAID < $READY; echo "$SAID"', block.text)
        case "python":
            return _here("python -", block.text)
    return ""


def _here(command: str, text: str) -> str:
    return f"{command} <<'END_OF_BLOCK'\n{text}END_OF_BLOCK"


@dataclass(frozen=True, slots=True)
class Walked:
    folder: Path
    code: int | None  # None: it hung
    printed: str

    def ends_well(self) -> None:
        if self.code != 0:
            logs = [f"== {log.name}\n{_tail(log)}" for log in sorted(self.folder.rglob("*.log"))]
            raise AssertionError("\n".join([f"exit code {self.code}", self.printed, *logs]))


def walk(pages: Sequence[Path], folder: Path) -> Walked:
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    api_port, grpc_port = _free_ports(2)
    text = script(pages, {"8092": api_port, "12080": grpc_port, "192.168.1.20": "127.0.0.1"})
    (folder / "walk.sh").write_text(text)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FL_", "FEDN_"))}
    environment = {
        **kept,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)]),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "OPENBLAS_NUM_THREADS": "1",
        "FL_API_PORT": api_port,
        "FL_GRPC_PORT": grpc_port,
        "FL_API_URL": f"http://127.0.0.1:{api_port}",
    }
    with (folder / "walk.out").open("wb") as out:
        shell = subprocess.Popen(
            ["bash", "walk.sh"],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = None
        try:
            code = shell.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            _signal_group(shell, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                shell.wait(STOP_S)
        finally:
            _signal_group(shell, signal.SIGKILL)
            shell.wait()
    return Walked(folder, code, (folder / "walk.out").read_text(errors="replace"))


def _signal_group(shell: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: a group of zombies
        os.killpg(shell.pid, number)


def _free_ports(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [str(listening.getsockname()[1]) for listening in found]


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


# ---- the walks


def test_the_readme_by_hand(tmp_path: Path) -> None:
    walked = walk([README], tmp_path)
    walked.ends_well()
    assert "is Finished; 5 rounds" in walked.printed


def test_the_chapters_of_the_guide_from_the_first_to_the_last(tmp_path: Path) -> None:
    walk(chapters(), tmp_path).ends_well()


@pytest.mark.long
def test_the_pages_beside_the_chapters_each_by_itself(tmp_path: Path) -> None:
    for page in other_pages():
        walk([page], tmp_path / page.stem).ends_well()


# ---- what keeps the pages honest


def test_the_guide_lists_all_of_its_pages() -> None:
    listed = {INDEX.parent / name for name in LINK.findall(INDEX.read_text())}
    assert set(GUIDE.glob("*.md")) - {INDEX} <= listed


def test_no_page_links_to_what_is_not_there() -> None:
    links = {page.parent / link for page in [README, *GUIDE.glob("*.md")] for link in LINK.findall(page.read_text())}
    assert [link for link in links if not link.exists()] == []


def test_the_map_of_the_house_names_what_is_there() -> None:
    """A cell's first path is from the root, the others lie beside it."""
    missing = []
    for cell in MAP_CELL.findall(README.read_text()):
        first, *others = QUOTED.findall(cell)
        paths = [ROOT / first, *((ROOT / first).parent / other for other in others)]
        missing += [str(path.relative_to(ROOT)) for path in paths if not path.exists()]
    assert missing == []


def test_no_block_that_is_run_needs_the_machine_or_waits_for_a_time() -> None:
    pages = [README, *chapters()]
    found = [block.place for page in pages for block in blocks(page) if READS_ONLY.search(_as_bash(block))]
    assert found == []
