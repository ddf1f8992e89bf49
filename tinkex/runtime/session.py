"""The shared state of a session's clients: connection, poller, heartbeat, numbers, features.

Does not know what the operations are for.
"""

from __future__ import annotations

import heapq
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeVar

from tinkex import config, errors, types, wire
from tinkex.futures import OperationFuture, fail, succeed
from tinkex.runtime import (
    embedded,
    operation_log,
    rate_limit,
    telemetry,
)
from tinkex.runtime.connection import CLOSE_TIMEOUT, HURRIED_TIMEOUT, Connection
from tinkex.runtime.executor import GrowingPool, Pool
from tinkex.runtime.heartbeat import Heartbeat
from tinkex.runtime.pending import PendingOperations, describe, drop
from tinkex.runtime.polling import Poller, Promise
from tinkex.runtime.queue_state import tell_of_refusal
from tinkex.runtime.responses import Answer, is_missing_route, not_offered
from tinkex.runtime.retry import ONCE, Retry
from tinkex.runtime.transport import Transport
from tinkex.runtime.wait_log import Wait

T = TypeVar("T")

logger = logging.getLogger("tinkex")


class Dependent(Protocol):
    """An object with threads that are useless without the session."""

    def end(self) -> None:
        """Accept nothing new and end soon; returns at once."""


