"""flclient: the program on a device. It joins a federation, and makes and tries compute packages.

Its commands and options are FEDn's and more; what cannot be done is one line on stderr and an exit code. Modules that
need the network are imported inside the functions that use them: a help text does not wait for gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import SplitResult, urlsplit

import typer

if TYPE_CHECKING:
    from fl_client.client import Client
    from fl_client.manifest import EntryPoint
    from fl_client.package import Package
    from fl_client.tokens import Tokens

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
EXIT_CODES = (
    "Exit codes: 0 done, or stopped by Ctrl-C or SIGTERM; 1 refused, or failed; 2 the command line is wrong, or a file "
    "that it names; 130 interrupted a second time, the running task given up."
)
LOCAL_FOLDERS = (Path("client"), Path())
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
SEED = "seed.npz"

app = typer.Typer(
    help="The client of a federated-learning server: it trains where the data are, and dials out only.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _group(noun: str, about: str) -> typer.Typer:
    return typer.Typer(name=noun, help=about, no_args_is_help=True, rich_markup_mode=None)


package_app = _group("package", "Make a compute package, and try its entry points without a network.")
run_app = _group("run", "FEDn's spellings: run client, run build, run train, …")
client_app = _group("client", "FEDn's spelling: client start.")


def main() -> None:
    app()


def _fail(why: object, code: int = FAILED) -> typer.Exit:
    typer.echo(f"flclient: {' '.join(str(why).split())}", err=True)
    return typer.Exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flclient {metadata.version('flserve')}")
        raise typer.Exit


@app.callback()
def _flclient(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


# ---- join: what is said where


@dataclass(frozen=True, slots=True)
class JoinOptions:
    """None: not said. The names are the keys of FEDn's client.yaml, where they are FEDn's."""

    api_url: str | None = None
    api_port: int | None = None
    token: str | None = None
    auth_refresh_token: str | None = None
    auth_refresh_token_uri: str | None = None
    tls_ca: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None
    name: str | None = None
    client_id: str | None = None
    preferred_combiner: str | None = None
    combiner: str | None = None
    combiner_port: int | None = None
    helper_type: str | None = None
    package_checksum: str | None = None
    package_dir: str | None = None
    local_package: bool | None = None
    log_level: str | None = None

    def over(self, other: JoinOptions) -> JoinOptions:
        """What is not said here is as there; of a server that is named here, nothing is taken from there."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        found = {name: getattr(other, name) if value is None else value for name, value in said.items()}
        if self.api_url is not None:
            found |= {key: getattr(self, key) for key in ("api_port", "combiner", "combiner_port")}
        return JoinOptions(**found)


_ENVIRONMENT: Mapping[str, tuple[str, ...]] = {
    "api_url": ("FL_API_URL",),
    "api_port": ("FL_API_PORT",),
    "token": ("FL_TOKEN", "FL_AUTH_TOKEN", "FEDN_AUTH_TOKEN"),
    "auth_refresh_token": ("FL_AUTH_REFRESH_TOKEN", "FEDN_AUTH_REFRESH_TOKEN"),
    "auth_refresh_token_uri": ("FL_AUTH_REFRESH_TOKEN_URI", "FEDN_AUTH_REFRESH_TOKEN_URI"),
    "tls_ca": ("FL_TLS_CA", "FEDN_GRPC_ROOT_CERT_PATH"),
    "client_cert": ("FL_CLIENT_CERT",),
    "client_key": ("FL_CLIENT_KEY",),
    "name": ("FL_CLIENT_NAME",),
    "client_id": ("FL_CLIENT_ID",),
    "preferred_combiner": ("FL_PREFERRED_COMBINER",),
    "combiner": ("FL_COMBINER",),
    "combiner_port": ("FL_COMBINER_PORT",),
    "helper_type": ("FL_HELPER_TYPE",),
    "package_checksum": ("FL_PACKAGE_CHECKSUM",),
    "package_dir": ("FL_PACKAGE_DIR", "FEDN_PACKAGE_EXTRACT_DIR"),
    "local_package": ("FL_LOCAL_PACKAGE",),
    "log_level": ("FL_LOG_LEVEL",),
}
_ALIASES = {"discover_host": "api_url", "discover_port": "api_port"}  # of the seed's client.yaml


