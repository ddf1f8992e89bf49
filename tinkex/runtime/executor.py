"""Thread pools that do not delay the end of the program, and a budget of bytes.

Does not know about HTTP or operations.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import logging
import os
import threading
import time
import weakref
from collections import deque
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


class GrowingPool(Pool):
    """A pool that begins with few threads, and gets more while tasks wait for something slow.

    Requests to a server nearby are answered so soon that more threads only get in each other's way:
    one holds the interpreter at a time. Where a task takes longer, what waits gets threads a moment
    later: four times as many, or one for each task if no task was done in that time.
    """

    #: Threads at first; seconds until the next look; tasks of a thread in that time that are quick.
    FEW, MOMENT, QUICK = 4, 0.02, 10

    def __init__(self, max_workers: int, name: str) -> None:
        super().__init__(max_workers, name)
        self._most = max_workers
        self._ended = threading.Event()
        self._lock = threading.Lock()  # guards the four below
        self._waiting: deque[tuple[Callable[[], object], Callable[[], object]]] = deque()
        self._running = 0
        self._done = 0
        self._is_watched = False

    def start(
        self,
        function: Callable[..., Any],
        *args: Any,
        dropped: Callable[[], object] = lambda: None,
    ) -> None:
        """See `Pool.start`."""
        with self._lock:
            self._waiting.append((functools.partial(self._run, function, *args), dropped))
            is_few = self._running < min(self.FEW, self._most)
            watch = not is_few and not self._is_watched
            self._running += is_few
            self._is_watched = self._is_watched or watch
        if is_few:
            super().start(self._work, dropped=self._drop)
        if watch:
            super().start(self._grow)
        if self._ended.is_set():
            self._drop()

    def shutdown(self) -> None:
        """See `Pool.shutdown`."""
        self._ended.set()
        super().shutdown()
        self._drop()

    def _work(self) -> None:
        """Do what waits until nothing does. Runs on a thread of the pool."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._running -= 1
                    return
                task, _ = self._waiting.popleft()
            task()
            with self._lock:
                self._done += 1

    def _grow(self) -> None:
        """Add threads as long as tasks wait. Runs on a thread of the pool."""
        while True:
            before = self._done
            self._ended.wait(self.MOMENT)
            with self._lock:
                done, more = self._done - before, 0
                if not self._waiting or self._ended.is_set():
                    self._is_watched = False
                    return
                if done < self.QUICK * self._running:
                    room = min(len(self._waiting), self._most - self._running - 1)
                    more = max(0, min(room, 3 * self._running) if done else room)
                self._running += more
            for _ in range(more):
                super().start(self._work, dropped=self._drop)

    def _drop(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
        for _, dropped in waiting:
            dropped()


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
