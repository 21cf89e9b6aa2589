"""Request and response bodies, to and from the core's nouns and the store's documents.

FEDn's names and shapes (fedn-interface.md 2 and 6.1); what is ours is an extra, optional key. Strict about types:
a bool is no int, "5" is no number, an unknown key is refused by name.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, RootModel, ValidationError
from pydantic_core import PydanticCustomError

from ..core.model import LONGEST_DURATION_S, ClientId, SessionConfig
from ..errors import Invalid
from ..scheduler.packages import ARE_PACKAGES
from ..scheduler.predictions import ARE_PREDICTIONS
from ..store.ports import ID_FIELD, Collection, Condition, Document

DEFAULT_ROUNDS = 5  # FEDn's APIClient.start_session

# ---- what requests are made of; an error of type "fedn_text" is FEDn's own sentence, said as it is


def _plain(text: str) -> str:
    if any(ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0 for character in text):
        raise PydanticCustomError("plain_text", "no control characters allowed")
    return text


def _header_safe(text: str) -> str:
    if not text.isascii() or text != text.strip():
        raise PydanticCustomError("header_safe", "ASCII without outer blanks needed: it travels in gRPC metadata")
    return text


def _as_sent(seconds: float) -> float:
    return int(seconds) if seconds.is_integer() else seconds  # FEDn shows round_timeout as 180, not 180.0


def _kwargs(value: object) -> object:
    """FEDn takes an object, JSON text or the text of a Python literal."""
    if not isinstance(value, str):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            parsed = read(value or "null")
            json.dumps(parsed, allow_nan=False, ensure_ascii=False).encode()
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        return parsed
    raise PydanticCustomError("kwargs", "neither an object nor the text of one")


def _client_ids(value: object) -> object:
    if value is not None and not isinstance(value, str):
        raise PydanticCustomError("fedn_text", "client_ids must be a comma separated string")
    return value


def _required_session_id(value: object) -> object:
    if value is None or value == "":
        raise PydanticCustomError("fedn_text", "Session ID is required")
    return value


def _required_prediction_id(value: object) -> object:
    if value is None or value == "":
        raise PydanticCustomError("fedn_text", "prediction_id is required")
    return value


def _required_client_ids(value: object) -> object:
    if value is None or value == []:
        raise PydanticCustomError("fedn_text", "Missing required field: client_ids")
    return value


def _utc(text: str) -> str:
    try:
        date = datetime.fromisoformat(text)
        date = date.astimezone(UTC) if date.tzinfo else date.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise PydanticCustomError("iso_date", "a date as ISO 8601 needed") from None
    return date.isoformat().replace("+00:00", "Z")


Text = Annotated[str, Field(max_length=256), AfterValidator(_plain)]
Name = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_plain)]
WireId = Annotated[str, Field(max_length=256), AfterValidator(_plain), AfterValidator(_header_safe)]
NewSessionId = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._-]+$")]
Timestamp = Annotated[str, AfterValidator(_utc)]
Count = Annotated[int, Field(ge=-1, le=2**31 - 1)]
Seconds = Annotated[float, Field(gt=0, le=LONGEST_DURATION_S), AfterValidator(_as_sent)]
SecondsOrZero = Annotated[float, Field(ge=0, le=LONGEST_DURATION_S), AfterValidator(_as_sent)]
JsonObject = dict[str, Any]


def _shape(extra: Literal["forbid", "ignore", "allow"], example: JsonObject) -> ConfigDict:
    """example: of the body, for who reads the OpenAPI document."""
    return ConfigDict(strict=True, extra=extra, json_schema_extra={"examples": [example]})


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class AddClient(Body):
    """FEDn's server reads `combiner_preferred`, its clients send `preferred_combiner`: both are heard."""

    # clients in other languages send more
    model_config = _shape("ignore", {"name": "hospital-a", "client_id": "hospital-a", "package": "remote"})

    name: Name
    client_id: WireId | None = None
    package: Literal["local", "remote"] = "local"
    combiner_preferred: Text | None = None
    preferred_combiner: Text | None = None


