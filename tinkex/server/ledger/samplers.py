"""Sampling sessions: requests arrive and end in any order."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import attrs

from tinkex import types, wire
from tinkex.server.database import SamplerRow
from tinkex.server.http_errors import Refusal, shown
from tinkex.server.ledger.entries import Entries, Entry, Waiters, sleep_among, wake
from tinkex.server.ledger.ranges import Numbers
from tinkex.server.ledger.sessions import RETRY_LATER, Session, Sessions, Shared
from tinkex.server.live import LiveSampler
from tinkex.server.operations import Workshop
from tinkex.server.results import Answer, answer, fingerprint
from tinkex.server.scheduler import SampleJob

#: The sequence numbers of a client's clones start at multiples of this.
CLONE_SPAN = 10**9


@attrs.define(eq=False)
class SamplerPlace:
    """A sampling session.

    Attributes:
        used: the accepted sequence numbers.
        clones: number of clones that have joined.
        running: unfinished requests, by request id.
        ended: finished requests in the order of their cursors, until they are forgotten.
        waiters: polls that wait for the next request to end.
    """

    live: LiveSampler
    used: Numbers = attrs.field(factory=Numbers)
    clones: int = 0
    running: dict[str, Entry] = attrs.field(factory=dict)
    ended: dict[str, Entry] = attrs.field(factory=dict)
    waiters: Waiters = attrs.field(factory=list)


class Samplers:
    """The sampling sessions of this server."""

    def __init__(
        self, shared: Shared, sessions: Sessions, entries: Entries, workshop: Workshop
    ) -> None:
        self._shared = shared
        self._sessions = sessions
        self._entries = entries
        self._workshop = workshop
        self._by_id: dict[str, SamplerPlace] = {}
        self._running = self._running_bytes = 0
        self._last_cursor = 0

    def get(self, sampler_id: str) -> SamplerPlace | None:
        return self._by_id.get(sampler_id)

    def of_owner(self, sampler_id: str, owner: str) -> SamplerPlace:
        """Raises Refusal (404)."""
        place = self._by_id.get(sampler_id)
        if place is None or place.live.owner != owner:
            raise Refusal(
                404,
                f"sampling session {shown(sampler_id)} is not known to this server: it was not "
                "created here, or its session has ended.",
            )
        return place

    async def create(self, request: types.CreateSamplingSessionRequest, live: LiveSampler) -> None:
        """Create a sampling session. A repeat has no effect."""
        session = await self._sessions.live(request.session_id, live.owner)
        seq = request.sampling_session_seq_id
        origin = f"create:{fingerprint(request).hex()}"
        repeated = session.origins.get(seq) == origin
        session.claim_sampler(seq, origin)
        row = SamplerRow(
            live.sampler_id,
            live.session_id,
            live.owner,
            self._shared.server,
            live.base_model,
            live.model_path,
            None if live.directory is None else str(live.directory),
            origin,
        )
        try:
            await self._shared.in_pool(self._shared.store.add_sampler, row)
        except BaseException:
            if not repeated:
                session.release_sampler(seq, origin)
            raise
        self.enter(live)

    def enter(self, live: LiveSampler, clones: int = 0) -> None:
        self._by_id.setdefault(live.sampler_id, SamplerPlace(live, clones=clones))
        session = self._sessions.get(live.session_id)
        if session is not None:
            session.samplers.add(live.sampler_id)

    def remove_all(self, session: Session) -> None:
        """Remove the samplers of an ended session and cancel their requests."""
        for sampler_id in list(session.samplers):
            place = self._by_id.pop(sampler_id)
            for request_id in place.running:
                self._shared.scheduler.cancel_sample(request_id)
            wake(place.waiters)

    async def join(self, owner: str, sampler_id: str) -> int:
        """Add a clone of the sampling client; returns its number, starting at 1."""
        place = self.of_owner(sampler_id, owner)
        place.clones += 1
        number = place.clones
        await self._shared.in_pool(self._shared.store.set_clones, sampler_id, number)
        return number

    async def sample(self, place: SamplerPlace, request: types.SampleRequest, body: bytes) -> Entry:
        """Accept a sample request. A repeat of its number gets the entry of the first request.

        Requests without a number are all different.
        """
        live, seq = place.live, request.seq_id
        if seq is not None and not 0 <= seq < 2**62:
            raise Refusal(400, f"seq_id must be from 0 to 2**62 - 1, got {seq}.")
        entry = Entry.of(
            "Sample", live.owner, live.session_id, live.sampler_id, seq or 0, request, body
        )
        if seq is None:
            entry.request_id = f"{live.sampler_id}:once-{uuid.uuid4()}"
        name_sequences(entry, request.num_samples)
        known = await self._entries.known(entry)
        if known is not None or (seq is not None and seq in place.used):
            return known or entry
        self._shared.check_queue_of(live.owner)
        limits = self._shared.limits
        too_large = self._running_bytes + len(body) > limits.sample_queue_bytes
        if self._running >= limits.sample_queue or (self._running and too_large):
            raise Refusal(
                429, f"{self._running} sample requests are waiting; send more later.", RETRY_LATER
            )
        self._sessions.heard_of(live.session_id)
        seed = secrets.randbelow(2**31)
        if seq is not None:
            place.used.add(seq)
        try:
            await self._entries.accept(entry, body, wire.JSON, seed, in_line=False)
        except BaseException:
            if seq is not None:
                place.used.discard(seq)
            raise
        self.put(place, entry, request, seed)
        return entry

    def put(
        self, place: SamplerPlace, entry: Entry, request: types.SampleRequest, seed: int
    ) -> None:
        """Pass an accepted sample request to the scheduler."""
        place.running[entry.request_id] = entry
        self._running += 1
        self._running_bytes += entry.size
        self._shared.waiting[entry.owner] += 1

        def ended(outcome: Any) -> None:
            outcome = self._recorded(outcome, entry, request)
            result = answer(outcome, "Sample")
            self._entries.journal(entry, result)
            self._shared.on_loop(self._ended, place, entry, result)

        self._submit(place.live, entry.request_id, _seeded(request, seed), ended)

    def _recorded(self, outcome: Any, entry: Entry, request: types.SampleRequest) -> Any:
        """Store a response's sequences if requested; a failure to store them is the outcome."""
        if not request.record_stability_info or not isinstance(outcome, types.SampleResponse):
            return outcome
        try:
            self._shared.store.recorded.add(
                entry.owner,
                entry.session_id,
                entry.sample_sequence_ids or [],
                request.prompt,
                outcome,
            )
        except Exception as exc:
            return exc
        return outcome

    def _submit(
        self,
        live: LiveSampler,
        ticket: str,
        request: types.SampleRequest,
        ended: Callable[[Any], None],
        on_token: Callable[[int, int, float], None] | None = None,
    ) -> None:
        workshop, accepted_at = self._workshop, time.monotonic()
        live = workshop.newest(live)

        def finish(outcome: Any) -> None:
            workshop.metrics.sampled(live.owner, outcome)
            workshop.monitor.sample_ended(live.base_model, accepted_at, outcome)
            ended(outcome)

        self._shared.scheduler.put_sample(
            SampleJob(
                ticket,
                submit=lambda engine: workshop.submit_sample(
                    engine, ticket, live, request, on_token
                ),
                finish=finish,
                after=lambda engine: workshop.sample_ended(engine, live),
            )
        )

    def _ended(self, place: SamplerPlace, entry: Entry, result: Answer) -> None:
        place.running.pop(entry.request_id, None)
        self._running -= 1
        self._running_bytes -= entry.size
        self._shared.waiting[entry.owner] -= 1
        self._entries.end(entry, result)
        self.add_completion(place, entry)

    def add_completion(self, place: SamplerPlace, entry: Entry) -> None:
        """Add a finished request to its session's completions and wake the polls."""
        # Microseconds since the epoch, so that cursors keep growing after a restart.
        self._last_cursor = max(self._last_cursor + 1, time.time_ns() // 1000)
        entry.cursor = self._last_cursor
        place.ended[entry.request_id] = entry
        wake(place.waiters)

    def stream(
        self,
        place: SamplerPlace,
        request: types.SampleRequest,
        on_token: Callable[[int, int, float], None],
        on_end: Callable[[Any], None],
    ) -> Callable[[], None]:
        """Sample with a callback for each token; both callbacks run on the event loop.

        Returns a function that cancels the request. It has no number and does not survive a
        restart.
        """
        shared = self._shared
        ticket = f"{place.live.sampler_id}:stream-{uuid.uuid4()}"
        self._submit(
            place.live,
            ticket,
            _seeded(request, secrets.randbelow(2**31)),
            lambda outcome: shared.on_loop(on_end, outcome),
            lambda index, token, logprob: shared.on_loop(on_token, index, token, logprob),
        )
        return lambda: shared.scheduler.cancel_sample(ticket)

    async def completions(
        self, place: SamplerPlace, clone: int, after: int, seconds: float
    ) -> list[Entry]:
        """Requests of one clone that ended after a cursor. Waits until there is at least one."""
        deadline = time.monotonic() + seconds
        while True:
            found = []
            for entry in reversed(place.ended.values()):
                if entry.cursor <= after:
                    break
                if entry.seq // CLONE_SPAN == clone:
                    found.append(entry)
            left = deadline - time.monotonic()
            if found or left <= 0 or self._shared.stopping:
                return found[::-1]
            await sleep_among(place.waiters, left)

    def acknowledge(self, place: SamplerPlace, request_ids: Iterable[str]) -> None:
        """Drop results that the client has received."""
        ours = [place.ended.get(request_id) for request_id in request_ids]
        self._entries.forget([entry for entry in ours if entry is not None])

    def forgotten(self, entry: Entry) -> None:
        place = self._by_id.get(entry.target)
        if place is not None:
            place.ended.pop(entry.request_id, None)

    def release(self) -> None:
        """Wake every waiting poll."""
        for place in self._by_id.values():
            wake(place.waiters)


def name_sequences(entry: Entry, num_samples: int) -> None:
    """Name the sequences of a sample request; the promise contains the names."""
    entry.sample_sequence_ids = [f"{entry.request_id}:{i}" for i in range(num_samples)]


def _seeded(request: types.SampleRequest, seed: int) -> types.SampleRequest:
    """The request with a seed, so that it gives the same result if it runs again."""
    if request.sampling_params.seed is not None:
        return request
    return attrs.evolve(request, sampling_params=attrs.evolve(request.sampling_params, seed=seed))
