"""The owners of a home's objects: lists them, and gives objects to another owner.

Objects belong to a user name. Those created without a key, or with an unnamed key, belong to names
that a later key may not map to; `adopt` gives them to a user.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import attrs

from tinkex.server import auth
from tinkex.server.home import Home, HomeError
from tinkex.server.store import Store


@attrs.frozen
class Owner:
    """An owner and the amount of stored objects.

    Attributes:
        bytes: of all checkpoints.
    """

    name: str
    sessions: int
    runs: int
    checkpoints: int
    bytes: int


def owners(path: Path) -> list[Owner]:
    """The owners in a home, by name. Servers may be running.

    Raises:
        HomeError: If *path* is not a home or cannot be read.
    """
    store = _open(path)
    try:
        return [Owner(*row) for row in store.owners()]
    finally:
        store.close()


def adopt(path: Path, old: str, new: str) -> int:
    """Give everything of one owner to another: stored objects, and operations to resume.

    Returns:
        How many rows of the database have changed.

    Raises:
        HomeError: If *path* is not a home, a server runs on it, *old* owns nothing, or *new* is not
            a user name.
    """
    if new != auth.LOCAL:
        try:
            auth.check_name(new)
        except ValueError as exc:
            raise HomeError(str(exc)) from exc
    store = _open(path)
    try:
        with all_locked(store.home):
            if old not in {row[0] for row in store.owners()}:
                raise HomeError(f"nothing in the home {store.home.path} belongs to {old!r}.")
            for journal in sorted(store.home.servers.glob("*/journal.sqlite")):
                _adopt_journal(journal, old, new)
            return store.rename_owner(old, new)
    finally:
        store.close()


def revoke(path: Path, *, key_id: str | None = None, key: str | None = None) -> str:
    """Revoke a key by its id, or the key itself; servers notice at once. Returns its id.

    Raises:
        HomeError: If *path* is not a home, or the id is malformed.
    """
    home = Home(path.expanduser().absolute())
    if not home.database.is_file():
        raise HomeError(f"{home.path} is not a home of tinkex: it holds no tinkex.sqlite.")
    if key_id is None:
        key_id = auth.key_id(key or "", home.secret())
    elif not re.fullmatch("[0-9a-f]{12}", key_id):
        raise HomeError(f"{key_id!r} is not the id of a key; an id has 12 hexadecimal digits.")
    auth.Revoked(home.revoked).add(key_id)
    return key_id


def _open(path: Path) -> Store:
    path = path.expanduser().absolute()
    if not (path / "tinkex.sqlite").is_file():
        raise HomeError(f"{path} is not a home of tinkex: it holds no tinkex.sqlite.")
    return Store(Home(path))


@contextlib.contextmanager
def all_locked(home: Home) -> Iterator[None]:
    """Keep the folders of all servers locked. Raises HomeError if a server runs."""
    with contextlib.ExitStack() as locks:
        for path in sorted(home.servers.glob("*/lock")):
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            locks.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                raise HomeError(
                    f"a server uses the home {home.path} ({path.parent.name}); stop it first."
                ) from exc
        yield


def _adopt_journal(path: Path, old: str, new: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as journal, journal:
        journal.execute("UPDATE operations SET owner = ? WHERE owner = ?", (new, old))
        for model_id, text in journal.execute("SELECT model_id, info FROM models").fetchall():
            info = json.loads(text)
            if info.get("owner") == old:
                changed = json.dumps({**info, "owner": new})
                journal.execute(
                    "UPDATE models SET info = ? WHERE model_id = ?", (changed, model_id)
                )
