"""What outlives the process: sessions, runs, samplers and checkpoints, in SQLite and in folders.

Several servers share one store (SQLite in WAL mode); all see all checkpoints. Every lookup says
for whom: another owner's things read like things that do not exist, but for published checkpoints.
A checkpoint appears when its row does, after its files are complete and on disk; it is gone when
its row is. Knows nothing of what is in the files, nor of HTTP.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import attrs

from tinkex import types
from tinkex.server.home import Home, HomeError, move_into_place, tree_bytes
from tinkex.server.http_errors import Refusal, not_found, shown

_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    session_id TEXT PRIMARY KEY, owner TEXT NOT NULL, server TEXT NOT NULL,
    created_at REAL NOT NULL, status TEXT NOT NULL, detail TEXT, user_metadata TEXT NOT NULL,
    tags TEXT NOT NULL, display_name TEXT, project_id TEXT);
CREATE TABLE IF NOT EXISTS runs (
    run_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, owner TEXT NOT NULL,
    base_model TEXT NOT NULL, rank INTEGER NOT NULL, train_mlp INTEGER NOT NULL,
    train_attn INTEGER NOT NULL, train_unembed INTEGER NOT NULL, user_metadata TEXT,
    created_at REAL NOT NULL, last_request_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS samplers (
    sampler_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, owner TEXT NOT NULL,
    server TEXT NOT NULL, base_model TEXT NOT NULL, model_path TEXT, directory TEXT,
    origin TEXT NOT NULL, clones INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS checkpoints (
    path TEXT PRIMARY KEY, run_id TEXT NOT NULL, checkpoint_id TEXT NOT NULL, kind TEXT NOT NULL,
    owner TEXT NOT NULL, base_model TEXT NOT NULL, rank INTEGER NOT NULL,
    train_mlp INTEGER NOT NULL, train_attn INTEGER NOT NULL, train_unembed INTEGER NOT NULL,
    directory TEXT NOT NULL, size_bytes INTEGER NOT NULL, created_at REAL NOT NULL,
    expires_at REAL, public INTEGER NOT NULL DEFAULT 0, user_metadata TEXT, origin TEXT NOT NULL,
    sha256 TEXT);
CREATE INDEX IF NOT EXISTS sessions_by_owner ON sessions (owner, created_at);
CREATE INDEX IF NOT EXISTS runs_by_owner ON runs (owner, last_request_at);
CREATE INDEX IF NOT EXISTS runs_by_session ON runs (session_id);
CREATE INDEX IF NOT EXISTS samplers_by_session ON samplers (session_id);
CREATE INDEX IF NOT EXISTS checkpoints_by_run ON checkpoints (run_id);
CREATE INDEX IF NOT EXISTS checkpoints_by_owner ON checkpoints (owner, created_at);
CREATE INDEX IF NOT EXISTS checkpoints_by_expiry ON checkpoints (expires_at);
"""

#: Seconds to wait for another server that is writing.
_BUSY_SECONDS = 10.0
#: A checkpoint folder without a row that is older than this was left by a server that died.
_ORPHAN_SECONDS = 3600.0


@attrs.frozen
class SessionRow:
    session_id: str
    owner: str
    server: str
    created_at: float
    status: str = "active"
    detail: str | None = None
    user_metadata: dict[str, Any] = attrs.field(factory=dict)
    tags: list[str] = attrs.field(factory=list)
    display_name: str | None = None
    project_id: str | None = None


@attrs.frozen
class RunRow:
    run_id: str
    session_id: str
    owner: str
    base_model: str
    rank: int
    train_mlp: bool
    train_attn: bool
    train_unembed: bool
    user_metadata: dict[str, Any] | None
    created_at: float
    last_request_at: float


@attrs.frozen
class SamplerRow:
    """directory: of the checkpoint model_path, or, without one, of a snapshot that belongs to the
    sampler alone; origin: what made it."""

    sampler_id: str
    session_id: str
    owner: str
    server: str
    base_model: str
    model_path: str | None
    directory: str | None
    origin: str
    clones: int = 0


