"""Futures: the results of calls, and one future made of many.

Every operation returns an `OperationFuture`: a concurrent.futures.Future that can also be awaited.
Does not know about servers; polling.py and worker.py resolve the futures.
"""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from concurrent.futures import Future
from typing import Any, Generic, ParamSpec, TypeVar

from tinkex.types import display

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

logger = logging.getLogger("tinkex")


class Progress:
    """The progress of an operation: for its repr, log lines and traces.

    The requests of one call share it. Written by the threads that work on the operation.

    Attributes:
        began: when it was called; time.monotonic().
        accepted: when the server accepted its last request, on the same clock; None before.
        model: id of the model or sampler.
        tokens: number of tokens sent; 0 if not counted.
        seq_ids, request_ids: of its accepted requests.
        retries: requests that failed and were sent again.
        polls: number of "not yet" responses.
        queue_state: the server's; "" until a poll is answered.
        sent, received: bytes of bodies, in all exchanges.
        span: OpenTelemetry's, or None.
    """

    __slots__ = (
        "accepted",
        "began",
        "model",
        "polls",
        "queue_state",
        "received",
        "request_ids",
        "retries",
        "sent",
        "seq_ids",
        "span",
        "tokens",
    )

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.accepted: float | None = None
        self.model = ""
        self.tokens = 0
        self.seq_ids: tuple[int, ...] = ()
        self.request_ids: tuple[str, ...] = ()
        self.retries = 0
        self.polls = 0
        self.queue_state = ""
        self.sent = 0
        self.received = 0
        self.span: Any = None


class OperationFuture(Future, Generic[T]):  # type: ignore[type-arg,unused-ignore]
    """The handle of one operation: a concurrent.futures.Future that can also be awaited.

    `result(timeout)` raises TimeoutError after *timeout* seconds; the operation continues, and
    `result` may be called again. `cancel()` works until the operation is sent.

    Args:
        what: description of the operation, for messages.
        progress: of the call that this is a part of; by default its own.
    """

    def __init__(self, what: str = "the operation", progress: Progress | None = None) -> None:
        super().__init__()
        self.what = what
        self.progress = progress or Progress()
        #: Called once with (result, exception), before waiting threads wake: a program may end
        #: right after that.
        self.on_end: Callable[[Any, BaseException | None], None] | None = None
        self._pid = os.getpid()
        self._ended: float | None = None  # time of its resolution; time.monotonic()
        #: Called after a failure was raised to, or returned to, the caller.
        self.on_delivered: Callable[[BaseException], None] | None = None
        #: The coroutine of each task that was created from it.
        self._driven: dict[Any, Coroutine[Any, Any, T]] | None = None
        #: True once a failure has been delivered to the caller, and while the caller waits.
        self.is_retrieved = False

    def set_result(self, result: T) -> None:
        """Resolve it; for the creator of the future."""
        self._end(result, None)
        super().set_result(result)

    def set_exception(self, exception: BaseException | None) -> None:
        """Resolve it with a failure; for the creator of the future."""
        self._end(None, exception)
        super().set_exception(exception)

    def cancel(self) -> bool:
        """Cancel the operation, if it is not sent yet. Returns True if it is cancelled."""
        cancelled = super().cancel()
        if cancelled:
            self._end(None, concurrent.futures.CancelledError())
        return cancelled

    def _end(self, result: Any, exc: BaseException | None) -> None:
        if self.done() and not self.cancelled():
            return  # resolved already: the caller raises
        if self._ended is None:
            self._ended = time.monotonic()
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end(result, exc)

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result up to *timeout* seconds (None: without limit), and return it.

        Raises:
            TimeoutError: If it is not done in time.
            RuntimeError: In a forked child of the process that the future belongs to.
            Exception: The failure of the operation.
        """
        exc = self.exception(timeout)
        if exc is not None:
            try:
                raise exc
            finally:
                del exc, self  # otherwise the traceback would keep them alive through this frame
        value: T = super().result()
        return value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The failure, or None if it succeeded; waits like `result`."""
        self._check_process()
        self.is_retrieved = True
        try:
            exc = super().exception(timeout)
        except concurrent.futures.TimeoutError:
            if not self.done():
                self.is_retrieved = False
                raise self._not_done(timeout) from None
            exc = super().exception()  # it was done just then
        if exc is not None:
            self._delivered(exc)
        return exc

    async def result_async(self, timeout: float | None = None) -> T:
        """The result, for use in a coroutine; a timeout leaves the operation alive."""
        import asyncio  # only here: the SDK is for plain scripts

        self._check_process()
        loop = asyncio.get_running_loop()
        finished = loop.create_future()

        def succeed_once() -> None:
            if not finished.done():
                finished.set_result(None)

        def wake(_: Any) -> None:
            try:
                loop.call_soon_threadsafe(succeed_once)
            except RuntimeError:
                logger.debug("%s is done, but the event loop that awaited it is closed", self.what)

        self.is_retrieved = True
        self.add_done_callback(wake)
        try:
            await asyncio.wait_for(finished, timeout)
        except asyncio.TimeoutError:
            if not self.done():
                self.is_retrieved = False
                raise self._not_done(timeout) from None
        except asyncio.CancelledError:
            self.is_retrieved = False
            raise
        return self.result(0)

    async def coroutine(self) -> T:
        """The result, for functions that accept only coroutines, such as asyncio.create_task."""
        return await self.result_async()

    def future(self) -> Future[T]:
        """Itself, as a concurrent.futures.Future."""
        return self

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    # With these three methods it is accepted as a coroutine by asyncio.create_task and asyncio.run.
    # Unlike a coroutine, it may be used in several tasks: each drives its own.

    def send(self, value: Any) -> Any:
        """A step of the task that waits for it; for asyncio."""
        return self._step(lambda driven: driven.send(value))

    def throw(self, *exception: Any) -> Any:
        """Raise in the task that waits for it; for asyncio."""
        return self._step(lambda driven: driven.throw(*exception))

    def close(self) -> None:
        """Do nothing: the operation continues even if nothing waits for it; for asyncio."""

    def _step(self, do: Callable[[Coroutine[Any, Any, T]], Any]) -> Any:
        import asyncio

        task = asyncio.current_task()
        if self._driven is None:
            self._driven = {}
        if task not in self._driven:
            self._driven[task] = self.result_async()
        try:
            return do(self._driven[task])
        except BaseException:
            del self._driven[task]
            raise

    def _check_process(self) -> None:
        """Raise in a forked child: nothing resolves its parent's futures there."""
        if not self.done() and os.getpid() != self._pid:
            raise RuntimeError(
                f"{self.what} was submitted by process {self._pid}; this process ({os.getpid()}) "
                "is a fork of it and cannot receive the result. Call result() before the fork, or "
                "submit the operation with a new client here."
            )

    def _not_done(self, timeout: float | None) -> TimeoutError:
        return TimeoutError(
            f"{self.what} is not done after {timeout} s. It continues; call result() again."
        )

    def _delivered(self, exc: BaseException) -> None:
        if self.on_delivered is not None and not self.cancelled():
            self.on_delivered(exc)

    def __repr__(self) -> str:
        return f"<OperationFuture of {self.what}: {', '.join(self._in_words().values())}>"

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        return display.html_fields(f"OperationFuture of {self.what}", self._in_words())

    def _in_words(self) -> dict[str, str]:
        """State, time, and the last queue state of the server, as text."""
        progress = self.progress
        seconds = (self._ended or time.monotonic()) - progress.began
        words = {"state": self._state_name(), "elapsed": f"{seconds:.1f} s"}
        if progress.request_ids:
            words["request"] = f"request {progress.request_ids[-1]}"
        if not self.done() and progress.queue_state:
            words["queue state"] = f"queue state {progress.queue_state}"
        if not self.done() and progress.retries:
            words["retries"] = f"retries: {progress.retries}"
        if self.done() and not self.cancelled() and (exc := super().exception()) is not None:
            words["failure"] = f"{type(exc).__name__}: {' '.join(str(exc).split())[:200]}"
        return words

    def _state_name(self) -> str:
        if self.cancelled():
            return "cancelled"
        if self.done():
            return "done" if super().exception() is None else "failed"
        return "running" if self.running() else "queued"


