"""What the floors above may ask of a store: small documents with conditional writes, and large bytes by key.

Documents are FEDn's, by its collection and field names, so that whoever looks into the database finds what FEDn's
guide promises; what is ours lies in one sub-document `fl`. Every write may be repeated: a document is written only
over a lower version, an appended one only once under its id. So a write whose outcome is unknown is simply written
again, and a late one never undoes a newer one.

Every method raises Unavailable when the store is away or its answer did not come; then it may have happened.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol

Document = dict[str, Any]  # JSON: what a document holds is decided above


class Collection(StrEnum):
    """FEDn's collections."""

    CLIENTS = "network.clients"
    COMBINERS = "network.combiners"
    MODELS = "control.model"
    PACKAGES = "control.packages"
    SESSIONS = "control.sessions"
    ROUNDS = "control.rounds"
    RUNS = "control.training_runs"
    STATUSES = "control.status"
    VALIDATIONS = "control.validations"
    PREDICTIONS = "control.predictions"
    METRICS = "control.metrics"
    ATTRIBUTES = "control.attributes"
    TELEMETRY = "control.telemetry"


ID_FIELD: Mapping[Collection, str] = {
    Collection.CLIENTS: "client_id",
    Collection.COMBINERS: "combiner_id",
    Collection.MODELS: "model",  # FEDn stores no model_id
    Collection.PACKAGES: "package_id",
    Collection.SESSIONS: "session_id",
    Collection.ROUNDS: "round_id",
    Collection.RUNS: "run_id",
    Collection.STATUSES: "status_id",
    Collection.VALIDATIONS: "validation_id",
    Collection.PREDICTIONS: "record_id",  # ours: FEDn's, prediction_id, is shared by the clients of a run
    Collection.METRICS: "metric_id",
    Collection.ATTRIBUTES: "attribute_id",
    Collection.TELEMETRY: "telemetry_id",
}

# What lists are filtered by and is worth an index; each also has the default order of lists, committed_at.
INDEXED: Mapping[Collection, tuple[str, ...]] = {
    Collection.CLIENTS: ("client_id", "name", "status", "combiner"),
    Collection.COMBINERS: ("name",),
    Collection.MODELS: ("session_id", "parent_model", "name"),
    Collection.PACKAGES: (),
    Collection.SESSIONS: ("name", "status"),
    Collection.ROUNDS: ("round_config.session_id", "round_config.model_id", "fl.session", "status"),
    Collection.RUNS: ("session_id",),
    Collection.STATUSES: ("session_id", "sender.name", "type", "correlation_id"),
    Collection.VALIDATIONS: ("session_id", "model_id", "correlation_id", "sender.name"),
    Collection.PREDICTIONS: ("fl.open", "prediction_id", "model_id", "correlation_id", "sender.name"),
    Collection.METRICS: ("session_id", "model_id", "key", "sender.name"),
    Collection.ATTRIBUTES: ("sender.client_id", "sender.name", "key"),
    Collection.TELEMETRY: ("sender.client_id", "sender.name", "key"),
}

Operator = Literal["eq", "ne", "lt", "lte", "gt", "gte", "in"]


@dataclass(frozen=True, slots=True)
class Condition:
    """`field` may be dotted ("sender.name"). `value`: for "in" a tuple of scalars, else one scalar; None matches a
    field that is null or absent (eq), or is neither (ne). A number and the text of it are different values."""

    field: str
    op: Operator
    value: str | int | float | bool | tuple[str | int | float | bool | None, ...] | None


@dataclass(frozen=True, slots=True)
class Query:
    """`sort`: (field, descending) pairs; what ties after them is in the order of first insertion (reversed when the
    last pair descends), so that pages never overlap. No sort: order of first insertion. `limit` 0: all."""

    where: tuple[Condition, ...] = ()
    sort: tuple[tuple[str, bool], ...] = ()
    skip: int = 0
    limit: int = 0


# ---- writes, as save() takes them


@dataclass(frozen=True, slots=True)
class Put:
    """The whole document, written only where none is stored or the stored `fl.version` is lower than the document's.

    Losing to a stored version >= its own is success: only we write, so a repeated or late write changes nothing.
    """

    collection: Collection
    document: Document  # holds its id under ID_FIELD, and fl.version


@dataclass(frozen=True, slots=True)
class Patch:
    """Sets fields (dotted names reach into sub-documents) of a document that exists; does nothing where none does."""

    collection: Collection
    id: str
    changes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PutReport:
    """A report of the round with this id, by (client, update_id): written over an earlier one with a lower seq.

    The reports of one round that follow each other in one save are one atomic write.
    """

    round_id: str
    client: str
    update_id: str
    seq: int
    report: Document


Write = Put | Patch | PutReport


class StateStore(Protocol):
    async def open(self, owner: str, *, standby: bool = False) -> None:
        """Becomes the store's one owner, under this name, until close() or the death of the process.

        Raises Owned, naming the other, if another process owns it (standby: waits until it does not); Corrupt if its
        schema is newer than ours.
        """

    async def keep(self) -> None:
        """Renews the ownership until it is cancelled; without it, writes are soon refused as Unavailable.

        Raises Deposed when another process has taken the store over; from then on every write does.
        """

    async def close(self) -> None: ...

    async def save(self, writes: Sequence[Write]) -> None:
        """All of them, in this order; returns once they are durable. Saving again is saving once.

        One transaction where the store has it; where it has not, a crash in between leaves a prefix of them.
        """

    async def insert(self, collection: Collection, document: Document) -> bool:
        """False, and nothing is changed, if its id exists."""

    async def append(self, collection: Collection, documents: Sequence[Document]) -> None:
        """Those whose id exists are left as they are: sent twice is stored once."""

    async def get(self, collection: Collection, id: str) -> Document | None: ...

    async def find(self, collection: Collection, query: Query) -> list[Document]: ...

    async def count(self, collection: Collection, where: tuple[Condition, ...] = ()) -> int: ...

    async def delete(self, collection: Collection, id: str) -> bool:
        """False if there was none."""

    async def delete_where(self, collection: Collection, where: tuple[Condition, ...], limit: int) -> int:
        """Of those that match, `limit` at most, the first inserted first. How many went; fewer: there are no more."""

    async def reports(self, round_id: str, client: str | None = None) -> list[Document]:
        """Of one round, or of one client in it, by seq."""


class BlobStore(Protocol):
    """Bytes by key. Keys are ours ([A-Za-z0-9._-]+); a model's depends on its bytes, so other bytes never overwrite."""

    async def put(self, key: str, data: bytes) -> None:
        """Returns once durable; readers see all of it or nothing."""

    async def put_file(self, key: str, path: Path) -> None:
        """As put, from a local file, which is gone afterwards: moved where that is possible.

        Repeating it after an unknown outcome is allowed while either the file or the blob is there.
        """

    async def local(self, key: str) -> Path:
        """The bytes as a local file, for reading only. Raises Missing."""

    async def get(self, key: str) -> bytes:
        """Raises Missing."""

    async def size_bytes(self, key: str) -> int | None:
        """None if there is none."""

    async def delete(self, keys: Iterable[str]) -> None:
        """Those that do not exist are passed over."""

    async def keys(self) -> list[tuple[str, float]]:
        """All keys, each with the time of its put, seconds since the epoch."""
