"""The Python client of flserve, and what it shares with the server (wire).

Names are loaded when they are asked for: the server imports fl_client.wire, and must not pay for httpx and grpc here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fl_client.api import APIClient, APIError, ServerEvent
    from fl_client.client import Client, TaskInfo, TrainResult
    from fl_client.tokens import Tokens
    from fl_client.transport import ClientError, Tls

__all__ = ["APIClient", "APIError", "Client", "ClientError", "ServerEvent", "TaskInfo", "Tls", "Tokens", "TrainResult"]

_MODULES = {
    "APIClient": "fl_client.api",
    "APIError": "fl_client.api",
    "Client": "fl_client.client",
    "ClientError": "fl_client.transport",
    "ServerEvent": "fl_client.api",
    "TaskInfo": "fl_client.client",
    "Tls": "fl_client.transport",
    "Tokens": "fl_client.tokens",
    "TrainResult": "fl_client.client",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'fl_client' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
