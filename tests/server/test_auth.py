"""Tokens and the table: what is let in, and by whom; no port is open here."""

from __future__ import annotations

import base64
import json
import logging
import time

import pytest
from jose import jwk

from fl_server.app import gate
from fl_server.auth import ACCESS, ADMIN, CLIENT, NOBODY, OPEN, Failures, Gate, Role, Verifier, roles_of_route
from fl_server.errors import Forbidden, Invalid, TooMany, Unauthorized
from fl_server.settings import Settings
from tests.server.tokens import SECRET, bad_headers, by_hand, claims, key_pair, token

KEY = SECRET.encode()


def test_a_good_token_says_role_client_and_until_when() -> None:
    verifier = Verifier.of(SECRET)
    expires_at = int(time.time()) + 60
    said = verifier.verify(f"Bearer {token('client', client_id='a', exp=expires_at)}")
    assert (said.role, said.client_id) == (Role.CLIENT, "a")
    assert expires_at <= said.expires_at <= expires_at + 10
    assert verifier.verify(f"Token {token('client', sub='b')}").client_id == "b"
    assert verifier.verify(f"bearer {token('client', sub='b', client_id='a')}").client_id == "a"
    assert verifier.verify(f"Bearer {by_hand({'alg': 'HS256'}, claims(client_id=None, sub='b'), KEY)}").client_id == "b"
    assert verifier.verify(f"Bearer {token('admin')}").client_id is None


@pytest.mark.parametrize("kind", bad_headers())
def test_a_bad_token_is_refused_in_fedns_words(kind: str) -> None:
    header, said = bad_headers()[kind]
    with pytest.raises(Unauthorized) as refused:
        Verifier.of(SECRET).verify(header)
    assert str(refused.value) == said


def test_a_token_does_not_say_how_it_is_read() -> None:
    """Neither where its key would be found (kid, jku, x5u, jwk of RFC 7515), nor that its payload is another thing."""
    read = Verifier.of(SECRET).verify
    about = {"kid": "other", "jku": "http://127.0.0.1:9/", "x5u": "http://127.0.0.1:9/", "jwk": {"kty": "oct", "k": ""}}
    assert read(f"Bearer {by_hand({'alg': 'HS256', 'typ': 'at+jwt', **about}, claims(), KEY)}").role is Role.ADMIN
    with pytest.raises(Unauthorized):
        read(f"Bearer {by_hand({'alg': 'HS256', **about}, claims(), b'')}")


@pytest.mark.parametrize("algorithm", ["ES256", "ES384", "ES512"])
def test_a_signature_of_zeros_is_none(algorithm: str) -> None:
    """CVE-2022-21449: r = s = 0 fits each key where nobody looks."""
    _, public = key_pair(algorithm)
    signed = by_hand({"alg": algorithm}, claims(), None)
    for size in (64, 96, 132):
        zeros = base64.urlsafe_b64encode(bytes(size)).rstrip(b"=").decode()
        with pytest.raises(Unauthorized):
            Verifier.of(public, algorithm=algorithm).verify(f"Bearer {signed}{zeros}")


def test_only_the_scheme_that_is_set_is_accepted() -> None:
    verifier = Verifier.of(SECRET, scheme="Token")
    verifier.verify(f"Token {token()}")
    with pytest.raises(Unauthorized, match=r"^Invalid token scheme, expected Token$"):
        verifier.verify(f"Bearer {token()}")


def test_a_custom_claim_must_be_there_with_its_value() -> None:
    verifier = Verifier.of(SECRET, claim_key="project", claim_value="p1")
    verifier.verify(f"Bearer {token(project='p1')}")
    for wrong in (token(), token(project="p2"), token(project=["p1"]), token(project=1)):
        with pytest.raises(Unauthorized, match=r"^Invalid token$"):
            verifier.verify(f"Bearer {wrong}")


def test_clocks_may_differ_by_a_few_seconds() -> None:
    verifier, now = Verifier.of(SECRET), time.time()
    verifier.verify(f"Bearer {token(exp=now - 1, nbf=now + 3)}")


