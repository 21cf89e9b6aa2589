"""Long random walks under all the laws: they reach what short examples do not. A seed that fails fails again."""

from __future__ import annotations

import pytest

from fl_server.core.model import Status, Verdict
from tests.core.walk import walk, walk_two


@pytest.mark.parametrize("hundred", range(5))
def test_a_hundred_walks_keep_all_laws(hundred: int) -> None:
    for seed in range(100 * hundred, 100 * hundred + 100):
        walk(seed)


def test_walks_with_two_sessions_at_once_keep_all_laws() -> None:
    for seed in range(50):
        walk_two(seed)


def test_the_walks_reach_commits_losses_every_status_and_every_verdict() -> None:
    """Laws that are never put to the test hold easily."""
    worlds = [walk(seed) for seed in range(200)]
    assert sum(len(world.ledger.committed) for world in worlds) > 200
    assert sum(len(world.ledger.lost) for world in worlds) > 50
    assert {world.session.record.status for world in worlds} == set(Status) - {Status.CREATED}
    assert set(Verdict) <= {reply for world in worlds for reply in world.ledger.answered.values()}


@pytest.mark.long
@pytest.mark.parametrize("thousand", range(1, 16))
def test_a_thousand_walks_keep_all_laws(thousand: int) -> None:
    for seed in range(1000 * thousand, 1000 * thousand + 1000):
        walk(seed)
        if seed % 10 == 0:
            walk_two(seed)
