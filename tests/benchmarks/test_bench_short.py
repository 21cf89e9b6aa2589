"""The benchmark's short form: our rounds beside the limit's in the same run, so that a regression of 3x is seen.

No absolute time is looked at; the bounds are three times what a loaded machine shows today.
"""

from __future__ import annotations

import pytest

from benchmarks.rounds import Row, line, measure, ratio

pytestmark = pytest.mark.long


@pytest.mark.parametrize(
    ("row", "most"),
    [(Row(0.1, 10, 15, None), 15.0), (Row(1, 20, 8, None), 10.0), (Row(0.01, 100, 6, None), 15.0)],
    ids=lambda value: value.name if isinstance(value, Row) else None,
)
async def test_a_round_takes_no_more_than_a_multiple_of_the_limits(
    row: Row, most: float, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = await measure(row, turns=3, subjects=("limit", "fedn"))
    with capsys.disabled():
        print(f"\n{line(row, measured)}")
    assert ratio(measured, "fedn", "limit") <= most
