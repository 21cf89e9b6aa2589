"""The REST API over a real scheduler and the embedded stores, in process: no port, no client on the wire."""

from __future__ import annotations

import io
import itertools
import tarfile
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI

from fl_server.core.model import ClientId
from fl_server.rest.app import create_app
from fl_server.rest.bodies import Desk
from fl_server.rest.clients import Advertised
from fl_server.rest.schemas import ENTITIES
from fl_server.scheduler.aggregation import Workshop
from fl_server.scheduler.in_flight import InFlight
from fl_server.scheduler.packages import Packages
from fl_server.scheduler.scheduler import Patience, Scheduler
from fl_server.store.files import FileBlobStore
from fl_server.store.ports import Collection
from fl_server.store.spool import Spool
from fl_server.store.sqlite import SqliteStateStore

MAX_MODEL_BYTES = 1 << 20
MAX_PACKAGE_BYTES = 1 << 18
MAX_UNPACKED_BYTES = 1 << 20
NOW = 1_795_485_241.0  # Tue, 24 Nov 2026 01:54:01 GMT


@dataclass(frozen=True)
class Api:
    http: httpx.AsyncClient
    app: FastAPI
    scheduler: Scheduler
    packages: Packages
    folder: Path  # where uploads lie while they are checked

    async def seed(self, **fields: Any) -> str:
        answer = await self.http.post("/api/v1/models/", files={"file": ("seed.npz", npz(np.zeros(3)))}, data=fields)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["model_id"])

    async def session(self, **config: Any) -> dict[str, Any]:
        wanted = {"model_id": await self.seed(), **config}
        answer = await self.http.post("/api/v1/sessions/", json={"name": "s", "session_config": wanted})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    async def package(self, name: str = "package.tgz", **fields: str) -> dict[str, Any]:
        form = {"name": "digits", "helper": "numpyhelper", "description": "", **fields}
        answer = await self.http.post("/api/v1/packages/", files={"file": (name, tgz())}, data=form)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def attach(self, *names: str) -> None:
        for name in names:
            await self.scheduler.attach(ClientId(name), name, "peer")

    async def counts(self) -> dict[str, int]:
        return {entity.noun: await self.scheduler.store.count(entity.collection) for entity in ENTITIES}

    async def insert(self, collection: Collection, **document: Any) -> None:
        stored = {"committed_at": NOW, "updated_at": NOW, **document, "fl": {"version": 1}}
        assert await self.scheduler.store.insert(collection, stored)


@asynccontextmanager
async def serving(
    folder: Path, *, raise_app_exceptions: bool = True, patience: Patience | None = None, **door: Any
) -> AsyncIterator[Api]:
    """May be called again on the same folder: a restart. door: gate, url_prefix, pace of create_app."""
    with ExitStack() as stack:
        state, disk, kernel = (stack.enter_context(ThreadPoolExecutor(threads)) for threads in (1, 2, 1))
        store = SqliteStateStore(folder / "state.sqlite", state)
        models, updates, archives = (FileBlobStore(folder / name, disk) for name in ("models", "updates", "packages"))
        spool = Spool(folder / "spool", disk, max_bytes=1 << 30)
        uploads = folder / "work"
        uploads.mkdir(exist_ok=True)
        await store.open("test")
        for opened in (models, updates, archives, spool):
            await opened.open()
        seconds = itertools.count(1000 * len(list(folder.glob("life-*"))))
        (folder / f"life-{uuid.uuid4()}").touch()
        workshop = Workshop(models, spool, kernel, uploads, MAX_MODEL_BYTES)

        def clock() -> float:
            return NOW + next(seconds)

        scheduler = Scheduler(store, workshop, updates, clock, patience)
        packages = Packages(store, archives, scheduler.insist, clock)
        desk = Desk(
            uploads, kernel, disk, MAX_MODEL_BYTES, MAX_PACKAGE_BYTES, MAX_UNPACKED_BYTES, InFlight(1 << 30, 1.0)
        )
        async with scheduler.running(), packages.running():
            at = Advertised("combiner.example", 12080)
            app = create_app(scheduler, packages, desk, advertise=lambda: at, **door)
            transport = httpx.ASGITransport(app, raise_app_exceptions=raise_app_exceptions, client=("10.1.2.3", 4711))
            async with httpx.AsyncClient(transport=transport, base_url="http://server:8092") as http:
                yield Api(http, app, scheduler, packages, uploads)
        await store.close()


def tgz(mode: str = "w:gz", **files: bytes) -> bytes:
    """A compute package; a name's "_" stands for a dot."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in {"fedn_yaml": b"entry_points: {}\n", **files}.items():
            info = tarfile.TarInfo(f"client/{name.replace('_', '.')}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def npz(*arrays: np.ndarray, **named: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez(out, *arrays, **named)  # type: ignore[arg-type]
    return out.getvalue()
