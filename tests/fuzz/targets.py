"""What is thrown hostile bytes at, and what must hold whatever comes. hypothesis throws in `make test`, atheris in
`make fuzz`: a target takes bytes, and raises where its promise is broken. Its seeds are made here, by code.
"""

from __future__ import annotations

import asyncio
import bz2
import io
import json
import logging
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import grpc
import httpx
import hypothesis.strategies as st
import numpy as np
from hypothesis import HealthCheck, given, settings

from fl_client.manifest import PackageError, read_manifest, read_python_env
from fl_client.wire import fl_pb2 as pb
from fl_client.wire.archive import BadArchive, Limits, check, unpack
from fl_client.wire.codec import BINARY, HELPERS, NUMPY, SAFETENSORS, BadModel, check_update, decode, encode
from fl_server.auth import Failures, Gate, Identity, Verifier
from fl_server.combiner.server import Guard, handlers
from fl_server.errors import Unauthorized
from fl_server.store.ports import Collection, Query
from tests.fuzz.messages import HOSTILE_IDS, HOSTILE_JSON, damaged, json_values, messages, texts
from tests.server.rest_world import Api, npz, serving, tgz
from tests.server.tokens import SECRET, bad_headers, key_pair, token
from tests.server.virtual_world import SEED, VirtualClient, World, world
from tests.virtual import Context, VirtualLoop, virtual_loop