@pytest.mark.parametrize("algorithm", ["RS256", "RS384", "RS512", "ES256", "ES384", "ES512"])
def test_a_public_key_verifies_and_cannot_be_used_as_a_secret(algorithm: str) -> None:
    private, public = key_pair(algorithm)
    for written in (public, public.strip().replace("\n", "\\n")):
        verifier = Verifier.of(written, algorithm=algorithm)
        assert verifier.verify(f"Bearer {token('admin', key=private, algorithm=algorithm)}").role is Role.ADMIN
    for secret in (public, public.strip(), public + "\n"):
        confused = by_hand({"alg": "HS256", "typ": "JWT"}, claims(), secret.encode())
        relabelled = by_hand({"alg": algorithm, "typ": "JWT"}, claims(), secret.encode())
        for forged in (confused, relabelled, by_hand({"alg": "none"}, claims(), None)):
            with pytest.raises(Unauthorized, match=r"^Invalid token$"):
                verifier.verify(f"Bearer {forged}")
    with pytest.raises(Invalid, match=r"^jwt_secret_key: a public key is no secret for HS256"):
        Verifier.of(public, algorithm="HS256")


@pytest.mark.parametrize("algorithm", ["none", "None", "", "HS1", "PS256", "EdDSA", "hs256", "HS256,none"])
def test_any_other_algorithm_is_refused_at_the_start(algorithm: str) -> None:
    with pytest.raises(Invalid, match=r"^jwt_algorithm: "):
        Verifier.of(SECRET, algorithm=algorithm)


def test_a_key_that_does_not_fit_is_refused_at_the_start_and_not_told() -> None:
    private, _ = key_pair("RS256")
    _, p384 = key_pair("ES384")
    _, p256 = key_pair("ES256")
    in_json = json.dumps(jwk.construct(p256, "ES256").to_dict())
    wrong = [(private, "RS256"), (p384, "ES256"), (p256, "RS256"), (SECRET, "RS256"), (SECRET, "ES256"), (" ", "HS256")]
    wrong += [(p256, "HS256"), (in_json, "HS256"), ("ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQD", "HS256")]
    wrong += [("15 bytes, short", "HS256"), ("15 bytes, short", "HS512")]
    for key, algorithm in wrong:
        with pytest.raises(Invalid, match=r"^jwt_secret_key: ") as refused:
            Verifier.of(key, algorithm=algorithm)
        assert not any(line in str(refused.value) for line in key.splitlines() if len(line) > 10)
    with pytest.raises(Invalid, match=r"^jwt_custom_claim_key: "):
        Verifier.of(SECRET, claim_key="a")


def test_a_signed_token_is_good_and_an_issuers_server_signs_none() -> None:
    verifier = Verifier.of(SECRET, claim_key="project", claim_value="p1")
    said = verifier.verify(f"Bearer {verifier.sign(Role.CLIENT, client_id='a', lifetime_s=60)}")
    assert (said.role, said.client_id) == (Role.CLIENT, "a")
    _, public = key_pair("ES256")
    with pytest.raises(Invalid, match="the issuer signs"):
        Verifier.of(public, algorithm="ES256").sign(Role.CLIENT, client_id="a", lifetime_s=60)


@pytest.mark.parametrize("algorithm", ["HS256", "RS256", "ES256"])
def test_python_joses_other_backend_is_never_used(algorithm: str) -> None:
    """It needs ecdsa, in which a timing attack is not going to be fixed (CVE-2024-23342)."""
    key = SECRET if algorithm == "HS256" else key_pair(algorithm)[1]
    assert type(Verifier.of(key, algorithm=algorithm)._key).__module__ == "jose.backends.cryptography_backend"


# ---- the table


