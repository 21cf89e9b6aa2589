"""Messages of the wire to the core's nouns and the store's documents, and back; nothing else."""

from __future__ import annotations

import functools
import json
import math
import re
from datetime import UTC, datetime
from typing import Any, NamedTuple

from google.protobuf.timestamp_pb2 import Timestamp

from fl_client.wire import fl_pb2 as pb
from fl_server.core.model import ClientId, SessionConfig, Task, TaskKind, UpdateId, Verdict
from fl_server.scheduler import records
from fl_server.scheduler.intake import Announced
from fl_server.scheduler.journal import record_id
from fl_server.scheduler.streams import Assignment
from fl_server.store.ports import ID_FIELD, Collection, Document

COMBINER = pb.Client(role=pb.COMBINER, name=records.COMBINER_NAME)
KINDS = {
    TaskKind.TRAIN: pb.MODEL_UPDATE,
    TaskKind.VALIDATE: pb.MODEL_VALIDATION,
    TaskKind.PREDICT: pb.MODEL_PREDICTION,
}
LARGE_CHUNK_BYTES = 64 * 1024
_MOST_FIELDS_BEFORE = 8  # the data: a ModelRequest has four other fields
_VARINT_BYTES = 10  # at most
_MOST_BESIDE_BYTES = 2048  # the data, in a message that stays in memory as long as they do
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
VERDICTS = {
    Verdict.ACCEPTED: pb.VERDICT_ACCEPTED,
    Verdict.DUPLICATE: pb.VERDICT_DUPLICATE,
    Verdict.NOT_SELECTED: pb.VERDICT_NOT_SELECTED,
    Verdict.LATE: pb.VERDICT_LATE,
    Verdict.REJECTED: pb.VERDICT_REJECTED,
}


# ---- to clients


def task_request(assignment: Assignment, at: float) -> pb.TaskRequest:
    task = assignment.task
    return pb.TaskRequest(
        sender=COMBINER,
        receiver=pb.Client(role=pb.CLIENT, client_id=task.client),
        model_id=assignment.model,
        data=_data(assignment),
        correlation_id=task.id,  # FEDn's clients copy it into their validations
        timestamp=datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S.%f"),
        session_id=task.session,
        type=KINDS[task.kind],
        task_id=task.id,
        round=task.round,
        attempt=task.attempt,
        deadline=assignment.deadline,
        helper=assignment.helper,
    )


def _data(assignment: Assignment) -> str:
    """FEDn's: a round's configuration for a training, nothing for a validation, an object for a prediction.

    The configuration has its values as text, as FEDn's clients know them; `_task_id` comes back in the echo.
    """
    task, config = assignment.task, assignment.config
    if task.kind is not TaskKind.TRAIN or config is None:
        return "{}" if task.kind is TaskKind.PREDICT else ""
    shared = _shared_config(_Frozen(config), assignment.round_id, task.session, assignment.model)
    return f'{shared[:-1]}, "_task_id": {json.dumps(task.id)}}}'


