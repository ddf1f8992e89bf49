"""Every exception tinkex raises. Read this page and you know what can go wrong.

TinkexError
  APIError                          talking to the server did not work out
    APIConnectionError              no answer came back  (retried)
      APITimeoutError               none came back in time  (retried; a TimeoutError)
    APIResponseValidationError      an answer came back that makes no sense
    APIStatusError                  the server answered with an error  (retried: 408, 425, 429, 5xx)
      BadRequestError               400
      AuthenticationError           401
      BillingError                  402
      PermissionDeniedError         403
      NotFoundError                 404
        NotOfferedError             404, 405 or 501: this server does not have the endpoint
      ConflictError                 409
        OutcomeUnknownError         409 on our own resend: it may or may not have run
      PromiseExpiredError           410
      UnprocessableEntityError      422
      RateLimitError                429
      InternalServerError           5xx
  RequestFailedError                the operation was accepted, ran, and failed
  PriorOperationFailedError         never sent: an operation before it failed
  ClientClosedError                 the client, the session or the model is closed
  EngineError                       the embedded engine could not start, or died
  MissingExtraError                 a part of tinkex is not installed (also an ImportError)
  TokenizerError                    no tokenizer could be loaded (also a ValueError)
  DownloadError                     a checkpoint could not be downloaded whole

What the caller did wrong is a plain ValueError or TypeError, raised before anything is sent.
This module imports nothing of tinkex.
"""

from __future__ import annotations

from typing import Any, Literal

Category = Literal["user", "server", "unknown"]

#: Statuses after which the same request may be sent again. Not 501: the server has no such thing.
RETRYABLE_STATUSES = frozenset({408, 425, 429, *range(500, 600)} - {501})


class TinkexError(Exception):
    """Base of every exception raised by tinkex."""

    #: Whether the same request may simply be sent again.
    retryable: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled whole, whatever the constructor takes: errors cross processes, too."""
        return _remade, (type(self), self.args, vars(self))


def _remade(
    cls: type[TinkexError], args: tuple[Any, ...], attributes: dict[str, Any]
) -> TinkexError:
    error = cls.__new__(cls, *args)
    error.args = args
    vars(error).update(attributes)
    return error


class APIError(TinkexError):
    """Talking to the server did not work out.

    Attributes:
        method, url: of the request, where there was one; without its query, which may be secret.
        attempts: how many times it was sent.
        outcome_unknown: whether the server may have carried it out although no good answer came.
    """

    outcome_unknown: bool = False

    def __init__(self, message: str, *, method: str = "", url: str = "", attempts: int = 1) -> None:
        super().__init__(message)
        self.method = method
        self.url = url.partition("?")[0]
        self.attempts = attempts


class APIConnectionError(APIError):
    """No answer came back. The server may or may not have seen the request."""

    retryable = True


class APITimeoutError(APIConnectionError, TimeoutError):
    """No answer came back in time. The server may or may not have seen the request."""


class APIResponseValidationError(APIError):
    """An answer came back that is not what the protocol promises (bad JSON, missing field, ...)."""

    #: A proxy may have garbled it; the request carries its order number, so again is safe.
    retryable = True


class APIStatusError(APIError):
    """The server answered with an error status.

    Attributes:
        status: the HTTP status.
        body: the decoded JSON body, the text of it, or None.
        detail: the server's own sentence.
        category: "user" (a change of the request can help), "server" or "unknown".
        retry_after: seconds the server asks us to wait, or None.
        should_retry: what the server says of trying again (x-should-retry), or None.
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
        if isinstance(self.body, dict) and self.body.get("category") in ("user", "server"):
            category: Category = self.body["category"]
            return category
        if self.status in RETRYABLE_STATUSES:
            return "server"
        return "user"


class BadRequestError(APIStatusError):
    """400: the server does not accept the request."""


class AuthenticationError(APIStatusError):
    """401: the key is missing or wrong."""


class BillingError(APIStatusError):
    """402: the account cannot pay."""


class PermissionDeniedError(APIStatusError):
    """403: the key is good, but not for this."""


class NotFoundError(APIStatusError):
    """404: there is no such thing."""


class NotOfferedError(NotFoundError):
    """This server does not offer the endpoint at all."""


class ConflictError(APIStatusError):
    """409: the request clashes with something that is there already."""


class OutcomeUnknownError(ConflictError):
    """Our resend was refused and the first answer was lost: it may or may not have run."""


class PromiseExpiredError(APIStatusError):
    """410: the server no longer knows this operation's result."""


class UnprocessableEntityError(APIStatusError):
    """422: the body is not what the endpoint wants."""


class RateLimitError(APIStatusError):
    """429: too many requests; retried after a pause."""


class InternalServerError(APIStatusError):
    """5xx: the server broke; retried."""


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
    """The class that stands for an HTTP error status."""
    if status >= 500:
        return InternalServerError
    return _BY_STATUS.get(status, APIStatusError)


class RequestFailedError(TinkexError):
    """The server accepted the operation, ran it, and it failed.

    Attributes:
        request_id: the server's handle of the operation.
        category: "user", "server" or "unknown".
    """

    def __init__(
        self, message: str, *, request_id: str = "", category: Category = "unknown"
    ) -> None:
        super().__init__(message)
        self.request_id = request_id
        self.category = category


class PriorOperationFailedError(TinkexError):
    """Never sent: an operation before it on the same model failed (`__cause__` is that failure)."""


class ClientClosedError(TinkexError):
    """The client (or its session, or its model on the server) is closed."""


class EngineError(TinkexError):
    """The embedded engine could not start, or has died."""


class MissingExtraError(TinkexError, ImportError):
    """A part of tinkex that is not installed is needed."""


class TokenizerError(TinkexError, ValueError):
    """No tokenizer could be loaded for a model."""


class DownloadError(TinkexError):
    """A checkpoint could not be downloaded, or what came is not whole."""
