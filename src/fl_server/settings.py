"""All settings of the server: read once, from the command line, `FL_*` variables, a TOML file, defaults, in this order.

An unknown key is an error that names it. Durations are seconds (`_s`), sizes bytes (`_bytes`).
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from fl_server.errors import Invalid

PREFIX = "FL_"
NOT_OURS = {  # of the client and the command line
    *("FL_API_URL", "FL_TOKEN", "FL_CONFIG", "FL_TLS_CA", "FL_CLIENT_CERT", "FL_CLIENT_KEY"),
    *("FL_AUTH_TOKEN", "FL_AUTH_REFRESH_TOKEN", "FL_AUTH_REFRESH_TOKEN_URI"),
}
ALIASES = {  # FEDn's names, read where ours is not set
    "FEDN_JWT_SECRET_KEY": "jwt_secret_key",
    "FEDN_JWT_ALGORITHM": "jwt_algorithm",
    "FEDN_JWT_CUSTOM_CLAIM_KEY": "jwt_custom_claim_key",
    "FEDN_JWT_CUSTOM_CLAIM_VALUE": "jwt_custom_claim_value",
    "FEDN_AUTH_SCHEME": "auth_scheme",
    "FEDN_CUSTOM_URL_PREFIX": "custom_url_prefix",
    "FEDN_AUTH_WHITELIST_URL": "auth_whitelist_url",
    "FEDN_AUTH_WHITELIST_URL_PREFIX": "auth_whitelist_url",
    "FL_AUTH_WHITELIST_URL_PREFIX": "auth_whitelist_url",
}
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


def _is_url_prefix(text: str) -> str:
    """Without a slash at its end. FEDn's users write it with and without the first one."""
    prefix = f"/{text.strip('/')}" if text else ""
    if prefix == "/" or any(part in ("", ".", "..") for part in prefix.split("/")[1:]) or not prefix.isprintable():
        raise ValueError("a path such as /internal is needed")
    return prefix


