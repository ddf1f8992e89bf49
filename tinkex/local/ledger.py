"""The book of what one server has accepted: sessions, models, samplers, operations, results.

It gives every operation its place (a repeat gets the same one and runs once), hands it to the
scheduler when the journal has it, and keeps its answer until the client has it. After a restart it
reads all this back from the store and the journal. Lives on the event loop: only `_finished` and
what it is handed are called from elsewhere. Knows nothing of HTTP.

States of a record: being accepted (the journal is writing it); waiting or running; ended; fetched;
forgotten (a poll is told that the result is gone).
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import sqlite3
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import attrs

from .. import types, wire
from .answers import Answer, answer, fingerprint
from .home import ServerFolder
from .journal import Journal, ModelRow, OperationRow
from .limits import Limits
from .operations import CHANGES_MODEL, LiveModel, LiveSampler, Work, Workshop
from .ranges import Numbers
from .refusals import Refusal, shown
from .scheduler import Cancelled, Job, SampleJob, Scheduler
from .store import SamplerRow, SessionRow, Store

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Sequence numbers of the clones of a sampling client begin at multiples of this.
_CLONE_SPAN = 10**9
#: A refused request may come again after so many seconds.
_RETRY_LATER = {"Retry-After": "1"}


@attrs.define(eq=False)
class Record:
    """One accepted operation.

    Attributes:
        target: the id of its model or sampler; seq: its number there.
        accepting: resolves when the journal has it.
        waiters: polls that wait for the answer.
        cursor: its place among the completions of its sampling session.
    """

    request_id: str
    name: str
    owner: str
    session_id: str
    target: str
    seq: int
    fingerprint: bytes
    size: int = 0
    sample_sequence_ids: list[str] | None = None
    accepting: asyncio.Future[None] | None = None
    answer: Answer | None = None
    waiters: list[asyncio.Future[None]] = attrs.field(factory=list)
    cursor: int = 0
    ended_at: float = 0.0
    fetched_at: float | None = None
    acknowledged: bool = False

    @property
    def promise(self) -> types.Promise:
        model_id = self.target if self.name not in ("Sample", "Loss") else None
        return types.Promise(self.request_id, model_id, self.sample_sequence_ids)


@attrs.define(eq=False)
class Session:
    """A living session.

    Attributes:
        seen_at: when it was last heard of.
        models, samplers: ids of the living ones.
        created: numbers of all models it ever had.
        claims: numbers among these that went to something else than a live model.
        origins: what made each of its samplers, by number.
    """

    session_id: str
    owner: str
    seen_at: float
    created: Numbers = attrs.field(factory=Numbers)
    claims: dict[int, str] = attrs.field(factory=dict)
    models: set[str] = attrs.field(factory=set)
    samplers: set[str] = attrs.field(factory=set)
    origins: dict[int, str] = attrs.field(factory=dict)


@attrs.define(eq=False)
class ModelPlace:
    """A model as clients see it: used are the numbers that were accepted."""

    live: LiveModel
    used: Numbers = attrs.field(factory=Numbers)
    waiting: int = 0
    waiting_bytes: int = 0
    closing: bool = False


@attrs.define(eq=False)
class SamplerPlace:
    """A sampling session as clients see it.

    Attributes:
        running: samples that have not ended, by request id.
        ended: samples that have, in the order of their cursors, until acknowledged or forgotten.
        waiters: polls that wait for the next one to end.
    """

    live: LiveSampler
    used: Numbers = attrs.field(factory=Numbers)
    clones: int = 0
    running: dict[str, Record] = attrs.field(factory=dict)
    ended: dict[str, Record] = attrs.field(factory=dict)
    waiters: list[asyncio.Future[None]] = attrs.field(factory=list)


class Ledger:
    """See the module. `start` on the event loop before use, `stop` there at the end."""

    def __init__(
        self, store: Store, folder: ServerFolder, journal: Journal | None,
        scheduler: Scheduler, limits: Limits,
    ) -> None:  # fmt: skip
        self.store = store
        self.limits = limits
        self.scheduler = scheduler
        self._server = folder.name
        self._journal = journal
        self.workshop = Workshop(
            store,
            folder,
            journal,
            limits,
            on_sampler=lambda sampler: self._from_compute(self._add_sampler, sampler, 0),
            on_unloaded=lambda model: self._from_compute(self._remove_model, model),
        )
        self.sessions: dict[str, Session] = {}
        self.models: dict[str, ModelPlace] = {}
        self.samplers: dict[str, SamplerPlace] = {}
        self.records: dict[str, Record] = {}
        self.stopping = False
        self._samples_running = 0
        self._fetched: deque[Record] = deque()  # oldest first
        self._fetched_bytes = self._result_bytes = 0
        self._last_cursor = 0
        self._touched: dict[str, float] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reaper: asyncio.Task[None] | None = None
        #: For what would hold up the event loop: disk, and (de)coding of large bodies.
        self.pool = ThreadPoolExecutor(3, thread_name_prefix="tinkex-http")

    # Life.

    def start(self) -> None:
        """Read back what a predecessor left, and begin."""
        self._loop = asyncio.get_running_loop()
        self._restore()
        self._reaper = self._loop.create_task(self._reap_forever())

    def stop(self) -> None:
        """Every waiting poll is let go."""
        self.stopping = True
        if self._reaper is not None:
            self._reaper.cancel()
        for record in self.records.values():
            _wake(record.waiters)
        for sampler in self.samplers.values():
            _wake(sampler.waiters)
        self.pool.shutdown(wait=False, cancel_futures=True)

    def in_pool(self, function: Callable[..., T], *arguments: Any) -> Awaitable[T]:
        """Run what would hold up the event loop on another thread."""
        return asyncio.get_running_loop().run_in_executor(self.pool, partial(function, *arguments))

    def _from_compute(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call *function* on the event loop; the calls come in order."""
        first = not self._inbox
        self._inbox.append(partial(function, *arguments))
        if first and self._loop is not None and not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(self._empty_inbox)
            except RuntimeError:  # the loop was closed this very moment: nobody waits any more
                logger.debug("A result came after the end.")

    def _empty_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    # Sessions.

    async def create_session(
        self, owner: str, request: types.CreateSessionRequest
    ) -> types.CreateSessionResponse:
        row = SessionRow(
            session_id=str(uuid.uuid4()),
            owner=owner,
            server=self._server,
            created_at=time.time(),
            user_metadata=request.user_metadata,
            tags=request.tags,
            display_name=request.display_name,
            project_id=request.project_id,
        )
        await self.in_pool(self.store.add_session, row)
        self._add_session(row)
        return types.CreateSessionResponse(row.session_id)

    def _add_session(self, row: SessionRow) -> Session:
        session = Session(row.session_id, row.owner, time.monotonic())
        self.sessions[row.session_id] = session
        return session

    async def live_session(self, session_id: str, owner: str) -> Session:
        """The session, which has just been heard of.

        Raises:
            Refusal: 410 if it has ended, 404 if it is not known to this server.
        """
        session = self.sessions.get(session_id)
        if session is not None and session.owner == owner:
            session.seen_at = time.monotonic()
            return session
        row = await self.in_pool(self.store.session, session_id, owner)  # 404 if there is none
        if row.status == "active":
            raise Refusal(404, f"session {session_id} belongs to another server on this home.")
        raise Refusal(410, f"session {session_id} has ended ({row.status}); create a new one.")

    def heard_of(self, session_id: str) -> None:
        """Whoever asks for a result lives."""
        session = self.sessions.get(session_id)
        if session is not None:
            session.seen_at = time.monotonic()

    async def end_session(self, session: Session, status: str, detail: str | None) -> None:
        """What was accepted still runs; then its models are unloaded and its samplers go."""
        await self.in_pool(self.store.end_session, session.session_id, status, detail)
        if self.sessions.pop(session.session_id, None) is None:
            return
        for model_id in list(session.models):
            self._put_unload(self.models[model_id])
        for sampler_id in list(session.samplers):
            sampler = self.samplers.pop(sampler_id)
            for request_id in sampler.running:
                self.scheduler.cancel_sample(request_id)
            _wake(sampler.waiters)
        self.scheduler.put_chore(
            lambda engine: self.workshop.close_session_samplers(engine, session.session_id)
        )

    # Models.

    def model(self, model_id: str, owner: str) -> ModelPlace:
        """Raises Refusal (404)."""
        place = self.models.get(model_id)
        if place is None or place.live.owner != owner:
            raise Refusal(
                404,
                f"model {shown(model_id)} is not known to this server: it was never created "
                "here, was unloaded, or its session has ended.",
            )
        return place

    async def create_model(
        self, owner: str, name: str, model_seq_id: int, live: LiveModel, request: Any, body: bytes
    ) -> Record:
        """Accept operation 0 of a new model: its creation, from nothing or from a checkpoint."""
        session = await self.live_session(live.session_id, owner)
        if not 0 <= model_seq_id < 2**31:
            raise Refusal(400, f"model_seq_id must be from 0 to 2**31 - 1, got {model_seq_id}.")
        record = self._record(name, owner, live.session_id, live.model_id, 0, request, body)
        known = await self._known(record)
        if known is not None:
            return known
        if model_seq_id in session.created:  # its creation was fetched and forgotten
            return record
        place = ModelPlace(live)
        place.used.add(0)
        self.models[live.model_id] = place
        session.models.add(live.model_id)
        session.created.add(model_seq_id)
        work = Work(name, live, 0, request, secrets.randbelow(2**31), size=len(body))
        try:
            await self._accept(record, body, wire.JSON, work, new_model=live.info)
        except BaseException:
            del self.models[live.model_id]
            session.models.discard(live.model_id)
            session.created.discard(model_seq_id)
            raise
        self.scheduler.open_line(live.model_id)
        self._put_work(place, record, work)
        return record

    def claim_number(self, session: Session, model_seq_id: int, by: str) -> None:
        """Use a model's number for what makes no live model. A repeat by the same is fine.

        Raises:
            Refusal: 400 if it was used for something else.
        """
        if not 0 <= model_seq_id < 2**31:
            raise Refusal(400, f"model_seq_id must be from 0 to 2**31 - 1, got {model_seq_id}.")
        if session.claims.get(model_seq_id) == by:
            return
        if model_seq_id in session.created:
            raise Refusal(
                400,
                f"model_seq_id {model_seq_id} of session {session.session_id} was used before; "
                "use the next number.",
            )
        session.created.add(model_seq_id)
        session.claims[model_seq_id] = by

    async def submit(
        self, owner: str, name: str, request: Any, body: bytes, content_type: str = wire.JSON
    ) -> Record:
        """Accept a numbered operation of a model. A repeat gets the first one's record."""
        place = self.model(request.model_id, owner)
        live, seq = place.live, request.seq_id
        if not 1 <= seq < 2**31:
            raise Refusal(
                400,
                f"seq_id must be from 1 (0 is the model's creation) to 2**31 - 1, got {seq}.",
            )
        record = self._record(name, owner, live.session_id, live.model_id, seq, request, body)
        known = await self._known(record)
        if known is not None or seq in place.used:
            return known or record
        self._check_place(place, record)
        await self.live_session(live.session_id, owner)
        if isinstance(request, types.SaveWeightsForSamplerRequest) and request.path is None:
            self._claim_sampler(live.session_id, request.sampling_session_seq_id, record)
        place.used.add(seq)
        work = Work(name, live, seq, request, size=len(body))
        try:
            await self._accept(record, body, content_type, work)
        except BaseException:
            place.used.discard(seq)
            self._release_sampler(work)
            raise
        self._put_work(place, record, work)
        return record

    def _check_place(self, place: ModelPlace, record: Record) -> None:
        if place.closing:
            raise Refusal(
                404, f"model {record.target} is being unloaded and takes no more operations."
            )
        full = (
            place.waiting >= self.limits.model_queue
            or place.waiting_bytes + record.size > self.limits.model_queue_bytes
        )
        if full and place.waiting and record.seq != self.scheduler.next_seq(record.target):
            raise Refusal(
                429,
                f"model {record.target} has {place.waiting} operations "
                f"({place.waiting_bytes} bytes) waiting; wait for results before sending more.",
                _RETRY_LATER,
            )

    def _put_work(self, place: ModelPlace, record: Record, work: Work) -> None:
        place.waiting += 1
        place.waiting_bytes += record.size
        self._touched[record.target] = time.time()

        def ended(outcome: Any) -> None:
            result = answer(outcome, work.title)
            if not work.ended:
                self._journal_answer(record, result)
            self._from_compute(self._work_ended, place, record, work, result)

        self.scheduler.put(
            record.target,
            record.seq,
            Job(
                steps=partial(self.workshop.steps, work),
                finish=ended,
                after=partial(self.workshop.after, work),
            ),
        )

    def _work_ended(self, place: ModelPlace, record: Record, work: Work, result: Answer) -> None:
        place.waiting -= 1
        place.waiting_bytes -= record.size
        if work.ended:
            return  # it ran again after a restart, to make the model what it was
        if result.failed:
            self._release_sampler(work)
        self._finished(record, result)

    async def unload_model(self, owner: str, model_id: str) -> Record:
        """Unload the model when what was accepted for it is done. It has no number."""
        known = self.records.get(f"{model_id}:unload")
        if known is not None and known.owner == owner:
            return known
        place = self.model(model_id, owner)
        return self._put_unload(place)

    def _put_unload(self, place: ModelPlace) -> Record:
        live = place.live
        request_id = f"{live.model_id}:unload"
        if request_id in self.records:
            return self.records[request_id]
        place.closing = True
        record = Record(
            request_id, "UnloadModel", live.owner, live.session_id, live.model_id, -1, b""
        )
        self.records[request_id] = record
        work = Work("UnloadModel", live, -1, None)

        def ended(outcome: Any) -> None:
            self._from_compute(self._finished, record, answer(outcome, "UnloadModel"))

        self.scheduler.put_last(
            live.model_id, Job(steps=partial(self.workshop.steps, work), finish=ended)
        )
        return record

    def _remove_model(self, live: LiveModel) -> None:
        self.models.pop(live.model_id, None)
        session = self.sessions.get(live.session_id)
        if session is not None:
            session.models.discard(live.model_id)

    # Samplers.

    def sampler(self, sampler_id: str, owner: str) -> SamplerPlace:
        """Raises Refusal (404)."""
        place = self.samplers.get(sampler_id)
        if place is None or place.live.owner != owner:
            raise Refusal(
                404,
                f"sampling session {shown(sampler_id)} is not known to this server: it was never "
                "created here, or its session has ended.",
            )
        return place

    async def create_sampler(
        self, owner: str, request: types.CreateSamplingSessionRequest, live: LiveSampler
    ) -> None:
        """A repeat changes nothing."""
        session = await self.live_session(request.session_id, owner)
        seq = request.sampling_session_seq_id
        origin = f"create:{fingerprint(request).hex()}"
        if session.origins.get(seq) == origin:
            return
        self._claim(session, seq, origin)
        row = SamplerRow(
            live.sampler_id,
            live.session_id,
            owner,
            self._server,
            live.base_model,
            live.model_path,
            None if live.directory is None else str(live.directory),
            origin,
        )
        try:
            await self.in_pool(self.store.add_sampler, row)
        except BaseException:
            session.origins.pop(seq, None)
            raise
        self._add_sampler(live, 0)

    def _claim(self, session: Session, seq: int, origin: str) -> None:
        if not 0 <= seq < 2**31:
            raise Refusal(400, f"sampling_session_seq_id must be from 0 to 2**31 - 1, got {seq}.")
        if session.origins.setdefault(seq, origin) != origin:
            raise Refusal(
                400,
                f"sampling_session_seq_id {seq} of session {session.session_id} was used before "
                "for something else; use the next number.",
            )

    def _claim_sampler(self, session_id: str, seq: int | None, record: Record) -> None:
        if seq is None:
            raise Refusal(
                400,
                "save_weights_for_sampler needs either path (a name) or sampling_session_seq_id.",
            )
        self._claim(self.sessions[session_id], seq, f"save:{record.request_id}")

    def _release_sampler(self, work: Work) -> None:
        """The number of a sampler that did not come to be can be used again."""
        request, session = work.request, self.sessions.get(work.model.session_id)
        if session is None or not isinstance(request, types.SaveWeightsForSamplerRequest):
            return
        seq = request.sampling_session_seq_id
        if seq is not None and session.origins.get(seq) == f"save:{work.origin}":
            del session.origins[seq]

    def _add_sampler(self, live: LiveSampler, clones: int) -> None:
        self.samplers.setdefault(live.sampler_id, SamplerPlace(live, clones=clones))
        session = self.sessions.get(live.session_id)
        if session is not None:
            session.samplers.add(live.sampler_id)

    async def join_sampler(self, owner: str, sampler_id: str) -> int:
        """The number of a new clone of the sampling client, from 1."""
        place = self.sampler(sampler_id, owner)
        place.clones += 1
        number = place.clones
        await self.in_pool(self.store.set_clones, sampler_id, number)
        return number

    async def sample(
        self, place: SamplerPlace, request: types.SampleRequest, body: bytes
    ) -> Record:
        """Accept a sample. A repeat of its number gets the first one's record."""
        live = place.live
        seq = request.seq_id
        if seq is not None and not 0 <= seq < 2**62:
            raise Refusal(400, f"seq_id must be from 0 to 2**62 - 1, got {seq}.")
        number = f"once-{uuid.uuid4()}" if seq is None else str(seq)
        record = self._record(
            "Sample", live.owner, live.session_id, live.sampler_id, seq or 0, request, body
        )
        record.request_id = f"{live.sampler_id}:{number}"
        record.sample_sequence_ids = [
            f"{record.request_id}:{i}" for i in range(request.num_samples)
        ]
        if seq is not None:
            known = await self._known(record)
            if known is not None or seq in place.used:
                return known or record
        if self._samples_running >= self.limits.sample_queue:
            raise Refusal(
                429, f"{self._samples_running} samples are waiting; send more later.", _RETRY_LATER
            )
        if live.session_id in self.sessions:
            await self.live_session(live.session_id, live.owner)
        seed = secrets.randbelow(2**31)
        if seq is not None:
            place.used.add(seq)
        try:
            await self._accept(record, body, wire.JSON, None, seed=seed)
        except BaseException:
            if seq is not None:
                place.used.discard(seq)
            raise
        self._put_sample(place, record, request, seed)
        return record

    def _put_sample(
        self, place: SamplerPlace, record: Record, request: types.SampleRequest, seed: int
    ) -> None:
        place.running[record.request_id] = record
        self._samples_running += 1

        def ended(outcome: Any) -> None:
            result = answer(outcome, "Sample")
            self._journal_answer(record, result)
            self._from_compute(self._sample_ended, place, record, result)

        self.scheduler.put_sample(
            SampleJob(
                ticket=record.request_id,
                submit=lambda engine: self.workshop.submit_sample(
                    engine, record.request_id, place.live, with_seed(request, seed)
                ),
                finish=ended,
                after=lambda engine: self.workshop.sample_ended(engine, place.live),
            )
        )

    def _sample_ended(self, place: SamplerPlace, record: Record, result: Answer) -> None:
        place.running.pop(record.request_id, None)
        self._samples_running -= 1
        self._finished(record, result)
        self._add_completion(place, record)

    def _add_completion(self, place: SamplerPlace, record: Record) -> None:
        # Microseconds, so that cursors grow over a restart too: what ended before it is told again.
        self._last_cursor = max(self._last_cursor + 1, time.time_ns() // 1000)
        record.cursor = self._last_cursor
        place.ended[record.request_id] = record
        _wake(place.waiters)

    def stream(
        self,
        place: SamplerPlace,
        request: types.SampleRequest,
        on_token: Callable[[int, int, float], None],
        on_end: Callable[[Any], None],
    ) -> Callable[[], None]:
        """Sample with every token told as it comes; both callbacks run on the event loop.

        Returns what cancels it. It has no number, and a restart ends it.
        """
        ticket = f"{place.live.sampler_id}:stream-{uuid.uuid4()}"
        seed = secrets.randbelow(2**31)
        self.scheduler.put_sample(
            SampleJob(
                ticket=ticket,
                submit=lambda engine: self.workshop.submit_sample(
                    engine,
                    ticket,
                    place.live,
                    with_seed(request, seed),
                    lambda *token: self._from_compute(on_token, *token),
                ),
                finish=lambda outcome: self._from_compute(on_end, outcome),
                after=lambda engine: self.workshop.sample_ended(engine, place.live),
            )
        )
        return lambda: self.scheduler.cancel_sample(ticket)

    def cancel(self, owner: str, request_id: str) -> None:
        """Take back a sample that has not ended; anything else goes on."""
        record = self.record(request_id, owner)
        if record.name == "Sample" and record.answer is None:
            self.scheduler.cancel_sample(request_id)

    async def completions(
        self, place: SamplerPlace, clone: int, after: int, seconds: float
    ) -> list[Record]:
        """The samples of one clone that ended after the given cursor; waits for one."""
        deadline = time.monotonic() + seconds
        while True:
            found = []
            for record in reversed(place.ended.values()):
                if record.cursor <= after:
                    break
                if record.seq // _CLONE_SPAN == clone:
                    found.append(record)
            left = deadline - time.monotonic()
            if found or left <= 0 or self.stopping:
                return found[::-1]
            await _wait(place.waiters, left)

    def acknowledge(self, place: SamplerPlace, request_ids: Iterable[str]) -> None:
        """The client has these results for good."""
        ours = [place.ended.pop(request_id, None) for request_id in request_ids]
        self._forget([record for record in ours if record is not None])

    # Records.

    def _record(
        self, name: str, owner: str, session_id: str, target: str, seq: int, request: Any,
        body: bytes,
    ) -> Record:  # fmt: skip
        return Record(
            f"{target}:{seq}", name, owner, session_id, target, seq, fingerprint(request), len(body)
        )

    async def _known(self, record: Record) -> Record | None:
        """The record of that place, if it is there and was the same request."""
        known = self.records.get(record.request_id)
        if known is None:
            return None
        if known.fingerprint != record.fingerprint:
            raise Refusal(
                400,
                f"operation {record.seq} of {record.target} was accepted before with another "
                f"body ({known.name}); a resend must repeat its request, a new one needs the next "
                "number.",
            )
        if known.accepting is not None:
            await asyncio.shield(known.accepting)
        return known

    async def _accept(
        self,
        record: Record,
        body: bytes,
        content_type: str,
        work: Work | None,
        *,
        seed: int = 0,
        new_model: str | None = None,
    ) -> None:
        """Enter the record; it is accepted when the journal has it."""
        self.records[record.request_id] = record
        if self._journal is None:
            return
        row = OperationRow(
            request_id=record.request_id,
            name=record.name,
            owner=record.owner,
            session_id=record.session_id,
            target=record.target,
            seq=record.seq,
            in_line=work is not None,
            changes_model=record.name in CHANGES_MODEL,
            content_type=content_type,
            body=body,
            extra=json.dumps({"seed": work.seed if work is not None else seed}),
            fingerprint=record.fingerprint,
        )
        record.accepting = asyncio.ensure_future(self._journalled(record, row, new_model))
        await asyncio.shield(record.accepting)

    async def _journalled(self, record: Record, row: OperationRow, new_model: str | None) -> None:
        if self._journal is None:
            return
        try:
            await asyncio.wrap_future(self._journal.accept(row, new_model=new_model))
        except sqlite3.Error as exc:
            self.records.pop(record.request_id, None)
            raise Refusal(
                503,
                f"the server cannot write its journal ({exc}), so nothing was accepted; free disk "
                "space under its home and send the request again.",
                {"Retry-After": "5"},
            ) from exc
        finally:
            record.accepting = None

    def record(self, request_id: str, owner: str) -> Record:
        """Raises Refusal: 410 for a result that is gone or never was."""
        record = self.records.get(request_id)
        if record is None or record.owner != owner:
            raise Refusal(
                410,
                f"there is no result {shown(request_id, 200)}: it was fetched and forgotten, its "
                "session has ended, or it was never asked for here.",
            )
        return record

    async def wait(self, record: Record, seconds: float) -> Answer | None:
        """The record's answer, or None if there is none in time."""
        if record.answer is None and not self.stopping:
            await _wait(record.waiters, seconds)
        return record.answer

    def fetched(self, record: Record) -> None:
        """The client was sent the answer; it is kept for a while in case it did not get there."""
        if record.fetched_at is None and record.answer is not None:
            record.fetched_at = time.monotonic()
            self._fetched.append(record)
            self._fetched_bytes += len(record.answer.body)
            self._trim_fetched()

    def _trim_fetched(self) -> None:
        ripe = time.monotonic() - self.limits.grace_seconds
        gone = []
        while self._fetched and (
            self._fetched_bytes > self.limits.fetched_bytes
            or (self._fetched[0].fetched_at or 0.0) < ripe
        ):
            record = self._fetched.popleft()
            if record.answer is not None:
                self._fetched_bytes -= len(record.answer.body)
            gone.append(record)
        self._forget(gone)

    def _finished(self, record: Record, result: Answer) -> None:
        record.answer = result
        record.ended_at = time.monotonic()
        self._result_bytes += len(result.body)
        _wake(record.waiters)

    def _journal_answer(self, record: Record, result: Answer) -> None:
        """Called where the result is made: it is written before a snapshot that holds it."""
        if self._journal is not None:
            self._journal.finish(record.request_id, result)

    def _forget(self, records: Iterable[Record]) -> None:
        gone = [record for record in records if self.records.get(record.request_id) is record]
        for record in gone:
            del self.records[record.request_id]
            if record.answer is not None:
                self._result_bytes -= len(record.answer.body)
            sampler = self.samplers.get(record.target)
            if sampler is not None:
                sampler.ended.pop(record.request_id, None)
        if gone and self._journal is not None:
            self._journal.forget([record.request_id for record in gone])

    # Housekeeping.

    async def _reap_forever(self) -> None:
        while True:
            try:
                await self._reap()
            except Exception:
                logger.exception("Housekeeping failed; it is tried again.")
            await asyncio.sleep(self.limits.reap_seconds)

    async def _reap(self) -> None:
        self._trim_fetched()
        self._forget_unfetched()
        silent = time.monotonic() - self.limits.session_seconds
        for session in [s for s in self.sessions.values() if s.seen_at < silent]:
            if not self._is_busy(session):
                logger.info("Session %s says nothing any more and ends.", session.session_id)
                await self.end_session(session, "failed", "no sign of life")
        touched, self._touched = self._touched, {}
        if touched:
            await self.in_pool(self.store.touch_runs, touched)
        await self.in_pool(self.store.delete_expired)

    def _is_busy(self, session: Session) -> bool:
        return any(self.models[m].waiting for m in session.models if m in self.models) or any(
            self.samplers[s].running for s in session.samplers if s in self.samplers
        )

    def _forget_unfetched(self) -> None:
        old = time.monotonic() - self.limits.result_seconds
        ended = [r for r in self.records.values() if r.answer is not None and r.fetched_at is None]
        too_much = self._result_bytes - self.limits.result_bytes
        gone = []
        for record in sorted(ended, key=lambda r: r.ended_at):
            if record.ended_at >= old and too_much <= 0:
                break
            too_much -= len(record.answer.body) if record.answer else 0
            gone.append(record)
        self._forget(gone)

    # After a restart.

    def _restore(self) -> None:
        for session_row in self.store.live_sessions(self._server):
            self._add_session(session_row)
        for row in self.store.live_samplers(self._server):
            directory = None if row.directory is None else Path(row.directory)
            live = LiveSampler(
                row.sampler_id, row.session_id, row.owner, row.base_model, row.model_path, directory
            )
            self._add_sampler(live, row.clones)
            session = self.sessions.get(row.session_id)
            if session is not None:
                session.origins[int(row.sampler_id.rsplit(":", 1)[1])] = row.origin
        if self._journal is None:
            return
        snapshots = {row.model_id: self._restore_model(row) for row in self._journal.models()}
        for operation in self._journal.operations():
            try:
                self._restore_operation(operation, snapshots)
            except Exception:
                logger.exception("Operation %s could not be restored.", operation.request_id)
        for place in list(self.models.values()):
            if place.live.session_id not in self.sessions:
                self._put_unload(place)

    def _restore_model(self, row: ModelRow) -> int:
        live = LiveModel.from_info(row.model_id, row.info)
        live.snapshot = None if row.snapshot is None else Path(row.snapshot)
        live.spoilt, live.done_seq = row.spoilt, row.snapshot_seq
        place = ModelPlace(live)
        for seq in range(row.snapshot_seq + 1):
            place.used.add(seq)
        self.models[row.model_id] = place
        session = self.sessions.get(live.session_id)
        if session is not None:
            session.models.add(row.model_id)
            session.created.add(int(row.model_id.rsplit(":", 1)[1]))
        self.scheduler.open_line(row.model_id, row.snapshot_seq + 1)
        self.scheduler.put_chore(lambda engine: self.workshop.restore(engine, live))
        return row.snapshot_seq

    def _restore_operation(self, row: OperationRow, snapshots: dict[str, int]) -> None:
        record = Record(
            row.request_id, row.name, row.owner, row.session_id, row.target, row.seq,
            row.fingerprint, len(row.body or b""),
        )  # fmt: skip
        seed = json.loads(row.extra)["seed"]
        request = None if row.body is None else decode(row.name, row.content_type, row.body)
        if row.name == "Sample":
            num_samples = 0 if request is None else request.num_samples
            record.sample_sequence_ids = [f"{row.request_id}:{i}" for i in range(num_samples)]
        if not row.forgotten:
            self.records[row.request_id] = record
        if row.answer is not None:
            record.answer = row.answer
            record.ended_at = time.monotonic()
            self._result_bytes += len(row.answer.body)
        model, sampler = self.models.get(row.target), self.samplers.get(row.target)
        if model is not None and row.in_line and row.seq > snapshots[row.target]:
            model.used.add(row.seq)
            work = Work(
                row.name,
                model.live,
                row.seq,
                request,
                seed,
                ended=row.ended is not None,
                failure=None if row.answer is None else row.answer.sentence,
                size=record.size,
            )
            if isinstance(request, types.SaveWeightsForSamplerRequest) and row.ended is None:
                self._reclaim_sampler(work)
            self._put_work(model, record, work)
        elif sampler is not None:
            if ":once-" not in row.request_id:
                sampler.used.add(row.seq)
            if row.ended is None and request is not None:
                self._put_sample(sampler, record, request, seed)
            elif record.answer is not None:
                self._add_completion(sampler, record)
        elif row.ended is None and not row.forgotten:
            gone = ValueError("it did not run before the server was restarted.")
            result = answer(gone, row.name)
            self._journal_answer(record, result)
            self._finished(record, result)

    def _reclaim_sampler(self, work: Work) -> None:
        session = self.sessions.get(work.model.session_id)
        seq = work.request.sampling_session_seq_id
        if session is not None and seq is not None:
            session.origins[seq] = f"save:{work.origin}"


#: What each operation's JSON body is decoded to.
_REQUESTS: dict[str, type[Any]] = {
    name: operation.request
    for name, operation in wire.OPERATIONS.items()
    if operation.request is not None
}


def decode(name: str, content_type: str, body: bytes) -> Any:
    """The request of an operation. Raises DecodeError."""
    if name in ("Forward", "ForwardBackward"):
        return wire.decode_request(content_type, body)
    return wire.from_json(_REQUESTS[name], wire.loads(body))


def with_seed(request: types.SampleRequest, seed: int) -> types.SampleRequest:
    """The request with a seed of its own, so that it gives the same if it must run again."""
    if request.sampling_params.seed is not None:
        return request
    return attrs.evolve(request, sampling_params=attrs.evolve(request.sampling_params, seed=seed))


def _wake(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
    waiters.clear()


async def _wait(waiters: list[asyncio.Future[None]], seconds: float) -> None:
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiters.append(waiter)
    try:
        await asyncio.wait({waiter}, timeout=seconds)
    finally:
        if waiter in waiters:
            waiters.remove(waiter)


__all__ = ["Cancelled", "Ledger", "ModelPlace", "Numbers", "Record", "SamplerPlace", "Session"]
