"""The real process killed with SIGKILL under a session with real client processes: it resumes by itself, the number
of committed rounds is exact, and the final model is the undisturbed run's, byte for byte."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.crash.processes import federation


async def test_killed_three_times_in_one_session(undisturbed: bytes, shards: Path, seed: bytes, tmp_path: Path) -> None:
    model, killed = await federation(tmp_path / "run", shards, seed, [9, 12, 15])
    assert killed == 3
    assert model == undisturbed


@pytest.mark.long
async def test_killed_at_twenty_points(undisturbed: bytes, shards: Path, seed: bytes, tmp_path: Path) -> None:
    draw = random.Random(20)
    for index, point in enumerate(sorted(draw.sample(range(3, 60), 20))):
        model, killed = await federation(tmp_path / str(index), shards, seed, [point])
        assert killed == 1, f"event {point} did not come"
        assert model == undisturbed, f"killed after event {point}"