def _from_environment() -> JoinOptions:
    said = {
        name: (variable, value)
        for name, variables in _ENVIRONMENT.items()
        for variable in reversed(variables)
        if (value := os.environ.get(variable))
    }
    return JoinOptions(**{name: _typed(name, value, where=variable) for name, (variable, value) in said.items()})


def _from_file(path: Path | None) -> JoinOptions:
    if path is None:
        return JoinOptions()
    from fl_client.manifest import PackageError, read_mapping

    try:
        document = read_mapping(path)
    except PackageError as exc:
        raise _fail(exc, USAGE) from None
    known = {field.name for field in fields(JoinOptions)}
    said = {}
    for key, value in document.items():
        name = _ALIASES.get(key, key)
        if name in known and value not in (None, "") and (key == name or name not in document):
            said[name] = _typed(name, value, where=f"{path}: {key}")
    return JoinOptions(**said)


def _typed(name: str, value: object, *, where: str) -> Any:
    if name in ("api_port", "combiner_port"):
        text = str(value)
        if isinstance(value, bool) or not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
            raise _fail(f"{where}: {value!r} is not a port", USAGE)
        return int(text)
    if name == "local_package":
        if str(value).lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise _fail(f"{where}: {value!r} is neither true nor false", USAGE)
        return str(value).lower() in ("true", "1", "yes")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _fail(f"{where}: {value!r} is not a text", USAGE)
    if name in ("tls_ca", "client_cert", "client_key"):
        return Path(str(value))
    return str(value)


def _api_url(options: JoinOptions) -> str:
    """Scheme, host, port and FEDn's prefix. Without a scheme: http to this machine, and to any port but 443."""
    given = (options.api_url or "").strip()
    if not given:
        return ""
    has_scheme = "://" in given
    try:
        parts: SplitResult = urlsplit(given if has_scheme else f"//{given}")
        port = parts.port
    except ValueError as exc:
        raise _fail(f"--api-url: {given}: {exc}", USAGE) from None
    if not parts.hostname or (has_scheme and parts.scheme not in ("http", "https")):
        raise _fail(f"--api-url: {given}: http://host or https://host is needed", USAGE)
    if options.api_port and port and port != options.api_port:
        raise _fail(f"--api-url says port {port}, --api-port says {options.api_port}", USAGE)
    port = port or options.api_port
    is_here = parts.hostname in ("localhost", "127.0.0.1", "::1")
    scheme = parts.scheme or ("http" if is_here or port not in (None, 443) else "https")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    prefix = os.environ.get("FL_CUSTOM_URL_PREFIX") or os.environ.get("FEDN_CUSTOM_URL_PREFIX") or ""
    path = "/".join(part.strip("/") for part in (parts.path, prefix) if part.strip("/"))
    return f"{scheme}://{host}" + (f":{port}" if port else "") + (f"/{path}" if path else "")


def _log_to_stderr(level: str) -> None:
    if level.upper() not in LOG_LEVELS:
        raise _fail(f"--log-level: {level}: one of {', '.join(LOG_LEVELS)} is needed", USAGE)
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    for chatty in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


# ---- join


def _said(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help, show_default=False)


