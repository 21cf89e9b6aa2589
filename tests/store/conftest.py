from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import monitoring

from fl_server.store import mongo
from fl_server.store.ports import Document


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


class Listener(monitoring.CommandListener):
    def __init__(self) -> None:
        self.commands: list[Document] = []

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if event.command_name not in ("hello", "ping", "endSessions"):
            self.commands.append(dict(event.command))

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...

    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Document]:
    """The commands that stores send which are opened from here on, but for what keeps their connections."""
    listener = Listener()
    monkeypatch.setattr(mongo, "AsyncIOMotorClient", functools.partial(AsyncIOMotorClient, event_listeners=[listener]))
    return listener.commands
