"""The journal of one server: accepted operations and their results, to resume after a restart.

One thread writes in groups: writes that arrive during a transaction go into the next one. An
operation is accepted when its row is written; its result follows. Once a model has a snapshot, the
bodies of earlier operations are not needed. Does not know what operations mean, except which of
them change a model.
"""

from __future__ import annotations

import errno
import logging
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs

from tinkex.server.home import FileIdentity, HomeError
from tinkex.server.results import Answer

logger = logging.getLogger(__name__)

_VERSION = 1
# The column `spoilt` is `ModelRow.gradient_failure`.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS operations (
    number INTEGER PRIMARY KEY AUTOINCREMENT, request_id TEXT NOT NULL UNIQUE, name TEXT NOT NULL,
    owner TEXT NOT NULL, session_id TEXT NOT NULL, target TEXT NOT NULL, seq INTEGER NOT NULL,
    in_line INTEGER NOT NULL, changes_model INTEGER NOT NULL, content_type TEXT NOT NULL, body BLOB,
    extra TEXT NOT NULL, fingerprint BLOB NOT NULL, form TEXT, answer BLOB,
    forgotten INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS operations_by_target ON operations (target, seq);
CREATE TABLE IF NOT EXISTS models (
    model_id TEXT PRIMARY KEY, info TEXT NOT NULL, snapshot TEXT,
    snapshot_seq INTEGER NOT NULL DEFAULT -1, spoilt TEXT);
