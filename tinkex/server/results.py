"""Results and failures of operations: how they are stored and sent.

A result is encoded once, on the compute thread: results of training and sampling in protobuf,
others in JSON. Protobuf is converted to JSON for clients that do not accept it. Does not know about
HTTP, except content types.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from collections.abc import Mapping
from typing import Any, Literal

import attrs
import numpy as np

from tinkex import errors, types, wire
from tinkex.server.http_errors import Refusal
from tinkex.server.memory import out_of_memory

logger = logging.getLogger(__name__)

Form = Literal["json", "training", "sample", "failure"]

_PROTOBUF_FORMS: dict[str, type[Any]] = {
    "training": types.ForwardBackwardOutput,
    "sample": types.SampleResponse,
}


@attrs.frozen
class Answer:
    """The encoded result of an operation, or its failure.

    Attributes:
        form: "training" and "sample" bodies are protobuf, "json" and "failure" ones JSON.
    """

    form: Form
    body: bytes = attrs.field(repr=False)

    @property
    def failed(self) -> bool:
        return self.form == "failure"

    @property
    def has_protobuf(self) -> bool:
        return self.form in _PROTOBUF_FORMS

    @property
    def sentence(self) -> str | None:
        """The error message of a failure, or None."""
        return str(wire.loads(self.body)["error"]) if self.failed else None

    def as_json(self) -> bytes:
        """The body in JSON."""
        if self.form not in _PROTOBUF_FORMS:
            return self.body
        result = wire.decode_result(_PROTOBUF_FORMS[self.form], self.body)
        return wire.dumps(wire.to_json(result, "sample" if self.form == "sample" else None))


def answer(outcome: Any, what: str) -> Answer:
    """Encode a result, or the exception that was raised instead.

    Server failures are logged, those caused by the request are not. *what* names the operation.
    """
    if isinstance(outcome, Exception):
        return failure(outcome, what)
    try:
        if isinstance(outcome, types.ForwardBackwardOutput):
            return Answer("training", wire.encode_result(outcome))
        if isinstance(outcome, types.SampleResponse):
            return Answer("sample", wire.encode_result(outcome))
        return Answer("json", wire.dumps(wire.to_json(outcome)))
    except Exception as exc:
        return failure(exc, f"{what} has run, but its result cannot be sent")


def failure(exc: Exception, what: str) -> Answer:
    """Encode an exception as a sentence and a category."""
    sentence, category = explained(exc)
    if category == "server" or out_of_memory(exc) is not None:  # log the allocator's message
        logger.error("%s failed: %s", what, sentence, exc_info=exc)
    return Answer("failure", wire.dumps({"error": f"{what}: {sentence}", "category": category}))


def explained(exc: Exception) -> tuple[str, str]:
    """An exception as a sentence and a category: "user" if the request caused it, or "server"."""
    if isinstance(exc, Refusal):
        return exc.sentence, exc.category
    if isinstance(exc, (ValueError, errors.TinkexError)):
        return str(exc), "user"
    memory = out_of_memory(exc)
    if memory is not None:
        return memory, "user"
    if isinstance(exc, (OSError, sqlite3.Error)):
        where = f" ({exc.filename})" if isinstance(exc, OSError) and exc.filename else ""
        reason = exc.strerror if isinstance(exc, OSError) else exc
        return f"the server's disk failed: {reason or exc}{where}.", "server"
    return f"the server failed with {type(exc).__name__}: {exc}", "server"


def fingerprint(value: Any) -> bytes:
    """A hash of 16 bytes that is the same for equal requests in any encoding."""
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, value)
    return digest.digest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype.str}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    elif isinstance(value, types.TensorData):
        parts = (value.values, value.sparse_crow_indices, value.sparse_col_indices)
        _feed(digest, [value.shape, *parts])
    elif attrs.has(type(value)):
        digest.update(type(value).__name__.encode())
        _feed(digest, [getattr(value, field.name) for field in attrs.fields(type(value))])
    elif isinstance(value, Mapping):
        _feed(digest, sorted(value.items(), key=lambda item: str(item[0])))
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    else:
        digest.update(f"{type(value).__name__}{value!r};".encode())