class Numbers:
    """Hands out 0, 1, 2, ...; a returned number is handed out again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards both below
        self._next = 0
        self._returned: list[int] = []

    def take(self) -> int:
        with self._lock:
            if self._returned:
                return heapq.heappop(self._returned)
            self._next += 1
            return self._next - 1

    @contextmanager
    def lent(self) -> Iterator[int]:
        """A number, which is returned if its use fails and the server cannot have seen it."""
        number = self.take()
        try:
            yield number
        except Exception as exc:
            if not getattr(exc, "outcome_unknown", False):
                with self._lock:
                    heapq.heappush(self._returned, number)
            raise


class Session(Connection):
    """A session on the server, kept alive by a heartbeat.

    States: open (from the constructor, which creates or joins it on the server) -> closed.
    """

    def __init__(
        self,
        settings: config.Config,
        *,
        session_id: str | None = None,
        user_metadata: dict[str, Any] | None = None,
        display_name: str | None = None,
        transport: Transport | None = None,
        engine: embedded.EmbeddedEngine | None = None,
        poller: Poller | None = None,
        heartbeat: bool = True,
    ) -> None:
        super().__init__(settings, transport=transport, engine=engine)
        self.poller = poller or Poller(
            self.transport,
            max_workers=settings.sampling.connections,
            max_response_bytes=self.features.inflight_response_bytes_semaphore_size,
        )
        self.model_numbers = Numbers()
        #: Shared by create_sampling_session and unnamed save_weights_for_sampler.
        self.sampler_numbers = Numbers()
        #: True if the server creates a model from a checkpoint in one request; None until known.
        self.restores_at_once: bool | None = None
        self._background = Pool(16, "tinkex-background")
        #: Submits samples.
        self.sample_pool = GrowingPool(settings.sampling.connections, "tinkex-sample")
        #: Objects started by the session's clients, which end with the session.
        self.dependents: weakref.WeakSet[Dependent] = weakref.WeakSet()
        #: Unfinished operations of the session's clients.
        self.pending = PendingOperations()
        self._closing = threading.Event()
        self._owns_session = session_id is None
        try:
            self.session_id = session_id or self._create(user_metadata, display_name)
            logger.info("session %s on %s", self.session_id, settings.base_url)
        except BaseException:
            Connection.close(self)
            raise
        self.telemetry = telemetry.start(self.transport, self.session_id)
        dropped = threading.Event()
        self._heart = Heartbeat(
            self.transport,
            self.session_id,
            self.closed,
            partial(_let_go_if_dropped, dropped, self.transport, self.telemetry, engine),
        )
        if heartbeat:
            self._heart.start()
        # A program may forget to close it. Garbage collection must not take time, so the
        # heartbeat's thread closes the connections.
        weakref.finalize(self, _note_dropped, dropped, self.closed).atexit = False
        open_sessions.add(self)

    def _create(self, user_metadata: dict[str, Any] | None, display_name: str | None) -> str:
        created = self.transport.call(
            wire.CREATE_SESSION,
            types.CreateSessionRequest(
                tags=list(self.config.tags) or ["tinkex"],
                user_metadata=user_metadata,
                sdk_version=config.PROTOCOL_VERSION,
                project_id=self.config.project_id,
                display_name=display_name,
            ),
        )
        for level, message in (
            (logging.INFO, created.info_message),
            (logging.WARNING, created.warning_message),
            (logging.ERROR, created.error_message),
        ):
            if message:
                logger.log(level, "the server says: %s", message)
        return created.session_id

    # Operations.

    def start(
        self,
        operation: wire.Operation[T],
        send: Callable[[Wait], T | types.Promise],
        future: OperationFuture[T],
        *,
        queue: str,
        ordered: bool = True,
        poll_timeout: float | None = None,
        on_queue_state: Callable[[str, str | None], None] | None = None,
        watcher: Callable[[Promise[Any]], None] | None = None,
        wait: Wait | None = None,
        seq_id: int | None = None,
    ) -> None:
        """Send one operation; the poller resolves *future* with its result.

        *send* posts the request and returns the server's promise, or the result itself from servers
        that answer at once. If it raises, the operation was not accepted, and this method raises
        the same. *watcher* waits for the promise instead of the poller, and handles lost promises.
        *wait* records failures; None begins a new one.
        """
        self.check_usable()
        begin = partial(self.transport.waits.begin, f"the server to accept {future.what}")
        with nullcontext(wait) if wait is not None else begin() as wait:
            wait.progress = future.progress
            if on_queue_state is not None:
                wait.on_failure = partial(tell_of_refusal, on_queue_state)
            try:
                answer = send(wait)
            except errors.APIStatusError as exc:
                if is_missing_route(exc):
                    raise not_offered(exc, operation.path) from exc
                raise
        if not isinstance(answer, types.Promise):
            operation_log.accepted(future, seq_id, "")
            succeed(future, answer)
            return
        operation_log.accepted(future, seq_id, answer.request_id)
        deadline = self.poller.now() + (math.inf if poll_timeout is None else poll_timeout)
        promise = Promise(
            answer.request_id,
            operation,
            future,
            self.transport.waits.begin(future.what, answer.request_id, future.progress),
            queue=queue,
            deadline=deadline,
            resubmit=partial(self._resubmit, send) if ordered else None,
            on_queue_state=on_queue_state,
            sequence_ids=answer.sample_sequence_ids,
        )
        if watcher is not None:
            watcher(promise)
        else:
            self.poller.watch(promise, ordered=ordered)

    def _resubmit(self, send: Callable[[Wait], Any]) -> str:
        with self.transport.waits.begin("the server to find a lost operation again") as wait:
            answer = send(wait)
        if not isinstance(answer, types.Promise):
            raise errors.APIResponseValidationError("a resend was answered without a request_id")
        return answer.request_id

    def post(
        self,
        operation: wire.Operation[T],
        request: Any,
        wait: Wait,
        *,
        retry: Retry | None = None,
        headers: dict[str, str] | None = None,
    ) -> T | types.Promise:
        """Post *request* as JSON; return the promise, or the result if the server has it at
        once."""
        return self.transport.send(
            operation.method,
            self.transport.url(operation.path),
            wire.dumps(wire.to_json(request, operation.tag)),
            headers=headers,
            most_bytes=operation.most_bytes,
            retry=retry,
            parse=partial(self._promise_or_result, operation),
            wait=wait,
        )

    def post_batch(
        self, request: types.ForwardBackwardRequest, wait: Wait
    ) -> types.ForwardBackwardOutput | types.Promise:
        """Post a batch in the server's dialect, which the first batch detects."""
        if self.protobuf is False:
            return self._post_batch(request, wait, protobuf=False)
        try:
            answer = self._post_batch(request, wait, protobuf=True)
        except errors.APIStatusError as exc:
            if self.protobuf or exc.status not in JSON_ONLY:
                raise
            answer = self._post_batch(request, wait, protobuf=False)
            logger.info("%s takes JSON only; protobuf is not tried again", self.config.base_url)
            self.protobuf = False
            return answer
        self.protobuf = True
        return answer

    def _post_batch(
        self, request: types.ForwardBackwardRequest, wait: Wait, *, protobuf: bool
    ) -> types.ForwardBackwardOutput | types.Promise:
        path, content_type, encoding, body = wire.encode_request(
            request, protobuf, compress=protobuf and self.features.proto_compress_fwdbwd
        )
        headers = {"Content-Type": content_type}
        if encoding:
            headers["Content-Encoding"] = encoding
        # Until the dialect is known, such a refusal means that the server does not accept protobuf.
        probing = protobuf and self.protobuf is None
        return self.transport.send(
            "POST",
            self.transport.url(path),
            body,
            headers=headers,
            most_bytes=wire.FORWARD_BACKWARD.most_bytes,
            retry=Retry(pass_on=JSON_ONLY) if probing else None,
            parse=partial(self._promise_or_result, wire.FORWARD_BACKWARD),
            wait=wait,
        )

    def _promise_or_result(self, operation: wire.Operation[T], answer: Answer) -> T | types.Promise:
        payload = answer.json()
        if isinstance(payload, dict) and isinstance(payload.get("request_id"), (str, int)):
            payload = {**payload, "request_id": str(payload["request_id"])}
            return self.transport.structure(types.Promise, payload, answer.url)
        if not payload and operation is not wire.UNLOAD_MODEL:
            raise errors.APIResponseValidationError(
                f"Invalid {operation.path} response: {answer.url} gave neither a request_id nor a "
                "result.",
                url=answer.url,
            )
        return self.transport.structure_result(operation, payload, answer.url)

    def in_background(self, function: Callable[[], T], what: str) -> OperationFuture[T]:
        """Run *function*, which waits for the server, on a thread; returns a future."""
        self.check_open()
        future: OperationFuture[T] = OperationFuture(what)

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                succeed(future, function())
            except BaseException as exc:
                fail(future, exc)

        closed = errors.ClientClosedError(f"{what} was not begun: the session was closed.")
        self._background.start(run, dropped=lambda: fail(future, closed))
        return future

    # The end.

    def check_open(self) -> None:
        """Raise ClientClosedError if the session accepts no new operations."""
        if self._closing.is_set():
            raise errors.ClientClosedError("The session is closed. Make a new ServiceClient.")
        self.check_usable()

    def wait_for_pending(self, owner: str | None, seconds: float) -> str:
        """Wait for the operations of *owner* (None: all owners); returns a description of the rest.

        Gives up after *seconds*, when the session is closed, or when the server has not answered
        for `patience.no_answer`.
        """
        if not seconds or os.getpid() != self.pid:
            return describe(self.pending.open(owner))
        waits = self.transport.waits
        began, patience = waits.now(), self.config.patience.no_answer

        def is_hopeless() -> bool:
            heard = max(began, waits.last_heard or began)
            return self.is_closed or waits.now() - heard >= patience

        with waits.begin("what was submitted to be done before closing"):
            return describe(self.pending.wait(owner, seconds, is_hopeless))

    def end_after_pending(
        self, owner: str | None, whose: str, seconds: float | None, end: Callable[[bool], object]
    ) -> None:
        """Wait for the operations of *owner*, call *end*, and report dropped operations.

        Args:
            owner: as for `wait_for_pending`.
            whose: the client that ends, for messages.
            seconds: time limit of the wait; None does not wait, and only logs dropped operations.
            end: called with True if it must be fast: after Ctrl-C.

        Raises:
            ClientClosedError: If operations are dropped although they were waited for.
        """
        try:
            left = self.wait_for_pending(owner, seconds or 0.0)
        except BaseException:  # Ctrl-C: do not wait
            left = describe(self.pending.open(owner))
            end(True)
            drop(left, whose, None)
            raise
        end(False)
        self.pending.report(owner)
        drop(left, whose, seconds)

    def finish(
        self,
        reason: str = "success",
        detail: str | None = None,
        timeout: float = CLOSE_TIMEOUT,
        *,
        wait: float | None = None,
    ) -> None:
        """End the session: tell the server (once), stop the threads. Safe to call twice.

        Args:
            reason: "success", "errored" or "interrupted".
            timeout: time limit, in seconds, for telling the server.
            wait: seconds to wait before that; see `end_after_pending`.
        """
        if self.is_closed:
            return
        self._closing.set()  # otherwise the wait might never end

        def end(hurried: bool) -> None:
            why, seconds = ("interrupted", HURRIED_TIMEOUT) if hurried else (reason, timeout)
            self.close(why, detail, seconds)

        self.end_after_pending(None, f"session {self.session_id}", wait, end)

    def close(
        self, reason: str = "success", detail: str | None = None, timeout: float = CLOSE_TIMEOUT
    ) -> None:
        """`finish` without waiting for operations."""
        self._closing.set()
        if not self.begin_closing():
            return
        started = time.monotonic()
        if os.getpid() == self.pid:
            self._stop_threads()
            self._say_goodbye(reason, detail, timeout)
        left = timeout - (time.monotonic() - started)
        self.let_go(min(max(left, HURRIED_TIMEOUT), CLOSE_TIMEOUT))
        self.pending.report()

    def _stop_threads(self) -> None:
        for dependent in list(self.dependents):
            dependent.end()
        self.poller.close()
        self._background.shutdown()
        self.sample_pool.shutdown()
        rate_limit.wake_all()

    def end_with_program(self, wait: float) -> str:
        """Wait up to *wait* seconds for submitted operations, then stop the threads.

        Nothing is sent to the server: other processes may share the session, as pickled clients do.
        Returns a description of the dropped operations.
        """
        self._closing.set()
        left = self.wait_for_pending(None, wait)
        if self.begin_closing():
            self._stop_threads()
            self.transport.close()
        return left

    @property
    def ends_with_this_process(self) -> bool:
        """True if it is open and was not inherited from a parent process."""
        return not self.is_closed and os.getpid() == self.pid

    def _say_goodbye(self, reason: str, detail: str | None, timeout: float) -> None:
        """Send the last telemetry and finish the session; on a thread, as the server may hang."""

        def run() -> None:
            if self.telemetry is not None:
                self.telemetry.close()
            if self._owns_session:
                request = types.FinishSessionRequest({"type": reason}, detail)
                try:
                    self.transport.call(
                        wire.FINISH_SESSION,
                        request,
                        retry=ONCE,
                        timeout=2.0,
                        session_id=self.session_id,
                    )
                except errors.TinkexError as exc:
                    logger.debug("the end of session %s was not reported: %s", self.session_id, exc)

        last = threading.Thread(target=run, name="tinkex-goodbye", daemon=True)
        last.start()
        last.join(max(timeout, 0))


def _note_dropped(dropped: threading.Event, closed: threading.Event) -> None:
    if not closed.is_set():
        dropped.set()
        closed.set()


def _let_go_if_dropped(
    dropped: threading.Event,
    transport: Transport,
    reporter: telemetry.Reporter | None,
    engine: embedded.EmbeddedEngine | None,
) -> None:
    """Like `close`, for a garbage-collected session, which the server ends after a timeout."""
    if not dropped.is_set():
        return
    if reporter is not None:
        reporter.close()
    transport.close()
    if engine is not None:
        embedded.release(engine)


#: Statuses of JSON-only servers for a protobuf body: 415, 422, or a failure to parse it.
JSON_ONLY = frozenset({400, 415, 422, 500})


#: All existing sessions of this process.
open_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
