"""Models: operations are accepted by number, in any order of arrival."""

from __future__ import annotations

import logging
import secrets
import time
from functools import partial
from typing import Any

import attrs

from tinkex import types, wire
from tinkex.server.http_errors import Refusal, shown
from tinkex.server.ledger.entries import Entries, Entry
from tinkex.server.ledger.ranges import Numbers
from tinkex.server.ledger.requests import REFUSED, decode
from tinkex.server.ledger.sessions import RETRY_LATER, Session, Sessions, Shared, check_number
from tinkex.server.live import LiveModel, Refused, Work
from tinkex.server.operations import Workshop
from tinkex.server.results import Answer, answer
from tinkex.server.scheduler import Job
from tinkex.server.spool import Spool

logger = logging.getLogger(__name__)

#: Refused numbers that are remembered per model.
MAX_REFUSED = 1000


@attrs.define(eq=False)
class ModelPlace:
    """A model.

    Attributes:
        used: the accepted numbers.
        waiting, waiting_bytes: unfinished operations, and the bytes of their bodies.
        closing: it is being unloaded and accepts nothing.
        refused: numbers of refused requests, with operation name and reason.
    """

    live: LiveModel
    used: Numbers = attrs.field(factory=Numbers)
    waiting: int = 0
    waiting_bytes: int = 0
    closing: bool = False
    refused: dict[int, tuple[str, str]] = attrs.field(factory=dict)


