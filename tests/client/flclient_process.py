"""flclient as a process: started, listened to, and ended."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

WAIT_S = 60.0
COMMAND = (sys.executable, "-m", "fl_client.cli")


def clean_environment(cache: Path, **variables: str) -> dict[str, str]:
    """Ours and FEDn's variables are not those of whoever runs the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FL_", "FEDN_"))}
    return {**kept, "XDG_CACHE_HOME": str(cache), **variables}


class FlClient:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.lines: list[str] = []
        self._said = asyncio.Condition()
        self._ended = False

    async def listen(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            await self._note(line.decode().rstrip())
        await self._note(None)

    async def _note(self, line: str | None) -> None:
        async with self._said:
            if line is None:
                self._ended = True
            else:
                self.lines.append(line)
            self._said.notify_all()

    async def said(self, text: str) -> str:
        """The first line with this text, once it is there."""
        async with asyncio.timeout(WAIT_S), self._said:
            while not (found := [line for line in self.lines if text in line]):
                assert not self._ended, f"flclient never said {text!r}:\n" + "\n".join(self.lines)
                await self._said.wait()
        return found[0]

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def exit_code(self) -> int:
        async with asyncio.timeout(WAIT_S):
            return await self._process.wait()


@asynccontextmanager
async def flclient(*arguments: object, cwd: Path, **variables: str) -> AsyncIterator[FlClient]:
    """Ends with the context: asked, and killed if that does not help."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *map(str, arguments),
        cwd=cwd,
        env=clean_environment(cwd / "cache", **variables),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    client = FlClient(process)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(client.listen())
            try:
                yield client
            finally:
                if process.returncode is None:
                    process.terminate()
                    try:
                        async with asyncio.timeout(WAIT_S):
                            await process.wait()
                    finally:
                        if process.returncode is None:
                            process.kill()
    finally:
        await process.wait()
