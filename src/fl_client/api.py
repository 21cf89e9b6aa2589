"""APIClient: FEDn's method names over the REST API, synchronous as FEDn's is, for scripts, notebooks and `flserve`.

Every method is one request or two, and answers the server's JSON as it came. It decides nothing that the server can
decide, keeps nothing between calls (no connection either), and tries nothing again but the stream of events.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import os
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import quote

import httpx

from fl_client.tokens import Tokens, renewed

Object = dict[str, Any]  # as the server's JSON has it
Entity = Literal[
    "attributes",
    "clients",
    "combiners",
    "metrics",
    "models",
    "packages",
    "predictions",
    "rounds",
    "runs",
    "sessions",
    "statuses",
    "telemetry",
    "validations",
]

CONNECT_S = 10.0
ANSWER_S = 60.0  # twice what the server itself waits for its store
UPLOAD_ANSWER_S = 600.0  # a large model is checked before it is answered for
SILENCE_S = 45.0  # of a stream of events; the server gives a sign of life every 15 s
RECONNECT_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0)  # a server that restarts is back by then

ENDED = ("Finished", "Failed", "Terminated")  # a session's status
HELPERS = {".npz": "numpyhelper", ".bin": "binaryhelper", ".safetensors": "safetensors"}
REQUESTED_CLIENTS = 8  # FEDn's default, which FEDn never reads


class APIError(Exception):
    """The message is the server's, in one line. status_code: None when nothing that speaks this API answered."""

    def __init__(self, message: str, status_code: int | None = None) -> None:
        super().__init__(message)
        self.status_code = status_code


@dataclass(frozen=True, slots=True)
class ServerEvent:
    id: int  # grows, over the server's restarts too
    kind: str  # session, round, update, model, validation, prediction, client
    data: Object


