"""What the events of one session add up to, and how a terminal shows it: one row a round, and a bar.

The reducer is pure; its clock is the caller's, any zero. Nothing here asks the server or knows how events travel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

MAX_METRICS = 3  # in the table, when none are named


@dataclass(slots=True)
class RoundRow:
    round: int
    started_at_s: float
    attempt: int = 1
    phase: str = ""
    received: int = 0
    expected: int = 0
    model_id: str | None = None
    seconds: float | None = None  # set when it is completed; failed attempts count in
    reason: str = ""


@dataclass(slots=True)
class Progress:
    session_id: str
    rounds: int
    validates: bool = True
    rows: dict[int, RoundRow] = field(default_factory=dict)
    status: str = ""
    reason: str = ""
    metrics: dict[int, dict[str, Mapping[str, Any]]] = field(default_factory=dict)  # of a round's model, by client id
    at_s: float = 0.0  # of the last event

    def apply(self, kind: str, data: Mapping[str, Any], at_s: float) -> bool:
        """False if the event is about something else."""
        if data.get("session_id") != self.session_id:
            return False
        match kind:
            case "session":
                self.status = str(data["status"]).lower()
                self.reason = data.get("reason") or ""
            case "round":
                self._round(data, at_s)
            case "update":
                if "received" in data:  # not for an update that comes when its round is over
                    row = self._row(data["round"], at_s)
                    row.received, row.expected = data["received"], data["expected"]
            case "model":
                row = self._row(data["round"], at_s)
                row.phase, row.model_id, row.seconds = "completed", data["model_id"], at_s - row.started_at_s
            case "validation":
                self.metrics.setdefault(data["round"], {})[data["client_id"]] = data["metrics"]
            case _:
                return False
        self.at_s = at_s
        return True

    def _round(self, data: Mapping[str, Any], at_s: float) -> None:
        row = self._row(data["round"], at_s)
        if data["attempt"] != row.attempt:
            row.attempt, row.received = data["attempt"], 0
        row.phase = str(data["phase"]).lower()
        row.reason = data.get("reason") or ""
        row.expected = data["cohort"] or row.expected

    def _row(self, number: int, at_s: float) -> RoundRow:
        return self.rows.setdefault(number, RoundRow(number, at_s))

    @property
    def ended(self) -> bool:
        return self.status in ("finished", "failed", "terminated")

    @property
    def completed(self) -> int:
        return sum(row.phase == "completed" for row in self.rows.values())

    @property
    def fraction(self) -> float:
        """In [0, 1]; the running round counts by its updates."""
        running = (row for row in self.rows.values() if row.phase != "completed" and row.expected)
        return min(1.0, (self.completed + sum(row.received / row.expected for row in running)) / self.rounds)

    def metric_names(self) -> list[str]:
        """Of the numbers that clients have reported, in the order in which they did."""
        reports = (report for of_round in self.metrics.values() for report in of_round.values())
        names = (name for report in reports for name, value in report.items() if _finite(value) is not None)
        return list(dict.fromkeys(names))

    def mean(self, row: RoundRow, metric: str) -> float | None:
        """Of the round's model, over the clients that have validated it so far, each weighing the same."""
        reports = self.metrics.get(row.round, {}).values()
        values = [value for report in reports if (value := _finite(report.get(metric))) is not None]
        return fmean(values) if values else None

    def settled(self) -> list[RoundRow]:
        """The rows that will not change: completed, and validated by all or by no one any more."""
        done = sorted((row for row in self.rows.values() if row.phase == "completed"), key=lambda row: row.round)
        final = self.ended or not self.validates
        return [row for row in done if final or row is not done[-1] or self._validated(row)]

    def _validated(self, row: RoundRow) -> bool:
        return 0 < row.expected <= len(self.metrics.get(row.round, {}))


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an int that is larger than any float
        return None


# ---- how it is shown

Show = Callable[[Progress], None]


@contextmanager
def shown(console: Console, title: str, metrics: Sequence[str] | None = None) -> Iterator[Show]:
    """Shows progress: a live table on a terminal, elsewhere a line for each round when it is settled.

    metrics: the clients' numbers to be shown, whether or not they have come; None: the first that come.
    """
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda progress: live.update(
                render(progress, title, metrics, max_rows=max(3, console.height - 7)), refresh=True
            )
    else:
        yield PlainRows(console, metrics).show


@dataclass(slots=True)
class PlainRows:
    console: Console
    metrics: Sequence[str] | None = None
    printed: int = 0
    failures: set[tuple[int, int]] = field(default_factory=set)  # (round, attempt) that have been told

    def show(self, progress: Progress) -> None:
        settled = progress.settled()
        for row in settled[self.printed :]:
            names = _shown_metrics(progress, self.metrics)
            number, updates, *means, seconds, _ = cells(progress, row, names)
            pairs = "".join(f"{name} {mean}  " for name, mean in zip(names, means, strict=True))
            told = f"validation {pairs}" if pairs else ""
            say(self.console, f"round {number:>2}/{progress.rounds}  updates {updates}  {told}{seconds} s")
        self.printed = len(settled)
        for row in progress.rows.values():
            if row.phase == "failed" and (row.round, row.attempt) not in self.failures:
                self.failures.add((row.round, row.attempt))
                failed = f"attempt {row.attempt} failed: {row.reason or 'no reason given'}"
                say(self.console, f"round {row.round:>2}/{progress.rounds}  {failed}")


def render(progress: Progress, title: str, metrics: Sequence[str] | None, *, max_rows: int) -> RenderableType:
    """The newest rounds and the overall progress."""
    names = _shown_metrics(progress, metrics)
    table = Table(title=Text(title))
    for column in ("round", "updates", *(f"validation {name}" for name in names), "seconds"):
        table.add_column(Text(column), justify="right")
    table.add_column("state", no_wrap=True)
    newest = sorted(progress.rows.values(), key=lambda row: row.round)[-max_rows:]
    for row in newest:
        table.add_row(*(Text(cell) for cell in cells(progress, row, names)))
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        ProgressBar(total=1.0, completed=progress.fraction, width=40),
        Text(f"{progress.completed}/{progress.rounds} rounds" + ("" if progress.rows else ", waiting for clients")),
    )
    return Group(table, bar)


def cells(progress: Progress, row: RoundRow, metrics: Sequence[str]) -> list[str]:
    """Round, updates, a mean for each metric, seconds, state: as they stand in the table."""
    means = [progress.mean(row, name) for name in metrics]
    seconds = progress.at_s - row.started_at_s if row.seconds is None else row.seconds
    attempt = f" (attempt {row.attempt})" if row.attempt > 1 else ""
    return [
        str(row.round),
        f"{row.received}/{row.expected}",
        *("-" if mean is None else f"{mean:.3f}" for mean in means),
        f"{seconds:.2f}",
        row.phase + attempt + (f": {row.reason}" if row.reason else ""),
    ]


def _shown_metrics(progress: Progress, wanted: Sequence[str] | None) -> Sequence[str]:
    return progress.metric_names()[:MAX_METRICS] if wanted is None else wanted


def say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
