"""One HTTP exchange: authentication, timeout, retry, and errors in our own words.

Retry means: the same request again, because it failed. Asking again because the answer was "not
yet" is polling, and lives in futures.py. Knows nothing of operations or their order; foreign
exceptions (requests, urllib3) are translated here and nowhere else.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import itertools
import math
import os
import platform
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import attrs
import requests
import tenacity
import urllib3

from . import errors, wire
from ._version import __version__
from .config import PROTOCOL_VERSION, Config
from .waiting import Wait, WaitLog, one_line

T = TypeVar("T")
R = TypeVar("R")

#: Longest Retry-After that is believed, in seconds.
MAX_RETRY_AFTER = 300.0


#: Answers that are tried again only so often: a proxy's stray one must not end a run, and a server
#: that means it should be heard soon. By status; 0 is a success that cannot be read.
FEW_TRIES = {0: 3, 400: 3, 409: 3}


def _seconds(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is None and attribute.name == "budget":
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"Retry: {attribute.name} must be seconds, got {value!r}.")
    if not 0 <= value < math.inf:
        raise ValueError(f"Retry: {attribute.name} must be seconds of at least 0, got {value!r}.")


def _statuses(value: object) -> frozenset[int]:
    if isinstance(value, (set, frozenset, list, tuple, range)) and all(
        isinstance(status, int) and 400 <= status <= 599 for status in value
    ):
        return frozenset(value)
    raise TypeError(f"Retry: pass_on must be a set of error statuses (400 to 599), got {value!r}.")


@attrs.frozen
class Retry:
    """When a failed request is sent again.

    Args:
        budget: seconds after which no new try begins; 0 is a single try; None is patient with a
            server that was heard of before, and brief with one that never was.
        pass_on: error statuses that are raised at once, for the caller to deal with.
        first, longest: seconds of the first and of the longest pause. A pause is drawn between half
            of and the whole exponential step, unless the server names one (Retry-After).
    """

    budget: float | None = attrs.field(default=None, validator=_seconds)
    pass_on: frozenset[int] = attrs.field(default=frozenset(), converter=_statuses)
    first: float = attrs.field(default=0.25, validator=_seconds)
    longest: float = attrs.field(default=10.0, validator=_seconds)

    def pause(self, attempt: int, exc: BaseException | None = None) -> float:
        """Seconds to wait after try number *attempt* (from 1) failed with *exc*."""
        asked = getattr(exc, "retry_after", None)
        if asked:  # "at once" is not believed: it would be a hot loop
            return float(asked)
        step = min(self.first * 2 ** min(attempt - 1, 20), self.longest)
        return step * random.uniform(0.5, 1.0)


ONCE = Retry(budget=0)


def check_retry(retry_config: object) -> None:
    """TypeError unless it is a Retry or None."""
    if retry_config is not None and not isinstance(retry_config, Retry):
        raise TypeError(f"retry_config must be a tinkex.Retry or None, got {retry_config!r}.")


@attrs.frozen
class Answer:
    """What came back: a success, or for `accept` statuses an error status."""

    status: int
    headers: Mapping[str, str]
    content: bytes
    url: str

    @property
    def place(self) -> str:
        """The URL as it is shown in messages: without its query."""
        return self.url.split("?")[0]

    @property
    def is_protobuf(self) -> bool:
        return wire.PROTOBUF in self.headers.get("Content-Type", "")

    def json(self) -> Any:
        """The decoded body; {} where it is empty.

        Raises:
            APIResponseValidationError: If it is not JSON.
        """
        if not self.content.strip():
            return {}
        try:
            return wire.loads(self.content)
        except ValueError as exc:
            start = self.content[:80].decode("utf-8", "replace")
            raise errors.APIResponseValidationError(
                f"{self.place} answered with something that is not JSON ({start!r}). Is base_url "
                "the URL of a training server, without a proxy's login page before it?",
                url=self.url,
            ) from exc


class Transport:
    """Sends requests and returns answers. Safe to share between threads.

    Args:
        config: where to, as whom, how patiently.
        waits: is told of every exchange that takes long.
        adapter: sends prepared requests; another one may be given in tests.
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
        self._adapter = adapter or OneWriteAdapter(
            pool_connections=4, pool_maxsize=2 * config.sampling.connections + 64
        )
        #: Waits for so many seconds, or until this transport is closed.
        self.sleep = sleep or self._closed.wait
        self._clock = clock
        self._headers = {
            "User-Agent": f"tinkex/{__version__} Python/{platform.python_version()}",
            "Accept-Encoding": "gzip, deflate",
            "Connection": "keep-alive",
            "X-Stainless-Package-Version": PROTOCOL_VERSION,
            "X-Stainless-OS": platform.system(),
            "X-Stainless-Runtime": sys.implementation.name,
            **config.headers,
        }
        #: Gives the key to send; replaced where a server wants keys exchanged for tokens.
        self.get_key: Callable[[], str] = lambda: config.api_key
        #: Called once when a token is refused as invalid; True asks for the request to be replayed.
        self.refresh_key: Callable[[], bool] = lambda: False
        #: Whether this server was ever heard of; before, failures are told at once.
        self.established = False
        environment = requests.Session().merge_environment_settings(
            config.base_url, {}, None, None, None
        )
        self._settings: dict[str, Any] = {k: environment[k] for k in ("proxies", "verify", "cert")}

    def url(self, path: str, **parameters: str) -> str:
        """The URL of *path* with its {parameters} filled in (quoted, but for ':' and '/')."""
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
        **parameters: str,
    ) -> T:
        """Send *request* to an endpoint that answers at once, and return its typed answer."""
        return self.send(
            endpoint.method,
            self.url(endpoint.path, **parameters),
            wire.dumps(wire.to_json(request, endpoint.tag)) if request is not None else b"",
            retry=retry,
            query=query,
            timeout=timeout,
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
        """Decoded JSON as the result of *operation*. APIResponseValidationError if it is none."""
        if isinstance(payload, dict) and not wire.resembles(operation.result, payload):
            raise errors.APIResponseValidationError(
                f"{url} answered with {one_line(payload)}, in which there is nothing of a "
                f"{operation.result.__name__}. Is a proxy between?",
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
        retry: Retry | None = None,
        accept: frozenset[int] = frozenset(),
        parse: Callable[[Answer], R],
        wait: Wait | None = None,
    ) -> R:
        """Send one request, again where that may help, and return what its answer parses to.

        Args:
            timeout: seconds for the answer to begin.
            retry: the policy; None is patient with a server that was heard of before, and gives
                up within `patience.first_contact` on one that was not.
            accept: error statuses that are answers, too, rather than errors.
            parse: makes the result of the answer; a retryable APIError it raises is tried again.
            wait: is told of failures; None begins one of its own.

        Raises:
            APIError: Its subclasses tell what went wrong; the message has the URL.
        """
        if query:
            given = {k: v for k, v in query.items() if v is not None}
            url += "?" + urlencode(given, doseq=False) if given else ""
        once = partial(
            self._once,
            method,
            url,
            body,
            {**(headers or {}), **_own_headers(method, body, headers)},
            timeout,
            accept,
            parse,
        )
        if wait is not None:
            return self._with_retries(once, retry, wait)
        with self.waits.begin(f"{method} {url.split('?')[0]}") as own:
            return self._with_retries(once, retry, own)

    def _with_retries(
        self, once: Callable[[int, float | None], R], retry: Retry | None, wait: Wait
    ) -> R:
        tries = _Tries(self, retry or Retry(), wait)
        try:
            return tries.run(once)  # nearly always the only one, and cheaper without the machinery
        except errors.APIError as exc:
            tries.replay = exc
        retrying = tenacity.Retrying(
            retry=tries.may_help,
            stop=tries.are_over,
            wait=tries.pause,
            sleep=self.sleep,  # type: ignore[arg-type]
            before_sleep=tries.note,
            reraise=True,
        )
        return retrying(tries.run, once)

    def _once(
        self,
        method: str,
        url: str,
        body: bytes,
        headers: dict[str, str],
        timeout: float | None,
        accept: frozenset[int],
        parse: Callable[[Answer], R],
        number: int,
        left: float | None,
    ) -> R:
        timeout = timeout or self.config.patience.request
        if left is not None:
            timeout = min(timeout, left)
        answer = self._exchange(method, url, body, headers, timeout, number)
        invalid = "invalid_token" in answer.headers.get("WWW-Authenticate", "")
        if answer.status == 401 and invalid and self.refresh_key():
            answer = self._exchange(method, url, body, headers, timeout, number)
        self.waits.heard()
        if answer.status < 300 or answer.status in accept:
            _check_whole(answer)
            parsed = parse(answer)
            self.established = True
            return parsed
        raise status_error(answer, method)

    def _exchange(
        self,
        method: str,
        url: str,
        body: bytes,
        headers: dict[str, str],
        timeout: float,
        number: int,
    ) -> Answer:
        request = requests.PreparedRequest()
        request.method, request.url, request.body = method, url, body or None
        request.hooks = {"response": []}
        request.headers = requests.structures.CaseInsensitiveDict(
            {**self._headers, **headers, "x-stainless-retry-count": str(number)}
        )
        key = self.get_key()
        if key:
            request.headers["X-API-Key"] = key
        try:
            response = self._adapter.send(
                request,
                timeout=(min(self.config.patience.connect, timeout), timeout),
                **self._settings,
            )
            content = response.content
        except requests.RequestException as exc:
            raise connection_error(exc, method, url, timeout) from exc
        return Answer(response.status_code, response.headers, content, url)

    def open_stream(
        self,
        method: str,
        url: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> requests.Response:
        """Send one request and return the response with its body still to be read.

        The caller closes it. Error statuses raise; foreign URLs (of archives) get no key.
        """
        request = requests.PreparedRequest()
        request.method, request.url, request.body = method, url, body or None
        request.hooks = {"response": []}
        request.headers = requests.structures.CaseInsensitiveDict(
            {**self._headers, **(headers or {})}
        )
        if body:
            request.headers["Content-Length"] = str(len(body))
        if self.is_ours(url) and self.get_key():
            request.headers["X-API-Key"] = self.get_key()
        elif not self.is_ours(url):
            for name in self.config.headers:
                request.headers.pop(name, None)
        limit = timeout or self.config.patience.request
        try:
            response = self._adapter.send(
                request,
                stream=True,
                timeout=(self.config.patience.connect, limit),
                **self._settings,
            )
            if response.status_code < 300:
                return response
            answer = Answer(response.status_code, response.headers, response.content, url)
        except requests.RequestException as exc:
            raise connection_error(exc, method, url, limit) from exc
        raise status_error(answer, method)

    def is_ours(self, url: str) -> bool:
        """Whether *url* is on the server that the key is for."""
        ours, other = urlsplit(self.config.base_url), urlsplit(url)
        return (ours.scheme, ours.netloc) == (other.scheme, other.netloc)

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        """Close the idle connections and try nothing again; those in use close as they end."""
        self._closed.set()
        self._adapter.close()
        self.waits.close()


#: Names each request: a random part for the process and a count, which costs less than a uuid each.
_PROCESS = uuid.uuid4().hex
_REQUESTS = itertools.count()


def _another_process() -> None:
    """A forked child counts on from the same number: its keys must not be its parent's."""
    global _PROCESS
    _PROCESS = uuid.uuid4().hex


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_another_process)


def _own_headers(method: str, body: bytes, given: Mapping[str, str] | None) -> dict[str, str]:
    """What every request carries beyond the fixed headers; the same over its retries."""
    own = {"Accept": wire.JSON} if not given or "Accept" not in given else {}
    if method != "GET":
        own["X-Idempotency-Key"] = f"tinkex-{_PROCESS}-{next(_REQUESTS)}"
        own["Content-Length"] = str(len(body))
    if body and (not given or "Content-Type" not in given):
        own["Content-Type"] = wire.JSON
    return own


class _OneWrite(urllib3.connection.HTTPConnection):
    """Sends the head and a small body of a request in one write: half the system calls, and never
    two packets where one will do."""

    SMALL = 1 << 16  # bytes

    _head = b""
    _body: bytes | None = None

    def request(self, method: str, url: str, body: Any = None, *args: Any, **kwargs: Any) -> None:
        small = isinstance(body, bytes) and 0 < len(body) <= self.SMALL
        self._head, self._body = b"", body if small else None
        super().request(method, url, body, *args, **kwargs)

    def send(self, data: Any) -> None:
        if self._body is not None:
            if data is not self._body:
                self._head += data
                return
            data, self._body = self._head + self._body, None
        super().send(data)


class _OneWriteTLS(_OneWrite, urllib3.connection.HTTPSConnection):
    """The same over TLS."""


class OneWriteAdapter(requests.adapters.HTTPAdapter):
    """The adapter of requests, over connections that write each small request at once."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {
            "http": type("Pool", (urllib3.HTTPConnectionPool,), {"ConnectionCls": _OneWrite}),
            "https": type(
                "TLSPool", (urllib3.HTTPSConnectionPool,), {"ConnectionCls": _OneWriteTLS}
            ),
        }


class _Tries:
    """One request's tries, one after another; the methods are tenacity's strategies.

    *seen* is whether an earlier try may have reached the server: then a failure for good leaves it
    unknown whether the request was carried out.
    """

    def __init__(self, transport: Transport, policy: Retry, wait: Wait) -> None:
        self._transport = transport
        self._policy = policy
        self._wait = wait
        self._clock = transport._clock
        self._started = self._clock()
        self._pause = 0.0
        self._number = 0
        self._seen = False
        self._few: dict[int, int] = {}
        #: A failure that has happened already, for the strategies to judge.
        self.replay: errors.APIError | None = None

    def run(self, once: Callable[[int, float | None], R]) -> R:
        if self.replay is not None:
            failure, self.replay = self.replay, None
            raise failure
        if self._transport.is_closed:
            last = self._wait.last_error
            raise errors.ClientClosedError(
                f"The client was closed; this was not sent{f' again: {last}' if last else '.'}"
            )
        left = None
        if not self._transport.established:
            left = max(1.0, self._budget() - self._elapsed())
        self._number += 1
        try:
            return once(self._number - 1, left)
        except errors.APIError as exc:
            exc.attempts = self._number
            if getattr(exc, "status", None) == 409 and self._seen:
                raise _outcome_unknown(exc) from exc
            self._seen = self._seen or _may_have_been_seen(exc)
            exc.outcome_unknown = self._seen
            raise

    def may_help(self, state: tenacity.RetryCallState) -> bool:
        exc = state.outcome.exception() if state.outcome else None
        if not isinstance(exc, errors.APIError):
            return False
        self._pause = self._policy.pause(self._number, exc)
        status = getattr(exc, "status", 0)
        if status in self._policy.pass_on:
            return False
        if status in FEW_TRIES and _may_be_stray(exc):
            self._few[status] = self._few.get(status, 0) + 1
            return self._few[status] <= FEW_TRIES[status]
        if not self._transport.established and _is_hopeless(exc, self._elapsed()):
            return False
        return exc.retryable

    def are_over(self, state: tenacity.RetryCallState) -> bool:
        return self._elapsed() + self._pause >= self._budget()

    def pause(self, state: tenacity.RetryCallState) -> float:
        return self._pause

    def note(self, state: tenacity.RetryCallState) -> None:
        if state.outcome is not None:
            self._wait.failed_once(state.outcome.exception())

    def _elapsed(self) -> float:
        return self._clock() - self._started

    def _budget(self) -> float:
        if self._policy.budget is not None:
            return self._policy.budget
        patience = self._transport.config.patience
        return patience.no_answer if self._transport.established else patience.first_contact


def _may_be_stray(exc: errors.APIError) -> bool:
    """An unreadable success, a 409, or a 400 without the server's own sentence: a proxy between may
    have made it."""
    if not isinstance(exc, errors.APIStatusError):
        return isinstance(exc, errors.APIResponseValidationError)
    if exc.should_retry is False:
        return False
    return exc.status == 409 or not (isinstance(exc.body, dict) and exc.detail)


def _outcome_unknown(exc: errors.APIError) -> errors.OutcomeUnknownError:
    unknown = errors.OutcomeUnknownError(
        f"outcome unknown: an earlier try got no answer, and the resend was refused ({exc}). "
        "It may or may not have run; load the last checkpoint into a new client and go on there.",
        status=409,
        detail=getattr(exc, "detail", ""),
        body=getattr(exc, "body", None),
        method=exc.method,
        url=exc.url,
        attempts=exc.attempts,
    )
    unknown.outcome_unknown = True
    return unknown


def _is_hopeless(exc: errors.APIError, elapsed: float) -> bool:
    """On first contact: an unknown name, a bad certificate, a port where nobody listens."""
    cause = str(exc.__cause__)
    if any(word in cause for word in ("NameResolution", "getaddrinfo", "certificate", "SSLError")):
        return True
    return "refused" in cause and elapsed >= 2.0


def _may_have_been_seen(exc: errors.APIError) -> bool:
    """Whether the server may have carried the request out, for all we know."""
    if isinstance(exc, errors.APIStatusError):
        return exc.status >= 500 or exc.status == 408
    cause = str(exc.__cause__)
    return not any(word in cause for word in ("refused", "NameResolution", "ConnectTimeout"))


def _check_whole(answer: Answer) -> None:
    """Hold a body against its Content-Digest (RFC 9530), where there is one: half a protobuf may
    read like a whole one.

    Raises:
        APIResponseValidationError: If it is another body.
    """
    algorithm, _, told = answer.headers.get("Content-Digest", "").partition("=")
    if algorithm != "sha-256" or answer.headers.get("Content-Encoding", "identity") != "identity":
        return
    if told.strip(":") != base64.b64encode(hashlib.sha256(answer.content).digest()).decode():
        raise errors.APIResponseValidationError(
            f"{answer.url} answered with {len(answer.content)} bytes that are not those it says "
            "they are (Content-Digest): they were cut or changed on the way.",
            url=answer.url,
        )


def connection_error(
    exc: requests.RequestException, method: str, url: str, timeout: float
) -> errors.APIConnectionError:
    """What went wrong on the way, in words, with the URL and the mend."""
    shown = url.split("?")[0]
    if isinstance(exc, requests.ConnectTimeout):
        message = f"{shown}: no connection; is the host right, and reachable from here?"
    elif isinstance(exc, requests.Timeout):
        message = f"{shown}: no answer within {timeout:.0f} s."
        return errors.APITimeoutError(message, method=method, url=url)
    elif isinstance(exc, requests.exceptions.SSLError):
        message = f"{shown}: the TLS certificate or handshake is not good: {_innermost(exc)}"
    elif "refused" in str(exc):
        message = f"{shown}: connection refused; is the server running, on this port?"
    elif "NameResolution" in str(exc) or "getaddrinfo" in str(exc):
        message = f"{shown}: the host name does not resolve; is base_url spelled right?"
    else:
        message = f"{shown}: the connection broke: {_innermost(exc)}"
    return errors.APIConnectionError(message, method=method, url=url)


def _innermost(exc: BaseException) -> str:
    while exc.args and isinstance(exc.args[-1], BaseException):
        exc = exc.args[-1]
    reason = getattr(exc, "reason", None)
    return one_line(reason if isinstance(reason, BaseException) else exc)


def status_error(answer: Answer, method: str) -> errors.APIStatusError:
    """The typed error for an answer with an error status; shows what the server said."""
    try:
        body = wire.loads(answer.content) if answer.content.strip() else None
    except ValueError:
        body = answer.content[:2000].decode("utf-8", "replace")
    detail = error_detail(body)
    location = answer.headers.get("Location")
    if not detail and location and answer.status < 400:
        detail = f"redirected to {location.split('?')[0]}; set base_url to where the server is"
    said = detail or "nothing more"
    return errors.status_error_class(answer.status)(
        f"{answer.place} answered {answer.status}: {said}{_hint(answer.status)}",
        status=answer.status,
        detail=detail,
        body=body,
        retry_after=_retry_after(answer.headers),
        should_retry={"true": True, "false": False}.get(
            answer.headers.get("x-should-retry", "").lower()
        ),
        method=method,
        url=answer.url,
    )


def _hint(status: int) -> str:
    if status == 401:
        return " (is TINKER_API_KEY, or api_key=, the right key for this server?)"
    return ""


def error_detail(body: Any) -> str:
    """The server's own sentence, wherever in an error body it is."""
    if isinstance(body, str):
        return " ".join(body.split())[:300]
    if not isinstance(body, dict):
        return ""
    for key in ("message", "error", "detail"):
        value = body.get(key)
        if isinstance(value, str) and value:
            return value
        if isinstance(value, dict) and value:
            return error_detail(value)
        if isinstance(value, list) and value:
            return "; ".join(_validation_item(item) for item in value[:5])
    return ""


def _validation_item(item: Any) -> str:
    """One entry of a FastAPI validation error."""
    if not isinstance(item, dict):
        return str(item)
    where = ".".join(str(part) for part in item.get("loc", ()))
    return f"{where}: {item.get('msg', item)}" if where else str(item.get("msg", item))


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds the server asks us to wait (retry-after-ms, retry-after), or None."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if not value:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            seconds = _seconds_until(value)
        if seconds >= 0:
            return min(seconds, MAX_RETRY_AFTER)
    return None


def _seconds_until(date: str) -> float:
    """From now to an HTTP date; NaN where it is none."""
    try:
        return max(0.0, email.utils.parsedate_to_datetime(date).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return math.nan
