"""Fold and Aggregate carried out on real files: the model is a function of the set, and losses are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_client.wire import codec
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
from fl_server.errors import Unavailable
from fl_server.scheduler.aggregation import Aggregation, Workshop
from fl_server.store.files import FileBlobStore
from fl_server.store.spool import Spool

SEED = GlobalModel(ModelId("seed"))


class Bench:
    """An aggregation with real stores and no session."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor, config: SessionConfig) -> None:
        self.models, self.spool = FileBlobStore(folder / "models", pool), Spool(folder / "spool", pool, max_bytes=10**9)
        work = folder / "work"
        work.mkdir()
        self.told: asyncio.Queue[Event] = asyncio.Queue()
        self.tries = 0  # that may be Unavailable
        workshop = Workshop(self.models, self.spool, pool, work, 10**9)
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
        upload = await self.spool.begin(client, f"u-{client}")
        await upload.write(codec.encode(arrays))
        task = Task(SessionId("s"), 1, attempt, TaskKind.TRAIN, ClientId(client))
        update = ModelUpdate(UpdateId(f"u-{client}"), await upload.finish(), num_examples)
        return Report(task, update, Verdict.ACCEPTED)

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


async def test_what_was_folded_early_is_dropped_when_another_set_is_aggregated(bench: Bench) -> None:
    a, b, c = [await bench.report(client, *arrays(10.0**power)) for power, client in enumerate("abc")]
    _, parameters = await bench.model(Fold(a), Fold(b), Fold(c), Aggregate(SEED, 1, 1, (a, c)))
    assert parameters[0].tolist() == [50.5] * 3


async def test_folding_early_gives_the_same_model_as_folding_at_the_close(bench: Bench) -> None:
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


async def test_an_abandoned_attempt_leaves_no_sum_in_memory(bench: Bench) -> None:
    a = await bench.report("a", *arrays(1.0))
    barrier = Aggregate(GlobalModel(ModelId("gone")), 1, 2, ())  # told without touching a sum, after all before it
    await bench.outcome(Fold(a), barrier)
    assert bench.aggregation._mean.num_updates == 1
    bench.aggregation.abandon(Discard(1, 1, ()))
    await bench.outcome(barrier)
    assert bench.aggregation._mean.num_updates == 0


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
