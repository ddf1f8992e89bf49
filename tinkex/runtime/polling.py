"""Polls the server for results, and resolves futures with them.

A poll is repeated because the response was "not yet". Repeating a failed request is a retry, see
transport.py. Does not know about models or the order of operations.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import attrs

from tinkex import errors, types, wire
from tinkex.futures import OperationFuture, fail, succeed
from tinkex.runtime import operation_log
from tinkex.runtime.executor import ByteBudget, Pool
from tinkex.runtime.queue_state import queue_state, tell
from tinkex.runtime.responses import Answer, error_detail, retold
from tinkex.runtime.retry import LOST, NOT_YET, ONCE, PAUSED, Attempts, is_stray
from tinkex.runtime.transport import Transport
from tinkex.runtime.wait_log import Wait

T = TypeVar("T")

logger = logging.getLogger("tinkex")

#: How many times a lost promise's request is resent under the same number.
MAX_RESUBMITS = 3


@attrs.define(eq=False)
class Promise(Generic[T]):
    """An operation that the server has accepted, and whose result is pending.

    Attributes:
        request_id: the server's id.
        operation: its entry in the wire table.
        future: resolved with the result.
        wait: records failures and the server's states; ends with the promise.
        queue: name of its queue, see `Poller`.
        deadline: on the poller's clock.
        resubmit: resends the request (same seq_id) after a lost promise and returns the server's
            id. None if that is not possible.
        on_queue_state: called with (state, reason) when the server reports why the operation waits.
    """

    request_id: str
    operation: wire.Operation[T]
    future: OperationFuture[T]
    wait: Wait
    queue: str = ""
    deadline: float = math.inf
    resubmit: Callable[[], str] | None = None
    on_queue_state: Callable[[str, str | None], None] | None = None
    sequence_ids: list[str] | None = None

    iteration: int = 0
    metadata_only: bool = True
    resubmits: int = 0
    attempts: Attempts = attrs.field(factory=Attempts)
    queue_state: tuple[str, str | None] = ("active", None)
    reserved_bytes: int = 0

    @property
    def what(self) -> str:
        """The operation, for messages."""
        return self.future.what


class NotYet(Exception):
    """The operation is not done; poll again after `pause` seconds."""

    def __init__(self, pause: float) -> None:
        super().__init__(pause)
        self.pause = pause


class Poller:
    """Resolves promises by polling for their results, many at a time.

    Promises wait in queues. A model's queue is ordered: its operations finish in order, so only the
    few oldest are polled. In the unordered queue of a sampler all are polled, as far as there are
    threads; otherwise a promise goes to the end of the queue after a "not yet", so that a slow
    operation does not delay finished ones for long. All but the first few polls begin a moment
    later, because opening their connections would delay the submits of samples requested at the
    same time.

    States of a promise: queued -> polled -> (not yet -> polled)* -> resolved. Any exception
    resolves the future; no promise is dropped.
    """

    #: Polls of one queue that begin at once.
    WIDTH = 4
    #: An unordered queue may get more polls when no promise was added for MORE_AFTER seconds, at
    #: the latest after MOST_TIMES as long.
    MORE_AFTER, MOST_TIMES = 0.05, 5

    def __init__(
        self,
        transport: Transport,
        *,
        max_workers: int = 256,
        max_response_bytes: int = 50 * 1024 * 1024,
        sleep: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._pool = Pool(max_workers, "tinkex-poll")
        self._bytes = ByteBudget(max_response_bytes)
        #: The current time on the clock of deadlines, in seconds.
        self.now = clock
        self._closed = threading.Event()
        self._sleep = sleep or self._closed.wait
        self._lock = threading.Lock()  # guards the four below
        self._queues: dict[str, deque[Promise[Any]]] = {}
        self._asked: dict[str, int] = {}
        self._growing: set[str] = set()
        self._open: set[Promise[Any]] = set()
        self._width = max_workers

    def watch(self, promise: Promise[Any], *, ordered: bool = True) -> None:
        """Resolve the promise's future when its result is ready."""
        with self._lock:
            closed, asked = self._closed.is_set(), self._asked.get(promise.queue, 0)
            start = not closed and asked < self.WIDTH
            grow = not (closed or start or ordered or promise.queue in self._growing)
            if grow:
                self._growing.add(promise.queue)
            if not closed:
                self._open.add(promise)
                self._queues.setdefault(promise.queue, deque()).append(promise)
            if start:
                self._asked[promise.queue] = asked + 1
        if closed:
            self._resolve_error(promise, errors.ClientClosedError("The session is closed."))
        if start:
            self._pool.start(self._run_queue, promise.queue, ordered)
        if grow:
            self._pool.start(self._grow, promise.queue)

    def in_flight(self, queue: str) -> int:
        """The number of unresolved promises of *queue*."""
        return len(self._of(queue))

    def _of(self, queue: str) -> list[Promise[Any]]:
        with self._lock:
            return [promise for promise in self._open if promise.queue == queue]

    def abandon(self, queue: str, exc: BaseException) -> None:
        """Fail the unresolved promises of *queue*, and stop polling for them."""
        for promise in self._of(queue):
            self._resolve_error(promise, exc)

    def close(self) -> None:
        """Fail all unresolved promises, and accept no more."""
        self._closed.set()
        with self._lock:
            left = list(self._open)
        for promise in left:
            self._resolve_error(
                promise,
                errors.ClientClosedError(
                    f"{promise.what} {promise.request_id} was not done when its session closed."
                ),
            )
        self._pool.shutdown()

    def _grow(self, queue: str) -> None:
        """Start, a moment later, a thread for each waiting promise of an unordered queue."""
        before = -1
        for _ in range(self.MOST_TIMES):
            self._sleep(self.MORE_AFTER)
            with self._lock:
                waiting = len(self._queues.get(queue, ()))
            if waiting <= before:
                break
            before = waiting
        with self._lock:
            self._growing.discard(queue)
            asked = self._asked.get(queue, 0)
            more = min(len(self._queues.get(queue, ())), self._width - asked)
            if more > 0:
                self._asked[queue] = asked + more
        for _ in range(more):
            self._pool.start(self._run_queue, queue, False)

    def _run_queue(self, queue: str, ordered: bool) -> None:
        """Poll promises of *queue* until it is empty. Runs on a pool thread."""
        while True:
            with self._lock:
                waiting = self._queues.get(queue)
                if not waiting or self._closed.is_set():
                    self._asked[queue] -= 1
                    if not self._asked[queue]:
                        del self._asked[queue]
                        self._queues.pop(queue, None)
                    return
                promise = waiting.popleft()
            self._ask_until_done(promise, waiting, ordered)

    def _ask_until_done(
        self, promise: Promise[Any], waiting: deque[Promise[Any]], ordered: bool
    ) -> None:
        while not self._closed.is_set() and not promise.future.done():
            try:
                self._succeed(promise, self.ask(promise))
                return
            except NotYet as not_yet:
                if (pause := min(not_yet.pause, promise.deadline - self.now())) > 0:
                    self._sleep(pause)
                # A promise that holds bytes keeps its thread: all others may be waiting for the
                # bytes.
                if not ordered and waiting and not promise.reserved_bytes:
                    with self._lock:
                        waiting.append(promise)
                    return
            except BaseException as exc:
                self._resolve_error(promise, exc)
                return
        self._end(promise)

    def _succeed(self, promise: Promise[T], result: T) -> None:
        self._end(promise)
        succeed(promise.future, result)

    def _resolve_error(self, promise: Promise[Any], exc: BaseException) -> None:
        self._end(promise)
        fail(promise.future, exc)

    def _end(self, promise: Promise[Any]) -> None:
        promise.wait.end()
        self._release(promise)
        with self._lock:
            self._open.discard(promise)

    def _release(self, promise: Promise[Any]) -> None:
        with self._lock:  # close() may end the promise at the same time
            held, promise.reserved_bytes = promise.reserved_bytes, 0
        if held:
            self._bytes.release(held)

    # One poll and its response.

    def ask(self, promise: Promise[T]) -> T:
        """Poll once. Returns the result.

        Raises:
            NotYet: If it is not done.
            TinkexError: If it failed, is lost, or the deadline has passed.
        """
        self._check_deadline(promise)
        started = self.now()
        try:
            answer = self._post(promise)
            promise.iteration += 1
            return self._read(promise, answer, self.now() - started)
        except NotYet:
            operation_log.not_yet(promise.future, *promise.queue_state)
            raise
        except errors.APIError as exc:
            meant = self._meaning_of(promise, exc)
            if meant is exc:
                raise
            raise meant from exc

    def _meaning_of(self, promise: Promise[Any], exc: errors.APIError) -> Exception:
        """The exception for a poll that failed or was answered with an error."""
        if isinstance(exc, errors.PromiseExpiredError):
            return self._lost(promise, exc)
        if isinstance(exc, errors.BadRequestError) and not is_stray(exc):
            category = exc.body.get("category") if isinstance(exc.body, dict) else None
            return _failed(promise, exc.detail, "status 400", category)  # of some servers
        body = getattr(exc, "body", None)
        if isinstance(body, dict) and body.get("queue_state"):
            self._note_queue_state(promise, body)
        return self._failed_once(promise, exc) if promise.attempts.may_pass(exc) else exc

    def _post(self, promise: Promise[Any]) -> Answer:
        binary = promise.operation in _IN_PROTOBUF
        headers = {
            "Accept": f"{wire.PROTOBUF}, {wire.JSON}" if binary else wire.JSON,
            "X-Tinker-Request-Type": promise.operation.name,
            "X-Tinker-Request-Iteration": str(promise.iteration),
        }
        patience = self._transport.config.patience.poll
        body = {"request_id": promise.request_id, "allow_metadata_only": promise.metadata_only}
        return self._transport.send(
            "POST",
            self._transport.url(wire.RETRIEVE_FUTURE.path),
            json.dumps(body, separators=(",", ":")).encode(),
            headers=headers,
            timeout=min(patience, max(0.05, promise.deadline - self.now())),
            most_bytes=wire.RETRIEVE_FUTURE.most_bytes,
            retry=ONCE,
            accept=frozenset({408}),
            parse=lambda answer: answer,
            wait=promise.wait,
        )

    def _read(self, promise: Promise[T], answer: Answer, took: float) -> T:
        """The result in *answer*; raises NotYet, or the reported failure."""
        binary = promise.operation in _IN_PROTOBUF and answer.is_protobuf
        if binary and answer.status == 200:
            return self._decode_protobuf(promise, answer)
        payload = _as_object(answer)
        if answer.status == 408 or payload.get("type") == "try_again":
            self._note_queue_state(promise, payload)
            raise NotYet(self._pause(promise, took, payload))
        status = payload.get("status")
        if status == "pending":
            raise NotYet(self._pause(promise, took, payload))
        if status == "complete_metadata":
            self._reserve(promise, payload)
            raise NotYet(0)
        if status == "failed" or payload.get("error") is not None:
            raise self._failure(promise, payload)
        if status == "completed" and "result" in payload:
            payload = payload["result"]
        result = self._transport.structure_result(promise.operation, payload, answer.url)
        return _with_sequence_ids(result, promise.sequence_ids)

    def _decode_protobuf(self, promise: Promise[T], answer: Answer) -> T:
        try:
            result = wire.decode_result(promise.operation.result, answer.content)  # type: ignore[type-var]
        except ValueError as exc:
            raise errors.APIResponseValidationError(
                f"{answer.url} answered {promise.what} with an unreadable protobuf: {exc}",
                url=answer.url,
            ) from exc
        return _with_sequence_ids(result, promise.sequence_ids)

    def _note_queue_state(self, promise: Promise[Any], payload: dict[str, Any]) -> None:
        now = queue_state(payload)
        promise.attempts.answered(is_news=now != promise.queue_state)
        promise.wait.state = f"queue state {now[0]}" + (f": {now[1]}" if now[1] else "")
        if now == promise.queue_state:
            return
        promise.queue_state = now
        if promise.on_queue_state is not None:
            tell(promise.on_queue_state, *now)

    def _pause(self, promise: Promise[Any], took: float, payload: dict[str, Any]) -> float:
        """Seconds until the next poll."""
        promise.attempts.answered()
        asked = payload.get("retry_after_ms")
        if isinstance(asked, (int, float)) and not isinstance(asked, bool) and asked > 0:
            return min(asked / 1000, 300.0)
        paused = promise.queue_state[0] in ("paused_rate_limit", "paused_capacity")
        return promise.attempts.not_yet(took, PAUSED if paused else NOT_YET)

    def _reserve(self, promise: Promise[Any], payload: dict[str, Any]) -> None:
        """A large result is ready: wait until it fits into the byte budget, then request it."""
        if not promise.metadata_only:
            raise errors.APIResponseValidationError(
                f"the server answered {promise.what} {promise.request_id} with the size of its "
                "result again, though the result itself was asked for."
            )
        size = payload.get("response_payload_size")
        size = size if isinstance(size, int) and size > 0 else 0
        while not self._bytes.acquire(size, timeout=1.0):
            if self._closed.is_set():
                raise errors.ClientClosedError("The session is closed.")
            self._check_deadline(promise)
        promise.reserved_bytes = size
        promise.metadata_only = False

    def _failure(self, promise: Promise[Any], payload: dict[str, Any]) -> Exception:
        error = payload.get("error")
        nested = error if isinstance(error, dict) else {}
        category = str(payload.get("category") or nested.get("category") or "unknown").lower()
        told = error if isinstance(error, str) else error_detail(error)
        failure = _failed(promise, told, f"category {category}", category)
        if payload.get("status") == "failed" and category != "user":
            # In this older form, the operation may still succeed.
            return self._failed_once(promise, failure)
        return failure

    def _failed_once(self, promise: Promise[Any], exc: errors.TinkexError) -> Exception:
        """After a temporary failure: NotYet, or *exc* when the time limit is over."""
        promise.wait.failed_once(exc)
        patience = self._transport.config.patience.no_answer
        pause = promise.attempts.failed(exc, self.now(), patience)
        return exc if pause is None else NotYet(pause)

    def _lost(self, promise: Promise[Any], exc: errors.PromiseExpiredError) -> Exception:
        """After a 410: resending the request under the same number recovers the promise, or
        fails."""
        if promise.resubmit is None or promise.resubmits >= MAX_RESUBMITS:
            return retold(
                exc,
                errors.PromiseExpiredError,
                f"Promise expired for request {promise.request_id}; submit a new request. "
                f"({promise.what}: {exc.detail or 'the server gives no reason'})",
            )
        promise.resubmits += 1
        self._release(promise)
        promise.request_id = promise.resubmit()
        promise.metadata_only = True
        return NotYet(promise.attempts.pause(LOST))

    def _check_deadline(self, promise: Promise[Any]) -> None:
        if self.now() < promise.deadline:
            return
        if promise.attempts.last_error is not None:
            raise promise.attempts.last_error
        raise errors.APITimeoutError(
            f"Timed out while polling future {promise.request_id} of {promise.what} (queue state "
            f"{promise.queue_state[0]}). It may still run there; give a longer poll_timeout."
        )


