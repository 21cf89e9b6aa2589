from collections.abc import AsyncIterator

import pytest

from tests.client.server_double import Combiner, running


@pytest.fixture
async def combiner() -> AsyncIterator[Combiner]:
    double = Combiner()
    async with running(double):
        yield double
