"""flserve: the program. Here is what runs a server; what asks a running one is in commands.py.

Our own modules are imported inside the functions that need them, here alone: a help text does not wait for FastAPI.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from fl_server import commands
from fl_server.commands import EXIT_CODES, Exit, Format, fail

app = typer.Typer(
    help="Federated-learning server: one model over data that does not leave its owner.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
token_app = typer.Typer(
    name="token", help="Tokens, for a server with FL_JWT_SECRET_KEY.", no_args_is_help=True, rich_markup_mode=None
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
    tls: Annotated[str | None, _option("auto: make a private CA and certificates under the data directory.")] = None,
    tls_cert: Annotated[Path | None, _option("Certificate chain in PEM, for both ports.")] = None,
    tls_key: Annotated[Path | None, _option("Its private key.")] = None,
    tls_client_ca: Annotated[Path | None, _option("Callers need a certificate of this CA.")] = None,
    mongo_url: Annotated[
        str | None, _option("mongodb://…: state is kept there. [default: in the data directory]")
    ] = None,
    mongo_database: Annotated[str | None, _option("Its database. [default: fedn-network]")] = None,
    s3_endpoint_url: Annotated[
        str | None, _option("http(s)://…: models are kept there; its keys: FL_S3_ACCESS_KEY, FL_S3_SECRET_KEY.")
    ] = None,
    s3_region: Annotated[str | None, _option("[default: us-east-1]")] = None,
    standby: Annotated[
        bool, typer.Option("--standby", help="Wait while another server owns the state; take over when it dies.")
    ] = False,
    durability: Annotated[
        str | None, _option("What an accepted update survives the loss of: process, host or site. [default: process]")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine though nobody has to say who he is.")
    ] = False,
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
        "tls": tls,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "tls_client_ca": tls_client_ca,
        "mongo_url": mongo_url,
        "mongo_database": mongo_database,
        "s3_endpoint_url": s3_endpoint_url,
        "s3_region": s3_region,
        "standby": standby or None,
        "durability": durability,
    }
    try:
        settings = Settings.load(config, given)
    except Invalid as wrong:
        raise fail(wrong, Exit.USAGE) from None
    if not (settings.jwt_secret_key.get_secret_value() or insecure or _is_loopback(settings.host)):
        why = f"host: {settings.host} is beyond this machine, and authentication is off: anybody could do anything"
        raise fail(f"{why}; set FL_JWT_SECRET_KEY, or type --insecure", Exit.USAGE)
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
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(settings, ready))
    except Invalid as wrong:  # a key or a certificate
        raise fail(wrong, Exit.USAGE) from None
    except FlserveError as why:
        raise fail(why) from None
    except BaseExceptionGroup as several:  # a TaskGroup's; one of its tasks says why
        ours, others = several.split(FlserveError)
        if ours is None or others is not None:
            raise
        first: BaseException = ours
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise fail(first) from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@token_app.command()
def create(
    role: Annotated[str, typer.Option(help="admin, client or combiner.")],
    client_id: Annotated[str | None, _option("The one client that may use it.")] = None,
    expires: Annotated[str, typer.Option(help="A number with s, m, h or d.")] = "30d",
    config: Annotated[Path | None, _option("Settings in TOML, as of `flserve up`.")] = None,
    format: Annotated[Format, typer.Option(help="table: the token alone; json: one object.")] = Format.TABLE,
) -> None:
    """Sign a token with the server's secret (FL_JWT_SECRET_KEY), and print it: for those without an issuer.

    Example: flserve token create --role client --client-id hospital-a --expires 30d
    """
    from fl_server.app import gate
    from fl_server.auth import LEEWAY_S, Role
    from fl_server.errors import Invalid
    from fl_server.settings import Settings

    if role not in list(Role):
        raise fail(f"--role: {role}: one of {', '.join(Role)} is needed", Exit.USAGE)
    if role == Role.CLIENT and not client_id:
        raise fail("--client-id: missing: without it, the token could act as any client", Exit.USAGE)
    try:
        entry = gate(Settings.load(config, {}))
        if entry is None:
            raise Invalid("jwt_secret_key: not set; FL_JWT_SECRET_KEY is what the server verifies with")
        token = entry.verifier.sign(Role(role), client_id=client_id, lifetime_s=_seconds("--expires", expires))
    except Invalid as wrong:
        raise fail(wrong, Exit.USAGE) from None
    if format is Format.JSON:
        expires_at = entry.verifier.verify(f"{entry.verifier.schemes[0]} {token}").expires_at - LEEWAY_S
        commands.print_json({"token": token, "role": role, "client_id": client_id, "expires_at": int(expires_at)})
    else:
        typer.echo(token)


def _seconds(option: str, text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
    number, unit = text[:-1], text[-1:]
    if not (unit in units and number.isascii() and number.isdigit() and 0 < int(number) <= 10**6):
        raise fail(f"{option}: {text}: a number with s, m, h or d is needed, such as 30d", Exit.USAGE)
    return float(int(number) * units[unit])


@app.command()
def settings() -> None:
    """List all settings: `FL_*` variable, default, meaning. In a file: without FL_, in small letters.

    Example: FL_LOG_LEVEL=DEBUG flserve up
    """
    from fl_server.settings import PREFIX, Settings

    for name, field in Settings.model_fields.items():
        typer.echo(f"{PREFIX + name.upper():<32} {field.default!s:<16} {field.description or ''}")


@app.command()
def openapi(
    output: Annotated[Path | None, _option("The file. [default: standard output]")] = None,
) -> None:
    """Write the REST API's description (OpenAPI 3.1, JSON); no server is needed.

    Example: flserve openapi --output openapi.json
    """
    from fl_server.app import openapi as described

    text = json.dumps(described(), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        sys.stdout.write(text)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as refused:
        raise fail(f"{output}: {refused.strerror}", Exit.USAGE) from None


@app.command()
def demo(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of FedAvg.")] = 10,
    clients: Annotated[int, typer.Option(min=1, max=20, help="Client processes.")] = 5,
    data_dir: Annotated[Path | None, typer.Option(help="Kept afterwards. [default: ./flserve-data/demo]")] = None,
    format: Annotated[Format, typer.Option(help="table, or json: one object as the last line.")] = Format.TABLE,
) -> None:
    """Train on scikit-learn's digits with a server and clients of its own.

    Example: flserve demo --format json
    """
    from fl_server.demo import run_demo

    code = asyncio.run(run_demo(data_dir=data_dir, rounds=rounds, clients=clients, output_format=format.value))
    raise typer.Exit(code)


def _deployment(config: Path | None, **given: Any) -> Any:
    from fl_server.errors import Invalid
    from fl_server.settings import Settings

    try:
        return Settings.load(config, given)
    except Invalid as wrong:
        raise fail(wrong, Exit.USAGE) from None


@app.command()
def doctor(
    data_dir: Annotated[Path | None, _option("As of `flserve up`, like the other settings.")] = None,
    mongo_url: Annotated[str | None, _option("mongodb://…")] = None,
    mongo_database: Annotated[str | None, _option("Its database.")] = None,
    s3_endpoint_url: Annotated[str | None, _option("http(s)://…")] = None,
    s3_region: Annotated[str | None, _option("Its region.")] = None,
    config: Annotated[Path | None, _option("Settings in TOML.")] = None,
    format: Annotated[Format, typer.Option(help="table, or json: one object.")] = Format.TABLE,
) -> None:
    """Look at what a server would start with: settings, ports, stores, clock, disk, package. Exit code 1: see to it.

    Example: flserve doctor --data-dir ./flserve-data
    """
    from dataclasses import asdict

    from fl_server.deployment import Finding, Health, examine

    stores = {"mongo_url": mongo_url, "mongo_database": mongo_database, "s3_endpoint_url": s3_endpoint_url}
    settings = _deployment(config, data_dir=data_dir, s3_region=s3_region, **stores)

    async def look() -> list[Finding]:
        found = []
        async for finding in examine(settings):
            found.append(finding)
            if format is Format.TABLE:
                typer.echo(f"{finding.health.ljust(5)}  {finding.about.ljust(9)}  {' '.join(finding.says.split())}")
        return found

    found = asyncio.run(look())
    is_well = all(finding.health is not Health.WRONG for finding in found)
    if format is Format.JSON:
        commands.print_json({"ok": is_well, "findings": [asdict(finding) for finding in found]})
    raise typer.Exit(Exit.DONE if is_well else Exit.REFUSED)


@app.command()
def reset(
    yes: Annotated[bool, typer.Option("--yes", help="Delete it all: this cannot be undone.")] = False,
    data_dir: Annotated[Path | None, _option("As of `flserve up`, like the other settings.")] = None,
    mongo_url: Annotated[str | None, _option("mongodb://…")] = None,
    mongo_database: Annotated[str | None, _option("Its database.")] = None,
    s3_endpoint_url: Annotated[str | None, _option("http(s)://…")] = None,
    s3_region: Annotated[str | None, _option("Its region.")] = None,
    config: Annotated[Path | None, _option("Settings in TOML.")] = None,
    format: Annotated[Format, typer.Option(help="table, or json: one object.")] = Format.TABLE,
) -> None:
    """Delete all sessions, models, packages, records and uploads of a deployment whose server is stopped.

    Example: flserve reset --yes --data-dir ./flserve-data
    """
    from fl_server.deployment import purge
    from fl_server.errors import FlserveError

    stores = {"mongo_url": mongo_url, "mongo_database": mongo_database, "s3_endpoint_url": s3_endpoint_url}
    settings = _deployment(config, data_dir=data_dir, s3_region=s3_region, **stores)
    state = f"MongoDB database {settings.mongo_database}" if settings.mongo_url.get_secret_value() else "state"
    what = f"the {state}, all models, updates and packages, and the uploads in {settings.data_dir}"
    if not yes:
        raise fail(f"--yes: missing; it would delete {what}, for ever", Exit.USAGE)
    try:
        gone = asyncio.run(purge(settings))
    except FlserveError as why:
        raise fail(why) from None
    told = ", ".join(f"{count} {name}" for name, count in gone.items())
    commands.print_json(gone) if format is Format.JSON else typer.echo(f"deleted: {told}")


app.command()(commands.explain)
app.command()(commands.events)
for group in (*commands.GROUPS.values(), token_app):
    app.add_typer(group)


if __name__ == "__main__":
    main()
