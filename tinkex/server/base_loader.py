"""Reads base models and tokenizers on separate threads, so that slow or hostile ones block nothing.

All operations that need a model wait for the same read. It is cancelled when no operation waits for
it any more, or when it takes too long; a thread that hangs in the file system is then abandoned.
Does not know what a base model consists of.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

from tinkex.server.scheduler import Steps, Wait

logger = logging.getLogger(__name__)

#: Models read at the same time.
AT_ONCE = 2


class Unwanted(ValueError):
    """The read was cancelled, because no operation waited for the model any more."""


class Loading:
    """One read of a base model, for all operations that need it."""

    def __init__(self, base_model: str) -> None:
        self.base_model = base_model
        self.done: Future[Any] = Future()
        self._lock = threading.Lock()  # guards the two below
        self._waiting = 0
        self._stopped = False
        self._started: float | None = None
        self._bytes = (0, 0)

    def wait(self) -> Wait:
        """A `Wait` to yield until `done`. Without a waiting job, the read is cancelled."""
        with self._lock:
            self._waiting += 1
        return Wait(self.done, self._describe, self._leave)

    def read(self, engine: Any) -> None:
        """Read the model, on the caller's thread."""
        self._started = time.monotonic()
        try:
            loaded = engine.read_base(self.base_model, self._on_progress)
        except BaseException as exc:
            self.fail(exc)
        else:
            with suppress(InvalidStateError):  # it took too long
                self.done.set_result(loaded)

    def fail(self, exc: BaseException) -> None:
        """Fail the read, unless it has ended. Its thread stops at the next progress report."""
        with self._lock:
            self._stopped = True
        with suppress(InvalidStateError):
            self.done.set_exception(exc)

    def _on_progress(self, done: int, total: int) -> None:
        self._bytes = done, total
        with self._lock:
            if self._stopped:
                raise Unwanted(f"reading base model {self.base_model!r} was stopped.")

    def _leave(self) -> None:
        with self._lock:
            self._waiting -= 1
            if self._waiting or self.done.done():
                return
        logger.info("No operation waits for base model %r; reading it ends.", self.base_model)
        self.fail(Unwanted(f"reading base model {self.base_model!r} was stopped."))

    def _describe(self) -> str:
        title = f"loading base model {self.base_model!r}"
        if self._started is None:
            return f"{title}: it waits until others are loaded"
        done, total = self._bytes
        seconds = time.monotonic() - self._started
        if not total:
            return f"{title} for {seconds:.0f} s"
        return f"{title}: {done / total:.0%} of {total / 1e6:,.0f} MB read in {seconds:.0f} s"


class BaseLoader:
    """The base models of a server.

    Args:
        seconds: time limit of a read.
    """

    def __init__(self, seconds: float) -> None:
        #: Metadata of the loaded base models, by name.
        self.bases: dict[str, Any] = {}
        self._seconds = seconds
        self._lock = threading.Lock()  # guards everything below
        self._current: dict[str, Loading] = {}
        self._aside: dict[str, Future[None]] = {}
        self._queue: deque[tuple[Loading, Any]] = deque()
        self._running = 0

    def need(self, engine: Any, base_model: str) -> Steps:
        """A part of a job: waits until the base model is in the engine.

        Raises:
            ValueError: If it cannot be loaded, or took too long.
        """
        while not engine.has_base(base_model):
            loading = self._start(engine, base_model)
            yield loading.wait()
            try:
                self._enter(engine, base_model, loading.done.result())
            except Unwanted:  # cancelled just as this job arrived: start again
                continue
        self._note(engine, base_model)

    def aside(self, title: str, read: Callable[[], None]) -> Steps:
        """A part of a job: waits until *read* has been called, on a separate thread.

        It is called once for all jobs that wait for the same *title*. Its exceptions are raised
        here.
        """
        with self._lock:
            done = self._aside.get(title)
            if done is None:
                done = self._aside[title] = Future()
                args = (title, done, read)
                threading.Thread(
                    target=self._read_aside, args=args, name="tinkex-load", daemon=True
                ).start()
        yield Wait(done, lambda: f"reading {title}")
        done.result()

    def _read_aside(self, title: str, done: Future[None], read: Callable[[], None]) -> None:
        outcome: BaseException | None = None
        try:
            read()
        except BaseException as exc:
            outcome = exc
        with self._lock:
            del self._aside[title]
        if outcome is None:
            done.set_result(None)
        else:
            done.set_exception(outcome)

    def preload(
        self,
        engine: Any,
        base_model: str,
        put_chore: Callable[[Callable[[Any], None]], None],
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Load a base model that no job waits for yet.

        Args:
            put_chore: see `Scheduler.put_chore`.
            then: called on the compute thread afterwards, also after a failure, which is logged.
        """

        def enter(engine: Any) -> None:
            try:
                self._enter(engine, base_model, wait.done.result())
            finally:
                wait.leave()
                then()

        if engine.has_base(base_model):
            self._note(engine, base_model)
            then()
            return
        wait = self._start(engine, base_model).wait()
        wait.done.add_done_callback(lambda _: put_chore(enter))

    def _enter(self, engine: Any, base_model: str, loaded: Any) -> None:
        if not engine.has_base(base_model):
            engine.enter_base(base_model, loaded)
        self._note(engine, base_model)

    def _note(self, engine: Any, base_model: str) -> None:
        self.bases[base_model] = engine.base_info(base_model)

    def _start(self, engine: Any, base_model: str) -> Loading:
        """Start reading a model, or join a read in progress."""
        with self._lock:
            loading = self._current.get(base_model)
            if loading is not None and not loading.done.done():
                return loading
            loading = self._current[base_model] = Loading(base_model)
            self._queue.append((loading, engine))
        self._start_next()
        return loading

    def _start_next(self) -> None:
        with self._lock:
            while self._queue and self._queue[0][0].done.done():
                self._queue.popleft()
            if not self._queue or self._running >= AT_ONCE:
                return
            loading, engine = self._queue.popleft()
            self._running += 1
        timer = threading.Timer(self._seconds, self._give_up, [loading])
        timer.daemon = True
        timer.start()
        loading.done.add_done_callback(lambda _: self._ended(loading, timer))
        threading.Thread(
            target=loading.read, args=(engine,), name="tinkex-load", daemon=True
        ).start()

    def _give_up(self, loading: Loading) -> None:
        loading.fail(
            ValueError(
                f"base model {loading.base_model!r} could not be read within {self._seconds:.0f} s;"
                " look at the disk or the network that it is on."
            )
        )

    def _ended(self, loading: Loading, timer: threading.Timer) -> None:
        timer.cancel()
        with self._lock:
            self._running -= 1
            if self._current.get(loading.base_model) is loading:
                del self._current[loading.base_model]
        self._start_next()