def join(
    api_url: Annotated[str | None, _said("--api-url", "-u", help="The server's REST address.")] = None,
    api_port: Annotated[int | None, _said("--api-port", "-p", help="Its port, if --api-url has none.")] = None,
    local_package: Annotated[
        bool,
        typer.Option("--local-package", help="Run ./client (or .) as it is at each task, not the server's package."),
    ] = False,
    name: Annotated[
        str | None, _said("--name", "-n", help="How lists call this client. [default: client + 8 hex]")
    ] = None,
    client_id: Annotated[str | None, _said("--client-id", "-i", help="Its identity. [default: a new one]")] = None,
    preferred_combiner: Annotated[
        str | None, _said("--preferred-combiner", "-c", help="The combiner to be assigned to.")
    ] = None,
    token: Annotated[str | None, _said("--token", help="Sent with each request.")] = None,
    tls_ca: Annotated[
        Path | None, _said("--tls-ca", help="PEM of the CA that signed the server's certificates.")
    ] = None,
    tls_cert: Annotated[Path | None, _said("--tls-cert", help="PEM to show, where the server wants one.")] = None,
    tls_key: Annotated[Path | None, _said("--tls-key", help="Its private key.")] = None,
    helper_type: Annotated[
        str | None, _said("--helper-type", "--helper_type", "-hp", help="Told to the entry points as FL_HELPER_TYPE.")
    ] = None,
    combiner: Annotated[
        str | None, _said("--combiner", help="Host of a combiner: no REST API is asked for one.")
    ] = None,
    combiner_port: Annotated[int | None, _said("--combiner-port", help="Its gRPC port.")] = None,
    init: Annotated[Path | None, _said("--init", "-in", help="client.yaml: options by their names.")] = None,
    package_checksum: Annotated[
        str | None, _said("--package-checksum", help="sha256 of the only package that is run.")
    ] = None,
    package_dir: Annotated[
        Path | None, _said("--package-dir", help="Where packages are kept. [default: ~/.cache/flserve/packages]")
    ] = None,
    log_level: Annotated[
        str | None, _said("--log-level", help="DEBUG, INFO, WARNING or ERROR. [default: INFO]")
    ] = None,
    validator: Annotated[str | None, _said("--validator", "-va", help="Not used; FEDn's.")] = None,
    trainer: Annotated[str | None, _said("--trainer", "-tr", help="Not used; FEDn's.")] = None,
) -> None:
    """Work for a federation until Ctrl-C: train and validate with the server's compute package, or the one here.

    Waits for a server that is not there. Options come from the command line, else from --init, else from FL_API_URL,
    FL_TOKEN, FL_CLIENT_ID and so on (FEDN_AUTH_TOKEN, FEDN_AUTH_SCHEME and FEDN_PACKAGE_EXTRACT_DIR, too). With
    FL_AUTH_REFRESH_TOKEN and FL_AUTH_REFRESH_TOKEN_URI the token is renewed before it expires. --tls-cert and --tls-key
    are FL_CLIENT_CERT and FL_CLIENT_KEY.

    Example: flclient join --api-url http://localhost:8092 --name client1

    Example: flclient join --combiner localhost --combiner-port 12080 --local-package
    """
    said = JoinOptions(
        api_url=api_url,
        api_port=api_port,
        token=token,
        tls_ca=tls_ca,
        client_cert=tls_cert,
        client_key=tls_key,
        name=name,
        client_id=client_id,
        preferred_combiner=preferred_combiner,
        combiner=combiner,
        combiner_port=combiner_port,
        helper_type=helper_type,
        package_checksum=package_checksum,
        package_dir=str(package_dir) if package_dir else None,
        local_package=local_package or None,
        log_level=log_level,
    )
    options = said.over(_from_file(init)).over(_from_environment())
    _log_to_stderr(options.log_level or "INFO")
    if validator or trainer:
        logging.getLogger(__name__).warning(
            "--validator and --trainer are not used: the server says what is to be done"
        )
    with _one_line():
        raise typer.Exit(asyncio.run(_until_signalled(_client(options))))