UrlPrefix = Annotated[str, AfterValidator(_is_url_prefix)]


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    data_dir: Path = Field(Path("flserve-data"), description="where the embedded stores and the spool lie")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    api_port: Port = Field(8092, description="REST; 0: any free one")
    grpc_port: Port = Field(12080, description="gRPC, for the clients; 0: any free one")
    advertise_host: str = Field("", description="address that clients are told to dial; default: the one they called")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    jwt_secret_key: SecretStr = Field(
        SecretStr(""), description="secret, or public key in PEM: every call needs a token then; default: none does"
    )
    jwt_algorithm: str = Field("HS256", description="HS, RS or ES with 256, 384 or 512: the one that is accepted")
    jwt_custom_claim_key: str = Field("", description="a claim that every token must have …")
    jwt_custom_claim_value: str = Field("", description="… with this value")
    auth_scheme: str = Field(
        "", pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]*$", description="before a token; default: Bearer and Token"
    )
    auth_whitelist_url: UrlPrefix = Field("", description="REST paths at and below it need no token")
    auth_failures_per_minute: Count = Field(60, description="bad tokens of one address; more are answered 429")
    custom_url_prefix: UrlPrefix = Field("", description="REST paths work with it, too, such as /internal")
    tls: Literal["", "auto"] = Field("", description="auto: a private CA and certificates are made in data_dir/tls")
    tls_cert: Path | None = Field(None, description="certificate chain in PEM, for both ports; re-read when it changes")
    tls_key: Path | None = Field(None, description="its private key")
    tls_client_ca: Path | None = Field(None, description="callers need a certificate of this CA (mTLS)")
    grpc_trusted_proxy: str = Field(
        "", description="name of a proxy that ends TLS on port 443 and goes on to the gRPC port; clients dial it"
    )
    mongo_url: SecretStr = Field(SecretStr(""), description="mongodb://…: state is kept there; default: in data_dir")
    mongo_database: str = Field("fedn-network", description="its name: FEDn's network id")
    standby: bool = Field(False, description="waits while another server owns the state, and takes over when it dies")
    s3_endpoint_url: str = Field("", description="http(s)://…: models are kept there; default: in data_dir")
    s3_access_key: str = Field("", description="default: what AWS' clients would find")
    s3_secret_key: SecretStr = SecretStr("")
    s3_region: str = "us-east-1"
    s3_model_bucket: str = Field("fedn-models", description="models; updates that are kept lie under updates/")
    s3_context_bucket: str = Field("fedn-context", description="compute packages")
    s3_prediction_bucket: str = Field("fedn-prediction", description="FEDn's; made, and empty: predictions are records")
    s3_cache_bytes: Bytes = Field(8 * 2**30, description="files of S3 that are kept on local disk")
    durability: Literal["process", "host", "site"] = Field(
        "process",
        description="what an accepted update survives: the death of the process, (fsync) of the host, "
        "or the loss of the host (its bytes are in S3 as well)",
    )
    max_model_bytes: Bytes = Field(4 * 2**30, description="largest model, inflated")
    spool_max_bytes: Bytes = Field(64 * 2**30, description="uploads on disk; more wait until a round ends")
    upload_ttl_s: Seconds = Field(3600.0, description="an upload that no update names is deleted after this")
    uploads_at_once: Annotated[int, Field(ge=1)] = Field(32, description="more wait their turn")
    uploads_in_flight_bytes: Bytes = Field(
        32 * 2**30, description="of uploads that have not ended, on both ports together; more wait, then come again"
    )
    upload_idle_timeout_s: Seconds = Field(
        60.0, description="an upload that sends nothing, or a download that is not read, for so long is dropped"
    )
    upload_min_bytes_per_s: Bytes = Field(1024, description="slower uploads and downloads are dropped, on both ports")
    upload_max_chunks: Count = Field(1_000_000, description="messages of one upload; a client sends 1 MiB in each")
    http_header_timeout_s: Seconds = Field(
        20.0, description="a request's line and headers, and a gRPC connection's greeting, must be here within this"
    )
    http_max_header_bytes: Annotated[int, Field(ge=1024)] = Field(
        64 * 2**10, description="a request's path and headers; larger ones are answered 431"
    )
    http_max_connections: Count = Field(8192, description="open at a time; more are answered 503")
    http_max_connections_per_peer: Count = Field(2048, description="the same, of one address: 429")
    json_max_bytes: Bytes = Field(2**20, description="largest JSON body; larger ones are answered 413")
    json_max_depth: Count = Field(64, description="objects and arrays inside each other, in a body")
    page_max_rows: Count = Field(10_000, description="rows of one answer; who asks for more is answered 400")
    grpc_max_message_bytes: Annotated[int, Field(ge=2 * 2**20)] = Field(
        4 * 2**20, description="one message to the gRPC port; a model comes in many"
    )
    grpc_max_metadata_bytes: Annotated[int, Field(ge=8 * 2**10)] = Field(
        16 * 2**10, description="the metadata of one call"
    )
    grpc_request_timeout_s: Seconds = Field(
        300.0, description="a call's message must be here within this; for uploads, see there"
    )
    grpc_idle_timeout_s: Seconds = Field(300.0, description="a connection to the gRPC port without a call is closed")
    max_calls_per_peer: Count = Field(
        20_000, description="gRPC calls under way of one address, task streams too; more are told to come again"
    )
    max_clients: Count = Field(20_000, description="attached at a time; more are told to come again")
    max_streams_per_peer: Count = Field(10_000, description="task streams of one address; more are told to come again")
    store_patience_s: Seconds = Field(30.0, description="a call waits so long for a store that is away")
    download_cache_bytes: Bytes = Field(128 * 2**20, description="models kept ready for download")
    grpc_upload_window: Literal["small", "auto"] = Field(
        "small", description="auto: faster for one far client (51 against 16 MB/s at 50 ms), but 4 times the memory"
    )
    rejoin_window_s: Seconds = Field(60.0, description="after a restart, clients are expected back within this")
    package_max_bytes: Bytes = Field(256 * 2**20, description="largest compute package, as it is uploaded")
    package_unpacked_max_bytes: Bytes = Field(2**30, description="what a compute package may hold, unpacked")
    prediction_timeout_s: Seconds = Field(600.0, description="a prediction run that says no timeout ends after this")
    telemetry_ttl_s: Seconds = Field(86_400.0, description="telemetry is kept for so long")
    drain_timeout_s: Seconds = Field(5.0, description="a stop waits so long for calls under way")

    @classmethod
    def load(cls, config: Path | None, given: Mapping[str, Any]) -> Settings:
        """given: from the command line; None is not given. Raises Invalid, naming the key and where it stands."""
        known = {PREFIX + name.upper() for name in cls.model_fields} | NOT_OURS | set(ALIASES)
        aliased = {field: os.environ[name] for name, field in ALIASES.items() if os.environ.get(name)}
        for name in os.environ:
            if name.startswith(PREFIX) and not name.startswith("FL_TEST_") and name.upper() not in known:
                raise Invalid(f"{name}: unknown setting in the environment")
        _check_file(config, cls)

        class Loaded(cls):  # type: ignore[valid-type, misc]
            @classmethod
            def settings_customise_sources(
                cls, settings_cls: type[BaseSettings], **sources: PydanticBaseSettingsSource
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                file = [TomlConfigSettingsSource(settings_cls, toml_file=config)] if config else []
                aliases = InitSettingsSource(settings_cls, init_kwargs=dict(aliased))
                return (sources["init_settings"], sources["env_settings"], aliases, *file)

        try:
            loaded: Settings = Loaded(**{key: value for key, value in given.items() if value is not None})
        except ValidationError as wrong:
            first = wrong.errors()[0]
            name = ".".join(map(str, first["loc"]))
            is_secret = cls.model_fields[name].annotation is SecretStr if name in cls.model_fields else False
            given_value = "" if is_secret else f"{first['input']!r}: "
            raise Invalid(f"{name}: {given_value}{first['msg']}") from None
        return loaded


def _check_file(config: Path | None, cls: type[Settings]) -> None:
    if config is None:
        return
    try:
        keys = tomllib.loads(config.read_text())
    except (OSError, UnicodeDecodeError) as unreadable:
        raise Invalid(f"config: {config}: {unreadable}") from None
    except tomllib.TOMLDecodeError as wrong:
        raise Invalid(f"config: {config}: {wrong}") from None
    for key in keys:
        if key not in cls.model_fields:
            raise Invalid(f"{key}: unknown setting in {config}")
