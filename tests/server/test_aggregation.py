"""Fold and Aggregate carried out on real files: the model is a function of the set, and losses are told."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_client.wire import codec
from fl_server.core.aggregate import STRIPE_ELEMENTS
from fl_server.core.events import Aggregate, Aggregated, Broken, Discard, EffectFailed, Event, Fold, UpdateLost
from fl_server.core.model import (
    ClientId,
    GlobalModel,
    ModelId,
    ModelUpdate,
    Report,
    SessionConfig,
    SessionId,
    Task,
    TaskKind,
    UpdateId,
    Verdict,
)
from fl_server.core.server_opt import FedAvg
from fl_server.errors import Unavailable
from fl_server.scheduler import aggregation
from fl_server.scheduler.aggregation import Aggregation, Workshop
from fl_server.store.files import FileBlobStore
from fl_server.store.spool import Spool

SEED = GlobalModel(ModelId("seed"))


class Bench:
    """An aggregation with real stores and no session."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor, config: SessionConfig) -> None:
        self.models, self.spool = (
            FileBlobStore(folder / "models", pool),
            Spool(folder / "spool", pool, max_bytes=10**9, small_bytes=0),
        )
        self.folder = folder / "work"
        self.folder.mkdir()
        self.told: asyncio.Queue[Event] = asyncio.Queue()
        self.tries = 0  # that may be Unavailable
        workshop = Workshop(self.models, self.spool, pool, self.folder, 10**9)
        self.aggregation = Aggregation(SessionId("s"), lambda: config, workshop, self.insist, self.told.put)

    async def insist(self, work: Any, *args: Any) -> Any:
        while True:
            try:
                return await work(*args)
            except Unavailable:
                if not self.tries:
                    raise
                self.tries -= 1

    async def report(self, client: str, *arrays: np.ndarray, num_examples: float = 1, attempt: int = 1) -> Report:
        return await self.send(client, codec.encode(arrays), num_examples, attempt)

    async def send(self, client: str, update: bytes, num_examples: float = 1, attempt: int = 1) -> Report:
        upload = await self.spool.begin(client, f"u-{client}")
        await upload.write(update)
        task = Task(SessionId("s"), 1, attempt, TaskKind.TRAIN, ClientId(client))
        sent = ModelUpdate(UpdateId(f"u-{client}"), await upload.finish(), num_examples)
        return Report(task, sent, Verdict.ACCEPTED)

    def keep_in_memory(self) -> None:
        """As the spool does with small uploads."""
        self.spool.content = lambda name: self.spool.path(name).read_bytes()  # type: ignore[method-assign]

    def forget(self) -> None:
        self.spool.content = self.spool.path  # type: ignore[method-assign]

    async def outcome(self, *orders: Fold | Aggregate) -> Event:
        for order in orders:
            self.aggregation.order(order)
        async with asyncio.timeout(30):
            return await self.told.get()

    async def model(self, *orders: Fold | Aggregate) -> tuple[GlobalModel, codec.Parameters]:
        event = await self.outcome(*orders)
        assert isinstance(event, Aggregated), event
        return event.model, codec.decode(await self.models.get(event.model.id))


@pytest.fixture
def config() -> SessionConfig:
    return SessionConfig(rounds=1)


@pytest.fixture
async def bench(tmp_path: Path, config: SessionConfig) -> AsyncIterator[Bench]:
    with ThreadPoolExecutor(1) as pool:
        made = Bench(tmp_path, pool, config)
        await made.models.open()
        await made.spool.open()
        await made.models.put("seed", codec.encode([np.zeros(3, np.float32), np.zeros((2, 2))]))
        running = asyncio.ensure_future(made.aggregation.run())
        yield made
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def arrays(value: float) -> tuple[np.ndarray, np.ndarray]:
    return np.full(3, value, np.float32), np.full((2, 2), value)


async def test_the_mean_is_weighted_by_examples_and_keeps_the_models_dtypes(bench: Bench) -> None:
    reports = (
        await bench.report("a", *arrays(1.0), num_examples=10),
        await bench.report("b", *arrays(4.0), num_examples=20),
    )
    model, parameters = await bench.model(Aggregate(SEED, 1, 1, reports))
    assert [array.dtype for array in parameters] == [np.float32, np.float64]
    assert all(np.array_equal(array, np.full(array.shape, 3.0)) for array in parameters)
    assert (model.round, model.attempt, model.parent, model.num_updates) == (1, 1, "seed", 2)


