"""Server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import Response, StreamingResponse

from tinkex import wire
from tinkex.server.http_errors import Refusal

#: No cache may store the response, and no proxy may buffer it.
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

DONE = b"data: [DONE]\n\n"


def event(payload: Mapping[str, Any], name: str = "") -> bytes:
    """One event; *name* if the API names its events."""
    line = f"event: {name}\n".encode() if name else b""
    return line + b"data: " + wire.dumps(payload) + b"\n\n"


def error_body(refusal: Refusal) -> dict[str, Any]:
    """A refusal in OpenAI's form."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
    kind = kinds.get(refusal.status) or (
        "invalid_request_error" if refusal.status < 500 else "server_error"
    )
    return {
        "error": {"message": refusal.sentence, "type": kind, "param": None, "code": refusal.status}
    }


async def event_stream(payloads: AsyncIterator[Mapping[str, Any]]) -> Response:
    """*payloads* as events, then [DONE]. A failure in the middle is an event, too.

    Raises:
        Refusal: If the first payload fails, since the response can then still be an error.
    """
    try:
        first = await payloads.__anext__()
    except StopAsyncIteration:
        first = None

    async def body() -> AsyncIterator[bytes]:
        try:
            if first is not None:
                yield event(first)
            async for payload in payloads:
                yield event(payload)
        except Refusal as refusal:
            yield event(error_body(refusal))
        yield DONE

    return StreamingResponse(body(), media_type="text/event-stream", headers=_HEADERS)


def named_event_stream(events: AsyncIterator[bytes]) -> Response:
    return StreamingResponse(events, media_type="text/event-stream", headers=_HEADERS)
