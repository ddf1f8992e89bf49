"""What the parts of the ledger share: where they reach, and how the compute thread reaches them."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
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


class Shared:
    """The event loop, a pool for what would hold it up, and the store and scheduler."""

    def __init__(self, store: Store, server: str, scheduler: Scheduler, limits: Limits) -> None:
        self.store = store
        self.server = server
        self.scheduler = scheduler
        self.limits = limits
        self.stopping = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self._pool = ThreadPoolExecutor(3, thread_name_prefix="tinkex-http")

    def in_pool(self, function: Callable[..., T], *arguments: Any) -> Awaitable[T]:
        """Run what would hold up the event loop (disk, large bodies) on another thread.

        Raises:
            Refusal: 503 when the server is ending.
        """
        if self.stopping:
            raise Refusal(503, "the server is shutting down.", {"Retry-After": "1"})
        return asyncio.get_running_loop().run_in_executor(self._pool, partial(function, *arguments))

    def on_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call *function* on the event loop, from any thread; the calls come in order."""
        if self.loop is None:
            return
        try:
            self.loop.call_soon_threadsafe(partial(function, *arguments))
        except RuntimeError:  # the loop was closed this very moment: nobody waits any more
            logger.debug("A result came after the end.")

    def check_running(self) -> None:
        """Raises Refusal: 503 when nothing is run any more."""
        if self.stopping:
            raise Refusal(503, "the server is shutting down.", {"Retry-After": "1"})
        if self.scheduler.failure is not None:
            raise Refusal(
                503, f"the engine does not run: {self.scheduler.failure}", {"Retry-After": "5"}
            )

    def stop(self) -> None:
        self.stopping = True
        self._pool.shutdown(wait=False, cancel_futures=True)


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

    def claim_model(self, number: int, by: str) -> None:
        """Use a model's number for what makes no live model. A repeat by the same is fine.

        Raises:
            Refusal: 400 if it was used for something else.
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
        """Use a sampler's number. A repeat by the same is fine.

        Raises:
            Refusal: 400 if it was used for something else.
        """
        check_number("sampling_session_seq_id", number)
        if self.origins.setdefault(number, origin) != origin:
            raise Refusal(
                400,
                f"sampling_session_seq_id {number} of session {self.session_id} was used before "
                "for something else; use the next number.",
            )

    def release_sampler(self, number: int, origin: str) -> None:
        """The number of a sampler that did not come to be can be used again."""
        if self.origins.get(number) == origin:
            del self.origins[number]


def check_number(name: str, number: int, lowest: int = 0) -> None:
    """Raises Refusal (400)."""
    if not lowest <= number < 2**31:
        raise Refusal(400, f"{name} must be from {lowest} to 2**31 - 1, got {number}.")


class Sessions:
    """The living sessions of this server."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._by_id: dict[str, Session] = {}

    def get(self, session_id: str) -> Session | None:
        return self._by_id.get(session_id)

    async def create(
        self, owner: str, request: types.CreateSessionRequest, key: str | None = None
    ) -> types.CreateSessionResponse:
        """A new session. A repeat under the same *key* gets the first one's, after a restart too.

        Args:
            key: the request's idempotency key.
        """
        named = uuid.uuid4() if key is None else uuid.uuid5(uuid.NAMESPACE_OID, f"{owner} {key}")
        session_id = str(named)
        if session_id in self._by_id:
            return types.CreateSessionResponse(session_id)
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
        """The session, which has just been heard of.

        Raises:
            Refusal: 410 if it has ended, 404 if it is not known to this server.
        """
        session = self._by_id.get(session_id)
        if session is not None and session.owner == owner:
            session.seen_at = time.monotonic()
            return session
        shared = self._shared
        row = await shared.in_pool(shared.store.session, session_id, owner)  # 404 if there is none
        if row.status == "active":
            raise Refusal(404, f"session {session_id} belongs to another server on this home.")
        raise Refusal(410, f"session {session_id} has ended ({row.status}); create a new one.")

    def heard_of(self, session_id: str) -> None:
        """Whoever asks for a result lives."""
        session = self._by_id.get(session_id)
        if session is not None:
            session.seen_at = time.monotonic()

    def remove(self, session: Session) -> bool:
        """Whether it was still there."""
        return self._by_id.pop(session.session_id, None) is not None

    def silent_since(self, moment: float) -> list[Session]:
        return [session for session in self._by_id.values() if session.seen_at < moment]
