"""The SQLite database of a home: its tables, their rows as objects, and access to them.

`Store` and `Checkpoints` give the rows their meaning.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import attrs

from tinkex import types
from tinkex.server.home import FileIdentity, HomeError

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
    sha256 TEXT, file_hashes TEXT);
CREATE TABLE IF NOT EXISTS recorded (
    sequence_id TEXT PRIMARY KEY, owner TEXT NOT NULL, session_id TEXT NOT NULL,
    prompt BLOB NOT NULL, tokens BLOB NOT NULL, logprobs BLOB NOT NULL, expires_at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS recorded_by_expiry ON recorded (expires_at);
CREATE INDEX IF NOT EXISTS sessions_by_owner ON sessions (owner, created_at);
CREATE INDEX IF NOT EXISTS runs_by_owner ON runs (owner, last_request_at);
CREATE INDEX IF NOT EXISTS runs_by_session ON runs (session_id);
CREATE INDEX IF NOT EXISTS samplers_by_session ON samplers (session_id);
CREATE INDEX IF NOT EXISTS checkpoints_by_run ON checkpoints (run_id);
DROP INDEX IF EXISTS checkpoints_by_owner;
CREATE INDEX IF NOT EXISTS checkpoints_listed
    ON checkpoints (owner, created_at DESC, path, expires_at);
CREATE INDEX IF NOT EXISTS checkpoints_by_expiry ON checkpoints (expires_at);
"""

#: Version of the schema, in SQLite's user_version. Files with 0 are older than these numbers; their
#: tables are those of 1 without the columns below. A change that older versions cannot work with
#: needs a new number, and a migration in `_migrate`.
_VERSION = 1

#: Columns that earlier versions did not have.
_ADDED_COLUMNS = (("checkpoints", "file_hashes", "TEXT"),)

#: Seconds to wait for another server that is writing.
_BUSY_SECONDS = 10.0


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
    """directory: of the checkpoint model_path, or, without one, of the sampler's own snapshot;
    origin: the operation that made it."""

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
    """A checkpoint.

    Attributes:
        origin: the operation that made it, to detect repeats of that operation.
        sha256: of its archive, once it was requested.
        file_hashes: file name -> SHA-256 at saving; None for those of earlier versions.
    """

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
    file_hashes: dict[str, str] | None = None

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
            base_model=self.base_model,
        )


_JSON_COLUMNS = {"user_metadata", "tags", "file_hashes"}
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


class Database:
    """The connection to a home's SQLite file. Safe to share between threads.

    Raises:
        HomeError: If the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()  # guards the connection: one transaction at a time
        try:
            self._db = sqlite3.connect(
                path, timeout=_BUSY_SECONDS, check_same_thread=False, isolation_level=None
            )
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._check_version(path)
            self._db.executescript(_SCHEMA)
            self.identity = FileIdentity.of(path)
            self._migrate()
        except sqlite3.Error as exc:
            raise HomeError(
                f"the database {path} cannot be used: {exc}; repair it or move it away, or choose "
                "another --home."
            ) from exc

    def _check_version(self, path: Path) -> None:
        """Raises HomeError, before anything is changed, if a newer version wrote the file."""
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            self._db.close()
            raise HomeError(
                f"the database {path} was written by a newer version of tinkex (format {version}, "
                f"this one knows {_VERSION}); install that version, or choose another --home."
            )

    def _migrate(self) -> None:
        """Add what an earlier version's database lacks, in one transaction."""
        with self.transaction() as db:
            for table, column, kind in _ADDED_COLUMNS:
                there = {row["name"] for row in db.execute(f"PRAGMA table_info({table})")}
                if column not in there:
                    db.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")
            db.execute(f"PRAGMA user_version={_VERSION}")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def select(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of a query, as plain tuples."""
        with self._lock:
            self.identity.check()
            return [tuple(found) for found in self._db.execute(sql, values).fetchall()]

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Commit when the block ends, roll back if it raises."""
        with self._lock:
            self.identity.check()
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def insert(self, table: str, row: Any, on_conflict: str = "") -> None:
        """Add a row; *on_conflict* is the clause for a row whose key exists."""
        values = _values(row)
        names, marks = ", ".join(values), ", ".join("?" * len(values))
        self.change(
            f"INSERT INTO {table} ({names}) VALUES ({marks}) {on_conflict}", *values.values()
        )

    def replace(self, table: str, row: Any) -> None:
        """Add a row, in place of the one with the same key."""
        values = _values(row)
        names, marks = ", ".join(values), ", ".join("?" * len(values))
        self.change(f"INSERT OR REPLACE INTO {table} ({names}) VALUES ({marks})", *values.values())

    def all(self, cls: Any, sql: str, *values: Any) -> list[Any]:
        """The rows of a query as objects of *cls*."""
        with self._lock:
            self.identity.check()
            return [_row(cls, found) for found in self._db.execute(sql, values).fetchall()]

    def one(self, cls: Any, sql: str, *values: Any) -> Any | None:
        """The first row of a query, or None."""
        rows = self.all(cls, sql, *values)
        return rows[0] if rows else None

    def count(self, sql: str, *values: Any) -> int:
        """The number that a SELECT COUNT query returns."""
        with self._lock:
            count: int = self._db.execute(sql, values).fetchone()[0]
            return count

    def change(self, sql: str, *values: Any) -> int:
        """Execute one statement in a transaction; return the number of changed rows."""
        with self.transaction() as db:
            return db.execute(sql, values).rowcount
