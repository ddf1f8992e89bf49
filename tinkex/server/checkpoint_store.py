"""Checkpoints on disk: saving, finding, copying, publishing, expiring and deleting them.

A checkpoint exists if and only if its row exists. The row is added after the files are complete and
synced, and removed before they are deleted. Does not know what the files contain.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs

from tinkex import types
from tinkex.server.database import CheckpointRow, Database, RunRow
from tinkex.server.home import Home, file_hash, move_into_place, tree_bytes, tree_hashes
from tinkex.server.http_errors import Refusal, not_found, shown
from tinkex.server.limits import MIB

logger = logging.getLogger(__name__)

#: A checkpoint folder without a row and older than this was left by a server that died.
_ORPHAN_SECONDS = 3600.0


class Checkpoints:
    """The checkpoints of a home. Safe to share between threads.

    Args:
        user_bytes: limit of all checkpoints and sampler weights of one user; None is no limit.
    """

    def __init__(
        self,
        home: Home,
        database: Database,
        now: Callable[[], float] = time.time,
        user_bytes: int | None = None,
    ) -> None:
        self._user_bytes = user_bytes
        self._home = home
        self._db = database
        self._now = now

    def add(self, draft: Path, row: CheckpointRow) -> CheckpointRow:
        """Move the complete files in *draft* to their place and add the row.

        `directory`, `size_bytes` and `file_hashes` of *row* are filled in. A checkpoint of that
        path is replaced as a whole.
        """
        old = self._db.one(CheckpointRow, "SELECT * FROM checkpoints WHERE path = ?", row.path)
        size = tree_bytes(draft)
        self.check_room(row.owner, size, 0 if old is None else old.size_bytes)
        row = attrs.evolve(
            row,
            size_bytes=size,
            directory=str(self._place(row)),
            file_hashes=tree_hashes(draft),
        )
        move_into_place(draft, Path(row.directory))
        try:
            self._db.replace("checkpoints", row)
        except BaseException:
            shutil.rmtree(row.directory, ignore_errors=True)
            raise
        if old is not None:
            shutil.rmtree(old.directory, ignore_errors=True)
        return row

    def check_room(self, owner: str, size: int, replaces: int = 0) -> None:
        """Check that a user may store *size* more bytes after deleting *replaces* bytes.

        Raises:
            Refusal: 400 with the current usage and the limit.
        """
        if self._user_bytes is None:
            return
        used = self.used_by(owner) - replaces
        if used + size > self._user_bytes:
            raise Refusal(
                400,
                f"you have {used / MIB:,.1f} MiB stored here; {size / MIB:,.1f} MiB more would be "
                f"over the {self._user_bytes / MIB:,.1f} MiB that this server allows a user. "
                "Delete checkpoints that you do not need, or finish sessions with samplers.",
            )

    def used_by(self, owner: str) -> int:
        """Bytes of a user's checkpoints, and of weights that only the user's samplers have."""
        [(checkpoints,)] = self._db.select(
            "SELECT COALESCE(SUM(size_bytes), 0) FROM checkpoints WHERE owner = ?", owner
        )
        snapshots = self._db.select(
            "SELECT directory FROM samplers WHERE owner = ? AND model_path IS NULL "
            "AND directory IS NOT NULL",
            owner,
        )
        return int(checkpoints) + sum(tree_bytes(Path(row[0])) for row in snapshots)

    def verify(self, directory: Path) -> None:
        """Compare a checkpoint's files with the hashes made at saving.

        Args:
            directory: the checkpoint's folder. Folders that are not checkpoints, and checkpoints of
                versions that saved no hashes, are not checked.

        Raises:
            Refusal: 400, naming the file, if one is missing or has changed.
        """
        row = self._db.one(
            CheckpointRow, "SELECT * FROM checkpoints WHERE directory = ?", str(directory)
        )
        damage = None if row is None else damage_of(row)
        if row is not None and damage is not None:
            logger.error("Checkpoint %s in %s is damaged: %s.", row.path, directory, damage)
            raise Refusal(
                400,
                f"checkpoint {shown(row.path, 300)} is damaged: {damage}. Restore the file from "
                "a backup, or delete the checkpoint and use another one.",
            )

    def all_rows(self) -> list[CheckpointRow]:
        """Every checkpoint, of all owners."""
        return self._db.all(CheckpointRow, "SELECT * FROM checkpoints ORDER BY path")

    def _place(self, row: CheckpointRow) -> Path:
        """A readable folder name that no other checkpoint uses."""
        place = self._home.checkpoints / row.run_id.replace(":", "_") / row.checkpoint_id
        free, n = place, 1
        while free.exists():
            n += 1
            free = place.with_name(f"{place.name}~{n}")  # names of checkpoints contain no "~"
        return free

    def find(
        self, path: str, owner: str, *, own: bool = False, reader: str | None = None
    ) -> CheckpointRow:
        """A checkpoint that *owner* (or *reader*) may read, or, if *own*, may change.

        Raises:
            Refusal: 400 if the path is not valid, 404 if the owner has no such checkpoint.
        """
        check_path(path)
        row = self._db.one(
            CheckpointRow,
            "SELECT * FROM checkpoints WHERE path = ? AND (owner IN (?, ?) OR public AND NOT ?) "
            "AND (expires_at IS NULL OR expires_at > ?)",
            path,
            owner,
            owner if reader is None else reader,
            own,
            self._now(),
        )
        if row is None:
            raise Refusal(
                404,
                f"there is no checkpoint {shown(path, 300)}: it was never saved, has expired, was "
                "deleted, or belongs to another user.",
            )
        return row

    def find_model(self, path: str, owner: str, reader: str | None = None) -> CheckpointRow:
        """A checkpoint that *owner* (or *reader*) may read, to make a model or a sampler from.

        Raises:
            Refusal: As `find`; 400 for external weights, which may be encrypted.
        """
        row = self.find(path, owner, reader=reader)
        if row.kind == "external":
            raise Refusal(
                400,
                f"{shown(path, 300)} are external weights, which are only there to be fetched; "
                "use a checkpoint of save_state or save_weights_for_sampler.",
            )
        return row

    def named(self, path: str) -> CheckpointRow | None:
        """The checkpoint with that path, of any owner, unless it has expired."""
        return self._db.one(
            CheckpointRow,
            "SELECT * FROM checkpoints WHERE path = ? AND (expires_at IS NULL OR expires_at > ?)",
            path,
            self._now(),
        )

    def of_run(self, run_id: str, owner: str) -> list[CheckpointRow]:
        """Checkpoints of a run, oldest first; of another owner's run, only published ones.

        Raises:
            Refusal: 404 if there is no such run, or the owner may not see it.
        """
        rows = self._db.all(
            CheckpointRow,
            "SELECT * FROM checkpoints WHERE run_id = ? AND (owner = ? OR public) "
            "AND (expires_at IS NULL OR expires_at > ?) ORDER BY created_at, path",
            run_id,
            owner,
            self._now(),
        )
        if not rows:
            found = self._db.select(
                "SELECT 1 FROM runs WHERE run_id = ? AND owner = ?", run_id, owner
            )
            if not found:
                raise not_found("training run", run_id)
        return rows

    def of_owner(self, owner: str, limit: int, offset: int) -> tuple[list[CheckpointRow], int]:
        """A page of the owner's checkpoints, newest first, and the total number."""
        where = "owner = ? AND (expires_at IS NULL OR expires_at > ?)"
        rows = self._db.all(
            CheckpointRow,
            f"SELECT * FROM checkpoints WHERE {where} ORDER BY created_at DESC, path "
            "LIMIT ? OFFSET ?",
            owner,
            self._now(),
            limit,
            offset,
        )
        total = self._db.count(
            f"SELECT COUNT(*) FROM checkpoints WHERE {where}", owner, self._now()
        )
        return rows, total

    def copy(
        self,
        source: str,
        owner: str,
        run_id: str,
        session_id: str,
        ttl_seconds: int | None,
        reader: str | None = None,
    ) -> str:
        """Copy a checkpoint that *owner* (or *reader*) may read into the run *run_id*.

        Returns the path of the copy. A repeat does not create a second copy.

        Raises:
            Refusal: 400, 404.
        """
        row = self.find(source, owner, reader=reader)
        self.verify(Path(row.directory))
        path, now = f"tinker://{run_id}/{row.checkpoint_id}", self._now()
        there = self.named(path)
        if there is not None and there.origin == f"copy:{source}":
            return path
        draft = self._home.checkpoints / f".copy-{secrets.token_hex(8)}"
        shutil.copytree(row.directory, draft)
        try:
            self._db.insert(
                "runs",
                RunRow(
                    run_id,
                    session_id,
                    owner,
                    row.base_model,
                    row.rank,
                    row.train_mlp,
                    row.train_attn,
                    row.train_unembed,
                    None,
                    now,
                    now,
                ),
                "ON CONFLICT DO NOTHING",
            )
            copied = attrs.evolve(
                row,
                path=path,
                run_id=run_id,
                owner=owner,
                created_at=now,
                expires_at=None if ttl_seconds is None else now + ttl_seconds,
                public=False,
                origin=f"copy:{source}",
            )
            self.add(draft, copied)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return path

    def delete(self, path: str, owner: str) -> None:
        """Raises Refusal (404)."""
        row = self.find(path, owner, own=True)
        try:
            self._db.change("DELETE FROM checkpoints WHERE path = ?", path)
        except sqlite3.Error as exc:
            # On a full disk, deleting a row needs space, too; the reserve is kept for that.
            if "full" not in str(exc) or not self._home.reserve.release():
                raise
            self._db.change("DELETE FROM checkpoints WHERE path = ?", path)
        shutil.rmtree(row.directory, ignore_errors=True)
        self._home.reserve.make()

    def publish(self, path: str, owner: str, public: bool) -> None:
        """Raises Refusal (404)."""
        self.find(path, owner, own=True)
        self._db.change("UPDATE checkpoints SET public = ? WHERE path = ?", public, path)

    def set_ttl(self, path: str, owner: str, ttl_seconds: int | None) -> None:
        """Let a checkpoint expire *ttl_seconds* from now, or never (None). Raises Refusal (404)."""
        self.find(path, owner, own=True)
        expires_at = None if ttl_seconds is None else self._now() + ttl_seconds
        self._db.change("UPDATE checkpoints SET expires_at = ? WHERE path = ?", expires_at, path)

    def set_sha256(self, path: str, directory: str, sha256: str) -> None:
        """Store the hash of a checkpoint's archive."""
        self._db.change(
            "UPDATE checkpoints SET sha256 = ? WHERE path = ? AND directory = ?",
            sha256,
            path,
            directory,
        )

    def delete_expired(self) -> Sequence[str]:
        """Delete expired checkpoints; returns their paths."""
        rows = self._db.all(
            CheckpointRow, "SELECT * FROM checkpoints WHERE expires_at <= ?", self._now()
        )
        for row in rows:
            gone = self._db.change(
                "DELETE FROM checkpoints WHERE path = ? AND expires_at <= ?", row.path, self._now()
            )
            if gone:
                shutil.rmtree(row.directory, ignore_errors=True)
        return [row.path for row in rows]

    def delete_orphans(self) -> Sequence[Path]:
        """Delete checkpoint folders without a row, left by a killed server.

        It died between moving the files and adding the row, or while deleting.
        """
        known = {row[0] for row in self._db.select("SELECT directory FROM checkpoints")}
        drafts = self._home.checkpoints.glob(".copy-*")
        orphans = [
            path
            for path in [*self._home.checkpoints.glob("*/*/*"), *drafts]
            if str(path) not in known and path.stat().st_mtime < self._now() - _ORPHAN_SECONDS
        ]
        for path in orphans:
            shutil.rmtree(path, ignore_errors=True)
        return orphans

    def last_of_run(self, run_id: str, kind: str) -> types.Checkpoint | None:
        row = self._db.one(
            CheckpointRow,
            "SELECT * FROM checkpoints WHERE run_id = ? AND kind = ? "
            "AND (expires_at IS NULL OR expires_at > ?) ORDER BY created_at DESC LIMIT 1",
            run_id,
            kind,
            self._now(),
        )
        return None if row is None else row.public_form()

    def session_totals(self, session_id: str) -> tuple[int, int]:
        """How many checkpoints a session's runs have, and their bytes."""
        [(count, size)] = self._db.select(
            "SELECT COUNT(*), COALESCE(SUM(size_bytes), 0) FROM checkpoints "
            "WHERE run_id IN (SELECT run_id FROM runs WHERE session_id = ?)",
            session_id,
        )
        return count, size

    def counts(self, owner: str) -> dict[str, int]:
        """The number of checkpoints of each of an owner's runs; runs without any are omitted."""
        rows = self._db.select(
            "SELECT run_id, COUNT(*) FROM checkpoints WHERE owner = ? GROUP BY run_id", owner
        )
        return dict(rows)


def damage_of(row: CheckpointRow) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    if row.file_hashes is None:
        return None
    for name, expected in row.file_hashes.items():
        try:
            found = file_hash(Path(row.directory) / name)
        except OSError as exc:
            return f"{name} cannot be read ({exc.strerror or exc})"
        if found != expected:
            return f"{name} has SHA-256 {found[:16]}..., but {expected[:16]}... was saved"
    return None


def check_path(path: str) -> None:
    """Check that a path has the form tinker://<run>/<weights or sampler_weights>/<name>.

    Raises:
        Refusal: 400.
    """
    try:
        parsed = types.ParsedCheckpointTinkerPath.from_tinker_path(path)
    except ValueError as exc:
        raise Refusal(400, str(exc)) from exc
    if "/" not in parsed.checkpoint_id:
        raise Refusal(
            400,
            f"Invalid checkpoint path: {shown(path, 200)} (expected tinker://<training run>/"
            "<weights or sampler_weights>/<name>).",
        )
