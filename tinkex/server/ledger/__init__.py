"""The book of what one server has accepted: sessions, models, samplers, operations, results.

Every operation gets its place (a repeat gets the same one and runs once), is handed to the
scheduler when the journal has it, and its answer is kept until the client has it. Lives on the
event loop; the compute thread hands results over through `Shared.on_loop`. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time

from tinkex.server.home import ServerFolder
from tinkex.server.journal import Journal
from tinkex.server.ledger.models import ModelPlace, Models
from tinkex.server.ledger.records import Record, Records
from tinkex.server.ledger.restart import Restart
from tinkex.server.ledger.samplers import SamplerPlace, Samplers
from tinkex.server.ledger.sessions import Session, Sessions, Shared
from tinkex.server.limits import Limits
from tinkex.server.operations import Workshop
from tinkex.server.scheduler import Scheduler
from tinkex.server.store import Store

__all__ = ["Ledger", "ModelPlace", "Record", "SamplerPlace", "Session"]

logger = logging.getLogger(__name__)


class Ledger:
    """`start` on the event loop before use, `stop` there at the end."""

    def __init__(
        self,
        store: Store,
        folder: ServerFolder,
        journal: Journal | None,
        scheduler: Scheduler,
        limits: Limits,
    ) -> None:
        self.shared = Shared(store, folder.name, scheduler, limits)
        self._journal = journal
        self.workshop = Workshop(
            store,
            folder,
            journal,
            limits,
            on_sampler=lambda sampler: self.shared.on_loop(self.samplers.enter, sampler),
            on_unloaded=lambda model: self.shared.on_loop(self.models.remove, model),
        )
        self.sessions = Sessions(self.shared)
        self.records = Records(
            journal,
            limits,
            check_running=self.shared.check_running,
            on_forgotten=lambda record: self.samplers.forgotten(record),
        )
        parts = (self.shared, self.sessions, self.records, self.workshop)
        self.models = Models(*parts)
        self.samplers = Samplers(*parts)
        self._reaper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Read back what a predecessor left, and begin."""
        self.shared.loop = asyncio.get_running_loop()
        if self._journal is not None:
            Restart(
                self.shared, self.sessions, self.models, self.samplers, self.records, self.workshop
            ).run(self._journal)
        self._reaper = self.shared.loop.create_task(self._reap_forever())

    def stop(self) -> None:
        """Every waiting poll is let go."""
        self.shared.stop()
        if self._reaper is not None:
            self._reaper.cancel()
        self.release()

    def release(self) -> None:
        """Every waiting poll is let go, with what there is."""
        self.records.release()
        self.samplers.release()

    def cancel(self, owner: str, request_id: str) -> None:
        """Take back a sample that has not ended; anything else goes on. Raises Refusal (410)."""
        record = self.records.of_owner(request_id, owner)
        if record.name == "Sample" and record.answer is None:
            self.shared.scheduler.cancel_sample(request_id)

    async def end_session(self, session: Session, status: str, detail: str | None) -> None:
        """What was accepted still runs; then its models are unloaded and its samplers go."""
        store, session_id = self.shared.store, session.session_id
        await self.shared.in_pool(store.end_session, session_id, status, detail)
        if self.sessions.remove(session):
            self.models.unload_all(session)
            self.samplers.remove_all(session)
            self.shared.scheduler.put_chore(
                lambda engine: self.workshop.close_session_samplers(engine, session_id)
            )

    async def _reap_forever(self) -> None:
        while True:
            try:
                await self._reap()
            except Exception:
                logger.exception("Housekeeping failed; it is tried again.")
            await asyncio.sleep(self.shared.limits.reap_seconds)

    async def _reap(self) -> None:
        self.records.reap()
        silent = time.monotonic() - self.shared.limits.session_seconds
        for session in self.sessions.silent_since(silent):
            if not self._is_busy(session):
                logger.info("Session %s says nothing any more and ends.", session.session_id)
                await self.end_session(session, "failed", "no sign of life")
        await self.models.write_touched()
        await self.shared.in_pool(self.shared.store.checkpoints.delete_expired)

    def _is_busy(self, session: Session) -> bool:
        """Whether something runs; what waits for an operation that never comes does not."""
        places = [self.samplers.get(sampler_id) for sampler_id in session.samplers]
        return any(place is not None and place.running for place in places) or any(
            self.shared.scheduler.is_active(model_id) for model_id in session.models
        )
