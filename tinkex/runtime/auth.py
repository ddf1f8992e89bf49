"""Exchanges a key for a short-lived token (JWT), for servers that require it.

A token is requested before the first request that needs one, again halfway through its lifetime,
and once when a token is refused. Uses only `Transport` for HTTP; keeps tokens only in memory.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import threading
import time
from collections.abc import Callable

from tinkex import config, errors, types, wire
from tinkex.runtime.retry import ONCE
from tinkex.runtime.transport import Transport

logger = logging.getLogger("tinkex")

#: A token is not used in its last seconds, this many (fewer for a short-lived token).
MARGIN = 60.0
HOUR = 3600.0  # seconds
JUST_NOW = 1.0  # seconds


class TokenKeeper:
    """Holds the token, and renews it in time.

    Args:
        exchange: requests a token from the server; called with True if there is no valid token
            left.
        credential: returns the key, or the output of the credential command.
        now: seconds since the epoch.
    """

    def __init__(
        self,
        exchange: Callable[[bool], str],
        credential: Callable[[], str],
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._exchange = exchange
        self._credential = credential
        self._now = now
        # Guards everything below; held during an exchange, so that one exchange serves all threads.
        self._lock = threading.RLock()
        self._token = ""
        self._got_at = 0.0
        self._renew_at = 0.0
        self._good_until = 0.0
        self._exchanging = False

    def get(self) -> str:
        """A token that stays valid for a while; the credential itself during an exchange."""
        if self._now() < self._renew_at:
            return self._token
        if not self._lock.acquire(blocking=self._now() >= self._good_until):
            return self._token  # another thread renews it, and this one is still valid
        try:
            if self._exchanging:
                return self._credential()
            if self._now() >= self._renew_at:
                self._renew()
            return self._token
        finally:
            self._lock.release()

    def refused(self) -> bool:
        """Replace a token that the server has refused. Returns True if there is a new one."""
        with self._lock:
            if self._exchanging:
                return False
            if self._now() - self._got_at >= JUST_NOW:  # else another thread has just got one
                self._renew_at = self._good_until = 0.0
                self._renew()
            return True

    def _renew(self) -> None:
        must = self._now() >= self._good_until
        self._exchanging = True
        try:
            token = self._exchange(must)
        except errors.TinkexError as exc:
            if must:
                raise
            logger.warning("the token could not be renewed; the old one is still good: %s", exc)
            self._renew_at = min(self._now() + MARGIN, self._good_until)
            return
        finally:
            self._exchanging = False
        now = self._now()
        life, age = _life_and_age(token, now)
        self._token, self._got_at = token, now
        self._renew_at = now + max(life / 2 - age, life / 20, 1.0)
        self._good_until = now + life - age - min(MARGIN, life / 4)


def _life_and_age(token: str, now: float) -> tuple[float, float]:
    """Lifetime and age of a JWT, in seconds.

    An hour if it has no times; an age of 0 if its times are impossible by our clock.
    """
    try:
        part = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        issued = float(claims.get("iat", now))
        life = float(claims["exp"]) - issued
    except (IndexError, KeyError, ValueError, TypeError, AttributeError):
        return HOUR, 0.0
    if not 0 < life < math.inf:
        return HOUR, 0.0
    age = now - issued
    return life, age if 0 <= age <= life else 0.0


def install(transport: Transport, features: types.ClientConfig) -> None:
    """Make *transport* send tokens, if the server requires them."""
    if not features.pjwt_auth_enabled:
        return
    settings = transport.config

    def credential() -> str:
        wants_command = features.credential_default_source == "credential_cmd"
        if settings.credential_cmd and (wants_command or not settings.api_key):
            return config.run_credential_cmd(settings.credential_cmd)
        if settings.api_key:
            return settings.api_key
        raise ValueError(
            "the server wants a credential: set TINKER_API_KEY or TINKER_CREDENTIAL_CMD."
        )

    def exchange(patient: bool) -> str:
        retry = None if patient else ONCE
        return transport.call(wire.AUTH_TOKEN, types.AuthTokenRequest(), retry=retry).jwt

    keeper = TokenKeeper(exchange, credential)
    transport.get_key = keeper.get
    transport.refresh_key = keeper.refused
