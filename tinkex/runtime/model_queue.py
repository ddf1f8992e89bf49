"""The operations of one model, in the order of the calls.

Gives each call its place in the queue, sends it on the model's worker thread, and lets the poller
wait for its result. The training client knows what the operations mean.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from tinkex import errors, types, wire
from tinkex.config import check_seconds
from tinkex.futures import OperationFuture, fail, succeed
from tinkex.runtime import batching, operation_log
from tinkex.runtime.connection import CLOSE_TIMEOUT, HURRIED_TIMEOUT
from tinkex.runtime.queue_state import Observer
from tinkex.runtime.responses import is_missing_route, not_offered
from tinkex.runtime.session import Session
from tinkex.runtime.wait_log import Wait
from tinkex.runtime.worker import OrderedWorker, Turn

T = TypeVar("T")


class ModelQueue:
    """Queues, sends and ends the operations of a model.

    Args:
        name: of the worker thread.
        on_queue_state: called when the server reports why an operation waits.
        first_seq_id: number of the first operation.
        owns_session: True if the session ends with the model.
    """

    def __init__(
        self,
        session: Session,
        model_id: str,
        *,
        name: str,
        on_queue_state: Observer | None = None,
        first_seq_id: int = 1,
        owns_session: bool = False,
    ) -> None:
        self.model_id = model_id
        self._session = session
        self._on_queue_state = on_queue_state
        self._owns_session = owns_session
        self._worker = OrderedWorker(f"tinkex-{name}", first_seq_id=first_seq_id)
        session.dependents.add(self._worker)
        # If the client is dropped without being closed, the thread ends when the queue is empty.
        weakref.finalize(self, self._worker.end).atexit = False
        self._lock = threading.Lock()  # guards both below
        self._ended = ""
        self._unloaded = False

    @property
    def state(self) -> str:
        """A description: numbers of queued and sent operations, or how the queue ended."""
        in_flight = self._session.poller.in_flight(self.model_id)
        return self._ended or f"{self._worker.queued} queued, {in_flight} in flight"

    @property
    def seq_id(self) -> int:
        """The number of the last operation that the server accepted; 0 before the first."""
        return self._worker.seq_id

    # Submitting.

    def put(
        self,
        run: Callable[[Turn, OperationFuture[T]], None],
        what: str,
        tokens: Callable[[], int] = lambda: 0,
        *,
        saves: str = "",
        make: type[OperationFuture[T]] = OperationFuture,
    ) -> OperationFuture[T]:
        """Queue a call.

        Args:
            saves: name for warnings, if the call saves the weights.
            make: the class of the future.
        """
        self.check_open(what)

        def run_unless_unloaded(turn: Turn, future: OperationFuture[T]) -> None:
            if self._unloaded:  # by an earlier call
                raise self._is_ended(what)
            run(turn, future)

        note = partial(operation_log.submitted, model=self.model_id, tokens=tokens)
        future = self._worker.put(run_unless_unloaded, what, note, make)
        self._session.pending.add(self.model_id, future, saves=saves)
        return future

    def operation(
        self,
        operation: wire.Operation[T],
        request: Callable[[int], Any],
        poll_timeout: float | None,
        *,
        saves: str = "",
    ) -> OperationFuture[T]:
        """Queue an operation of one request, which is built when its number is known."""
        check_seconds("poll_timeout", poll_timeout, or_none=True)

        def run(turn: Turn, future: OperationFuture[T]) -> None:
            turn.send(lambda seq_id: self.start(operation, request(seq_id), future, poll_timeout))

        return self.put(run, f"{operation.path} on {self.model_id}", saves=saves)

    def send_batches(
        self,
        turn: Turn,
        operation: wire.Operation[types.ForwardBackwardOutput],
        data: list[types.Datum],
        loss_fn: str,
        settings: dict[str, float | str] | None,
        what: str,
        poll_timeout: float | None = None,
    ) -> list[OperationFuture[types.ForwardBackwardOutput]]:
        """Send *data* in as many requests as needed. Runs on the worker thread."""
        features = self._session.features
        batches = batching.split(
            data, features.fwdbwd_max_chunk_len, features.fwdbwd_max_chunk_bytes_count
        )
        parts = []
        for i, batch in enumerate(batches):
            part = f", part {i + 1} of {len(batches)}" if len(batches) > 1 else ""
            future: OperationFuture[types.ForwardBackwardOutput]
            future = OperationFuture(what + part, turn.progress)
            turn.send(
                lambda seq_id, batch=batch, future=future: self.start(  # type: ignore[misc]
                    operation,
                    types.ForwardBackwardRequest(
                        self.model_id,
                        seq_id,
                        batch,
                        loss_fn,
                        settings,
                        forward_only=operation is wire.FORWARD,
                    ),
                    future,
                    poll_timeout,
                )
            )
            parts.append(future)
        return parts

    def start(
        self,
        operation: wire.Operation[T],
        request: Any,
        future: OperationFuture[T],
        poll_timeout: float | None,
    ) -> None:
        """Send one request; the poller resolves *future*. Runs on the worker thread."""
        is_batch = isinstance(request, types.ForwardBackwardRequest)
        post: Callable[[Any, Wait], Any] = (
            self._session.post_batch if is_batch else partial(self._session.post, operation)
        )
        self._session.start(
            operation,
            partial(post, request),
            future,
            queue=self.model_id,
            poll_timeout=poll_timeout,
            on_queue_state=self._on_queue_state,
            seq_id=getattr(request, "seq_id", None),
        )

    def check_open(self, what: str) -> None:
        if self._ended:
            raise self._is_ended(what)
        self._session.check_open()

    def _is_ended(self, what: str) -> errors.ClientClosedError:
        return errors.ClientClosedError(f"{what} was not sent: {self._ended}.")

    # Ending.

    def unload(self) -> OperationFuture[types.UnloadModelResponse]:
        """Queue the unloading of the model; see `TrainingClient.unload_model`."""
        what = f"unload_model of {self.model_id}"

        def run(turn: Turn, future: OperationFuture[types.UnloadModelResponse]) -> None:
            request = types.UnloadModelRequest(self.model_id)
            done: OperationFuture[types.UnloadModelResponse]
            done = OperationFuture(what, turn.progress)
            try:
                self.start(wire.UNLOAD_MODEL, request, done, None)
                response = turn.wait_for(done)  # later calls need to know the outcome
            except errors.NotFoundError as exc:
                if not is_missing_route(exc):
                    raise
                fail(future, not_offered(exc, wire.UNLOAD_MODEL.path))
                return
            with self._lock:
                self._unloaded = True
                self._ended = f"model {self.model_id} was unloaded"
            if self._owns_session:
                self._session.close()
            succeed(future, response)

        return self.put(run, what)

    def close(self, *, cancel: bool = False, timeout: float | None = None) -> None:
        """Wait for submitted operations, or cancel them; see `TrainingClient.close`."""
        check_seconds("timeout", timeout, or_zero=True, or_none=True)
        patience = self._session.config.patience.close if timeout is None else timeout
        with self._lock:
            self._ended = self._ended or f"the client of model {self.model_id} is closed"
        if self._worker.is_current_thread:  # in a callback, waiting would deadlock
            self._end(cancel=cancel, timeout=CLOSE_TIMEOUT)
            return
        self._worker.end()

        def end(hurried: bool) -> None:
            seconds = HURRIED_TIMEOUT if hurried else min(CLOSE_TIMEOUT, patience)
            self._end(cancel=cancel or hurried, timeout=seconds)

        whose, wait = f"the client of model {self.model_id}", None if cancel else patience
        self._session.end_after_pending(self.model_id, whose, wait, end)

    def _end(self, *, cancel: bool, timeout: float) -> None:
        """End the worker thread and, if this queue owns it, the session."""
        started = time.monotonic()
        self._worker.close(cancel=cancel, timeout=timeout)
        if self._owns_session:
            left = max(HURRIED_TIMEOUT, timeout - (time.monotonic() - started))
            reason = "interrupted" if cancel else "success"
            self._session.close(reason, timeout=min(left, CLOSE_TIMEOUT))
