"""As test_every_call_on_services.py, where the process dies after the call has had its effect: nobody hears of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.on_services import OnServices


@pytest.mark.long
def test_the_process_dies_after_its_kth_call_on_mongodb_and_s3(on_services: OnServices, tmp_path: Path) -> None:
    on_services.dies_at(range(1, on_services.calls), after=True, folder=tmp_path)
