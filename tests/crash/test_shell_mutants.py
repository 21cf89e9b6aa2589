"""Deliberate faults of the shell, each caught by the crash suite: what it promises is not true by accident."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUITE = (
    "tests/crash/test_every_call.py",
    "tests/server/test_aggregation.py",
    "tests/server/test_patience.py",
    "tests/server/test_review_intake.py",
)

MUTANTS = {
    "answered before the save": (
        "scheduler/session_task.py",
        "        if writes := self._writes(effects, around.clock()):\n",
        "        for early in effects:\n"
        "            if isinstance(early, Answer):\n"
        "                around.calls.answer(early.call, (early.reply, early.reason))\n"
        "        await asyncio.sleep(0)\n"
        "        if writes := self._writes(effects, around.clock()):\n",
    ),
    "spool emptied before the save": (
        "scheduler/session_task.py",
        "        if writes := self._writes(effects, around.clock()):\n",
        "        for early in effects:\n"
        "            if isinstance(early, Discard):\n"
        "                await around.workshop.spool.remove(early.blobs)\n"
        "        if writes := self._writes(effects, around.clock()):\n",
    ),
    "a verdict of the past is LATE": (
        "scheduler/scheduler.py",
        "return verdict_of(reports, update_id) or (",
        "return None or (",
    ),
    "no Recovered": (
        "scheduler/scheduler.py",
        "await task.inbox.put(Recovered(expected, await task.lost()))",
        "pass",
    ),
    "nobody is expected back": (
        "scheduler/scheduler.py",
        "Recovered(expected, await task.lost())",
        "Recovered((), await task.lost())",
    ),
    "what the spool lost is not looked for": (
        "scheduler/session_task.py",
        "tuple(UpdateLost(report.task, report.update.update_id, why) for report in lost)",
        "()",
    ),
    "an upload's OK before it is found": (
        "combiner/servicer.py",
        "                            await self._scheduler.insist(upload.finish)\n",
        "                            loop = asyncio.get_running_loop()\n"
        "                            loop.call_later(2, lambda: asyncio.ensure_future(upload.finish()))\n",
    ),
    "an update that is gone is waited for": (
        "scheduler/aggregation.py",
        "        case FileNotFoundError():",
        "        case NotADirectoryError():",
    ),
    "a model's id does not depend on its bytes": (
        "scheduler/aggregation.py",
        "ModelId(str(uuid.uuid5(_NAMESPACE, name)))",
        "ModelId(str(uuid.uuid4()))",
    ),
    "a late document overwrites a newer one": (
        "store/sqlite.py",
        "        \" < json_extract(excluded.document, '$.fl.version')\"",
        "        \" < json_extract(excluded.document, '$.fl.version') + 1000\"",
    ),
    "an outage fails the round": (
        "scheduler/aggregation.py",
        "await self._insist(work.models.put_file, model_id, made.model)",
        "await work.models.put_file(model_id, made.model)",
    ),
    "a withdrawn report keeps its number": (
        "core/round.py",
        "lost=True, seq=round.saved)",
        "lost=True)",
    ),
    "what was replaced is compared with what the client announced": (
        "scheduler/intake.py",
        "if is_replaced(status):",
        "if False:",
    ),
    "a spool that is away lets deadlines pass": (
        "scheduler/intake.py",
        "await self._scheduler.insist(spool.replace, blob, stored)",
        "await spool.replace(blob, stored)",
    ),
    "an outage lets deadlines pass": (
        "scheduler/outage.py",
        "return self._clock() if self._since is None else self._since",
        "return self._clock()",
    ),
    "a full disk is no outage": (
        "combiner/servicer.py",
        "await self._scheduler.insist(upload.finish)",
        "await upload.finish()",
    ),
    "an outage ends although the disk is still full": (
        "scheduler/scheduler.py",
        "            self.workshop.spool.probe,\n",
        "",
    ),
}


def mutated(folder: Path, name: str, old: str, new: str) -> dict[str, str]:
    """A copy of the tree with the fault in it; the environment that runs it."""
    for part in ("src", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    path = folder / "src" / "fl_server" / name
    source = path.read_text()
    assert source.count(old) == 1, f"{name} holds this {source.count(old)} times: {old}"
    path.write_text(source.replace(old, new))
    return {**os.environ, "PYTHONPATH": f"{folder / 'src'}{os.pathsep}{folder}"}


def run(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", *SUITE, "-x", "-q", "-m", "not long", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "-p", "no:randomly"], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.long
@pytest.mark.parametrize("name", MUTANTS)
def test_the_crash_suite_catches(name: str, tmp_path: Path) -> None:
    done = run(tmp_path, mutated(tmp_path, *MUTANTS[name]))
    assert done.returncode == 1, f"it survived:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.mark.long
def test_the_crash_suite_passes_on_an_unchanged_copy(tmp_path: Path) -> None:
    """Else the mutants prove nothing: the copy is what runs, and it runs well."""
    done = run(tmp_path, mutated(tmp_path, "core/selection.py", "def choose_cohort(", "def choose_cohort("))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