class EventParser:
    """Server-sent events (WHATWG HTML, 9.2) whose data are JSON objects, however the network cuts them."""

    def __init__(self) -> None:
        self._rest = b""
        self._fields: dict[str, str] = {}

    def feed(self, chunk: bytes) -> list[ServerEvent]:
        """The events that are complete now; none for a comment."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [event for line in lines if (event := self._line(line.rstrip(b"\r").decode())) is not None]

    def _line(self, text: str) -> ServerEvent | None:
        if text:
            name, _, value = text.partition(":")
            so_far = self._fields.get("data", "") if name == "data" else ""
            self._fields[name] = so_far + value.removeprefix(" ")
            return None
        fields, self._fields = self._fields, {}
        if "data" not in fields:
            return None
        return ServerEvent(int(fields.get("id", 0)), fields.get("event", "message"), json.loads(fields["data"]))


class APIClient:
    def __init__(
        self,
        host: str,
        port: int | None = None,
        secure: bool = False,
        verify: bool | str = False,
        token: str | Tokens | None = None,
        auth_scheme: str | None = None,
        raise_errors: bool = True,
        *,
        client_cert: str | os.PathLike[str] | None = None,
        client_key: str | os.PathLike[str] | None = None,
    ) -> None:
        """host: may have a path. secure: https. verify: the server's certificate (FEDn's default does not); a path: by
        this CA. token: else FL_TOKEN, FL_AUTH_TOKEN or FEDN_AUTH_TOKEN; with FL_AUTH_REFRESH_TOKEN and
        FL_AUTH_REFRESH_TOKEN_URI it is renewed before it expires. raise_errors=False: FEDn's way, the server's JSON is
        returned whatever its status. client_cert, client_key: PEM, where the server wants one of its callers.

        Raises ValueError if host, port or token cannot be sent, OSError if a file cannot be used.
        """
        self.base_url = _base_url(host, port, secure)
        self._raise_errors = raise_errors
        trust = ssl.create_default_context(cafile=verify if isinstance(verify, str) else None)
        if not verify:
            trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
        if client_cert:
            trust.load_cert_chain(client_cert, client_key)
        self._http = httpx.Client(
            auth=_Bearer(_tokens(token, auth_scheme), ca=verify if isinstance(verify, str) else None),
            verify=trust,
            follow_redirects=True,
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
            limits=httpx.Limits(max_keepalive_connections=0),  # nothing to close, and no stale connection to trip over
            mounts={f"all://{here}": None for here in ("localhost", "127.0.0.1", "[::1]")},  # no proxy to oneself
        )

    # ---- what all entities have

    def find(
        self,
        entity: Entity,
        where: Mapping[str, object] | Iterable[tuple[str, object]] = (),
        *,
        n_max: int | None = None,
        sort: str | None = None,
        descending: bool = True,
    ) -> Object:
        """`count` of all that match and, as `result`, at most n_max of them; by default the newest first.

        where: by field name, dotted names reach inside (sender.name), suffixes compare (updated_at__gt); what is None
        does not filter.
        """
        pairs = where.items() if isinstance(where, Mapping) else where
        params = [(name, str(value)) for name, value in pairs if value is not None]
        headers = {"X-Limit": str(n_max)} if n_max else {}
        if sort:
            headers |= {"X-Sort-Key": sort, "X-Sort-Order": "desc" if descending else "asc"}
        return self._object("GET", f"/api/v1/{entity}/", "result", params=params, headers=headers)

    def get(self, entity: Entity, id: str) -> Object:
        return self._object("GET", _path(entity, id))

    def count(self, entity: Entity) -> int:
        return cast("int", self._json("GET", f"/api/v1/{entity}/count"))

    # ---- clients and combiners

    def get_client(self, id: str) -> Object:
        return self.get("clients", id)

    def get_clients(self, n_max: int | None = None) -> Object:
        return self.find("clients", n_max=n_max)

    def get_clients_count(self) -> int:
        return self.count("clients")

    def get_client_config(self, checksum: bool = True) -> Object:
        return self._object("GET", "/api/v1/clients/config", params={"checksum": str(checksum).lower()})

    def get_active_clients(self, combiner_id: str | None = None, n_max: int | None = None) -> Object:
        """combiner_id: the combiner's name, which is what clients have."""
        return self.find("clients", {"status": "online", "combiner": combiner_id}, n_max=n_max)

    def get_combiner(self, id: str) -> Object:
        return self.get("combiners", id)

    def get_combiners(self, n_max: int | None = None) -> Object:
        return self.find("combiners", n_max=n_max)

    def get_combiners_count(self) -> int:
        return self.count("combiners")

    def get_controller_status(self) -> Object:
        return self._object("GET", "/get_controller_status")

    # ---- models

    def get_model(self, id: str) -> Object:
        return self.get("models", id)

    def get_models(self, session_id: str | None = None, n_max: int | None = None) -> Object:
        return self.find("models", {"session_id": session_id}, n_max=n_max)

    def get_models_count(self) -> int:
        return self.count("models")

    def get_active_model(self) -> Object:
        """The newest; an empty page if there is none."""
        page = self.find("models", n_max=1, sort="committed_at")
        return cast("Object", page["result"][0]) if page.get("result") else page

    def get_model_trail(
        self, id: str | None = None, include_self: bool = True, reverse: bool = True, n_max: int | None = None
    ) -> list[Object]:
        """From the seed to this model (by default the newest); reverse=False: the other way round."""
        model_id = id or self.get_active_model().get("model_id")
        if not model_id:
            return []
        headers = {"X-Limit": str(n_max or self.get_models_count()), "X-Reverse": str(reverse).lower()}
        params = {"include_self": str(include_self).lower()}
        trail = self._json("GET", f"{_path('models', model_id)}/ancestors", params=params, headers=headers)
        return cast("list[Object]", trail)

    def download_model(self, id: str, path: str | os.PathLike[str]) -> Object:
        """The file is there whole, or as it was before."""
        return self._download(f"{_path('models', id)}/download", Path(path), "Model downloaded successfully.")

    def set_active_model(self, path: str | os.PathLike[str], name: str | None = None) -> Object:
        """Uploads a model to start from; its ending says the helper. The answer has its model_id."""
        helper = HELPERS.get(Path(path).suffix)
        if helper is None:
            raise ValueError(f"{path}: a model ends in one of {', '.join(HELPERS)}")
        with Path(path).open("rb") as file:
            answer = self._object("PUT", "/api/v1/helpers/active", json={"helper": helper})
            if answer.get("message") != "Active helper set":
                return answer
            form = {"helper": helper} | ({"name": name} if name else {})
            return self._upload("/api/v1/models/", (Path(path).name, file), form)

    # ---- compute packages

    def get_package(self, id: str) -> Object:
        return self.get("packages", id)

    def get_packages(self, n_max: int | None = None) -> Object:
        return self.find("packages", n_max=n_max)

    def get_packages_count(self) -> int:
        return self.count("packages")

    def get_active_package(self) -> Object:
        return self._object("GET", "/api/v1/packages/active")

    def get_package_checksum(self) -> Object:
        return self._object("GET", "/api/v1/packages/checksum")

    def download_package(self, path: str | os.PathLike[str]) -> Object:
        """The active one."""
        return self._download("/api/v1/packages/download", Path(path), "Package downloaded successfully.")

    def set_active_package(self, path: str | os.PathLike[str], helper: str, name: str, description: str = "") -> Object:
        """Uploads a package, which becomes the active one."""
        form = {"helper": helper, "name": name, "description": description}
        with Path(path).open("rb") as file:
            return self._upload("/api/v1/packages/", (Path(path).name, file), form)

    def activate_package(self, id: str) -> Object:
        """One that was uploaded before."""
        return self._object("PUT", "/api/v1/packages/active", json={"id": id})

    # ---- rounds and sessions

    def get_round(self, id: str) -> Object:
        return self.get("rounds", id)

    def get_rounds(self, n_max: int | None = None) -> Object:
        return self.find("rounds", n_max=n_max)

    def get_rounds_count(self) -> int:
        return self.count("rounds")

    def get_session(self, id: str | None = None, name: str | None = None) -> Object:
        if name:
            page = self.find("sessions", {"name": name})
            return cast("Object", page["result"][0]) if page.get("result") else self._refuse("Session not found.", 404)
        return self.get("sessions", id) if id else self._refuse("No id or name provided.", 400)

    def get_sessions(self, n_max: int | None = None, name: str | None = None) -> Object:
        return self.find("sessions", {"name": name}, n_max=n_max)

    def get_sessions_count(self) -> int:
        return self.count("sessions")

    def get_session_status(self, id: str) -> str:
        return str(self.get_session(id).get("status") or "Could not retrieve session status.")

    def session_is_finished(self, id: str) -> bool:
        """False also for a session that has failed: see wait_for_session."""
        return self.get_session_status(id).lower() == "finished"

    def start_session(
        self,
        name: str | None = None,
        aggregator: str = "fedavg",
        aggregator_kwargs: Object | None = None,
        model_id: str | None = None,
        round_timeout: float = 180,
        rounds: int = 5,
        round_buffer_size: int = -1,
        delete_models: bool = True,
        validate: bool = True,
        helper: str | None = None,
        min_clients: int = 1,
        requested_clients: int = REQUESTED_CLIENTS,
        server_functions: type | None = None,
        *,
        timeout: float | None = None,
        wait_for_clients_s: float = 0,
        client_settings: Object | None = None,
        client_ids: Iterable[str] | None = None,
    ) -> Object:
        """Creates a session and starts it; the answer has its session_id.

        model_id: by default the newest. timeout: another name of round_timeout, in seconds. client_settings: goes to
        the clients. client_ids: only these take part. wait_for_clients_s: how long the first round may wait for
        min_clients. requested_clients: the largest cohort; left at its default, never below min_clients.
        """
        if aggregator == "splitlearningagg":
            return self.start_splitlearning_session(
                name, model_id, round_timeout, rounds, round_buffer_size, delete_models, validate, min_clients
            )
        model_id = model_id or self.get_active_model().get("model_id")
        if not model_id:
            return self._refuse("No models found in the repository", 404)
        round_timeout = round_timeout if timeout is None else timeout
        if requested_clients == REQUESTED_CLIENTS:
            requested_clients = max(requested_clients, min_clients)
        config = _config(aggregator, model_id, round_timeout, round_buffer_size, delete_models, validate, min_clients)
        config |= {"aggregator_kwargs": aggregator_kwargs, "requested_clients": requested_clients, "rounds": rounds}
        config |= {"helper_type": helper, "server_functions": server_functions and inspect.getsource(server_functions)}
        config |= {"client_settings": client_settings} if client_settings else {}
        start: Object = {"wait_for_clients_s": wait_for_clients_s} if wait_for_clients_s else {}
        start |= {"client_ids": ",".join(client_ids)} if client_ids is not None else {}
        body = {"name": name, "seed_model_id": model_id, "session_config": config}
        return self._create_and_start(body, "start", rounds, round_timeout, start)

    def start_splitlearning_session(
        self,
        name: str | None = None,
        model_id: str | None = None,
        round_timeout: float = 180,
        rounds: int = 5,
        round_buffer_size: int = -1,
        delete_models: bool = True,
        validate: bool = False,
        min_clients: int = 1,
        requested_clients: int = REQUESTED_CLIENTS,
    ) -> Object:
        """FEDn's request; flserve refuses it, it has no split learning."""
        aggregator = "splitlearningagg"
        config = _config(aggregator, model_id, round_timeout, round_buffer_size, delete_models, validate, min_clients)
        config |= {"requested_clients": requested_clients, "helper_type": "splitlearninghelper"}
        body = {"name": name, "session_config": config}
        return self._create_and_start(body, "start_splitlearning_session", rounds, round_timeout, {})

    def _create_and_start(
        self, body: Object, route: str, rounds: int, round_timeout: float, start: Mapping[str, object]
    ) -> Object:
        created = self._object("POST", "/api/v1/sessions/", json=body)
        if "session_id" not in created:
            return created
        session = {"session_id": created["session_id"]}
        wanted = {**session, "rounds": rounds, "round_timeout": round_timeout, **start}
        try:
            return self._object("POST", f"/api/v1/sessions/{route}", json=wanted) | session
        except APIError as exc:
            raise APIError(f"{exc}; session {session['session_id']} is created", exc.status_code) from exc

    def continue_session(self, session_id: str, rounds: int = 5, round_timeout: float = 180) -> Object:
        """So many rounds more, for a session that has ended, however it did."""
        if not session_id:
            return self._refuse("No session id provided.", 400)
        for what, value in (("number of rounds", rounds), ("round timeout", round_timeout)):
            if value <= 0:
                return self._refuse(f"Invalid {what} provided. Must be greater than 0.", 400)
        body = {"session_id": session_id, "rounds": rounds, "round_timeout": round_timeout}
        return self._object("POST", "/api/v1/sessions/start", json=body)

    def stop_session(self, session_id: str) -> Object:
        """The session, Terminated."""
        return self._object("PATCH", _path("sessions", session_id), "status", json={"status": "Terminated"})

    def get_explain(self, session_id: str) -> Object:
        """`sentences`: why the session is where it is."""
        return self._object("GET", f"{_path('sessions', session_id)}/explain", "sentences")

    # ---- records

    def get_status(self, id: str) -> Object:
        return self.get("statuses", id)

    def get_statuses(
        self,
        session_id: str | None = None,
        event_type: str | None = None,
        sender_name: str | None = None,
        sender_role: str | None = None,
        n_max: int | None = None,
    ) -> Object:
        where = {"session_id": session_id, "type": event_type}
        return self.find("statuses", {**where, **_actor("sender", sender_name, sender_role)}, n_max=n_max)

    def get_statuses_count(self) -> int:
        return self.count("statuses")

    def get_validation(self, id: str) -> Object:
        return self.get("validations", id)

    def get_validations(
        self,
        session_id: str | None = None,
        model_id: str | None = None,
        correlation_id: str | None = None,
        sender_name: str | None = None,
        sender_role: str | None = None,
        receiver_name: str | None = None,
        receiver_role: str | None = None,
        n_max: int | None = None,
    ) -> Object:
        where = {"session_id": session_id, "model_id": model_id, "correlation_id": correlation_id}
        sender, receiver = _actor("sender", sender_name, sender_role), _actor("receiver", receiver_name, receiver_role)
        return self.find("validations", {**where, **sender, **receiver}, n_max=n_max)

    def get_validations_count(self) -> int:
        return self.count("validations")

    def get_predictions(
        self,
        model_id: str | None = None,
        correlation_id: str | None = None,
        sender_name: str | None = None,
        sender_role: str | None = None,
        receiver_name: str | None = None,
        receiver_role: str | None = None,
        n_max: int | None = None,
    ) -> Object:
        where = {"model_id": model_id, "correlation_id": correlation_id}
        sender, receiver = _actor("sender", sender_name, sender_role), _actor("receiver", receiver_name, receiver_role)
        return self.find("predictions", {**where, **sender, **receiver}, n_max=n_max)

    def start_predictions(self, prediction_id: str | None = None, model_id: str | None = None) -> Object:
        body = {"prediction_id": prediction_id or str(uuid.uuid4()), "model_id": model_id}
        return self._object("POST", "/api/v1/predictions/start", json=body)

    def get_current_attributes(self, client_list: list[str] | str) -> Object:
        """By client id, the newest value of each key. Raises ValueError if no client is named."""
        if not client_list:
            raise ValueError("client_list: empty")
        client_ids = [client_list] if isinstance(client_list, str) else client_list
        return self._object("POST", "/api/v1/attributes/current", json={"client_ids": client_ids})

    def add_attributes(self, attribute: Object) -> Object:
        """attribute: key, value and sender, an object with name, role and client_id."""
        return self._object("POST", "/api/v1/attributes/", json=attribute)

    def get_attributes(
        self, key: str | None = None, sender_name: str | None = None, n_max: int | None = None
    ) -> Object:
        return self.find("attributes", {"key": key, "sender.name": sender_name}, n_max=n_max)

    def get_telemetry(self, key: str | None = None, sender_name: str | None = None, n_max: int | None = None) -> Object:
        return self.find("telemetry", {"key": key, "sender.name": sender_name}, n_max=n_max)

    def get_metrics(
        self,
        session_id: str | None = None,
        model_id: str | None = None,
        key: str | None = None,
        sender_name: str | None = None,
        n_max: int | None = None,
    ) -> Object:
        where = {"session_id": session_id, "model_id": model_id, "key": key, "sender.name": sender_name}
        return self.find("metrics", where, n_max=n_max)

    def get_runs(self, session_id: str | None = None, n_max: int | None = None) -> Object:
        return self.find("runs", {"session_id": session_id}, n_max=n_max)

    # ---- FEDn's older names

    list_attributes = get_attributes
    list_clients = get_clients
    list_combiners = get_combiners
    list_metrics = get_metrics
    list_models = get_models
    list_packages = get_packages
    list_predictions = get_predictions
    list_rounds = get_rounds
    list_runs = get_runs
    list_sessions = get_sessions
    list_statuses = get_statuses
    list_telemetry = get_telemetry
    list_validations = get_validations

    # ---- what happens

    def events(self, after: int | None = None, follow: bool = True) -> Iterator[ServerEvent]:
        """What happens from now on; with `after`, first what the server still keeps after this id (0: all of it).

        Goes on over lost connections and restarts of the server, and never ends by itself; raises APIError if the
        server does not come back. follow=False: only what is kept, then the end.
        """
        batches = self._batches(after) if follow else self._kept(after or 0)
        return itertools.chain.from_iterable(batches)

    def session_events(self, session_id: str) -> Iterator[ServerEvent]:
        """Of one session, from the oldest that the server keeps; ends with the session."""
        for batch in self._batches(0):
            own = [event for event in batch if event.data.get("session_id") == session_id]
            yield from own
            told = any(event.kind == "session" and event.data["status"] in ENDED for event in own)
            if (told or not batch) and self._ended(session_id):
                return

    def wait_for_session(self, session_id: str, timeout_s: float | None = None) -> Object:
        """The session, once it is Finished, Failed or Terminated. Raises TimeoutError."""
        session = self.get("sessions", session_id)
        if session.get("status") in ENDED or "status" not in session:
            return session
        until = math.inf if timeout_s is None else time.monotonic() + timeout_s
        for batch in self._batches(0, until):
            told = any(event.kind == "session" and event.data.get("session_id") == session_id for event in batch)
            if (told or not batch) and (ended := self._ended(session_id)):
                return ended
        raise TimeoutError(f"session {session_id} has not ended within {timeout_s:g} s")

    def _ended(self, session_id: str) -> Object | None:
        """The session; None while it has not ended, or the server is away: its events go on when it is back."""
        try:
            session = self.get("sessions", session_id)
        except APIError as exc:
            if exc.status_code is not None:
                raise
            return None
        return session if session.get("status") in ENDED else None

    def _batches(self, after: int | None, until: float = math.inf) -> Iterator[list[ServerEvent]]:
        """Over lost connections, ending at `until` (monotonic). Empty ones are the server's signs of life."""
        pauses_s: Iterator[float] = iter(())  # the first connection must succeed

        def greeted() -> None:
            nonlocal pauses_s
            pauses_s = iter(RECONNECT_PAUSES_S)

        while (left_s := until - time.monotonic()) > 0:
            lost = APIError(f"{self.base_url}: the server ended its stream of events")
            try:
                for batch in self._connection(after, min(left_s, SILENCE_S), greeted):
                    after = batch[-1].id if batch else after
                    yield batch
                    if until < math.inf and not batch:
                        break  # to connect again with what is left of the time
                else:
                    raise lost
            except httpx.ReadTimeout:
                pass
            except APIError as exc:
                pause_s = next(pauses_s, None)
                if pause_s is None or exc.status_code is not None:
                    raise
                threading.Event().wait(min(pause_s, left_s))

    def _kept(self, after: int) -> Iterator[list[ServerEvent]]:
        try:
            yield from self._connection(after, SILENCE_S, lambda: None, follow=False)
        except httpx.ReadTimeout:
            raise APIError(f"{self.base_url}: silent for {SILENCE_S:.0f} s in the midst of its events") from None

    def _connection(
        self, after: int | None, silence_s: float, greeted: Callable[[], None], *, follow: bool = True
    ) -> Iterator[list[ServerEvent]]:
        """Raises httpx.ReadTimeout after so long a silence. The greeting is left out."""
        parser = EventParser()
        params: dict[str, int | str] = {} if after is None else {"after": after}
        if not follow:
            params["follow"] = "false"
        timeout = httpx.Timeout(silence_s, connect=CONNECT_S)
        with self._stream("/api/v1/events/", params=params, timeout=timeout) as reply:
            if reply.is_error or not reply.headers.get("content-type", "").startswith("text/event-stream"):
                raise (
                    _no_api(reply) if reply.is_success else APIError(_words(reply, _decoded(reply)), reply.status_code)
                )
            for number, chunk in enumerate(reply.iter_bytes()):
                greeted()
                batch = parser.feed(chunk)
                if batch or number > 0:
                    yield batch

    # ---- HTTP

    def _object(self, method: str, path: str, key: str = "", **content: Any) -> Object:
        """key: what the object of a server that speaks this API has."""
        body = self._json(method, path, **content)
        if not isinstance(body, dict) or (self._raise_errors and key and key not in body):
            raise APIError(f"{self.base_url}{path}: what answers there is no flserve ({str(body)[:40]})")
        return body

    def _json(self, method: str, path: str, **content: Any) -> Any:
        url = self.base_url + path
        try:
            reply = self._http.request(method, url, **content)
        except httpx.HTTPError as exc:
            raise _no_answer(method, url, exc) from exc
        return self._answer(reply)

    def _answer(self, reply: httpx.Response) -> Any:
        body = _decoded(reply)
        if reply.is_error and self._raise_errors:
            raise APIError(_words(reply, body), reply.status_code)
        return body

    def _upload(self, path: str, file: tuple[str, Any], form: Mapping[str, str]) -> Object:
        timeout = httpx.Timeout(UPLOAD_ANSWER_S, connect=CONNECT_S)
        return self._object("POST", path, files={"file": file}, data=form, timeout=timeout)

    def _download(self, path: str, target: Path, done: str) -> Object:
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
        try:
            with self._stream(path) as reply:
                if not reply.is_success:
                    return {"success": False, "message": _words(reply, self._answer(reply))}
                if reply.headers.get("content-type", "").startswith("text/"):
                    raise _no_api(reply)
                with part.open("wb") as file:
                    for block in reply.iter_bytes():
                        file.write(block)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return {"success": True, "message": done}

    @contextmanager
    def _stream(self, path: str, **content: Any) -> Iterator[httpx.Response]:
        """The body is still to be read, but for an error's. Raises httpx.ReadTimeout as it is."""
        url = self.base_url + path
        try:
            with self._http.stream("GET", url, **content) as reply:
                if reply.is_error:
                    reply.read()
                yield reply
        except httpx.ReadTimeout:
            raise
        except httpx.HTTPError as exc:
            raise _no_answer("GET", url, exc) from exc

    def _refuse(self, message: str, status_code: int) -> Object:
        """What FEDn's APIClient says without asking the server."""
        if self._raise_errors:
            raise APIError(message, status_code)
        return {"message": message}


