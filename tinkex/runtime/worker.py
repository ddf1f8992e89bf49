"""The ordered worker: one thread that makes calls in the order in which they were put.

Does not know about HTTP or what a call means; takes callables.
"""

from __future__ import annotations

import concurrent.futures
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import attrs

from tinkex import errors
from tinkex.futures import OperationFuture, Progress, fail

T = TypeVar("T")

logger = logging.getLogger("tinkex")


class Turn:
    """A call's turn to send. Each send gets the next seq_id; a refused send returns it."""

    def __init__(self, worker: OrderedWorker, progress: Progress | None = None) -> None:
        self._worker = worker
        #: Progress of the call, for the futures of its parts.
        self.progress = progress
        #: The numbers of this turn's accepted sends.
        self.accepted: list[int] = []

    def send(self, function: Callable[[int], T]) -> T:
        """Call *function* with the next seq_id. If it raises, this turn sends nothing more."""
        seq_id = self._worker._seq_id + 1
        try:
            result = function(seq_id)
        except BaseException as exc:
            raise SubmitFailed(exc, self.accepted) from exc
        self._worker._seq_id = seq_id
        self.accepted.append(seq_id)
        return result

    def wait_for(self, future: OperationFuture[T]) -> T:
        """Wait for the result of an earlier send of this turn. Aborted when the worker closes."""
        while not concurrent.futures.wait([future], timeout=0.5).done:
            if self._worker._abandon.is_set():
                raise errors.ClientClosedError(
                    "The client was closed before this call's second pass."
                )
        return future.result()


class SubmitFailed(Exception):
    """A send failed permanently; the caller gets `cause`."""

    def __init__(self, cause: BaseException, accepted: list[int]) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.accepted = accepted


@attrs.define(eq=False)
class _Call:
    """A queued call.

    Attributes:
        run: makes the call's sends, and ensures that the future is resolved.
        seen: how many failures had been delivered to the caller when it was put.
    """

    run: Callable[[Turn, OperationFuture[Any]], None]
    future: OperationFuture[Any]
    seen: int


