"""All exceptions of tinkex, as a tree: what went wrong, and which errors are retried.

TinkexError
  APIError                          a request to the server failed
    APIConnectionError              there was no response  (retried)
      APITimeoutError               there was no response in time  (retried; a TimeoutError)
    APIResponseValidationError      the response could not be read
    APIStatusError                  the server answered with an error  (retried: 408, 425, 429, 5xx)
      BadRequestError               400
      AuthenticationError           401
      BillingError                  402
      PermissionDeniedError         403
      NotFoundError                 404
        NotOfferedError             404, 405 or 501: the server does not have the endpoint
      ConflictError                 409
        OutcomeUnknownError         409 after a resend: the request may or may not have run
      PromiseExpiredError           410
      UnprocessableEntityError      422
      RateLimitError                429
      InternalServerError           5xx
  RequestFailedError                the operation was accepted, ran, and failed
  PriorOperationFailedError         not sent: an operation before it failed
  ClientClosedError                 the client, the session or the model is closed
  EngineError                       the embedded engine did not start, or died
  MissingExtraError                 an optional package is not installed (also an ImportError)
  TokenizerError                    a tokenizer could not be loaded (also a ValueError)
  DownloadError                     a checkpoint could not be downloaded completely

Wrong arguments are a plain ValueError or TypeError, raised before anything is sent.
This module imports no other module of tinkex.
"""

from __future__ import annotations

from typing import Any, Literal

Category = Literal["user", "server", "unknown"]

#: Statuses after which the same request may be sent again. Not 501: the server does not have the
#: endpoint.
RETRYABLE_STATUSES = frozenset({408, 425, 429, *range(500, 600)} - {501})


def _as_category(value: object) -> Category:
    return value if value in ("user", "server") else "unknown"


class TinkexError(Exception):
    """Base of every exception raised by tinkex."""

    #: True if the same request may be sent again.
    retryable: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle all attributes, whatever the constructor takes, to pass errors between
        processes."""
        return _remade, (type(self), self.args, vars(self))


def _remade(
    cls: type[TinkexError], args: tuple[Any, ...], attributes: dict[str, Any]
) -> TinkexError:
    error = cls.__new__(cls, *args)
    error.args = args
    vars(error).update(attributes)
    return error


class APIError(TinkexError):
    """A request to the server failed.

    Attributes:
        method, url: of the request, if there was one; without the query, which may be secret.
        attempts: how many times it was sent.
        outcome_unknown: True if the server may have run it although the response was lost.
    """

    outcome_unknown: bool = False

    def __init__(self, message: str, *, method: str = "", url: str = "", attempts: int = 1) -> None:
        super().__init__(message)
        self.method = method
        self.url = url.partition("?")[0]
        self.attempts = attempts


class APIConnectionError(APIError):
    """There was no response. The server may or may not have received the request."""

    retryable = True


class APITimeoutError(APIConnectionError, TimeoutError):
    """There was no response in time. The server may or may not have received the request."""


class APIResponseValidationError(APIError):
    """The response does not follow the protocol (bad JSON, a missing field, ...)."""

    #: A proxy may have changed it. A resend is safe: the request carries its seq_id.
    retryable = True


class APIStatusError(APIError):
    """The server answered with an error status.

    Attributes:
        status: the HTTP status.
        body: the decoded JSON body, the text of it, or None.
        detail: the server's own message.
        category: "user" (change the request), "server" or "unknown".
        retry_after: seconds that the server asks to wait, or None.
        should_retry: the server's x-should-retry header, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        detail: str = "",
        body: Any = None,
        retry_after: float | None = None,
        should_retry: bool | None = None,
        method: str = "",
        url: str = "",
        attempts: int = 1,
    ) -> None:
        super().__init__(message, method=method, url=url, attempts=attempts)
        self.status = status
        self.detail = detail
        self.body = body
        self.retry_after = retry_after
        self.should_retry = should_retry

    @property
    def retryable(self) -> bool:  # type: ignore[override]
        if self.should_retry is not None:
            return self.should_retry
        return self.status in RETRYABLE_STATUSES

    @property
    def category(self) -> Category:
        said = _as_category(self.body.get("category") if isinstance(self.body, dict) else None)
        if said != "unknown":
            return said
        if self.status in RETRYABLE_STATUSES:
            return "server"
        return "user"


class BadRequestError(APIStatusError):
    """400: the server does not accept the request."""


class AuthenticationError(APIStatusError):
    """401: the key is missing or wrong."""


class BillingError(APIStatusError):
    """402: the account has no credit left."""


class PermissionDeniedError(APIStatusError):
    """403: the key is valid, but may not do this."""


class NotFoundError(APIStatusError):
    """404: the model, checkpoint, run or session does not exist."""


class NotOfferedError(NotFoundError):
    """404, 405 or 501: the server does not have the endpoint."""


class ConflictError(APIStatusError):
    """409: the request conflicts with something that exists."""


class OutcomeUnknownError(ConflictError):
    """409 after a resend: the first response was lost, so the request may or may not have run."""


class PromiseExpiredError(APIStatusError):
    """410: the server no longer has the operation's result."""


class UnprocessableEntityError(APIStatusError):
    """422: the server cannot read the body."""


class RateLimitError(APIStatusError):
    """429: too many requests. Retried after a pause."""


class InternalServerError(APIStatusError):
    """5xx: the server failed. Retried."""


_BY_STATUS: dict[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    402: BillingError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    410: PromiseExpiredError,
    422: UnprocessableEntityError,
    429: RateLimitError,
}


def status_error_class(status: int) -> type[APIStatusError]:
    """The exception class for an HTTP error status."""
    if status >= 500:
        return InternalServerError
    return _BY_STATUS.get(status, APIStatusError)


class RequestFailedError(TinkexError):
    """The server accepted the operation, and it failed.

    Attributes:
        request_id: the server's id of the operation.
        category: "user", "server" or "unknown".
    """

    def __init__(self, message: str, *, request_id: str = "", category: object = None) -> None:
        super().__init__(message)
        self.request_id = request_id
        self.category = _as_category(category)


class PriorOperationFailedError(TinkexError):
    """Not sent: an operation before it on the same model failed. `__cause__` is that failure."""


class ClientClosedError(TinkexError):
    """The client, its session, or its model on the server is closed."""


class EngineError(TinkexError):
    """The embedded engine did not start, or died."""


class MissingExtraError(TinkexError, ImportError):
    """An optional package is needed that is not installed."""


class TokenizerError(TinkexError, ValueError):
    """The tokenizer of a model could not be loaded."""


class DownloadError(TinkexError):
    """A checkpoint could not be downloaded, or the download is incomplete."""
