"""What a call hands back: futures, and one future made of many.

Every call returns an `OperationFuture`: a concurrent.futures.Future that can be awaited, too. Knows
nothing of servers; polling.py and worker.py resolve what is made here.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger("tinkex")


class OperationFuture(Future, Generic[T]):  # type: ignore[type-arg,unused-ignore]
    """The handle of one operation: a concurrent.futures.Future that can be awaited, too.

    `result(timeout)` raises TimeoutError when *timeout* seconds are over; the operation goes on,
    and `result` may be called again. `cancel()` works until the operation is sent.
    """

    def __init__(self, what: str = "the operation") -> None:
        super().__init__()
        #: What is being done, for messages.
        self.what = what
        #: Called when a failure has been handed to the caller.
        self.on_delivered: Callable[[BaseException], None] | None = None

    def result(self, timeout: float | None = None) -> T:
        """The result, waiting for it *timeout* seconds at most (None: as long as it takes)."""
        exc = self.exception(timeout)
        if exc is not None:
            try:
                raise exc
            finally:
                del exc, self  # or the traceback, which holds this frame, would hold them for long
        value: T = super().result()
        return value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What it failed with, or None; waits like `result`."""
        try:
            exc = super().exception(timeout)
        except concurrent.futures.TimeoutError:
            if not self.done():
                raise self._not_done(timeout) from None
            exc = super().exception()  # it was done just then
        if exc is not None:
            self._delivered(exc)
        return exc

    async def result_async(self, timeout: float | None = None) -> T:
        """The result, for use in a coroutine; a timeout leaves the operation alive."""
        import asyncio  # only here: the SDK is for plain scripts

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

        self.add_done_callback(wake)
        try:
            await asyncio.wait_for(finished, timeout)
        except asyncio.TimeoutError:
            if not self.done():
                raise self._not_done(timeout) from None
        return self.result(0)

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    def _not_done(self, timeout: float | None) -> TimeoutError:
        return TimeoutError(
            f"{self.what} is not done after {timeout} s. It goes on; ask again, or later."
        )

    def _delivered(self, exc: BaseException) -> None:
        if self.on_delivered is not None and not self.cancelled():
            self.on_delivered(exc)

    def __repr__(self) -> str:
        state = "running" if self.running() else "done" if self.done() else "queued"
        return f"<OperationFuture of {self.what}: {state}>"


def fail(future: Future[Any], exc: BaseException) -> None:
    """Give *future* an exception unless it is resolved already (a race that must not raise)."""
    try:
        future.set_exception(exc)
    except concurrent.futures.InvalidStateError:
        logger.debug("a future was resolved before it failed with: %s", exc)


def succeed(future: Future[T], value: T) -> None:
    """Give *future* its result unless it is resolved already."""
    try:
        future.set_result(value)
    except concurrent.futures.InvalidStateError:
        logger.debug("a future was resolved before its result came")


def gather(parts: Sequence[Future[T]], combine: Callable[[list[T]], R], whole: Future[R]) -> None:
    """Resolve *whole* with combine(results in order) when all *parts* are done, or with the first
    exception as soon as there is one."""
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
