"""The token that a client shows, and when it is time for a new one.

Knows no network: transport.py (of a client) and api.py fetch the new one. `exp` is read without verification, to plan
by: who decides is the server. No token is ever in a repr.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import time

_SPARE_S = 60.0  # a new one is fetched so long before the old one expires, or in the last third of a short life


class Tokens:
    """Shared by all that talk to the server for one client."""

    def __init__(self, access: str = "", *, scheme: str = "Bearer", refresh: str = "", refresh_uri: str = "") -> None:
        """access: "" is none. refresh, refresh_uri: where a new access token is got, and by what.

        Raises ValueError if they cannot be sent, or only one of the two is there.
        """
        if bool(refresh) != bool(refresh_uri):
            raise ValueError("a refresh token and its URI go together")
        self._scheme, self.refresh, self.refresh_uri = scheme, refresh, refresh_uri
        self.count = 0  # of those that were taken
        self._access, self._due_at = "", 0.0  # time.time()
        if access:
            self._set(access)

    def __repr__(self) -> str:
        return f"Tokens(count={self.count}, renewable={self.renewable})"

    @property
    def renewable(self) -> bool:
        return bool(self.refresh)

    @property
    def authorization(self) -> str:
        """The header's value; empty: none."""
        return f"{self._scheme} {self._access}" if self._access else ""

    def due_in_s(self) -> float:
        """Until a new one should be fetched; 0 if there is none yet, infinite if it is not known."""
        return max(0.0, self._due_at - time.time())

    def take(self, access: str, refresh: str = "") -> None:
        """From now on these; refresh: where the issuer gives a new one each time. Raises ValueError."""
        self._set(access)
        self.refresh = refresh or self.refresh
        self.count += 1

    def _set(self, access: str) -> None:
        word = access.split()[-1] if access.split() else ""  # "Bearer abc" is understood, as FEDn does
        if not (word.isascii() and word.isprintable()):
            raise ValueError("token: it has characters that cannot be sent")
        now = time.time()
        left_s = _expires_at(word) - now
        self._access, self._due_at = word, now + left_s - min(_SPARE_S, max(0.0, left_s) / 3)


def renewed(answer: object) -> tuple[str, str]:
    """The access token and, where there is one, the next refresh token of an issuer's answer. Raises ValueError."""
    match answer:
        case {"access": str(access), **more} if access.strip():
            refresh = more.get("refresh")
            return access, refresh if isinstance(refresh, str) else ""
    raise ValueError("it answered no access token")


def _expires_at(token: str) -> float:
    """Seconds since the epoch; infinite if it does not say, or is no JWT."""
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return float(claims["exp"])
    except (IndexError, KeyError, TypeError, ValueError, binascii.Error, RecursionError, OverflowError):
        return math.inf