async def test_the_model_is_written_over_the_file_of_a_removed_upload(bench: Bench) -> None:
    values = np.arange(600_000, dtype=np.float32)
    await bench.models.put("seed", codec.encode([values]))
    gone = await bench.report("gone", np.arange(700_000, dtype=np.float32))
    number = bench.spool.path(gone.update.blob).stat().st_ino
    reports = (await bench.report("a", values), await bench.report("b", values * 3))
    fresh, _ = await bench.model(Aggregate(SEED, 1, 1, reports))
    mode = (await bench.models.local(fresh.id)).stat().st_mode
    await bench.spool.remove([gone.update.blob])
    made, parameters = await bench.model(Aggregate(SEED, 1, 1, reports))
    status = (await bench.models.local(made.id)).stat()
    assert made == fresh, "the id is made from the bytes"
    assert np.array_equal(parameters[0], values * 2)
    assert (status.st_ino, status.st_mode) == (number, mode)
    assert list(bench.folder.iterdir()) == []


async def test_a_spared_file_stays_nowhere_when_the_aggregation_fails(bench: Bench) -> None:
    values = np.arange(600_000, dtype=np.float32)
    await bench.models.put("seed", codec.encode([values]))
    gone, lost = await bench.report("gone", values), await bench.report("lost", values)
    await bench.spool.remove([gone.update.blob])
    bench.spool.path(lost.update.blob).unlink()
    assert isinstance(await bench.outcome(Aggregate(SEED, 1, 1, (lost,))), UpdateLost)
    assert [*bench.folder.iterdir(), *bench.spool.path(lost.update.blob).parent.glob("*.part")] == []


async def test_what_was_folded_early_is_dropped_when_another_set_is_aggregated(bench: Bench) -> None:
    a, b, c = [await bench.report(client, *arrays(10.0**power)) for power, client in enumerate("abc")]
    _, parameters = await bench.model(Fold(a), Fold(b), Fold(c), Aggregate(SEED, 1, 1, (a, c)))
    assert parameters[0].tolist() == [50.5] * 3


async def test_an_order_to_fold_early_changes_nothing(bench: Bench) -> None:
    draw = np.random.default_rng(3)
    reports = [await bench.report(client, *(a + draw.normal(size=a.shape) for a in arrays(0.1))) for client in "abcd"]
    early, _ = await bench.model(*map(Fold, reports[:3]), Aggregate(SEED, 1, 1, tuple(reports)))
    late, _ = await bench.model(Aggregate(SEED, 1, 1, tuple(reports)))
    assert early == late, "the id is made from the bytes"


async def test_a_fold_of_a_former_attempt_does_not_count_in_the_next(bench: Bench) -> None:
    old, new = await bench.report("a", *arrays(7.0)), await bench.report("b", *arrays(1.0), attempt=2)
    _, parameters = await bench.model(Fold(old), Aggregate(SEED, 1, 2, (new,)))
    assert parameters[0].tolist() == [1.0] * 3


async def test_an_update_that_is_gone_or_damaged_is_told_as_lost_and_the_others_aggregate_without_it(
    bench: Bench,
) -> None:
    a, b, c = [await bench.report(client, *arrays(power)) for power, client in enumerate("abc", 1)]
    bench.spool.path(b.update.blob).unlink()
    lost = await bench.outcome(Fold(a), Fold(b), Aggregate(SEED, 1, 1, (a, b, c)))
    assert isinstance(lost, UpdateLost)
    assert (lost.task, lost.update_id, lost.why) == (b.task, "u-b", "it is not in the spool")
    bench.spool.path(c.update.blob).write_bytes(b"PK\x03\x04 damaged")
    lost = await bench.outcome(Aggregate(SEED, 1, 1, (a, c)))
    assert isinstance(lost, UpdateLost)
    assert lost.task == c.task
    assert lost.why.startswith("its file is damaged: ")
    _, parameters = await bench.model(Aggregate(SEED, 1, 1, (a,)))
    assert parameters[0].tolist() == [1.0] * 3


