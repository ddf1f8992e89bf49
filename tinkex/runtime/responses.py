"""Responses of a server: turned into a result, or into an error of tinkex.

Foreign exceptions (requests, urllib3) and error statuses are translated only here. Sends nothing.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import attrs
import requests
import urllib3
from requests.structures import CaseInsensitiveDict

from tinkex import errors, wire
from tinkex.runtime.exchange_limits import ExchangeLimits, UnusableAnswerError
from tinkex.runtime.wait_log import one_line

S = TypeVar("S", bound=errors.APIStatusError)

#: Longest accepted Retry-After, in seconds.
MAX_RETRY_AFTER = 300.0
#: The values of JSON larger than this, in bytes, are counted before decoding, against the two
#: bounds below.
LARGE = 1 << 20
#: Most bytes per read of a stream.
PIECE = 1 << 16
MOST_VALUES, MOST_CONTAINERS = 1 << 24, 1 << 20


@attrs.frozen
class Answer:
    """A response: a success, or an error with one of the `accept` statuses."""

    status: int
    headers: Mapping[str, str]
    content: bytes
    url: str

    @property
    def place(self) -> str:
        """The URL for messages: without its query."""
        return self.url.split("?")[0]

    def _check_number_of_values(self) -> None:
        size = wire.json_size(self.content, MOST_VALUES, MOST_CONTAINERS)
        if size.values > MOST_VALUES or size.containers > MOST_CONTAINERS:
            raise errors.APIResponseValidationError(
                f"{self.place} answered with JSON of over {MOST_VALUES:,} values or "
                f"{MOST_CONTAINERS:,} lists and objects, which no result has.",
                url=self.url,
            )

    @property
    def is_protobuf(self) -> bool:
        return wire.PROTOBUF in self.headers.get("Content-Type", "")

    def json(self) -> Any:
        """The decoded body; {} if it is empty.

        Raises:
            APIResponseValidationError: If it is not JSON.
        """
        if not self.content.strip():
            return {}
        if len(self.content) > LARGE:
            self._check_number_of_values()
        try:
            return wire.loads(self.content)
        except ValueError as exc:
            start = self.content[:80].decode("utf-8", "replace")
            raise errors.APIResponseValidationError(
                f"{self.place} answered with something that is not JSON ({start!r}). Is base_url "
                "the URL of a training server, without a proxy's login page before it?",
                url=self.url,
            ) from exc


class Stream:
    """A response whose body is read in pieces. The limits of an exchange apply to each piece.

    Attributes:
        status, headers: of the response.
    """

    def __init__(self, response: requests.Response, method: str, limits: ExchangeLimits) -> None:
        self._response = response
        self._method = method
        self._limits = limits
        self.status = response.status_code
        self.headers = response.headers

    def pieces(self, size: int) -> Iterator[bytes]:
        """The body in pieces of *size* bytes.

        Raises:
            APIError: If the connection breaks, or a piece takes too long.
        """
        return self._translated(self._response.iter_content(size))

    def lines(self) -> Iterator[bytes]:
        """The body in lines, each as soon as it is complete.

        Raises:
            APIError: If the connection breaks, or a line takes too long or is too long.
        """
        return self._translated(self._lines())

    def _lines(self) -> Iterator[bytes]:
        """Like iter_lines of requests, which returns lines at once only if it reads single
        bytes."""
        pending = b""
        while piece := self._response.raw.read1(PIECE):
            *whole, pending = (pending + piece).split(b"\n")
            yield from (line.removesuffix(b"\r") for line in whole)
        if pending:
            yield pending

    def _translated(self, parts: Iterator[bytes]) -> Iterator[bytes]:
        encoding = self.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise errors.APIResponseValidationError(
                f"{self._response.url} answered with the Content-Encoding {encoding!r}, which was "
                "not asked for.",
                method=self._method,
                url=self._response.url,
            )
        self._limits.begin_part()
        try:
            for part in parts:
                yield part
                self._limits.begin_part()
        except (requests.RequestException, urllib3.exceptions.HTTPError) as exc:
            raise exchange_error(exc, self._method, self._response.url, self._limits) from exc

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._response.close()


#: Shorter keys are not masked: they would match too much other text.
LEAST_SECRET = 8


def without_secrets(answer: Answer, secrets: Iterable[str]) -> Answer:
    """
    *answer* with "***" in place of our secrets, in its text and headers.

    A server's text ends up in exceptions, logs and bug reports. Binary results are not changed,
    because their content is never shown.
    """
    wanted = [secret for secret in secrets if len(secret) >= LEAST_SECRET]
    if answer.is_protobuf or not wanted:
        return answer
    content, headers = answer.content, answer.headers
    all_values = "\n".join(headers.values())
    for secret in wanted:
        content = content.replace(secret.encode(), b"***")
        if secret in all_values:
            shown = {name: value.replace(secret, "***") for name, value in headers.items()}
            headers = CaseInsensitiveDict(shown)
    if content is answer.content and headers is answer.headers:
        return answer
    return attrs.evolve(answer, content=content, headers=headers)


def check_whole(answer: Answer) -> None:
    """Verify the Content-Digest (RFC 9530) of a body, if there is one: a truncated protobuf may be
    parsed like a complete one.

    Raises:
        APIResponseValidationError: If the body does not match.
    """
    algorithm, _, told = answer.headers.get("Content-Digest", "").partition("=")
    if algorithm != "sha-256" or answer.headers.get("Content-Encoding", "identity") != "identity":
        return
    if told.strip(":") != base64.b64encode(hashlib.sha256(answer.content).digest()).decode():
        raise errors.APIResponseValidationError(
            f"{answer.url} answered with {len(answer.content)} bytes that do not match their "
            "Content-Digest: they were cut or changed on the way.",
            url=answer.url,
        )


def exchange_error(
    exc: requests.RequestException | urllib3.exceptions.HTTPError,
    method: str,
    url: str,
    limits: ExchangeLimits,
) -> errors.APIConnectionError | errors.APIResponseValidationError:
    """The error of an exchange that failed without a response, with the URL and the fix."""
    shown = url.split("?")[0]
    if _comes_of(exc, UnusableAnswerError):
        return errors.APIResponseValidationError(
            f"{shown}: the answer is unusable: {_innermost(exc)}; did a proxy answer instead of "
            "the server?",
            method=method,
            url=url,
        )
    if isinstance(exc, requests.ConnectTimeout):
        message = f"{shown}: no connection; is the host right, and reachable from here?"
    elif isinstance(exc, requests.Timeout) or _comes_of(exc, TimeoutError):
        part = "no" if not limits.received else "no complete"
        message = f"{shown}: {part} answer within {limits.seconds:.0f} s."
        return errors.APITimeoutError(message, method=method, url=url)
    elif isinstance(exc, requests.exceptions.SSLError):
        message = f"{shown}: the TLS handshake failed: {_innermost(exc)}"
    elif "refused" in str(exc):
        message = f"{shown}: connection refused; is the server running, on this port?"
    elif "NameResolution" in str(exc) or "getaddrinfo" in str(exc):
        message = f"{shown}: the host name does not resolve; is base_url spelled right?"
    else:
        message = f"{shown}: the connection broke: {_innermost(exc)}"
    return errors.APIConnectionError(message, method=method, url=url)


def _comes_of(exc: BaseException, kind: type[BaseException]) -> bool:
    """True if *exc*, or an exception that urllib3 or requests has wrapped in it, is a *kind*."""
    inside: list[Any] = [exc]
    while inside:
        exc = inside.pop()
        if isinstance(exc, kind):
            return True
        causes = (*exc.args, exc.__cause__, exc.__context__)
        inside += [cause for cause in causes if isinstance(cause, BaseException)]
    return False


def _innermost(exc: BaseException) -> str:
    while exc.args and isinstance(exc.args[-1], BaseException):
        exc = exc.args[-1]
    reason = getattr(exc, "reason", None)
    return one_line(reason if isinstance(reason, BaseException) else exc)


def status_error(answer: Answer, method: str) -> errors.APIStatusError:
    """The typed error for a response with an error status, with the server's message."""
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
    """The server's message, in any of the known forms of error bodies."""
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
    """Seconds to wait according to the server (retry-after-ms, retry-after), or None."""
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
    """Seconds from now to an HTTP date; NaN if it is not one."""
    try:
        return max(0.0, email.utils.parsedate_to_datetime(date).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return math.nan


def is_missing_route(exc: errors.APIStatusError) -> bool:
    """True if the endpoint is missing, not the object: a 404 without a message of the server, 405
    (the path has other methods) or 501."""
    if exc.status in (405, 501):
        return True
    if exc.status != 404:
        return False
    sentence = exc.detail.strip().lower().rstrip(".")
    return (
        sentence in ("", "not found")
        or "does not offer" in sentence
        or not isinstance(exc.body, dict)
    )


def not_offered(exc: errors.APIStatusError, path: str) -> errors.NotOfferedError:
    """The error that names the feature a server lacks."""
    place = exc.url.split("?")[0]
    message = f"this server does not offer {path} ({exc.status} on {place})"
    return retold(exc, errors.NotOfferedError, message)


def retold(exc: errors.APIStatusError, kind: type[S], message: str) -> S:
    """The same failure as a *kind*, with a more specific message."""
    told = kind(
        message,
        status=exc.status,
        detail=exc.detail,
        body=exc.body,
        method=exc.method,
        url=exc.url,
        attempts=exc.attempts,
    )
    told.outcome_unknown = exc.outcome_unknown
    return told
