"""Endpoints of the protocol that this server does not support: refused with the reason."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from tinkex.server.http_errors import not_offered
from tinkex.server.request_context import Call, Handler


def _absent(what: str, instead: str = "") -> Handler:
    async def refused(call: Call) -> Response:
        raise not_offered(what, instead)

    return refused


_billing = _absent("billing", "It costs nothing.")
_audit = _absent("its audit log", "It is a file in the server's home.")

ENDPOINTS: list[tuple[str, str, Any]] = [
    ("GET", "billing/{rest:path}", _billing),
    ("POST", "billing/{rest:path}", _billing),
    ("GET", "audit", _audit),
    ("GET", "audit/{rest:path}", _audit),
    ("GET", "sessions/{session_id}/trace_export", _absent("traces of sessions")),
    (
        "POST",
        "create_custom_loss",
        _absent(
            "losses that run on the server",
            "forward_backward_custom computes them on the client.",
        ),
    ),
]