#: Operations whose results may come as protobuf.
_IN_PROTOBUF = (wire.FORWARD, wire.FORWARD_BACKWARD, wire.SAMPLE)


def _failed(
    promise: Promise[Any], detail: str, how: str, category: object
) -> errors.RequestFailedError:
    return errors.RequestFailedError(
        f"{promise.what} failed on the server: {detail or 'the server gives no reason'} "
        f"(request {promise.request_id}, {how})",
        request_id=promise.request_id,
        category=category,
    )


def _as_object(answer: Answer) -> dict[str, Any]:
    try:
        payload = answer.json()
    except errors.APIResponseValidationError:
        if answer.status != 408:
            raise
        payload = {}
    if answer.status == 408 and not isinstance(payload, dict):
        payload = {}
    if answer.status != 408 and not answer.content.strip():
        raise errors.APIResponseValidationError(
            f"{answer.url} answered {answer.status} with an empty body.", url=answer.url
        )
    if not isinstance(payload, dict):
        raise errors.APIResponseValidationError(
            f"{answer.url} answered with {type(payload).__name__}, not an object.", url=answer.url
        )
    return payload


def _with_sequence_ids(result: T, ids: list[str] | None) -> T:
    """Give samples the sequence ids from the promise."""
    if not ids or not isinstance(result, types.SampleResponse):
        return result
    named = [attrs.evolve(s, sequence_id=i) for s, i in zip(result.sequences, ids)]
    return attrs.evolve(result, sequences=named + result.sequences[len(named) :])