def _base_url(host: str, port: int | None, secure: bool) -> str:
    """A scheme in host is passed over: `secure` decides. No slash at the end."""
    given = host.strip().partition("://")[2] or host.strip()
    try:
        url = httpx.URL(f"{'https' if secure else 'http'}://{given}")
        url = url if port is None else url.copy_with(port=port)
    except (httpx.InvalidURL, TypeError) as exc:
        raise ValueError(f"host: {host!r}: {exc}") from None
    if not url.host:
        raise ValueError(f"host: {host!r} names no host")
    return str(url).rstrip("/")


def _tokens(token: str | Tokens | None, scheme: str | None) -> Tokens:
    if isinstance(token, Tokens):
        return token
    token = token or _variable("FL_TOKEN", "FL_AUTH_TOKEN", "FEDN_AUTH_TOKEN")
    return Tokens(
        token,
        scheme=scheme or _variable("FL_AUTH_SCHEME", "FEDN_AUTH_SCHEME") or "Bearer",
        refresh=_variable("FL_AUTH_REFRESH_TOKEN", "FEDN_AUTH_REFRESH_TOKEN"),
        refresh_uri=_variable("FL_AUTH_REFRESH_TOKEN_URI", "FEDN_AUTH_REFRESH_TOKEN_URI"),
    )