class _Frozen:
    """A configuration as a cache's key: the same object for all tasks of a round."""

    __slots__ = ("config",)

    def __init__(self, config: SessionConfig) -> None:
        self.config = config

    def __hash__(self) -> int:
        return id(self.config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and other.config is self.config


@functools.lru_cache(maxsize=16)
def _shared_config(frozen: _Frozen, round_id: str, session_id: str, model_id: str) -> str:
    config: dict[str, Any] = {
        key: value if isinstance(value, str) else str(value)
        for key, value in records.fedn_config(frozen.config).items()
        if key != "client_settings"
    }
    config |= {
        "rounds": "1",
        "model_id": model_id,
        "round_id": round_id,
        "task": "training",
        "session_id": session_id,
        "client_settings": dict(frozen.config.client_settings),
    }
    return json.dumps(config)


def response(what: str, client: str, verdict: Verdict | None = None, reason: str = "") -> pb.Response:
    said = f"RECEIVED {what} from client {client}"
    if verdict is not None:
        said += f": {verdict}" + (f" ({reason})" if reason else "")
    return pb.Response(
        sender=COMBINER,
        response=said,
        verdict=VERDICTS[verdict] if verdict is not None else pb.VERDICT_NONE,
        reason=reason,
    )


# ---- updates


class Chunk(NamedTuple):
    """Of an upload: what is needed of a ModelRequest."""

    id: str
    data: bytes | memoryview
    status: int


def chunk(message: bytes) -> Chunk:
    """A ModelRequest. A large one's data stay where they are: protobuf would copy them. Raises DecodeError."""
    begin, data, end = (_data_field(message) if len(message) >= LARGE_CHUNK_BYTES else None) or (0, 0, 0)
    if end and end - data >= len(message) - _MOST_BESIDE_BYTES:
        rest = pb.ModelRequest.FromString(message[:begin] + message[end:])
        if not rest.data:  # of two it is the last that counts
            return Chunk(rest.id, memoryview(message)[data:end], rest.status)
    whole = pb.ModelRequest.FromString(message)
    return Chunk(whole.id, whole.data, whole.status)


def _data_field(message: bytes) -> tuple[int, int, int] | None:
    """Where the first field 3 begins, its bytes do, and it ends; None if it is not plain to see.

    Protocol Buffers, Encoding: each field is a varint (number << 3 | wire type), then a varint (wire type 0), or
    (2) a varint that says how many bytes follow.
    """
    at = 0
    try:
        for _ in range(_MOST_FIELDS_BEFORE + 1):  # a stranger's millions are protobuf's work
            begin = at
            key, at = _varint(message, at)
            value, at = _varint(message, at)
            if key & 7 not in (0, 2):
                return None
            end = at + (value if key & 7 == 2 else 0)
            if key == 3 << 3 | 2:
                return (begin, at, end) if end <= len(message) else None
            at = end
    except IndexError:
        pass
    return None


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number there, and where it ends. Raises IndexError if there is none."""
    value = 0
    for index in range(_VARINT_BYTES):
        byte = message[at + index]
        value |= (byte & 0x7F) << 7 * index
        if not byte & 0x80:
            return value, at + index + 1
    raise IndexError


def announced(update: pb.ModelUpdate, meta: dict[str, Any]) -> Announced:
    training = meta.get("training_metadata")
    return Announced(
        UpdateId(update.model_update_id),
        training.get("num_examples") if isinstance(training, dict) else None,
        update.size_bytes,
        update.sha256,
        update.failure,
    )


def json_object(text: str) -> dict[str, Any]:
    """What the text holds, if it is a JSON object; else nothing: the verdict will say what is missing."""
    try:
        value = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def echoed_config(update: pb.ModelUpdate, meta: dict[str, Any]) -> dict[str, Any]:
    """The task's data as the client gives it back: JSON text inside meta, or (C++ clients) in `config`."""
    echo = meta.get("config")
    return echo if isinstance(echo, dict) else json_object(echo if isinstance(echo, str) else update.config)


def named_task(update: pb.ModelUpdate, echo: dict[str, Any]) -> Task | None:
    """The task that the update names itself; None if it names none."""
    task_id = update.task_id or _text(echo, "_task_id")
    return Task.parse(task_id) if task_id else None


def named_round(echo: dict[str, Any]) -> tuple[str, str] | None:
    """Ids of the session and the round that the update names; None if it names none."""
    session_id, round_id = _text(echo, "session_id"), _text(echo, "round_id")
    return (session_id, round_id) if session_id and round_id else None


def _text(echo: dict[str, Any], key: str) -> str | None:
    """JSON can spell half a character; such a text has no bytes, and was never ours."""
    value = echo.get(key)
    return value if isinstance(value, str) and not _HALF_CHARACTER.search(value) else None


def validation_task(validation: pb.ModelValidation) -> Task | None:
    task = Task.parse(validation.task_id or validation.correlation_id)
    return task if task and task.kind is TaskKind.VALIDATE else None


# ---- records


def status_document(status: pb.Status, client: ClientId, at: float) -> Document:
    fields = {
        "status": status.status,
        "timestamp": _iso(status.timestamp, at),
        "log_level": _named(pb.LogLevel, status.log_level),
        "data": status.data,
        "correlation_id": status.correlation_id,
        "type": _named(pb.StatusType, status.type),
        "extra": status.extra,
        "session_id": status.session_id,
        "sender": _client(status.sender, client),
    }
    return _record(Collection.STATUSES, client, status.SerializeToString(), fields, at)


def validation_document(validation: pb.ModelValidation, client: ClientId, at: float) -> Document:
    fields = {
        "model_id": validation.model_id,
        "data": validation.data,
        "correlation_id": validation.correlation_id,
        "timestamp": _iso(validation.timestamp, at),
        "session_id": validation.session_id,
        "meta": validation.meta,
        "sender": _client(validation.sender, client),
        "receiver": _client(validation.receiver, None),
    }
    return _record(Collection.VALIDATIONS, client, validation.SerializeToString(), fields, at)


def prediction_document(prediction: pb.ModelPrediction, client: ClientId, at: float) -> Document:
    fields = {
        "model_id": prediction.model_id,
        "data": prediction.data,
        "correlation_id": prediction.correlation_id,
        "timestamp": _iso(prediction.timestamp, at),
        "meta": prediction.meta,
        "prediction_id": prediction.prediction_id,
        "sender": _client(prediction.sender, client),
        "receiver": _client(prediction.receiver, None),
    }
    return _record(Collection.PREDICTIONS, client, prediction.SerializeToString(), fields, at)


def metric_documents(message: pb.ModelMetric, client: ClientId, at: float) -> list[Document]:
    shared = {
        "timestamp": _iso(message.timestamp, at),
        "sender": _client(message.sender, client),
        "model_id": message.model_id,
        "step": message.step.value if message.HasField("step") else None,
        "round_id": message.round_id,
        "session_id": message.session_id,
    }
    return _elements(Collection.METRICS, message.metrics, shared, client, message.SerializeToString(), at)


def attribute_documents(message: pb.AttributeMessage, client: ClientId, at: float) -> list[Document]:
    shared = {"timestamp": _iso(message.timestamp, at), "sender": _client(message.sender, client)}
    return _elements(Collection.ATTRIBUTES, message.attributes, shared, client, message.SerializeToString(), at)


def telemetry_documents(message: pb.TelemetryMessage, client: ClientId, at: float) -> list[Document]:
    shared = {"timestamp": _iso(message.timestamp, at), "sender": _client(message.sender, client)}
    return _elements(Collection.TELEMETRY, message.telemetries, shared, client, message.SerializeToString(), at)


def stream_status(client: ClientId, name: str, verb: str, at: float) -> Document:
    """FEDn's note that a client came or went, as its combiner would send it."""
    timestamp = Timestamp()
    timestamp.FromNanoseconds(int(at * 1e9))
    text = f"Client {name or client} {verb} TaskStream."
    status = pb.Status(sender=COMBINER, status=text, log_level=pb.INFO, type=pb.NETWORK, timestamp=timestamp)
    return status_document(status, ClientId(""), at)


def _elements(
    collection: Collection, elements: Any, shared: Document, client: ClientId, message: bytes, at: float
) -> list[Document]:
    """One document an element; a zero or an empty text is a value like any other."""
    return [
        _record(
            collection,
            client,
            message + index.to_bytes(4),
            {"key": element.key, "value": _json_value(element.value), **shared},
            at,
        )
        for index, element in enumerate(elements)
    ]


def _json_value(value: float | str) -> float | str | None:
    """JSON has no word for NaN and the infinities, and a store may hold nothing else."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _record(collection: Collection, client: ClientId, message: bytes, fields: Document, at: float) -> Document:
    return {
        ID_FIELD[collection]: record_id(client, message),
        **fields,
        "committed_at": at,
        "updated_at": at,
        "fl": {"client": client},
    }


def _client(sender: pb.Client, client: ClientId | None) -> Document:
    return {
        "name": sender.name,
        "role": _named(pb.Role, sender.role),
        "client_id": sender.client_id or client or None,
    }


def _named(enum: Any, value: int) -> str:
    """Its name; its number where a newer client knows more than we do."""
    try:
        return str(enum.Name(value))
    except ValueError:
        return str(value)


def _iso(timestamp: Timestamp, at: float) -> str:
    """ISO 8601, UTC; the server's time where the client gave none, or one outside the years 1 to 9999."""
    if timestamp.seconds:
        try:
            return timestamp.ToJsonString()
        except ValueError:
            pass
    return datetime.fromtimestamp(at, UTC).isoformat()[:26] + "Z"
