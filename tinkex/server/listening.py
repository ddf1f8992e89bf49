"""The port: listening with or without TLS, connections within limits, and an orderly end.

Does not know what requests mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from tinkex.server.connections import Acceptor, most_connections
from tinkex.server.home import HomeError
from tinkex.server.ledger import Ledger
from tinkex.server.limits import Limits

#: Connections beyond the limit that are accepted, to answer them with a 503.
_REFUSED_CONNECTIONS = 100


class HttpServer(uvicorn.Server):
    """Accepts connections within limits, answers waiting polls before it shuts down, and handles
    SIGTERM as a request for an orderly end."""

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

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
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

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._ledger.drain(lambda: self.force_exit)
        for acceptor in self._acceptors:
            acceptor.close()
        self._ledger.stop()
        await super().shutdown(sockets)

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
    """The settings of TLS. Raises HomeError if the files cannot be used."""
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
    # Connections inherit this. Without it a response, which is written in two pieces, is delayed
    # by 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def allow_many_connections() -> None:
    """Raise the limit of open files as far as the process may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
