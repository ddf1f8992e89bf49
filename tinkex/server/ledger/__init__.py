"""Everything that one server has accepted: sessions, models, samplers, operations, results.

Every operation has one entry; a repeated request gets the same entry and does not run again. The
operation is passed to the scheduler once the journal has stored it, and its result is kept until
the client has fetched it. Runs on the event loop; the compute thread passes results through
`Shared.on_loop`. Does not know about HTTP.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable
from typing import Any

from tinkex.server import memory
from tinkex.server.home import ServerFolder
from tinkex.server.journal import Journal
from tinkex.server.ledger.entries import Entries, Entry, Waiters, sleep_among, wake
from tinkex.server.ledger.models import ModelPlace, Models
from tinkex.server.ledger.restart import Restart
from tinkex.server.ledger.samplers import SamplerPlace, Samplers
from tinkex.server.ledger.sessions import Session, Sessions, Shared
from tinkex.server.limits import Limits
from tinkex.server.operations import Workshop
from tinkex.server.scheduler import Scheduler
from tinkex.server.spool import Spool
from tinkex.server.store import Store

__all__ = ["Entry", "Ledger", "ModelPlace", "SamplerPlace", "Session"]

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
        self.entries = Entries(
            journal,
            limits,
            check_running=self.shared.check_accepting,
            on_forgotten=lambda entry: self.samplers.forgotten(entry),
        )
        parts = (self.shared, self.sessions, self.entries, self.workshop)
        self.spool = Spool(folder.spool, journal)
        self.models = Models(*parts, self.spool)
        self.samplers = Samplers(*parts)
        self.workshop.monitor.watch(
            {
                "tinkex_engine_up": ("1 if operations run.", lambda: float(scheduler.alive)),
                "tinkex_operations_queued": (
                    "Operations that wait or run.",
                    lambda: sum(scheduler.load().waiting.values()),
                ),
                "tinkex_sample_requests_queued": (
                    "Sample requests that wait or run.",
                    lambda: scheduler.load().samples,
                ),
                "tinkex_models": ("Models that are not unloaded.", lambda: len(self.models)),
                "tinkex_sessions": ("Sessions that are open.", lambda: len(self.sessions)),
            }
        )
        self._reaper: asyncio.Task[None] | None = None
        self._ended = 0  # sessions
        self._seen = self._trimmed = self._activity
        self._still_since = 0.0

    def start(self) -> None:
        """Restore the state of a predecessor on this port, and start housekeeping."""
        self.shared.loop = asyncio.get_running_loop()
        if self._journal is not None:
            Restart(
                self.shared, self.sessions, self.models, self.samplers, self.entries, self.workshop
            ).run(self._journal)
        self._reaper = self.shared.loop.create_task(self._reap_forever())

    async def drain(self, is_impatient: Callable[[], bool] = lambda: False) -> None:
        """Accept nothing new, and wait up to `Limits.drain_seconds` for accepted operations.

        Without a journal, also wait until the results are fetched, because nothing else keeps them.
        """
        deadline = time.monotonic() + self.shared.limits.drain_seconds
        self.shared.draining = True
        while time.monotonic() < deadline and self._is_working() and not is_impatient():
            await asyncio.sleep(0.05)

    def _is_working(self) -> bool:
        scheduler = self.shared.scheduler
        if not scheduler.alive:
            return False
        unfetched = self._journal is None and self.entries.has_unfetched()
        return unfetched or not scheduler.is_settled

    def stop(self) -> None:
        """Stop accepting, and answer every waiting poll."""
        self.shared.stop()
        self.spool.close()
        if self._reaper is not None:
            self._reaper.cancel()
        self.release()

    def release(self) -> None:
        """Answer every waiting poll at once."""
        self.entries.release()
        self.samplers.release()

    async def base_info(self, base_model: str) -> Any | None:
        """Metadata of a base model, which is loaded first if needed.

        None if it cannot be loaded, or not within the time of a poll.
        """
        bases, shared = self.workshop.loader.bases, self.shared
        if base_model not in bases:
            waiters: Waiters = []
            shared.scheduler.put_chore(
                lambda engine: self.workshop.loader.preload(
                    engine,
                    base_model,
                    shared.scheduler.put_chore,
                    lambda: shared.on_loop(wake, waiters),
                )
            )
            await sleep_among(waiters, shared.limits.poll_seconds)
        return bases.get(base_model)

    def cancel(self, owner: str, request_id: str) -> None:
        """Cancel a sample request, or a model creation that waits for its base model. Other
        operations continue. Raises Refusal (410)."""
        entry = self.entries.of_owner(request_id, owner)
        if entry.name == "Sample" and entry.answer is None:
            self.shared.scheduler.cancel_sample(request_id)
        elif entry.seq == 0:
            self.shared.scheduler.cancel_parked(entry.target, 0)

    async def end_session(self, session: Session, status: str, detail: str | None) -> None:
        """End a session. Accepted operations still run, then models and samplers are removed."""
        store, session_id = self.shared.store, session.session_id
        await self.shared.in_pool(store.end_session, session_id, status, detail)
        if self.sessions.remove(session):
            self._ended += 1
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
        """Check whether the home still exists, and log once if it does not."""
        problem = self.shared.store.problem()
        if problem is not None and self.shared.home_problem is None:
            logger.critical("Nothing can be saved: %s.", problem)
        self.shared.home_problem = problem

    async def _reap(self) -> None:
        self._check_home()
        if self.shared.home_problem is not None:
            return
        self.entries.reap()
        silent = time.monotonic() - self.shared.limits.session_seconds
        for session in self.sessions.silent_since(silent):
            if not self._is_busy(session):
                logger.info("Session %s is closed: no request for a long time.", session.session_id)
                await self.end_session(session, "failed", "no heartbeat")
        self.shared.scheduler.put_chore(self.workshop.snapshots.swap_out)
        self.shared.scheduler.put_chore(self.workshop.close_idle_samplers)
        self._free_memory()
        await self.models.write_touched()
        await self.shared.in_pool(self.shared.store.checkpoints.delete_expired)
        await self.shared.in_pool(self.shared.store.recorded.delete_expired)

    @property
    def _activity(self) -> tuple[int, ...]:
        """Counters of everything that can leave freed memory behind: computation, large requests
        (which may wait for an operation that never arrives), ended sessions, and writes of the
        journal, which may end last."""
        written = 0 if self._journal is None else self._journal.transactions
        return self.shared.scheduler.turns, self.spool.kept, self._ended, written

    def _free_memory(self) -> None:
        """Return freed memory to the system, once after each period of activity.

        Not immediately: the next operation would have to request it again, page by page.
        """
        scheduler, now, activity = self.shared.scheduler, time.monotonic(), self._activity
        if activity != self._seen or not scheduler.is_settled:
            self._seen, self._still_since = activity, now
        elif now - self._still_since < self.shared.limits.trim_seconds:
            return
        elif self._seen != self._trimmed:
            self._trimmed = self._seen
            scheduler.put_chore(_free_memory)

    def _is_busy(self, session: Session) -> bool:
        """True if something is running. Operations that wait for a missing one do not count."""
        places = [self.samplers.get(sampler_id) for sampler_id in session.samplers]
        return any(place is not None and place.running for place in places) or any(
            self.shared.scheduler.is_active(model_id) for model_id in session.models
        )


def _free_memory(engine: Any) -> None:
    engine.free_idle()
    gc.collect()
    memory.trim()
