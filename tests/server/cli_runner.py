"""Runs flserve's commands against a server that the test itself keeps: typer's runner, in a thread."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from typer.testing import CliRunner

from fl_server.cli import app

WAIT_S = 60.0


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def rows(self) -> list[list[str]]:
        """A table's cells, its heading first; cells are two blanks apart."""
        return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in self.out.splitlines()]


def run(*arguments: object, api_url: str = "http://127.0.0.1:1") -> Said:
    environment = {"FL_API_URL": api_url, "FL_TOKEN": None, "COLUMNS": "200"}
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Said(result.exit_code, result.stdout, result.stderr)


@dataclass(frozen=True)
class Terminal:
    api_url: str

    async def __call__(self, *arguments: object) -> Said:
        async with asyncio.timeout(WAIT_S):
            return await asyncio.to_thread(run, *arguments, api_url=self.api_url)

    async def json(self, *arguments: object) -> Any:
        said = await self(*arguments, "--format", "json")
        assert said.code == 0, said.err
        return said.json
