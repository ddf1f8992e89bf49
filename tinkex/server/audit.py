"""The audit log: who did what, when and from where; no data, no keys.

One JSON object a line. Batches, samples and polls are not logged: there are many of them, and they
change nothing but the caller's own models.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path

from tinkex import wire
from tinkex.server.database import iso

logger = logging.getLogger(__name__)

#: Bytes of a file, and how many full files are kept.
FILE_BYTES = 10 * 2**20
FILES = 9
#: Seconds between two log lines about an audit log that cannot be written.
_LOG_SECONDS = 60.0
#: Requests that are not logged, unless they are refused because of their key.
_MANY = {
    wire.PREFIX + path
    for path in (
        "forward", "forward_backward", "optim_step", "asample", "stream_sample", "retrieve_future",
        "retrieve_futures", "session_heartbeat", "telemetry", "client/config",
        "client/dynamic_config", "get_info",
    )
}  # fmt: skip


class _File(RotatingFileHandler):
    """Logs at most once a minute that the audit log cannot be written."""

    _logged_at = -_LOG_SECONDS

    def handleError(self, record: logging.LogRecord) -> None:
        if time.monotonic() - self._logged_at >= _LOG_SECONDS:
            self._logged_at = time.monotonic()
            logger.exception("The audit log cannot be written.")


class Audit:
    """The audit log of one server.

    Args:
        path: its file; None for a server without one.
    """

    def __init__(self, path: Path | None) -> None:
        self._file: _File | None = None
        if path is not None:
            path.parent.mkdir(exist_ok=True, mode=0o700)
            self._file = _File(path, maxBytes=FILE_BYTES, backupCount=FILES, delay=True)

    def note(
        self,
        method: str,
        path: str,
        status: int,
        owner: str,
        key_id: Callable[[], str | None],
        host: str | None,
    ) -> None:
        """Log an answered request.

        Args:
            owner: "" for a request without a valid key.
            key_id: returns `auth.key_id`; host: the client's address.
        """
        denied = status in (401, 403)
        reads = method in ("GET", "HEAD") and not path.endswith("/archive")
        if self._file is None or ((reads or path in _MANY) and not denied):
            return
        entry = {
            "time": iso(time.time()),
            "user": owner or None,
            "key": key_id(),
            "from": host,
            "did": f"{method} {path[:500]}",
            "status": status,
        }
        text = json.dumps(entry)
        self._file.emit(logging.makeLogRecord({"msg": text, "levelno": logging.INFO}))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
