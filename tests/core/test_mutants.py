"""Deliberate faults in the core: the laws must catch each, or they are no laws.

A mutant is a copy of fl_server with one place changed, walked through in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import fl_server

PACKAGE = Path(fl_server.__file__).parent
ROOT = Path(__file__).parents[2]
WALKS = 1500


@dataclass(frozen=True)
class Mutant:
    fault: str  # begins with the number of the law that it breaks
    file: str
    old: str
    new: str

    def __str__(self) -> str:
        return self.fault


MUTANTS = [
    Mutant(
        "1 an ended session fails again",
        "session.py",
        "return [] if session.record.status is not Status.RUNNING else _end(session, Status.FAILED, reason)",
        "return _end(session, Status.FAILED, reason)",
    ),
    Mutant(
        "1 a stale Aggregated counts",
        "session.py",
        "            if not _aggregating(session, model.round, model.attempt, model.num_updates):\n"
        "                return []\n",
        "",
    ),
    Mutant(
        "1 a running session gets another configuration",
        "session.py",
        "def _reconfigure(session: Session, event: Reconfigured) -> list[Effect]:\n"
        "    if session.record.status is Status.RUNNING:",
        "def _reconfigure(session: Session, event: Reconfigured) -> list[Effect]:\n    if False:",
    ),
    Mutant("2 a second update of a client counts", "model.py", "    return duplicate\n", "    return None\n"),
    Mutant(
        "2 recovery forgets one report",
        "round.py",
        "for report in sorted(reports, key=lambda report: report.seq):",
        "for report in sorted(reports, key=lambda report: report.seq)[1:]:",
    ),
    Mutant(
        "2 a lost update is still counted",
        "round.py",
        "lost = replace(report, verdict=Verdict.REJECTED, reason=",
        "lost = replace(report, reason=",
    ),
    Mutant(
        "3 too few after a loss and a crash, and aggregated",
        "session.py",
        "case Phase.AGGREGATING if round.accepted >= config.min_updates:",
        "case Phase.AGGREGATING:",
    ),
    Mutant(
        "3 closes below min_updates",
        "session.py",
        "enough = round.accepted >= config.min_updates",
        "enough = round.accepted > 0",
    ),
    Mutant(
        "3 aggregates twice after Recovered",
        "session.py",
        "        case Phase.TRAINING if not rounds.complete(round, config):\n"
        "            effects += rounds.postpone(round, at + config.rejoin_window_s)",
        "        case Phase.TRAINING:\n            effects.append(rounds.aggregate(round, session.record.model))",
    ),
    Mutant(
        "4 answered before saved",
        "round.py",
        "[SaveReport(report), Answer(event.call, verdict, report.reason), *_fold(round)]",
        "[Answer(event.call, verdict, report.reason), SaveReport(report), *_fold(round)]",
    ),
    Mutant(
        "4 issued before saved",
        "session.py",
        "return [*saved, *(_train(session, round, round.task(client)) for client in cohort)]",
        "return [*(_train(session, round, round.task(client)) for client in cohort), *saved]",
    ),
    Mutant(
        "4 frozen without a save",
        "round.py",
        "return [*enter(round, Phase.AGGREGATING), aggregate(round, base)]",
        "return [*enter(round, Phase.AGGREGATING)[:0], aggregate(round, base)]",
    ),
    Mutant(
        "4 the model listed before the commit",
        "session.py",
        "effects: list[Effect] = [*saved, SaveModel(session.record), _discard(done)]",
        "effects: list[Effect] = [SaveModel(session.record), *saved, _discard(done)]",
    ),
    Mutant("5 unseeded cohort", "selection.py", "random.Random(seed)", "random.Random()"),
    Mutant(
        "6 accepted, asked again later: LATE",
        "round.py",
        "    if known := verdict_of",
        "    if round.record.phase is not Phase.TRAINING:\n"
        "        return [Answer(event.call, Verdict.LATE)]\n    if known := verdict_of",
    ),
    Mutant(
        "6 rejections are not kept",
        "round.py",
        "    round._count(report)\n    return [SaveReport(report), Answer",
        "    if not event.fault: round._count(report)\n    return [SaveReport(report), Answer",
    ),
    Mutant(
        "6 the fault is asked before the record",
        "round.py",
        "    if known := verdict_of(",
        "    if event.fault and round.reports[client]:\n"
        "        return [Answer(event.call, Verdict.REJECTED, event.fault)]\n    if known := verdict_of(",
    ),
    Mutant(
        "6 attempts start at 1 again",
        "session.py",
        'reason="", config=config, model=model, failures=0,',
        'reason="", config=config, model=model, failures=0, attempt=0,',
    ),
    Mutant(
        "6 an update of another attempt is taken",
        "session.py",
        "if round is None or (task.round, task.attempt) != begun:",
        "if round is None or task.round != begun[0]:",
    ),
    Mutant(
        "7 aggregated in order of arrival",
        "round.py",
        "counted = tuple(report for report in round.reports.values() if report and report.counts)",
        "counted = tuple(sorted((r for r in round.reports.values() if r and r.counts), key=lambda r: r.seq))",
    ),
    Mutant(
        "7 the outcome of a former set is committed",
        "session.py",
        "        and num_updates in (None, round.accepted)\n",
        "",
    ),
    Mutant(
        "8 an early alarm is forgotten",
        "session.py",
        "if alarm != session.alarm or isinstance(event, DeadlinePassed | Recovered):",
        "if alarm != session.alarm:",
    ),
    Mutant(
        "8 a complete round waits after a restart",
        "session.py",
        "closes = rounds.complete(round, config) or at >= round.record.deadline",
        "closes = (rounds.complete(round, config) and not session.awaited) or at >= round.record.deadline",
    ),
    Mutant(
        "8 who attaches does not hear his open training task",
        "session.py",
        "    if session.round and (task := session.round.open_task(client)):\n"
        "        effects.append(_train(session, session.round, task))\n",
        "",
    ),
    Mutant(
        "8 who attaches does not hear his open validation",
        "session.py",
        "    if session.validation and client not in session.validation.reported:\n"
        "        effects.append(_validate(session, session.validation, client))\n",
        "",
    ),
    Mutant(
        "8 the validation is not opened anew after a restart",
        "session.py",
        "        session.validation.deadline = at + max(config.validation_timeout_s, config.rejoin_window_s)\n",
        "",
    ),
    Mutant(
        "8 an outage eats the validation's time",
        "session.py",
        "        session.validation.deadline += away_s\n",
        "        pass\n",
    ),
    Mutant(
        "8 the last validation waits for who left",
        "session.py",
        "            session.validation.open.discard(client)\n    return []",
        "            pass\n    return []",
    ),
    Mutant(
        "8 SELECTING ignores the awaited",
        "session.py",
        "at >= round.opens_at and not session.awaited:",
        "at >= round.opens_at:",
    ),
    Mutant(
        "8 the awaited are awaited for ever",
        "session.py",
        "    if session.awaited and at >= session.awaited_until:\n        session.awaited.clear()\n",
        "    if session.awaited and at >= session.awaited_until:\n",
    ),
    Mutant(
        "8 selection gives up while some are awaited: an alarm in the past",
        "session.py",
        "        if not session.awaited:  # else",
        "        if True:  # else",
    ),
    Mutant(
        "8 the round's record before the session's",
        "session.py",
        "return [*begun, *ended, _discard(failed)]",
        "return [*ended, *begun, _discard(failed)]",
    ),
    Mutant(
        "8 enough are here, and it waits for more",
        "session.py",
        "if len(session.attached) >= config.min_clients:",
        "if len(session.attached) > config.min_clients:",
    ),
    Mutant(
        "9 postponed without a save",
        "round.py",
        "deadline=deadline, version=round.record.version + 1)\n    return [SaveRound(round.record)]",
        "deadline=deadline, version=round.record.version + 1)\n    return []",
    ),
    Mutant(
        "9 an attempt begins without a save",
        "session.py",
        "select_until=opens_at + select_for_s)\n    return [SaveSession(session.record)]",
        "select_until=opens_at + select_for_s)\n    return []",
    ),
    Mutant(
        "9 a withdrawal is not saved",
        "round.py",
        "    round._count(lost)\n    return [SaveReport(lost)]",
        "    round._count(lost)\n    return [SaveReport(report)]",
    ),
    Mutant(
        "9 a changed record keeps its version",
        "session.py",
        "session.record = replace(session.record, version=session.record.version + 1, **changes)",
        "session.record = replace(session.record, **changes)",
    ),
    Mutant(
        "two sessions at once share who is attached",
        "session.py",
        "attached: dict[ClientId, float] = field(default_factory=dict)",
        "attached: dict[ClientId, float] = field(default_factory=lambda shared={}: shared)",
    ),
]
QUICK = [mutant for mutant in MUTANTS if mutant.fault[:2] in ("4 ", "6 ", "8 ", "9 ")][::7]


def run(folder: Path, mutant: Mutant | None) -> subprocess.CompletedProcess[str]:
    shutil.copytree(PACKAGE / "core", folder / "fl_server" / "core", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "errors.py"):
        shutil.copy(PACKAGE / name, folder / "fl_server")
    if mutant:
        source = folder / "fl_server" / "core" / mutant.file
        source.write_text(source.read_text().replace(mutant.old, mutant.new))
    return subprocess.run(
        [sys.executable, "-m", "tests.core.walk", "0", str(WALKS if mutant else 20)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_caught(folder: Path, mutant: Mutant) -> None:
    done = run(folder, mutant)
    assert f"core: {folder}" in done.stdout, done.stderr
    assert done.returncode == 1, f"survived {WALKS} walks: {mutant}"
    assert "AssertionError" in done.stdout, f"it fell over before a law could catch it: {done.stdout}"


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_changes_exactly_one_place(mutant: Mutant) -> None:
    assert (PACKAGE / "core" / mutant.file).read_text().count(mutant.old) == 1


def test_the_copy_that_is_not_mutated_keeps_the_laws(tmp_path: Path) -> None:
    done = run(tmp_path, None)
    assert done.returncode == 0 and f"core: {tmp_path}" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("mutant", QUICK, ids=str)
def test_the_laws_catch_a_sample_of_the_mutants(mutant: Mutant, tmp_path: Path) -> None:
    assert_caught(tmp_path, mutant)


@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_laws_catch_every_mutant(mutant: Mutant, tmp_path: Path) -> None:
    assert_caught(tmp_path, mutant)
