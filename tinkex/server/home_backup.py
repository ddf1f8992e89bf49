"""Backs up a home while servers run, and restores a home from a backup.

A backup is a tar file of the database and of everything that it lists: checkpoints, metrics of
runs, the secret from which owner names are derived, revoked keys. Live models are not included, but
their checkpoints are.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sqlite3
import tarfile
import tempfile
from pathlib import Path

import attrs

from tinkex.server.home import Home, HomeError, sync_path
from tinkex.server.home_check import check_home
from tinkex.server.store import Store

#: The manifest in a backup: its version and content.
_MANIFEST = "tinkex-backup.json"
_VERSION = 1
#: Files that are copied unchanged, if they exist.
_FILES = ("secret", "revoked-keys", "metrics")


@attrs.frozen
class Backup:
    """The content of a backup.

    Attributes:
        bytes: of the checkpoints.
    """

    path: Path
    checkpoints: int
    bytes: int


def backup(home: Path, out: Path) -> Backup:
    """Write a backup of a home to the new file *out*. Servers may be running.

    It is a consistent snapshot: a checkpoint saved later is not included, and one that is deleted
    while it is copied is omitted completely.

    Raises:
        HomeError: If *home* is not a home, *out* exists, or a file cannot be read or written.
    """
    home = home.expanduser().absolute()
    if not (home / "tinkex.sqlite").is_file():
        raise HomeError(f"{home} is not a home of tinkex: it holds no tinkex.sqlite.")
    if out.exists():
        raise HomeError(f"{out} exists already; give the name of a new file.")
    draft = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            index = Path(folder) / "tinkex.sqlite"
            _copy_database(home / "tinkex.sqlite", index)
            handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
                made = _write(home, index, tar, Path(folder))
        sync_path(draft)
        draft.rename(out)
    except OSError as exc:
        raise HomeError(f"the backup {out} cannot be written: {exc}.") from exc
    finally:
        draft.unlink(missing_ok=True)
    return attrs.evolve(made, path=out)


def _copy_database(source: Path, copy: Path) -> None:
    with (
        contextlib.closing(sqlite3.connect(source)) as here,
        contextlib.closing(sqlite3.connect(copy)) as there,
    ):
        here.backup(there)


def _write(home: Path, index: Path, tar: tarfile.TarFile, folder: Path) -> Backup:
    count = size = 0
    with (
        contextlib.closing(sqlite3.connect(home / "tinkex.sqlite")) as live,
        contextlib.closing(sqlite3.connect(index)) as database,
        database,
    ):
        rows = database.execute("SELECT path, directory, size_bytes FROM checkpoints").fetchall()
        for path, directory, stored in rows:
            place = Path(directory)
            try:
                # Copied first: a checkpoint deleted meanwhile must not be in the tar in part.
                shutil.copytree(place, folder / "copy")
            except (OSError, shutil.Error):
                if _is_listed(live, path, directory):
                    raise
            if _is_listed(live, path, directory):
                tar.add(folder / "copy", place.relative_to(home).as_posix())
                count, size = count + 1, size + stored
            else:
                database.execute("DELETE FROM checkpoints WHERE path = ?", (path,))
            shutil.rmtree(folder / "copy", ignore_errors=True)
        database.execute(
            "UPDATE sessions SET status = 'failed', detail = 'restored from a backup' "
            "WHERE status = 'active'"
        )
        database.execute("DELETE FROM samplers")
        database.commit()
    tar.add(index, "tinkex.sqlite")
    for name in _FILES:
        if (home / name).exists():
            tar.add(home / name, name)
    manifest = folder / _MANIFEST
    manifest.write_text(json.dumps({"version": _VERSION, "home": str(home)}), encoding="utf-8")
    tar.add(manifest, _MANIFEST)
    return Backup(home, count, size)


def _is_listed(live: sqlite3.Connection, path: str, directory: str) -> bool:
    """True if the files of a checkpoint are complete: they are deleted after its row."""
    query = "SELECT 1 FROM checkpoints WHERE path = ? AND directory = ?"
    return live.execute(query, (path, directory)).fetchone() is not None


def restore(path: Path, home: Path) -> int:
    """Restore a backup to an empty or new folder. Returns the number of checkpoints.

    Raises:
        HomeError: If *path* is not a backup, the folder is not empty, or a checkpoint is damaged.
    """
    home = home.expanduser().absolute()
    if home.exists() and any(home.iterdir()):
        raise HomeError(f"{home} is not empty; restore into a new folder.")
    draft = home.with_name(f".{home.name}.{secrets.token_hex(4)}")
    try:
        draft.mkdir(mode=0o700, parents=True)
        with tarfile.open(path) as tar:
            tar.extractall(draft, filter="data")
        manifest = json.loads((draft / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["version"] != _VERSION:
            raise ValueError(f"it is of version {manifest['version']}")
        (draft / _MANIFEST).unlink()
        _move_directories(draft / "tinkex.sqlite", Path(manifest["home"]), home)
        if home.exists():
            home.rmdir()
        draft.rename(home)
    except (OSError, ValueError, KeyError, TypeError, tarfile.TarError, sqlite3.Error) as exc:
        raise HomeError(f"{path} cannot be restored to {home}: {exc}.") from exc
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    Home.open(home)
    found = check_home(home)
    damaged = [one.path for one in found if one.status == "damaged"]
    if damaged:
        raise HomeError(
            f"{len(damaged)} checkpoints of the backup are damaged, {damaged[0]} among them; "
            "`tinkex home check` names them all. The others can be used."
        )
    return len(found)


def _move_directories(index: Path, old: Path, new: Path) -> None:
    """Update the paths in the database to where the files are now."""
    with contextlib.closing(sqlite3.connect(index)) as database, database:
        for path, directory in database.execute("SELECT path, directory FROM checkpoints"):
            place = new / Path(directory).relative_to(old)
            database.execute(
                "UPDATE checkpoints SET directory = ? WHERE path = ?", (str(place), path)
            )


def collect_garbage(home: Path) -> int:
    """Delete expired checkpoints, and files of dead servers. Servers may be running.

    Returns:
        How many checkpoints and folders were deleted.

    Raises:
        HomeError: If *home* is not a home.
    """
    home = home.expanduser().absolute()
    if not (home / "tinkex.sqlite").is_file():
        raise HomeError(f"{home} is not a home of tinkex: it holds no tinkex.sqlite.")
    store = Store(Home(home))
    try:
        gone = len(Home(home).purge_dead(store.bury_server))
        return (
            gone + len(store.checkpoints.delete_expired()) + len(store.checkpoints.delete_orphans())
        )
    finally:
        store.close()
