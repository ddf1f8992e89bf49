"""API keys and the owners that they stand for.

Objects are stored under the owner's name, which does not reveal the key. Keys are kept as digests.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from tinkex.server.http_errors import Refusal, shown

#: The owner on a server with a single user.
LOCAL = "local"
#: Host names that always mean this machine.
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Keys:
    """The keys that a server accepts. Without keys, every client is the owner "local"."""

    def __init__(self, owners: dict[bytes, str]) -> None:
        self._owners = owners  # digest of the key -> owner

    @classmethod
    def of_users(cls, keys: Iterable[str], secret: bytes) -> Keys:
        """One owner per key. Owner names are hashes of the keys with *secret*."""
        return cls(
            {
                _digest(key): "key-" + hmac.new(secret, key.encode(), "sha256").hexdigest()[:16]
                for key in keys
            }
        )

    @classmethod
    def of_one(cls, key: str | None) -> Keys:
        """One key for the only user of this machine, or no key."""
        return cls({} if key is None else {_digest(key): LOCAL})

    @property
    def several_users(self) -> bool:
        """True if users must be kept apart; paths on this machine are then refused."""
        return any(owner != LOCAL for owner in self._owners.values())

    def check_visitor(self, headers: Mapping[str, str]) -> None:
        """On a server without a key, refuse what a web page in a browser here could have sent.

        Origin or Sec-Fetch-Site shows such a request, and so does a host name that was made to
        lead to this machine. A page of another port is another's page.

        Raises:
            Refusal: 403.
        """
        if self._owners:
            return
        host, origin = headers.get("host", ""), headers.get("origin")
        foreign = None
        if host_name(f"//{host}") not in LOOPBACK:
            foreign = f"Host {shown(host)}"
        elif origin is not None and origin.partition("://")[2].lower() != host.lower():
            foreign = f"Origin {shown(origin)}"
        elif headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            foreign = f"Sec-Fetch-Site {shown(headers['sec-fetch-site'])}"
        if foreign is not None:
            raise Refusal(
                403,
                f"this server needs no key, so it serves programs on this machine only, not web "
                f"pages or other hosts (the request has {foreign}); use 127.0.0.1 or localhost, "
                "or start the server with --api-key.",
            )

    def owner(self, key: str | None) -> str:
        """The owner that a key stands for. Raises Refusal (401)."""
        if not self._owners:
            return LOCAL
        if not key:
            raise Refusal(
                401, "this server requires an API key: set TINKER_API_KEY, or send it as X-API-Key."
            )
        given, found = _digest(key), None
        for digest, owner in self._owners.items():  # compare with all, in constant time
            if hmac.compare_digest(digest, given):
                found = owner
        if found is None:
            raise Refusal(401, "the API key is not valid for this server; check TINKER_API_KEY.")
        return found

    def __repr__(self) -> str:
        return f"<Keys of {len(self._owners)} users>"


def host_name(url: str) -> str:
    """The host name in a URL; "" if there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
