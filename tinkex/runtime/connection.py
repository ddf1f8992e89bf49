"""A server, reached with one key: transport, features, and the embedded engine if it is one.

Enough for lookups. Does not know about sessions or operations.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any, TypeVar

import attrs

from tinkex import config, errors, types, wire
from tinkex.runtime import auth, embedded, log_setup
from tinkex.runtime.responses import is_missing_route, not_offered
from tinkex.runtime.transport import Transport

T = TypeVar("T")

logger = logging.getLogger("tinkex")

#: Time limits for ending a session, in seconds: normally, and after Ctrl-C.
CLOSE_TIMEOUT, HURRIED_TIMEOUT = 4.0, 0.3


class Connection:
    """A server, reached with one key; enough for lookups. A `Session` is more.

    Attributes:
        features: the server's client/config.
        protobuf: True if forward_backward requests are sent as protobuf; None until it is known.
        pid: of the process that created it; a forked child must not use it.
        closed: set when it is closed.
    """

    def __init__(
        self,
        settings: config.Config,
        *,
        transport: Transport | None = None,
        engine: embedded.EmbeddedEngine | None = None,
    ) -> None:
        log_setup.from_environment()
        self.config = settings
        self.transport = transport or Transport(settings)
        self.engine = engine
        if engine is not None:
            self.transport.obituary = engine.obituary
        self.pid = os.getpid()
        self._lock = threading.Lock()  # guards the setting of closed
        self.closed = threading.Event()
        try:
            self.features = self._learn_features()
        except BaseException:
            Connection.close(self)
            raise
        self.protobuf: bool | None = self.features.proto_write_fwdbwd
        auth.install(self.transport, self.features)

    def call(self, endpoint: wire.Endpoint[T], request: Any = None, **options: Any) -> T:
        """Call an endpoint that returns its result at once; *options* as for `Transport.call`.

        Raises:
            NotOfferedError: If this server does not have the endpoint.
        """
        self.check_usable()
        try:
            return self.transport.call(endpoint, request, **options)
        except errors.APIStatusError as exc:
            if is_missing_route(exc):
                raise not_offered(exc, endpoint.path) from exc
            raise

    def check_usable(self) -> None:
        """Raise ClientClosedError if it is closed, or belongs to a parent process."""
        if self.closed.is_set():
            raise errors.ClientClosedError("The session is closed. Make a new ServiceClient.")
        if os.getpid() != self.pid:
            raise errors.ClientClosedError(
                f"This client belongs to process {self.pid}; this process ({os.getpid()}) is a "
                "fork, which has no copy of its threads. Create a new client here."
            )

    @property
    def is_closed(self) -> bool:
        return self.closed.is_set()

    def _learn_features(self) -> types.ClientConfig:
        request = types.ClientConfigRequest(config.PROTOCOL_VERSION)
        try:
            return self.transport.call(wire.CLIENT_CONFIG, request)
        except errors.APIStatusError as exc:
            if exc.status != 422 and not is_missing_route(exc):
                raise
            logger.debug("the server has no client/config; the protocol's defaults are assumed")
            return types.ClientConfig()

    def close(self) -> None:
        """Close the connections, and the embedded engine if this was its last user."""
        if self.begin_closing():
            self.let_go()

    def begin_closing(self) -> bool:
        """Accept nothing new. Returns True on the first call."""
        with self._lock:
            first = not self.closed.is_set()
            self.closed.set()
        return first

    def let_go(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """Close the connections; end the engine, in *timeout* seconds, after its last user."""
        self.transport.close()
        if self.engine is not None and os.getpid() == self.pid:
            embedded.release(self.engine, timeout)


def connect(
    base_url: str | None = None,
    api_key: str | None = None,
    *,
    settings: config.Config | None = None,
    **fields: Any,
) -> tuple[config.Config, embedded.EmbeddedEngine | None]:
    """The settings to connect with; if no server is named, those of the embedded engine.

    Arguments as for `config.load`.
    """
    if not config.wants_embedded(base_url, api_key, settings):
        return config.load(base_url, api_key, config=settings, **fields), None
    checked = config.load("http://127.0.0.1", config=settings, **fields)  # before a child starts
    checked = attrs.evolve(checked, proxies={})  # the engine is on this machine
    engine = embedded.acquire()
    try:
        return config.load(engine.base_url, engine.api_key, config=checked), engine
    except BaseException:
        embedded.release(engine)
        raise
