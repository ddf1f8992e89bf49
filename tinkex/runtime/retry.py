"""Retry rules: what is retried, and after which pauses, as tenacity strategies for all of tinkex.

A retry sends the same request again because it failed. A poll is repeated because the response was
"not yet"; its pauses are here, too. Sends nothing.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Container
from typing import Any, TypeVar

import attrs
import tenacity

from tinkex import errors
from tinkex.config import check_seconds

R = TypeVar("R")


class Backoff(tenacity.wait.wait_base):
    """Waits as long as the server requests (Retry-After), else an exponential step with jitter.

    Args:
        first, longest: seconds of the first and of the longest step.
        least: the wait is drawn between this fraction of the step and the whole step.
    """

    def __init__(self, first: float, longest: float, least: float = 0.75) -> None:
        self._step = tenacity.wait_exponential(multiplier=first, max=longest)
        self._least = least

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        asked = getattr(failure_of(retry_state), "retry_after", None)
        if asked:  # a Retry-After of 0 is not followed: it would be a busy loop
            return float(asked)
        return self._step(retry_state) * random.uniform(self._least, 1.0)


def seconds(
    wait: tenacity.wait.wait_base, attempt: int = 1, exc: BaseException | None = None
) -> float:
    """The pause of *wait* after attempt number *attempt* (from 1) failed with *exc*.

    For callers that count attempts themselves, because they run on several threads.
    """
    state = tenacity.RetryCallState(None, None, (), {})  # type: ignore[arg-type]
    state.attempt_number = attempt
    if exc is not None:
        state.set_exception((type(exc), exc, exc.__traceback__))
    return wait(state)


def failure_of(state: tenacity.RetryCallState) -> BaseException | None:
    """The exception of the last attempt."""
    return state.outcome.exception() if state.outcome is not None else None


def repeat(
    attempt: Callable[[], R],
    may_help: Callable[[errors.APIError], bool],
    *,
    stop: Callable[[tenacity.RetryCallState], bool],
    wait: Callable[[tenacity.RetryCallState], float],
    sleep: Callable[[float], object],
    note: Callable[[BaseException | None], None] = lambda _: None,
) -> R:
    """Call *attempt* until it returns, a retry cannot help, or *stop* is true.

    *note* is called with each failure before the pause after it.
    """
    try:
        return attempt()  # nearly always succeeds, and is cheaper without tenacity
    except errors.APIError as exc:
        failures = [exc]  # the first failure, for tenacity

    def again() -> R:
        if failures:
            raise failures.pop()
        return attempt()

    return tenacity.Retrying(
        retry=lambda state: isinstance(exc := failure_of(state), errors.APIError) and may_help(exc),
        stop=stop,
        wait=wait,
        sleep=sleep,  # type: ignore[arg-type]
        before_sleep=lambda state: note(failure_of(state)),
        reraise=True,
    )(again)


#: Between polls that were answered "not yet" sooner than a long poll; and while the server has
#: paused the work.
NOT_YET, PAUSED = Backoff(0.02, 2.0), Backoff(1.0, 1.0)
#: After a failed poll; after a lost promise.
POLL_FAILED, LOST = Backoff(0.1, 10.0), Backoff(0.05, 1.0)
#: After a failed poll for all samples, for which all of them wait.
WATCH_FAILED = Backoff(0.5, 0.5, least=1.0)
#: While a server packs an archive: seconds between requests, and number of requests.
PACKING_PAUSE, PACKING_TRIES = 30.0, 6
#: After a broken download; `CUT_TRIES` breaks in a row without progress end it.
CUT, CUT_TRIES = Backoff(0.2, 5.0, least=1.0), 8

#: A poll answered "not yet" sooner than this was not a long poll: pause before the next.
LONG_POLL = 1.0  # seconds

#: Most attempts after responses that may be a proxy's, which must not end a run, or the server's,
#: which should be raised soon. By status; 0 is a success that cannot be read.
FEW_TRIES = {0: 3, 400: 3, 409: 3}


class Attempts:
    """The history of attempts of one request, and the pause before the next one."""

    def __init__(self) -> None:
        self._strays: Counter[int] = Counter()  # by status
        self._pauses = 0  # since the last news
        self._failing_since: float | None = None
        #: Of the last attempt; None if it was answered.
        self.last_error: BaseException | None = None

    def answered(self, *, is_news: bool = False) -> None:
        """Record a valid response; after news, pauses start from the shortest again."""
        self._strays.clear()
        self._failing_since = self.last_error = None
        if is_news:
            self._pauses = 0

    def not_yet(self, took: float, wait: Backoff = NOT_YET) -> float:
        """Seconds to pause after a "not yet" that took *took* seconds: none after a long poll."""
        if took >= LONG_POLL:
            self._pauses = 0
            return 0.0
        return self.pause(wait)

    def may_pass(self, exc: errors.APIError, may_explain: Container[int] = ()) -> bool:
        """Record a failure *exc*; True if another attempt may succeed. *may_explain* is for
        `is_stray`."""
        if not is_stray(exc, may_explain):
            return exc.retryable
        status = getattr(exc, "status", 0)
        self._strays[status] += 1
        return self._strays[status] <= FEW_TRIES[status]

    def failed(
        self, exc: errors.TinkexError, now: float, patience: float, wait: Backoff = POLL_FAILED
    ) -> float | None:
        """Seconds to pause after *exc*; None if attempts have failed for *patience* seconds."""
        self.last_error = exc
        if self._failing_since is None:
            self._failing_since, self._pauses = now, 0
        pause = self.pause(wait, exc)
        return pause if now + pause - self._failing_since < patience else None

    def pause(self, wait: Backoff, exc: BaseException | None = None) -> float:
        """Seconds of the next pause, longer than the previous one."""
        self._pauses += 1
        return seconds(wait, self._pauses, exc)


def _seconds(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    or_none = attribute.name == "budget"
    check_seconds(f"Retry: {attribute.name}", value, or_zero=True, or_none=or_none)


def _statuses(value: object) -> frozenset[int]:
    if isinstance(value, (set, frozenset, list, tuple, range)) and all(
        isinstance(status, int) and 400 <= status <= 599 for status in value
    ):
        return frozenset(value)
    raise TypeError(f"Retry: pass_on must be a set of error statuses (400 to 599), got {value!r}.")


@attrs.frozen
class Retry:
    """When a failed request is sent again.

    Args:
        budget: seconds after which no new attempt begins; 0 is a single attempt; None is long for a
            server that has answered before, and short for one that never has.
        pass_on: error statuses that are raised at once, for the caller to handle.
        first, longest: seconds of the first and of the longest pause. A pause is drawn between half
            of and the whole exponential step, unless the server names one (Retry-After).
    """

    budget: float | None = attrs.field(default=None, validator=_seconds)
    pass_on: frozenset[int] = attrs.field(default=frozenset(), converter=_statuses)
    first: float = attrs.field(default=0.25, validator=_seconds)
    longest: float = attrs.field(default=10.0, validator=_seconds)

    @property
    def wait(self) -> Backoff:
        """The pauses between attempts."""
        return Backoff(self.first, self.longest, least=0.5)


ONCE = Retry(budget=0)


def check_retry(retry_config: object) -> None:
    """Raise TypeError unless *retry_config* is a Retry or None."""
    if retry_config is not None and not isinstance(retry_config, Retry):
        raise TypeError(f"retry_config must be a tinkex.Retry or None, got {retry_config!r}.")


def is_stray(exc: errors.APIError, may_explain: Container[int] = ()) -> bool:
    """True for a response that may be a proxy's: a success that cannot be read, or a 400 or 409
    without a message of the server (which statuses in *may_explain* may have)."""
    if not isinstance(exc, errors.APIStatusError):
        return isinstance(exc, errors.APIResponseValidationError)
    if exc.status not in FEW_TRIES or exc.should_retry is False:
        return False
    return exc.status in may_explain or not (isinstance(exc.body, dict) and exc.detail)


def is_hopeless(exc: errors.APIError, elapsed: float) -> bool:
    """True on first contact for an unknown host, an invalid certificate, or a closed port."""
    cause = str(exc.__cause__)
    if any(word in cause for word in ("NameResolution", "getaddrinfo", "certificate", "SSLError")):
        return True
    return "refused" in cause and elapsed >= 2.0


def may_have_been_seen(exc: errors.APIError) -> bool:
    """True if the server may have executed the request."""
    if isinstance(exc, errors.APIStatusError):
        return exc.status >= 500 or exc.status == 408
    cause = str(exc.__cause__)
    return not any(word in cause for word in ("refused", "NameResolution", "ConnectTimeout"))