def test_what_is_not_in_the_table_is_for_nobody() -> None:
    assert roles_of_route("GET", "/nowhere") is NOBODY
    assert roles_of_route("TRACE", "/health") is NOBODY
    assert roles_of_route("GET", "/health\n") is NOBODY
    assert roles_of_route("HEAD", "/health") == OPEN
    assert roles_of_route("GET", "/api/v1/packages/download") == CLIENT
    assert roles_of_route("GET", "/api/v1/packages/other") == ADMIN
    assert roles_of_route("GET", "/api/v1/sessions/a/b/explain") is NOBODY


def test_health_and_ready_alone_are_open() -> None:
    assert {key for key, roles in ACCESS.items() if None in roles} == {
        "GET /health",
        "GET /ready",
        "grpc.health.v1.Health/Check",
        "grpc.health.v1.Health/Watch",
    }


def test_a_path_with_a_variable_is_for_administrators_only() -> None:
    """So whichever route takes a path that two templates fit, it is no less guarded."""
    assert {roles for key, roles in ACCESS.items() if "{" in key} == {ADMIN}


def test_many_bad_tokens_of_one_address_are_told_so_and_good_ones_are_let_in() -> None:
    now = [0.0]
    entry = Gate(Verifier.of(SECRET), Failures(3, lambda: now[0]))
    for _ in range(3):
        with pytest.raises(Unauthorized):
            entry.admit(CLIENT, "Bearer x", "10.0.0.1")
    with pytest.raises(TooMany):
        entry.admit(CLIENT, "Bearer x", "10.0.0.1")
    assert entry.admit(CLIENT, f"Bearer {token()}", "10.0.0.1") is not None
    with pytest.raises(Unauthorized):
        entry.admit(CLIENT, "Bearer x", "10.0.0.2")
    now[0] = 61.0
    with pytest.raises(Unauthorized):
        entry.admit(CLIENT, "Bearer x", "10.0.0.1")
    with pytest.raises(Forbidden):
        entry.admit(CLIENT, f"Bearer {token('admin')}", "10.0.0.1")


# ---- settings


def test_fedns_variables_are_read_where_ours_are_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDN_JWT_SECRET_KEY", "theirs")
    monkeypatch.setenv("FEDN_JWT_ALGORITHM", "HS512")
    monkeypatch.setenv("FEDN_AUTH_SCHEME", "Token")
    monkeypatch.setenv("FEDN_CUSTOM_URL_PREFIX", "internal/")
    monkeypatch.setenv("FEDN_AUTH_WHITELIST_URL_PREFIX", "/internal")
    monkeypatch.setenv("FEDN_JWT_CUSTOM_CLAIM_KEY", "project")
    monkeypatch.setenv("FEDN_JWT_CUSTOM_CLAIM_VALUE", "p1")
    monkeypatch.setenv("FL_JWT_SECRET_KEY", SECRET)
    settings = Settings.load(None, {})
    entry = gate(settings)
    assert entry is not None
    assert entry.verifier.algorithm == "HS512"
    assert entry.verifier.schemes == ("Token",)
    assert (settings.custom_url_prefix, entry.open_prefix) == ("/internal", "/internal")
    entry.verifier.verify(f"Token {token(algorithm='HS512', project='p1')}")
    assert SECRET not in repr(settings) + str(settings) + repr(entry)
    assert "theirs" not in repr(settings)


@pytest.mark.parametrize("name", ["FL_JWT_SECRET", "FL_AUTH_WHITELIST"])
def test_a_misspelt_variable_is_still_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "x")
    with pytest.raises(Invalid, match=name):
        Settings.load(None, {})


@pytest.mark.parametrize("prefix", ["/", "//", "/a/../b", "/a\nb"])
def test_a_whitelist_of_everything_is_refused(prefix: str) -> None:
    with pytest.raises(Invalid, match=r"^auth_whitelist_url: "):
        Settings.load(None, {"auth_whitelist_url": prefix})


def test_a_wrong_setting_does_not_tell_the_secret(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(Invalid) as refused:
        gate(Settings.load(None, {"jwt_secret_key": SECRET, "jwt_algorithm": "RS256"}))
    assert SECRET not in str(refused.value) + caplog.text
