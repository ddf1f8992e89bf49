"""Sends usage events of a session to the service; opt-in (TINKER_TELEMETRY=1).

Events wait in a bounded queue; a daemon thread sends them in batches and drops those that cannot be
sent. Does not know about operations. Events contain no user data, except error texts.
"""

from __future__ import annotations

import datetime
import json
import logging
import platform
import threading
import time
import traceback
import uuid
from collections import deque
from typing import Any

from tinkex import errors, wire
from tinkex.config import PROTOCOL_VERSION
from tinkex.runtime.retry import ONCE
from tinkex.runtime.transport import Transport

logger = logging.getLogger("tinkex")

QUEUE_LIMIT = 10_000
BATCH = 100
INTERVAL = 10.0  # seconds between two batches
CLOSE_TIMEOUT = 2.0  # seconds that close() waits for the last batch


class Reporter:
    """Collects events and sends them. Safe to share between threads."""

    def __init__(self, transport: Transport, session_id: str) -> None:
        self._transport = transport
        self._session_id = session_id
        self._started = time.monotonic()
        self._lock = threading.Lock()  # guards both below
        self._events: deque[dict[str, Any]] = deque()
        self._index = 0
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tinkex-telemetry", daemon=True)
        self.log("SESSION_START")
        self._thread.start()

    def log(self, event: str, severity: str = "INFO", **fields: Any) -> bool:
        """Queue one event. Returns False if the queue is full and the event is dropped."""
        with self._lock:
            if len(self._events) >= QUEUE_LIMIT:
                return False
            now = datetime.datetime.now(datetime.timezone.utc).isoformat()
            self._events.append(
                {
                    "event": event,
                    "event_id": uuid.uuid4().hex,
                    "event_session_index": self._index,
                    "severity": severity,
                    "timestamp": now,
                    **fields,
                }
            )
            self._index += 1
            full = len(self._events) >= BATCH
        if full:
            self._wake.set()
        return True

    def log_event(self, name: str, data: dict[str, Any], severity: str = "INFO") -> bool:
        """Queue an event with a custom name and data."""
        return self.log("GENERIC_EVENT", severity, event_name=name, event_data=data)

    def log_exception(self, exc: BaseException, severity: str = "ERROR") -> bool:
        """Queue an exception with its traceback."""
        return self.log(
            "UNHANDLED_EXCEPTION",
            severity,
            error_type=type(exc).__name__,
            error_message=str(exc),
            traceback="".join(traceback.format_exception(type(exc), exc, exc.__traceback__)),
        )

    def flush(self) -> None:
        """Send queued events on this thread; those that cannot be sent are dropped."""
        while True:
            with self._lock:
                batch = [self._events.popleft() for _ in range(min(BATCH, len(self._events)))]
            if not batch or not self._send(batch):
                return

    def close(self) -> None:
        """Send queued events within two seconds, and stop. Safe to call twice."""
        if self._closed.is_set():
            return
        seconds = int(time.monotonic() - self._started)
        self.log("SESSION_END", duration=str(datetime.timedelta(seconds=seconds)))
        self._closed.set()
        self._wake.set()
        self._thread.join(CLOSE_TIMEOUT)

    def _run(self) -> None:
        """Runs on the reporter's thread."""
        while not self._closed.is_set():
            self._wake.wait(INTERVAL)
            self._wake.clear()
            self.flush()
        self.flush()  # an event may have been added during the last flush

    def _send(self, batch: list[dict[str, Any]]) -> bool:
        body = {
            "session_id": self._session_id,
            "platform": platform.system(),
            "sdk_version": PROTOCOL_VERSION,
            "events": batch,
        }
        try:
            self._transport.send(
                "POST",
                self._transport.url(wire.TELEMETRY.path),
                json.dumps(body, default=str).encode(),
                retry=ONCE,
                timeout=5.0,
                parse=lambda _: None,
            )
            return True
        except errors.TinkexError as exc:
            logger.debug("%d telemetry events were dropped: %s", len(batch), exc)
            return False


def start(transport: Transport, session_id: str) -> Reporter | None:
    """The reporter of a session, or None if telemetry is off."""
    return Reporter(transport, session_id) if transport.config.telemetry else None