class SessionConfigBody(Body):
    aggregator: Name = "fedavg"
    aggregator_kwargs: Annotated[JsonObject | None, BeforeValidator(_kwargs)] = Field(
        None, description="an object, or the text of one (JSON or a Python literal)"
    )
    round_timeout: Seconds = 180
    buffer_size: Count = -1
    rounds: Count | None = Field(None, description=f"{DEFAULT_ROUNDS} if absent; sessions/start may say another number")
    delete_models_storage: bool = True
    clients_required: Count = 1
    requested_clients: Count | None = Field(None, description="the largest cohort; 0 or absent: every attached client")
    validate_: bool = Field(True, alias="validate")
    helper_type: Text | None = Field(None, description="the format of its models; that of the first if absent")
    model_id: Text | None = Field(None, description="the model to start from; seed_model_id if absent")
    server_functions: str | None = Field(None, description="not supported: null or empty")
    client_settings: JsonObject | None = Field(None, description="goes to the clients with each training task")
    validation_timeout: Seconds | None = Field(None, description="seconds; round_timeout if absent")
    selection_timeout: Seconds = Field(300, description="seconds a later round waits for clients_required clients")
    rejoin_window: SecondsOrZero = Field(60, description="seconds that clients have to come back after a restart")
    round_retries: Annotated[int, Field(ge=0, le=1000)] = 2
    retry_wait: SecondsOrZero = Field(5, description="seconds between the tries of a round")


class CreateSession(Body):
    model_config = _shape(
        "forbid",
        {
            "name": "digits",
            "session_config": {
                "model_id": "8b0f2a3e-6f57-5a0a-9d0c-3b9f2c1d8e11",
                "rounds": 10,
                "clients_required": 2,
                "round_timeout": 120,
            },
        },
    )

    session_config: SessionConfigBody
    name: Text | None = None
    seed_model_id: Text | None = None
    session_id: NewSessionId | None = None
    status: Literal["Created"] | None = None


class StartSession(Body):
    """The order of the first two fields is the order of FEDn's checks."""

    model_config = _shape("ignore", {"session_id": "5d1c", "rounds": 10, "wait_for_clients_s": 60})

    client_ids: Annotated[str | None, BeforeValidator(_client_ids)] = Field(None, description="comma separated")
    session_id: Annotated[Text | None, BeforeValidator(_required_session_id)] = Field(None, validate_default=True)
    rounds: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    round_timeout: Seconds | None = None
    model_name_prefix: Text | None = None
    wait_for_clients_s: SecondsOrZero = Field(0, description="wait this long for clients_required clients")

    def chosen_clients(self) -> frozenset[ClientId] | None:
        ids = {ClientId(part.strip()) for part in (self.client_ids or "").split(",") if part.strip()}
        return frozenset(ids) or None


class StartPredictions(Body):
    model_config = _shape("ignore", {"prediction_id": "run-1", "model_id": "a model_id"})

    prediction_id: Annotated[NewSessionId | None, BeforeValidator(_required_prediction_id)] = Field(
        None, validate_default=True, description="yours; every prediction of the run has it"
    )
    model_id: Text | None = Field(None, description="the newest model if absent")
    timeout: Seconds | None = Field(None, description="seconds; the server's prediction_timeout_s if absent")


class ModelForm(Body):
    model_config = ConfigDict(strict=True, extra="ignore")
    name: Text | None = None
    helper: Text = ""


class PackageForm(Body):
    name: Text | None = None
    helper: Text
    description: Annotated[str, Field(max_length=4096)] = ""


class PackageFile(Body):
    file: Name


class ActivePackage(Body):
    model_config = _shape("forbid", {"id": "a package_id"})

    id: Text


class Sender(Body):
    name: Text | None = None
    role: Literal["OTHER", "CLIENT", "COMBINER", "REDUCER"] = "CLIENT"
    client_id: WireId | None = None


class AddAttribute(Body):
    model_config = _shape("forbid", {"key": "gpu", "value": "", "sender": {"name": "a", "client_id": "hospital-a"}})

    key: Name
    value: Annotated[str, Field(max_length=1 << 16)]
    sender: Sender
    timestamp: Timestamp | None = Field(None, description="ISO 8601; the server's time if absent")


class AddTelemetry(Body):
    model_config = _shape(
        "forbid", {"key": "battery", "value": 0.0, "sender": {"name": "a", "client_id": "hospital-a"}}
    )

    key: Name
    value: Annotated[float, Field(allow_inf_nan=False)]
    sender: Sender
    timestamp: Timestamp | None = Field(None, description="ISO 8601; the server's time if absent")