def fail(future: Future[Any], exc: BaseException) -> None:
    """Resolve *future* with an exception, unless it is resolved already."""
    try:
        future.set_exception(exc)
    except concurrent.futures.InvalidStateError:
        logger.debug("a future was resolved before it failed with: %s", exc)


def succeed(future: Future[T], value: T) -> None:
    """Resolve *future* with its result, unless it is resolved already."""
    try:
        future.set_result(value)
    except concurrent.futures.InvalidStateError:
        logger.debug("a future was resolved before its result came")


def gather(parts: Sequence[Future[T]], combine: Callable[[list[T]], R], whole: Future[R]) -> None:
    """Resolve *whole* with combine(results in order) when all *parts* are done, or with the first
    exception at once."""
    lock = threading.Lock()  # guards left: parts are resolved on several threads
    left = len(parts)

    def part_is_done(part: Future[T]) -> None:
        nonlocal left
        exc = concurrent.futures.CancelledError() if part.cancelled() else part.exception()
        if exc is not None:
            fail(whole, exc)
            return
        with lock:
            left -= 1
            last = left == 0
        if last and not whole.done():
            try:
                succeed(whole, combine([part.result() for part in parts]))
            except BaseException as problem:
                fail(whole, problem)

    for part in parts:
        part.add_done_callback(part_is_done)


# The `..._async` names of methods, for scripts written for the official SDK's asyncio calls.


def awaits_result(method: Callable[P, Future[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The twin of a method that returns a future: a coroutine of the result."""

    async def twin(*args: P.args, **kwargs: P.kwargs) -> T:
        future: Any = method(*args, **kwargs)
        result: T = await future
        return result

    return _named_after(method, twin, "awaiting the result")


def awaits_future(method: Callable[P, R]) -> Callable[P, Coroutine[Any, Any, R]]:
    """The twin of a method that submits: a coroutine of the future, submitted by `await`."""

    async def twin(*args: P.args, **kwargs: P.kwargs) -> R:
        return method(*args, **kwargs)

    return _named_after(method, twin, "submitted by `await`, which gives the future")


def awaits_value(method: Callable[P, R]) -> Callable[P, Coroutine[Any, Any, R]]:
    """The twin of a method that waits: a coroutine that waits on another thread."""

    async def twin(*args: P.args, **kwargs: P.kwargs) -> R:
        import asyncio  # only here: the SDK is for plain scripts

        return await asyncio.to_thread(method, *args, **kwargs)

    return _named_after(method, twin, "on another thread, for use in a coroutine")


def _named_after(method: Callable[..., Any], twin: Callable[P, R], how: str) -> Callable[P, R]:
    """*twin* with the signature of *method*, and a docstring that refers to it."""
    name = method.__name__
    twin = functools.wraps(method)(twin)
    twin.__name__ = f"{name}_async"
    twin.__qualname__ = f"{method.__qualname__}_async"
    twin.__doc__ = f"`{name}`, {how}."
    return twin
