"""Decodes the requests of operations from the journal or a file."""

from __future__ import annotations

from typing import Any

from tinkex import wire
from tinkex.server.live import Refused

#: Content type, in the journal, of the operation that takes the number of a refused request.
REFUSED = "application/x-tinkex-refused"

#: The class of each operation's JSON body.
_REQUESTS: dict[str, type[Any]] = {
    name: operation.request
    for name, operation in wire.OPERATIONS.items()
    if operation.request is not None
}


def decode(name: str, content_type: str, body: bytes) -> Any:
    """Decode the request of an operation. Raises DecodeError."""
    if content_type == REFUSED:
        return wire.from_json(Refused, wire.loads(body))
    if name in ("Forward", "ForwardBackward"):
        return wire.decode_request(content_type, body)
    return wire.from_json(_REQUESTS[name], wire.loads(body))
