"""Signing in to the page: a cookie stands for the API key, which the page never has.

`tinkex ui` requests a one-time token with its key and opens the page with the token in the URL; the
page exchanges it for a cookie. Keys stay in memory, and are checked again at every request.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

import attrs

from tinkex.server.http_errors import Refusal

#: Lifetime in seconds of a one-time token, and of a cookie.
TOKEN_SECONDS = 120.0
COOKIE_SECONDS = 12 * 3600.0
#: Most tokens, and most cookies, that are kept; the oldest are dropped first.
_MOST = 1000


@attrs.frozen
class _Given:
    key: str
    until: float


class SignIns:
    """Used on the event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tokens: dict[str, _Given] = {}
        self._cookies: dict[str, _Given] = {}

    def give_token(self, key: str) -> str:
        """A token for signing in once, within `TOKEN_SECONDS`."""
        return self._give(self._tokens, key, TOKEN_SECONDS)

    def exchange(self, token: str) -> str:
        """The cookie for a one-time token. Raises Refusal (401)."""
        given = self._tokens.pop(token, None)
        if given is None or given.until < self._clock():
            raise Refusal(
                401,
                "this link has been used or is older than two minutes; run tinkex ui again for a "
                "new one.",
            )
        return self.give_cookie(given.key)

    def give_cookie(self, key: str) -> str:
        return self._give(self._cookies, key, COOKIE_SECONDS)

    def key_of(self, cookie: str) -> str | None:
        """The key that a cookie stands for; None if it has expired or is unknown."""
        given = self._cookies.get(cookie)
        return given.key if given is not None and given.until >= self._clock() else None

    def forget(self, cookie: str) -> None:
        self._cookies.pop(cookie, None)

    def _give(self, place: dict[str, _Given], key: str, seconds: float) -> str:
        now = self._clock()
        for name in [name for name, given in place.items() if given.until < now]:
            del place[name]
        while len(place) >= _MOST:
            del place[next(iter(place))]
        name = secrets.token_urlsafe(32)
        place[name] = _Given(key, now + seconds)
        return name


def check_same_origin(headers: Mapping[str, str]) -> None:
    """Refuse requests that a page of another origin could have sent with our cookie (CSRF).

    Another port of the same host is another origin, although browsers send it the cookie.

    Raises:
        Refusal: 403.
    """
    origin = headers.get("origin")
    is_foreign = (
        origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
    )
    if is_foreign or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise Refusal(403, "the page of this server serves its own requests only.")
