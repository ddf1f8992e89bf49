"""Records of accepted operations with their results, kept until the client has fetched them.

States of a record: being accepted (the journal is writing it); waiting or running; ended; fetched;
forgotten (polls get a 410). Used on the event loop, except `Records.journal`.
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
class Record:
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
    ) -> Record:
        """Create the record of a numbered request, without adding it to `Records`."""
        mark = fingerprint(request)
        return cls(f"{target}:{seq}", name, owner, session_id, target, seq, mark, len(body))

    @property
    def promise(self) -> types.Promise:
        model_id = None if self.name == "Sample" else self.target
        return types.Promise(self.request_id, model_id, self.sample_sequence_ids)

    @property
    def answer_bytes(self) -> int:
        return 0 if self.answer is None else len(self.answer.body)


class Records:
    """All records by request id.

    Args:
        check_running: raises a Refusal if operations do not run any more.
        on_forgotten: called with each dropped record.
    """

    def __init__(
        self,
        journal: Journal | None,
        limits: Limits,
        *,
        check_running: Callable[[], None],
        on_forgotten: Callable[[Record], None],
    ) -> None:
        self._check_running = check_running
        self._journal = journal
        self._limits = limits
        self._on_forgotten = on_forgotten
        self._by_id: dict[str, Record] = {}
        self._fetched: dict[str, Record] = {}  # oldest first
        self._fetched_bytes = self._bytes = 0

    def get(self, request_id: str) -> Record | None:
        return self._by_id.get(request_id)

    def of_owner(self, request_id: str, owner: str) -> Record:
        """A record of this owner. Raises Refusal: 410 if there is none."""
        record = self._by_id.get(request_id)
        if record is None or record.owner != owner:
            raise Refusal(
                410,
                f"there is no result {shown(request_id, 200)}: it was fetched and dropped, its "
                "session has ended, or no such request was accepted here.",
            )
        return record

    async def known(self, record: Record) -> Record | None:
        """The existing record with the same id, or None.

        Raises:
            Refusal: 400 if it belongs to a different request, 503 if it could not be journalled.
        """
        known = self._by_id.get(record.request_id)
        if known is None:
            return None
        if known.fingerprint != record.fingerprint:
            raise Refusal(
                400,
                f"operation {record.seq} of {record.target} was accepted before with another body "
                f"({known.name}); a resend must be identical, a new request needs the next number.",
            )
        if known.accepting is not None:
            await asyncio.shield(known.accepting)
        return known

    async def accept(
        self,
        record: Record,
        body: bytes,
        content_type: str,
        seed: int,
        *,
        in_line: bool,
        new_model: str | None = None,
    ) -> None:
        """Add the record, and return when the journal has written it.

        Args:
            seed: drawn for the request; in_line, new_model: see `Journal.accept`.

        Raises:
            Refusal: 503 if operations do not run any more, or the journal cannot be written.
        """
        self._check_running()
        self._by_id[record.request_id] = record
        if self._journal is None:
            return
        row = OperationRow(
            request_id=record.request_id,
            name=record.name,
            owner=record.owner,
            session_id=record.session_id,
            target=record.target,
            seq=record.seq,
            in_line=in_line,
            changes_model=record.name in CHANGES_MODEL,
            content_type=content_type,
            body=body,
            extra=json.dumps({"seed": seed}),
            fingerprint=record.fingerprint,
        )
        writing = self._journal.accept(row, new_model=new_model)
        accepted = self._accepted(record, asyncio.wrap_future(writing))
        record.accepting = asyncio.ensure_future(accepted)
        # Shielded: if the client disconnects, others may still wait for this record.
        await asyncio.shield(record.accepting)

    async def _accepted(self, record: Record, writing: asyncio.Future[None]) -> None:
        try:
            await writing
        except (OSError, sqlite3.Error) as exc:
            self._by_id.pop(record.request_id, None)
            raise Refusal(
                503,
                f"the server cannot write its journal ({exc}), so the request was not accepted; "
                "free disk space for its home and send the request again.",
                {"Retry-After": "5"},
            ) from exc
        finally:
            record.accepting = None

    def enter(self, record: Record) -> None:
        """Add a record without journalling it."""
        self._by_id[record.request_id] = record
        self._bytes += record.answer_bytes
        if record.answer is not None:
            record.ended_at = time.monotonic()

    def journal(self, record: Record, result: Answer) -> None:
        """Journal a result. Can be called from any thread.

        Called where the result is created, so that it is written before any snapshot that includes
        the operation.
        """
        if self._journal is not None:
            self._journal.finish(record.request_id, result)

    def end(self, record: Record, result: Answer) -> None:
        """Store the result of an operation and wake the polls that wait for it."""
        record.answer = result
        record.ended_at = time.monotonic()
        self._bytes += len(result.body)
        wake(record.waiters)

    async def wait(self, record: Record, seconds: float) -> Answer | None:
        """Wait for the record's result; None if it does not arrive in time."""
        if record.answer is None:
            await sleep_among(record.waiters, seconds)
        return record.answer

    def fetched(self, record: Record) -> None:
        """Mark the result as sent. It is kept for a while in case the response was lost."""
        if record.fetched_at is None and record.answer is not None:
            record.fetched_at = time.monotonic()
            self._fetched[record.request_id] = record
            self._fetched_bytes += record.answer_bytes
            self._forget_fetched()

    def forget(self, records: Iterable[Record]) -> None:
        gone = [record for record in records if self._by_id.get(record.request_id) is record]
        for record in gone:
            del self._by_id[record.request_id]
            self._bytes -= record.answer_bytes
            if self._fetched.pop(record.request_id, None) is not None:
                self._fetched_bytes -= record.answer_bytes
            self._on_forgotten(record)
        if gone and self._journal is not None:
            self._journal.forget([record.request_id for record in gone])

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
        for record in sorted(unfetched, key=lambda r: r.ended_at):
            if record.ended_at >= old and too_much <= 0:
                break
            too_much -= record.answer_bytes
            gone.append(record)
        self.forget(gone)

    def has_unfetched(self) -> bool:
        """True if a client has not fetched a result yet."""
        return any(r.answer is not None and r.fetched_at is None for r in self._by_id.values())

    def _forget_fetched(self) -> None:
        ripe = time.monotonic() - self._limits.grace_seconds
        too_much = self._fetched_bytes - self._limits.fetched_bytes
        gone = []
        for record in self._fetched.values():
            if too_much <= 0 and (record.fetched_at or 0.0) >= ripe:
                break
            too_much -= record.answer_bytes
            gone.append(record)
        self.forget(gone)

    def release(self) -> None:
        """Wake every waiting poll."""
        for record in self._by_id.values():
            wake(record.waiters)


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
