"""The server's home on disk: which folders it has, who may read them, and which server owns what.

    tinkex.sqlite       sessions, runs, samplers, checkpoints of all servers (see store.py)
    secret              a random key of this home
    checkpoints/        one folder per saved checkpoint
    servers/<name>/     what one running server owns: lock, journal, snapshots, samplers, drafts

A server holds a lock on its folder for as long as it lives. A server on a fixed port is called
after it, and takes over what its dead predecessor of that name left; what dead servers without a
fixed port left is deleted. Knows nothing of what is kept in the folders.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import attrs

#: Servers on a fixed port are called port-<n>, and can be taken over.
_LASTING = "port-"


class HomeError(Exception):
    """The home cannot be used; the message says why and what to do."""


#: What marks a folder as a home: made by `Home.open`, or by versions that wrote no marker.
_MARKER = "tinkex-home"
_MARKERS = (_MARKER, "tinkex.sqlite")
#: What other parts of tinkex may have put into a home before a server opens it.
_NOT_OTHERS = frozenset({"logs", "cache", "checkpoints", "servers", ".DS_Store", "lost+found"})


@attrs.frozen
class Home:
    """A usable home folder. Only its user can read it (0700, files 0600)."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> Home:
        """Make or check the folder.

        A home is a folder that this made, or that is empty and the user's own. The mode of any
        other folder is never changed: others may use it.

        Raises:
            HomeError: If it is not the user's, holds other things, or cannot be written.
        """
        home = cls(path.expanduser().absolute())
        try:
            home.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            home._check_ownership()
            home.path.chmod(0o700)
            (home.path / _MARKER).touch(mode=0o600)
            for folder in (home.checkpoints, home.servers):
                folder.mkdir(exist_ok=True)
            probe = home.path / f".probe-{secrets.token_hex(4)}"
            probe.write_bytes(b"tinkex")
            probe.unlink()
        except OSError as exc:
            raise HomeError(
                f"the home {home.path} cannot be written: {exc.strerror or exc}; free or repair "
                "it, or choose another with --home or TINKEX_HOME."
            ) from exc
        return home

    def _check_ownership(self) -> None:
        """Raises HomeError, before anything is changed."""
        status = self.path.stat()
        if status.st_uid != os.geteuid():
            raise HomeError(
                f"the home {self.path} belongs to user {status.st_uid}, not to you "
                f"({os.geteuid()}); choose a folder of your own with --home or TINKEX_HOME."
            )
        names = {entry.name for entry in self.path.iterdir()}
        if names.isdisjoint(_MARKERS) and names - _NOT_OTHERS:
            some = ", ".join(sorted(names - _NOT_OTHERS)[:3])
            raise HomeError(
                f"the folder {self.path} is not a home of tinkex: it holds other things ({some}); "
                "choose an empty or a new folder with --home or TINKEX_HOME."
            )
        if status.st_mode & (stat.S_ISVTX | stat.S_IWOTH) and not names & set(_MARKERS):
            raise HomeError(
                f"the folder {self.path} is shared (mode {stat.S_IMODE(status.st_mode):04o}); "
                "choose a new folder with --home or TINKEX_HOME."
            )

    @property
    def database(self) -> Path:
        return self.path / "tinkex.sqlite"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def servers(self) -> Path:
        return self.path / "servers"

    def secret(self) -> bytes:
        """A random key that is this home's for ever: owners are named with it."""
        path = self.path / "secret"
        draft = self.path / f".secret-{secrets.token_hex(4)}"
        if not path.exists():
            draft.write_bytes(secrets.token_bytes(32))
            try:
                os.link(draft, path)  # whoever is first wins; a rename would replace
            except FileExistsError:
                pass
            finally:
                draft.unlink()
        return path.read_bytes()

    def claim(self, port: int) -> ServerFolder:
        """The folder of a server on *port* (0: a port that nobody can come back to).

        Raises:
            HomeError: If a living server has it.
        """
        name = f"{_LASTING}{port}" if port else f"free-{os.getpid()}-{secrets.token_hex(4)}"
        folder = ServerFolder.lock(self.servers / name)
        if folder is None:
            raise HomeError(
                f"another server already uses the home {self.path} on port {port}; stop it, or "
                "choose another port or another --home."
            )
        return folder

    def purge_dead(self, forget: Callable[[str], None]) -> list[str]:
        """Delete the folders of dead servers that nobody can take over.

        `forget` is called with each server's name first, while its folder is still locked.
        """
        purged = []
        for path in sorted(self.servers.iterdir()):
            if path.name.startswith(_LASTING):
                continue
            folder = ServerFolder.lock(path)
            if folder is not None:
                forget(path.name)
                folder.remove()
                purged.append(path.name)
        return purged


@attrs.define(eq=False)
class ServerFolder:
    """What one living server owns. `lasting`: a successor on the same port takes it over."""

    path: Path
    _lock: int

    @classmethod
    def lock(cls, path: Path) -> ServerFolder | None:
        """The folder if nobody holds it; None if a living server does."""
        try:
            path.mkdir(exist_ok=True)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise HomeError(f"{path} cannot be used: {exc.strerror or exc}.") from exc
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return None
        folder = cls(path, lock)
        shutil.rmtree(folder.drafts, ignore_errors=True)  # a dead predecessor's half-written files
        for sub in (folder.drafts, folder.snapshots, folder.samplers):
            sub.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def lasting(self) -> bool:
        return self.name.startswith(_LASTING)

    @property
    def journal(self) -> Path:
        return self.path / "journal.sqlite"

    @property
    def snapshots(self) -> Path:
        return self.path / "snapshots"

    @property
    def samplers(self) -> Path:
        return self.path / "samplers"

    @property
    def drafts(self) -> Path:
        return self.path / "drafts"

    def draft(self) -> Path:
        """A new empty folder to write into before it is moved to its place."""
        path = self.drafts / secrets.token_hex(8)
        path.mkdir()
        return path

    def release(self) -> None:
        """Give the folder back: a lasting one stays for the successor, another goes."""
        if self.lasting:
            os.close(self._lock)
        else:
            self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def move_into_place(draft: Path, place: Path) -> None:
    """Sync *draft* to disk and rename it to *place*, so that a power cut leaves all or nothing."""
    sync_tree(draft)
    place.parent.mkdir(parents=True, exist_ok=True)
    os.rename(draft, place)
    for folder in (place.parent, place.parent.parent, draft.parent):
        sync_path(folder)


def sync_tree(folder: Path) -> None:
    for path in folder.iterdir():
        sync_path(path)
    sync_path(folder)


def sync_path(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def tree_hashes(folder: Path) -> dict[str, str]:
    """File name -> `file_hash`, of all files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in files}


def tree_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
