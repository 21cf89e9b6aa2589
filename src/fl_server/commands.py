"""The commands of flserve against a running server: sessions, models, packages, records, events.

Thin: they ask through fl_client's APIClient and print. What cannot be done is one line on stderr and an exit code.
`fl_client.APIClient` is looked up where it is used: a help text does not wait for an HTTP library.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import fl_client
from fl_server.watch import Progress, shown

if TYPE_CHECKING:
    from fl_client.api import Entity, Object

DEFAULT_URL = "http://127.0.0.1:8092"
MAX_CELL = 100  # characters


class Exit(IntEnum):
    DONE = 0
    REFUSED = 1  # the server says no, or the session did not finish
    USAGE = 2  # the command line is wrong, or a file that it names
    NO_SERVER = 3  # nobody answers, or somebody else
    INTERRUPTED = 130


EXIT_CODES = (
    "Exit codes: 0 done; 1 the server says no, or what was run has failed; 2 the command line is wrong, or a file that "
    "it names; 3 no server answers; 130 interrupted."
)


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"


ApiUrl = Annotated[str, typer.Option("--api-url", envvar="FL_API_URL", help="The server's REST address.")]
Token = Annotated[str | None, typer.Option("--token", envvar="FL_TOKEN", help="Sent with each request.")]
OutputFormat = Annotated[Format, typer.Option("--format", help="table for people, json for machines.")]


def fail(why: object, code: Exit = Exit.REFUSED) -> typer.Exit:
    typer.echo(f"flserve: {' '.join(str(why).split())}", err=True)
    return typer.Exit(code)


@dataclass(frozen=True, slots=True)
class _Trust:
    """Whom a command believes, and what it shows of itself: files in PEM."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


_trust: ContextVar[_Trust] = ContextVar("trust")
_TRUST_OPTIONS = {
    "tls_ca": Annotated[
        Path | None, typer.Option(envvar="FL_TLS_CA", help="PEM of the CA that signed the server's certificate.")
    ],
    "tls_cert": Annotated[
        Path | None, typer.Option(envvar="FL_CLIENT_CERT", help="PEM to show, where the server wants one.")
    ],
    "tls_key": Annotated[Path | None, typer.Option(envvar="FL_CLIENT_KEY", help="Its private key.")],
}


