"""N light clients in one process, the same for every server: they train nothing and send what they were given.

Calls are made of bytes that were encoded before, so that what is measured is the server. dialect: "limit" (Download
and Upload, round by round), "fedn" (waits for a task, then six calls as FEDn 0.33's client makes them), "ours"
(Download, Upload, one report).
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import json
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import grpc

from benchmarks.models import encoded
from benchmarks.processes import orders, raise_file_limit, say
from fl_client.wire import fl_pb2 as pb
from fl_client.wire.chunks import CHUNK_BYTES

SERVICE = "/fedn."
ROUNDTRIP_TIMEOUT_S = 240.0


@dataclass(slots=True)
class Tally:
    """Times of a round, as the fleet sees them; seconds of perf_counter."""

    first_task: float = 0.0
    last_task: float = 0.0
    last_report_sent: float = 0.0
    last_report_answered: float = 0.0
    clients_done: int = 0


@dataclass(slots=True)
class Fleet:
    target: str
    dialect: str
    update: bytes
    sha256: str  # which our client says, and FEDn's does not
    clients: int
    rounds: dict[int, Tally] = field(default_factory=dict)
    wanted: int = 0  # rounds until `complete`
    complete: asyncio.Event = field(default_factory=asyncio.Event)
    attached: int = 0
    all_attached: asyncio.Event = field(default_factory=asyncio.Event)

    def upload_messages(self, update_id: str) -> list[bytes]:
        chunks = [self.update[at : at + CHUNK_BYTES] for at in range(0, len(self.update), CHUNK_BYTES)]
        messages = [pb.ModelRequest(id=update_id, data=chunk, status=pb.IN_PROGRESS) for chunk in chunks]
        return [message.SerializeToString() for message in [*messages, pb.ModelRequest(id=update_id, status=pb.OK)]]

    def tally(self, number: int) -> Tally:
        return self.rounds.setdefault(number, Tally())

    def done(self, number: int) -> None:
        tally = self.rounds[number]
        tally.clients_done += 1
        finished = [one for one in self.rounds.values() if one.clients_done == self.clients]
        if self.wanted and len(finished) == self.wanted:
            self.complete.set()


class LightClient:
    def __init__(self, fleet: Fleet, index: int) -> None:
        self.id, self._fleet = f"bench-{index:05}", fleet
        self._metadata = (("client", self.id), ("grpc-server", "127.0.0.1"))
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        channel: Any = grpc.aio.insecure_channel(fleet.target, options)  # of bytes: the stubs know messages only
        self._task_stream = channel.unary_stream(f"{SERVICE}Combiner/TaskStream")
        self._send_update = channel.unary_unary(f"{SERVICE}Combiner/SendModelUpdate")
        self._send_status = channel.unary_unary(f"{SERVICE}Connector/SendStatus")
        self._send_heartbeat = channel.unary_unary(f"{SERVICE}Connector/SendHeartbeat")
        self._download_call = channel.unary_stream(f"{SERVICE}ModelService/Download")
        self._upload_call = channel.stream_unary(f"{SERVICE}ModelService/Upload")
        self._sender = pb.Client(role=pb.CLIENT, name=self.id, client_id=self.id)
        self._beat = pb.Heartbeat(sender=self._sender).SerializeToString()

    async def download(self, model_id: str) -> None:
        received_bytes = 0
        call = self._download_call(pb.ModelRequest(id=model_id).SerializeToString(), metadata=self._metadata)
        async for message in call:
            received_bytes += len(message)
        assert received_bytes >= min(len(self._fleet.update) // 2, 1000), f"{received_bytes} bytes of {model_id}"

    async def upload(self, messages: list[bytes]) -> None:
        call = self._upload_call(metadata=self._metadata)
        for message in messages:
            await call.write(message)
        await call.done_writing()
        reply = pb.ModelResponse.FromString(await call)
        assert reply.status == pb.OK, reply.message

    async def status(self, text: str, task: pb.TaskRequest, data: str = "") -> None:
        status = pb.Status(
            sender=pb.Client(role=pb.CLIENT, name=self.id),
            status=text,
            log_level=pb.AUDIT,
            data=data,
            type=pb.MODEL_UPDATE,
            session_id=task.session_id,
        )
        status.timestamp.GetCurrentTime()
        await self._send_status(status.SerializeToString(), metadata=self._metadata)

    async def report(self, task: pb.TaskRequest, update_id: str, *, ours: bool) -> pb.ModelUpdate:
        meta = {"training_metadata": {"num_examples": 1}, "fetch_model": 0.01, "upload_model": 0.01}
        update = pb.ModelUpdate(sender=self._sender, model_id=task.model_id, model_update_id=update_id)
        if ours:
            update.task_id, update.size_bytes = task.task_id, len(self._fleet.update)
            update.sha256 = self._fleet.sha256
            update.meta = json.dumps(meta)
        else:
            update.correlation_id, update.timestamp = task.correlation_id, task.timestamp
            update.meta = json.dumps({**meta, "config": task.data})
        tally = self._fleet.tally(task.round)
        tally.last_report_sent = time.perf_counter()
        reply = pb.Response.FromString(await self._send_update(update.SerializeToString(), metadata=self._metadata))
        tally.last_report_answered = time.perf_counter()
        assert reply.verdict in (pb.VERDICT_ACCEPTED, pb.VERDICT_NONE), reply.response
        return update

    async def work(self, task: pb.TaskRequest) -> None:
        """FEDn's client does one task at a time, and so does ours."""
        ours = self._fleet.dialect == "ours"
        update_id = f"{task.session_id}-{task.round}"
        if not ours:
            await self.status("Received request from combiner.", task, _json(task))
        await self.download(task.model_id)
        if not ours:
            await self.status(f"\t Starting processing of training request for model_id {task.model_id}", task)
        await self.upload(self._messages(update_id))
        update = await self.report(task, update_id, ours=ours)
        if not ours:
            await self.status("Model update completed.", task, _json(update))

    def _messages(self, update_id: str) -> list[bytes]:
        if update_id not in _messages:
            _messages.clear()
            _messages[update_id] = self._fleet.upload_messages(update_id)
        return _messages[update_id]

    async def serve(self) -> None:
        """Attaches, and does what comes."""
        request = pb.ClientAvailableMessage(sender=self._sender).SerializeToString()
        call = self._task_stream(request, metadata=self._metadata)
        await call.initial_metadata()
        self._fleet.attached += 1
        if self._fleet.attached == self._fleet.clients:
            self._fleet.all_attached.set()
        async for message in call:
            task = pb.TaskRequest.FromString(message)
            at, tally = time.perf_counter(), self._fleet.tally(task.round)
            tally.first_task, tally.last_task = tally.first_task or at, at
            await self.work(task)
            self._fleet.done(task.round)

    async def transfer(self, messages: list[bytes]) -> None:
        await self.download("model")
        await self.upload(messages)

    async def beat(self, every_s: float) -> None:
        while True:
            await self._send_heartbeat(self._beat, metadata=self._metadata)
            await asyncio.sleep(every_s)


