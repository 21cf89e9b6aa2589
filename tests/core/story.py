"""Telling a story to the core: a session of clients c0, c1, … and a clock that the story sets."""

from __future__ import annotations

from typing import Any, TypeVar

from fl_server.core.events import Aggregated, ClientAttached, ClientDetached, Effect, StartRequested, UpdateReceived
from fl_server.core.model import (
    CallId,
    ClientId,
    GlobalModel,
    ModelId,
    ModelUpdate,
    SessionConfig,
    SessionId,
    SessionRecord,
    Task,
    TaskKind,
    UpdateId,
)
from fl_server.core.round import Round
from fl_server.core.session import Session, step

E = TypeVar("E", bound=Effect)


def created(**config: Any) -> Session:
    given = {"rounds": 2, "min_clients": 2, "validate": False, "round_retries": 1, **config}
    seed_model = GlobalModel(ModelId("seed"), optimizer_state="")
    return Session(SessionRecord(SessionId("s"), SessionConfig(**given), 7, seed_model))


def start(session: Session, clients: int = 3, at: float = 0.0, **request: Any) -> list[Effect]:
    return step(session, StartRequested(CallId(0), tuple(client(i) for i in range(clients)), **request), at)


def started(clients: int = 3, **config: Any) -> tuple[Session, list[Effect]]:
    session = created(**config)
    return session, start(session, clients)


def client(number: int) -> ClientId:
    return ClientId(f"c{number}")


def task(name: str, number: int = 1, attempt: int = 1, kind: TaskKind = TaskKind.TRAIN) -> Task:
    return Task(SessionId("s"), number, attempt, kind, ClientId(name))


def update(
    session: Session,
    name: str,
    update_id: str = "",
    fault: str | None = None,
    at: float = 1.0,
    number: int = 1,
    attempt: int = 1,
) -> list[Effect]:
    sent = ModelUpdate(UpdateId(update_id or f"u-{name}"), f"blob-{name}", 1)
    return step(session, UpdateReceived(CallId(1), task(name, number, attempt), sent, fault), at)


def updates(session: Session, *names: str, at: float = 1.0, number: int = 1) -> list[Effect]:
    """The effects of the last one."""
    effects: list[Effect] = []
    for name in names:
        effects = update(session, name, at=at, number=number)
    return effects


def attach(session: Session, name: str, at: float) -> list[Effect]:
    return step(session, ClientAttached(ClientId(name)), at)


def detach(session: Session, name: str, at: float) -> list[Effect]:
    return step(session, ClientDetached(ClientId(name)), at)


def aggregated(session: Session, at: float = 2.0) -> list[Effect]:
    record, count = running(session).record, running(session).accepted
    model_id = ModelId(f"m{record.number}")
    base = session.record.model.id
    return step(
        session, Aggregated(GlobalModel(model_id, record.number, record.attempt, base, "", count, "moments")), at
    )


def running(session: Session) -> Round:
    assert session.round
    return session.round


def kinds(effects: list[Effect]) -> list[str]:
    return [type(effect).__name__ for effect in effects]


def one(effects: list[Effect], kind: type[E]) -> E:
    """The first of its kind."""
    return next(effect for effect in effects if isinstance(effect, kind))
