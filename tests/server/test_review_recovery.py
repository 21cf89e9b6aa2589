"""A server that starts from a store that somebody has tampered with, or from a prefix of its last writes."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from fl_server.core.model import Status
from fl_server.store.ports import Collection
from tests.crash.simulation import simulate

IN_ROUND_2 = 90  # a call of the first life


def test_a_document_of_a_former_round_that_is_gone_does_not_keep_the_server_from_starting(tmp_path: Path) -> None:
    def forget_rounds(folder: Path) -> None:
        with sqlite3.connect(folder / "state.db") as db:
            gone = db.execute(
                f"delete from \"{Collection.ROUNDS}\" where json_extract(document, '$.fl.number') = 1"
            ).rowcount
        db.close()
        assert gone == 1, "else the test has died in another round"

    _, ended = simulate(tmp_path, [(IN_ROUND_2, False)], between_lives=forget_rounds)
    assert (ended.record.status, ended.record.model.round) == (Status.FINISHED, 3)


def test_an_attempt_whose_end_was_not_written_any_more_does_not_stay_pending(tmp_path: Path) -> None:
    table = f'"{Collection.ROUNDS}"'

    def leave_pending(folder: Path) -> None:
        with sqlite3.connect(folder / "state.db") as db:
            (text,) = db.execute(f"select document from {table} limit 1").fetchone()
            left = json.loads(text)
            left |= {"round_id": "1000", "status": "Pending"}
            left["fl"] |= {"number": 2, "attempt": 7, "ordinal": 1000}
            left["fl"]["record"] |= {"number": 2, "attempt": 7, "phase": "training"}
            db.execute(f"insert into {table} (id, document) values ('1000', ?)", (json.dumps(left),))
        db.close()

    _, ended = simulate(tmp_path, [(IN_ROUND_2, False)], between_lives=leave_pending)
    assert ended.record.status is Status.FINISHED
    db = sqlite3.connect(tmp_path / "state.db")
    found = [json.loads(text) for (text,) in db.execute(f"select document from {table}").fetchall()]
    db.close()
    assert {round["round_id"]: round["status"] for round in found} == {
        "1": "Finished", "2": "Finished", "1000": "Failed", "1001": "Finished"
    }  # fmt: skip