async def test_a_global_model_that_is_gone_breaks_the_session(bench: Bench) -> None:
    event = await bench.outcome(Aggregate(GlobalModel(ModelId("gone")), 1, 1, (await bench.report("a", *arrays(1.0)),)))
    assert isinstance(event, Broken)
    assert "gone" in event.reason


async def test_a_sum_that_leaves_its_range_fails_the_attempt_with_a_reason(bench: Bench) -> None:
    huge = await bench.report("a", np.full(3, 1.0, np.float32), np.full((2, 2), 1e308), num_examples=1000)
    event = await bench.outcome(Aggregate(SEED, 1, 1, (huge,)))
    assert isinstance(event, EffectFailed)
    assert (event.round, event.attempt) == (1, 1)
    assert "FloatingPointError" in event.reason


async def test_an_abandoned_attempt_tells_nothing(bench: Bench) -> None:
    a, b = await bench.report("a", *arrays(1.0)), await bench.report("b", *arrays(2.0), attempt=2)
    bench.aggregation.abandon(Discard(1, 1, ()))
    model, _ = await bench.model(Aggregate(SEED, 1, 1, (a,)), Aggregate(SEED, 1, 2, (b,)))
    assert model.attempt == 2


async def test_an_update_that_cannot_be_summed_does_not_end_the_aggregation_when_it_is_folded_early(
    bench: Bench,
) -> None:
    huge = await bench.report("a", np.full(3, 1.0, np.float32), np.full((2, 2), 1e308), num_examples=1000)
    good = await bench.report("b", *arrays(2.0), attempt=2)
    _, parameters = await bench.model(Fold(huge), Aggregate(SEED, 1, 2, (good,)))
    assert parameters[0].tolist() == [2.0] * 3


async def test_a_global_model_that_vanishes_between_its_path_and_its_reading_is_asked_for_again(bench: Bench) -> None:
    """As from a cache, by another download."""
    bench.tries = 1
    local, asked = bench.models.local, 0

    async def vanishes(key: str) -> Path:
        nonlocal asked
        asked += 1
        path = await local(key)
        return path.with_name("evicted") if asked == 1 else path

    bench.models.local = vanishes  # type: ignore[method-assign]
    _, parameters = await bench.model(Aggregate(SEED, 1, 1, (await bench.report("a", *arrays(2.0)),)))
    assert parameters[0].tolist() == [2.0] * 3