class Models:
    """The live models of this server."""

    def __init__(
        self,
        shared: Shared,
        sessions: Sessions,
        entries: Entries,
        workshop: Workshop,
        spool: Spool,
    ) -> None:
        self._spool = spool
        self._shared = shared
        self._sessions = sessions
        self._entries = entries
        self._workshop = workshop
        self._by_id: dict[str, ModelPlace] = {}
        self._touched: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, model_id: str) -> ModelPlace | None:
        return self._by_id.get(model_id)

    def of_owner(self, model_id: str, owner: str) -> ModelPlace:
        """Raises Refusal (404)."""
        place = self._by_id.get(model_id)
        if place is None or place.live.owner != owner:
            raise Refusal(
                404,
                f"model {shown(model_id)} is not known to this server: it was not created here, "
                "was unloaded, or its session has ended.",
            )
        return place

    async def create(
        self, name: str, model_seq_id: int, live: LiveModel, request: Any, body: bytes
    ) -> Entry:
        """Accept operation 0 of a new model: its creation, with new weights or from a checkpoint.

        A repeat gets the entry of the first request.
        """
        session = await self._sessions.live(live.session_id, live.owner)
        check_number("model_seq_id", model_seq_id)
        entry = Entry.of(name, live.owner, live.session_id, live.model_id, 0, request, body)
        self._free_failed_creation(session, model_seq_id, entry)
        known = await self._entries.known(entry)
        if known is not None:
            return known
        if model_seq_id in session.created:  # the result was fetched and forgotten
            return entry
        self._check_models_of(live.owner)
        self._shared.check_queue_of(live.owner)
        work = Work(name, live, 0, request, secrets.randbelow(2**31), size=len(body))
        session.created.add(model_seq_id)
        try:
            await self._entries.accept(
                entry, body, wire.JSON, work.seed, in_line=True, new_model=live.info
            )
        except BaseException:
            session.created.discard(model_seq_id)
            raise
        place = self.enter(live, first=0)
        place.used.add(0)
        self.put(place, entry, work)
        if self._sessions.get(live.session_id) is None:  # the session ended in the meantime
            self.put_unload(place)
        return entry

    def _check_models_of(self, owner: str) -> None:
        most = self._shared.limits.user_models
        if most is None:
            return
        count = sum(p.live.owner == owner and not p.closing for p in self._by_id.values())
        if count >= most:
            raise Refusal(
                400,
                f"you have {count} live models, as many as this server allows a user; unload one, "
                "or finish a session that you do not need.",
            )

    def _free_failed_creation(self, session: Session, model_seq_id: int, entry: Entry) -> None:
        """After a failed creation its number can be used by a different request.

        A resend of the failed request still gets the failure.
        """
        known, place = self._entries.get(entry.request_id), self.get(entry.target)
        if known is None or place is None or known.fingerprint == entry.fingerprint:
            return
        if known.answer is None or not known.answer.failed or place.waiting or 1 in place.used:
            return
        self._entries.forget([known])
        self.remove(place.live)
        self._shared.scheduler.drop_line(entry.target)
        session.created.discard(model_seq_id)
        self._entries.remove_model(entry.target)

    def enter(self, live: LiveModel, first: int) -> ModelPlace:
        """Add a model whose next operation has the number *first*."""
        place = ModelPlace(live)
        self._by_id[live.model_id] = place
        session = self._sessions.get(live.session_id)
        if session is not None:
            session.models.add(live.model_id)
            session.created.add(int(live.model_id.rsplit(":", 1)[1]))
        self._shared.scheduler.open_line(live.model_id, first)
        return place

    async def submit(
        self, owner: str, name: str, request: Any, body: bytes, content_type: str = wire.JSON
    ) -> Entry:
        """Accept a numbered operation. A repeat gets the entry of the first request."""
        place = self.of_owner(request.model_id, owner)
        entry = await self._accept(place, name, request, body, content_type)
        await self._fail_refused(place)
        return entry

    async def _accept(
        self, place: ModelPlace, name: str, request: Any, body: bytes, content_type: str
    ) -> Entry:
        live, seq = place.live, request.seq_id
        owner = live.owner
        check_number("seq_id", seq, lowest=1)  # 0 is the creation
        entry = Entry.of(name, owner, live.session_id, live.model_id, seq, request, body)
        known = await self._entries.known(entry)
        if known is not None or seq in place.used:
            return known or entry
        self._check_room(place, entry)
        session = await self._sessions.live(live.session_id, owner)
        work = Work(name, live, seq, request, size=len(body))
        if _makes_sampler(request):
            session.claim_sampler(request.sampling_session_seq_id, f"save:{work.origin}")
        place.used.add(seq)
        try:
            await self._entries.accept(entry, body, content_type, 0, in_line=True)
        except BaseException:
            place.used.discard(seq)
            self._release_sampler(work)
            raise
        try:
            work = await self._without_request(work, body, content_type)
        finally:
            self.put(place, entry, work)
        place.refused.pop(seq, None)
        return entry

    async def _without_request(self, work: Work, body: bytes, content_type: str) -> Work:
        """*work* with its request moved to disk if it is large."""
        if len(body) <= self._shared.limits.spool_bytes:
            return work
        if not self._spool.has_journal:
            try:
                path = await self._shared.in_pool(self._spool.write, body)
            except OSError as exc:
                logger.warning("A request stays in memory, as it cannot be written: %s", exc)
                return work
            read = partial(decode, work.name, content_type)
            return attrs.evolve(work, request=None, stored=self._spool.in_file(path, read))
        return self.stored(work, content_type)

    def stored(self, work: Work, content_type: str) -> Work:
        """*work* with its request read from the journal when it runs."""
        read = partial(decode, work.name, content_type)
        stored = self._spool.in_journal(work.origin, read)
        return attrs.evolve(work, request=None, stored=stored)

    async def refuse(self, owner: str, name: str, model_id: str, seq: int, sentence: str) -> None:
        """Remember that the request with this number was refused.

        The client may send a valid request with the same number. Or it may continue with the next
        number, as the official SDK does; that operation would wait forever for the missing one, so
        a failed operation takes the refused number.
        """
        place = self._by_id.get(model_id)
        if place is None or place.live.owner != owner or not 1 <= seq < 2**31:
            return
        if seq not in place.used and len(place.refused) < MAX_REFUSED:
            place.refused[seq] = name, sentence
            await self._fail_refused(place)

    async def _fail_refused(self, place: ModelPlace) -> None:
        """Consume the numbers of refused requests that later operations wait for."""
        while place.refused:
            seq = min(place.refused)
            if seq > place.used.highest:
                return
            name, sentence = place.refused.pop(seq)
            if seq in place.used:  # a valid request took the number in the meantime
                continue
            request = Refused(place.live.model_id, seq, sentence)
            body = wire.dumps(wire.to_json(request))
            try:
                await self._accept(place, name, request, body, REFUSED)
            except Refusal:  # the queue is full: the next operation tries again
                place.refused[seq] = name, sentence
                return

    def _check_room(self, place: ModelPlace, entry: Entry) -> None:
        limits = self._shared.limits
        if place.closing:
            raise Refusal(404, f"model {entry.target} is being unloaded and accepts no operations.")
        full = (
            place.waiting >= limits.model_queue
            or place.waiting_bytes + entry.size > limits.model_queue_bytes
        )
        # The operation that all others wait for is always accepted; else the queue would stay full.
        if place.waiting and entry.seq == self._shared.scheduler.next_seq(entry.target):
            return
        self._shared.check_queue_of(place.live.owner)
        if full and place.waiting:
            raise Refusal(
                429,
                f"model {entry.target} has {place.waiting} operations "
                f"({place.waiting_bytes} bytes) waiting; wait for results before sending more.",
                RETRY_LATER,
            )

    def put(self, place: ModelPlace, entry: Entry, work: Work) -> None:
        """Pass an accepted operation to the scheduler."""
        place.waiting += 1
        self._shared.waiting[entry.owner] += 1
        place.waiting_bytes += entry.size
        self._touched[entry.target] = time.time()

        def ended(outcome: Any) -> None:
            result = answer(outcome, work.title)
            if not work.ended:  # otherwise it only rebuilt the model after a restart
                self._entries.journal(entry, result)
            self._shared.on_loop(self._ended, place, entry, work, result)

        job = Job(
            steps=partial(self._workshop.steps, work),
            finish=ended,
            after=partial(self._workshop.snapshots.after, work),
        )
        self._shared.scheduler.put(entry.target, entry.seq, job)

    def _ended(self, place: ModelPlace, entry: Entry, work: Work, result: Answer) -> None:
        place.waiting -= 1
        self._shared.waiting[entry.owner] -= 1
        place.waiting_bytes -= entry.size
        if work.ended:
            return
        if result.failed:
            self._release_sampler(work)
        self._entries.end(entry, result)

    def _release_sampler(self, work: Work) -> None:
        session = self._sessions.get(work.model.session_id)
        if session is not None and _makes_sampler(work.request):
            session.release_sampler(work.request.sampling_session_seq_id, f"save:{work.origin}")

    def unload(self, owner: str, model_id: str) -> Entry:
        """Unload the model after all accepted operations. The request has no number."""
        known = self._entries.get(f"{model_id}:unload")
        if known is not None and known.owner == owner:
            return known
        return self.put_unload(self.of_owner(model_id, owner))

    def put_unload(self, place: ModelPlace) -> Entry:
        live = place.live
        known = self._entries.get(f"{live.model_id}:unload")
        if known is not None:
            return known
        place.closing = True
        entry = Entry(
            f"{live.model_id}:unload",
            "UnloadModel",
            live.owner,
            live.session_id,
            live.model_id,
            -1,
        )
        self._entries.enter(entry)
        work = Work("UnloadModel", live, -1, None)

        def ended(outcome: Any) -> None:
            self._shared.on_loop(self._entries.end, entry, answer(outcome, "UnloadModel"))

        job = Job(steps=partial(self._workshop.steps, work), finish=ended)
        self._shared.scheduler.put_last(live.model_id, job)
        return entry

    def unload_all(self, session: Session) -> None:
        for model_id in list(session.models):
            place = self._by_id.get(model_id)
            if place is not None:
                self.put_unload(place)

    def remove(self, live: LiveModel) -> None:
        """Remove a model that was unloaded."""
        self._by_id.pop(live.model_id, None)
        session = self._sessions.get(live.session_id)
        if session is not None:
            session.models.discard(live.model_id)

    def of_dead_sessions(self) -> list[ModelPlace]:
        return [p for p in self._by_id.values() if self._sessions.get(p.live.session_id) is None]

    async def write_touched(self) -> None:
        """Store when each run was last used; lists are sorted by it."""
        touched, self._touched = self._touched, {}
        if touched:
            await self._shared.in_pool(self._shared.store.touch_runs, touched)


def _makes_sampler(request: Any) -> bool:
    return isinstance(request, types.SaveWeightsForSamplerRequest) and request.path is None