def asking(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of TLS, which server() finds."""

    @wraps(command)
    def wrapped(*, tls_ca: Path | None, tls_cert: Path | None, tls_key: Path | None, **given: Any) -> None:
        before = _trust.set(_Trust(tls_ca, tls_cert, tls_key))
        try:
            command(**given)
        finally:
            _trust.reset(before)

    as_written = inspect.signature(command, eval_str=True)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in _TRUST_OPTIONS.items()
    ]
    wrapped.__signature__ = as_written.replace(parameters=[*as_written.parameters.values(), *more])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {**command.__annotations__, **_TRUST_OPTIONS}
    return wrapped


@contextmanager
def server(api_url: str, token: str | None) -> Iterator[fl_client.APIClient]:
    """What goes wrong inside ends the command with one line and the exit code for it."""
    scheme, marked, host = api_url.rpartition("://")
    if marked and scheme not in ("http", "https"):
        raise fail(f"--api-url: {api_url}: http:// or https:// needed", Exit.USAGE)
    trust = _trust.get(_Trust())
    try:
        verify = (str(trust.ca) if trust.ca else True) if scheme == "https" else False
        yield fl_client.APIClient(
            host,
            secure=scheme == "https",
            verify=verify,
            token=token,
            client_cert=trust.certificate,
            client_key=trust.key,
        )
    except fl_client.APIError as exc:
        raise fail(exc, Exit.NO_SERVER if exc.status_code is None else Exit.REFUSED) from None
    except BrokenPipeError:
        raise
    except OSError as exc:
        where = exc.filename or ", ".join(str(path) for path in (trust.ca, trust.certificate, trust.key) if path)
        raise fail(f"{where}: {exc.strerror or exc}", Exit.USAGE) from None
    except ValueError as exc:
        raise fail(exc, Exit.USAGE) from None


def _group(noun: str, about: str) -> typer.Typer:
    return typer.Typer(name=noun, help=about, no_args_is_help=True, rich_markup_mode=None)


# ---- printing


def print_json(value: object) -> None:
    typer.echo(json.dumps(value))


def _answer(format: Format, value: object, text: str) -> None:
    """The server's answer for machines, a sentence for people."""
    print_json(value) if format is Format.JSON else typer.echo(text)


def print_table(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """columns: heading to field, dotted for what lies inside. Nothing is wrapped or cut to a terminal's width."""
    lines = [list(columns), *([_cell(_inside(row, field)) for field in columns.values()] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _inside(row: Mapping[str, Any], field: str) -> object:
    value: Any = row
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _cell(value: object) -> str:
    if value is None:
        return "-"
    text = value if isinstance(value, str) else json.dumps(value)
    plain = "".join(character if character.isprintable() else " " for character in text)
    return plain if len(plain) <= MAX_CELL else plain[: MAX_CELL - 1] + "…"


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, inner


def print_object(value: Mapping[str, Any]) -> None:
    """A line for each field, those inside with dotted names; long texts whole."""
    pairs = [(name, "-" if inner is None else inner) for name, inner in _flat(value)]
    width = max((len(name) for name, _ in pairs), default=0)
    for name, inner in pairs:
        typer.echo(f"{name.ljust(width)}  {inner if isinstance(inner, str) else json.dumps(inner)}")


# ---- list and get, of every noun


@dataclass(frozen=True, slots=True)
class Listing:
    entity: Entity
    columns: Mapping[str, str]  # heading to field
    about: str
    filter: str  # an example of one


def _columns(*fields: str, **renamed: str) -> dict[str, str]:
    return {field: field for field in fields} | renamed


LISTINGS: Mapping[str, Listing] = {
    "session": Listing(
        "sessions",
        _columns("session_id", "name", "status", rounds="session_config.rounds", since="committed_at")
        | _columns(reason="status_reason"),
        "Training jobs: start, watch, stop.",
        "status=Started",
    ),
    "client": Listing(
        "clients",
        _columns("client_id", "name", "status", "combiner", "last_seen"),
        "Clients, attached or not.",
        "status=online",
    ),
    "model": Listing(
        "models",
        _columns("model_id", "name", "session_id", "parent_model", "committed_at"),
        "Models: upload, download, trail.",
        "name=seed",
    ),
    "round": Listing(
        "rounds",
        _columns("round_id", "status", session="round_config.session_id", model="round_config.model_id")
        | _columns("committed_at", reason="status_reason"),
        "Rounds of all sessions.",
        "status=Failed",
    ),
    "package": Listing(
        "packages",
        _columns("package_id", "name", "active", "helper", "file_name", "committed_at"),
        "Compute packages: upload, activate.",
        "active=true",
    ),
    "status": Listing(
        "statuses",
        _columns("timestamp", sender="sender.name", level="log_level") | _columns("type", "status", id="status_id"),
        "What clients and combiner have logged.",
        "log_level=ERROR",
    ),
    "validation": Listing(
        "validations",
        _columns("timestamp", sender="sender.name") | _columns("model_id", "data", id="validation_id"),
        "What clients measured on models.",
        "sender.name=hospital-a",
    ),
    "combiner": Listing(
        "combiners",
        _columns("combiner_id", "name", "address", "port"),
        "What clients are attached to.",
        "name=combiner",
    ),
    "run": Listing(
        "runs",
        _columns("run_id", "session_id", "rounds", began_with="model_id", ended_with="completed_at_model_id")
        | _columns("completed_at"),
        "Starts of sessions.",
        "rounds__gt=5",
    ),
}


def _list_command(listing: Listing) -> Callable[..., None]:
    def list_them(
        limit: Annotated[int, typer.Option(min=1, help="Rows at most.")] = 50,
        filter: Annotated[
            list[str] | None, typer.Option(help="field=value; again for more.", show_default=False)
        ] = None,
        sort: Annotated[str | None, typer.Option(help="A field; -field descends. [default: newest first]")] = None,
        api_url: ApiUrl = DEFAULT_URL,
        token: Token = None,
        format: OutputFormat = Format.TABLE,
    ) -> None:
        pairs: list[tuple[str, object]] = []
        for text in filter or ():
            name, equals, value = text.partition("=")
            if not equals:
                raise fail(f"--filter: {text}: field=value needed", Exit.USAGE)
            pairs.append((name, value))
        field, descending = (sort.removeprefix("-"), sort.startswith("-")) if sort else (None, True)
        with server(api_url, token) as api:
            page = api.find(listing.entity, pairs, n_max=limit, sort=field, descending=descending)
        if format is Format.JSON:
            print_json(page)
            return
        print_table(listing.columns, page["result"])
        if page["count"] > len(page["result"]):
            typer.echo(f"{len(page['result'])} of {page['count']} shown: --limit, --filter", err=True)

    return list_them


def _get_command(listing: Listing) -> Callable[..., None]:
    def get_one(
        id: Annotated[str, typer.Argument(help="As `list` shows it.")],
        api_url: ApiUrl = DEFAULT_URL,
        token: Token = None,
        format: OutputFormat = Format.TABLE,
    ) -> None:
        with server(api_url, token) as api:
            found = api.get(listing.entity, id)
        print_json(found) if format is Format.JSON else print_object(found)

    return get_one


GROUPS: Mapping[str, typer.Typer] = {noun: _group(noun, listing.about) for noun, listing in LISTINGS.items()}
for _noun, _listing in LISTINGS.items():
    _example = f"Example: flserve {_noun} list --limit 5 --filter {_listing.filter}"
    GROUPS[_noun].command("list", help=f"List {_listing.entity}, the newest first.\n\n{_example}")(
        _list_command(_listing)
    )
    GROUPS[_noun].command(
        "get", help=f"Show one with all its fields.\n\nExample: flserve {_noun} get ID --format json"
    )(_get_command(_listing))


# ---- sessions


def _json_object(option: str, text: str | None) -> Object | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise fail(f"{option}: no JSON: {exc}", Exit.USAGE) from None
    if not isinstance(value, dict):
        raise fail(f"{option}: a JSON object needed, such as '{{\"seed\": 7}}'", Exit.USAGE)
    return value


@GROUPS["session"].command("start")
def start_session(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to train.")] = 5,
    min_clients: Annotated[int, typer.Option(help="A round needs so many clients.")] = 1,
    requested_clients: Annotated[int, typer.Option(help="A round takes at most so many; 0: all.")] = 0,
    round_timeout: Annotated[float, typer.Option(help="Seconds that clients have for a round.")] = 180,
    buffer_size: Annotated[int, typer.Option(help="Updates that close a round; -1: all.")] = -1,
    model: Annotated[str | None, typer.Option(help="Model to start from. [default: the newest]")] = None,
    name: Annotated[str | None, typer.Option(help="The session's name.")] = None,
    aggregator: Annotated[str, typer.Option(help="fedavg, fedopt, …")] = "fedavg",
    aggregator_kwargs: Annotated[str | None, typer.Option(help="A JSON object.")] = None,
    validate: Annotated[bool, typer.Option(help="Clients validate each round's model.")] = True,
    helper: Annotated[str | None, typer.Option(help="The models' format. [default: the active one]")] = None,
    client_settings: Annotated[str | None, typer.Option(help="A JSON object that goes to the clients.")] = None,
    wait_for_clients: Annotated[float, typer.Option(help="Seconds to wait for the first clients.")] = 0,
    watch: Annotated[bool, typer.Option("--watch", help="Stay until it has ended, and show how it goes.")] = False,
    api_url: ApiUrl = DEFAULT_URL,
    token: Token = None,
    format: OutputFormat = Format.TABLE,
) -> None:
    """Create a session and start it. With --watch the exit code says whether it finished.

    Example: flserve session start --rounds 10 --min-clients 2 --watch
    """
    kwargs = _json_object("--aggregator-kwargs", aggregator_kwargs)
    settings = _json_object("--client-settings", client_settings)
    with server(api_url, token) as api:
        started = api.start_session(
            name=name,
            aggregator=aggregator,
            aggregator_kwargs=kwargs,
            model_id=model,
            round_timeout=int(round_timeout) if round_timeout.is_integer() else round_timeout,
            rounds=rounds,
            round_buffer_size=buffer_size,
            validate=validate,
            helper=helper,
            min_clients=min_clients,
            requested_clients=requested_clients,
            wait_for_clients_s=wait_for_clients,
            client_settings=settings,
        )
        if watch:
            raise typer.Exit(_watch(api, Progress(started["session_id"], rounds, validate), format))
    _answer(format, started, f"session {started['session_id']} is started: flserve explain {started['session_id']}")


def _watch(api: fl_client.APIClient, progress: Progress, format: Format) -> Exit:
    """Shows the session until it has ended; in JSON, its end is all that stdout gets."""
    console, id = Console(stderr=format is Format.JSON), progress.session_id
    try:
        with shown(console, f"session {id}") as show:
            for event in api.session_events(id):
                if progress.apply(event.kind, event.data, event.data["at"]):
                    show(progress)
            session = api.get_session(id)  # the last word: its last event may be lost with a server
            status, reason = session["status"], session.get("status_reason")
            progress.apply("session", {"session_id": id, "status": status, "reason": reason}, progress.at_s)
            show(progress)
    except KeyboardInterrupt:
        typer.echo(f"flserve: not watching any more; session {id} goes on: flserve session stop {id} ends it", err=True)
        return Exit.INTERRUPTED
    model_id = session["session_config"]["model_id"]
    why = f": {reason}" if reason else ""
    _answer(format, session, f"session {id} is {status}{why}; {progress.completed} rounds, model {model_id}")
    return Exit.DONE if status == "Finished" else Exit.REFUSED


@GROUPS["session"].command("stop")
def stop_session(
    id: Annotated[str, typer.Argument(help="As `list` shows it.")],
    api_url: ApiUrl = DEFAULT_URL,
    token: Token = None,
    format: OutputFormat = Format.TABLE,
) -> None:
    """Stop a session; its models stay.

    Example: flserve session stop ID
    """
    with server(api_url, token) as api:
        stopped = api.stop_session(id)
    _answer(format, stopped, f"session {id} is {stopped['status']}")


@asking
def explain(
    session: Annotated[str | None, typer.Argument(help="Session id. [default: the newest]")] = None,
    api_url: ApiUrl = DEFAULT_URL,
    token: Token = None,
    format: OutputFormat = Format.TABLE,
) -> None:
    """Say why a session is where it is.

    Example: flserve explain
    """
    with server(api_url, token) as api:
        if session is None:
            newest = api.get_sessions(n_max=1)["result"]
            if not newest:
                raise fail("there is no session yet")
            session = str(newest[0]["session_id"])
        said = api.get_explain(session)
    _answer(format, said, "\n".join(said["sentences"]))


# ---- models


@GROUPS["model"].command("upload")
def upload_model(
    file: Annotated[Path, typer.Argument(help="An .npz of real, finite arrays.")],
    name: Annotated[str | None, typer.Option(help="The model's name.")] = None,
    api_url: ApiUrl = DEFAULT_URL,
    token: Token = None,
    format: OutputFormat = Format.TABLE,
) -> None:
    """Upload a model to start sessions from.

    Example: flserve model upload seed.npz --name seed
    """
    with server(api_url, token) as api:
        added = api.set_active_model(file, name)
    _answer(format, added, f"model {added.get('model_id')} is stored")


@GROUPS["model"].command("download")
def download_model(
    id: Annotated[str, typer.Argument(help="As `list` shows it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    api_url: ApiUrl = DEFAULT_URL,
    token: Token = None,
    format: OutputFormat = Format.TABLE,
) -> None:
    """Download a model.

    Example: flserve model download ID -o model.npz
    """
    with server(api_url, token) as api:
        api.download_model(id, output)
        size_bytes = output.stat().st_size
    written = {"model_id": id, "path": str(output), "size_bytes": size_bytes}
    _answer(format, written, f"model {id} is in {output} ({size_bytes} bytes)")


@GROUPS["model"].command("trail")
def model_trail(
    id: Annotated[str | None, typer.Argument(help="As `list` shows it. [default: the newest]")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Models at most, the newest ones.", show_default="all")
    ] = None,
    api_url: ApiUrl = DEFAULT_URL,
    token: Token = None,
    format: OutputFormat = Format.TABLE,
) -> None:
    """List the models from the seed to this one.

    Example: flserve model trail
    """
    with server(api_url, token) as api:
        trail = api.get_model_trail(id, n_max=limit)[-(limit or 0) :]  # FEDn's limit leaves the model itself out
    print_json(trail) if format is Format.JSON else print_table(LISTINGS["model"].columns, trail)


# ---- packages


@GROUPS["package"].command("upload")
def upload_package(
    file: Annotated[Path, typer.Argument(help="A .tgz, .tar.gz, .tar.bz2 or .zip with a fedn.yaml.")],
    name: Annotated[str, typer.Option(help="The package's name.")],
    helper: Annotated[str, typer.Option(help="The format of its models.")] = "numpyhelper",
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    api_url: ApiUrl = DEFAULT_URL,
    token: Token = None,
    format: OutputFormat = Format.TABLE,
) -> None:
    """Upload a compute package, and make it the active one.

    Example: flserve package upload package.tgz --name digits
    """
    with server(api_url, token) as api:
        added = api.set_active_package(file, helper, name, description)
    _answer(format, added, f"package {name} is the active one")


@GROUPS["package"].command("activate")
def activate_package(
    id: Annotated[str, typer.Argument(help="As `list` shows it.")],
    api_url: ApiUrl = DEFAULT_URL,
    token: Token = None,
    format: OutputFormat = Format.TABLE,
) -> None:
    """Make a package that was uploaded before the active one.

    Example: flserve package activate ID
    """
    with server(api_url, token) as api:
        answer = api.activate_package(id)
    _answer(format, answer, f"package {id} is the active one")


# ---- events


@asking
def events(
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what happens, until Ctrl-C.")] = False,
    after: Annotated[int | None, typer.Option(min=0, help="Only events after this id.", show_default=False)] = None,
    api_url: ApiUrl = DEFAULT_URL,
    token: Token = None,
    format: OutputFormat = Format.TABLE,
) -> None:
    """Print what has happened, as far as the server still keeps it; in JSON, one object a line.

    Example: flserve events --follow
    """
    with server(api_url, token) as api:
        for event in api.events(after or 0, follow):
            if format is Format.JSON:
                print_json({"id": event.id, "kind": event.kind, **event.data})
                continue
            facts = {name: value for name, value in event.data.items() if name != "at" and value not in (None, "")}
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.data["at"]))
            told = " ".join(f"{name}={_cell(value)}" for name, value in facts.items())
            typer.echo(f"{at}  {event.id}  {event.kind.ljust(10)}  {told}")


for _group_of_commands in GROUPS.values():
    for _command in _group_of_commands.registered_commands:
        assert _command.callback is not None
        _command.callback = asking(_command.callback)
