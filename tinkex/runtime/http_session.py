"""The requests.Session for all traffic: the user's, or our own.

So hooks, instrumentation (OpenTelemetry) and mocks (requests-mock, vcrpy, responses) see every
exchange. Does not know the API; takes methods, URLs, headers and bytes.
"""

from __future__ import annotations

import concurrent.futures
import contextvars
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import requests

from tinkex.config import Config
from tinkex.futures import fail
from tinkex.runtime import http_adapter
from tinkex.runtime.exchange_limits import ExchangeLimits
from tinkex.runtime.executor import on_daemon_thread
from tinkex.runtime.http_adapter import (
    KeptConnections,
    case_insensitive,
    is_plain,
    prepared_request,
    read_within,
)

#: Default headers of a new requests.Session; others were set by the user.
_REQUESTS_OWN = requests.utils.default_headers()


class HttpSession:
    """Sends requests through a requests.Session. Safe to share between threads.

    The user's session is used unchanged: its headers, cookies, auth, hooks, proxies, verify, cert
    and adapters. Only an adapter with requests' defaults, which keeps ten connections, is replaced
    for the server's address. *close* does not close the user's session.

    Args:
        settings: session, proxies, verify and hooks are used here.
        connections: most connections kept open.
        adapter: for all URLs; replaceable in tests.
    """

    def __init__(
        self,
        settings: Config,
        connections: int = 10,
        adapter: requests.adapters.BaseAdapter | None = None,
    ) -> None:
        self._owns_session = settings.session is None
        self._session: requests.Session = settings.session or requests.Session()
        self._adapter = adapter
        if self._owns_session:
            self._adapter = adapter or _adapter(connections)
            self._session.headers.clear()
            for scheme in ("https://", "http://"):
                self._session.mount(scheme, self._adapter)
        elif is_plain(self._session.get_adapter(settings.base_url)):
            self._adapter = _adapter(connections)
            self._session.mount(f"{settings.base_url}/", self._adapter)
        self._hooks = {"response": list(_hooks(settings.hooks))}
        environment = self._session.merge_environment_settings(
            settings.base_url, dict(settings.proxies), None, settings.verify, None
        )
        self._options: dict[str, Any] = {k: environment[k] for k in ("proxies", "verify", "cert")}

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        limits: ExchangeLimits,
        *,
        stream: bool = False,
        with_auth: bool = True,
    ) -> requests.Response:
        """Make one exchange, without following redirects.

        Args:
            headers: override those of the user's session, except its User-Agent.
            limits: of the whole exchange.
            stream: the caller reads the body, and calls `limits.begin_part` to restart the limits.
            with_auth: apply the `auth` of the user's session.

        Raises:
            requests.RequestException: If there was no response.
        """
        request = prepared_request(method, url, body)
        request.hooks = self._hooks
        request.headers = case_insensitive(headers)
        if not self._owns_session:
            self._apply(request, with_auth)
        if self._session.cookies:
            request.prepare_cookies(self._session.cookies)
        if stream or self._owns_session or self._adapter is not None:
            return self._exchange(request, limits, stream)
        limits.sent = len(body or b"")  # no progress is known
        exchange = partial(self._exchange, request, limits, True)
        return _on_thread(lambda: read_within(exchange(), limits), limits)

    def _exchange(
        self, request: requests.PreparedRequest, limits: ExchangeLimits, stream: bool
    ) -> requests.Response:
        try:
            return self._session.send(
                request, stream=stream, timeout=limits, allow_redirects=False, **self._options
            )
        except requests.HTTPError as exc:  # a hook has called raise_for_status()
            if exc.response is None:
                raise
            return exc.response

    def _apply(self, request: requests.PreparedRequest, with_auth: bool) -> None:
        """Add the user's session settings to a request; read each time, since they may change."""
        session = self._session
        for name, value in session.headers.items():
            is_free = name not in request.headers or name.lower() == "user-agent"
            if is_free and _REQUESTS_OWN.get(name) != value:
                request.headers[name] = value  # type: ignore[assignment]
        if session.hooks.get("response"):
            given = [*_hooks(session.hooks), *self._hooks["response"]]
            request.hooks = {"response": given}
        if with_auth and session.auth:
            request.prepare_auth(session.auth)

    def close(self) -> None:
        """Close the connections, unless they belong to the user's session."""
        if self._owns_session:
            self._session.close()
        elif self._adapter is not None:
            self._adapter.close()


#: Running exchanges through the user's adapters. The end of the program interrupts them here,
#: because their connections are unknown.
_foreign: set[concurrent.futures.Future[requests.Response]] = set()
_foreign_lock = threading.Lock()  # guards _foreign


def _on_thread(
    exchange: Callable[[], requests.Response], limits: ExchangeLimits
) -> requests.Response:
    """Make an exchange on a separate thread, and wait for it within its limits."""
    run = contextvars.copy_context().run  # instrumentation keeps the current span there
    future = on_daemon_thread(lambda: run(exchange), "tinkex-exchange")
    with _foreign_lock:
        _foreign.add(future)
    try:
        while True:
            done, _ = concurrent.futures.wait([future], limits.left())
            if done:
                return future.result()
    except TimeoutError as exc:
        raise requests.ReadTimeout(str(exc)) from exc
    finally:
        with _foreign_lock:
            _foreign.discard(future)


def interrupt_all() -> None:
    """At the end of the program: make every exchange that is under way fail now."""
    http_adapter.interrupt_all()
    with _foreign_lock:
        waited_for = list(_foreign)
    for future in waited_for:
        fail(future, requests.ConnectionError("the program is ending"))


def _adapter(connections: int) -> requests.adapters.BaseAdapter:
    return KeptConnections(pool_connections=4, pool_maxsize=connections)


def _hooks(hooks: Mapping[str, Any]) -> list[Any]:
    """The response hooks of a mapping like `requests.Session.hooks`."""
    given = hooks.get("response") or []
    return [given] if callable(given) else list(given)
