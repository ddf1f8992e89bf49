"""Restores the ledger after a restart, and runs the operations that had not ended."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tinkex import types
from tinkex.server.journal import Journal, ModelRow, OperationRow
from tinkex.server.ledger.entries import Entries, Entry
from tinkex.server.ledger.models import Models
from tinkex.server.ledger.requests import decode
from tinkex.server.ledger.samplers import Samplers, name_sequences
from tinkex.server.ledger.sessions import Sessions, Shared
from tinkex.server.live import LiveModel, LiveSampler, Work
from tinkex.server.operations import Workshop
from tinkex.server.results import answer

logger = logging.getLogger(__name__)


class Restart:
    """Call `run` once, before requests are accepted."""

    def __init__(
        self,
        shared: Shared,
        sessions: Sessions,
        models: Models,
        samplers: Samplers,
        entries: Entries,
        workshop: Workshop,
    ) -> None:
        self._shared = shared
        self._sessions = sessions
        self._models = models
        self._samplers = samplers
        self._entries = entries
        self._workshop = workshop
        self._snapshots: dict[str, int] = {}  # model id -> last operation in its snapshot

    def run(self, journal: Journal) -> None:
        self._read_store()
        for model in journal.models():
            self._read_model(model)
        for operation in journal.operations(self._shared.limits.spool_bytes):
            try:
                self._read_operation(operation)
            except Exception:
                logger.exception(
                    "Operation %s in the journal cannot be read; it is skipped.",
                    operation.request_id,
                )
        for place in self._models.of_dead_sessions():
            self._models.put_unload(place)

    def _read_store(self) -> None:
        store, server = self._shared.store, self._shared.server
        for session_row in store.live_sessions(server):
            self._sessions.enter(session_row)
        for row in store.live_samplers(server):
            directory = None if row.directory is None else Path(row.directory)
            live = LiveSampler(
                row.sampler_id, row.session_id, row.owner, row.base_model, row.model_path, directory
            )
            self._samplers.enter(live, row.clones)
            session = self._sessions.get(row.session_id)
            if session is not None:
                session.origins[int(row.sampler_id.rsplit(":", 1)[1])] = row.origin

    def _read_model(self, row: ModelRow) -> None:
        live = LiveModel.from_info(row.model_id, row.info)
        live.snapshot = None if row.snapshot is None else Path(row.snapshot)
        live.gradient_failure, live.done_seq = row.gradient_failure, row.snapshot_seq
        live.created, live.snapshot_seq = live.snapshot is not None, row.snapshot_seq
        place = self._models.enter(live, first=row.snapshot_seq + 1)
        for seq in range(row.snapshot_seq + 1):
            place.used.add(seq)
        self._snapshots[row.model_id] = row.snapshot_seq

    def _read_operation(self, row: OperationRow) -> None:
        entry = Entry(
            row.request_id,
            row.name,
            row.owner,
            row.session_id,
            row.target,
            row.seq,
            row.fingerprint,
            row.body_size,
            answer=row.answer,
        )
        request = None if row.body is None else decode(row.name, row.content_type, row.body)
        if not row.forgotten:
            self._entries.enter(entry)
        if row.in_line and row.seq > self._snapshots.get(row.target, row.seq):
            self._put_work(row, entry, request)
        elif row.name == "Sample":
            self._put_sample(row, entry, request)
        elif row.ended is None:
            self._fail(entry)

    def _put_work(self, row: OperationRow, entry: Entry, request: Any) -> None:
        place = self._models.of_owner(row.target, row.owner)
        work = Work(
            row.name,
            place.live,
            row.seq,
            request,
            json.loads(row.extra)["seed"],
            ended=row.ended is not None,
            failure=None if row.answer is None else row.answer.sentence,
            size=entry.size,
        )
        if request is None and row.body_size:
            work = self._models.stored(work, row.content_type)
        session = self._sessions.get(row.session_id)
        if session is not None and isinstance(request, types.SaveWeightsForSamplerRequest):
            number = request.sampling_session_seq_id
            if number is not None and not work.ended:
                session.origins[number] = f"save:{work.origin}"
        place.used.add(row.seq)
        self._models.put(place, entry, work)

    def _put_sample(self, row: OperationRow, entry: Entry, request: Any) -> None:
        place = self._samplers.get(row.target)
        if place is None:
            if row.ended is None:
                self._fail(entry)
            return
        if ":once-" not in row.request_id:
            place.used.add(row.seq)
        if row.ended is None:
            name_sequences(entry, request.num_samples)
            self._samplers.put(place, entry, request, json.loads(row.extra)["seed"])
        elif not row.forgotten:
            self._samplers.add_completion(place, entry)

    def _fail(self, entry: Entry) -> None:
        """Fail an operation whose model or sampler no longer exists."""
        gone = ValueError(
            "the server was restarted before it ran, and its session is gone; send it again."
        )
        result = answer(gone, entry.name)
        self._entries.journal(entry, result)
        self._entries.end(entry, result)