"""
#: Seconds until a failed write is retried.
_RETRY_SECONDS = 1.0


@attrs.frozen
class OperationRow:
    """One accepted operation.

    Attributes:
        target: id of the model or sampler; seq: the operation's number there.
        in_line: True for a model's numbered operations, whose numbers have no gaps.
        changes_model: True if it must run again after a restart to rebuild the model.
        body: as received, decompressed; None when it is no longer needed, or not read.
        body_size: bytes of the body, even if it is not read.
        extra: JSON with decisions made at acceptance (random seeds).
        ended: None while it runs, then "failure" or the form of the result.
        answer: the result; None if there is none yet, or it was forgotten.
        forgotten: the client has the result; the row is kept only for its body or its number.
    """

    request_id: str
    name: str
    owner: str
    session_id: str
    target: str
    seq: int
    in_line: bool = attrs.field(converter=bool)
    changes_model: bool = attrs.field(converter=bool)
    content_type: str
    body: bytes | None = attrs.field(repr=False)
    extra: str
    fingerprint: bytes
    ended: str | None = None
    answer: Answer | None = None
    forgotten: bool = attrs.field(default=False, converter=bool)
    body_size: int = attrs.field(default=0, eq=False)


@attrs.frozen
class ModelRow:
    """A live model.

    Attributes:
        info: JSON description, see `LiveModel.info`.
        snapshot: the folder of the newest one, or None; snapshot_seq: the last operation in it.
        gradient_failure: why the gradients in the snapshot are incomplete, or None.
    """

    model_id: str
    info: str
    snapshot: str | None
    snapshot_seq: int
    gradient_failure: str | None


@attrs.frozen
class _Write:
    statements: list[tuple[str, tuple[Any, ...]]]
    written: Future[None] | None = None
    afterwards: Callable[[], None] | None = None


class Journal:
    """Can be used from any thread. `close` writes everything that is queued.

    Attributes:
        transactions: how many have been written since the start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.transactions = 0
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA auto_vacuum=INCREMENTAL")  # takes effect for new files only
            self._db.execute("PRAGMA journal_mode=WAL")
            # A killed process loses nothing; a power failure may lose the last transactions.
            self._db.execute("PRAGMA synchronous=NORMAL")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise HomeError(
                    f"the journal {path} was written by another version of tinkex (format "
                    f"{version}, this one writes {_VERSION}); restart that version, or delete it."
                )
            self._db.executescript(_SCHEMA)
            self._db.execute(f"PRAGMA user_version={_VERSION}")
            self._identity = FileIdentity.of(path)
        except sqlite3.Error as exc:
            raise HomeError(
                f"the journal {path} cannot be used: {exc}; delete it to start without live models "
                "(checkpoints are not affected), or choose another --home."
            ) from exc
        self._changed = threading.Condition()  # guards the two below
        self._queue: list[_Write] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="tinkex-journal", daemon=True)
        self._thread.start()

    def accept(self, row: OperationRow, *, new_model: str | None = None) -> Future[None]:
        """Write an operation. The future resolves when it is written, or fails with the error.

        *new_model*: the info of the model that the operation creates.
        """
        statements: list[tuple[str, tuple[Any, ...]]] = [
            (
                "INSERT INTO operations (request_id, name, owner, session_id, target, seq, "
                "in_line, changes_model, content_type, body, extra, fingerprint) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    row.request_id,
                    row.name,
                    row.owner,
                    row.session_id,
                    row.target,
                    row.seq,
                    row.in_line,
                    row.changes_model,
                    row.content_type,
                    row.body,
                    row.extra,
                    row.fingerprint,
                ),
            )
        ]
        if new_model is not None:
            statements.append(
                ("INSERT INTO models (model_id, info) VALUES (?, ?)", (row.target, new_model))
            )
        written: Future[None] = Future()
        self._put(_Write(statements, written))
        return written

    def finish(self, request_id: str, answer: Answer) -> None:
        """Write a result. The body of an operation that changes no model is dropped."""
        self._put(
            _Write(
                [
                    (
                        "UPDATE operations SET form = ?, answer = ?, "
                        "body = CASE WHEN changes_model THEN body END WHERE request_id = ?",
                        (answer.form, answer.body, request_id),
                    )
                ]
            )
        )

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop results that clients have received and that a restart does not need.

        A numbered operation is needed, at least for its number, until a snapshot contains it or the
        model is removed.
        """
        statements: list[tuple[str, tuple[Any, ...]]] = []
        for request_id in request_ids:
            statements += [
                (
                    "DELETE FROM operations WHERE request_id = ? AND (NOT in_line OR seq <= "
                    "COALESCE((SELECT snapshot_seq FROM models WHERE model_id = target), seq))",
                    (request_id,),
                ),
                (
                    "UPDATE operations SET forgotten = 1, "
                    "answer = CASE WHEN form = 'failure' THEN answer END WHERE request_id = ?",
                    (request_id,),
                ),
            ]
        self._put(_Write(statements))

    def snapshot(
        self,
        model_id: str,
        info: str,
        directory: Path,
        seq: int,
        gradient_failure: str | None,
        replaces: Path | None,
    ) -> None:
        """Record the snapshot of a model after operation *seq*; it is complete and synced to disk.

        Args:
            info: see `ModelRow`; now includes the engine's choices.
            replaces: the previous snapshot, deleted once the switch is synced to disk.
        """
        statements: list[tuple[str, tuple[Any, ...]]] = [
            (
                "UPDATE models SET info = ?, snapshot = ?, snapshot_seq = ?, spoilt = ? "
                "WHERE model_id = ?",
                (info, str(directory), seq, gradient_failure, model_id),
            ),
            (
                "DELETE FROM operations WHERE target = ? AND seq <= ? AND forgotten",
                (model_id, seq),
            ),
            ("UPDATE operations SET body = NULL WHERE target = ? AND seq <= ?", (model_id, seq)),
        ]

        def afterwards() -> None:
            # The old snapshot may be deleted only once the switch to the new one is synced.
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            if replaces is not None:
                shutil.rmtree(replaces, ignore_errors=True)

        self._put(_Write(statements, afterwards=afterwards))

    def remove_model(self, model_id: str, snapshot: Path | None) -> None:
        """Forget an unloaded model and delete its snapshot."""
        statements: list[tuple[str, tuple[Any, ...]]] = [
            ("DELETE FROM models WHERE model_id = ?", (model_id,)),
            ("DELETE FROM operations WHERE target = ? AND forgotten", (model_id,)),
            (
                "UPDATE operations SET body = NULL WHERE target = ? AND form IS NOT NULL",
                (model_id,),
            ),
        ]

        def afterwards() -> None:
            self._db.execute("PRAGMA incremental_vacuum").fetchall()  # frees its pages on disk
            if snapshot is not None:
                shutil.rmtree(snapshot, ignore_errors=True)

        self._put(_Write(statements, afterwards=afterwards))

    def models(self) -> list[ModelRow]:
        rows = self._db.execute("SELECT model_id, info, snapshot, snapshot_seq, spoilt FROM models")
        return [ModelRow(*row) for row in rows]

    def operations(self, most_bytes: int = 2**62) -> list[OperationRow]:
        """All operations in order of acceptance, with bodies up to *most_bytes*."""
        rows = self._db.execute(
            "SELECT request_id, name, owner, session_id, target, seq, in_line, changes_model, "
            "content_type, CASE WHEN length(body) <= ? THEN body END AS body, extra, fingerprint, "
            "form AS ended, answer AS kept, forgotten, COALESCE(length(body), 0) AS body_size "
            "FROM operations ORDER BY number",
            (most_bytes,),
        )
        return [_operation(row) for row in rows]

    def body(self, request_id: str) -> bytes:
        """The body of an operation that has not run. Can be called from any thread.

        Raises:
            OSError: If there is none.
        """
        with closing(sqlite3.connect(self._path)) as db:
            found = db.execute(
                "SELECT body FROM operations WHERE request_id = ?", (request_id,)
            ).fetchone()
        if found is None or found[0] is None:
            raise OSError(errno.ENOENT, f"the journal has no body of {request_id}", str(self._path))
        body: bytes = found[0]
        return body

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._db.close()

    def _put(self, write: _Write) -> None:
        with self._changed:
            self._queue.append(write)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                group, self._queue = self._queue, []
                if not group:
                    return
            self._write(group)
            del group  # so that its bodies are not kept in memory until the next write

    def _write(self, group: list[_Write]) -> None:
        try:
            self._identity.check()
            self._db.execute("BEGIN")
            for write in group:
                for sql, values in write.statements:
                    self._db.execute(sql, values)
            self._db.execute("COMMIT")
        except (OSError, sqlite3.Error) as exc:
            self._could_not_write(group, exc)
            return
        self.transactions += 1
        for write in group:
            if write.written is not None:
                write.written.set_result(None)
            if write.afterwards is not None:
                write.afterwards()

    def _could_not_write(self, group: list[_Write], exc: Exception) -> None:
        """Fail the writes that requests wait for; retry the others later, in order."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        logger.error("The journal cannot be written, requests are refused: %s", exc)
        again = [write for write in group if write.written is None]
        for write in group:
            if write.written is not None:
                write.written.set_exception(exc)
        with self._changed:
            if again and not self._closing:
                self._queue[:0] = again
                self._changed.wait(_RETRY_SECONDS)


def _operation(found: sqlite3.Row) -> OperationRow:
    values = dict(found)
    form, kept = values["ended"], values.pop("kept")
    return OperationRow(answer=None if kept is None else Answer(form, kept), **values)