@attrs.frozen
class CheckpointRow:
    """origin: the operation that made it, by which a repeat of that operation is known."""

    path: str
    run_id: str
    checkpoint_id: str
    kind: str
    owner: str
    base_model: str
    rank: int
    train_mlp: bool
    train_attn: bool
    train_unembed: bool
    directory: str
    size_bytes: int
    created_at: float
    expires_at: float | None
    public: bool
    user_metadata: dict[str, Any] | None
    origin: str
    sha256: str | None = None

    def public_form(self) -> types.Checkpoint:
        return types.Checkpoint(
            checkpoint_id=self.checkpoint_id,
            checkpoint_type=self.kind,  # type: ignore[arg-type]
            tinker_path=self.path,
            time=iso(self.created_at),
            size_bytes=self.size_bytes,
            public=self.public,
            expires_at=None if self.expires_at is None else iso(self.expires_at),
            user_metadata=self.user_metadata,
        )


_JSON_COLUMNS = {"user_metadata", "tags"}
_BOOL_COLUMNS = {"train_mlp", "train_attn", "train_unembed", "public"}


def iso(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")


def _values(row: Any) -> dict[str, Any]:
    return {
        name: json.dumps(value) if name in _JSON_COLUMNS and value is not None else value
        for name, value in attrs.asdict(row, recurse=False).items()
    }


def _row(cls: Any, found: sqlite3.Row) -> Any:
    values = dict(found)
    for name, value in values.items():
        if value is not None and name in _JSON_COLUMNS:
            values[name] = json.loads(value)
        elif name in _BOOL_COLUMNS:
            values[name] = bool(value)
    return cls(**values)


class Store:
    """One connection to the home's database. Safe to share between threads."""

    def __init__(self, home: Home, now: Callable[[], float] = time.time) -> None:
        self.home = home
        self._now = now
        self._lock = threading.RLock()  # guards the connection: one transaction at a time
        try:
            self._db = sqlite3.connect(
                home.database, timeout=_BUSY_SECONDS, check_same_thread=False, isolation_level=None
            )
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as exc:
            raise HomeError(
                f"the database {home.database} cannot be used: {exc}; repair or move it away, or "
                "choose another --home."
            ) from exc

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _insert(self, table: str, row: Any, on_conflict: str = "") -> None:
        values = _values(row)
        names, marks = ", ".join(values), ", ".join("?" * len(values))
        with self._transaction() as db:
            db.execute(
                f"INSERT INTO {table} ({names}) VALUES ({marks}) {on_conflict}",
                list(values.values()),
            )

    def _all(self, cls: Any, sql: str, *values: Any) -> list[Any]:
        with self._lock:
            return [_row(cls, found) for found in self._db.execute(sql, values).fetchall()]

    def _one(self, cls: Any, sql: str, *values: Any) -> Any | None:
        rows = self._all(cls, sql, *values)
        return rows[0] if rows else None

    def _count(self, sql: str, *values: Any) -> int:
        with self._lock:
            count: int = self._db.execute(sql, values).fetchone()[0]
            return count

    def _change(self, sql: str, *values: Any) -> int:
        """How many rows it changed."""
        with self._transaction() as db:
            return db.execute(sql, values).rowcount

    # Sessions.

    def add_session(self, row: SessionRow) -> None:
        self._insert("sessions", row)

    def end_session(self, session_id: str, status: str, detail: str | None) -> None:
        """The first end counts."""
        self._change(
            "UPDATE sessions SET status = ?, detail = ? WHERE session_id = ? AND status = 'active'",
            status,
            detail,
            session_id,
        )

    def live_sessions(self, server: str) -> list[SessionRow]:
        return self._all(
            SessionRow, "SELECT * FROM sessions WHERE server = ? AND status = 'active'", server
        )

    def session(self, session_id: str, owner: str) -> SessionRow:
        """Raises Refusal (404)."""
        row = self._one(
            SessionRow,
            "SELECT * FROM sessions WHERE session_id = ? AND owner = ?",
            session_id,
            owner,
        )
        if row is None:
            raise not_found("session", session_id)
        return row

    def sessions(self, owner: str, limit: int, offset: int) -> tuple[list[SessionRow], int]:
        """Newest first, and how many there are in all."""
        rows = self._all(
            SessionRow,
            "SELECT * FROM sessions WHERE owner = ? ORDER BY created_at DESC, session_id DESC "
            "LIMIT ? OFFSET ?",
            owner,
            limit,
            offset,
        )
        return rows, self._count("SELECT COUNT(*) FROM sessions WHERE owner = ?", owner)

    def sessions_before(self, owner: str, created_at: float, session_id: str) -> list[SessionRow]:
        """Newest first, those that come after the given place in that order."""
        return self._all(
            SessionRow,
            "SELECT * FROM sessions WHERE owner = ? AND (created_at, session_id) < (?, ?) "
            "ORDER BY created_at DESC, session_id DESC",
            owner,
            created_at,
            session_id,
        )

    def set_project(self, session_id: str, owner: str, project_id: str | None) -> None:
        self.session(session_id, owner)
        self._change(
            "UPDATE sessions SET project_id = ? WHERE session_id = ?", project_id, session_id
        )

    def session_members(self, session_id: str) -> tuple[list[str], list[str]]:
        """The ids of its runs and of its samplers."""
        with self._lock:
            runs = self._db.execute(
                "SELECT run_id FROM runs WHERE session_id = ? ORDER BY created_at", (session_id,)
            ).fetchall()
            samplers = self._db.execute(
                "SELECT sampler_id FROM samplers WHERE session_id = ? ORDER BY rowid", (session_id,)
            ).fetchall()
        return [row[0] for row in runs], [row[0] for row in samplers]

    def checkpoint_totals(self, session_id: str) -> tuple[int, int]:
        """How many checkpoints a session's runs have, and their bytes."""
        with self._lock:
            count, size = self._db.execute(
                "SELECT COUNT(*), COALESCE(SUM(size_bytes), 0) FROM checkpoints "
                "WHERE run_id IN (SELECT run_id FROM runs WHERE session_id = ?)",
                (session_id,),
            ).fetchone()
        return count, size

    def bury_server(self, server: str) -> None:
        """A server is dead and nobody takes over: its sessions end, its samplers go."""
        with self._transaction() as db:
            db.execute(
                "UPDATE sessions SET status = 'failed', detail = 'the server ended' "
                "WHERE server = ? AND status = 'active'",
                (server,),
            )
            db.execute("DELETE FROM samplers WHERE server = ?", (server,))

    # Runs.

    def add_run(self, row: RunRow) -> None:
        """A repeat changes nothing."""
        self._insert("runs", row, "ON CONFLICT DO NOTHING")

    def touch_runs(self, last_request_at: Mapping[str, float]) -> None:
        with self._transaction() as db:
            db.executemany(
                "UPDATE runs SET last_request_at = ? WHERE run_id = ?",
                [(seconds, run_id) for run_id, seconds in last_request_at.items()],
            )

    def run(self, run_id: str, owner: str) -> RunRow:
        """Raises Refusal (404)."""
        row = self._one(RunRow, "SELECT * FROM runs WHERE run_id = ? AND owner = ?", run_id, owner)
        if row is None:
            raise not_found("training run", run_id)
        return row

    def runs(self, owner: str, limit: int, offset: int) -> tuple[list[RunRow], int]:
        """Last used first, and how many there are in all."""
        rows = self._all(
            RunRow,
            "SELECT * FROM runs WHERE owner = ? ORDER BY last_request_at DESC, run_id "
            "LIMIT ? OFFSET ?",
            owner,
            limit,
            offset,
        )
        return rows, self._count("SELECT COUNT(*) FROM runs WHERE owner = ?", owner)

    def training_run(self, row: RunRow) -> types.TrainingRun:
        """A run as it is listed, with its last checkpoints."""
        last = {kind: self._last_checkpoint(row.run_id, kind) for kind in ("training", "sampler")}
        return types.TrainingRun(
            training_run_id=row.run_id,
            base_model=row.base_model,
            model_owner=row.owner,
            last_request_time=iso(row.last_request_at),
            lora_rank=row.rank,
            last_checkpoint=last["training"],
            last_sampler_checkpoint=last["sampler"],
            user_metadata=row.user_metadata,
        )

    def _last_checkpoint(self, run_id: str, kind: str) -> types.Checkpoint | None:
        row = self._one(
            CheckpointRow,
            "SELECT * FROM checkpoints WHERE run_id = ? AND kind = ? "
            "AND (expires_at IS NULL OR expires_at > ?) ORDER BY created_at DESC LIMIT 1",
            run_id,
            kind,
            self._now(),
        )
        return None if row is None else row.public_form()

    # Samplers.

    def add_sampler(self, row: SamplerRow) -> None:
        """A repeat changes nothing."""
        self._insert("samplers", row, "ON CONFLICT DO NOTHING")

    def live_samplers(self, server: str) -> list[SamplerRow]:
        return self._all(SamplerRow, "SELECT * FROM samplers WHERE server = ?", server)

    def set_clones(self, sampler_id: str, clones: int) -> None:
        self._change("UPDATE samplers SET clones = ? WHERE sampler_id = ?", clones, sampler_id)

    def remove_samplers(self, session_id: str) -> None:
        """The samplers of a session that has ended, with the snapshots that are theirs alone."""
        rows = self._all(SamplerRow, "SELECT * FROM samplers WHERE session_id = ?", session_id)
        self._change("DELETE FROM samplers WHERE session_id = ?", session_id)
        for row in rows:
            if row.directory is not None and row.model_path is None:  # else it is the checkpoint's
                shutil.rmtree(row.directory, ignore_errors=True)

    # Checkpoints.

    def add_checkpoint(self, draft: Path, row: CheckpointRow) -> CheckpointRow:
        """Move the complete files in *draft* to their place and enter them; `directory` and
        `size_bytes` of *row* are filled in. A checkpoint of that path is replaced as a whole."""
        old = self._one(CheckpointRow, "SELECT * FROM checkpoints WHERE path = ?", row.path)
        row = attrs.evolve(row, size_bytes=tree_bytes(draft), directory=str(self._place(row)))
        move_into_place(draft, Path(row.directory))
        try:
            values = _values(row)
            names, marks = ", ".join(values), ", ".join("?" * len(values))
            self._change(
                f"INSERT OR REPLACE INTO checkpoints ({names}) VALUES ({marks})", *values.values()
            )
        except BaseException:
            shutil.rmtree(row.directory, ignore_errors=True)
            raise
        if old is not None:
            shutil.rmtree(old.directory, ignore_errors=True)
        return row

    def _place(self, row: CheckpointRow) -> Path:
        """A folder that a person can find, and that no other checkpoint has or had."""
        place = self.home.checkpoints / row.run_id.replace(":", "_") / row.checkpoint_id
        free, n = place, 1
        while free.exists():
            n += 1
            free = place.with_name(f"{place.name}~{n}")  # no checkpoint's name has a "~"
        return free

    def checkpoint(self, path: str, owner: str, *, own: bool = False) -> CheckpointRow:
        """A checkpoint that *owner* may read (or with *own*: change).

        Raises:
            Refusal: 400 for a path that is none, 404 if there is no such checkpoint for them.
        """
        check_path(path)
        row = self._one(
            CheckpointRow,
            "SELECT * FROM checkpoints WHERE path = ? AND (owner = ? OR public AND NOT ?) "
            "AND (expires_at IS NULL OR expires_at > ?)",
            path,
            owner,
            own,
            self._now(),
        )
        if row is None:
            raise Refusal(
                404,
                f"there is no checkpoint {shown(path, 300)}: it was never saved, has expired, was "
                "deleted, or belongs to another key.",
            )
        return row

    def checkpoint_named(self, path: str) -> CheckpointRow | None:
        """The living checkpoint of that path, whoever owns it."""
        return self._one(
            CheckpointRow,
            "SELECT * FROM checkpoints WHERE path = ? AND (expires_at IS NULL OR expires_at > ?)",
            path,
            self._now(),
        )

    def run_checkpoints(self, run_id: str, owner: str) -> list[CheckpointRow]:
        """Of one run, oldest first; of another owner's run the published ones.

        Raises:
            Refusal: 404 if the run is another's and has published none, or is not there.
        """
        rows = self._all(
            CheckpointRow,
            "SELECT * FROM checkpoints WHERE run_id = ? AND (owner = ? OR public) "
            "AND (expires_at IS NULL OR expires_at > ?) ORDER BY created_at, path",
            run_id,
            owner,
            self._now(),
        )
        if not rows:
            self.run(run_id, owner)
        return rows

    def checkpoints(self, owner: str, limit: int, offset: int) -> tuple[list[CheckpointRow], int]:
        """Of all the owner's runs, newest first, and how many there are in all."""
        where = "owner = ? AND (expires_at IS NULL OR expires_at > ?)"
        rows = self._all(
            CheckpointRow,
            f"SELECT * FROM checkpoints WHERE {where} ORDER BY created_at DESC, path "
            "LIMIT ? OFFSET ?",
            owner,
            self._now(),
            limit,
            offset,
        )
        total = self._count(f"SELECT COUNT(*) FROM checkpoints WHERE {where}", owner, self._now())
        return rows, total

    def copy_checkpoint(
        self, source: str, owner: str, run_id: str, session_id: str, ttl_seconds: int | None
    ) -> str:
        """A checkpoint that *owner* may read, as one of their own in *run_id*; the new path.
        A repeat makes no second one.

        Raises:
            Refusal: 400, 404.
        """
        row = self.checkpoint(source, owner)
        path, now = f"tinker://{run_id}/{row.checkpoint_id}", self._now()
        there = self.checkpoint_named(path)
        if there is not None and there.origin == f"copy:{source}":
            return path
        draft = self.home.checkpoints / f".copy-{secrets.token_hex(8)}"
        shutil.copytree(row.directory, draft)
        try:
            self.add_run(
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
                )
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
            self.add_checkpoint(draft, copied)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return path

    def delete_checkpoint(self, path: str, owner: str) -> None:
        """Raises Refusal (404)."""
        row = self.checkpoint(path, owner, own=True)
        self._change("DELETE FROM checkpoints WHERE path = ?", path)
        shutil.rmtree(row.directory, ignore_errors=True)

    def publish(self, path: str, owner: str, public: bool) -> None:
        """Raises Refusal (404)."""
        self.checkpoint(path, owner, own=True)
        self._change("UPDATE checkpoints SET public = ? WHERE path = ?", public, path)

    def set_ttl(self, path: str, owner: str, ttl_seconds: int | None) -> None:
        """From now; None is never. Raises Refusal (404)."""
        self.checkpoint(path, owner, own=True)
        expires_at = None if ttl_seconds is None else self._now() + ttl_seconds
        self._change("UPDATE checkpoints SET expires_at = ? WHERE path = ?", expires_at, path)

    def set_sha256(self, path: str, directory: str, sha256: str) -> None:
        """Remember the hash of a checkpoint's archive."""
        self._change(
            "UPDATE checkpoints SET sha256 = ? WHERE path = ? AND directory = ?",
            sha256,
            path,
            directory,
        )

    def delete_expired(self) -> Sequence[str]:
        """Delete what has outlived its TTL, files and all. The paths."""
        rows = self._all(
            CheckpointRow, "SELECT * FROM checkpoints WHERE expires_at <= ?", self._now()
        )
        for row in rows:
            gone = self._change(
                "DELETE FROM checkpoints WHERE path = ? AND expires_at <= ?", row.path, self._now()
            )
            if gone:
                shutil.rmtree(row.directory, ignore_errors=True)
        return [row.path for row in rows]

    def delete_orphans(self) -> Sequence[Path]:
        """Delete checkpoint folders without a row, left by a server that died between moving
        the files and entering them, or between a delete and its clean-up."""
        with self._lock:
            known = {row[0] for row in self._db.execute("SELECT directory FROM checkpoints")}
        drafts = self.home.checkpoints.glob(".copy-*")
        orphans = [
            path
            for path in [*self.home.checkpoints.glob("*/*/*"), *drafts]
            if str(path) not in known and path.stat().st_mtime < self._now() - _ORPHAN_SECONDS
        ]
        for path in orphans:
            shutil.rmtree(path, ignore_errors=True)
        return orphans


def check_path(path: str) -> None:
    """Hold a path to the form that our own have; clients take shorter ones of other servers, too.

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