def _client(options: JoinOptions) -> Client:
    from fl_client.client import Client
    from fl_client.package import Package, RemotePackage
    from fl_client.transport import RestApi, Tls

    api_url = _api_url(options)
    if not (api_url or options.combiner):
        raise _fail("where is the server? --api-url URL, or --combiner HOST --combiner-port PORT", USAGE)
    if options.combiner and not options.combiner_port:
        raise _fail("--combiner needs --combiner-port", USAGE)
    name = options.name or f"client{uuid.uuid4().hex[:8]}"
    tokens, tls = _tokens(options), Tls(options.tls_ca, options.client_cert, options.client_key)
    about = {"client_name": name, "helper_type": options.helper_type or ""}
    runtime: Package | RemotePackage
    if options.local_package:
        runtime = Package(_local_folder(), **about)
    elif api_url:
        api = RestApi(api_url, tokens, tls)
        folder = Path(options.package_dir) if options.package_dir else None
        runtime = RemotePackage(api, folder, checksum=options.package_checksum or "", **about)
    else:
        raise _fail("--combiner alone knows no package: add --local-package, or --api-url to fetch it from", USAGE)
    return Client(
        runtime=runtime,
        api_url="" if options.combiner else api_url,
        combiner=f"{options.combiner}:{options.combiner_port}" if options.combiner else "",
        name=name,
        client_id=options.client_id or "",
        token=tokens,
        tls=tls,
        preferred_combiner=options.preferred_combiner or "",
    )


def _tokens(options: JoinOptions) -> Tokens:
    from fl_client.tokens import Tokens

    scheme = os.environ.get("FL_AUTH_SCHEME") or os.environ.get("FEDN_AUTH_SCHEME") or "Bearer"
    refresh, uri = options.auth_refresh_token or "", options.auth_refresh_token_uri or ""
    try:
        return Tokens(options.token or "", scheme=scheme, refresh=refresh, refresh_uri=uri)
    except ValueError as exc:
        raise _fail(f"FL_AUTH_TOKEN, FL_AUTH_REFRESH_TOKEN, FL_AUTH_REFRESH_TOKEN_URI: {exc}", USAGE) from None


def _local_folder() -> Path:
    from fl_client.wire.archive import MANIFEST

    for folder in LOCAL_FOLDERS:
        if (folder / MANIFEST).is_file():
            return folder
    raise _fail(f"--local-package: neither {LOCAL_FOLDERS[0] / MANIFEST} nor {MANIFEST} is in {Path.cwd()}", USAGE)


async def _until_signalled(client: Client) -> int:
    """The first signal lets the client end its task, a second one gives it up."""
    loop = asyncio.get_running_loop()
    running = asyncio.current_task()
    assert running is not None
    received: list[signal.Signals] = []

    def on_signal(number: signal.Signals) -> None:
        received.append(number)
        if len(received) == 1:
            client.stop()
        else:
            running.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    try:
        await client.run()
    except asyncio.CancelledError:
        return INTERRUPTED
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    return DONE


@contextmanager
def _one_line() -> Iterator[None]:
    from fl_client.command import CommandFailed
    from fl_client.transport import ClientError

    try:
        yield
    except ClientError as exc:
        raise _fail(exc) from None
    except CommandFailed as exc:
        raise _fail(exc) from None
    except OSError as exc:
        raise _fail(f"{exc.filename}: {exc.strerror}" if exc.filename else exc) from None


app.command("join")(join)
run_app.command("client")(join)
client_app.command("start")(join)


# ---- packages

FolderOption = Annotated[Path, typer.Option("--path", "-p", help="The folder of fedn.yaml.", show_default=False)]
InputOption = Annotated[Path, typer.Option("--input", "-i", help="A model file.", show_default=False)]
KeepVenv = Annotated[bool, typer.Option("--keep-venv", "-v", help="FEDn's: environments are always kept.", hidden=True)]


def build(path: FolderOption, keep_venv: KeepVenv = False) -> None:
    """Run the entry point `build`, which makes the seed model: by FEDn's custom ../seed.npz, beside the folder.

    Example: flclient package build --path client
    """
    package = _package(path)
    before = _seeds(package.folder)
    _finish("build", package.run("build"))
    for seed, changed_ns in _seeds(package.folder).items():
        if before.get(seed) != changed_ns:
            typer.echo(f"seed model: {os.path.relpath(seed)}")


