"""Sessions, and what the ledger's parts share: store, scheduler, event loop, thread pool."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import attrs

from tinkex import types
from tinkex.server.database import SessionRow
from tinkex.server.http_errors import Refusal
from tinkex.server.ledger.ranges import Numbers
from tinkex.server.limits import Limits
from tinkex.server.scheduler import Scheduler
from tinkex.server.store import Store

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Headers of a refusal after which the client should retry.
RETRY_LATER = {"Retry-After": "1"}


class Shared:
    """Store, scheduler, event loop, and a thread pool for calls that would block the loop."""

    def __init__(self, store: Store, server: str, scheduler: Scheduler, limits: Limits) -> None:
        self.store = store
        self.server = server
        self.scheduler = scheduler
        self.limits = limits
        self.stopping = False
        self.draining = False  # accepted operations are finished, nothing new is accepted
        self.home_problem: str | None = None  # why nothing can be stored, or None
        self.waiting: Counter[str] = Counter()  # unfinished operations and samples of each owner
        self.loop: asyncio.AbstractEventLoop | None = None
        self._pool = ThreadPoolExecutor(3, thread_name_prefix="tinkex-http")

    def in_pool(self, function: Callable[..., T], *arguments: Any) -> Awaitable[T]:
        """Run a function that would block the event loop (disk, large bodies) on a pool thread.

        Raises:
            Refusal: 503 if the server is shutting down.
        """
        if self.stopping:
            raise Refusal(503, "the server is shutting down.", {"Retry-After": "1"})
        return asyncio.get_running_loop().run_in_executor(self._pool, partial(function, *arguments))

    def on_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call *function* on the event loop, from any thread. The order of calls is kept."""
        if self.loop is None:
            return
        try:
            self.loop.call_soon_threadsafe(partial(function, *arguments))
        except RuntimeError:  # the loop has just been closed, so no client waits
            logger.debug("A result arrived after the event loop was closed.")

    def check_running(self) -> None:
        """Raises Refusal: 503 if operations do not run any more."""
        if self.stopping:
            raise Refusal(503, "the server is shutting down.", {"Retry-After": "1"})
        if self.scheduler.failure is not None:
            raise Refusal(
                503, f"the engine is not running: {self.scheduler.failure}", {"Retry-After": "5"}
            )

    def check_accepting(self) -> None:
        """Raises Refusal: 503 if new operations are not accepted."""
        if self.draining:
            raise Refusal(
                503,
                "the server is shutting down: it finishes what it has accepted, and accepts "
                "nothing new.",
                {"Retry-After": "5"},
            )
        self.check_running()

    def check_queue_of(self, owner: str) -> None:
        """Raises Refusal (429) if the user has as many requests waiting as is allowed."""
        most = self.limits.user_queue
        if most is not None and self.waiting[owner] >= most:
            raise Refusal(
                429,
                f"you have {self.waiting[owner]} requests waiting, as many as this server allows a "
                "user; wait for results before sending more.",
                RETRY_LATER,
            )

    def stop(self) -> None:
        self.stopping = True
        self._pool.shutdown(wait=False, cancel_futures=True)


@attrs.define(eq=False)
class Session:
    """A live session.

    Attributes:
        seen_at: time of its last request, on the monotonic clock.
        models, samplers: ids of the live ones.
        created: numbers of all models created so far.
        claims: the numbers that were used for something other than a live model.
        origins: the operation that created each of its samplers, by number.
    """

    session_id: str
    owner: str
    seen_at: float
    created: Numbers = attrs.field(factory=Numbers)
    claims: dict[int, str] = attrs.field(factory=dict)
    models: set[str] = attrs.field(factory=set)
    samplers: set[str] = attrs.field(factory=set)
    origins: dict[int, str] = attrs.field(factory=dict)

    def claim_model(self, number: int, by: str) -> None:
        """Use a model number for something other than a live model. It may be repeated.

        Raises:
            Refusal: 400 if the number was used for something else.
        """
        check_number("model_seq_id", number)
        if self.claims.get(number) == by:
            return
        if number in self.created:
            raise Refusal(
                400,
                f"model_seq_id {number} of session {self.session_id} was used before; use the "
                "next number.",
            )
        self.created.add(number)
        self.claims[number] = by

    def claim_sampler(self, number: int, origin: str) -> None:
        """Use a sampler number. A repeat with the same origin has no effect.

        Raises:
            Refusal: 400 if the number was used for something else.
        """
        check_number("sampling_session_seq_id", number)
        if self.origins.setdefault(number, origin) != origin:
            raise Refusal(
                400,
                f"sampling_session_seq_id {number} of session {self.session_id} was used before "
                "for something else; use the next number.",
            )

    def release_sampler(self, number: int, origin: str) -> None:
        """Make the number of a sampler that was not created available again."""
        if self.origins.get(number) == origin:
            del self.origins[number]


def check_number(name: str, number: int, lowest: int = 0) -> None:
    """Raises Refusal (400)."""
    if not lowest <= number < 2**31:
        raise Refusal(400, f"{name} must be from {lowest} to 2**31 - 1, got {number}.")


class Sessions:
    """The live sessions of this server."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._by_id: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, session_id: str) -> Session | None:
        return self._by_id.get(session_id)

    async def create(
        self, owner: str, request: types.CreateSessionRequest, key: str | None = None
    ) -> types.CreateSessionResponse:
        """Create a session. A repeat with the same *key* returns it again, even after a restart.

        Args:
            key: the request's idempotency key.
        """
        named = uuid.uuid4() if key is None else uuid.uuid5(uuid.NAMESPACE_OID, f"{owner} {key}")
        session_id = str(named)
        if session_id in self._by_id:
            return types.CreateSessionResponse(session_id)
        self._shared.check_accepting()
        row = SessionRow(
            session_id=session_id,
            owner=owner,
            server=self._shared.server,
            created_at=time.time(),
            user_metadata=request.user_metadata,
            tags=request.tags,
            display_name=request.display_name,
            project_id=request.project_id,
        )
        await self._shared.in_pool(self._shared.store.add_session, row)
        stored = await self._shared.in_pool(self._shared.store.session, session_id, owner)
        if stored.status == "active" and session_id not in self._by_id:
            self.enter(row)
        return types.CreateSessionResponse(session_id)

    def enter(self, row: SessionRow) -> None:
        self._by_id[row.session_id] = Session(row.session_id, row.owner, time.monotonic())

    async def live(self, session_id: str, owner: str) -> Session:
        """A live session; updates the time of its last request.

        Raises:
            Refusal: 410 if it has ended, 404 if it is not known to this server.
        """
        session = self._by_id.get(session_id)
        if session is not None and session.owner == owner:
            session.seen_at = time.monotonic()
            return session
        shared = self._shared
        row = await shared.in_pool(shared.store.session, session_id, owner)  # raises 404
        if row.status == "active":
            raise Refusal(
                404, f"session {session_id} belongs to another server that uses this home."
            )
        raise Refusal(410, f"session {session_id} has ended ({row.status}); create a new one.")

    def heard_of(self, session_id: str) -> None:
        """Update the time of the session's last request."""
        session = self._by_id.get(session_id)
        if session is not None:
            session.seen_at = time.monotonic()

    def remove(self, session: Session) -> bool:
        """Remove a session. False if it was removed before."""
        return self._by_id.pop(session.session_id, None) is not None

    def silent_since(self, moment: float) -> list[Session]:
        return [session for session in self._by_id.values() if session.seen_at < moment]
