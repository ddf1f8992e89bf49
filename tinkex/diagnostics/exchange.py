"""One HTTP request of a diagnosis, sent once; every status is an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinkex import wire
from tinkex.runtime.responses import Answer
from tinkex.runtime.retry import ONCE
from tinkex.runtime.transport import Transport

#: The name of a model, a run or a session that exists on no server.
UNKNOWN_ID = "tinkex-doctor"

_ANY_STATUS = frozenset(range(300, 600))


def ask(
    transport: Transport,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    query: Mapping[str, Any] | None = None,
) -> Answer:
    """Send one request, once.

    Raises:
        TinkexError: If no answer comes.
    """
    return transport.send(
        method,
        transport.url(
            path, run_id=UNKNOWN_ID, checkpoint_id=f"weights/{UNKNOWN_ID}", session_id=UNKNOWN_ID,
            sampler_id=UNKNOWN_ID,
        ),
        body,
        headers=headers,
        query=query,
        most_bytes=wire.LIST_ANSWER,
        retry=ONCE,
        accept=_ANY_STATUS,
        parse=lambda answer: answer,
    )  # fmt: skip
