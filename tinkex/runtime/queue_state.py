"""Queue states: a server's reasons why an operation waits, and the observers of them.

Does not know about HTTP; reads decoded answers.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

logger = logging.getLogger("tinkex")

Observer = Callable[[str, "str | None"], None]

PAUSE_LOG_INTERVAL = 60.0  # seconds between two warnings about the same model or sampler


class QueueStateObserver(Protocol):
    """Called when the server reports why an operation waits."""

    def __call__(self, state: str, reason: str | None) -> None:
        """state: active, paused_rate_limit, paused_capacity, ...; reason: the server's text."""


def check_observer(observer: object) -> None:
    """Raise TypeError unless *observer* is None or can be called with a queue state."""
    if observer is not None and not callable(observer):
        raise TypeError(
            f"queue_state_observer must be a function (state, reason), got {observer!r}."
        )


def queue_state(payload: dict[str, Any]) -> tuple[str, str | None]:
    """The queue state in a response: (state, the server's reason)."""
    state = str(payload.get("queue_state") or "active").strip().lower()
    reason = payload.get("queue_state_reason")
    return state, reason if isinstance(reason, str) and reason else None


def tell(observer: Observer, state: str, reason: str | None) -> None:
    """Call a queue state observer; its exceptions are only logged."""
    try:
        observer(state, reason)
    except Exception:
        logger.exception("a queue state observer raised; the wait continues")


def tell_of_refusal(observer: Observer, error: object) -> None:
    """Call an observer with the queue state in a refusal (429, 503), if it has one."""
    body = getattr(error, "body", None)
    if isinstance(body, dict) and body.get("queue_state"):
        tell(observer, *queue_state(body))


class PauseWarning:
    """The default observer: logs a warning about a pause, at most once a minute.

    Args:
        what: the paused model or sampler, for the message.
        reasons: by state, if the server gives none.
        now: the time, in seconds.
    """

    def __init__(self, what: str, reasons: Mapping[str, str], now: Callable[[], float]) -> None:
        self._what = what
        self._reasons = reasons
        self._now = now
        self._lock = threading.Lock()  # guards _logged
        self._logged = -math.inf

    def __call__(self, state: str, reason: str | None = None) -> None:
        if state == "active":
            return
        now = self._now()
        with self._lock:
            if now - self._logged < PAUSE_LOG_INTERVAL:
                return
            self._logged = now
        why = reason or self._reasons.get(state, "unknown")
        logger.warning("%s. Reason: %s", self._what, why)
