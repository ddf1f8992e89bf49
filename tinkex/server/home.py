"""The server's home on disk: its folders, their permissions, and which server owns which.

    tinkex.sqlite       sessions, runs, samplers, checkpoints of all servers (see store.py)
    secret              a random key of this home
    checkpoints/        one folder per saved checkpoint
    servers/<name>/     files of one running server: lock, journal, snapshots, samplers, drafts

A server locks its folder while it runs. A server on a fixed port is named after the port, and takes
over the folder of a dead predecessor with that name. Folders of dead servers without a fixed port
are deleted. Does not know what the folders contain.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import attrs

logger = logging.getLogger(__name__)

#: Prefix of servers on a fixed port (port-<n>), whose folders can be taken over.
_LASTING = "port-"


class HomeError(Exception):
    """The home cannot be used. The message gives the reason and the fix."""


#: Files that mark a folder as a home. `Home.open` writes the first; older versions did not.
_MARKER = "tinkex-home"
_MARKERS = (_MARKER, "tinkex.sqlite")
#: Files that other parts of tinkex may create in a home before a server opens it.
_NOT_OTHERS = frozenset(
    {
        "cache",
        "chat_history",
        "checkpoints",
        "engines",
        "logs",
        "models",
        "servers",
        ".DS_Store",
        "lost+found",
    }
)


@attrs.frozen
class FileIdentity:
    """The identity of the file at a path, to detect that it is deleted or replaced.

    A deleted file that is still open can be written without an error, but the data is lost.
    """

    path: Path
    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        status = path.stat()
        return cls(path, status.st_dev, status.st_ino)

    def check(self) -> None:
        """Raise OSError if the path no longer leads to that file."""
        try:
            found = self.path.stat()
        except OSError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != (self.device, self.inode):
            raise OSError(
                errno.ENOENT,
                "the home was deleted or replaced while the server was running; stop the server, "
                "put the home back, and start the server again",
                str(self.path),
            )


@attrs.frozen
class Reserve:
    """A file that only occupies space; it is removed so that a full disk can be cleaned up."""

    path: Path
    size: int = 1 << 20

    def make(self) -> None:
        """Create the file if enough space is free."""
        try:
            room = os.statvfs(self.path.parent)
            if self.path.exists() or room.f_bavail * room.f_frsize < 8 * self.size:
                return
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.posix_fallocate(handle, 0, self.size)
            finally:
                os.close(handle)
        except OSError as exc:
            logger.debug("No space was reserved in %s: %s", self.path.parent, exc)

    def release(self) -> bool:
        """Delete the file. False if there was none."""
        try:
            self.path.unlink()
        except OSError:
            return False
        return True


@attrs.frozen
class Home:
    """A usable home folder. Only its owner can read it (0700, files 0600)."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> Home:
        """Create or check the folder.

        A home is a folder that this method created, or an empty one that belongs to the user. The
        mode of any other folder is never changed, because others may use it.

        Raises:
            HomeError: If it belongs to another user, holds other files, or cannot be written.
        """
        home = cls(path.expanduser().absolute())
        try:
            home.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            home._check_ownership()
            home.path.chmod(0o700)
            (home.path / _MARKER).touch(mode=0o600)
            for folder in (home.checkpoints, home.servers):
                folder.mkdir(exist_ok=True)
            home._probe()
            home.reserve.make()
        except OSError as exc:
            raise HomeError(
                f"the home {home.path} cannot be written: {exc.strerror or exc}; free disk "
                "space or fix its permissions, or choose another with --home or TINKEX_HOME."
            ) from exc
        return home

    def _probe(self) -> None:
        """Check that the folder can be written, if necessary by releasing the reserve.

        Raises:
            OSError: If it cannot be written.
        """
        probe = self.path / f".probe-{secrets.token_hex(4)}"
        try:
            probe.write_bytes(b"tinkex" * 1000)
        except OSError as exc:
            if exc.errno != errno.ENOSPC or not self.reserve.release():
                raise
            logger.warning(
                "The disk of %s is full. Checkpoints can be listed and deleted; nothing can be "
                "saved until there is room.",
                self.path,
            )
            probe.write_bytes(b"tinkex" * 1000)
        finally:
            probe.unlink(missing_ok=True)

    @property
    def reserve(self) -> Reserve:
        return Reserve(self.path / "reserve")

    def _check_ownership(self) -> None:
        """Check owner and content before anything is changed. Raises HomeError."""
        status = self.path.stat()
        if status.st_uid != os.geteuid():
            raise HomeError(
                f"the home {self.path} belongs to user {status.st_uid}, not to you "
                f"({os.geteuid()}); choose a folder that you own with --home or TINKEX_HOME."
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

    def audit_log(self, port: int) -> Path:
        """The audit log of a server on *port*."""
        return self.path / "audit" / f"port-{port}.jsonl"

    @property
    def revoked(self) -> Path:
        """The ids of revoked keys, one a line."""
        return self.path / "revoked-keys"

    def secret(self) -> bytes:
        """The random key of this home, created once. Owner names are derived from it."""
        path = self.path / "secret"
        draft = self.path / f".secret-{secrets.token_hex(4)}"
        if not path.exists():
            draft.write_bytes(secrets.token_bytes(32))
            try:
                os.link(draft, path)  # the first server wins; a rename would replace its secret
            except FileExistsError:
                pass
            finally:
                draft.unlink()
        return path.read_bytes()

    def claim(self, port: int) -> ServerFolder:
        """Lock the folder of a server on *port*; 0 is a random port, whose folder is temporary.

        Raises:
            HomeError: If a running server uses it.
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
        """Delete the folders of dead servers that cannot be taken over; return their names.

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
    """The folder of one running server. If `lasting`, its successor on the same port reuses it."""

    path: Path
    _lock: int

    @classmethod
    def lock(cls, path: Path) -> ServerFolder | None:
        """Lock the folder; None if a running server holds the lock. Raises HomeError."""
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
        shutil.rmtree(folder.drafts, ignore_errors=True)  # incomplete files of a dead predecessor
        shutil.rmtree(folder.spool, ignore_errors=True)
        for sub in (folder.drafts, folder.spool, folder.snapshots, folder.samplers):
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

    @property
    def spool(self) -> Path:
        return self.path / "spool"

    def draft(self) -> Path:
        """Create an empty folder for files that are moved into place when complete."""
        path = self.drafts / secrets.token_hex(8)
        path.mkdir()
        return path

    def release(self) -> None:
        """Unlock the folder. It is deleted unless it is lasting."""
        if self.lasting:
            os.close(self._lock)
        else:
            self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def move_into_place(draft: Path, place: Path) -> None:
    """Sync *draft* to disk and rename it to *place*: atomic even across a power failure."""
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