HOUR_S = 3600
METHODS = {
    f"{service.full_name}/{method.name}": method
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


@dataclass
class Target:
    throw: Callable[[bytes], None]
    seeds: Sequence[bytes] = ()


def mutations(seeds: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """What hypothesis throws at a target that is thrown bytes: damaged seeds, and bytes that are nothing."""
    return st.binary(max_size=300) | damaged(st.sampled_from(seeds))


def _is_one_line(said: str) -> None:
    assert "\n" not in said and len(said) < 400, said[:1000]


# ---- models

MOST_BYTES = 1_000_000


@contextmanager
def codec() -> Iterator[Target]:
    plain = [np.arange(4.0), np.ones((2, 3), np.float32), np.zeros((), np.int8)]
    deflated = io.BytesIO()
    np.savez_compressed(deflated, *plain, big=np.zeros(4000))
    # the first byte says the helper
    formats = {NUMPY: encode(plain), SAFETENSORS: encode(plain, ["b", "a", "c"], helper=SAFETENSORS), BINARY: bytes(32)}
    seeds = [bytes([sorted(HELPERS).index(helper)]) + data for helper, data in formats.items()]
    seeds += [bytes([sorted(HELPERS).index(NUMPY)]) + data for data in (deflated.getvalue(), npz(np.zeros(3)))]
    with tempfile.TemporaryDirectory() as folder:
        path, stored = Path(folder) / "update", Path(folder) / "stored"

        def throw(data: bytes) -> None:
            helper = sorted(HELPERS)[data[0] % len(HELPERS) if data else 0]
            path.write_bytes(data[1:])
            fault = check_update(path, None, helper=helper, max_bytes=MOST_BYTES, stored_copy=stored).fault
            try:
                arrays = decode(data[1:], helper=helper, max_bytes=MOST_BYTES)
            except BadModel as bad:
                _is_one_line(str(bad))
                wrong = fault is None
            else:
                wrong = sum(array.nbytes for array in arrays) > MOST_BYTES
                wrong |= fault is not None and "not finite" not in fault
            assert not wrong, fault
            assert fault is None or not stored.exists()
            stored.unlink(missing_ok=True)

        yield Target(throw, seeds)


# ---- compute packages

YAML = b"""python_env: python_env.yaml
entry_points:
  train: {command: python train.py}
  build: &a {command: python build.py}
  predict: *a
"""
LAUGHS = b"entry_points: &a [%s]\n" % b"".join(b"&%c [*%c,*%c]," % (x, x - 1, x - 1) for x in range(ord("b"), ord("z")))

MERGES = b"".join(b"%c: &%c {<<: [*%c, *%c], %c: 1}\n" % (x, x, x - 1, x - 1, x) for x in range(ord("b"), ord("z")))
MERGES = b"a: &a {a: 1}\n" + MERGES


def _zipped(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("_", "."), data)
    return out.getvalue()


@contextmanager
def package() -> Iterator[Target]:
    limits = Limits(total_bytes=1 << 18, members=20)
    plain = tgz("w:", fedn_yaml=YAML, train_py=b"print()")
    seeds = [
        tgz(fedn_yaml=YAML),
        tgz("w:bz2"),
        tgz(fedn_yaml=LAUGHS),
        tgz(fedn_yaml=MERGES),
        bz2.compress(plain),
        _zipped(fedn_yaml=YAML),
    ]
    seeds += [plain]  # not packed: wrapped below, so that damage reaches its headers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, target = folder / "package", folder / "unpacked"

        def throw(data: bytes) -> None:
            known = data.startswith((b"\x1f\x8b", b"BZh", b"PK"))
            path.write_bytes(data if known else bz2.compress(data, 1))
            said = []
            for attempt in (lambda: check(path, limits), lambda: unpack(path, target, limits)):
                try:
                    home = attempt()
                except BadArchive as bad:
                    said.append(str(bad))
                    _is_one_line(str(bad))
            assert len(set(said)) <= 1 and len(said) in (0, 2), said
            assert sorted(left.name for left in folder.iterdir()) == (["package"] if said else ["package", "unpacked"])
            if not said:
                assert home is not None and home.is_relative_to(target)
                _is_tame(target, limits)
                _read(home)
                shutil.rmtree(target)

        yield Target(throw, seeds)


def _is_tame(folder: Path, limits: Limits) -> None:
    found = list(folder.rglob("*"))
    assert not any(path.is_symlink() or not (path.is_file() or path.is_dir()) for path in found)
    assert sum(path.stat().st_size for path in found if path.is_file()) <= limits.total_bytes


def _read(home: Path) -> None:
    for read in (lambda: read_manifest(home), lambda: read_python_env(home / "fedn.yaml")):
        said_bytes = 0
        try:
            read()
        except PackageError as bad:
            said_bytes = len(str(bad))
        assert said_bytes < 2000


# ---- tokens


@contextmanager
def jwt() -> Iterator[Target]:
    """Whatever a header says, it is nobody, or somebody for whom we have signed."""
    pairs = {algorithm: key_pair(algorithm) for algorithm in ("RS256", "ES256")}
    until = 4_102_444_800  # of all runs the same: a corpus keeps what an earlier one has signed
    verifiers = [Verifier.of(SECRET), *(Verifier.of(public, algorithm=name) for name, (_, public) in pairs.items())]
    signed = [f"Bearer {token('client', client_id='x', exp=until)}"]
    signed += [
        f"Token {token('client', key=private, algorithm=name, sub='x', exp=until)}"
        for name, (private, _) in pairs.items()
    ]
    known: set[Identity] = {verifier.verify(header) for verifier, header in zip(verifiers, signed, strict=True)}
    seeds = [header for header, _ in bad_headers().values() if header] + signed

    def throw(data: bytes) -> None:
        for verifier in verifiers:
            try:
                identity = verifier.verify(data.decode("latin-1"))
            except Unauthorized as refused:
                _is_one_line(str(refused))
            else:
                assert identity in known, identity

    yield Target(throw, [seed.encode() for seed in seeds])


# ---- RPCs


@dataclass
class Caller(Context):
    """Of a call as any stranger can make it: its metadata are what it says."""

    said: list[tuple[str, str]] = field(default_factory=list)
    ended: grpc.StatusCode = grpc.StatusCode.OK
    sent: list[bytes] = field(default_factory=list)  # what is left of it
    read_as: Callable[[bytes], Any] = bytes

    async def read(self) -> Any:
        return self.read_as(self.sent.pop(0)) if self.sent else grpc.aio.EOF

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self.said

    async def send_initial_metadata(self, metadata: Any) -> None:
        pass

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        self.ended = code
        assert len(details) < 2000 and "incident" not in details, details
        raise grpc.aio.AbortError


class NothingBreaks(logging.Handler):
    """An error that the server had to log is one that it did not expect."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(record.getMessage()) from (record.exc_info or (None, None))[1]


@contextmanager
def nothing_breaks() -> Iterator[None]:
    logger, handler = logging.getLogger("fl_server"), NothingBreaks()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class Wire:
    """Every handler of the proto, behind guard and gate, without sockets; a session waits for its clients a and b."""

    def __init__(self, made: World, loop: VirtualLoop, gate: Gate | None) -> None:
        self.made, self._loop, self._gate = made, loop, gate
        self._handlers = {
            f"{service}/{name}": handler
            for service, methods in handlers(made.servicer, gate, Guard(1_000_000), HOUR_S).items()
            for name, handler in methods.items()
        }
        self.clients: list[VirtualClient] = []
        self.tasks: list[pb.TaskRequest] = []
        self.session_id = ""

    async def begin(self) -> None:
        self.clients = await self.made.clients("a", "b")
        self.session_id = await self.made.started(min_clients=2, round_timeout_s=1e9)
        self.tasks = [await client.task() for client in self.clients]
        self._before = await self._state()

    def known(self) -> list[str]:
        """Texts with a meaning."""
        ids = [text for task in self.tasks for text in (task.task_id, task.data)]
        echo = json.dumps({"training_metadata": {"num_examples": 1}, "config": self.tasks[0].data})
        return ["a", "b", "x", SEED, self.session_id, "1", "u1", "npz", "", *ids, echo]

    def send(self, rpc: str, sent: Sequence[bytes], said: Sequence[tuple[str, str]]) -> grpc.StatusCode:
        """How it ended. Raises AssertionError if none may end so. sent: one message, or those of a stream."""
        code = self._loop.run_until_complete(self._call(rpc, sent, said))
        allowed = {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
        if self._gate is not None:
            allowed |= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}
        if rpc.startswith("fedn.Combiner/TaskStream"):  # nobody: who it is; ABORTED: a newer stream; an endless id
            allowed |= {code.UNAUTHENTICATED, code.ABORTED, code.RESOURCE_EXHAUSTED}
        if not hasattr(self.made.servicer, rpc.partition("/")[2]):
            allowed |= {code.UNIMPLEMENTED}
        assert code in allowed, (rpc, code)
        return code

    async def _call(self, rpc: str, sent: Sequence[bytes], said: Sequence[tuple[str, str]]) -> grpc.StatusCode:
        handler, method = self._handlers[rpc], METHODS[rpc]
        context = Caller(
            "a stranger",
            said=list(said),
            sent=list(sent if method.client_streaming else sent[:1]),
            read_as=handler.request_deserializer or bytes,
        )
        behaviour = handler.stream_stream if method.server_streaming else handler.stream_unary
        is_endless = method.name == "TaskStream"
        try:
            async with asyncio.timeout(0.01 if is_endless else HOUR_S):
                reply = await behaviour(None, context)
        except grpc.aio.AbortError:
            return context.ended
        except TimeoutError:
            assert is_endless, f"{rpc} waits for ever"
            return grpc.StatusCode.OK
        if handler.response_serializer is not None and not method.server_streaming:
            handler.response_serializer(reply)
            assert getattr(reply, "verdict", 0) != pb.VERDICT_ACCEPTED
        return grpc.StatusCode.OK

    async def _state(self) -> list[Any]:
        decided = (Collection.SESSIONS, Collection.ROUNDS, Collection.MODELS)
        return [await self.made.store.find(collection, Query()) for collection in decided]

    async def end(self) -> None:
        """Nothing that was decided has changed, and the round ends as if nobody had said a word."""
        assert await self._state() == self._before
        for client, task, value in zip(self.clients, self.tasks, (1.0, 3.0), strict=True):
            assert await client.train(task, value) == "ACCEPTED"
        assert await self.made.result(self.session_id) == 2.0


@contextmanager
def wire(*, gated: bool) -> Iterator[Wire]:
    """gated: only then can a stranger not do what a client may, and the round's result is looked at."""
    with tempfile.TemporaryDirectory() as folder, virtual_loop() as loop, nothing_breaks():
        stack = AsyncExitStack()

        async def enter() -> Wire:
            made = await stack.enter_async_context(world(Path(folder)))
            gate = Gate(Verifier.of(SECRET), Failures(10**9, loop.time)) if gated else None
            opened = Wire(made, loop, gate)
            await opened.begin()
            return opened

        async def live() -> None:
            """In one task, as the world's task groups need it."""
            nonlocal opened
            async with stack:
                opened = await enter()
                ready.set()
                await leave.wait()

        opened: Wire | None = None
        ready, leave = asyncio.Event(), asyncio.Event()
        living = loop.create_task(live())
        loop.run_until_complete(asyncio.wait({living, loop.create_task(ready.wait())}, return_when="FIRST_COMPLETED"))
        if opened is None:
            living.result()
        assert opened is not None
        try:
            yield opened
            if gated:
                loop.run_until_complete(opened.end())
        finally:
            leave.set()
            loop.run_until_complete(living)


def headers(gated: bool, until: int) -> st.SearchStrategy[list[tuple[str, str]]]:
    """What calls come with: a token of x, which is all that a stranger can have; or none, or a bad one."""
    name = st.sampled_from(["x", "a", "nobody", "../..", "a/b", "x" * 10_240, ""])
    given = name.map(lambda client: [("client", client)]) | st.just([])
    if not gated:
        return given
    mine = f"Bearer {token('client', client_id='x', exp=until)}"
    said = [mine] * 4 + [header for header, _ in bad_headers().values() if header]
    tokens = st.sampled_from(said).map(lambda header: [("authorization", header)]) | st.just([])
    return st.tuples(given, tokens).map(lambda parts: parts[0] + parts[1])


def rpc_test(opened: Wire, rpcs: Sequence[str], *, gated: bool, examples: int) -> Callable[[], None]:
    """A hypothesis test of these methods: messages of their own types, damaged ones, and bytes."""
    text = texts(opened.known())
    of_rpc = {rpc: messages(METHODS[rpc].input_type, text).map(lambda made: made.SerializeToString()) for rpc in rpcs}

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def test(data: st.DataObject) -> None:
        rpc = data.draw(st.sampled_from(rpcs))
        one = of_rpc[rpc]
        if data.draw(st.integers(0, 7)) == 0:
            one = damaged(one) | st.binary(max_size=40)
        count = data.draw(st.integers(0, 3)) if METHODS[rpc].client_streaming else 1
        sent = [data.draw(one) for _ in range(count)]
        opened.send(rpc, sent, data.draw(headers(gated, until)))

    until = int(time.time()) + HOUR_S
    return test


@contextmanager
def rpcs() -> Iterator[Target]:
    """Of hypothesis' choices: the bytes say which."""
    with wire(gated=True) as opened:
        test: Any = rpc_test(opened, sorted(METHODS), gated=True, examples=1)
        yield Target(test.hypothesis.fuzz_one_input)


# ---- REST


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Rest:
    """The API with a session, a model and a package in it; in process."""

    def __init__(self, api: Api, runner: asyncio.Runner) -> None:
        self.api, self._runner = api, runner
        self.operations = [
            (method.upper(), path, operation)
            for path, item in api.app.openapi()["paths"].items()
            for method, operation in item.items()
            if path != "/api/v1/events/"  # has no end
        ]
        self.schemas: dict[str, Any] = api.app.openapi()["components"]["schemas"]
        self.known: list[str] = []

    async def begin(self) -> None:
        session = await self.api.session()
        package = await self.api.package()
        await self.api.http.post("/api/v1/clients/add", json={"name": "a", "client_id": "a"})
        self.known = [session["session_id"], session["session_config"]["model_id"], package["package_id"], "a", "1"]

    def ask(self, asked: Asked) -> None:
        """Raises AssertionError for an answer that no request may have, or if a refused one has changed something."""
        self._runner.run(self._ask(asked))

    async def _ask(self, asked: Asked) -> None:
        before = await self._state()
        url = httpx.URL("http://server:8092").copy_with(raw_path=asked.path.encode())
        answer = await self.api.http.request(asked.method, url, headers=asked.headers, content=asked.body)
        assert answer.status_code < 500 or answer.status_code == 501, (answer.status_code, answer.text)
        if answer.status_code >= 400:
            said = answer.json()
            assert len(said.get("message") or said["error"]) < 1100
            assert await self._state() == before

    async def _state(self) -> list[Any]:
        kept = (Collection.SESSIONS, Collection.MODELS, Collection.PACKAGES, Collection.CLIENTS)
        documents = [await self.api.scheduler.store.find(collection, Query()) for collection in kept]
        return [*documents, await self.api.counts(), sorted(path.name for path in self.api.folder.iterdir())]

    def requests(self) -> st.SearchStrategy[Asked]:
        return st.sampled_from(self.operations).flatmap(lambda operation: self._requests(*operation))

    def _requests(self, method: str, path: str, operation: dict[str, Any]) -> st.SearchStrategy[Asked]:
        ids = st.sampled_from([*self.known, *HOSTILE_IDS])
        queries = st.dictionaries(st.sampled_from(_PARAMETERS), ids | st.text(max_size=8), max_size=2)
        said = st.dictionaries(st.sampled_from(_HEADERS), st.sampled_from(_HEADER_TEXTS), max_size=2)
        paths = st.tuples(ids, queries).map(
            lambda drawn: f"{path.replace('{id}', quote(drawn[0], safe=''))}?{urlencode(drawn[1], errors='replace')}"
        )
        content = operation.get("requestBody", {}).get("content", {})
        bodies = st.tuples(st.just("application/json"), json_values.map(_dumped)) | st.tuples(
            st.sampled_from(_KINDS), st.binary(max_size=60) | st.sampled_from(HOSTILE_JSON).map(str.encode)
        )
        for kind, described in content.items():
            if kind == "multipart/form-data":
                bodies |= st.tuples(st.just("multipart/form-data; boundary=b"), self._forms(described["schema"]))
            elif name := described["schema"].get("$ref", "").rpartition("/")[2]:
                bodies |= st.tuples(st.just(kind), self._objects(self.schemas[name]).map(_dumped))
        return st.tuples(paths, said, bodies if content else st.just(("", b""))).map(
            lambda drawn: Asked(method, drawn[0], {**drawn[1], "content-type": drawn[2][0]}, drawn[2][1])
        )

    def _objects(self, schema: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
        """Its example, some of its fields replaced, others that it may have put in."""
        fields = st.sampled_from(sorted(schema["properties"]))
        inner = self.schemas.get(schema["properties"].get("session_config", {}).get("$ref", "").rpartition("/")[2], {})
        values = json_values | st.sampled_from([*self.known, *HOSTILE_IDS])
        if inner:
            values |= st.dictionaries(st.sampled_from(sorted(inner["properties"])), values, max_size=3)
        changed = st.dictionaries(fields | st.text(max_size=4), values, max_size=3)
        return changed.map(lambda new: {**schema["examples"][0], **new})

    def _forms(self, schema: dict[str, Any]) -> st.SearchStrategy[bytes]:
        names = st.sampled_from([*schema["properties"], "other", ""]).map(str.encode)
        contents = [*(name.encode() for name in HOSTILE_IDS), b"numpyhelper", npz(np.zeros(3)), tgz(), encode([[1.0]])]
        parts = st.tuples(
            names, st.sampled_from([b"", b"a.npz", b"a.tgz", b"../a.zip", b'"']), st.sampled_from(contents)
        )
        whole = st.lists(parts, max_size=4).map(
            lambda drawn: b"".join(b"--b\r\n" + _part(*part) + b"\r\n" for part in drawn) + b"--b--\r\n"
        )
        return whole | damaged(whole)


_PARAMETERS = (
    "name",
    "status",
    "session_id__ne",
    "committed_at__gt",
    "sender.name",
    "round_config.a b",
    "include_self",
)
_HEADERS = ("X-Limit", "X-Skip", "X-Sort-Key", "X-Sort-Order", "X-Reverse", "Last-Event-ID", "Authorization")
_HEADER_TEXTS = ("0", "-1", "9" * 30, "name", "fl.version", "desc", "x", "true", "Bearer x")
_KINDS = ("application/json", "application/x-www-form-urlencoded", "multipart/form-data", "text/plain", "a" * 3000, "")


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def _part(name: bytes, file_name: bytes, content: bytes) -> bytes:
    named = b'; filename="%s"' % file_name if file_name else b""
    return b'Content-Disposition: form-data; name="%s"%s\r\n\r\n%s' % (name, named, content)


@contextmanager
def rest_api() -> Iterator[Rest]:
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner, nothing_breaks():
        entered = serving(Path(folder))

        async def enter() -> Rest:
            opened = Rest(await entered.__aenter__(), runner)
            await opened.begin()
            return opened

        opened = runner.run(enter())
        try:
            yield opened
        finally:
            runner.run(entered.__aexit__(None, None, None))


def rest_test(opened: Rest, *, examples: int) -> Callable[[], None]:
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(opened.requests())
    def test(asked: Asked) -> None:
        opened.ask(asked)

    return test


@contextmanager
def rest() -> Iterator[Target]:
    with rest_api() as opened:
        test: Any = rest_test(opened, examples=1)
        yield Target(test.hypothesis.fuzz_one_input)


TARGETS = {"codec": codec, "package": package, "jwt": jwt, "rpcs": rpcs, "rest": rest}
