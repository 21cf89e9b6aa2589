"""The laws of design.md, section 4, over every history that hypothesis can think of.

Each law is an assertion, with its number, in ledger.py and world.py; a history must keep all of them at once.
"""

from __future__ import annotations

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fl_server.core.events import (
    Aggregate,
    Effect,
    Fold,
    Recovered,
    SaveReport,
    StartRequested,
    UpdateReceived,
)
from fl_server.core.model import (
    CallId,
    ClientId,
    GlobalModel,
    ModelId,
    ModelUpdate,
    Report,
    SessionConfig,
    SessionId,
    SessionRecord,
    Task,
    TaskKind,
    UpdateId,
)
from fl_server.core.session import Session, step
from tests.core.walk import History, begin, live, live_together, some_config
from tests.core.world import OPS, World

configs = st.randoms(use_true_random=False).map(some_config)
_choice = st.integers(0, 59)
_happening = st.tuples(st.sampled_from(OPS), _choice, _choice)
histories = st.lists(_happening, max_size=60)
_slow = settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
_slower = settings(_slow, max_examples=300)


@_slow
@given(configs, histories)
def test_laws_1_2_3_4_8_and_9_hold_after_every_step_of_every_history(config: SessionConfig, history: History) -> None:
    world = World(config)
    begin(world)
    for happening in history:
        world.do(*happening)


@_slower
@given(configs, histories)
def test_law_5_replaying_the_events_of_a_life_gives_the_same_state_and_effects(
    config: SessionConfig, history: History
) -> None:
    world = World(config)
    begin(world)
    for happening in history:
        world.do(*happening)
    world.check_replay()


@_slower
@given(configs, histories, st.booleans())
def test_law_6_every_verdict_is_the_same_when_asked_again_after_a_restart_and_after_the_end(
    config: SessionConfig, history: History, restarted: bool
) -> None:
    world = live(World(config), history)
    if restarted:
        world.crash()
        world.check_every_verdict_again()
    world.do("stop", 0, 0)
    world.check_every_verdict_again()


@settings(max_examples=200, deadline=None)
@given(st.permutations(range(6)), st.sets(st.integers(0, 5), max_size=2), st.integers(0, 6))
def test_law_7_what_is_aggregated_depends_on_the_set_of_accepted_updates_alone(
    order: list[int], rejected: set[int], crash_after: int
) -> None:
    """Any order of arrival, a crash anywhere: the same reports in the same order, and folds are a prefix of them."""
    aggregated, folds = _one_round(order, rejected, crash_after)
    in_order, _ = _one_round(list(range(6)), rejected, crash_after=99)
    assert aggregated == in_order == [f"u{i}" for i in range(6) if i not in rejected], "7: set and order"
    assert folds == aggregated[: len(folds)], "7: what is folded early is a prefix"
    assert crash_after < 6 or len(folds) == len(aggregated), "7: without a crash all are folded when all are there"


def _one_round(order: list[int], rejected: set[int], crash_after: int) -> tuple[list[str], list[str]]:
    """The updates that Aggregate names, and those that were folded since the crash."""
    ids = [ClientId(f"c{i}") for i in range(6)]
    session = Session(SessionRecord(SessionId("s"), SessionConfig(rounds=1), 7, GlobalModel(ModelId("seed"))))
    effects = step(session, StartRequested(CallId(0), tuple(ids)), 0.0)
    saved: list[Report] = []
    folds: list[str] = []
    for count, i in enumerate(order):
        assert session.round
        if count == crash_after:
            session = Session.from_records(session.record, session.round.record, saved, set())
            step(session, Recovered(()), 1.0)
            folds = []
        task = Task(SessionId("s"), 1, 1, TaskKind.TRAIN, ids[i])
        update = ModelUpdate(UpdateId(f"u{i}"), f"b{i}", 1)
        effects = step(session, UpdateReceived(CallId(i), task, update, "NaN" if i in rejected else None), 1.0)
        saved += [effect.report for effect in effects if isinstance(effect, SaveReport)]
        folds += [effect.report.update.update_id for effect in effects if isinstance(effect, Fold)]
    return _aggregated(effects), folds


def _aggregated(effects: list[Effect]) -> list[str]:
    return [r.update.update_id for effect in effects if isinstance(effect, Aggregate) for r in effect.reports]


@_slower
@given(st.tuples(configs, configs), st.tuples(histories, histories), st.integers(0, 9))
def test_two_sessions_at_once_each_do_what_they_do_alone(
    both: tuple[SessionConfig, SessionConfig], their_histories: tuple[History, History], seed: int
) -> None:
    """The shell adds streams and threads that sessions share: tests/server holds the same law against those."""
    live_together(both, their_histories, seed)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(0, 30))
def test_a_cohort_follows_from_the_set_of_clients_and_the_seed(seed: int, attached: int, size: int) -> None:
    from_one_order = [ClientId(f"c{i}") for i in range(attached)]
    from_another = random.Random(seed).sample(from_one_order, attached)
    config = SessionConfig(rounds=1, requested_clients=size)
    cohorts = []
    for clients in (from_one_order, from_another):
        session = Session(SessionRecord(SessionId("s"), config, seed, GlobalModel(ModelId("seed"))))
        step(session, StartRequested(CallId(0), tuple(clients)), 0.0)
        assert session.round
        cohorts.append(session.round.record.cohort)
    assert cohorts[0] == cohorts[1] == tuple(sorted(cohorts[0]))
    assert len(cohorts[0]) == (min(size, attached) if size else attached)
