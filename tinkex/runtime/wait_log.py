"""Logs a warning when a wait takes long: what for, how long, how many retries.

Does not know about HTTP or operations: callers report the beginning, events and end of a wait. One
daemon thread per log checks the clock, only while there are waits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import attrs

from tinkex.futures import Progress

logger = logging.getLogger("tinkex")


@attrs.define(eq=False)
class Wait:
    """One wait. The waiting thread writes its fields, the log reads them.

    Attributes:
        report_at: when to report it, on the log's clock.
        progress: of the waiting operation, or None.
        on_failure: called with each failure.
    """

    log: WaitLog
    what: str
    detail: str
    since: float
    report_at: float
    retries: int = 0
    last_error: str = ""
    state: str = ""
    progress: Progress | None = None
    on_failure: Callable[[object], None] | None = None

    def failed_once(self, error: object) -> None:
        """Record a failure that will be retried."""
        self.retries += 1
        self.last_error = one_line(error)
        if self.progress is not None:
            self.progress.retries += 1
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s: trying again, as it failed: %s", self._subject, self.last_error)
        if self.on_failure is not None:
            self.on_failure(error)

    def end(self) -> None:
        """End the wait. Safe to call twice."""
        self.log._end(self)

    def __enter__(self) -> Wait:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end()

    def __str__(self) -> str:
        notes = [self.state] if self.state else []
        if self.retries:
            notes.append(f"{self.retries} retries, the last after: {self.last_error}")
        return self._subject + (f" ({'; '.join(notes)})" if notes else "")

    @property
    def _subject(self) -> str:
        return f"{self.what} {self.detail}" if self.detail else self.what


def one_line(error: object) -> str:
    """The text of an error in one line of at most 160 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:157] + "..."


class WaitLog:
    """Reports waits that last longer than *report_after* seconds, then every *report_every*.

    A report is always one line: the longest wait, and the number of others. Of thousands of
    consecutive waits for the same reason, one is reported.
    """

    def __init__(
        self,
        report_after: float = 8.0,
        report_every: float = 60.0,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.report_after = report_after
        self.report_every = report_every
        #: Time of the server's last response, by this log's clock; None if there was none.
        self.last_heard: float | None = None
        #: The time by this log's clock, in seconds.
        self.now = clock
        self._lock = threading.Lock()  # guards the three below
        self._waits: dict[int, Wait] = {}
        self._reported: dict[str, float] = {}  # reasons of waits, and when they were reported
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def begin(self, what: str, detail: str = "", progress: Progress | None = None) -> Wait:
        """Begin a wait; call `end()` on the result.

        *detail* distinguishes waits with the same *what*, which are reported as one.
        """
        now = self.now()
        wait = Wait(self, what, detail, now, now + self.report_after, progress=progress)
        with self._lock:
            self._waits[id(wait)] = wait
            if self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._watch, name="tinkex-wait", daemon=True)
                self._thread.start()
        return wait

    def heard(self) -> None:
        """Record a response of the server."""
        self.last_heard = self.now()

    def close(self) -> None:
        """Stop reporting."""
        self._closed.set()

    def report(self) -> str | None:
        """One line about the overdue waits, if there are any; they are then not due for a while."""
        now = self.now()
        with self._lock:
            recent = {k: at for k, at in self._reported.items() if now - at < self.report_every}
            waits = self._waits.values()
            due = [w for w in waits if w.report_at <= now and w.what not in recent]
            for wait in due:
                wait.report_at = now + self.report_every
            self._reported = recent | {wait.what: now for wait in due}
        if not due:
            return None
        longest = min(due, key=lambda w: w.since)
        others = f", and {len(due) - 1} more" if len(due) > 1 else ""
        heard = ""
        if self.last_heard is None:
            heard = "; the server has not answered yet"
        elif now - self.last_heard >= 1:
            heard = f"; the server last answered {now - self.last_heard:.0f} s ago"
        return f"waiting {now - longest.since:.0f} s for {longest}{others}{heard}"

    def _end(self, wait: Wait) -> None:
        with self._lock:
            self._waits.pop(id(wait), None)

    def _watch(self) -> None:
        """Runs on the log's thread, until there has been no wait for a few seconds."""
        idle = 0
        while idle < 10 and not self._closed.wait(min(0.5, self.report_after / 4)):
            line = self.report()
            if line:
                logger.warning(line)
            with self._lock:
                idle = 0 if self._waits else idle + 1
                if idle >= 10:
                    self._thread = None
