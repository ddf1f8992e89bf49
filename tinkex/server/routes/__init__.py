"""The endpoints of the server, one module per subject, as Starlette routes."""

from __future__ import annotations

from starlette.routing import Route

from tinkex import wire
from tinkex.server.openai import endpoints as openai
from tinkex.server.page import endpoints as page
from tinkex.server.request_context import guarded
from tinkex.server.routes import (
    archives,
    checkpoints,
    external,
    futures,
    metrics,
    sampling,
    sessions,
    training,
    unsupported,
)

#: The busiest first, because routes are matched in order.
_MODULES = (futures.ENDPOINTS, training.ENDPOINTS, sampling.ENDPOINTS, sessions.ENDPOINTS)
#: Paths with parameters that contain slashes: longer patterns first.
_MANAGEMENT = (
    archives.ENDPOINTS,
    external.ENDPOINTS,
    unsupported.ENDPOINTS,
    checkpoints.ENDPOINTS,
    metrics.ENDPOINTS,
)
#: POSTs that change nothing, or stream their response: a repeat runs again.
_REPEATABLE = {
    "retrieve_future",
    "retrieve_futures",
    "session_heartbeat",
    "stream_sample",
    "telemetry",
    "sessions/search",
}


def routes() -> list[Route]:
    """All routes, in the order of matching."""
    found = page.routes()
    numbers = guarded(sessions.numbers, key_of=openai.bearer_key)
    found.append(Route("/metrics", numbers, methods=["GET"]))
    # Health checks of load balancers and orchestrators, beside the paths of the API.
    for method, path, handler in sessions.PUBLIC:
        endpoint = guarded(handler, name=path, public=True)
        found.append(Route(f"/{path}", endpoint, methods=[method]))
    for endpoints, public in (
        *((endpoints, False) for endpoints in _MODULES),
        (sessions.PUBLIC, True),
        (archives.PUBLIC, True),
        (external.PUBLIC, True),
        *((endpoints, False) for endpoints in _MANAGEMENT),
    ):
        for method, path, handler in endpoints:
            once = method == "POST" and path not in _REPEATABLE
            endpoint = guarded(handler, name=path, public=public, once=once)
            found.append(Route(wire.PREFIX + path, endpoint, methods=[method]))
    return [*found, *openai.routes()]
