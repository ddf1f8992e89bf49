"""How a check asks a server: bare requests, answers with their status, results waited for.

Unlike the SDK it numbers nothing by itself, sends nothing again and hides no status: order, repeats
and refusals are what the checks are about. Knows nothing of what a right answer is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import attrs
import requests

from tinkex import config, errors, wire
from tinkex.runtime.responses import Answer, error_detail
from tinkex.runtime.retry import ONCE
from tinkex.runtime.session import Connection
from tinkex.runtime.transport import Transport

T = TypeVar("T")

#: Every status is an answer to look at.
_ANY_STATUS = frozenset(range(300, 600))

#: Seconds that one poll may take; the protocol's clients give up here.
POLL_SECONDS = 45.0

#: How an unknown endpoint is told from an unknown thing.
_MISSING = (404, 405, 501)


class Broken(Exception):
    """The server does not keep the rule; says how."""


class NotOffered(Exception):
    """The rule does not apply: the server has no such feature, or it was not asked for."""


@attrs.frozen
class Ended:
    """How an operation ended.

    Attributes:
        answer: the last answer of the server about it.
        request_id: its handle; "" if it was refused at once, or answered without one.
        refused: whether it was refused when it was sent.
        failure: the server's sentence, if it was refused or failed; else None.
        payload: the decoded JSON; None for a protobuf result.
    """

    answer: Answer
    request_id: str
    refused: bool
    failure: str | None
    payload: Any

    def value(self, result: type[T], what: str) -> T:
        """The result. Raises Broken if there is none, or it does not fit."""
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
    """A connection for each request: one that the server has closed meanwhile would look like its
    failure, and must not be asked twice."""

    def send(self, *args: Any, **kwargs: Any) -> requests.Response:
        try:
            return super().send(*args, **kwargs)
        finally:
            self.poolmanager.clear()


class Asker:
    """One key's way to a server.

    Args:
        patience: seconds to wait for the result of one operation.
    """

    def __init__(self, settings: config.Config, patience: float) -> None:
        transport = Transport(settings, adapter=_FreshConnections())
        self.connection = Connection(settings, transport=transport)
        self.patience = patience
        self._transport = self.connection.transport
        #: Whether batches go as protobuf; found out with the first.
        self.protobuf = self.connection.features.proto_write_fwdbwd
        #: Checkpoints that were made, to be removed at the end.
        self.saved: list[str] = []

    def with_key(self, key: str) -> Transport:
        """Another key on the same server, for requests that should be refused."""
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
        """One request under /api/v1/, once, whatever its answer; *path* goes as it is.

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
            retry=ONCE,
            accept=_ANY_STATUS,
            parse=lambda answer: answer,
        )

    def post(self, path: str, payload: Any = None, **options: Any) -> Answer:
        return self.send("POST", path, wire.dumps({} if payload is None else payload), **options)

    def get(self, path: str, **options: Any) -> Answer:
        return self.send("GET", path, **options)

    def endpoint(self, method: str, path: str, payload: Any = None) -> Answer:
        """The success of an endpoint that not every server has.

        Raises:
            NotOffered: If this one does not.
            Broken: If it refuses.
        """
        body = b"" if payload is None else wire.dumps(payload)
        answer = self.send(method, path, body)
        if is_missing(answer):
            raise NotOffered(f"{answer.status} on {method} {path.split('?')[0]}")
        if answer.status >= 300:
            raise Broken(f"{method} {path.split('?')[0]} gave {said(answer)}")
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
        """Poll until there is an answer other than "not yet".

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
        """Whether there is a result by now, or soon."""
        try:
            return not is_not_yet(self.poll(request_id, within))
        except errors.APITimeoutError:
            return False

    def end(self, answer: Answer, seconds: float | None = None) -> Ended:
        """How the operation ends whose sending gave *answer*."""
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
    """The handle in a promise; "" where the answer is none."""
    if answer.status >= 300:
        return ""
    value = as_object(answer).get("request_id")
    return "" if value is None else str(value)


def is_not_yet(answer: Answer) -> bool:
    """Whether a poll says that there is no result yet, in any of the ways in use."""
    if answer.status in (408, 429):
        return True
    if answer.status != 200 or answer.is_protobuf:
        return False
    payload = as_object(answer)
    return payload.get("type") == "try_again" or payload.get("status") == "pending"


def is_missing(answer: Answer) -> bool:
    """Whether the server does not have the endpoint, rather than the thing."""
    if answer.status not in _MISSING:
        return False
    sentence = sentence_of(answer).lower()
    return (
        not sentence
        or sentence.rstrip(".") in ("not found", "method not allowed")
        or "does not offer" in sentence
    )


def as_object(answer: Answer) -> dict[str, Any]:
    """The JSON object in *answer*; {} where it holds something else."""
    try:
        payload = answer.json()
    except errors.APIResponseValidationError:
        return {}
    return payload if isinstance(payload, dict) else {}


def sentence_of(answer: Answer) -> str:
    """What the server says in an error body."""
    if answer.is_protobuf:
        return ""
    payload = as_object(answer)
    return error_detail(payload or answer.content[:300].decode("utf-8", "replace"))


def said(answer: Answer) -> str:
    """Status and sentence, for a reason."""
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
    """*body* as a zstd frame, uncompressed: it needs no library."""
    parts = [body[i : i + (1 << 17)] for i in range(0, len(body), 1 << 17)] or [b""]
    return _frame([(0, len(part), part) for part in parts])


def zstd_bomb(mebibytes: int) -> bytes:
    """A zstd frame of so many MiB of zeros, in 32 bytes each."""
    return _frame([(1, 1 << 17, b"\0")] * (8 * mebibytes))


def _frame(blocks: Sequence[tuple[int, int, bytes]]) -> bytes:
    """Blocks of (kind: 0 as it is, 1 one byte repeated; size; content) as RFC 8878 has them."""
    out = [b"\x28\xb5\x2f\xfd\x00\x58"]  # magic; no content size, no checksum; a 2 MiB window
    for i, (kind, size, content) in enumerate(blocks):
        is_last = i == len(blocks) - 1
        out.append((is_last | kind << 1 | size << 3).to_bytes(3, "little") + content)
    return b"".join(out)
