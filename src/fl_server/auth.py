"""Who may call what: tokens (JWT, RFC 7519) are verified here; one table says which role may call which route and RPC.

What is not in the table is refused. A token is only ever read with the one algorithm and key that the settings name,
whatever it says of itself; no token and no secret gets into a message, a log line or a repr.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from jose import jwk, jws
from jose.exceptions import JOSEError

from .errors import Forbidden, Invalid, TooMany, Unauthorized


class Role(StrEnum):
    ADMIN = "admin"
    COMBINER = "combiner"
    CLIENT = "client"


# ---- the table

Roles = frozenset[Role | None]  # None: a caller without a token
OPEN: Roles = frozenset({None, *Role})
ADMIN: Roles = frozenset({Role.ADMIN})
CLIENT: Roles = frozenset({Role.CLIENT})
COMBINER: Roles = frozenset({Role.COMBINER})
SERVERS: Roles = frozenset({Role.ADMIN, Role.COMBINER})

_API = "/api/v1"
_ENTITIES = (
    *("attributes", "clients", "combiners", "metrics", "models", "packages", "predictions", "rounds", "runs"),
    *("sessions", "statuses", "telemetry", "validations"),
)
_OF_EVERY_ENTITY = ("GET /", "POST /list", "GET /count", "POST /count", "GET /{id}")
_MOVED = (
    *("get_model_trail", "get_model_ancestors", "get_model_descendants", "list_models", "get_model"),
    *("get_latest_model", "get_initial_model", "list_clients", "get_active_clients", "get_client_config"),
    *("list_combiners", "get_combiner", "list_rounds", "get_round", "list_sessions", "get_session", "start_session"),
    *("get_package", "list_compute_packages", "get_events", "list_validations"),
)

# "METHOD /path/template" of a REST route (HEAD is as GET), "package.Service/Method" of an RPC
ACCESS: Mapping[str, Roles] = {
    "GET /health": OPEN,
    "GET /ready": OPEN,
    "grpc.health.v1.Health/Check": OPEN,
    "grpc.health.v1.Health/Watch": OPEN,
    # FEDn's clients, and ours: join, and fetch the package
    f"POST {_API}/clients/add": CLIENT,
    f"GET {_API}/packages/download": CLIENT,
    f"GET {_API}/packages/checksum": CLIENT,
    "POST /add_client": CLIENT,
    "GET /download_package": CLIENT,
    "GET /get_package_checksum": CLIENT,
    "GET /add_combiner": COMBINER,
    "POST /add_combiner": COMBINER,
    # all else is the administrator's
    **{
        f"{method} {_API}/{noun}{path}": ADMIN
        for noun in _ENTITIES
        for method, path in (of_every.split() for of_every in _OF_EVERY_ENTITY)
    },
    f"GET {_API}/clients/config": ADMIN,
    f"DELETE {_API}/clients/{{id}}": ADMIN,
    f"GET {_API}/clients/{{id}}/attributes": ADMIN,
    f"POST {_API}/combiners/clients/count": ADMIN,
    f"DELETE {_API}/combiners/{{id}}": ADMIN,
    f"POST {_API}/models/": ADMIN,
    f"GET {_API}/models/active": ADMIN,
    f"PUT {_API}/models/active": ADMIN,
    f"GET {_API}/models/leaf-nodes": ADMIN,
    f"PATCH {_API}/models/{{id}}": ADMIN,
    f"PUT {_API}/models/{{id}}": ADMIN,
    f"GET {_API}/models/{{id}}/download": ADMIN,
    f"GET {_API}/models/{{id}}/parameters": ADMIN,
    f"GET {_API}/models/{{id}}/ancestors": ADMIN,
    f"GET {_API}/models/{{id}}/descendants": ADMIN,
    f"GET {_API}/helpers/active": ADMIN,
    f"PUT {_API}/helpers/active": ADMIN,
    f"POST {_API}/packages/": ADMIN,
    f"GET {_API}/packages/active": ADMIN,
    f"PUT {_API}/packages/active": ADMIN,
    f"DELETE {_API}/packages/active": ADMIN,
    f"POST {_API}/predictions/start": ADMIN,
    f"POST {_API}/sessions/": ADMIN,
    f"POST {_API}/sessions/start": ADMIN,
    f"POST {_API}/sessions/start_splitlearning_session": ADMIN,
    f"PATCH {_API}/sessions/{{id}}": ADMIN,
    f"PUT {_API}/sessions/{{id}}": ADMIN,
    f"GET {_API}/sessions/{{id}}/explain": ADMIN,
    f"POST {_API}/attributes/": ADMIN,
    f"POST {_API}/attributes/current": ADMIN,
    f"POST {_API}/telemetry/": ADMIN,
    f"GET {_API}/events/": ADMIN,
    "GET /get_controller_status": ADMIN,
    "GET /docs": ADMIN,
    "GET /docs/oauth2-redirect": ADMIN,
    "GET /openapi.json": ADMIN,
    **{f"GET /{name}": ADMIN for name in _MOVED},
    "POST /start_session": ADMIN,
    "POST /list_combiners_data": ADMIN,
    "PUT /set_active_package": ADMIN,
    "PUT /set_current_model": ADMIN,
    "POST /set_package": ADMIN,
    "POST /set_initial_model": ADMIN,
    "GET /delete_model_trail": ADMIN,
    "POST /delete_model_trail": ADMIN,
    f"GET {_API}/graphql/": ADMIN,
    f"POST {_API}/graphql/": ADMIN,
    # the clients' wire
    "fedn.Combiner/TaskStream": CLIENT,
    "fedn.Combiner/SendModelUpdate": CLIENT,
    "fedn.Combiner/SendModelValidation": CLIENT,
    "fedn.Combiner/SendModelPrediction": CLIENT,
    "fedn.Combiner/SendBackwardCompletion": CLIENT,
    "fedn.Combiner/SendModelMetric": CLIENT,
    "fedn.Combiner/SendAttributeMessage": CLIENT,
    "fedn.Combiner/SendTelemetryMessage": CLIENT,
    "fedn.Connector/SendStatus": CLIENT,
    "fedn.Connector/SendHeartbeat": CLIENT,
    "fedn.Connector/AllianceStatusStream": CLIENT,
    "fedn.ModelService/Upload": CLIENT,
    "fedn.ModelService/Download": CLIENT,
    # between FEDn's servers; exempt from tokens there, not here
    "fedn.Connector/ListActiveClients": SERVERS,
    "fedn.Connector/AcceptingClients": SERVERS,
    "fedn.Connector/ReassignClient": SERVERS,
    "fedn.Connector/ReconnectClient": SERVERS,
    "fedn.Control/Start": SERVERS,
    "fedn.Control/Stop": SERVERS,
    "fedn.Control/FlushAggregationQueue": SERVERS,
    "fedn.Control/SetAggregator": SERVERS,
    "fedn.Control/SetServerFunctions": SERVERS,
    "fedn.Reducer/GetGlobalModel": SERVERS,
    "fedn.FunctionService/HandleProvidedFunctions": SERVERS,
    "fedn.FunctionService/HandleClientConfig": SERVERS,
    "fedn.FunctionService/HandleClientSelection": SERVERS,
    "fedn.FunctionService/HandleMetadata": SERVERS,
    "fedn.FunctionService/HandleStoreModel": SERVERS,
    "fedn.FunctionService/HandleAggregation": SERVERS,
}
NOBODY: Roles = frozenset()
_TEMPLATES = [
    (re.compile("[^/]+".join(map(re.escape, re.split(r"\{\w+\}", key)))), roles)
    for key, roles in ACCESS.items()
    if "{" in key
]


def roles_of_route(method: str, path: str) -> Roles:
    """path: as it is routed. A fixed path goes before a template; only administrators have templates."""
    key = f"{'GET' if method == 'HEAD' else method} {path}"
    if (roles := ACCESS.get(key)) is not None:
        return roles
    return next((roles for shape, roles in _TEMPLATES if shape.fullmatch(key)), NOBODY)


def roles_of_rpc(name: str) -> Roles:
    """name: package.Service/Method."""
    return ACCESS.get(name, NOBODY)


# ---- tokens

HMAC = ("HS256", "HS384", "HS512")
PUBLIC_KEY = ("RS256", "RS384", "RS512", "ES256", "ES384", "ES512")
_CURVES = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521"}
BOTH_SCHEMES = ("Bearer", "Token")
LEEWAY_S = 5.0  # clocks differ
LEAST_SECRET_BYTES = 16  # whoever has one token can try out a shorter secret on its signature, and be anybody
MAX_TOKEN_CHARACTERS = 8192
INVALID = "Invalid token"
EXPIRED = "Token expired"


@dataclass(frozen=True, slots=True)
class Identity:
    """What a verified token says."""

    role: Role
    client_id: str | None  # the one client that it may act as; None: the token does not say
    expires_at: float  # seconds since the epoch, leeway included


@dataclass(frozen=True, slots=True)
class Verifier:
    algorithm: str
    schemes: tuple[str, ...]
    claim: tuple[str, str] | None  # name and value of one that every token must have
    clock: Callable[[], float] = field(repr=False)
    _key: Any = field(repr=False)

    @classmethod
    def of(
        cls,
        secret: str,
        *,
        algorithm: str = "HS256",
        scheme: str = "",
        claim_key: str = "",
        claim_value: str = "",
        clock: Callable[[], float] = time.time,
    ) -> Verifier:
        """secret: of HS…; for RS… and ES…, the public key in PEM. Raises Invalid, which never tells the secret."""
        if bool(claim_key) != bool(claim_value):
            raise Invalid("jwt_custom_claim_key: key and value go together")
        claim = (claim_key, claim_value) if claim_key else None
        return cls(algorithm, (scheme,) if scheme else BOTH_SCHEMES, claim, clock, _key(secret, algorithm))

    def verify(self, header: str | None) -> Identity:
        """header: the value of `authorization`. Raises Unauthorized, in FEDn's words."""
        if not header:
            raise Unauthorized("Missing token")
        scheme, _, token = header.partition(" ")
        if scheme.lower() not in {known.lower() for known in self.schemes}:
            raise Unauthorized(f"Invalid token scheme, expected {' or '.join(self.schemes)}")
        return self._identity(self._claims(token.strip()))

    def _claims(self, token: str) -> Mapping[str, Any]:
        if not token or len(token) > MAX_TOKEN_CHARACTERS or not token.isascii():
            raise Unauthorized(INVALID)
        try:
            if "crit" in jws.get_unverified_header(token):  # RFC 7515, 4.1.11: none is understood here
                raise Unauthorized(INVALID)
            claims = json.loads(jws.verify(token, self._key, algorithms=[self.algorithm]))
        except (JOSEError, ValueError, TypeError, RecursionError):
            raise Unauthorized(INVALID) from None
        if not isinstance(claims, dict):
            raise Unauthorized(INVALID)
        return claims

    def _identity(self, claims: Mapping[str, Any]) -> Identity:
        expires_at, now = _time(claims, "exp"), self.clock()
        if expires_at is None:
            raise Unauthorized(INVALID)
        if expires_at + LEEWAY_S <= now:
            raise Unauthorized(EXPIRED)
        if "nbf" in claims and ((begins_at := _time(claims, "nbf")) is None or begins_at - LEEWAY_S > now):
            raise Unauthorized(INVALID)
        if self.claim is not None:
            name, wanted = self.claim
            if claims.get(name) != wanted:
                raise Unauthorized(INVALID)
        role = claims.get("role")
        if not isinstance(role, str) or role not in list(Role):
            raise Unauthorized(INVALID)
        client_id = claims.get("client_id")
        client_id = claims.get("sub") if client_id is None else client_id
        if client_id is not None and not (isinstance(client_id, str) and client_id):
            raise Unauthorized(INVALID)
        return Identity(Role(role), client_id, expires_at + LEEWAY_S)

    def sign(self, role: Role, *, client_id: str | None, lifetime_s: float) -> str:
        """A token. Raises Invalid where the server has no key to sign with."""
        if self.algorithm not in HMAC:
            raise Invalid(
                f"jwt_algorithm: with {self.algorithm} the issuer signs tokens, with the private key; "
                "this server has the public one only"
            )
        now = self.clock()
        claims: dict[str, Any] = {"role": role.value, "iat": int(now), "exp": math.ceil(now + lifetime_s)}
        if client_id:
            claims["client_id"] = client_id
        if self.claim is not None:
            claims[self.claim[0]] = self.claim[1]
        return str(jws.sign(claims, self._key, algorithm=self.algorithm))


