"""One request and its attempts: authentication, headers, time limits.

http_session.py has the connections, retry.py the retry rules, responses.py the meaning of
responses. Does not know about operations or their order.
"""

from __future__ import annotations

import itertools
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import attrs
import requests

from tinkex import errors, wire
from tinkex._version import __version__
from tinkex.config import PROTOCOL_VERSION, Config
from tinkex.runtime import tracing
from tinkex.runtime.exchange_limits import ExchangeLimits
from tinkex.runtime.http_adapter import read_within
from tinkex.runtime.http_session import HttpSession
from tinkex.runtime.responses import (
    Answer,
    Stream,
    check_whole,
    exchange_error,
    retold,
    status_error,
    without_secrets,
)
from tinkex.runtime.retry import Attempts, Retry, is_hopeless, may_have_been_seen, repeat
from tinkex.runtime.wait_log import Wait, WaitLog, one_line

#: Words in the names of headers whose values are secrets.
SECRET_HEADERS = ("auth", "cookie", "key", "secret", "token")

T = TypeVar("T")
R = TypeVar("R")


class Transport:
    """Sends requests and returns responses. Safe to share between threads.

    Args:
        config: the server, the key, and the patience.
        waits: logs every exchange that takes long.
        adapter: sends prepared requests; replaceable in tests.
        sleep, clock: replaceable in tests.
    """

    def __init__(
        self,
        config: Config,
        *,
        waits: WaitLog | None = None,
        adapter: requests.adapters.BaseAdapter | None = None,
        sleep: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self._closed = threading.Event()
        self.waits = waits or WaitLog(config.patience.report_after, config.patience.report_every)
        self._prefix = config.base_url + wire.PREFIX
        self._http = HttpSession(config, 2 * config.sampling.connections + 64, adapter)
        #: Sleeps for a number of seconds, or until this transport is closed.
        self.sleep = sleep or self._closed.wait
        self.clock = clock
        self._headers = {
            "User-Agent": f"tinkex/{__version__} Python/{platform.python_version()}",
            "Accept-Encoding": "gzip, deflate",
            "Connection": "keep-alive",
            "X-Stainless-Package-Version": PROTOCOL_VERSION,
            "X-Stainless-OS": platform.system(),
            "X-Stainless-Runtime": sys.implementation.name,
            **config.default_headers,
        }
        self._secret_headers = [
            value
            for name, value in config.default_headers.items()
            if any(word in name.lower() for word in SECRET_HEADERS)
        ]
        #: Returns the key to send; replaced if the server exchanges keys for tokens.
        self.get_key: Callable[[], str] = lambda: config.api_key
        #: Called when a token is refused; if it returns True, the request is sent again.
        self.refresh_key: Callable[[], bool] = lambda: False
        #: Returns why the server will not answer again, or None while it may.
        self.obituary: Callable[[], str | None] = lambda: None
        #: True after the first response; before it, a request gives up within seconds.
        self.established = False

    def url(self, path: str, **parameters: str) -> str:
        """The URL of *path* with its {parameters} filled in (quoted, except ':' and '/')."""
        filled = path.format(**{k: quote(v, safe=":/") for k, v in parameters.items()})
        return self._prefix + filled

    def call(
        self,
        endpoint: wire.Endpoint[T],
        request: Any = None,
        *,
        retry: Retry | None = None,
        query: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
        **parameters: str,
    ) -> T:
        """Send *request* to an endpoint without promises, and return the decoded result."""
        return self.send(
            endpoint.method,
            self.url(endpoint.path, **parameters),
            wire.dumps(wire.to_json(request, endpoint.tag)) if request is not None else b"",
            headers=headers,
            retry=retry,
            query=query,
            timeout=timeout,
            most_bytes=endpoint.most_bytes,
            parse=partial(self.decode, endpoint.result),
        )

    def decode(self, result: type[T], answer: Answer) -> T:
        """The body of *answer* as a *result*."""
        if result is wire.Nothing:
            return result()
        return self.structure(result, answer.json(), answer.place)

    def structure(self, result: type[T], payload: Any, url: str = "") -> T:
        """Decoded JSON as a *result*. APIResponseValidationError if it does not fit."""
        try:
            return wire.from_json(result, payload)
        except ValueError as exc:
            raise errors.APIResponseValidationError(
                f"{url or 'the server'} answered with an unusable {result.__name__}: {exc}", url=url
            ) from exc

    def structure_result(self, operation: wire.Operation[T], payload: Any, url: str) -> T:
        """Decoded JSON as the result of *operation*. APIResponseValidationError if it is not."""
        if isinstance(payload, dict) and not wire.resembles(operation.result, payload):
            raise errors.APIResponseValidationError(
                f"{url} answered with {one_line(payload)}, which has no field of "
                f"{operation.result.__name__}; did a proxy answer instead of the server?",
                url=url,
            )
        return self.structure(operation.result, payload, url)

    def send(
        self,
        method: str,
        url: str,
        body: bytes = b"",
        *,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        most_bytes: int = wire.SMALL_ANSWER,
        retry: Retry | None = None,
        accept: frozenset[int] = frozenset(),
        parse: Callable[[Answer], R],
        wait: Wait | None = None,
    ) -> R:
        """Send one request, with retries, and return the parsed response.

        Args:
            timeout: seconds for the whole exchange; large bodies get more, see `ExchangeLimits`.
            most_bytes: largest accepted response.
            retry: when to send it again; None keeps trying for `patience.no_answer`, or for
                `patience.first_contact` if the server has never answered.
            accept: error statuses to return instead of raising.
            parse: converts the response; if it raises a retryable APIError, the request is sent
                again.
            wait: records failures; by default a new one.

        Raises:
            APIError: A subclass for the failure; the message has the URL.
        """
        if query:
            given = {k: v for k, v in query.items() if v is not None}
            url += "?" + urlencode(given, doseq=False) if given else ""
        what = f"{method} {url.split('?')[0]}"
        with nullcontext(wait) if wait is not None else self.waits.begin(what) as wait:
            request = _Request(
                self,
                method,
                url,
                body,
                {**self._headers, **(headers or {}), **_own_headers(method, body, headers)},
                timeout or self.config.patience.request,
                most_bytes,
                accept,
                parse,
                wait,
                retry or _USUAL_RETRY,
                self.clock(),
            )
            return request.send()

    def _secrets(self) -> set[str]:
        """The secrets in our requests, which must not be shown."""
        return {self.config.api_key, self.get_key(), *self._secret_headers}

    def _exchange(self, request: _Request[Any], timeout: float) -> Answer:
        headers = {**request.headers, "x-stainless-retry-count": str(request.tries - 1)}
        key = self.get_key()
        if key:
            headers["X-API-Key"] = key
        limits = ExchangeLimits(self.config.patience.connect, timeout, request.most_bytes)
        progress = request.wait.progress
        if progress is not None:
            progress.sent += len(request.body)
        send = partial(self._send, request.method, request.url, headers, request.body, limits)
        if progress is None or progress.span is None:
            response = send()
        else:
            with tracing.exchange(progress, request.method, request.url, headers) as note_status:
                response = send()
                note_status(response.status_code)
        if progress is not None:
            progress.received += len(response.content)
        return _answer(response, request.url)

    def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        limits: ExchangeLimits,
        **how: bool,
    ) -> requests.Response:
        """Make one exchange; *how* as for `HttpSession.send`, so a success may be unread."""
        try:
            response = self._http.send(method, url, headers, body or None, limits, **how)
            return response if response.status_code < 300 else read_within(response, limits)
        except requests.RequestException as exc:
            raise exchange_error(exc, method, url, limits) from exc

    def open_stream(
        self,
        method: str,
        url: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Stream:
        """Send one request and return the response with its body unread.

        The caller closes it. Error statuses raise; URLs of other hosts (archives) get no key.
        """
        is_ours = self.is_ours(url)
        sent = {**self._headers, "Accept-Encoding": "identity", **(headers or {})}
        if body:
            sent["Content-Length"] = str(len(body))
        if is_ours and self.get_key():
            sent["X-API-Key"] = self.get_key()
        elif not is_ours:
            sent = {k: v for k, v in sent.items() if k not in self.config.default_headers}
        patience = self.config.patience
        limits = ExchangeLimits(patience.connect, patience.request, wire.SMALL_ANSWER)
        response = self._send(method, url, sent, body, limits, stream=True, with_auth=is_ours)
        if response.status_code < 300:
            return Stream(response, method, limits)
        raise status_error(without_secrets(_answer(response, url), self._secrets()), method)

    def is_ours(self, url: str) -> bool:
        """True if *url* is on the server that the key belongs to."""
        ours, other = urlsplit(self.config.base_url), urlsplit(url)
        return (ours.scheme, ours.netloc) == (other.scheme, other.netloc)

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        """Stop retrying, and close connections: idle ones now, others after their exchange."""
        self._closed.set()
        self._http.close()
        self.waits.close()


@attrs.define(eq=False)
class _Request(Generic[R]):
    """The arguments of `Transport.send`, and the state of its attempts."""

    transport: Transport
    method: str
    url: str
    body: bytes
    headers: Mapping[str, str]
    timeout: float
    most_bytes: int
    accept: frozenset[int]
    parse: Callable[[Answer], R]
    wait: Wait
    policy: Retry
    started: float
    tries: int = 0
    seen: bool = False  # an earlier attempt may have reached the server and been executed
    attempts: Attempts = attrs.field(factory=Attempts)

    def send(self) -> R:
        """Try until there is a usable response, or another attempt is useless."""
        return repeat(
            self._try,
            self._may_help,
            stop=lambda state: self._elapsed() + state.upcoming_sleep >= self._budget(),
            wait=self.policy.wait,
            sleep=self.transport.sleep,
            note=self.wait.failed_once,
        )

    def _try(self) -> R:
        if self.transport.is_closed:
            last = self.wait.last_error
            raise errors.ClientClosedError(
                f"The client was closed; this was not sent{f' again: {last}' if last else '.'}"
            )
        timeout = self.timeout
        if not self.transport.established:
            timeout = min(timeout, max(1.0, self._budget() - self._elapsed()))
        self.tries += 1
        try:
            return self._once(timeout)
        except errors.APIError as exc:
            exc.attempts = self.tries
            if isinstance(exc, errors.APIConnectionError) and (died := self.transport.obituary()):
                raise errors.EngineError(died) from exc
            if isinstance(exc, errors.ConflictError) and self.seen:
                unknown = retold(exc, errors.OutcomeUnknownError, _OUTCOME_UNKNOWN.format(exc))
                unknown.outcome_unknown = True
                raise unknown from exc
            self.seen = self.seen or may_have_been_seen(exc)
            exc.outcome_unknown = self.seen
            raise

    def _once(self, timeout: float) -> R:
        transport = self.transport
        answer = transport._exchange(self, timeout)
        if answer.status == 401 and _is_invalid_token(answer) and transport.refresh_key():
            answer = transport._exchange(self, timeout)
        transport.waits.heard()
        is_answer = 200 <= answer.status < 300 or answer.status in self.accept
        if is_answer:
            check_whole(answer)
        answer = without_secrets(answer, transport._secrets())
        if is_answer:
            parsed = self.parse(answer)
            transport.established = True
            return parsed
        raise status_error(answer, self.method)

    def _may_help(self, exc: errors.APIError) -> bool:
        """True if another attempt may succeed."""
        if getattr(exc, "status", 0) in self.policy.pass_on:
            return False
        if not self.transport.established and is_hopeless(exc, self._elapsed()):
            return False
        return self.attempts.may_pass(exc, may_explain=(409,))

    def _elapsed(self) -> float:
        return self.transport.clock() - self.started

    def _budget(self) -> float:
        if self.policy.budget is not None:
            return self.policy.budget
        patience = self.transport.config.patience
        return patience.no_answer if self.transport.established else patience.first_contact


_USUAL_RETRY = Retry()


def _is_invalid_token(answer: Answer) -> bool:
    return "invalid_token" in answer.headers.get("WWW-Authenticate", "")


_OUTCOME_UNKNOWN = (
    "outcome unknown: an earlier try got no answer, and the resend was refused ({}). It may or may "
    "not have run; load the last checkpoint into a new client to continue."
)


def _answer(response: requests.Response, url: str) -> Answer:
    return Answer(response.status_code, response.headers, response.content, url)


#: Request ids: a random prefix per process and a counter; cheaper than a uuid for each.
_PROCESS = uuid.uuid4().hex
_REQUESTS = itertools.count()


def _another_process() -> None:
    """Change the prefix in a forked child, whose counter continues: its ids must be unique."""
    global _PROCESS
    _PROCESS = uuid.uuid4().hex


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_another_process)


def _own_headers(method: str, body: bytes, given: Mapping[str, str] | None) -> dict[str, str]:
    """The headers of each request beyond the fixed ones; the same for its retries."""
    own = {"Accept": wire.JSON} if not given or "Accept" not in given else {}
    if method != "GET":
        own["X-Idempotency-Key"] = f"tinkex-{_PROCESS}-{next(_REQUESTS)}"
        own["Content-Length"] = str(len(body))
    if body and (not given or "Content-Type" not in given):
        own["Content-Type"] = wire.JSON
    return own