@pytest.mark.parametrize("limit", ["MOST_FILES", "MOST_HELD_BYTES"])
async def test_updates_folded_in_groups_give_the_same_model(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """More than may be open, or more in memory than may be held, at once."""
    draw = np.random.default_rng(3)
    seven = [await bench.report(c, *(a + draw.normal(size=a.shape) for a in arrays(0.1))) for c in "abcdefg"]
    at_once, _ = await bench.model(Aggregate(SEED, 1, 1, tuple(seven)))
    if limit == "MOST_HELD_BYTES":
        bench.keep_in_memory()
    monkeypatch.setattr(aggregation, limit, 2 if limit == "MOST_FILES" else 1000)
    in_groups, _ = await bench.model(Aggregate(SEED, 1, 1, tuple(seven)))
    assert at_once == in_groups, "the id is made from the bytes"


async def test_the_form_in_which_an_update_was_sent_does_not_show_in_the_model(bench: Bench) -> None:
    """Stored or deflated, in Fortran order or in C, in memory or in a file."""
    draw = np.random.default_rng(3)
    updates = {client: [draw.normal(size=array.shape) for array in arrays(0)] for client in "abc"}

    def savez(save: Any, order: Any, given: list[np.ndarray]) -> bytes:
        out = io.BytesIO()
        save(out, *(np.asarray(array, order=order) for array in given))
        return out.getvalue()

    await bench.models.put("seed", savez(np.savez, "C", list(arrays(0))))
    made = set()
    for save in (np.savez, np.savez_compressed):
        for order in "CF":
            reports = [await bench.send(client, savez(save, order, given)) for client, given in updates.items()]
            made.add((await bench.model(Aggregate(SEED, 1, 1, tuple(reports))))[0].id)
            bench.keep_in_memory()
            made.add((await bench.model(Aggregate(SEED, 1, 1, tuple(reports))))[0].id)
            bench.forget()
    assert len(made) == 1


async def test_an_update_that_shrinks_or_vanishes_while_it_is_folded_is_told_as_lost_or_does_not_matter(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = np.ones(2 * STRIPE_ELEMENTS, np.float32)
    await bench.models.put("seed", codec.encode([big]))
    a, b = await bench.report("a", big), await bench.report("b", 3 * big)
    path, step = bench.spool.path(b.update.blob), FedAvg.step

    def once_begun(do: Callable[[], None]) -> None:
        def stepped(*given: Any) -> Any:
            if given[1][0].size:  # of a stripe
                do()
            return step(*given)

        monkeypatch.setattr(FedAvg, "step", stepped)

    once_begun(lambda: path.unlink(missing_ok=True))
    _, [mean] = await bench.model(Aggregate(SEED, 1, 1, (a, b)))
    assert np.all(mean == 2)
    path.write_bytes(codec.encode([big]))
    once_begun(lambda: os.truncate(path, 1000))
    lost = await bench.outcome(Aggregate(SEED, 1, 1, (a, b)))
    assert isinstance(lost, UpdateLost)
    assert (lost.task, lost.why) == (b.task, "its file is damaged: the file has become shorter while it was read")
    assert [left.name for left in bench.folder.iterdir()] == [], "a model that is half written"


async def test_an_update_of_another_layout_than_the_model_is_told_as_lost(bench: Bench) -> None:
    other = await bench.report("a", *arrays(1.0), np.zeros(2))
    lost = await bench.outcome(Aggregate(SEED, 1, 1, (other,)))
    assert isinstance(lost, UpdateLost)
    assert lost.why == "its file is damaged: 3 arrays, expected 2"


def test_results_come_in_order_whoever_made_them_and_whichever_thread_is_free() -> None:
    for free in range(4):
        with ThreadPoolExecutor(4) as pool:
            release = threading.Event()
            busy = [pool.submit(release.wait, 30) for _ in range(3 - free)]
            made = pool.submit(lambda: list(aggregation._in_order(pool, lambda number: number * 2, range(100)))).result(
                30
            )
            assert made == [item * 2 for item in range(100)]
            release.set()
            assert all(one.result(30) for one in busy)


def test_what_one_thread_raises_ends_the_work_of_all() -> None:
    def work(item: int) -> int:
        if item == 7:
            raise OSError("7")
        return item

    with ThreadPoolExecutor(2) as pool:
        made = aggregation._in_order(pool, work, range(100))
        with pytest.raises(OSError, match="7"):
            list(made)


class TestWithMoments:
    @pytest.fixture
    def config(self) -> SessionConfig:
        return SessionConfig(rounds=2, aggregator="fedopt", aggregator_kwargs={"learning_rate": 0.1})

    async def test_the_optimizers_moments_are_a_blob_that_the_next_round_starts_from(self, bench: Bench) -> None:
        """FEDn's own reference vectors for fedopt (adam), two rounds."""
        seed = [np.array([1.0, 2.0, 3.0]), np.array([[0.5]])]
        await bench.models.put("seed", codec.encode(seed))
        a = await bench.report("a", np.array([1.5, 2, 2]), np.array([[1.5]]), num_examples=10)
        b = await bench.report("b", np.array([0.5, 3, 4]), np.array([[0.0]]), num_examples=30)
        first, parameters = await bench.model(Aggregate(SEED, 1, 1, (a, b)))
        np.testing.assert_allclose(
            parameters[0], [0.9003991920670071, 2.099866756442037, 3.099800201991812], rtol=1e-12
        )
        assert first.optimizer_state
        _, parameters = await bench.model(Aggregate(first, 1, 2, (a, b)))
        np.testing.assert_allclose(
            parameters[0], [0.7716975664810344, 2.233621081999987, 3.2327512683722937], rtol=1e-12
        )
        np.testing.assert_allclose(parameters[1], [[0.292773027331885]], rtol=1e-12)
