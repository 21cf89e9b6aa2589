"""flserve: the server and what is asked of it in the terminal.

Exit codes: 0 done, 1 the server says no or something failed, 2 the command line is wrong, 130 interrupted.
"""

from __future__ import annotations

import asyncio
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Federated-learning server: one model over data that does not leave its owner.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flserve {metadata.version('flserve')}")
        raise typer.Exit


@app.callback()
def _flserve(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _fail(why: object, code: int = 1) -> typer.Exit:
    typer.echo(f"flserve: {why}", err=True)
    return typer.Exit(code)


def _option(help: str) -> Any:
    return typer.Option(help=help, show_default=False)


@app.command()
def up(
    data_dir: Annotated[Path | None, _option("State, models and uploads lie here. [default: ./flserve-data]")] = None,
    host: Annotated[str | None, _option("Address to listen on. [default: 127.0.0.1]")] = None,
    api_port: Annotated[int | None, _option("REST; 0: a free one. [default: 8092]")] = None,
    grpc_port: Annotated[int | None, _option("gRPC; 0: a free one. [default: 12080]")] = None,
    advertise_host: Annotated[str | None, _option("Address that clients are told to dial.")] = None,
    log_level: Annotated[str | None, _option("DEBUG, INFO, WARNING or ERROR. [default: INFO]")] = None,
    config: Annotated[Path | None, _option("Settings in TOML; `flserve settings` lists them all.")] = None,
    ready_file: Annotated[Path | None, _option("Written when ready: JSON with api_url and grpc_port.")] = None,
) -> None:
    """Run the server until Ctrl-C.

    Example: flserve up --data-dir ./flserve-data
    """
    from fl_server import log
    from fl_server.app import Server, run
    from fl_server.errors import FlserveError, Invalid
    from fl_server.settings import Settings

    given = {
        "data_dir": data_dir,
        "host": host,
        "api_port": api_port,
        "grpc_port": grpc_port,
        "advertise_host": advertise_host,
        "log_level": log_level.upper() if log_level else None,
    }
    try:
        settings = Settings.load(config, given)
    except Invalid as wrong:
        raise _fail(wrong, 2) from None
    log.configure(settings.log_level)

    def ready(server: Server) -> None:
        if ready_file:
            part = ready_file.with_suffix(".part")
            part.write_text(json.dumps({"api_url": server.api_url, "grpc_port": server.grpc_port}))
            part.replace(ready_file)
        where = f"REST {server.api_url}, gRPC port {server.grpc_port}, data in {settings.data_dir}"
        typer.echo(f"flserve is ready: {where}")
        sys.stdout.flush()

    try:
        asyncio.run(run(settings, ready))
    except FlserveError as why:
        raise _fail(why) from None
    except BaseExceptionGroup as several:  # a TaskGroup's; one of its tasks says why
        ours, others = several.split(FlserveError)
        if ours is None or others is not None:
            raise
        first: BaseException = ours
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise _fail(first) from None


@app.command()
def settings() -> None:
    """List all settings with their `FL_*` variable, default and meaning.

    Example: FL_LOG_LEVEL=DEBUG flserve up
    """
    from rich.console import Console
    from rich.table import Table

    from fl_server.settings import PREFIX, Settings

    table = Table("setting", "variable", "default", "meaning", box=None)
    for name, field in Settings.model_fields.items():
        table.add_row(name, PREFIX + name.upper(), str(field.default), field.description or "")
    Console().print(table)


@app.command()
def demo(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of FedAvg.")] = 10,
    clients: Annotated[int, typer.Option(min=1, max=20, help="Client processes.")] = 5,
    data_dir: Annotated[Path | None, typer.Option(help="Kept afterwards. [default: ./flserve-data/demo]")] = None,
    format: Annotated[str, typer.Option(help="table, or json: one object as the last line.")] = "table",
) -> None:
    """Train on scikit-learn's digits with a server and clients of its own.

    Example: flserve demo --format json
    """
    from fl_server.demo import run_demo

    if format not in ("table", "json"):
        raise _fail(f"--format: {format!r}, table or json needed", 2)
    shown: Any = format
    code = asyncio.run(run_demo(data_dir=data_dir, rounds=rounds, clients=clients, output_format=shown))
    raise typer.Exit(code)


ApiUrl = Annotated[str, typer.Option("--api-url", envvar="FL_API_URL", help="The server's REST address.")]


@app.command()
def explain(
    session: Annotated[str | None, typer.Argument(help="Session id. [default: the newest]")] = None,
    api_url: ApiUrl = "http://127.0.0.1:8092",
    format: Annotated[str, typer.Option(help="text or json.")] = "text",
) -> None:
    """Say why a session is where it is.

    Example: flserve explain
    """
    if format not in ("text", "json"):
        raise _fail(f"--format: {format!r}, text or json needed", 2)
    if session is None:
        newest = _get(api_url, "/api/v1/sessions/", {"X-Limit": "1"})["result"]
        if not newest:
            raise _fail("there is no session yet")
        session = newest[0]["session_id"]
    said = _get(api_url, f"/api/v1/sessions/{session}/explain")
    typer.echo(json.dumps(said) if format == "json" else "\n".join(said["sentences"]))


def _get(api_url: str, path: str, headers: dict[str, str] | None = None) -> Any:
    import httpx

    try:
        reply = httpx.get(api_url.rstrip("/") + path, headers=headers, timeout=30)
    except httpx.HTTPError as why:
        raise _fail(f"no server at {api_url}: {why}") from None
    except httpx.InvalidURL as why:
        raise _fail(f"--api-url: {api_url}: {why}", 2) from None
    try:
        body = reply.json()
    except ValueError:
        raise _fail(f"what answers at {api_url} is no flserve (status {reply.status_code})") from None
    if reply.is_error:
        raise _fail(body.get("message", f"status {reply.status_code}") if isinstance(body, dict) else body)
    return body


if __name__ == "__main__":
    main()
