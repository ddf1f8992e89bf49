"""Persistent objects: sessions, training runs, samplers and checkpoints.

Several servers share one store (SQLite in WAL mode); all see all checkpoints. Every lookup takes
the caller's owner: other owners' objects are treated as missing, except published checkpoints. Does
not know about HTTP.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping

from tinkex import types
from tinkex.server.checkpoint_store import Checkpoints
from tinkex.server.database import Database, RunRow, SamplerRow, SessionRow, iso
from tinkex.server.home import Home
from tinkex.server.http_errors import not_found
from tinkex.server.recorded import Recorded


class Store:
    """Sessions, runs and samplers of a home, its `checkpoints`, and the `recorded` samples.

    Safe to share between threads.

    Args:
        now: the clock for expiry, in seconds since the epoch.
        user_bytes: see `Checkpoints`.

    Raises:
        HomeError: If the database cannot be opened.
    """

    def __init__(
        self,
        home: Home,
        now: Callable[[], float] = time.time,
        user_bytes: int | None = None,
    ) -> None:
        self.home = home
        self._db = Database(home.database)
        self.checkpoints = Checkpoints(home, self._db, now, user_bytes)
        self.recorded = Recorded(self._db, now)

    def problem(self) -> str | None:
        """Why nothing can be stored (the home was deleted or replaced), or None."""
        try:
            self._db.identity.check()
        except OSError as exc:
            return f"{exc.strerror} ({exc.filename})"
        return None

    def close(self) -> None:
        self._db.close()

    def owners(self) -> list[tuple[str, int, int, int, int]]:
        """Each owner, with the numbers of sessions, runs and checkpoints, and bytes of
        checkpoints."""
        rows = self._db.select(
            "SELECT owner, SUM(s), SUM(r), SUM(c), SUM(b) FROM ("
            "SELECT owner, 1 AS s, 0 AS r, 0 AS c, 0 AS b FROM sessions UNION ALL "
            "SELECT owner, 0, 1, 0, 0 FROM runs UNION ALL "
            "SELECT owner, 0, 0, 1, size_bytes FROM checkpoints) GROUP BY owner ORDER BY owner"
        )
        return [(row[0], row[1], row[2], row[3], row[4]) for row in rows]

    def rename_owner(self, old: str, new: str) -> int:
        """Give everything of *old* to *new*; returns the number of rows."""
        with self._db.transaction() as db:
            return sum(
                db.execute(f"UPDATE {table} SET owner = ? WHERE owner = ?", (new, old)).rowcount
                for table in ("sessions", "runs", "samplers", "checkpoints", "recorded")
            )

    # Sessions.

    def add_session(self, row: SessionRow) -> None:
        """A repeat changes nothing."""
        self._db.insert("sessions", row, "ON CONFLICT DO NOTHING")

    def end_session(self, session_id: str, status: str, detail: str | None) -> None:
        """End a session. Only the first call has an effect."""
        self._db.change(
            "UPDATE sessions SET status = ?, detail = ? WHERE session_id = ? AND status = 'active'",
            status,
            detail,
            session_id,
        )

    def live_sessions(self, server: str) -> list[SessionRow]:
        return self._db.all(
            SessionRow, "SELECT * FROM sessions WHERE server = ? AND status = 'active'", server
        )

    def session(self, session_id: str, owner: str) -> SessionRow:
        """Raises Refusal (404)."""
        row = self._db.one(
            SessionRow,
            "SELECT * FROM sessions WHERE session_id = ? AND owner = ?",
            session_id,
            owner,
        )
        if row is None:
            raise not_found("session", session_id)
        return row

    def sessions(self, owner: str, limit: int, offset: int) -> tuple[list[SessionRow], int]:
        """A page of sessions, newest first, and the total number."""
        rows = self._db.all(
            SessionRow,
            "SELECT * FROM sessions WHERE owner = ? ORDER BY created_at DESC, session_id DESC "
            "LIMIT ? OFFSET ?",
            owner,
            limit,
            offset,
        )
        return rows, self._db.count("SELECT COUNT(*) FROM sessions WHERE owner = ?", owner)

    def sessions_before(self, owner: str, created_at: float, session_id: str) -> list[SessionRow]:
        """Sessions older than the given one, newest first."""
        return self._db.all(
            SessionRow,
            "SELECT * FROM sessions WHERE owner = ? AND (created_at, session_id) < (?, ?) "
            "ORDER BY created_at DESC, session_id DESC",
            owner,
            created_at,
            session_id,
        )

    def set_project(self, session_id: str, owner: str, project_id: str | None) -> None:
        self.session(session_id, owner)
        self._db.change(
            "UPDATE sessions SET project_id = ? WHERE session_id = ?", project_id, session_id
        )

    def session_members(self, session_id: str) -> tuple[list[str], list[str]]:
        """Ids of a session's runs and of its samplers."""
        runs = self._db.select(
            "SELECT run_id FROM runs WHERE session_id = ? ORDER BY created_at", session_id
        )
        samplers = self._db.select(
            "SELECT sampler_id FROM samplers WHERE session_id = ? ORDER BY rowid", session_id
        )
        return [row[0] for row in runs], [row[0] for row in samplers]

    def bury_server(self, server: str) -> None:
        """End the sessions of a dead server that cannot be taken over; remove its samplers."""
        with self._db.transaction() as db:
            db.execute(
                "UPDATE sessions SET status = 'failed', detail = 'the server ended' "
                "WHERE server = ? AND status = 'active'",
                (server,),
            )
            db.execute("DELETE FROM samplers WHERE server = ?", (server,))

    # Runs.

    def add_run(self, row: RunRow) -> None:
        """A repeat changes nothing."""
        self._db.insert("runs", row, "ON CONFLICT DO NOTHING")

    def touch_runs(self, last_request_at: Mapping[str, float]) -> None:
        with self._db.transaction() as db:
            db.executemany(
                "UPDATE runs SET last_request_at = ? WHERE run_id = ?",
                [(seconds, run_id) for run_id, seconds in last_request_at.items()],
            )

    def run(self, run_id: str, owner: str) -> RunRow:
        """Raises Refusal (404)."""
        row = self._db.one(
            RunRow, "SELECT * FROM runs WHERE run_id = ? AND owner = ?", run_id, owner
        )
        if row is None:
            raise not_found("training run", run_id)
        return row

    def runs(
        self, owner: str, limit: int, offset: int, project_id: str | None = None
    ) -> tuple[list[RunRow], int]:
        """A page of runs, last used first, and the total number; of one project if given."""
        where, values = "owner = ?", [owner]
        if project_id is not None:
            where += " AND session_id IN (SELECT session_id FROM sessions WHERE project_id = ?)"
            values.append(project_id)
        rows = self._db.all(
            RunRow,
            f"SELECT * FROM runs WHERE {where} ORDER BY last_request_at DESC, run_id "
            "LIMIT ? OFFSET ?",
            *values,
            limit,
            offset,
        )
        return rows, self._db.count(f"SELECT COUNT(*) FROM runs WHERE {where}", *values)

    def training_run(self, row: RunRow) -> types.TrainingRun:
        """A run with its last checkpoints, in the form of the API."""
        last = {
            kind: self.checkpoints.last_of_run(row.run_id, kind) for kind in ("training", "sampler")
        }
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

    # Samplers.

    def add_sampler(self, row: SamplerRow) -> None:
        """A repeat changes nothing."""
        self._db.insert("samplers", row, "ON CONFLICT DO NOTHING")

    def live_samplers(self, server: str) -> list[SamplerRow]:
        return self._db.all(SamplerRow, "SELECT * FROM samplers WHERE server = ?", server)

    def set_clones(self, sampler_id: str, clones: int) -> None:
        self._db.change("UPDATE samplers SET clones = ? WHERE sampler_id = ?", clones, sampler_id)

    def remove_samplers(self, session_id: str) -> None:
        """Remove the samplers of an ended session, with their own snapshots."""
        rows = self._db.all(SamplerRow, "SELECT * FROM samplers WHERE session_id = ?", session_id)
        self._db.change("DELETE FROM samplers WHERE session_id = ?", session_id)
        for row in rows:
            if (
                row.directory is not None and row.model_path is None
            ):  # otherwise the files belong to a checkpoint
                shutil.rmtree(row.directory, ignore_errors=True)
