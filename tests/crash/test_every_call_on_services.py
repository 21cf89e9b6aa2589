"""The k-th call again, with the state in a real mongod and the models in a real S3 server: the process dies before the
call has effect. After it has: test_every_call_on_services_after.py, a file of its own so that both run side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.on_services import OnServices


@pytest.mark.parametrize("step", [pytest.param(31, id="sample"), pytest.param(1, id="every", marks=pytest.mark.long)])
def test_the_process_dies_before_its_kth_call_on_mongodb_and_s3(
    on_services: OnServices, step: int, tmp_path: Path
) -> None:
    on_services.dies_at(range(9 if step > 1 else 1, on_services.calls, step), after=False, folder=tmp_path)
