"""Thread pools that do not delay the end of the program, and a budget of bytes.

Does not know about HTTP or operations.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger("tinkex")


class Pool:
    """A ThreadPoolExecutor for tasks that deliver their results themselves.

    Python joins the threads of every ThreadPoolExecutor when the program ends. `end_all` makes this
    fast, even for a thread in the middle of a long poll.
    """

    def __init__(self, max_workers: int, name: str) -> None:
        self._name = name
        self._pid = os.getpid()
        threads: list[threading.Thread] = []
        self._threads = threads
        self._executor = ThreadPoolExecutor(
            max_workers,
            thread_name_prefix=name,
            # Not this pool itself, which would create a reference cycle with its threads.
            initializer=lambda: threads.append(threading.current_thread()),
        )
        _pools.add(self)

    def start(
        self,
        function: Callable[..., Any],
        *args: Any,
        dropped: Callable[[], object] = lambda: None,
    ) -> None:
        """Run *function* on a thread of the pool. Its exceptions are logged.

        Args:
            dropped: called instead if the pool is shut down before *function* starts.
        """
        try:
            task = self._executor.submit(self._run, function, *args)
        except RuntimeError:  # shut down, or the program is ending
            dropped()
        else:
            task.add_done_callback(lambda done: dropped() if done.cancelled() else None)

    def shutdown(self) -> None:
        """Accept no more tasks and drop waiting ones; threads end after their current task."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    @property
    def is_idle(self) -> bool:
        """True if no thread is alive any more, or it belongs to a parent process."""
        return os.getpid() != self._pid or not any(t.is_alive() for t in self._threads)

    def _run(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            function(*args)
        except BaseException:
            logger.exception("%s: a task raised", self._name)


#: All pools of this process that still exist.
_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def end_all(wake: Callable[[], object], seconds: float = 3.0) -> None:
    """At the end of the program: shut all pools down and wait until their threads have ended.

    Args:
        wake: interrupts the waits of threads; called repeatedly, since a thread may be just about
            to wait.
        seconds: time limit. After it, Python itself waits for the remaining threads.
    """
    pools = [pool for pool in list(_pools) if not pool.is_idle]
    for pool in pools:
        pool.shutdown()
    deadline = time.monotonic() + seconds
    wake()  # threads of other pools may wait for the same
    while not all(pool.is_idle for pool in pools) and time.monotonic() < deadline:
        time.sleep(0.01)
        wake()


def on_daemon_thread(function: Callable[[], T], name: str) -> Future[T]:
    """Run *function* on a new thread that does not delay the end of the program."""
    future: Future[T] = concurrent.futures.Future()

    def run() -> None:
        with contextlib.suppress(
            concurrent.futures.InvalidStateError
        ):  # cancelled: no caller waits
            try:
                future.set_result(function())
            except BaseException as exc:
                future.set_exception(exc)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


class ByteBudget:
    """At most *size* bytes at a time; a larger request passes if nothing else is held."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._changed = threading.Condition()  # guards _held
        self._held = 0

    def acquire(self, n: int, timeout: float | None = None) -> bool:
        with self._changed:
            ok = self._changed.wait_for(
                lambda: self._held == 0 or self._held + n <= self._size, timeout
            )
            if ok:
                self._held += n
            return ok

    def release(self, n: int) -> None:
        with self._changed:
            self._held -= n
            self._changed.notify_all()
