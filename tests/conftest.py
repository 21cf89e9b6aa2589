"""A real MongoDB and a real S3 server, one each for the whole run, started when the first test asks for it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from fl_server.services import Mongod, Weed
from fl_server.store.s3 import S3
from tests.leaks import pytest_configure, pytest_runtest_teardown

__all__ = ["mongo_url", "pytest_configure", "pytest_runtest_teardown", "s3_server"]  # the hooks look for secrets

settings.register_profile("no clock", deadline=None)  # a busy machine is no fault
settings.load_profile("no clock")


@pytest.fixture(scope="session")
def mongo_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if url := os.environ.get("FL_TEST_MONGO_URL"):
        yield url
        return
    mongod = Mongod(tmp_path_factory.mktemp("mongod"))
    asyncio.run(mongod.start())
    yield mongod.url
    asyncio.run(mongod.kill())


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    if url := os.environ.get("FL_TEST_S3_URL"):
        yield S3(url, os.environ.get("FL_TEST_S3_ACCESS_KEY", ""), os.environ.get("FL_TEST_S3_SECRET_KEY", ""))
        return
    weed = Weed(tmp_path_factory.mktemp("weed"))
    asyncio.run(weed.start())
    yield S3(weed.url, weed.access_key, weed.secret_key)
    asyncio.run(weed.kill())


@pytest.fixture(autouse=True)
def logs_go_where_they_went() -> Iterator[None]:
    """A command that is run in this process sets its own logging up, for a standard error that is closed with it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
