"""Limits of an HTTP exchange: its total time, and the size of its response.

The timeouts of requests apply to each read, so a peer that sends a byte a second never exceeds one.
Knows about sockets, not HTTP.
"""

from __future__ import annotations

import io
import math
import time
from typing import Any

#: Bytes of a request and its response for which no time is added.
FREE = 1 << 16
#: One second is added for this many further bytes.
SLOWEST = 50_000


class UnusableAnswerError(OSError):
    """A response that is not read: too large for its kind, or in a form that was not requested."""


class ExchangeLimits(tuple[float, float]):
    """The limits of one exchange, and its progress.

    For requests and other adapters it is a timeout: (seconds to connect, seconds for each read).
    The connections of `http_adapter` apply it to the whole exchange: `seconds` from the first byte
    sent to the last one received, plus one for every 50 kB beyond the first 64 KiB.

    Attributes:
        most_bytes: of the response including its head, as sent and again after decompression.
        sent, received: bytes so far; the thread of the exchange counts them.
    """

    seconds: float
    most_bytes: float
    sent: int
    received: int

    def __new__(
        cls, connect: float, seconds: float, most_bytes: float = math.inf
    ) -> ExchangeLimits:
        made = super().__new__(cls, (min(connect, seconds), seconds))
        made.seconds = seconds
        made.most_bytes = most_bytes
        made.begin_part()
        return made

    def begin_part(self) -> None:
        """Restart the limits of time and bytes, for the next part of a stream."""
        self._began = time.monotonic()
        self.sent = self.received = 0

    def left(self) -> float:
        """The remaining seconds. TimeoutError if there are none."""
        moved = self.sent + self.received - FREE
        end = self._began + self.seconds
        if moved > 0:
            end += moved / SLOWEST
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"the exchange took more than {self.seconds:.0f} s.")
        return left

    def take(self, count: int) -> None:
        """Count *count* received bytes. UnusableAnswerError if the total is too large."""
        self.received += count
        self.expect(self.received)

    def expect(self, count: int) -> None:
        """Raise UnusableAnswerError if a response of *count* bytes is too large."""
        if count > self.most_bytes:
            raise UnusableAnswerError(
                f"the answer has more than {self.most_bytes:,} bytes, the most of its kind"
            )

    def send(self, sock: Any, data: bytes) -> None:
        """Write *data* to *sock* within the limits, which `sendall` over TLS ignores."""
        view = memoryview(data)
        while view:
            sock.settimeout(self.left())
            count = sock.send(view)
            self.sent += count
            view = view[count:]


def reader(
    sock: Any, limits: ExchangeLimits | None = None, ahead: bytes = b""
) -> io.BufferedReader:
    """Read *ahead*, which came from *sock* before, and then from *sock* within *limits*."""
    return io.BufferedReader(_Socket(sock, limits, ahead))


class _Socket(io.RawIOBase):
    """A socket's bytes; the timeout of each read is the remaining time."""

    def __init__(self, sock: Any, limits: ExchangeLimits | None, ahead: bytes) -> None:
        self._sock = sock
        self._limits = limits
        self._ahead = ahead
        self._raw = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._ahead:
            part = self._ahead[: len(buffer)]
            self._ahead = self._ahead[len(part) :]
            buffer[: len(part)] = part
            return len(part)
        if self._limits is not None:
            self._sock.settimeout(self._limits.left())
        count: int = self._raw.readinto(buffer)
        if self._limits is not None:
            self._limits.take(count)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()
