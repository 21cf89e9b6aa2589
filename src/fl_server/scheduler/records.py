"""The core's records as documents of the store, and back.

The outer fields are FEDn's, derived, for those who read; `fl.record` is what we decide from, exactly as the core holds
it. Nothing here decides anything.
"""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass, fields
from typing import Any

from fl_server.core.model import (
    ClientId,
    GlobalModel,
    ModelId,
    ModelUpdate,
    Phase,
    Report,
    RoundRecord,
    SessionConfig,
    SessionId,
    SessionRecord,
    Status,
    Task,
    TaskKind,
    UpdateId,
    Verdict,
)
from fl_server.store.ports import Collection, Document, Patch, Put, PutReport

WIRE_STATUS = {
    Status.CREATED: "Created",
    Status.RUNNING: "Started",
    Status.FINISHED: "Finished",
    Status.FAILED: "Failed",  # ours: FEDn calls a session Finished when all its rounds failed
    Status.TERMINATED: "Terminated",
}
WIRE_PHASE = {
    Phase.SELECTING: "Pending",
    Phase.TRAINING: "Pending",
    Phase.AGGREGATING: "Pending",
    Phase.COMPLETED: "Finished",
    Phase.FAILED: "Failed",
}
COMBINER_NAME = "combiner"
COMBINER_ID = str(uuid.uuid5(uuid.NAMESPACE_OID, COMBINER_NAME))
_RUNS = uuid.UUID("0f4a5b7e-6f57-5a0a-9d0c-3b9f2c1d8e11")
_JOBS = uuid.UUID("7b1d2f60-0a55-5a53-8f0e-5a6f7e2c9d33")
_NO_TEXT = frozenset({"is_sl_inference", "client_settings", "selected_clients"})


@dataclass(slots=True)
class SessionFacts:
    """What a session's document holds and the core does not need."""

    name: str | None
    seed_model_id: str
    committed_at: float  # seconds since the epoch, as every time in a document
    run_id: str | None = None  # of the run under way: from a start to the end that follows it


@dataclass(slots=True)
class RoundFacts:
    """What a round's document holds and the core does not need. A restart forgets when its phases began."""

    round_id: str  # on the wire: what FEDn's users call the round
    began_at: float
    config: Document | None = None  # as the document shows it
    expected: int | None = None  # updates: one of each client of the cohort
    training_at: float | None = None
    aggregating_at: float | None = None

    def note(self, record: RoundRecord, at: float) -> None:
        match record.phase:
            case Phase.TRAINING:
                self.training_at = at if self.training_at is None else self.training_at
                self.expected = len(record.cohort)
            case Phase.AGGREGATING:
                self.aggregating_at = at


# ---- core to documents


def session_put(record: SessionRecord, facts: SessionFacts, at: float) -> Put:
    config = record.config
    document: Document = {
        "session_id": record.id,
        "name": facts.name,
        "status": WIRE_STATUS[record.status],
        "session_config": {**fedn_config(config), "model_id": record.model.id},
        "seed_model_id": facts.seed_model_id,
        "committed_at": facts.committed_at,
        "updated_at": at,
        "fl": {"version": record.version, "record": _session_dict(record), "run": facts.run_id},
    }
    return Put(Collection.SESSIONS, document)


def new_run_id(record: SessionRecord) -> str:
    """Of the run that this record starts: made again it is the same."""
    return str(uuid.uuid5(_RUNS, f"{record.id}/{record.version}"))


def run_put(record: SessionRecord, run_id: str, at: float) -> Put:
    document: Document = {
        "run_id": run_id,
        "session_id": record.id,
        "model_id": record.model.id,
        "completed_at_model_id": None,
        "round_timeout": record.config.round_timeout_s,
        "rounds": record.config.rounds,
        "completed_at": None,
        "committed_at": at,
        "updated_at": at,
        "fl": {"version": 1},
    }
    return Put(Collection.RUNS, document)


def run_end(record: SessionRecord, run_id: str, at: float) -> Patch:
    changes = {"completed_at": at, "completed_at_model_id": record.model.id, "updated_at": at}
    return Patch(Collection.RUNS, run_id, changes)


def round_put(record: RoundRecord, facts: RoundFacts, config: SessionConfig, base: ModelId, at: float) -> Put:
    facts.note(record, at)
    facts.config = {
        **fedn_config(config),
        "rounds": 1,
        "round_id": facts.round_id,
        "task": "training",
        "session_id": record.session,
        "model_id": base,
        "selected_clients": None if config.client_ids is None else sorted(config.client_ids),
        "is_sl_inference": False,
    }
    document: Document = {
        "round_id": facts.round_id,
        "status": WIRE_PHASE[record.phase],
        "round_config": facts.config,
        "round_data": None,
        "combiners": [],
        "committed_at": facts.began_at,
        "updated_at": at,
        "fl": {
            "version": record.version,
            "session": record.session,
            "number": record.number,
            "attempt": record.attempt,
            "ordinal": int(facts.round_id),
            # not asdict(): it copies each name of the cohort, 5 ms on the loop for 10,000
            "record": {field.name: getattr(record, field.name) for field in fields(record)},
        },
    }
    return Put(Collection.ROUNDS, document)


def round_end(round_id: str, reason: str, at: float) -> Patch:
    """Of an attempt that failed, by the session's record, whose own record was not written any more."""
    failed = {"status": WIRE_PHASE[Phase.FAILED], "fl.record.phase": Phase.FAILED, "fl.record.reason": reason}
    return Patch(Collection.ROUNDS, round_id, {**failed, "updated_at": at})


