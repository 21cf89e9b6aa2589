"""APIClient: FEDn's signatures, what each method asks, and a session's life against a real server."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import io
import json
import re
import tarfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import pytest

from fl_client import APIClient, APIError, TrainResult
from fl_client.api import EventParser
from fl_client.tokens import Tokens
from fl_server.app import serving
from fl_server.settings import Settings
from fl_server.testing import Federation, ServerProcess
from fl_server.tls import private_certificates
from tests.client.api_double import Answer, Double, Request, answering, as_json
from tests.server.cli_runner import run
from tests.server.tokens import SECRET, token

WAIT_S = 60.0
P = ParamSpec("P")
T = TypeVar("T")

# FEDn 0.33's (fedn-interface.md 3): names, order and defaults; of __init__ too
FEDN = """
__init__(host, port=None, secure=False, verify=False, token=None, auth_scheme=None)
get_client(id)
get_clients(n_max=None)
get_clients_count()
get_client_config(checksum=True)
get_active_clients(combiner_id=None, n_max=None)
get_combiner(id)
get_combiners(n_max=None)
get_combiners_count()
get_controller_status()
get_model(id)
get_models(session_id=None, n_max=None)
get_models_count()
get_active_model()
get_model_trail(id=None, include_self=True, reverse=True, n_max=None)
download_model(id, path)
set_active_model(path)
get_package(id)
get_packages(n_max=None)
get_packages_count()
get_active_package()
get_package_checksum()
download_package(path)
set_active_package(path, helper, name, description='')
get_round(id)
get_rounds(n_max=None)
get_rounds_count()
get_session(id=None, name=None)
get_sessions(n_max=None, name=None)
get_sessions_count()
get_session_status(id)
session_is_finished(id)
start_session(name=None, aggregator='fedavg', aggregator_kwargs=None, model_id=None, round_timeout=180, rounds=5, \
round_buffer_size=-1, delete_models=True, validate=True, helper=None, min_clients=1, requested_clients=8, \
server_functions=None)
start_splitlearning_session(name=None, model_id=None, round_timeout=180, rounds=5, round_buffer_size=-1, \
delete_models=True, validate=False, min_clients=1, requested_clients=8)
continue_session(session_id, rounds=5, round_timeout=180)
get_status(id)
get_statuses(session_id=None, event_type=None, sender_name=None, sender_role=None, n_max=None)
get_statuses_count()
get_validation(id)
get_validations(session_id=None, model_id=None, correlation_id=None, sender_name=None, sender_role=None, \
receiver_name=None, receiver_role=None, n_max=None)
get_validations_count()
get_predictions(model_id=None, correlation_id=None, sender_name=None, sender_role=None, receiver_name=None, \
receiver_role=None, n_max=None)
start_predictions(prediction_id=None, model_id=None)
get_current_attributes(client_list)
add_attributes(attribute)
""".strip().splitlines()


@pytest.mark.parametrize("expected", FEDN)
def test_each_method_has_fedns_signature_and_at_most_adds_optional_parameters(expected: str) -> None:
    name, _, text = expected.partition("(")
    ours = inspect.signature(getattr(APIClient, name)).parameters
    shown = [f"{p.name}{'' if p.default is p.empty else f'={p.default!r}'}" for p in ours.values()][1:]
    theirs = [part for part in text.rstrip(")").split(", ") if part]
    assert shown[: len(theirs)] == theirs
    assert all("=" in added for added in shown[len(theirs) :])


def test_fedns_older_list_names_are_the_same_methods() -> None:
    listed = [name for name in dir(APIClient) if name.startswith("list_")]
    assert len(listed) == 13
    for name in listed:
        assert getattr(APIClient, name) is getattr(APIClient, name.replace("list_", "get_"))


# ---- what is asked


@pytest.fixture
def double() -> Iterator[Double]:
    with answering() as running:
        yield running


def client_of(double: Double, **options: Any) -> APIClient:
    return APIClient("127.0.0.1", double.port, **options)


V1 = "/api/v1"
PAGE: dict[str, Any] = {"count": 1, "result": [{"model_id": "m9", "session_id": "s9"}]}
REQUESTS: list[tuple[Callable[[APIClient], object], str]] = [
    (lambda api: api.get_client("a b/c"), "GET /api/v1/clients/a%20b%2Fc"),
    (lambda api: api.get_clients(), "GET /api/v1/clients/"),
    (lambda api: api.get_clients_count(), "GET /api/v1/clients/count"),
    (lambda api: api.get_client_config(), "GET /api/v1/clients/config?checksum=true"),
    (lambda api: api.get_client_config(False), "GET /api/v1/clients/config?checksum=false"),
    (lambda api: api.get_active_clients("here"), "GET /api/v1/clients/?status=online&combiner=here"),
    (lambda api: api.get_combiner("x"), "GET /api/v1/combiners/x"),
    (lambda api: api.get_combiners(), "GET /api/v1/combiners/"),
    (lambda api: api.get_combiners_count(), "GET /api/v1/combiners/count"),
    (lambda api: api.get_controller_status(), "GET /get_controller_status"),
    (lambda api: api.get_model("x"), "GET /api/v1/models/x"),
    (lambda api: api.get_models("s"), "GET /api/v1/models/?session_id=s"),
    (lambda api: api.get_models_count(), "GET /api/v1/models/count"),
    (lambda api: api.get_active_model(), "GET /api/v1/models/"),
    (lambda api: api.get_model_trail("x", False), "GET /api/v1/models/x/ancestors?include_self=false"),
    (lambda api: api.get_package("x"), "GET /api/v1/packages/x"),
    (lambda api: api.get_packages(), "GET /api/v1/packages/"),
    (lambda api: api.get_packages_count(), "GET /api/v1/packages/count"),
    (lambda api: api.get_active_package(), "GET /api/v1/packages/active"),
    (lambda api: api.get_package_checksum(), "GET /api/v1/packages/checksum"),
    (lambda api: api.activate_package("p"), "PUT /api/v1/packages/active"),
    (lambda api: api.get_round("1"), "GET /api/v1/rounds/1"),
    (lambda api: api.get_rounds(), "GET /api/v1/rounds/"),
    (lambda api: api.get_rounds_count(), "GET /api/v1/rounds/count"),
    (lambda api: api.get_session("x"), "GET /api/v1/sessions/x"),
    (lambda api: api.get_session(name="n"), "GET /api/v1/sessions/?name=n"),
    (lambda api: api.get_sessions(name="n"), "GET /api/v1/sessions/?name=n"),
    (lambda api: api.get_sessions_count(), "GET /api/v1/sessions/count"),
    (lambda api: api.get_session_status("x"), "GET /api/v1/sessions/x"),
    (lambda api: api.session_is_finished("x"), "GET /api/v1/sessions/x"),
    (lambda api: api.stop_session("x"), "PATCH /api/v1/sessions/x"),
    (lambda api: api.get_explain("x"), "GET /api/v1/sessions/x/explain"),
    (lambda api: api.continue_session("x"), "POST /api/v1/sessions/start"),
    (lambda api: api.start_splitlearning_session(), "POST /api/v1/sessions/start_splitlearning_session"),
    (lambda api: api.start_session(aggregator="splitlearningagg"), "POST /api/v1/sessions/start_splitlearning_session"),
    (lambda api: api.get_status("x"), "GET /api/v1/statuses/x"),
    (
        lambda api: api.get_statuses("s", "AUDIT", "n", "CLIENT"),
        "GET /api/v1/statuses/?session_id=s&type=AUDIT&sender.name=n&sender.role=CLIENT",
    ),
    (lambda api: api.get_statuses_count(), "GET /api/v1/statuses/count"),
    (lambda api: api.get_validation("x"), "GET /api/v1/validations/x"),
    (
        lambda api: api.get_validations("s", "m", "c", "n", "CLIENT", "r", "COMBINER"),
        "GET /api/v1/validations/?session_id=s&model_id=m&correlation_id=c&sender.name=n&sender.role=CLIENT"
        "&receiver.name=r&receiver.role=COMBINER",
    ),
    (lambda api: api.get_validations_count(), "GET /api/v1/validations/count"),
    (lambda api: api.get_predictions("m", "c"), "GET /api/v1/predictions/?model_id=m&correlation_id=c"),
    (lambda api: api.start_predictions("p", "m"), "POST /api/v1/predictions/start"),
    (lambda api: api.get_current_attributes("c"), "POST /api/v1/attributes/current"),
    (lambda api: api.add_attributes({"key": "k"}), "POST /api/v1/attributes/"),
    (lambda api: api.get_attributes("k", "n"), "GET /api/v1/attributes/?key=k&sender.name=n"),
    (lambda api: api.get_telemetry("k", "n"), "GET /api/v1/telemetry/?key=k&sender.name=n"),
    (
        lambda api: api.get_metrics("s", "m", "k", "n"),
        "GET /api/v1/metrics/?session_id=s&model_id=m&key=k&sender.name=n",
    ),
    (lambda api: api.get_runs("s"), "GET /api/v1/runs/?session_id=s"),
]


@pytest.mark.parametrize(("call", "line"), REQUESTS, ids=[f"{n}-{line}" for n, (_, line) in enumerate(REQUESTS)])
def test_each_method_asks_what_fedns_does(double: Double, call: Callable[[APIClient], object], line: str) -> None:
    double.answer = lambda request: as_json({**PAGE, "session_id": "s", "status": "Terminated", "sentences": []})
    call(client_of(double))
    assert double.asked[-1].line == line


def test_bodies_are_fedns(double: Double) -> None:
    double.answer = lambda request: as_json({"status": "Terminated"})
    api = client_of(double)
    api.start_predictions("p", "m")
    api.get_current_attributes("c")
    api.get_current_attributes(["c", "d"])
    api.activate_package("p")
    api.stop_session("s")
    api.continue_session("s", 3, 9)
    assert [request.json for request in double.asked] == [
        {"prediction_id": "p", "model_id": "m"},
        {"client_ids": ["c"]},
        {"client_ids": ["c", "d"]},
        {"id": "p"},
        {"status": "Terminated"},
        {"session_id": "s", "rounds": 3, "round_timeout": 9},
    ]


def test_a_session_is_created_and_started_with_what_was_said(double: Double) -> None:
    double.answer = lambda request: as_json({"session_id": "s", "message": "Session started"})
    api = client_of(double)
    answer = api.start_session(
        "n", model_id="m", rounds=10, timeout=60, min_clients=9, client_settings={"seed": 7}, client_ids=["a", "b"],
        wait_for_clients_s=5, aggregator_kwargs={"x": 1}, validate=False,
    )  # fmt: skip
    created, started = (request.json for request in double.asked)
    assert answer == {"message": "Session started", "session_id": "s"}
    assert created == {
        "name": "n",
        "seed_model_id": "m",
        "session_config": {
            "aggregator": "fedavg",
            "aggregator_kwargs": {"x": 1},
            "model_id": "m",
            "round_timeout": 60,
            "rounds": 10,
            "buffer_size": -1,
            "delete_models_storage": True,
            "validate": False,
            "clients_required": 9,
            "requested_clients": 9,
            "helper_type": None,
            "server_functions": None,
            "client_settings": {"seed": 7},
        },
    }
    assert started == {
        "session_id": "s",
        "rounds": 10,
        "round_timeout": 60,
        "wait_for_clients_s": 5,
        "client_ids": "a,b",
    }


def test_server_functions_go_as_their_source(double: Double) -> None:
    double.answer = lambda request: as_json({"session_id": "s"})
    client_of(double).start_session(model_id="m", server_functions=EventParser)
    sent = double.asked[0].json["session_config"]["server_functions"]
    assert sent.startswith("class EventParser:")


def test_pages_are_asked_for_in_headers(double: Double) -> None:
    double.answer = lambda request: as_json(PAGE)
    api = client_of(double)
    api.get_clients(n_max=3)
    api.find("rounds", {"status": None, "round_id__gt": 4}, sort="round_id", descending=False)
    limited, sorted_ = double.asked
    assert limited.headers["x-limit"] == "3"
    assert (sorted_.line, sorted_.headers["x-sort-key"], sorted_.headers["x-sort-order"]) == (
        "GET /api/v1/rounds/?round_id__gt=4",
        "round_id",
        "asc",
    )
    assert "x-limit" not in sorted_.headers


def test_a_trail_is_as_long_as_the_models_are_many_unless_a_limit_is_said(double: Double) -> None:
    double.answer = lambda request: as_json(7) if request.line.endswith("/count") else as_json(PAGE)
    api = client_of(double)
    api.get_model_trail()
    api.get_model_trail("m", reverse=False, n_max=2)
    trails = [request for request in double.asked if "ancestors" in request.line]
    assert [request.line for request in trails] == [
        "GET /api/v1/models/m9/ancestors?include_self=true",
        "GET /api/v1/models/m/ancestors?include_self=true",
    ]
    assert [(request.headers["x-limit"], request.headers["x-reverse"]) for request in trails] == [
        ("7", "true"),
        ("2", "false"),
    ]


def test_a_model_and_a_package_are_uploaded_as_forms(double: Double, tmp_path: Path) -> None:
    file = tmp_path / "seed.npz"
    file.write_text("bytes")
    double.answer = lambda request: as_json({"message": "Active helper set", "model_id": "m1"})
    api = client_of(double)
    assert api.set_active_model(str(file), name="first")["model_id"] == "m1"
    api.set_active_package(file, "numpyhelper", "digits")
    helper, model, package = double.asked
    assert (helper.line, helper.json) == ("PUT /api/v1/helpers/active", {"helper": "numpyhelper"})
    assert (model.line, model.form) == (
        "POST /api/v1/models/",
        {"helper": "numpyhelper", "name": "first", "file": "bytes"},
    )
    assert (package.line, package.form) == (
        "POST /api/v1/packages/",
        {"helper": "numpyhelper", "name": "digits", "description": "", "file": "bytes"},
    )


@pytest.mark.parametrize("token", ["abc", "Bearer abc"])
def test_a_token_is_sent_with_its_scheme(double: Double, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    double.answer = lambda request: as_json(PAGE)
    for name in ("FL_TOKEN", "FEDN_AUTH_TOKEN", "FEDN_AUTH_SCHEME"):
        monkeypatch.delenv(name, raising=False)
    client_of(double, token=token).get_clients()
    client_of(double, token=token, auth_scheme="Token").get_clients()
    monkeypatch.setenv("FEDN_AUTH_TOKEN", token)
    client_of(double).get_clients()
    monkeypatch.setenv("FL_TOKEN", "ours")
    monkeypatch.setenv("FEDN_AUTH_SCHEME", "Key")
    client_of(double).get_clients()
    sent = [request.headers.get("authorization") for request in double.asked]
    assert sent == ["Bearer abc", "Token abc", "Bearer abc", "Key ours"]


def test_without_a_token_there_is_no_header(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    double.answer = lambda request: as_json(PAGE)
    monkeypatch.delenv("FL_TOKEN", raising=False)
    monkeypatch.delenv("FEDN_AUTH_TOKEN", raising=False)
    client_of(double).get_clients()
    assert "authorization" not in double.asked[0].headers


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ({"host": "localhost", "port": 8092}, "http://localhost:8092"),
        ({"host": "https://fl.example/prefix/"}, "http://fl.example/prefix"),
        ({"host": "http://fl.example/prefix", "port": 81, "secure": True}, "https://fl.example:81/prefix"),
        ({"host": "fl.example:8092"}, "http://fl.example:8092"),
    ],
)
def test_secure_alone_decides_the_scheme_and_a_path_is_kept(options: dict[str, Any], url: str) -> None:
    assert APIClient(**options).base_url == url


@pytest.mark.parametrize("options", [{"host": ""}, {"host": "a:b"}, {"host": "a", "token": "ä"}])
def test_what_cannot_be_sent_is_a_value_error(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^(host|token): "):
        APIClient(**options)


# ---- errors


def test_the_servers_words_are_raised_or_with_raise_errors_false_returned(double: Double) -> None:
    refusal = {"message": "rounds: 0 is too few\nby one"}
    double.answer = lambda request: as_json(refusal, 400)
    with pytest.raises(APIError, match=r"^rounds: 0 is too few by one$") as raised:
        client_of(double).get_clients()
    assert raised.value.status_code == 400
    assert client_of(double, raise_errors=False).get_clients() == refusal


def test_a_refused_start_says_which_session_was_created(double: Double) -> None:
    def answer(request: Any) -> Any:
        if request.line.endswith("/start"):
            return as_json({"message": "A session is already running!"}, 400)
        return as_json({"session_id": "s7"}, 201)

    double.answer = answer
    with pytest.raises(APIError, match=r"^A session is already running!; session s7 is created$"):
        client_of(double).start_session(model_id="m")
    answered = client_of(double, raise_errors=False).start_session(model_id="m")
    assert answered == {"message": "A session is already running!", "session_id": "s7"}


def test_what_fedn_says_without_asking_is_said_in_the_same_way(double: Double) -> None:
    double.answer = lambda request: as_json({"count": 0, "result": []})
    quiet, loud = client_of(double, raise_errors=False), client_of(double)
    said: list[tuple[Callable[[APIClient], object], str]] = [
        (lambda api: api.get_session(), "No id or name provided."),
        (lambda api: api.get_session(name="x"), "Session not found."),
        (lambda api: api.start_session(), "No models found in the repository"),
        (lambda api: api.continue_session(""), "No session id provided."),
        (lambda api: api.continue_session("s", 0), "Invalid number of rounds provided. Must be greater than 0."),
        (lambda api: api.continue_session("s", 1, 0), "Invalid round timeout provided. Must be greater than 0."),
    ]
    for call, words in said:
        assert call(quiet) == {"message": words}
        with pytest.raises(APIError, match=re.escape(words)):
            call(loud)
    assert loud.get_model_trail() == []
    assert loud.get_active_model() == {"count": 0, "result": []}
    assert quiet.get_session_status("x") == "Could not retrieve session status."
    with pytest.raises(ValueError, match="client_list"):
        loud.get_current_attributes([])


def test_an_empty_id_is_not_the_whole_collection(double: Double) -> None:
    with pytest.raises(APIError, match="models: an empty id"):
        client_of(double).get_model("")
    assert double.asked == []


@pytest.mark.parametrize("raise_errors", [True, False])
def test_nobody_there_is_an_error_that_names_the_url_and_has_no_status(raise_errors: bool, tmp_path: Path) -> None:
    with answering() as gone:
        port = gone.port
    api = APIClient("127.0.0.1", port, raise_errors=raise_errors)
    calls: list[Callable[[], object]] = [
        api.get_clients,
        lambda: api.download_model("m", tmp_path / "m.npz"),
        lambda: next(api.events()),
        lambda: api.wait_for_session("s", 5),
    ]
    for call in calls:
        with pytest.raises(APIError, match=rf"http://127.0.0.1:{port}/api/v1/\w+/.*: no server answers") as raised:
            call()
        assert raised.value.status_code is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [200, 404, 502])
def test_somebody_else_there_is_said(double: Double, tmp_path: Path, status: int) -> None:
    double.answer = lambda request: (status, "text/html", b"<html>welcome</html>")
    api = client_of(double)
    calls: list[Callable[[], object]] = [
        api.get_clients,
        lambda: api.download_model("m", tmp_path / "m.npz"),
        lambda: next(api.events()),
    ]
    for call in calls:
        with pytest.raises(APIError, match=rf"there is no flserve \(status {status}\)") as raised:
            call()
        assert raised.value.status_code is None
    assert list(tmp_path.iterdir()) == []


def test_json_of_another_shape_is_said(double: Double) -> None:
    for body in ([1, 2], {"hello": "world"}):
        double.answer = lambda request, body=body: as_json(body)  # type: ignore[misc]
        with pytest.raises(APIError, match=r"there is no flserve \(.*\)") as raised:
            client_of(double).get_clients()
        assert raised.value.status_code is None


def test_a_failed_download_leaves_the_former_file(double: Double, tmp_path: Path) -> None:
    double.answer = lambda request: as_json({"message": "Entity with id: m not found"}, 404)
    target = tmp_path / "m.npz"
    target.write_text("former")
    with pytest.raises(APIError, match="Entity with id: m not found"):
        client_of(double).download_model("m", target)
    quiet = client_of(double, raise_errors=False).download_model("m", target)
    assert quiet == {"success": False, "message": "Entity with id: m not found"}
    assert [path.read_text() for path in tmp_path.iterdir()] == ["former"]


def test_a_package_is_downloaded_whole(double: Double, tmp_path: Path) -> None:
    double.answer = lambda request: (200, "application/x-tar", b"package")
    answer = client_of(double).download_package(tmp_path / "package.tgz")
    assert answer == {"success": True, "message": "Package downloaded successfully."}
    assert (double.asked[0].line, (tmp_path / "package.tgz").read_text()) == (
        "GET /api/v1/packages/download",
        "package",
    )


def test_a_model_whose_ending_says_nothing_is_not_uploaded(double: Double, tmp_path: Path) -> None:
    (tmp_path / "seed.pt").touch()
    with pytest.raises(ValueError, match=r"seed.pt: a model ends in one of .npz"):
        client_of(double).set_active_model(tmp_path / "seed.pt")
    with pytest.raises(FileNotFoundError):
        client_of(double).set_active_model(tmp_path / "seed.npz")
    assert double.asked == []


# ---- events


def test_server_sent_events_are_read_however_the_network_cuts_them() -> None:
    stream = (
        b': keep-alive\n\nid: 7\nevent: round\ndata: {"round":\ndata: 1}\n\n'
        b'event:model\r\ndata:{"a": "\xe2\x80\xa8"}\r\n\r\n'
        b'event: half\ndata: {"never": "finished"}\n'
    )
    whole, cut = EventParser(), EventParser()
    events = whole.feed(stream)
    assert [(event.id, event.kind, event.data) for event in events] == [
        (7, "round", {"round": 1}),
        (0, "model", {"a": "\u2028"}),
    ]
    assert [event for byte in stream for event in cut.feed(bytes([byte]))] == events


def _hello_and_signs_of_life(handler: BaseHTTPRequestHandler, stopping: threading.Event) -> None:
    handler.wfile.write(b": hello\n\n")
    while not stopping.wait(0.01):
        try:
            handler.wfile.write(b": ping\n\n")
        except OSError:
            return


def test_an_end_that_no_event_tells_is_noticed(double: Double) -> None:
    """A server that is killed right after a session's end tells nobody of it."""
    double.stream = _hello_and_signs_of_life
    asked = 0

    def answer(request: Any) -> Any:
        nonlocal asked
        asked += 1
        return as_json({"session_id": "s", "status": "Started" if asked < 3 else "Finished"})

    double.answer = answer
    assert client_of(double).wait_for_session("s", 60)["status"] == "Finished"
    asked = 0
    assert list(client_of(double).session_events("s")) == []
    assert asked == 3


