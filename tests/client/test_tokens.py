"""A client that gets new tokens while it works, from an issuer that the test plays."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from fl_client.client import Client, TrainResult
from fl_client.tokens import Tokens
from fl_client.transport import ClientError, Tls, Unreachable, renew
from fl_server.testing import Federation
from tests.client.api_double import Answer, Double, Request, answering, as_json
from tests.server.tokens import SECRET, token
from tests.server.wire_client import WAIT_S, filled

LIFE_S = 4.0


NONSENSE: list[Answer] = [
    *(as_json({}, status) for status in (404, 408, 418, 429, 500, 502, 503, 504)),
    *(
        as_json(answer)
        for answer in ({}, [], None, {"access": ""}, {"access": " "}, {"access": 7}, {"access": "a\x00"})
    ),
    (200, "text/html", b"<html>Log in to the hotel's network</html>"),
    (200, "application/json", b"{"),
]


def issued(life_s: float = LIFE_S) -> str:
    return token("client", client_id="a", exp=time.time() - 5 + life_s)  # the server's leeway is 5 s


@contextmanager
def issuer(life_s: float = LIFE_S) -> Iterator[Double]:
    def answer(request: Request) -> Answer:
        assert request.json == {"refresh": "again"}
        return as_json({"access": issued(life_s)})

    with answering() as double:
        double.answer = answer
        yield double


def tokens_of(double: Double, access: str = "") -> Tokens:
    return Tokens(access, refresh="again", refresh_uri=f"http://127.0.0.1:{double.port}/refresh")


def test_a_new_token_is_due_before_the_old_one_expires() -> None:
    now = time.time()
    assert 3500 < Tokens(token(exp=now + 3600)).due_in_s() < 3545
    assert 15 < Tokens(token(exp=now + 30)).due_in_s() < 21
    assert Tokens(token(exp=now - 1)).due_in_s() == 0
    assert Tokens("opaque").due_in_s() == float("inf")
    assert Tokens("a.b.c").due_in_s() == float("inf")
    assert Tokens().due_in_s() == 0


def test_tokens_are_in_no_repr_and_go_together() -> None:
    secret = token()
    assert secret not in repr(Tokens(secret, refresh="hidden", refresh_uri="http://x"))
    assert "hidden" not in repr(Tokens(secret, refresh="hidden", refresh_uri="http://x"))
    assert Tokens("Bearer abc", scheme="Token").authorization == "Token abc"
    with pytest.raises(ValueError, match="go together"):
        Tokens(secret, refresh="x")
    with pytest.raises(ClientError, match="cannot be sent"):
        Client(api_url="http://x", train=lambda parameters, task: (parameters, 1), token="a\x00b")


async def test_a_refresh_that_is_refused_is_the_end_and_one_that_fails_is_not() -> None:
    with answering() as double:
        tokens = tokens_of(double)
        for status in (400, 401, 403):
            double.answer = lambda request, status=status: as_json({"message": "not for again"}, status)  # type: ignore[misc]
            with pytest.raises(ClientError, match="not for") as refused:
                await renew(tokens, Tls())
            assert "again" not in str(refused.value)
        for nonsense in NONSENSE:
            double.answer = lambda request, nonsense=nonsense: nonsense  # type: ignore[misc]
            with pytest.raises(Unreachable):
                await renew(tokens, Tls())
        double.answer = lambda request: as_json({"access": "new", "refresh": "next"})
        await renew(tokens, Tls())
    assert (tokens.authorization, tokens.refresh, tokens.count) == ("Bearer new", "next", 1)


@pytest.mark.parametrize("answer", [as_json({"message": "no"}, 401), as_json({}, 503), as_json({"access": "é"}), None])
async def test_an_issuers_uri_is_told_without_what_may_be_a_secret_in_it(answer: Any) -> None:
    with answering() as double:
        double.answer = lambda request: answer
        at = f"127.0.0.1:{double.port if answer else 1}/refresh"
        tokens = Tokens("", refresh="again", refresh_uri=f"http://user:hush-hush@{at}?key=hush-hush")
        with pytest.raises((ClientError, Unreachable)) as refused:
            await renew(tokens, Tls())
    assert f"http://{at}" in str(refused.value) and "hush-hush" not in str(refused.value)


async def test_a_client_without_a_token_gets_its_first_one_from_the_issuer() -> None:
    with issuer(60) as double:
        async with Federation(jwt_secret_key=SECRET) as federation:
            federation.add_client("a", train=unchanged, token=tokens_of(double))
            await federation.attached(1)


async def test_a_client_goes_on_over_several_tokens_and_keeps_its_task() -> None:
    trained: list[str] = []
    renewed = asyncio.Event()
    with issuer() as double:
        tokens = tokens_of(double, issued())

        async def train(parameters: list[np.ndarray], task: Any) -> Any:
            trained.append(task.task_id)
            began_with = tokens.count
            async with asyncio.timeout(WAIT_S):
                while tokens.count < began_with + 5:  # the token with which the task came is dead by then
                    await renewed.wait()
                    renewed.clear()
            return TrainResult(parameters, 1)

        take = tokens.take

        def noted(access: str, refresh: str = "") -> None:
            take(access, refresh)
            renewed.set()

        tokens.take = noted  # type: ignore[method-assign]
        admin = {"Authorization": f"Bearer {token('admin', exp=time.time() + 600)}"}
        async with Federation(jwt_secret_key=SECRET) as federation:
            federation.http.headers.update(admin)
            federation.add_client("a", train=train, token=tokens)
            await federation.attached(1)
            session = await federation.run(filled(0), rounds=1)
            assert session["status"] == "Finished"
            async with federation.server.scheduler.feed.watch(0) as events:
                told = [(event.kind, event.data.get("status")) for event in events.pending]
            offline = [status for kind, status in told if kind == "client" and status == "offline"]
            assert offline == [], "it moved from stream to stream, and was never away"
    assert len(trained) == 1
    assert tokens.count >= 5


async def test_an_issuer_that_is_away_and_talks_nonsense_costs_no_task() -> None:
    """It is so until the token has expired, and the server has closed the stream."""
    trained: list[str] = []
    renewed = asyncio.Event()
    nonsense = itertools.cycle(NONSENSE)
    with issuer(30) as double:
        life_s = 1.0
        tokens, back_at = tokens_of(double, issued(life_s)), time.time() + life_s + 0.5
        well = double.answer
        double.answer = lambda request: (
            well(request) if time.time() > back_at and len(double.asked) > 3 else next(nonsense)
        )

        async def train(parameters: list[np.ndarray], task: Any) -> Any:
            trained.append(task.task_id)
            async with asyncio.timeout(WAIT_S):
                await renewed.wait()
            return TrainResult(parameters, 1)

        take = tokens.take

        def noted(access: str, refresh: str = "") -> None:
            take(access, refresh)
            renewed.set()

        tokens.take = noted  # type: ignore[method-assign]
        async with Federation(jwt_secret_key=SECRET) as federation:
            federation.http.headers["Authorization"] = f"Bearer {token('admin', exp=time.time() + 600)}"
            federation.add_client("a", train=train, token=tokens)
            await federation.attached(1)
            session = await federation.run(filled(0), rounds=1)
    assert (session["status"], len(trained)) == ("Finished", 1)


async def test_a_client_whose_issuer_refuses_reports_its_task_and_ends_when_its_token_does() -> None:
    loop, asked = asyncio.get_running_loop(), asyncio.Event()

    def refuse(request: Request) -> Answer:
        loop.call_soon_threadsafe(asked.set)
        return as_json({"message": "unknown refresh token"}, 401)

    async def train(parameters: list[np.ndarray], task: Any) -> Any:
        async with asyncio.timeout(WAIT_S):
            await asked.wait()
        return TrainResult(parameters, 1)

    with answering() as double:
        double.answer = refuse
        async with Federation(jwt_secret_key=SECRET) as federation:
            federation.http.headers["Authorization"] = f"Bearer {token('admin', exp=time.time() + 600)}"
            tokens = tokens_of(double, issued(3.0))
            one = Client(api_url=federation.server.api_url, train=train, client_id="a", token=tokens)
            async with asyncio.timeout(WAIT_S):
                ending, session = await asyncio.gather(
                    one.run(), federation.run(filled(0), rounds=1), return_exceptions=True
                )
    assert isinstance(session, dict) and session["status"] == "Finished", session
    assert isinstance(ending, ClientError) and "unknown refresh token" in str(ending)


async def test_a_client_whose_token_expires_for_good_ends() -> None:
    async with Federation(jwt_secret_key=SECRET) as federation:
        one = Client(api_url=federation.server.api_url, train=unchanged, client_id="a", token=issued(1.0))
        async with asyncio.timeout(WAIT_S):
            with pytest.raises(ClientError, match="Token expired"):
                await one.run()


def unchanged(parameters: list[np.ndarray], task: Any) -> Any:
    return TrainResult(parameters, 1)
