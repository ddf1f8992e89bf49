"""Reading a stream of samples: server-sent events as chunks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import requests

from tinkex import errors, types, wire
from tinkex.runtime.responses import connection_error, error_detail


def read_events(response: Any) -> Iterator[types.SampleStreamChunk]:
    """Server-sent events as chunks, each as soon as it is whole."""
    data: deque[bytes] = deque()
    try:
        for line in response.iter_lines(chunk_size=1):
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                event = b"\n".join(data)
                data.clear()
                if event == b"[DONE]":
                    return
                yield _read_event(event)
    except requests.RequestException as exc:
        raise connection_error(exc, "POST", response.url, 0) from exc
    raise errors.APIConnectionError("the stream of samples broke off before its end.")


def _read_event(event: bytes) -> types.SampleStreamChunk:
    try:
        payload = wire.loads(event)
        if not isinstance(payload, dict) or not payload.get("error"):
            return wire.from_json(types.SampleStreamChunk, payload)
    except ValueError as exc:
        raise errors.APIResponseValidationError(
            f"the server sent something unreadable in a stream of samples: {exc}"
        ) from exc
    category = payload.get("category")
    raise errors.RequestFailedError(
        f"streaming failed on the server: {error_detail(payload)}",
        category=category if category in ("user", "server") else "unknown",
    )
