"""Connections within limits: how many are accepted, and how long a request head may take.

Does not know what requests mean. The time limit for bodies is in request_context.py.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
import ssl
import time
from collections.abc import Callable, Sized
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

#: File descriptors reserved for everything but connections: about 16 that are always open
#: (database, journal, lock, event loop), the others for checkpoint files.
RESERVED_DESCRIPTORS = 48
#: Connections accepted in one turn of the event loop.
_AT_ONCE = 64
#: Seconds after which a paused listener tries again.
_PAUSE_SECONDS = 0.1
#: Seconds between two log lines about pauses.
_LOG_SECONDS = 60.0
#: Errors of accept() when the process or the machine has run out of a resource.
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


def most_connections(limit: int) -> int:
    """*limit*, or what the process may open, less a reserve."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return limit
    return max(1, min(limit, descriptors - RESERVED_DESCRIPTORS))


class Connection(H11Protocol):
    """An HTTP connection, closed if the client sends a head, or reads a response, too slowly.

    The time limit of a head starts with the accept for the first request, and with the first byte
    for later ones. Idle connections between requests are closed by uvicorn's keep-alive limit.
    """

    #: Seconds; set for each server.
    head_seconds = 30.0
    #: Seconds within which the client must read something of a pending response.
    answer_seconds = 60.0

    _head_timer: asyncio.TimerHandle | None = None
    _answer_timer: asyncio.TimerHandle | None = None
    _unsent = 0

    @classmethod
    def within(cls, head_seconds: float, answer_seconds: float) -> type[Connection]:
        """A class of connections with these time limits."""
        times = {"head_seconds": head_seconds, "answer_seconds": answer_seconds}
        return type("Connection", (cls,), times)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_answer_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads more slowly than the response is produced."""
        super().pause_writing()
        self._watch_answer()

    def resume_writing(self) -> None:
        self._stop_answer_timer()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close the idle connection, unless the client is still reading its last response."""
        if not self.transport.get_write_buffer_size():
            super().timeout_keep_alive_handler()
            return
        if self._answer_timer is None:
            self._watch_answer()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def _watch_answer(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._answer_timer = self.loop.call_later(self.answer_seconds, self._look_at_answer)

    def _look_at_answer(self) -> None:
        self._answer_timer = None
        left = self.transport.get_write_buffer_size()
        if 0 < left < self._unsent:
            self._watch_answer()
        elif left:  # nothing was read; close() would wait for it
            self.transport.abort()

    def _stop_answer_timer(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()  # the head is complete, and its request runs
        elif self._head_timer is None and self.conn.trailing_data[0]:
            self._start_timer()  # a part of the next head

    def on_response_complete(self) -> None:
        self._stop_timer()
        super().on_response_complete()

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.head_seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class Acceptor:
    """Accepts connections up to a limit, on the event loop.

    asyncio's own accept loop fails in a loop when descriptors run out. This one stops listening
    until a connection is closed; new ones wait in the listener's backlog.

    Args:
        listener: a listening socket; made non-blocking.
        make_protocol: returns the protocol of a new connection.
        connections: the open ones.
        most: limit of open connections.
        tls: for encrypted connections, or None; handshake_seconds: time limit of the TLS handshake.
    """

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        connections: Sized,
        most: int,
        tls: ssl.SSLContext | None = None,
        handshake_seconds: float = 30.0,
    ) -> None:
        self._listener = listener
        self._tls: dict[str, Any] = {}
        if tls is not None:
            self._tls = {"ssl": tls, "ssl_handshake_timeout": handshake_seconds}
        self._make_protocol = make_protocol
        self._connections = connections
        self._most = most
        self._loop = asyncio.get_running_loop()
        self._starting: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._logged_at = -_LOG_SECONDS
        listener.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Stop accepting. The caller closes the listener."""
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._listener)

    def _listen(self) -> None:
        self._timer = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            if len(self._connections) + len(self._starting) >= self._most:
                self._pause(f"{self._most} connections are open")
                return
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                if exc.errno not in _EXHAUSTED:
                    raise
                self._pause(exc.strerror or str(exc))
                return
            accepted.setblocking(False)
            task = self._loop.create_task(self._start(accepted))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    async def _start(self, accepted: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, accepted, **self._tls)
        except OSError as exc:  # the client closed it at once
            accepted.close()
            logger.debug("A connection ended before it began: %s", exc)

    def _pause(self, reason: str) -> None:
        self._loop.remove_reader(self._listener)
        self._timer = self._loop.call_later(_PAUSE_SECONDS, self._listen)
        if time.monotonic() - self._logged_at >= _LOG_SECONDS:
            self._logged_at = time.monotonic()
            logger.warning(
                "No new connections are accepted until one is closed: %s. Raise the limit of open "
                "files (ulimit -n) if this happens in normal use.",
                reason,
            )
