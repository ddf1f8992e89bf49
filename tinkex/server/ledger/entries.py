"""Entries of accepted operations with their results, kept until the client has fetched them.

States of an entry: being accepted (the journal is writing it); waiting or running; ended; fetched;
forgotten (polls get a 410). Used on the event loop, except `Entries.journal`.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Iterable
from typing import Any

import attrs

from tinkex import types
from tinkex.server.http_errors import Refusal, shown
from tinkex.server.journal import Journal, OperationRow
from tinkex.server.limits import Limits
from tinkex.server.live import CHANGES_MODEL
from tinkex.server.results import Answer, fingerprint

Waiters = list["asyncio.Future[None]"]


@attrs.define(eq=False)
class Entry:
    """One accepted operation.

    Attributes:
        target: the id of its model or sampler; seq: its number there.
        fingerprint: hash of the request; size: bytes of its body.
        accepting: resolves when the journal has written it.
        waiters: polls that wait for the result.
        cursor: its position among the completed samples of its sampling session.
        ended_at, fetched_at: times on the monotonic clock.
    """

    request_id: str
    name: str
    owner: str
    session_id: str
    target: str
    seq: int
    fingerprint: bytes = b""
    size: int = 0
    sample_sequence_ids: list[str] | None = None
    accepting: asyncio.Future[None] | None = None
    answer: Answer | None = None
    waiters: Waiters = attrs.field(factory=list)
    cursor: int = 0
    ended_at: float = 0.0
    fetched_at: float | None = None

    @classmethod
    def of(
        cls,
        name: str,
        owner: str,
        session_id: str,
        target: str,
        seq: int,
        request: Any,
        body: bytes,
    ) -> Entry:
        """Create the entry of a numbered request, without adding it to `Entries`."""
        mark = fingerprint(request)
        return cls(f"{target}:{seq}", name, owner, session_id, target, seq, mark, len(body))

    @property
    def promise(self) -> types.Promise:
        model_id = None if self.name == "Sample" else self.target
        return types.Promise(self.request_id, model_id, self.sample_sequence_ids)

    @property
    def answer_bytes(self) -> int:
        return 0 if self.answer is None else len(self.answer.body)


class Entries:
    """All entries by request id.

    Args:
        check_running: raises a Refusal if operations do not run any more.
        on_forgotten: called with each dropped entry.
    """

    def __init__(
        self,
        journal: Journal | None,
        limits: Limits,
        *,
        check_running: Callable[[], None],
        on_forgotten: Callable[[Entry], None],
    ) -> None:
        self._check_running = check_running
        self._journal = journal
        self._limits = limits
        self._on_forgotten = on_forgotten
        self._by_id: dict[str, Entry] = {}
        self._fetched: dict[str, Entry] = {}  # oldest first
        self._fetched_bytes = self._bytes = 0

    def get(self, request_id: str) -> Entry | None:
        return self._by_id.get(request_id)

    def of_owner(self, request_id: str, owner: str) -> Entry:
        """An entry of this owner. Raises Refusal: 410 if there is none."""
        entry = self._by_id.get(request_id)
        if entry is None or entry.owner != owner:
            raise Refusal(
                410,
                f"there is no result {shown(request_id, 200)}: it was fetched and dropped, its "
                "session has ended, or no such request was accepted here.",
            )
        return entry

    async def known(self, entry: Entry) -> Entry | None:
        """The existing entry with the same id, or None.

        Raises:
            Refusal: 400 if it belongs to a different request, 503 if it could not be journalled.
        """
        known = self._by_id.get(entry.request_id)
        if known is None:
            return None
        if known.fingerprint != entry.fingerprint:
            raise Refusal(
                400,
                f"operation {entry.seq} of {entry.target} was accepted before with another body "
                f"({known.name}); a resend must be identical, a new request needs the next number.",
            )
        if known.accepting is not None:
            await asyncio.shield(known.accepting)
        return known

    async def accept(
        self,
        entry: Entry,
        body: bytes,
        content_type: str,
        seed: int,
        *,
        in_line: bool,
        new_model: str | None = None,
    ) -> None:
        """Add the entry, and return when the journal has written it.

        Args:
            seed: drawn for the request; in_line, new_model: see `Journal.accept`.

        Raises:
            Refusal: 503 if operations do not run any more, or the journal cannot be written.
        """
        self._check_running()
        self._by_id[entry.request_id] = entry
        if self._journal is None:
            return
        row = OperationRow(
            request_id=entry.request_id,
            name=entry.name,
            owner=entry.owner,
            session_id=entry.session_id,
            target=entry.target,
            seq=entry.seq,
            in_line=in_line,
            changes_model=entry.name in CHANGES_MODEL,
            content_type=content_type,
            body=body,
            extra=json.dumps({"seed": seed}),
            fingerprint=entry.fingerprint,
        )
        writing = self._journal.accept(row, new_model=new_model)
        accepted = self._accepted(entry, asyncio.wrap_future(writing))
        entry.accepting = asyncio.ensure_future(accepted)
        # Shielded: if the client disconnects, others may still wait for this entry.
        await asyncio.shield(entry.accepting)

    async def _accepted(self, entry: Entry, writing: asyncio.Future[None]) -> None:
        try:
            await writing
        except (OSError, sqlite3.Error) as exc:
            self._by_id.pop(entry.request_id, None)
            raise Refusal(
                503,
                f"the server cannot write its journal ({exc}), so the request was not accepted; "
                "free disk space for its home and send the request again.",
                {"Retry-After": "5"},
            ) from exc
        finally:
            entry.accepting = None

    def enter(self, entry: Entry) -> None:
        """Add an entry without journalling it."""
        self._by_id[entry.request_id] = entry
        self._bytes += entry.answer_bytes
        if entry.answer is not None:
            entry.ended_at = time.monotonic()

    def journal(self, entry: Entry, result: Answer) -> None:
        """Journal a result. Can be called from any thread.

        Called where the result is created, so that it is written before any snapshot that includes
        the operation.
        """
        if self._journal is not None:
            self._journal.finish(entry.request_id, result)

    def end(self, entry: Entry, result: Answer) -> None:
        """Store the result of an operation and wake the polls that wait for it."""
        entry.answer = result
        entry.ended_at = time.monotonic()
        self._bytes += len(result.body)
        wake(entry.waiters)

    async def wait(self, entry: Entry, seconds: float) -> Answer | None:
        """Wait for the entry's result; None if it does not arrive in time."""
        if entry.answer is None:
            await sleep_among(entry.waiters, seconds)
        return entry.answer

    def fetched(self, entry: Entry) -> None:
        """Mark the result as sent. It is kept for a while in case the response was lost."""
        if entry.fetched_at is None and entry.answer is not None:
            entry.fetched_at = time.monotonic()
            self._fetched[entry.request_id] = entry
            self._fetched_bytes += entry.answer_bytes
            self._forget_fetched()

    def forget(self, entries: Iterable[Entry]) -> None:
        gone = [entry for entry in entries if self._by_id.get(entry.request_id) is entry]
        for entry in gone:
            del self._by_id[entry.request_id]
            self._bytes -= entry.answer_bytes
            if self._fetched.pop(entry.request_id, None) is not None:
                self._fetched_bytes -= entry.answer_bytes
            self._on_forgotten(entry)
        if gone and self._journal is not None:
            self._journal.forget([entry.request_id for entry in gone])

    def remove_model(self, model_id: str) -> None:
        """Forget a model in the journal: a restart does not rebuild it."""
        if self._journal is not None:
            self._journal.remove_model(model_id, None)

    def reap(self) -> None:
        """Drop results that were fetched long ago, are too old, or exceed the limits."""
        self._forget_fetched()
        old = time.monotonic() - self._limits.result_seconds
        too_much = self._bytes - self._limits.result_bytes
        unfetched = [r for r in self._by_id.values() if r.answer and r.fetched_at is None]
        gone = []
        for entry in sorted(unfetched, key=lambda r: r.ended_at):
            if entry.ended_at >= old and too_much <= 0:
                break
            too_much -= entry.answer_bytes
            gone.append(entry)
        self.forget(gone)

    def has_unfetched(self) -> bool:
        """True if a client has not fetched a result yet."""
        return any(r.answer is not None and r.fetched_at is None for r in self._by_id.values())

    def _forget_fetched(self) -> None:
        ripe = time.monotonic() - self._limits.grace_seconds
        too_much = self._fetched_bytes - self._limits.fetched_bytes
        gone = []
        for entry in self._fetched.values():
            if too_much <= 0 and (entry.fetched_at or 0.0) >= ripe:
                break
            too_much -= entry.answer_bytes
            gone.append(entry)
        self.forget(gone)

    def release(self) -> None:
        """Wake every waiting poll."""
        for entry in self._by_id.values():
            wake(entry.waiters)


def wake(waiters: Waiters) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
    waiters.clear()


async def sleep_among(waiters: Waiters, seconds: float) -> None:
    """Sleep until `wake` is called on *waiters*, or for *seconds*."""
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiters.append(waiter)
    try:
        await asyncio.wait({waiter}, timeout=seconds)
    finally:
        if waiter in waiters:
            waiters.remove(waiter)
