"""Tokens as an issuer signs them, good ones and every kind of bad one."""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jose import jwk, jwt

SECRET = "a-secret-that-no-log-may-show-0123456789"
_PKCS8 = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
_SPKI = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


@functools.cache
def key_pair(algorithm: str) -> tuple[str, str]:
    """Private and public, in PEM; always the same, as an RSA key takes its time."""
    key: Any
    if algorithm.startswith("RS"):
        key = rsa.generate_private_key(65537, 2048)
    else:
        curve = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}[algorithm]
        key = ec.generate_private_key(curve)
    return key.private_bytes(*_PKCS8).decode(), key.public_key().public_bytes(*_SPKI).decode()


def token(role: str | None = "client", *, key: str = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    """Good for a minute unless `exp` says otherwise; a claim of None is left out."""
    said = {"exp": time.time() + 60, "role": role, **claims}
    return str(jwt.encode({name: value for name, value in said.items() if value is not None}, key, algorithm=algorithm))


def by_hand(header: Mapping[str, Any], claims: Mapping[str, Any], key: bytes | None) -> str:
    """Whatever a library would refuse to make; no key: no signature."""
    signed = b".".join(
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (dict(header), dict(claims))
    )
    signature = hmac.digest(key, signed, hashlib.sha256) if key is not None else b""
    return f"{signed.decode()}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def claims(role: str = "admin", **said: Any) -> dict[str, Any]:
    return {"role": role, "exp": int(time.time()) + 60, **said}


def signed_by_its_own_key() -> str:
    """RS256 by a key that the token brings along, as `jwk`, `kid`, `jku` and `x5u` of RFC 7515 would let it."""
    private, public = key_pair("RS512")
    brought = {"jwk": jwk.construct(public, "RS256").to_dict(), "kid": "../../dev/null", "jku": "http://127.0.0.1:9/"}
    headers = {**brought, "x5u": "http://127.0.0.1:9/"}
    return str(jwt.encode(claims(), private, algorithm="RS256", headers=headers))


def bad_headers() -> dict[str, tuple[str | None, str]]:
    """What no route and no RPC may take for a token: its kind -> the header, and what is said of it."""
    now = int(time.time())
    unsigned = by_hand({"alg": "none", "typ": "JWT"}, claims(), None)
    deep = base64.urlsafe_b64encode(b"[" * 5000).decode()
    return {
        "none": (None, "Missing token"),
        "wrong scheme": (f"Basic {token('admin')}", "Invalid token scheme, expected Bearer or Token"),
        "scheme alone": ("Bearer", "Invalid token"),
        "garbage": ("Bearer garbage", "Invalid token"),
        "two dots": ("Bearer ..", "Invalid token"),
        "deep": (f"Bearer {deep}.{deep}.x", "Invalid token"),
        "long": (f"Bearer {'a' * 9000}", "Invalid token"),
        "expired": (f"Bearer {token('admin', exp=now - 60)}", "Token expired"),
        "without exp": (f"Bearer {token('admin', exp=None)}", "Invalid token"),
        "exp is text": (f"Bearer {token('admin', exp=str(now + 60))}", "Invalid token"),
        "exp never": (
            f"Bearer {by_hand({'alg': 'HS256'}, claims(exp=float('inf')), SECRET.encode())}",
            "Invalid token",
        ),
        "not yet valid": (f"Bearer {token('admin', nbf=now + 600)}", "Invalid token"),
        "wrongly signed": (f"Bearer {token('admin', key='another secret')}", "Invalid token"),
        "cut signature": (f"Bearer {token('admin')[:-3]}", "Invalid token"),
        "no signature": (f"Bearer {token('admin').rpartition('.')[0]}.", "Invalid token"),
        "algorithm none": (f"Bearer {unsigned}", "Invalid token"),
        "algorithm None": (f"Bearer {by_hand({'alg': 'None'}, claims(), None)}", "Invalid token"),
        "no algorithm": (f"Bearer {by_hand({'typ': 'JWT'}, claims(), SECRET.encode())}", "Invalid token"),
        "another algorithm": (f"Bearer {token('admin', algorithm='HS512')}", "Invalid token"),
        "critical extension": (
            f"Bearer {by_hand({'alg': 'HS256', 'crit': ['b64']}, claims(), SECRET.encode())}",
            "Invalid token",
        ),
        "its own key": (f"Bearer {signed_by_its_own_key()}", "Invalid token"),
        "no role": (f"Bearer {token(None)}", "Invalid token"),
        "unknown role": (f"Bearer {token('root')}", "Invalid token"),
        "roles": (f"Bearer {token(['admin'])}", "Invalid token"),  # type: ignore[arg-type]
        "client id is a number": (f"Bearer {token('client', client_id=7)}", "Invalid token"),
        "claims are no object": (f"Bearer {by_hand({'alg': 'HS256'}, {}, SECRET.encode())}", "Invalid token"),
    }
