"""The process dies at its k-th durable call, before it has effect and after: the same model, byte for byte; every
accepted update counted once; every call answered with the verdict that it had. `make test-long` walks every k."""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fl_client.wire import fl_pb2 as pb
from fl_server.core.model import SessionId, Status
from fl_server.errors import Unavailable
from fl_server.scheduler.copies import key_of
from fl_server.store.files import FileBlobStore
from fl_server.store.ports import Put
from fl_server.store.spool import Spool
from fl_server.store.sqlite import SqliteStateStore
from tests.crash.simulation import SESSION, Ended, Federation, OneByOne, lose_upload, simulate

STORES = [SqliteStateStore, OneByOne]
SAMPLE = pytest.param(23, id="sample")
ALL = pytest.param(1, id="every", marks=pytest.mark.long)


class Undisturbed:
    """The run that nothing disturbs: what every other run is compared with."""

    def __init__(self, store: type[SqliteStateStore], folder: Path) -> None:
        self.store = store
        federation, ended = simulate(folder, store=store)
        self.calls, self.result = federation.calls, ended.result
        self.check(federation, ended)

    def check(self, federation: Federation, ended: Ended) -> None:
        assert ended.record.status is Status.FINISHED, ended.record.reason
        assert ended.result == self.result
        counted = {
            (number, report["task"][4]): report["update"]["update_id"]
            for number, reports in ended.reports.items()
            for report in reports
            if report["verdict"] == "accepted"
        }
        assert sorted(number for number, _ in counted) == [1] * 3 + [2] * 3 + [3] * 4
        for client in federation.clients:
            told: dict[str, int] = {}
            for task, update_id, verdict in client.heard:
                assert told.setdefault(update_id, verdict) == verdict, f"{update_id}: {told[update_id]}, then {verdict}"
                if verdict == pb.VERDICT_ACCEPTED:
                    assert counted[task.round, client.id] == update_id
        c0, c1, c2, _ = federation.clients
        assert {verdict for task, _, verdict in c1.heard if task.round == 2} == {pb.VERDICT_LATE}
        assert pb.VERDICT_REJECTED in [verdict for _, _, verdict in c0.heard]
        assert pb.VERDICT_DUPLICATE in [verdict for _, _, verdict in c2.heard]


@pytest.fixture(scope="module", params=STORES, ids=lambda store: store.__name__)
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(request.param, tmp_path_factory.mktemp("calm"))


@pytest.mark.parametrize("step", [SAMPLE, ALL])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_the_process_dies_at_its_kth_call(undisturbed: Undisturbed, after: bool, step: int, tmp_path: Path) -> None:
    for k in range(1 + 3 * after, undisturbed.calls + 1, step):
        federation, ended = simulate(tmp_path / str(k), [(k, after)], store=undisturbed.store)
        assert federation.lives == 2, f"call {k} of {undisturbed.calls} did not come"
        undisturbed.check(federation, ended)


@pytest.mark.parametrize("step", [SAMPLE, pytest.param(1, id="every", marks=pytest.mark.long)])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_updates_that_a_session_keeps_are_kept_and_leave_the_spool(step: int, after: bool, tmp_path: Path) -> None:
    keeps = {"delete_models_storage": False}
    calm, _ = simulate(tmp_path / "calm", **keeps)
    for k in range(1 + 3 * after, calm.calls + 1, step):
        federation, ended = simulate(tmp_path / str(k), [(k, after)], **keeps)
        assert federation.lives == 2
        for number, reports in ended.reports.items():
            blobs = {report["update"]["blob"] for report in reports if report["verdict"] == "accepted"}
            kept = {key_of(SessionId(SESSION), number, 1, blob) for blob in blobs}
            assert kept <= set(ended.kept), f"call {k}"
            assert not blobs & ended.spooled, f"call {k}"


@pytest.mark.parametrize("draws", [pytest.param(8, id="sample"), pytest.param(300, id="many", marks=pytest.mark.long)])
def test_the_process_dies_again_while_it_recovers(undisturbed: Undisturbed, draws: int, tmp_path: Path) -> None:
    draw = random.Random(1)
    for index in range(draws):
        deaths = [
            (draw.randint(1, undisturbed.calls), draw.random() < 0.5),
            (draw.randint(1, 12), draw.random() < 0.5),
            (draw.randint(1, 60), draw.random() < 0.5),
        ]
        federation, ended = simulate(tmp_path / str(index), deaths, store=undisturbed.store)
        undisturbed.check(federation, ended)


@pytest.mark.parametrize("applied", [False, True], ids=["not_applied", "applied"])
def test_a_store_that_times_out_now_and_then_changes_nothing(
    undisturbed: Undisturbed, applied: bool, tmp_path: Path
) -> None:
    """Every third write has an unknown outcome: the shell asks again until it knows."""

    def faults(state: SqliteStateStore, models: FileBlobStore, spool: Spool) -> None:
        count = 0

        def flaky(method: Callable[..., Any]) -> Any:
            async def call(*args: Any) -> Any:
                nonlocal count
                count += 1
                if count % 3 == 0:
                    if applied:
                        await method(*args)
                    raise Unavailable("timed out")
                return await method(*args)

            return call

        for thing, name in ((state, "save"), (state, "append"), (models, "put_file"), (spool, "remove")):
            setattr(thing, name, flaky(getattr(thing, name)))

    federation, ended = simulate(tmp_path, store=undisturbed.store, faults=faults)
    undisturbed.check(federation, ended)


