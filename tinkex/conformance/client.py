"""The HTTP client of the checks: single requests, every status returned, results polled for.

Unlike the SDK it does not number requests, retry or hide a status, because order, repeats and
refusals are tested by the checks. Does not know what a correct response is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import attrs
import requests

from tinkex import config, errors, wire
from tinkex.runtime.connection import Connection
from tinkex.runtime.responses import Answer, error_detail
from tinkex.runtime.retry import ONCE
from tinkex.runtime.transport import Transport

T = TypeVar("T")

#: Every status is returned to the check.
_ANY_STATUS = frozenset(range(300, 600))

#: Time limit of a poll in seconds, after which clients of the protocol time out.
POLL_SECONDS = 45.0

#: Statuses of an endpoint that the server does not have.
_MISSING = (404, 405, 501)


class Broken(Exception):
    """The server violates the rule; the message has the details."""


class NotOffered(Exception):
    """The rule does not apply: the server lacks the feature, or an option of the check is
    missing."""


@attrs.frozen
class Ended:
    """How an operation ended.

    Attributes:
        answer: the server's last answer about it.
        request_id: of its promise; "" if it was refused, or answered without a promise.
        refused: True if the request was refused.
        failure: the server's message if it was refused or failed, else None.
        payload: the decoded JSON; None for a protobuf result.
    """

    answer: Answer
    request_id: str
    refused: bool
    failure: str | None
    payload: Any

    def value(self, result: type[T], what: str) -> T:
        """The result as an object of *result*. Raises Broken if it failed or cannot be read."""
        if self.failure is not None:
            when = "was refused" if self.refused else "failed"
            raise Broken(f"{what} {when} ({self.answer.status}): {self.failure}")
        try:
            if self.payload is None:
                decoded: T = wire.decode_result(result, self.answer.content)  # type: ignore[type-var]
                return decoded
            payload = self.payload
            if payload.get("status") == "completed" and "result" in payload:
                payload = payload["result"]
            return wire.from_json(result, payload)
        except ValueError as exc:
            raise Broken(f"the result of {what} cannot be read: {exc}") from exc


class _FreshConnections(requests.adapters.HTTPAdapter):
    """One connection for each request.

    A kept connection that the server has closed would look like a failure of the server, and a
    check must not send a request twice.
    """

    def send(self, *args: Any, **kwargs: Any) -> requests.Response:
        try:
            return super().send(*args, **kwargs)
        finally:
            self.poolmanager.clear()


class Client:
    """Sends the requests of the checks with one key.

    Args:
        patience: seconds to wait for the result of one operation.
    """

    def __init__(self, settings: config.Config, patience: float) -> None:
        transport = Transport(settings, adapter=_FreshConnections())
        self.connection = Connection(settings, transport=transport)
        self.patience = patience
        self._transport = self.connection.transport
        #: True if batches go as protobuf; None until the first batch shows it.
        self.protobuf = self.connection.features.proto_write_fwdbwd
        #: Paths of created checkpoints, to be deleted at the end.
        self.saved: list[str] = []

    def with_key(self, key: str) -> Transport:
        """A transport with another key, for requests that the server should refuse."""
        settings = attrs.evolve(self.connection.config, api_key=key)
        transport = Transport(settings, adapter=_FreshConnections())
        transport.established = True
        return transport

    def send(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        timeout: float = 60.0,
        transport: Transport | None = None,
    ) -> Answer:
        """Send one request under /api/v1/, once, and return the answer; *path* is not encoded.

        Raises:
            TinkexError: If no answer comes.
        """
        transport = transport or self._transport
        return transport.send(
            method,
            transport.config.base_url + wire.PREFIX + path,
            body,
            headers=headers,
            timeout=timeout,
            most_bytes=wire.RESULT_ANSWER,
            retry=ONCE,
            accept=_ANY_STATUS,
            parse=lambda answer: answer,
        )

    def post(self, path: str, payload: Any = None, **options: Any) -> Answer:
        """POST *payload* as JSON; *options* are those of `send`."""
        return self.send("POST", path, wire.dumps({} if payload is None else payload), **options)

    def get(self, path: str, **options: Any) -> Answer:
        """GET *path*; *options* are those of `send`."""
        return self.send("GET", path, **options)

    def endpoint(self, method: str, path: str, payload: Any = None) -> Answer:
        """Call an endpoint that not every server has; the answer is a success.

        Raises:
            NotOffered: If the server does not have the endpoint.
            Broken: If the server refuses the request.
        """
        body = b"" if payload is None else wire.dumps(payload)
        answer = self.send(method, path, body)
        if is_missing(answer):
            raise NotOffered(f"{answer.status} on {method} {path.split('?')[0]}")
        if answer.status >= 300:
            raise Broken(f"{method} {path.split('?')[0]} returned {said(answer)}")
        return answer

    # Promises.

    def poll(self, request_id: str, timeout: float = POLL_SECONDS, **more: Any) -> Answer:
        """Ask once for a result."""
        return self.post(
            wire.RETRIEVE_FUTURE.path,
            {"request_id": request_id, **more},
            headers={"Accept": f"{wire.PROTOBUF}, {wire.JSON}"},
            timeout=timeout,
        )

    def wait(self, request_id: str, seconds: float | None = None) -> Answer:
        """Poll until the response is not "not yet".

        Raises:
            Broken: If there is none within *seconds*.
        """
        limit = self.patience if seconds is None else seconds
        deadline = time.monotonic() + limit
        while (left := deadline - time.monotonic()) > 0:
            try:
                answer = self.poll(request_id, min(left, POLL_SECONDS))
            except errors.APITimeoutError:
                continue
            if not is_not_yet(answer):
                return answer
            time.sleep(0.02)
        raise Broken(f"no result of {request_id} within {limit:.0f} s")

    def is_done(self, request_id: str, within: float = 1.0) -> bool:
        """True if there is a result *within* this many seconds."""
        try:
            return not is_not_yet(self.poll(request_id, within))
        except errors.APITimeoutError:
            return False

    def end(self, answer: Answer, seconds: float | None = None) -> Ended:
        """Wait for the end of the operation; *answer* is the response to its request."""
        if answer.status >= 300:
            return Ended(answer, "", True, said(answer), {})
        request_id = request_id_of(answer)
        if not request_id:
            return Ended(answer, "", False, _failure(answer), answer.json())
        last = self.wait(request_id, seconds)
        return Ended(
            last, request_id, False, _failure(last), None if last.is_protobuf else as_object(last)
        )


def request_id_of(answer: Answer) -> str:
    """The request_id of a promise; "" if *answer* is not a promise."""
    if answer.status >= 300:
        return ""
    value = as_object(answer).get("request_id")
    return "" if value is None else str(value)


def is_not_yet(answer: Answer) -> bool:
    """True if a poll reports that there is no result yet, in any of the forms that servers use."""
    if answer.status in (408, 429):
        return True
    if answer.status != 200 or answer.is_protobuf:
        return False
    payload = as_object(answer)
    return payload.get("type") == "try_again" or payload.get("status") == "pending"


def is_missing(answer: Answer) -> bool:
    """True if the server lacks the endpoint; False if it lacks the object that was asked for."""
    if answer.status not in _MISSING:
        return False
    sentence = sentence_of(answer).lower()
    return (
        not sentence
        or sentence.rstrip(".") in ("not found", "method not allowed")
        or "does not offer" in sentence
    )


def as_object(answer: Answer) -> dict[str, Any]:
    """The JSON object in *answer*; {} if it holds something else."""
    try:
        payload = answer.json()
    except errors.APIResponseValidationError:
        return {}
    return payload if isinstance(payload, dict) else {}


def sentence_of(answer: Answer) -> str:
    """The message in an error body."""
    if answer.is_protobuf:
        return ""
    payload = as_object(answer)
    return error_detail(payload or answer.content[:300].decode("utf-8", "replace"))


def said(answer: Answer) -> str:
    """Status and message of *answer*, for the reason of a result."""
    sentence = sentence_of(answer)
    sentence = sentence if len(sentence) <= 160 else sentence[:157] + "..."
    return f"{answer.status}{f' ({sentence})' if sentence else ' with an empty body'}"


def _failure(answer: Answer) -> str | None:
    if answer.status >= 300:
        return said(answer)
    if answer.is_protobuf:
        return None
    payload = as_object(answer)
    if payload.get("error") is None and payload.get("status") != "failed":
        return None
    return sentence_of(answer) or "no reason given"


def zstd_frame(body: bytes) -> bytes:
    """*body* as a zstd frame of uncompressed blocks; needs no library."""
    parts = [body[i : i + (1 << 17)] for i in range(0, len(body), 1 << 17)] or [b""]
    return _frame([(0, len(part), part) for part in parts])


def zstd_bomb(mebibytes: int) -> bytes:
    """A zstd frame that unpacks to *mebibytes* MiB of zeros, in 32 bytes each."""
    return _frame([(1, 1 << 17, b"\0")] * (8 * mebibytes))


def _frame(blocks: Sequence[tuple[int, int, bytes]]) -> bytes:
    """Write blocks of (kind: 0 raw, 1 one repeated byte; size; content) as in RFC 8878."""
    out = [b"\x28\xb5\x2f\xfd\x00\x58"]  # magic; no content size, no checksum; a 2 MiB window
    for i, (kind, size, content) in enumerate(blocks):
        is_last = i == len(blocks) - 1
        out.append((is_last | kind << 1 | size << 3).to_bytes(3, "little") + content)
    return b"".join(out)
