"""Threads and budgets: a pool that never holds up the end of the program, and a limit on bytes.

Knows nothing of HTTP or of operations.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

logger = logging.getLogger("tinkex")

#: What to run, with what, what to do if it never runs, and since when it waits.
_Task = tuple[Callable[..., Any], tuple[Any, ...], Callable[[], object], float]


class DaemonExecutor(concurrent.futures.Executor):
    """A thread pool whose threads never hold up the end of the program.

    concurrent.futures.ThreadPoolExecutor joins its threads when the interpreter exits, and a thread
    of ours may be 40 s into a long poll; so these are daemon threads. When a task waits and no
    thread is idle, one is added at once up to *eager*; beyond that, while tasks keep waiting, more
    are added every few milliseconds as long as the process leaves the processor idle: more threads
    do not make a busy interpreter faster. Threads that stay idle end.
    """

    IDLE_SECONDS = 10.0
    TICK = 0.01  # seconds between two looks at whether to grow
    PATIENCE = 0.25  # seconds a task waits at most before a thread is added, busy or not

    def __init__(self, max_workers: int, name: str, eager: int = 8) -> None:
        self._max_workers = max_workers
        self._eager = min(eager, max_workers)
        self._name = name
        self._ready = threading.Condition()  # guards all below
        self._tasks: deque[_Task] = deque()
        self._threads = 0
        self._idle = 0
        self._numbered = 0
        self._growing = False
        self._closed = False

    def start(
        self,
        function: Callable[..., Any],
        *args: Any,
        dropped: Callable[[], object] = lambda: None,
    ) -> None:
        """Run *function* on a thread of the pool. What it raises is logged, not kept.

        Args:
            dropped: is called instead, if the pool is shut down before *function* could start.
        """
        with self._ready:
            closed = self._closed
            if not closed:
                self._add_task((function, args, dropped, time.monotonic()))
        if closed:
            dropped()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The Executor way: run *fn* and return the future of its result."""
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as exc:
                future.set_exception(exc)

        self.start(run, dropped=future.cancel)
        return future

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = True) -> None:
        """Take nothing more and drop what waits; threads end after what they are doing."""
        with self._ready:
            self._closed = True
            left = list(self._tasks)
            self._tasks.clear()
            self._ready.notify_all()
        for _, _, dropped, _ in left:
            dropped()

    @property
    def thread_count(self) -> int:
        return self._threads

    def _add_task(self, task: _Task) -> None:
        """Call with the lock held."""
        self._tasks.append(task)
        if self._idle >= len(self._tasks):
            self._ready.notify()
        elif self._threads < self._eager:
            self._add_thread()
        elif self._threads < self._max_workers and not self._growing:
            self._growing = True
            threading.Thread(target=self._grow, name=f"{self._name}-grow", daemon=True).start()

    def _add_thread(self) -> None:
        """Call with the lock held."""
        self._threads += 1
        self._numbered += 1
        name = f"{self._name}-{self._numbered}"
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._ready:
                if not self._tasks_come():
                    self._threads -= 1
                    return
                function, args, dropped, _ = self._tasks.popleft()
            try:
                function(*args)
            except BaseException:
                logger.exception("%s: a task raised", self._name)
            del function, args, dropped  # what they hold must not live on while this thread idles

    def _tasks_come(self) -> bool:
        """Wait for a task; False when none came for long, or none will. Call with the lock held."""
        while not self._tasks and not self._closed:
            self._idle += 1
            notified = self._ready.wait(self.IDLE_SECONDS)
            self._idle -= 1
            if not notified:
                break
        return bool(self._tasks)

    def _grow(self) -> None:
        """Add threads while tasks wait. Runs on a thread of its own, as long as that is so."""
        while True:
            wall, cpu = time.monotonic(), time.process_time()
            time.sleep(self.TICK)
            now = time.monotonic()
            busy = time.process_time() - cpu > 0.7 * (now - wall)
            with self._ready:
                if not self._tasks or self._closed or self._threads >= self._max_workers:
                    self._growing = False
                    return
                overdue = now - self._tasks[0][3] > self.PATIENCE
                if busy and not overdue:
                    continue
                room = self._max_workers - self._threads
                wanted = min(len(self._tasks), room, 1 if busy else max(1, self._threads // 2))
                for _ in range(wanted):
                    self._add_thread()


class ByteBudget:
    """At most so many bytes at a time; a single larger one passes when nothing else is held."""

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
