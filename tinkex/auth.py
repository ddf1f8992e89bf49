"""Exchanging a key for a short-lived token (JWT), for servers that want it so.

The exchange happens before the first request that needs a token, again half-way through its life,
and once when a token is refused. Knows of HTTP only `Transport`; keeps tokens in memory alone.
"""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from collections.abc import Callable

from . import config, errors, types, wire
from .transport import Transport

logger = logging.getLogger("tinkex")

#: Seconds before a token's end at which no request goes out with it any more.
MARGIN = 60.0


class TokenKeeper:
    """Holds the token, and gets the next one in time.

    Args:
        exchange: makes a token of a credential (one request to the server).
        credential: gives the key, or the output of the credential command.
        now: seconds since the epoch.
    """

    def __init__(
        self,
        exchange: Callable[[str], str],
        credential: Callable[[], str],
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._exchange = exchange
        self._credential = credential
        self._now = now
        self._lock = (
            threading.RLock()
        )  # guards all below; held over an exchange, so that one serves all
        self._token = ""
        self._renew_at = 0.0
        self._ends_at = 0.0
        self._exchanging = False

    def get(self) -> str:
        """A token that is good for a while; the credential itself while it is being exchanged."""
        if self._now() < self._renew_at:
            return self._token
        with self._lock:
            if self._exchanging:
                return self._credential()
            if self._now() >= self._renew_at:
                self._renew()
            return self._token

    def refused(self) -> bool:
        """The server says that the token is invalid: get another. Whether there is one."""
        with self._lock:
            if self._exchanging:
                return False
            self._renew_at = self._ends_at = 0.0
            self._renew()
            return True

    def _renew(self) -> None:
        self._exchanging = True
        try:
            token = self._exchange(self._credential())
        except errors.TinkexError as exc:
            if self._now() + MARGIN >= self._ends_at:
                raise
            logger.warning("the token could not be renewed; the old one is still good: %s", exc)
            self._renew_at = self._now() + MARGIN
            return
        finally:
            self._exchanging = False
        issued, ends = _lifetime(token, self._now())
        self._token, self._ends_at = token, ends
        self._renew_at = min(issued + (ends - issued) / 2, max(ends - MARGIN, self._now() + 1))


def _lifetime(token: str, now: float) -> tuple[float, float]:
    """When a JWT was issued and when it ends; an hour from now where it does not say."""
    try:
        part = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        ends = float(claims["exp"])
        return float(claims.get("iat", now)), ends
    except (IndexError, KeyError, ValueError, TypeError):
        return now, now + 3600


def install(transport: Transport, features: types.ClientConfig) -> None:
    """Make *transport* send tokens, if the server wants them."""
    if not features.pjwt_auth_enabled:
        return
    settings = transport.config

    def credential() -> str:
        if features.credential_default_source == "credential_cmd" and settings.credential_cmd:
            return config.run_credential_cmd(settings.credential_cmd)
        if settings.api_key:
            return settings.api_key
        if settings.credential_cmd:
            return config.run_credential_cmd(settings.credential_cmd)
        raise ValueError(
            "the server wants a credential: set TINKER_API_KEY or TINKER_CREDENTIAL_CMD."
        )

    def exchange(_: str) -> str:
        return transport.call(wire.AUTH_TOKEN, types.AuthTokenRequest()).jwt

    keeper = TokenKeeper(exchange, credential)
    transport.get_key = keeper.get
    transport.refresh_key = keeper.refused
