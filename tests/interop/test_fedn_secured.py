"""FEDn 0.33.0 unmodified against a server that wants tokens, over TLS: its client, SDK, APIClient and command line.

FEDn's client sends its token on a secure channel only, and that is the one to port 443, to which clients/add leads it
by an `fqdn`. A test cannot count on that port, so the client's gRPC goes through an HTTP proxy (`grpc_proxy`) that
takes fl.example.org:443 to where the server is.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from fl_server.testing import ServerProcess
from fl_server.tls import private_certificates
from tests.interop.fedn_world import (
    ROUND_SHIFT,
    SHARDS,
    Processes,
    ended,
    listed,
    online,
    processes,
    seed,
    start_session,
    value_of,
)
from tests.proxy import Tunnel, proxied, tunnelled
from tests.server.tokens import SECRET, token

FQDN = "fl.example.org"
WAIT_S = 90.0


def lasting(role: str, **claims: Any) -> str:
    return token(role, exp=time.time() + 3600, **claims)


@dataclass(frozen=True)
class Secured:
    ours: Processes
    server: ServerProcess
    api: httpx.AsyncClient  # an administrator's
    tunnel: Tunnel
    variables: dict[str, str]  # whom FEDn believes, and how it dials

    def calls(self) -> dict[str, str]:
        scheme, _, where = self.server.api_url.partition("://")
        said = {"FLSERVE_API": where, "FLSERVE_SECURE": "yes" if scheme == "https" else ""}
        said |= {"FEDN_CONTROLLER_URL": self.server.api_url, "FEDN_AUTH_TOKEN": lasting("admin")}
        return self.variables | said


@asynccontextmanager
async def secured(folder: Path, ended_by: str) -> AsyncIterator[Secured]:
    """ended_by: who ends TLS, "flserve" on both its ports, or a "proxy" before a gRPC port that has none."""
    environment = {"FEDN_JWT_SECRET_KEY": SECRET, "FL_GRPC_TRUSTED_PROXY": FQDN}
    arguments = ("--tls", "auto") if ended_by == "flserve" else ()
    async with AsyncExitStack() as stack:
        ours = await stack.enter_async_context(processes(folder))
        server = ServerProcess(folder / "data", *arguments, environment=environment)
        await stack.enter_async_context(server)
        behind = f"http://127.0.0.1:{server.grpc_port}"
        ca = folder / "data" / "tls" / "ca.pem"
        if ended_by == "proxy":
            made = private_certificates(folder / "proxy", [FQDN])
            ca, tls = made.ca, ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            tls.load_cert_chain(made.certificate, made.key)
            tls.set_alpn_protocols(["h2"])
            behind = (await stack.enter_async_context(proxied(behind, tls))).url
        tunnel = await stack.enter_async_context(tunnelled(behind))
        variables = {
            "REQUESTS_CA_BUNDLE": str(ca),
            "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(ca),
            "grpc_proxy": tunnel.url,
        }
        api = httpx.AsyncClient(
            base_url=server.api_url,
            timeout=90,
            verify=ssl.create_default_context(cafile=ca),
            headers={"Authorization": f"Bearer {lasting('admin')}"},
        )
        yield Secured(ours, server, await stack.enter_async_context(api), tunnel, variables)


@pytest.mark.parametrize("ended_by", ["flserve", "proxy"])
async def test_fedns_clients_join_and_train_with_tokens_over_tls(ended_by: str, tmp_path: Path) -> None:
    async with secured(tmp_path, ended_by) as world, asyncio.timeout(WAIT_S):
        ours, api, url = world.ours, world.api, world.server.api_url
        started = [
            await ours.client_start(
                "client-a", "--api-url", url, "--local-package",
                "--token", lasting("client", client_id="client-a"), **world.variables,
            ),
            await ours.program(
                "client-b", url, **SHARDS["client-b"], calls_itself="name of client-b",
                token=lasting("client", sub="client-b"), variables=world.variables,
            ),
        ]  # fmt: skip
        await online(api, *SHARDS)
        session_id, _ = await start_session(api, 2)
        session = await ended(api, session_id)
        assert session["status"] == "Finished", session
        assert await value_of(api, session["session_config"]["model_id"]) == 2 * ROUND_SHIFT
        validations = await listed(api, "validations", session_id=session_id)
        assert sorted(v["sender"]["client_id"] for v in validations) == sorted([*SHARDS] * 2)
        assert world.tunnel.asked == {f"{FQDN}:443"}
        assert [process.returncode for process in started] == [None, None]


async def test_fedns_client_is_not_let_in_with_another_clients_token_nor_with_none(tmp_path: Path) -> None:
    async with secured(tmp_path, "flserve") as world, asyncio.timeout(WAIT_S):
        ours, url, api = world.ours, world.server.api_url, world.api
        refused = {
            "another's token": ("--token", lasting("client", client_id="client-b")),
            "an administrator's": ("--token", lasting("admin")),
            "no token": (),
        }
        for name, options in refused.items():
            directory = Processes(tmp_path / name)
            directory.directory.mkdir()
            process = await directory.client_start(
                "client-a", "--api-url", url, "--local-package", *options, **world.variables
            )
            await process.wait()
            assert "Unauthorized" in directory.tails(), name
        # with this variable FEDn's channel is secure, and has no token
        rooted = world.variables | {"FEDN_GRPC_ROOT_CERT_PATH": world.variables["REQUESTS_CA_BUNDLE"]}
        process = await ours.client_start(
            "client-a",
            "--api-url",
            url,
            "--local-package",
            "--token",
            lasting("client", client_id="client-a"),
            **rooted,
        )
        await process.wait()
        assert "Token is missing" in ours.tails()
        assert await listed(api, "clients", status="online") == []


async def test_fedns_api_client_and_commands_ask_with_a_token(tmp_path: Path) -> None:
    async with secured(tmp_path, "flserve") as world:
        ours, variables = world.ours, world.calls()
        (tmp_path / "seed.npz").write_bytes(seed())
        calls = [
            ["set_active_model", {"path": str(tmp_path / "seed.npz")}],
            ["get_models_count", {}],
            ["get_clients", {}],
        ]
        added, count, clients = await ours.ask("api_calls.py", calls, **variables)
        assert (added["success"], count, clients) == (True, 1, {"count": 0, "result": []})
        stranger = variables | {"FEDN_AUTH_TOKEN": lasting("client", client_id="client-a")}
        assert await ours.ask("api_calls.py", calls[1:], **stranger) == [{"message": "Invalid token"}] * 2

        commands = [["model", "list"], ["client", "list"], ["session", "list", "-t", lasting("client")]]
        models, none, refused = await ours.ask("cli_calls.py", commands, **variables)
        assert [answer["exit_code"] for answer in (models, none)] == [0, 0]
        assert "Found 1 models" in models["output"]
        assert "Error: 401" in refused["output"]