def model_writes(record: SessionRecord, facts: RoundFacts, at: float) -> list[Put | Patch]:
    """The current model's own document and its round's end, made from the session's record and the round's document."""
    model, config = record.model, record.config
    name = f"{config.model_name_prefix}_{model.round}" if config.model_name_prefix else None
    document = model_document(model, helper=config.helper, name=name, session_id=record.id, at=at)
    ended = {
        "status": WIRE_PHASE[Phase.COMPLETED],
        "fl.record.phase": Phase.COMPLETED,
        "combiners": [_combiner_of_round(record, facts, at)],
        # one combiner: its model is the round's, and the commit is the write of this very document
        "round_data": {
            "time_commit": 0.0,
            "reduce": {"time_aggregate_model": 0.0, "time_fetch_model": 0.0, "time_load_model": 0.0},
        },
        "updated_at": at,
    }
    return [Put(Collection.MODELS, document), Patch(Collection.ROUNDS, facts.round_id, ended)]


def _combiner_of_round(record: SessionRecord, facts: RoundFacts, at: float) -> Document:
    """FEDn's entry (fedn-interface.md 6.5); what its combiner knows of the round's configuration is text."""
    aggregated_s = None if facts.aggregating_at is None else at - facts.aggregating_at
    config = {
        key: value if key in _NO_TEXT or isinstance(value, str) else str(value)
        for key, value in (facts.config or {}).items()
    }
    return {
        "name": COMBINER_NAME,
        "status": "Success",
        "round_id": facts.round_id,
        "model_id": record.model.id,
        "time_exec_training": None if facts.training_at is None else at - facts.training_at,
        "config": {**config, "_job_id": str(uuid.uuid5(_JOBS, f"{record.id}/{facts.round_id}"))},
        "data": {
            "nr_expected_updates": facts.expected,
            "nr_required_updates": record.config.min_updates,
            "timeout": record.config.round_timeout_s,
            "time_combination": aggregated_s,
            "aggregation_time": {
                "nr_aggregated_models": record.model.num_updates,
                "time_model_aggregation": aggregated_s,
                "time_model_load": 0.0,  # each update is read while it is folded
            },
        },
    }


def model_document(model: GlobalModel, *, helper: str, name: str | None, session_id: str | None, at: float) -> Document:
    """helper: the format of its bytes."""
    fl = {"version": 1, "round": model.round, "attempt": model.attempt, "sha256": model.sha256, "helper": helper}
    return {
        "model": model.id,
        "key": "models",
        "name": name,
        "parent_model": model.parent,
        "session_id": session_id,
        "committed_at": at,
        "updated_at": at,
        "fl": fl,
    }


def helper_of(model: Document) -> str:
    """Of a model's document."""
    return str(model["fl"].get("helper", "numpyhelper"))


def report_put(report: Report, round_id: str) -> PutReport:
    task, update = report.task, report.update
    document: Document = {  # written out: asdict() takes four times as long, for each update
        "task": list(task),
        "update": {"update_id": update.update_id, "blob": update.blob, "num_examples": update.num_examples},
        "verdict": report.verdict,
        "reason": report.reason,
        "seq": report.seq,
        "lost": report.lost,
    }
    return PutReport(round_id, task.client, update.update_id, report.seq, document)


def fedn_config(config: SessionConfig) -> dict[str, Any]:
    """A session's configuration in FEDn's names; what FEDn has no name for keeps ours, in seconds."""
    return {
        "aggregator": config.aggregator,
        "aggregator_kwargs": dict(config.aggregator_kwargs) or None,
        "round_timeout": config.round_timeout_s,
        "buffer_size": config.buffer_size,
        "rounds": config.rounds,
        "delete_models_storage": config.delete_models_storage,
        "clients_required": config.min_clients,
        "requested_clients": config.requested_clients,
        "validate": config.validate,
        "helper_type": config.helper,
        "server_functions": None,
        "client_settings": dict(config.client_settings),
        "validation_timeout": config.validation_timeout_s,
        "selection_timeout": config.selection_timeout_s,
        "rejoin_window": config.rejoin_window_s,
        "round_retries": config.round_retries,
        "retry_wait": config.retry_wait_s,
    }


def _session_dict(record: SessionRecord) -> dict[str, Any]:
    document = asdict(record)
    admitted = record.config.client_ids
    document["config"]["client_ids"] = None if admitted is None else sorted(admitted)
    return document


# ---- documents to core


def session_record(document: Document) -> SessionRecord:
    fields = dict(document["fl"]["record"])
    config = dict(fields["config"])
    if config["client_ids"] is not None:
        config["client_ids"] = frozenset(ClientId(client) for client in config["client_ids"])
    fields["config"] = SessionConfig(**config)
    fields["model"] = GlobalModel(**fields["model"])
    fields["status"] = Status(fields["status"])
    return SessionRecord(**fields)


def session_facts(document: Document) -> SessionFacts:
    return SessionFacts(
        document["name"], document["seed_model_id"], document["committed_at"], document["fl"].get("run")
    )


def round_record(document: Document) -> RoundRecord:
    fields = dict(document["fl"]["record"])
    fields["phase"] = Phase(fields["phase"])
    fields["cohort"] = tuple(ClientId(client) for client in fields["cohort"])
    return RoundRecord(**fields)


def round_facts(document: Document) -> RoundFacts:
    cohort = document["fl"]["record"]["cohort"]
    return RoundFacts(document["round_id"], document["committed_at"], document["round_config"], len(cohort) or None)


def report_of(document: Document) -> Report:
    session, number, attempt, kind, client = document["task"]
    task = Task(SessionId(session), number, attempt, TaskKind(kind), ClientId(client))
    update = document["update"]
    return Report(
        task,
        ModelUpdate(UpdateId(update["update_id"]), update["blob"], update["num_examples"]),
        Verdict(document["verdict"]),
        document["reason"],
        document["seq"],
        document["lost"],
    )