def _time(claims: Mapping[str, Any], name: str) -> float | None:
    """Seconds since the epoch; None if it is no time."""
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**53:
        return None
    return float(value)


def _key(secret: str, algorithm: str) -> Any:
    """A key that fits this one algorithm and no other, so that a token cannot choose how it is checked."""
    if algorithm not in HMAC + PUBLIC_KEY:
        known = ", ".join(HMAC + PUBLIC_KEY)
        raise Invalid(f"jwt_algorithm: {algorithm!r} is not supported; one of {known} is needed")
    if not secret.strip():
        raise Invalid("jwt_secret_key: empty")
    if algorithm in HMAC:
        try:
            if _is_jwk(secret):
                raise JOSEError
            key = jwk.construct(secret, algorithm)
        except JOSEError:
            raise Invalid(
                f"jwt_secret_key: a public key is no secret for {algorithm}; for it, jwt_algorithm is RS256 or ES256"
            ) from None
        if len(secret.encode()) < LEAST_SECRET_BYTES:
            raise Invalid(f"jwt_secret_key: shorter than {LEAST_SECRET_BYTES} bytes; 32 random ones cannot be guessed")
        return key
    pem = secret.replace("\\n", "\n").strip() + "\n"  # as it stands in an environment file
    if "PRIVATE KEY" in pem:
        raise Invalid(f"jwt_secret_key: with {algorithm} the public key belongs here; this is the private one")
    try:
        key = jwk.construct(pem, algorithm)
        facts = key.to_dict()
    except (JOSEError, AttributeError, KeyError, TypeError, ValueError):  # of another kind than the algorithm's, too
        raise Invalid(f"jwt_secret_key: no public key in PEM for {algorithm}") from None
    if facts.get("crv") != _CURVES.get(algorithm):
        raise Invalid(f"jwt_secret_key: {algorithm} needs a key on {_CURVES.get(algorithm)}, not {facts.get('crv')}")
    return key


