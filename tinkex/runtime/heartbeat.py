"""The heartbeat of a session: tells the server at intervals that its client is alive.

Its thread holds no reference to the session, so that a dropped session can be garbage-collected.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable

from tinkex import errors, types, wire
from tinkex.runtime.responses import is_missing_route
from tinkex.runtime.retry import ONCE
from tinkex.runtime.transport import Transport

logger = logging.getLogger("tinkex")


class Heartbeat(threading.Thread):
    """Sends heartbeats from `start` until *closed* is set, or the server has ended the session.

    Args:
        closed: set when the session is closed or dropped.
        at_end: called on the thread when *closed* is set.
    """

    def __init__(
        self,
        transport: Transport,
        session_id: str,
        closed: threading.Event,
        at_end: Callable[[], object],
    ) -> None:
        super().__init__(name=f"tinkex-heartbeat-{session_id}", daemon=True)
        self._transport = transport
        self._session_id = session_id
        self._closed = closed
        self._at_end = at_end

    def run(self) -> None:
        """Runs on the heartbeat's thread."""
        interval = self._transport.config.patience.heartbeat
        now = self._transport.waits.now
        missed, warned, heard = 0, -math.inf, now()
        known = False  # a heartbeat has succeeded, so the server has this endpoint
        while not self._closed.wait(interval / 4 if missed else interval):
            try:
                self._beat_once()
                missed, heard, known = 0, now(), True
                continue
            except errors.PromiseExpiredError:
                if not self._closed.is_set():
                    logger.warning("the server has ended session %s", self._session_id)
                return
            except Exception as exc:  # the next heartbeat may succeed
                if not known and isinstance(exc, errors.NotFoundError) and is_missing_route(exc):
                    logger.debug("the server knows no heartbeats; none are sent")
                    return
                problem = exc
            missed += 1
            if missed >= 2 and now() - warned >= 60 and not self._closed.is_set():
                warned = now()
                logger.warning(
                    "no heartbeat has reached the server for %.0f s (session %s): %s",
                    now() - heard,
                    self._session_id,
                    problem,
                )
        self._at_end()

    def _beat_once(self) -> None:
        request = types.SessionHeartbeatRequest(self._session_id)
        self._transport.call(wire.SESSION_HEARTBEAT, request, retry=ONCE, timeout=10.0)
