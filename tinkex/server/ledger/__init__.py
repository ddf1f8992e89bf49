"""Everything that one server has accepted: sessions, models, samplers, operations, results.

Every operation has one record (a repeat gets the same one and does not run again). It is passed to
the scheduler once the journal has it, and its result is kept until the client has fetched it. Runs
on the event loop; the compute thread passes results through `Shared.on_loop`. Does not know about
HTTP.
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
    """Call `start` on the event loop before use, and `stop` there at the end."""

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
        """Read what a predecessor on this port left, and start housekeeping."""
        self.shared.loop = asyncio.get_running_loop()
        if self._journal is not None:
            Restart(
                self.shared, self.sessions, self.models, self.samplers, self.records, self.workshop
            ).run(self._journal)
        self._reaper = self.shared.loop.create_task(self._reap_forever())

    def stop(self) -> None:
        """Stop accepting, and answer every waiting poll."""
        self.shared.stop()
        if self._reaper is not None:
            self._reaper.cancel()
        self.release()

    def release(self) -> None:
        """Answer every waiting poll at once."""
        self.records.release()
        self.samplers.release()

    def cancel(self, owner: str, request_id: str) -> None:
        """Cancel a running sample request; other operations continue. Raises Refusal (410)."""
        record = self.records.of_owner(request_id, owner)
        if record.name == "Sample" and record.answer is None:
            self.shared.scheduler.cancel_sample(request_id)

    async def end_session(self, session: Session, status: str, detail: str | None) -> None:
        """End a session. Accepted operations still run, then models and samplers are removed."""
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
                logger.exception(
                    "Housekeeping failed; it is retried in %s s.", self.shared.limits.reap_seconds
                )
            await asyncio.sleep(self.shared.limits.reap_seconds)

    def _check_home(self) -> None:
        """Note whether the home is still there, and log it once if it is not."""
        problem = self.shared.store.problem()
        if problem is not None and self.shared.home_problem is None:
            logger.critical("Nothing can be saved: %s.", problem)
        self.shared.home_problem = problem

    async def _reap(self) -> None:
        self._check_home()
        if self.shared.home_problem is not None:
            return
        self.records.reap()
        silent = time.monotonic() - self.shared.limits.session_seconds
        for session in self.sessions.silent_since(silent):
            if not self._is_busy(session):
                logger.info("Session %s is closed: no request for a long time.", session.session_id)
                await self.end_session(session, "failed", "no heartbeat")
        await self.models.write_touched()
        await self.shared.in_pool(self.shared.store.checkpoints.delete_expired)

    def _is_busy(self, session: Session) -> bool:
        """True if something is running. Operations that wait for a missing one do not count."""
        places = [self.samplers.get(sampler_id) for sampler_id in session.samplers]
        return any(place is not None and place.running for place in places) or any(
            self.shared.scheduler.is_active(model_id) for model_id in session.models
        )
