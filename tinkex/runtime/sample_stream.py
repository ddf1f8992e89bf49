"""Reading a stream of samples: server-sent events as chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tinkex import errors, types, wire
from tinkex.runtime.responses import error_detail

#: Most lines of one event.
MOST_LINES = 1000


def read_events(lines: Iterable[bytes]) -> Iterator[types.SampleStreamChunk]:
    """Server-sent events as chunks, each as soon as it is complete."""
    data: list[bytes] = []
    for line in lines:
        if line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
            if len(data) > MOST_LINES:
                raise errors.APIResponseValidationError(
                    f"the server sent an event of over {MOST_LINES} lines in a stream of samples."
                )
        elif not line and data:
            event = b"\n".join(data)
            data.clear()
            if event == b"[DONE]":
                return
            yield _read_event(event)
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
    raise errors.RequestFailedError(
        f"streaming failed on the server: {error_detail(payload)}",
        category=payload.get("category"),
    )
