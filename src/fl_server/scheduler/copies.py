"""The copies that keep an accepted update when its host is lost (durability "site"): in the BlobStore `updates`.

A copy is put before the update is accepted, and fetched when the spool has lost its file. It lies where an update is
kept whose session does not want it deleted, under the same key: who keeps them leaves it there.
"""

from __future__ import annotations

from collections.abc import Iterable

from fl_server.core.model import Report, SessionId, Task
from fl_server.errors import Missing
from fl_server.store.ports import BlobStore
from fl_server.store.spool import Spool


def key_of(session: SessionId, round: int, attempt: int, blob: str) -> str:
    return f"{session}-{round}-{attempt}-{blob}"


def session_and_blob(key: str) -> tuple[str, str] | None:
    """None: it is no key of ours."""
    match key.rsplit("-", 3):
        case [session, _, _, blob]:
            return session, blob
        case _:
            return None


class Copies:
    """Methods raise Unavailable, and may be repeated."""

    def __init__(self, updates: BlobStore, spool: Spool) -> None:
        self._updates, self._spool = updates, spool

    async def add(self, task: Task, blob: str) -> None:
        """Raises Missing if the spool has lost the file."""
        key = key_of(task.session, task.round, task.attempt, blob)
        async with self._spool.linked(blob) as file:
            await self._updates.put_file(key, file)

    async def fetch(self, report: Report) -> bool:
        """Puts the file of an accepted update back into the spool; False if there is no copy."""
        task, blob = report.task, report.update.blob
        try:
            copy = await self._updates.local(key_of(task.session, task.round, task.attempt, blob))
            await self._spool.restore(blob, copy)
        except Missing:
            return False
        return True

    async def delete(self, session: SessionId, round: int, attempt: int, blobs: Iterable[str]) -> None:
        await self._updates.delete([key_of(session, round, attempt, blob) for blob in blobs if blob])