class ChosenClients(Body):
    model_config = _shape("forbid", {"client_ids": ["hospital-a", "hospital-b"]})

    client_ids: Annotated[list[Text], BeforeValidator(_required_client_ids)] = Field([], validate_default=True)


class ActiveHelper(Body):
    model_config = _shape("forbid", {"helper": "numpyhelper"})

    helper: Text


class ChangeModel(BaseModel):
    """Only the name can be changed; the other keys of a model may come along with their present values."""

    model_config = _shape("allow", {"name": "digits, first try"})
    name: Text | None = None


class ChangeSession(BaseModel):
    """The name; `status` "Terminated", which stops the session; the configuration of a session that does not run.

    Other keys may come along unchanged.
    """

    model_config = _shape("allow", {"status": "Terminated"})
    name: Text | None = None
    status: Text | None = None
    session_config: JsonObject | None = Field(
        None, description="as at creation, without another model_id; in a PATCH the keys that are to change"
    )


def session_config(body: SessionConfigBody, helper: str) -> SessionConfig:
    """Raises InvalidConfig, beginning with the field's name."""
    return SessionConfig(
        rounds=DEFAULT_ROUNDS if body.rounds is None else body.rounds,
        min_clients=body.clients_required,
        requested_clients=body.requested_clients or 0,
        buffer_size=body.buffer_size,
        validate=body.validate_,
        aggregator=body.aggregator,
        aggregator_kwargs=body.aggregator_kwargs or {},
        helper=helper,
        delete_models_storage=body.delete_models_storage,
        client_settings=body.client_settings or {},
        round_timeout_s=body.round_timeout,
        validation_timeout_s=body.validation_timeout or body.round_timeout,
        selection_timeout_s=body.selection_timeout,
        rejoin_window_s=body.rejoin_window,
        round_retries=body.round_retries,
        retry_wait_s=body.retry_wait,
    )


def problem(errors: Sequence[Mapping[str, Any]]) -> str:
    """The first of pydantic's errors in one line that begins with the field's name."""
    error = errors[0]
    path = [str(part) for part in error["loc"] if part not in ("body", "query", "header", "path", "session_config")]
    field = ".".join(path) or ("session_config" if "session_config" in error["loc"] else "body")
    match error["type"]:
        case "fedn_text":
            return str(error["msg"])
        case "extra_forbidden":
            return f"Invalid object: unknown key {field!r}"
        case "model_attributes_type" | "dict_type" | "model_type" if not path and isinstance(error["input"], bytes):
            return "body: a JSON object with Content-Type: application/json needed"
        case "model_attributes_type" | "dict_type" | "model_type":
            return f"{field}: a JSON object needed"
        case "missing":
            return f"{field}: missing"
        case _:
            return f"{field}: {error['msg']}"


Checked = TypeVar("Checked", bound=Body)


def checked(shape: type[Checked], values: Mapping[str, Any]) -> Checked:
    """For what FastAPI does not check itself. Raises Invalid."""
    try:
        return shape.model_validate(values)
    except ValidationError as wrong:
        raise Invalid(problem([dict(error) for error in wrong.errors()])) from None


# ---- what responses are made of: a field's declaration here is its place in the answer


class Stored(BaseModel):
    """Dates: `timestamp` as ISO 8601, the other dates as RFC 1123."""

    model_config = ConfigDict(extra="forbid")

    committed_at: str | None = None
    updated_at: str | None = None


class Actor(BaseModel):
    name: str | None = None
    role: str | None = None
    client_id: str | None = None


class ClientObject(Stored):
    client_id: str
    name: str | None = None
    combiner: str | None = None
    combiner_preferred: str | None = None
    ip: str | None = None
    status: str | None = Field(None, description="available, online or offline")
    last_seen: str | None = None
    package: str | None = None


class CombinerObject(Stored):
    combiner_id: str
    name: str | None = None
    address: str | None = None
    fqdn: str | None = None
    ip: str | None = None
    parent: str | None = None
    port: int | None = None