def _seeds(folder: Path) -> dict[Path, int]:
    """Where a build may leave one, with the time of its last change."""
    places = (folder.parent / SEED, folder / SEED)
    return {place: place.stat().st_mtime_ns for place in places if place.is_file()}


def startup(path: FolderOption, keep_venv: KeepVenv = False) -> None:
    """Run the entry point `startup`, as a client does once before its first task.

    Example: flclient package startup --path client
    """
    _finish("startup", _package(path).run("startup"))


def create(
    path: FolderOption,
    name: Annotated[str, typer.Option("--name", "-n", help="The file's name.")] = "package.tgz",
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write it to.")] = Path(),
) -> None:
    """Pack the folder's content into package.tgz, without what its .fednignore names.

    Example: flclient package create --path client
    """
    from fl_client import package

    with _one_line():
        if not path.is_dir():
            raise _fail(f"--path: {path}: not a folder", USAGE)
        count = package.create(path, output / name)
    typer.echo(f"{output / name}: {count} files")


def train(
    path: FolderOption,
    input: InputOption,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The trained model; OUTPUT-metadata is written beside it.", show_default=False
        ),
    ],
    keep_venv: KeepVenv = False,
) -> None:
    """Run the entry point `train` on a model file.

    Example: flclient package train --path client -i seed.npz -o trained.npz
    """
    _try("train", path, input, output)


def validate(
    path: FolderOption,
    input: InputOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The metrics, as JSON.", show_default=False)],
    keep_venv: KeepVenv = False,
) -> None:
    """Run the entry point `validate` on a model file.

    Example: flclient package validate --path client -i trained.npz -o metrics.json
    """
    _try("validate", path, input, output)


def predict(
    path: FolderOption,
    input: InputOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The prediction, as JSON.", show_default=False)],
    keep_venv: KeepVenv = False,
) -> None:
    """Run the entry point `predict` on a model file.

    Example: flclient package predict --path client -i trained.npz -o prediction.json
    """
    _try("predict", path, input, output)


def _package(path: Path) -> Package:
    from fl_client.manifest import PackageError
    from fl_client.package import Package

    _log_to_stderr("INFO")
    try:
        return Package(path)
    except PackageError as exc:
        raise _fail(f"--path: {exc}", USAGE) from None


def _finish(entry: EntryPoint, running: Coroutine[Any, Any, None]) -> None:
    from fl_client.command import CommandFailed

    with _one_line():
        try:
            asyncio.run(running)
        except CommandFailed as exc:
            raise CommandFailed(f"{entry} {exc}") from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


def _try(entry: Literal["train", "validate", "predict"], path: Path, input: Path, output: Path) -> None:
    """The outputs appear when all has gone well, and not before."""
    package = _package(path)
    with _one_line(), tempfile.TemporaryDirectory(prefix="flclient-", ignore_cleanup_errors=True) as name:
        suffix = output.suffix or (".npz" if entry == "train" else ".json")  # numpy appends .npz to a name without it
        given, made = Path(name) / f"model{input.suffix}", Path(name) / f"out{suffix}"
        shutil.copyfile(input, given)
        Path(f"{given}-metadata").write_text("{}")
        _finish(entry, package.run(entry, given, made))
        if not made.exists():
            raise _fail(f"{entry} ended well, but wrote nothing to its second argument")
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(f"{made}-metadata", f"{output}-metadata")
        shutil.copyfile(made, output)
    typer.echo(f"{output}")


for command in (build, create, startup, train, validate, predict):
    package_app.command()(command)
for command in (build, startup, train, validate, predict):
    run_app.command()(command)
for group in (package_app, run_app, client_app):
    app.add_typer(group)


if __name__ == "__main__":
    main()
