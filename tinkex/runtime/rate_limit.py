"""Limits of concurrent samples: of one sampler, and of all samplers with the same key.

After a 429, all samplers of the key send fewer requests, and return to the full rate gradually.
Does not know about HTTP.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import tenacity

from tinkex.config import SamplingLimits
from tinkex.runtime.retry import seconds

#: A prompt with more bytes than this gets a longer pause after a 429.
LARGE_PROMPT = 128 * 1024
#: Seconds of pause after a 429 without Retry-After, for small and for large prompts.
SMALL_PAUSE, LARGE_PAUSE = 1.0, 5.0
#: Requests at a time right after a 429; each success then admits one more.
THROTTLED = 10


class Pace:
    """Admits a limited number of requests and bytes at a time, and none during a pause after a 429.

    Its state: the admitted requests and bytes, the current limit, and the end of the pause.
    """

    def __init__(
        self, limits: SamplingLimits, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._changed = threading.Condition()  # guards everything below
        self._requests = 0
        self._bytes = 0
        self._limit = limits.requests_in_dispatch
        self._quiet_until = 0.0

    @contextmanager
    def admitted(
        self, nbytes: int, cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """Wait until a request of *nbytes* may be sent, and hold its place during the block."""
        with self._changed:
            while not cancelled() and not self._admits(nbytes):
                pause = self._quiet_until - self._clock()
                self._changed.wait(min(pause, 1.0) if pause > 0 else 1.0)
            self._requests += 1
            self._bytes += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._requests -= 1
                self._bytes -= nbytes
                self._changed.notify()

    def throttled(self, nbytes: int, retry_after: float | None) -> float:
        """Pause all requests after a 429. Returns the seconds of the pause."""
        usual = tenacity.wait_fixed(LARGE_PAUSE if nbytes > LARGE_PROMPT else SMALL_PAUSE)
        pause = seconds(usual) if retry_after is None else max(retry_after, 0.01)
        with self._changed:
            # An earlier response may have requested a longer pause.
            self._quiet_until = max(self._quiet_until, self._clock() + pause)
            self._limit = min(self._limit, max(THROTTLED, self._limit // 2))
        return pause

    def succeeded(self) -> None:
        """After an accepted request: raise the limit by one, up to the maximum."""
        if self._limit < self._limits.requests_in_dispatch:
            with self._changed:
                self._limit += 1
                self._changed.notify()

    def wake(self) -> None:
        """Wake waiting threads, because one of them has given up."""
        with self._changed:
            self._changed.notify_all()

    @property
    def limit(self) -> int:
        """The current limit of requests at a time."""
        return self._limit

    def _admits(self, nbytes: int) -> bool:
        if self._clock() < self._quiet_until:
            return False
        if self._requests == 0:
            return True  # a single larger request passes if nothing else is in flight
        fits = self._bytes + nbytes <= self._limits.bytes_in_dispatch
        return fits and self._requests < self._limit


class Places:
    """At most *count* samples at a time, from start to end; the rest wait in a queue.

    No thread blocks. A sample with a place calls `leave` once, when it is done.
    """

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()  # guards everything below
        self._free = count
        self._line: deque[Callable[[], None]] = deque()
        self._calling = False

    def enter(self, start: Callable[[], None]) -> None:
        """Call *start* as soon as there is a place, on any thread."""
        with self._lock:
            self._line.append(start)
        self._call_next()

    def leave(self) -> None:
        """Free a place."""
        with self._lock:
            self._free += 1
        self._call_next()

    def _call_next(self) -> None:
        """Assign the free places. One thread at a time, in a loop: a sample that ends as soon as it
        starts would otherwise start the next one recursively."""
        while True:
            with self._lock:
                if self._calling or not self._free or not self._line:
                    return
                self._free -= 1
                self._calling = True
                start = self._line.popleft()
            try:
                start()
            finally:
                with self._lock:
                    self._calling = False


_paces: dict[tuple[str, str], Pace] = {}
_paces_lock = threading.Lock()  # guards _paces


def pace_of(base_url: str, api_key: str, limits: SamplingLimits) -> Pace:
    """The pace shared by all samplers at *base_url* with *api_key* in this process."""
    with _paces_lock:
        return _paces.setdefault((base_url, api_key), Pace(limits))


def wake_all() -> None:
    """Wake all threads that wait for a rate limit, because a session has ended."""
    with _paces_lock:
        paces = list(_paces.values())
    for pace in paces:
        pace.wake()