def _variable(*names: str) -> str:
    """The first that is set."""
    return next(filter(None, map(os.environ.get, names)), "")


class _Bearer(httpx.Auth):
    """Shows the newest token. A new one is fetched when it is due; and once for a request, when it is refused."""

    def __init__(self, tokens: Tokens, ca: str | None) -> None:
        self._tokens, self._ca = tokens, ca
        self._renewing = threading.Lock()

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        tokens = self._tokens
        if tokens.renewable and not tokens.due_in_s():
            try:
                self._renew(tokens.count)
            except APIError:
                if not tokens.authorization:
                    raise  # else the one that we have may still be good
        shown = tokens.count
        if authorization := tokens.authorization:
            request.headers["Authorization"] = authorization
        reply = yield request
        if reply.status_code == 401 and tokens.renewable:
            self._renew(shown)
            request.headers["Authorization"] = tokens.authorization
            yield request

    def _renew(self, shown: int) -> None:
        """A token that is newer than that; another thread may have fetched it."""
        tokens = self._tokens
        with self._renewing:
            if tokens.count > shown:
                return
            trust = ssl.create_default_context()
            if self._ca:
                trust.load_verify_locations(self._ca)
            try:
                reply = httpx.post(
                    tokens.refresh_uri, json={"refresh": tokens.refresh}, verify=trust, timeout=CONNECT_S
                )
                if reply.status_code not in (200, 201):
                    raise ValueError(f"status {reply.status_code}")
                tokens.take(*renewed(reply.json()))
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as exc:
                raise APIError(f"no new access token from {tokens.refresh_uri}: {exc}", 401) from exc