def _is_jwk(secret: str) -> bool:
    """Whether it is a key in JSON (RFC 7517), which python-jose takes for any other text."""
    try:
        document = json.loads(secret)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and ("kty" in document or "keys" in document)


# ---- the gate

_WINDOW_S = 60.0
_PEERS_KEPT = 10_000


@dataclass(slots=True)
class Failures:
    """Refusals for a token that is none, by peer, over a minute; the oldest peer is forgotten above _PEERS_KEPT."""

    per_minute: int
    clock: Callable[[], float]
    _of_peer: OrderedDict[str, tuple[float, int]] = field(default_factory=OrderedDict)

    def note(self, peer: str) -> bool:
        """Whether it is one too many."""
        now = self.clock()
        began_at, count = self._of_peer.pop(peer, (now, 0))
        if now - began_at >= _WINDOW_S:
            began_at, count = now, 0
        self._of_peer[peer] = (began_at, count + 1)
        if len(self._of_peer) > _PEERS_KEPT:
            self._of_peer.popitem(last=False)
        return count + 1 > self.per_minute


@dataclass(frozen=True, slots=True)
class Gate:
    """Both ports ask here. A good token is let in however many bad ones its address has sent: a site is one address."""

    verifier: Verifier
    failures: Failures
    open_prefix: str = ""  # paths at and below it need no token

    def admit(self, roles: Roles, header: str | None, peer: str) -> Identity | None:
        """Who calls; None where no token is needed. Raises Unauthorized, Forbidden, TooMany."""
        if None in roles:
            return None
        try:
            identity = self.verifier.verify(header)
        except Unauthorized:
            if self.failures.note(peer):
                raise TooMany("too many failed authentications; come again in a minute") from None
            raise
        if identity.role not in roles:
            raise Forbidden("Insufficient permissions")
        return identity

    def is_open(self, path: str) -> bool:
        return bool(self.open_prefix) and (path == self.open_prefix or path.startswith(f"{self.open_prefix}/"))