class ModelObject(Stored):
    model_id: str
    model: str = Field(description="model_id once more, as FEDn has it")
    name: str | None = None
    parent_model: str | None = None
    session_id: str | None = None


class PackageObject(Stored):
    package_id: str
    name: str | None = None
    description: str | None = None
    file_name: str | None = None
    storage_file_name: str | None = None
    helper: str | None = None
    active: bool | None = None


class SessionConfigObject(BaseModel):
    model_config = ConfigDict(extra="allow")

    aggregator: str | None = None
    aggregator_kwargs: JsonObject | None = None
    buffer_size: int | None = None
    clients_required: int | None = None
    delete_models_storage: bool | None = None
    helper_type: str | None = None
    model_id: str | None = None
    requested_clients: int | None = None
    round_timeout: float | None = None
    rounds: int | None = None
    server_functions: str | None = None
    validate_: bool | None = Field(None, alias="validate")


class SessionObject(Stored):
    session_id: str
    name: str | None = None
    status: str | None = Field(None, description="Created, Started, Finished, Terminated, or Failed with status_reason")
    status_reason: str | None = None
    session_config: SessionConfigObject | None = None
    seed_model_id: str | None = None


class RoundObject(Stored):
    round_id: str
    status: str | None = Field(None, description="Pending, Finished, or Failed with status_reason")
    status_reason: str | None = None
    round_config: JsonObject | None = None
    round_data: JsonObject | None = None
    combiners: list[JsonObject] | None = None


class RunObject(Stored):
    run_id: str
    session_id: str | None = None
    model_id: str | None = None
    completed_at_model_id: str | None = None
    round_timeout: float | None = None
    rounds: int | None = None
    completed_at: str | None = None


class StatusObject(Stored):
    status_id: str
    status: str | None = None
    timestamp: str | None = None
    log_level: str | None = None
    data: str | None = None
    correlation_id: str | None = None
    type: str | None = None
    extra: str | None = None
    session_id: str | None = None
    sender: Actor | None = None


class ValidationObject(Stored):
    validation_id: str
    model_id: str | None = None
    data: str | None = Field(None, description="the metrics, as JSON text")
    correlation_id: str | None = None
    timestamp: str | None = None
    session_id: str | None = None
    meta: str | None = None
    sender: Actor | None = None
    receiver: Actor | None = None


class PredictionObject(Stored):
    prediction_id: str | None = Field(None, description="of the run: the predictions of all its clients have it")
    model_id: str | None = None
    data: str | None = Field(None, description="the prediction, as JSON text")
    correlation_id: str | None = None
    timestamp: str | None = None
    meta: str | None = None
    sender: Actor | None = None
    receiver: Actor | None = None
    record_id: str | None = Field(None, description="of this one alone")


class MetricObject(Stored):
    metric_id: str
    key: str | None = None
    value: float | None = None
    timestamp: str | None = None
    sender: Actor | None = None
    model_id: str | None = None
    step: int | None = None
    round_id: str | None = None
    session_id: str | None = None


class AttributeObject(Stored):
    attribute_id: str
    key: str | None = None
    value: str | None = None
    timestamp: str | None = None
    sender: Actor | None = None


class TelemetryObject(Stored):
    telemetry_id: str
    key: str | None = None
    value: float | None = None
    timestamp: str | None = None
    sender: Actor | None = None


DATES = frozenset({"committed_at", "updated_at", "last_seen", "completed_at"})  # stored as seconds since the epoch
_INNER: Mapping[str, type[BaseModel]] = {
    "session_config": SessionConfigObject,
    "sender": Actor,
    "receiver": Actor,
}
OBJECTS = frozenset({*_INNER, "round_config", "round_data", "combiners"})  # filters may reach into these


@dataclass(frozen=True, slots=True)
class Entity:
    noun: str  # as in the path
    singular: str
    collection: Collection
    shape: type[Stored]
    where: tuple[Condition, ...] = ()  # what else the collection holds is no such entity
    shared_id: str = ""  # a field by which one is found, too: the newest of those that share it

    def stored_name(self, field: str) -> str:
        """Dotted where it is ours. FEDn stores a model's id under `model` alone."""
        if field == "status_reason":
            return "fl.record.reason"
        return "model" if self.collection is Collection.MODELS and field == "model_id" else field

    @property
    def id_field(self) -> str:
        return ID_FIELD[self.collection]

    def answer(self, document: Document) -> JsonObject:
        """The document as FEDn shows it: every key of the shape, null where nothing is stored, and no other."""
        return {field: _shown(field, _stored(document, self.stored_name(field))) for field in self.shape.model_fields}


