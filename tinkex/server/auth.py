"""API keys and the owners that they stand for.

Objects are stored under the owner's name: the name given to the user, or one that does not reveal
the key. Keys are stored as digests.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import attrs

from tinkex.server.http_errors import Refusal, not_offered, shown

#: The owner on a server with a single user.
LOCAL = "local"
#: Host names that always mean this machine.
LOOPBACK = ("127.0.0.1", "::1", "localhost")


#: Valid user names. Others could be mistaken for a path, or for an owner named after a key.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_NAMED_KEY = re.compile(rf"({_NAME.pattern})=(.{{8,}})", re.DOTALL)
#: Hexadecimal digits of a key's id.
_ID_LENGTH = 12


def check_name(name: str) -> None:
    """Check the name of a user.

    Raises:
        ValueError: If it has other characters, or is a name that the server assigns.
    """
    if not _NAME.fullmatch(name) or name == LOCAL or name.startswith("key-"):
        raise ValueError(
            f"{shown(name)} is not a valid user name: it must begin with a letter, have up to 64 "
            'letters, digits, "_", "." or "-", not begin with "key-", and not be "local".'
        )


def key_id(key: str, secret: bytes) -> str:
    """An id of the key for logs, from which the key cannot be computed."""
    digest = hmac.new(secret, b"id of " + _encoded(key), "sha256").hexdigest()
    return digest[:_ID_LENGTH]


class Revoked:
    """The ids of revoked keys, in a file that servers and `tinkex home revoke` share."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._ids: frozenset[str] = frozenset()

    def __contains__(self, key: str) -> bool:
        """True if the current file lists the key with the id *key*."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return False
        now = status.st_mtime_ns, status.st_size
        if now != self._seen:
            self._ids = frozenset(self._path.read_text(encoding="ascii").split())
            self._seen = now
        return key in self._ids

    def add(self, key: str) -> None:
        """Revoke the key with the id *key*, and sync the file to disk. Raises OSError."""
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(handle, f"{key}\n".encode("ascii"))
            os.fsync(handle)
        finally:
            os.close(handle)


@attrs.frozen
class _Known:
    owner: str
    key_id: str


class Keys:
    """The keys that a server accepts. Without keys, every client is the owner "local"."""

    def __init__(self, known: Mapping[bytes, _Known], revoked: Revoked | None = None) -> None:
        self._known = dict(known)  # by the digest of the key
        self._revoked = revoked

    @classmethod
    def of_users(cls, keys: Iterable[str], secret: bytes, revoked: Revoked | None = None) -> Keys:
        """Keys of users: "name=key", any number for each name, or a key alone.

        The owner of a key alone is named by the hash of the key with *secret*.

        Raises:
            ValueError: If a name is not valid, or two users have the same key.
        """
        known: dict[bytes, _Known] = {}
        for text in keys:
            match = _NAMED_KEY.fullmatch(text)
            name, key = match.groups() if match else (None, text)
            if name is None:
                owner = "key-" + hmac.new(secret, _encoded(key), "sha256").hexdigest()[:16]
            else:
                check_name(name)
                owner = name
            entry = _Known(owner, key_id(key, secret))
            if known.setdefault(_digest(key), entry) != entry:
                raise ValueError(
                    f"one key is given to two users, {known[_digest(key)].owner} and {owner}; "
                    "each needs its own key."
                )
        return cls(known, revoked)

    @classmethod
    def of_one(cls, key: str | None) -> Keys:
        """One key for the only user of this machine, or no key."""
        return cls({} if key is None else {_digest(key): _Known(LOCAL, "")})

    @property
    def owners(self) -> list[str]:
        """The users, each once."""
        return sorted({known.owner for known in self._known.values()} or {LOCAL})

    def describe(self) -> list[str]:
        """For each user with named keys: the name and the ids of the keys."""
        lines: dict[str, list[str]] = {}
        for known in self._known.values():
            if known.key_id:
                lines.setdefault(known.owner, []).append(known.key_id)
        return [f"{owner}: {', '.join(sorted(ids))}" for owner, ids in sorted(lines.items())]

    @property
    def several_users(self) -> bool:
        """True if users must be separated; paths on this machine are then refused."""
        return any(known.owner != LOCAL for known in self._known.values())

    def check_visitor(self, headers: Mapping[str, str]) -> None:
        """On a server without a key, refuse requests that a web page in a local browser could send.

        Such requests have Origin or Sec-Fetch-Site, or a host name other than loopback (DNS
        rebinding). A page served from another port counts as foreign.

        Raises:
            Refusal: 403.
        """
        if self._known:
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
        if not self._known:
            return LOCAL
        if not key:
            raise Refusal(
                401, "this server requires an API key: set TINKER_API_KEY, or send it as X-API-Key."
            )
        known = self._find(key)
        if known is None:
            raise Refusal(401, "the API key is not valid for this server; check TINKER_API_KEY.")
        if self._revoked is not None and known.key_id in self._revoked:
            raise Refusal(401, "the API key was revoked; ask whoever runs the server for another.")
        return known.owner

    def reader(self, key: str) -> str:
        """The owner that a weights_access_token stands for: the key of whoever may read the
        checkpoint. Raises Refusal (403)."""
        try:
            return self.owner(key)
        except Refusal:
            raise Refusal(
                403,
                "weights_access_token is not a valid key of this server; give the key of a user "
                "who may read the checkpoint.",
            ) from None

    def id_of(self, key: str | None) -> str | None:
        """The id of a key that the server knows, revoked or not."""
        known = self._find(key) if key else None
        return known.key_id if known is not None else None

    def revoke(self, key: str) -> None:
        """Revoke the key, for this server and the other servers of the home.

        Raises:
            Refusal: 404 if the server has a single user, 401 if the key is not valid.
        """
        self.owner(key)
        known = self._find(key)
        if known is None or not known.key_id or self._revoked is None:
            raise not_offered("revoking its only key", "Restart it with another one.")
        self._revoked.add(known.key_id)

    def _find(self, key: str) -> _Known | None:
        given, found = _digest(key), None
        for digest, known in self._known.items():  # compare with all, in constant time
            if hmac.compare_digest(digest, given):
                found = known
        return found

    def __repr__(self) -> str:
        return f"<Keys of {len(self.owners)} users>"


def host_name(url: str) -> str:
    """The host name in a URL; "" if there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(_encoded(key)).digest()


def _encoded(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")
