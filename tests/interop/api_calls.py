"""Calls of FEDn's own APIClient: [[method, keyword arguments], …] on stdin, the answers as JSON on stdout.

Run in FEDn's environment. FLSERVE_API: host:port/path of the server; FLSERVE_SECURE: it has TLS.
The method "" answers the names of all methods.
"""

from __future__ import annotations

import json
import os
import sys

from fedn import APIClient

secure = bool(os.environ.get("FLSERVE_SECURE"))
api = APIClient(host=os.environ["FLSERVE_API"], secure=secure, verify=secure)


def answer(method: str, arguments: dict[str, object]) -> object:
    if not method:
        return [name for name in dir(APIClient) if not name.startswith("_")]
    return getattr(api, method)(**arguments)


print(json.dumps([answer(method, arguments) for method, arguments in json.load(sys.stdin)]))