def test_waiting_ends_with_its_time(double: Double) -> None:
    double.stream = _hello_and_signs_of_life
    double.answer = lambda request: as_json({"session_id": "s", "status": "Started"})
    with pytest.raises(TimeoutError, match=r"session s has not ended within 0\.1 s"):
        client_of(double).wait_for_session("s", 0.1)


# ---- against a server


@pytest.fixture
async def federation() -> AsyncIterator[Federation]:
    async with Federation() as running:
        yield running


async def ask(method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    async with asyncio.timeout(WAIT_S):
        return await asyncio.to_thread(method, *args, **kwargs)


def plus_one(parameters: Any, task: Any) -> TrainResult:
    assert task.settings["seed"] == 7
    return TrainResult([array + 1 for array in parameters], num_examples=1)


def score(parameters: Any, task: Any) -> dict[str, float]:
    return {"accuracy": float(parameters[0][0])}


async def test_a_sessions_life(tmp_path: Path) -> None:
    np.savez(tmp_path / "seed.npz", np.zeros(2))
    async with Federation(train=plus_one, validate=score, clients=2) as federation:
        host, _, port = federation.server.api_url.removeprefix("http://").rpartition(":")
        api = APIClient(host=host, port=int(port))
        assert await ask(api.get_controller_status) == {"state": "idle"}
        seed = (await ask(api.set_active_model, tmp_path / "seed.npz", "seed"))["model_id"]
        assert (await ask(api.get_active_model))["model_id"] == seed
        started = await ask(
            api.start_session, "life", rounds=3, timeout=60, min_clients=2, client_settings={"seed": 7},
            wait_for_clients_s=30, validate=True,
        )  # fmt: skip
        assert started["message"] == "Session started"
        session_id = started["session_id"]
        session = await ask(api.wait_for_session, session_id, WAIT_S)
        assert session == await ask(api.get_session, name="life") == await ask(api.get_session, session_id)
        assert await ask(api.session_is_finished, session_id)
        assert session["session_config"]["round_timeout"] == 60

        trail = await ask(api.get_model_trail)
        assert [model["session_id"] for model in trail] == [None, *[session_id] * 3]
        assert trail[0]["model_id"] == seed
        assert await ask(api.get_model_trail, include_self=False, reverse=False) == trail[-2::-1]
        last = session["session_config"]["model_id"]
        assert (await ask(api.download_model, last, tmp_path / "last.npz"))["success"] is True
        with np.load(io.BytesIO((tmp_path / "last.npz").read_bytes())) as model:
            assert [model[name].tolist() for name in model.files] == [[3.0, 3.0]]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["last.npz", "seed.npz"]

        validations = await ask(api.get_validations, session_id, last)
        assert [json.loads(found["data"]) for found in validations["result"]] == [{"accuracy": 3.0}] * 2
        assert await ask(api.get_validations_count) == 6
        assert await ask(api.get_validation, validations["result"][0]["validation_id"]) == validations["result"][0]
        rounds = await ask(api.get_rounds, 2)
        assert (rounds["count"], len(rounds["result"])) == (3, 2)
        assert (await ask(api.get_clients))["count"] == await ask(api.get_clients_count) == 2
        assert (await ask(api.get_active_clients, "combiner"))["count"] == 2
        combiner = (await ask(api.get_combiners))["result"][0]
        assert await ask(api.get_combiner, combiner["combiner_id"]) == combiner
        assert "is finished" in (await ask(api.get_explain, session_id))["sentences"][0]
        assert (await ask(api.get_client_config))["discover_port"] == int(port)
        assert await ask(api.get_models_count) == 4

        kinds = [event.kind for event in await ask(lambda: list(api.session_events(session_id)))]
        assert kinds.count("model") == 3 and kinds.count("validation") == 6 and "client" not in kinds

        assert (await ask(api.continue_session, session_id, 2))["message"] == "Session started"
        session = await ask(api.wait_for_session, session_id)
        assert (session["status"], await ask(api.get_models_count)) == ("Finished", 6)


async def test_a_session_is_stopped_and_one_that_cannot_be_is_said(federation: Federation) -> None:
    api = APIClient(federation.server.api_url.removeprefix("http://"))
    model_id = await federation.add_seed([np.zeros(2)])
    started = await ask(api.start_session, wait_for_clients_s=60)
    assert (await ask(api.stop_session, started["session_id"]))["status"] == "Terminated"
    assert await ask(api.get_session_status, started["session_id"]) == "Terminated"
    assert not await ask(api.session_is_finished, started["session_id"])
    with pytest.raises(APIError, match="Entity with id: nope not found") as raised:
        await ask(api.stop_session, "nope")
    assert raised.value.status_code == 404
    with pytest.raises(APIError, match=r"\b0 .*attached.*; session \S+ is created$"):
        await ask(api.start_session)
    with pytest.raises(APIError, match="server_functions: not supported"):
        await ask(api.start_session, server_functions=EventParser)
    with pytest.raises(APIError, match=r"^(aggregator|helper_type): "):
        await ask(api.start_splitlearning_session, model_id=model_id)


def package_file(folder: Path, name: str) -> Path:
    manifest = b"entry_points:\n  train:\n    command: python train.py\n"
    with tarfile.open(folder / name, "w:gz") as archive:
        for member, data in (("fedn.yaml", manifest), ("train.py", name.encode())):
            entry = tarfile.TarInfo(member)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return folder / name


async def test_packages_are_uploaded_activated_and_downloaded(federation: Federation, tmp_path: Path) -> None:
    api = APIClient(federation.server.api_url.removeprefix("http://"))
    with pytest.raises(APIError):
        await ask(api.get_active_package)
    files = [package_file(tmp_path, name) for name in ("first.tgz", "second.tgz")]
    for file in files:
        await ask(api.set_active_package, str(file), "numpyhelper", file.stem)
    active = await ask(api.get_active_package)
    assert (active["name"], active["active"]) == ("second", True)
    assert await ask(api.get_package, active["package_id"]) == active
    assert await ask(api.get_packages_count) == (await ask(api.get_packages))["count"] == 2
    first = (await ask(api.find, "packages", {"name": "first"}))["result"][0]
    await ask(api.activate_package, first["package_id"])
    assert (await ask(api.download_package, tmp_path / "got.tgz"))["success"] is True
    assert (tmp_path / "got.tgz").read_bytes() == files[0].read_bytes()
    assert (await ask(api.get_package_checksum))["checksum"] == hashlib.sha256(files[0].read_bytes()).hexdigest()
    (tmp_path / "text.tgz").write_text("text")
    with pytest.raises(APIError, match=r"^file: "):
        await ask(api.set_active_package, tmp_path / "text.tgz", "numpyhelper", "text")


ENTITIES = ("attributes", "metrics", "packages", "predictions", "runs", "statuses", "telemetry")


async def test_every_list_answers_a_page(federation: Federation) -> None:
    api = APIClient(federation.server.api_url.removeprefix("http://"))
    for entity in ENTITIES:
        assert await ask(getattr(api, f"get_{entity}"), n_max=3) == {"count": 0, "result": []}
    for entity in ("packages", "statuses", "validations", "rounds", "sessions"):
        assert await ask(getattr(api, f"get_{entity}_count")) == 0


async def test_events_that_are_kept_come_without_following(federation: Federation) -> None:
    api = APIClient(federation.server.api_url.removeprefix("http://"))
    models = [await federation.add_seed([np.zeros(2)]) for _ in range(3)]
    events = await ask(lambda: list(api.events(after=0, follow=False)))
    assert [event.data["model_id"] for event in events if event.kind == "model"] == models
    after_first = next(event for event in events if event.kind == "model").id
    later = await ask(lambda: list(api.events(after_first, follow=False)))
    assert [event.data["model_id"] for event in later if event.kind == "model"] == models[1:]


async def test_events_go_on_over_a_restart_of_the_server(tmp_path: Path) -> None:
    np.savez(tmp_path / "seed.npz", np.zeros(2))
    async with ServerProcess(tmp_path / "data") as process:
        api = APIClient(process.api_url.removeprefix("http://"))
        first = (await ask(api.set_active_model, tmp_path / "seed.npz"))["model_id"]
        events = (event for event in api.events(after=0) if event.kind == "model")
        assert (await ask(lambda: next(events))).data["model_id"] == first
        following = asyncio.create_task(ask(lambda: next(events)))
        await process.kill()
        await process.start()
        second = (await ask(api.set_active_model, tmp_path / "seed.npz"))["model_id"]
        assert (await following).data["model_id"] == second
        events.close()


# ---- tokens that are renewed, and certificates


def renewing(issuer: Double, access: str = "") -> Tokens:
    return Tokens(access, refresh="again", refresh_uri=f"http://127.0.0.1:{issuer.port}/refresh")


async def test_it_gets_a_new_token_before_the_old_one_expires_and_when_one_is_refused() -> None:
    wrong = token("admin", key="another secret, which is long", exp=time.time() + 600)
    due = token("admin", exp=time.time() + 0.1)
    for first in ("", due, wrong):
        with answering() as issuer:
            issuer.answer = lambda request: as_json({"access": token("admin", exp=time.time() + 600)})
            async with Federation(jwt_secret_key=SECRET) as federation:
                api = APIClient(federation.server.api_url, token=renewing(issuer, first))
                pages = [await asyncio.to_thread(api.get_clients) for _ in range(3)]
            assert [page["count"] for page in pages] == [0, 0, 0]
            assert [request.json for request in issuer.asked] == [{"refresh": "again"}]


async def test_a_model_is_sent_again_whole_when_its_token_was_refused(tmp_path: Path) -> None:
    file = tmp_path / "seed.npz"
    np.savez(file, **{"0": np.zeros(1000)})
    wrong = token("admin", key="another secret, which is long", exp=time.time() + 600)
    with answering() as issuer:
        issuer.answer = lambda request: as_json({"access": token("admin", exp=time.time() + 600)})
        async with Federation(jwt_secret_key=SECRET) as federation:
            api = APIClient(federation.server.api_url, token=renewing(issuer, wrong))
            with file.open("rb") as sent:
                added = await asyncio.to_thread(
                    lambda: api._upload("/api/v1/models/", ("seed.npz", sent), {"helper": "numpyhelper"})
                )
            await asyncio.to_thread(api.download_model, added["model_id"], tmp_path / "got.npz")
    with np.load(tmp_path / "got.npz") as got:
        assert [array.tolist() for array in got.values()] == [[0.0] * 1000]


async def test_events_go_on_over_the_end_of_a_token() -> None:
    """Before which nothing has happened."""
    loop, renewed = asyncio.get_running_loop(), asyncio.Event()
    away = iter([as_json({}, 503)])  # at first, so that the stream begins with a token that is good for another second

    def answer(request: Request) -> Answer:
        if (refusal := next(away, None)) is not None:
            return refusal
        loop.call_soon_threadsafe(renewed.set)
        return as_json({"access": token("admin", exp=time.time() + 600)})

    with answering() as issuer:
        issuer.answer = answer
        async with Federation(jwt_secret_key=SECRET) as federation:
            api = APIClient(federation.server.api_url, token=renewing(issuer, token("admin", exp=time.time() - 4)))
            reading = asyncio.ensure_future(asyncio.to_thread(next, api.events(0)))
            await federation.until(renewed.wait())
            federation.add_client("a", train=unchanged, token=token("client", sub="a"))
            event = await federation.until(reading)
    assert (event.kind, event.data["client_id"]) == ("client", "a")


def unchanged(parameters: Any, task: Any) -> Any:
    return TrainResult(parameters, 1)


def test_an_issuer_that_is_away_ends_nothing_while_the_old_token_is_good(double: Double) -> None:
    with answering() as issuer:
        issuer.answer = lambda request: (200, "text/html", b"<html>")
        due = token("admin", exp=time.time() + 0.1)
        api = client_of(double, token=renewing(issuer, due))
        double.answer = lambda request: as_json(PAGE)
        api.get_clients()
        assert double.asked[0].headers["authorization"] == f"Bearer {due}"
        double.answer = lambda request: as_json({"message": "Token expired"}, 401)
        with pytest.raises(APIError, match="no new access token from http") as failed:
            api.get_clients()
    assert failed.value.status_code == 401
    assert "again" not in str(failed.value) and due not in str(failed.value)


def test_the_issuer_is_found_in_the_environment(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering() as issuer:
        issuer.answer = lambda request: as_json({"access": "new"})
        double.answer = lambda request: as_json(PAGE)
        monkeypatch.setenv("FEDN_AUTH_REFRESH_TOKEN", "again")
        monkeypatch.setenv("FEDN_AUTH_REFRESH_TOKEN_URI", f"http://127.0.0.1:{issuer.port}/refresh")
        monkeypatch.setenv("FEDN_AUTH_SCHEME", "Token")
        client_of(double).get_clients()
    assert double.asked[0].headers["authorization"] == "Token new"


async def test_it_shows_a_certificate_where_the_server_wants_one(tmp_path: Path) -> None:
    made, theirs = (private_certificates(tmp_path / name, []) for name in ("server", "client"))
    settings = {"tls_cert": made.certificate, "tls_key": made.key, "tls_client_ca": theirs.ca}
    given = {"api_port": 0, "grpc_port": 0, "data_dir": tmp_path / "data", **settings}
    async with serving(Settings.load(None, given)) as server:

        def asked(**more: Any) -> int:
            where = server.api_url.removeprefix("https://")
            return APIClient(where, secure=True, verify=str(made.ca), **more).get_clients_count()

        shown = {"client_cert": theirs.certificate, "client_key": theirs.key}
        assert await asyncio.to_thread(lambda: asked(**shown)) == 0
        with pytest.raises(APIError, match="no server answers"):
            await asyncio.to_thread(asked)
        # and the command line
        command = ("model", "list", "--tls-ca", str(made.ca))
        pair = ("--tls-cert", str(theirs.certificate), "--tls-key", str(theirs.key))
        assert (await asyncio.to_thread(lambda: run(*command, *pair, api_url=server.api_url))).code == 0
        assert (await asyncio.to_thread(lambda: run(*command, api_url=server.api_url))).code == 3
        missing = ("--tls-cert", str(tmp_path / "none.pem"))
        said = await asyncio.to_thread(lambda: run(*command, *missing, api_url=server.api_url))
        assert (said.code, len(said.err.splitlines())) == (2, 1)
        assert "none.pem" in said.err