def _path(entity: Entity, id: str) -> str:
    if not id:
        raise APIError(f"{entity}: an empty id", 404)
    return f"/api/v1/{entity}/{quote(id, safe='')}"


def _actor(which: str, name: str | None, role: str | None) -> dict[str, str | None]:
    return {f"{which}.name": name, f"{which}.role": role}


def _config(
    aggregator: str,
    model_id: str | None,
    round_timeout: float,
    buffer_size: int,
    delete_models: bool,
    validate: bool,
    min_clients: int,
) -> Object:
    return {
        "aggregator": aggregator,
        "model_id": model_id,
        "round_timeout": round_timeout,
        "buffer_size": buffer_size,
        "delete_models_storage": delete_models,
        "validate": validate,
        "clients_required": min_clients,
    }


def _decoded(reply: httpx.Response) -> Any:
    try:
        return reply.json()
    except ValueError:
        raise _no_api(reply) from None


def _words(reply: httpx.Response, body: object) -> str:
    said = body if isinstance(body, dict) else {}
    message = said.get("message") or said.get("error")
    if isinstance(message, str):
        return " ".join(message.split())
    return f"{reply.request.method} {reply.request.url}: status {reply.status_code}"


def _no_api(reply: httpx.Response) -> APIError:
    return APIError(f"{reply.request.url}: what answers there is no flserve (status {reply.status_code})")


def _no_answer(method: str, url: str, exc: httpx.HTTPError) -> APIError:
    why = " ".join(str(exc).split()) or type(exc).__name__
    return APIError(f"{method} {url}: no server answers: {why}")