@pytest.mark.parametrize("what", ["state", "models", "spool"])
@pytest.mark.parametrize("step_s", [pytest.param(6, id="sample"), pytest.param(0.7, id="many", marks=pytest.mark.long)])
def test_a_store_that_is_away_for_45_s_changes_nothing(
    undisturbed: Undisturbed, step_s: float, what: str, tmp_path: Path
) -> None:
    """Longer than a round may take and longer than a call is held: deadlines move, clients come again."""
    begins_s = 14.0
    while begins_s < 40.0:

        def faults(state: SqliteStateStore, models: FileBlobStore, spool: Spool, begins_s: float = begins_s) -> None:
            loop = asyncio.get_running_loop()

            def away(method: Callable[..., Any]) -> Any:
                async def call(*args: Any) -> Any:
                    if begins_s <= loop.time() - 1_000_000.0 < begins_s + 45.0:
                        raise Unavailable("it is away")
                    return await method(*args)

                return call

            stores: dict[str, tuple[Any, tuple[str, ...]]] = {
                "state": (state, ("save", "append", "insert", "get", "find", "count", "reports")),
                "models": (models, ("put_file", "local", "size_bytes")),
                "spool": (spool, ("replace", "remove", "missing")),
            }
            thing, names = stores[what]
            for name in names:
                setattr(thing, name, away(getattr(thing, name)))

        federation, ended = simulate(tmp_path / str(begins_s), store=undisturbed.store, faults=faults)
        undisturbed.check(federation, ended)
        begins_s += step_s


def test_a_late_write_never_undoes_a_newer_one(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Every write that moves a session or a round times out at first, and lands after the one that follows it."""

    def faults(state: SqliteStateStore, models: FileBlobStore, spool: Spool) -> None:
        save = state.save
        held: list[Any] = []
        tried: list[Any] = []

        async def call(writes: Any) -> None:
            records = [write.document["fl"] for write in writes if isinstance(write, Put)]
            if records and records not in tried:
                tried.append(records)
                held.append(writes)
                raise Unavailable("timed out")
            await save(writes)
            for late in held[:-1]:
                await save(late)
            held[:-1] = []

        state.save = call  # type: ignore[method-assign]

    federation, ended = simulate(tmp_path, store=undisturbed.store, faults=faults)
    undisturbed.check(federation, ended)


@pytest.mark.parametrize("step", [SAMPLE, pytest.param(3, id="many", marks=pytest.mark.long)])
def test_an_accepted_update_whose_bytes_are_gone_after_a_restart_is_asked_for_again(
    undisturbed: Undisturbed, step: int, tmp_path: Path
) -> None:
    again = 0
    for k in range(45, undisturbed.calls - 10, step):
        lost: list[tuple[str, int, str, str]] = []

        def lose(folder: Path, lost: list[tuple[str, int, str, str]] = lost) -> None:
            """The last accepted update of the running round leaves the spool while the process is down."""
            with sqlite3.connect(folder / "state.db") as db:
                running = _running_round(db)
                for report in running[2][-1:] if running else []:
                    lose_upload(folder / "spool", report["update"]["blob"])
                    lost.append((running[1], running[0], report["task"][4], report["update"]["update_id"]))
            db.close()

        _, ended = simulate(tmp_path / str(k), [(k, False)], store=undisturbed.store, between_lives=lose)
        assert ended.record.status is Status.FINISHED
        for phase, number, client, update_id in lost:
            mine = [report for report in ended.reports[number] if report["task"][4] == client]
            assert [report["lost"] for report in mine if report["update"]["update_id"] == update_id] == [True]
            counted_again = any(report["verdict"] == "accepted" for report in mine)
            assert phase == "aggregating" or counted_again, "while training the task is open again"
            doubled = (client, number) == ("c2", 2)  # its second, different update may be the one that now counts
            if counted_again and not doubled:
                assert ended.blob == undisturbed.result[2], "it trained again, to the same update"
            again += counted_again
    assert again


def _running_round(db: sqlite3.Connection) -> tuple[int, str, list[Any]] | None:
    """(number, phase, accepted reports by client) of the round that a restart will find running."""
    sessions = [json.loads(row[0]) for row in db.execute('select document from "control.sessions"')]
    rounds = [
        json.loads(row[0])["fl"] | {"id": json.loads(row[0])["round_id"]}
        for row in db.execute('select document from "control.rounds"')
    ]
    if not sessions or not rounds:
        return None
    newest = max(rounds, key=lambda found: (found["number"], found["attempt"]))
    phase = newest["record"]["phase"]
    if newest["number"] <= sessions[0]["fl"]["record"]["model"]["round"] or phase not in ("training", "aggregating"):
        return None
    rows = db.execute("select report from reports where round_id = ? order by client", (newest["id"],))
    reports = [json.loads(row[0]) for row in rows]
    return newest["number"], phase, [report for report in reports if report["verdict"] == "accepted"]