_messages: dict[str, list[bytes]] = {}  # of the round under way: what all clients upload


def _json(message: Any) -> str:
    """As long as FEDn's MessageToJson makes it, and cheaper: the fleet is not what is measured."""
    return json.dumps({"modelId": message.model_id, "correlationId": message.correlation_id, "meta": message.meta})


async def limit_rounds(fleet: Fleet, clients: list[LightClient], rounds: int) -> dict[str, Any]:
    messages, durations_s = fleet.upload_messages("update"), []
    for _ in range(rounds):
        began = time.perf_counter()
        await asyncio.gather(*(client.transfer(messages) for client in clients))
        durations_s.append(time.perf_counter() - began)
    return {"durations_s": durations_s, "dead_s": [], "answered_dead_s": []}


async def task_rounds(fleet: Fleet, rounds: int) -> dict[str, Any]:
    """One round more than measured: a round lasts until the next one's first task."""
    fleet.rounds.clear()
    fleet.complete.clear()
    fleet.wanted = rounds + 1
    async with asyncio.timeout(ROUNDTRIP_TIMEOUT_S):
        await fleet.complete.wait()
    fleet.wanted = 0
    tallies = [fleet.rounds[number] for number in sorted(fleet.rounds)]
    pairs = list(itertools.pairwise(tallies))
    return {
        "durations_s": [after.first_task - before.first_task for before, after in pairs],
        "dead_s": [after.first_task - before.last_report_sent for before, after in pairs],
        "answered_dead_s": [after.first_task - before.last_report_answered for before, after in pairs],
    }


async def main(config: dict[str, Any]) -> None:
    """config: target, dialect, form, model_bytes, clients; beat_every_s: None, or attached clients also beat."""
    raise_file_limit(config["clients"] + 100)
    update = encoded(config["form"], config["model_bytes"])
    fleet = Fleet(config["target"], config["dialect"], update, hashlib.sha256(update).hexdigest(), config["clients"])
    clients = [LightClient(fleet, index) for index in range(fleet.clients)]
    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        if fleet.dialect != "limit":
            for client in clients:
                tasks.create_task(client.serve())
            await fleet.all_attached.wait()
            if every_s := config.get("beat_every_s"):
                for client in clients:
                    tasks.create_task(client.beat(every_s))
        gc.freeze()
        say(update_bytes=len(update), attach_s=time.perf_counter() - began)
        async for order in orders():
            if fleet.dialect == "limit":
                say(**await limit_rounds(fleet, clients, order["rounds"]))
            else:
                say(**await task_rounds(fleet, order["rounds"]))
        os._exit(0)  # all at once: grpc.aio closes a channel by looking at every task


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
