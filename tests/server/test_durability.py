"""durability = "site": accepted updates survive the loss of the spool, as when a standby elsewhere takes over."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from fl_server.core.model import SessionId
from fl_server.errors import Unavailable
from fl_server.scheduler.copies import key_of
from tests.server.virtual_world import World, world
from tests.virtual import virtual_loop


async def copies_of(made: World) -> list[str]:
    return [key for key, _ in await made.scheduler.updates.keys()]


def two_lives(folder: Path, *, site: bool, **config: Any) -> tuple[float, dict[str, int], list[str]]:
    """a's update of 2 is accepted, the spool is lost, b's is 4, and so is a's if it is asked again.

    The model; how many tasks each client got in the second life; the copies at its end.
    """

    async def first() -> str:
        async with world(folder, site=site) as made:
            a, _ = await made.clients("a", "b")
            session = await made.started(min_clients=2, **config)
            assert await a.train(await a.task(), 2.0) == "ACCEPTED"
            return session

    async def second(session: str) -> tuple[float, dict[str, int], list[str]]:
        told: dict[str, int] = {"a": 0, "b": 0}
        async with world(folder, site=site) as made, asyncio.TaskGroup() as working:

            async def work(client: Any) -> None:
                while True:
                    task = await client.task()
                    told[client.id] += 1
                    assert await client.train(task, 4.0) == "ACCEPTED"

            busy = [working.create_task(work(client)) for client in await made.clients("a", "b")]
            value = await made.result(session)
            for task in busy:
                task.cancel()
            await asyncio.sleep(1)  # virtual: what the round leaves is cleared beside it
            return value, told, await copies_of(made)

    with virtual_loop() as loop:
        session = loop.run_until_complete(first())
    shutil.rmtree(folder / "spool")
    with virtual_loop() as loop:
        return loop.run_until_complete(second(session))


def test_with_site_a_lost_spool_changes_nothing(tmp_path: Path) -> None:
    assert two_lives(tmp_path, site=True) == (3.0, {"a": 0, "b": 1}, [])


def test_without_site_the_client_whose_update_is_lost_is_asked_again(tmp_path: Path) -> None:
    assert two_lives(tmp_path, site=False) == (4.0, {"a": 1, "b": 1}, [])


def test_a_session_that_keeps_its_updates_keeps_their_copies(tmp_path: Path) -> None:
    value, _, copies = two_lives(tmp_path, site=True, delete_models_storage=False)
    assert (value, len(copies)) == (3.0, 2)


def test_a_file_that_the_spool_loses_in_the_round_is_fetched(tmp_path: Path) -> None:
    async def story() -> float:
        async with world(tmp_path, site=True) as made:
            a, b = await made.clients("a", "b")
            session = await made.started(min_clients=2)
            assert await a.train(await a.task(), 2.0) == "ACCEPTED"
            for file in (tmp_path / "spool").iterdir():
                file.unlink()
            assert await b.train(await b.task(), 4.0) == "ACCEPTED"
            return await made.result(session)

    with virtual_loop() as loop:
        assert loop.run_until_complete(story()) == 3.0


def test_no_update_is_accepted_before_its_copy_is_there(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path, site=True) as made:
            [client] = await made.clients("a")
            session = await made.started()
            put_file, is_away = made.scheduler.updates.put_file, True

            async def put(key: str, path: Path) -> None:
                if is_away:
                    raise Unavailable("the test has sent it away")
                await put_file(key, path)

            made.scheduler.updates.put_file = put  # type: ignore[method-assign]
            task = await client.task()
            with pytest.raises((TimeoutError, Unavailable)):
                await client.train(task, 2.0)
            is_away = False
            assert await client.train(task, 6.0) == "ACCEPTED"
            assert await made.result(session) == 6.0

    with virtual_loop() as loop:
        loop.run_until_complete(story())


def test_old_copies_that_nothing_counts_on_are_swept(tmp_path: Path) -> None:
    async def story() -> tuple[list[str], list[str]]:
        async with world(tmp_path, site=True) as made:
            a, _ = await made.clients("a", "b")
            session = SessionId(await made.started(min_clients=2, round_timeout_s=10**6))
            assert await a.train(await a.task(), 2.0) == "ACCEPTED"
            counted = await copies_of(made)
            await made.scheduler.updates.put(key_of(session, 1, 1, "0" * 32 + "." + "0" * 20), b"a duplicate's")
            made.clock_is_off_s = 4_000_000_000.0  # files have real times: all are old by this clock
            await asyncio.sleep(3600)
            return counted, await copies_of(made)

    with virtual_loop() as loop:
        counted, left = loop.run_until_complete(story())
    assert left == counted