def _stored(document: Document, name: str) -> Any:
    value: Any = document
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _shown(field: str, value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None  # a client's metric may be anything, JSON has no word for it
    if field in DATES and isinstance(value, int | float):
        return formatdate(value, usegmt=True)
    if (inner := _INNER.get(field)) and isinstance(value, dict):
        nulls: JsonObject = {part.alias or name: None for name, part in inner.model_fields.items()}
        return nulls | value
    return value


CLIENTS = Entity("clients", "client", Collection.CLIENTS, ClientObject)
COMBINERS = Entity("combiners", "combiner", Collection.COMBINERS, CombinerObject)
MODELS = Entity("models", "model", Collection.MODELS, ModelObject)
PACKAGES = Entity("packages", "package", Collection.PACKAGES, PackageObject, ARE_PACKAGES)
SESSIONS = Entity("sessions", "session", Collection.SESSIONS, SessionObject)
ATTRIBUTES = Entity("attributes", "attribute", Collection.ATTRIBUTES, AttributeObject)
TELEMETRY = Entity("telemetry", "telemetry", Collection.TELEMETRY, TelemetryObject)
ENTITIES = (
    CLIENTS,
    COMBINERS,
    MODELS,
    PACKAGES,
    SESSIONS,
    Entity("rounds", "round", Collection.ROUNDS, RoundObject),
    Entity("runs", "run", Collection.RUNS, RunObject),
    Entity("statuses", "status", Collection.STATUSES, StatusObject),
    Entity("validations", "validation", Collection.VALIDATIONS, ValidationObject),
    Entity(
        "predictions",
        "prediction",
        Collection.PREDICTIONS,
        PredictionObject,
        ARE_PREDICTIONS,
        shared_id="prediction_id",
    ),
    Entity("metrics", "metric", Collection.METRICS, MetricObject),
    ATTRIBUTES,
    TELEMETRY,
)

Shape = TypeVar("Shape", bound=Stored)


class Page(BaseModel, Generic[Shape]):
    """Exactly these two keys in this order: FEDn's CLI unpacks the values by position."""

    count: int = Field(description="all that match, whatever the page")
    result: list[Shape]


class Message(BaseModel):
    message: str


class Failure(BaseModel):
    """`message` begins with the name of the field that is wrong, if one is."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"message": "round_timeout: missing"}]})

    message: str
    success: Literal[False] | None = None
    status: str | None = Field(None, description='"retry": ask again in a few seconds')
    incident: str | None = Field(None, description="500 only: the id under which the server logged what happened")


class Gone(BaseModel):
    error: str


class Assignment(BaseModel):
    status: Literal["assigned"]
    host: str
    fqdn: str | None
    package: str
    ip: str
    port: int
    tls: bool  # of the port; not FEDn's
    helper_type: str
    client_id: str


class ClientConfig(BaseModel):
    network_id: str
    discover_host: str
    discover_port: int
    checksum: str | None = Field(None, description="of the active package, if one is")


class ModelAdded(BaseModel):
    success: Literal[True]
    message: str
    model_id: str


class PackageAdded(BaseModel):
    message: str
    package_id: str
    storage_file_name: str
    checksum: str = Field(description="SHA-256")


class Checksum(BaseModel):
    message: str
    checksum: str | None


class CurrentAttributes(RootModel[dict[str, dict[str, str] | str]]):
    """By client_id: its attributes, or a sentence if there is no such client."""


class Parameters(BaseModel):
    array: list[Any] = Field(description="one nested list for each array of the model, in order")


class Explanation(BaseModel):
    session_id: str
    sentences: list[str]


class ControllerStatus(BaseModel):
    state: Literal["idle", "monitoring"] = Field(description="monitoring: a session is running")


class Readiness(BaseModel):
    ready: bool
    reason: str | None = None


class ClientCount(BaseModel):
    id: str = Field(description="the combiner's name")
    count: int


class ClientsPerCombiner(BaseModel):
    result: list[ClientCount]