class OrderedWorker:
    """Makes calls one at a time, in the order in which they were put.

    The place in the queue is taken on the caller's thread, in put(): the call put first is sent
    first. seq_ids belong to the worker thread and are contiguous from 1.

    States:
        open     -> failed   when a call raises: a send failed for good, or its own work did
        failed   -> open     when that failure has been delivered: raised to the caller by result()
                             or exception() of the failed call or of one that failed with it.
                             Only calls put after that are sent; those before fail, too.
        failed   -> broken   instead, when the server may have taken the lost send: then the next
                             number is not known, and every later call fails.
        any      -> closed   by close()
    """

    def __init__(self, name: str, *, first_seq_id: int = 1) -> None:
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._seq_id = first_seq_id - 1
        self._name = name
        self._lock = threading.Lock()  # guards _closed, _delivered, _queued and the order of put()
        self._closed = False
        self._delivered = 0
        self._queued = 0
        self._failure: BaseException | None = None  # used only on the worker thread
        self._failed_at = 0
        self._broken: BaseException | None = None
        self._abandon = threading.Event()
        self._thread: threading.Thread | None = None

    def put(
        self,
        run: Callable[[Turn, OperationFuture[T]], None],
        what: str,
        on_put: Callable[[OperationFuture[T]], None] = lambda future: None,
        make: type[OperationFuture[T]] = OperationFuture,
    ) -> OperationFuture[T]:
        """Take the next place in the queue, and return the future at once.

        Args:
            on_put: called with the future before *run* can be called.
            make: the class of the future.

        Raises:
            ClientClosedError: After close().
        """
        future = make(what)
        with self._lock:
            if self._closed:
                raise errors.ClientClosedError(
                    f"{what} was not sent: the client is closed. Make a new one."
                )
            if self._thread is None:
                self._thread = threading.Thread(target=self._drain, name=self._name, daemon=True)
                self._thread.start()
            on_put(future)
            self._queued += 1
            self._queue.put(_Call(run, future, self._delivered))
        return future

    @property
    def queued(self) -> int:
        """The number of calls that wait for their turn."""
        return self._queued

    @property
    def is_current_thread(self) -> bool:
        """True on the worker's own thread, where waiting for its calls would deadlock."""
        return self._thread is threading.current_thread()

    @property
    def seq_id(self) -> int:
        """The number of the last accepted send; 0 before the first."""
        return self._seq_id

    def close(self, *, cancel: bool = False, timeout: float | None = None) -> bool:
        """Accept no more calls; make (or cancel) the queued ones, then end the thread.

        Returns True if the thread ended within *timeout* seconds; otherwise the queued calls fail.
        Safe to call twice, and from a future's callback.
        """
        if cancel:
            self._abandon.set()
        self.end()
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(timeout)
        if thread.is_alive():
            self._abandon.set()
            self._fail_waiting()
        return not thread.is_alive()

    def end(self) -> None:
        """Accept no more calls, and end the thread after the queued ones; returns at once."""
        with self._lock:
            first = not self._closed
            self._closed = True
        if first:
            self._queue.put(None)

    def _drain(self) -> None:
        """Runs on the worker thread."""
        while (call := self._queue.get()) is not None:
            self._taken()
            if self._abandon.is_set():
                _drop(call)
            elif call.future.set_running_or_notify_cancel():
                self._make(call)
            del call

    def _make(self, call: _Call) -> None:
        root = self._failure_before(call)
        if root is not None:
            self._fail(call, _prior(root, self._broken is not None), root)
            return
        try:
            call.run(Turn(self, call.future.progress), call.future)
        except BaseException as exc:
            cause = _cause(exc)
            self._failure, self._failed_at = cause, self._delivered
            if isinstance(exc, SubmitFailed) and getattr(cause, "outcome_unknown", False):
                self._broken = cause
            self._fail(call, cause, cause)

    def _failure_before(self, call: _Call) -> BaseException | None:
        if self._broken is not None:
            return self._broken
        if self._failure is not None and call.seen > self._failed_at:
            self._failure = None  # put after the caller had seen the failure
        return self._failure

    def _fail(self, call: _Call, exc: BaseException, root: BaseException) -> None:
        call.future.on_delivered = lambda _: self._deliver(root)
        fail(call.future, exc)

    def _deliver(self, root: BaseException) -> None:
        """Record that the caller has seen *root*. Runs on the caller's thread."""
        with self._lock:
            if self._failure is root and self._delivered == self._failed_at:
                self._delivered += 1

    def _fail_waiting(self) -> None:
        while True:
            try:
                call = self._queue.get_nowait()
            except queue.Empty:
                break
            if call is not None:
                self._taken()
                _drop(call)
        self._queue.put(None)

    def _taken(self) -> None:
        with self._lock:
            self._queued -= 1


def _drop(call: _Call) -> None:
    if not call.future.cancel():
        what = f"{call.future.what} was not sent: the client was closed."
        fail(call.future, errors.ClientClosedError(what))


def _prior(root: BaseException, broken: bool) -> errors.PriorOperationFailedError:
    advice = (
        "Whether the server carried that operation out is not known, so this client cannot "
        "continue: load the last checkpoint into a new training client."
        if broken
        else "Look at that failure's result(); then call again."
    )
    error = errors.PriorOperationFailedError(
        f"Not sent: an operation before it failed ({type(root).__name__}: {root}). {advice}"
    )
    error.__cause__ = root
    return error


def _cause(exc: BaseException) -> BaseException:
    """The exception for the caller: the call's own (of a user's loss function, for example)
    unchanged; for a failed send its cause, with the sends accepted before it."""
    if not isinstance(exc, SubmitFailed):
        return exc
    if exc.accepted and isinstance(exc.cause, errors.TinkexError):
        numbers = ", ".join(map(str, exc.accepted))
        exc.cause.args = (
            f"{exc.cause} ({len(exc.accepted)} part(s) before it were accepted, as seq_id "
            f"{numbers}; they took effect on the server.)",
        )
    return exc.cause
