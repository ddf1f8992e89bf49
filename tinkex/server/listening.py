"""The port: listening with or without TLS, connections within limits, graceful shutdown.

Does not know what requests mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from tinkex.server.connections import Acceptor, most_connections
from tinkex.server.home import HomeError
from tinkex.server.ledger import Ledger
from tinkex.server.limits import Limits

logger = logging.getLogger(__name__)

#: Connections accepted beyond the limit, to answer them with a 503.
_REFUSED_CONNECTIONS = 100
#: Seconds between two checks for open connections during shutdown.
_LOOK_SECONDS = 0.005


class HttpServer(uvicorn.Server):
    """Accepts connections within limits, answers waiting polls before it shuts down, and shuts down
    gracefully on SIGTERM.

    uvicorn checks every 0.1 s whether to shut down and whether connections are closed. Every
    program with an embedded engine waits for the shutdown, and would lose 0.2 s; so this class
    wakes up at once.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        ledger: Ledger,
        limits: Limits,
        tls: ssl.SSLContext | None,
    ) -> None:
        super().__init__(config)
        self._ledger = ledger
        self._limits = limits
        self._tls = tls
        self._acceptors: list[Acceptor] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked_to_end = asyncio.Event()

    def stop(self) -> None:
        """Ask the server to stop. Can be called from any thread, and from a signal handler."""
        self.should_exit = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # already stopped: the loop is closed
                self._loop.call_soon_threadsafe(self._asked_to_end.set)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup([])  # uvicorn accepts nothing itself
        most = most_connections(self._limits.connections + _REFUSED_CONNECTIONS)
        for listener in sockets or []:
            connections = self.server_state.connections
            self._acceptors.append(
                Acceptor(
                    listener,
                    self._connection,
                    connections,
                    most,
                    self._tls,
                    self._limits.head_seconds,
                )
            )

    def _connection(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol

    async def main_loop(self) -> None:
        """Set the Date header of responses once a second until the server is asked to stop."""
        while not await self.on_tick(0):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._asked_to_end.wait(), 1.0)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._ledger.drain(lambda: self.force_exit)
        for acceptor in self._acceptors:
            acceptor.close()
        self._ledger.stop()
        for listener in sockets or []:
            listener.close()
        await self._end_connections(self.config.timeout_graceful_shutdown or 0)
        if not self.force_exit:
            await self.lifespan.shutdown()

    async def _end_connections(self, seconds: float) -> None:
        """Close idle connections; responses in progress get *seconds*."""
        state, deadline = self.server_state, time.monotonic() + seconds
        for connection in list(state.connections):
            connection.shutdown()
        await asyncio.sleep(0)  # let closed connections be removed
        while (state.connections or state.tasks) and not self.force_exit:
            if time.monotonic() > deadline:
                if unanswered := len(state.tasks):
                    logger.warning("Ended before %d requests were answered.", unanswered)
                break
            await asyncio.sleep(_LOOK_SECONDS)
        for task in state.tasks:
            task.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def tls_of(certificate: Path, key: Path) -> ssl.SSLContext:
    """The TLS context. Raises HomeError if the files cannot be used."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # An encrypted key would ask for its password in the terminal.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except OSError as exc:
        raise HomeError(
            f"the certificate {certificate} and its key {key} cannot be used: "
            f"{exc.strerror or exc}; give the certificate chain and an unencrypted key, both as "
            "PEM files."
        ) from exc
    return context


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises HomeError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, OverflowError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
        raise HomeError(
            f"cannot listen on {host}:{port}: {reason}; choose another --port (0 takes a free "
            "one) or --host."
        ) from exc
    # TCP_NODELAY, which connections inherit: without it, responses, which are written in two
    # pieces, are delayed by 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def allow_many_connections() -> None:
    """Raise the soft limit of open files to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
