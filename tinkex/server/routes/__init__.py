"""The endpoints of the server, one module per subject, collected as Starlette's routes."""

from __future__ import annotations

from starlette.routing import Route

from tinkex import wire
from tinkex.server.openai import endpoints as openai
from tinkex.server.request_context import guarded
from tinkex.server.routes import (
    archives,
    checkpoints,
    futures,
    sampling,
    sessions,
    training,
    unsupported,
)

#: The busiest first: they are looked through in order.
_MODULES = (futures.ENDPOINTS, training.ENDPOINTS, sampling.ENDPOINTS, sessions.ENDPOINTS)
#: A path with a slash in it fits many patterns: the longer ones come first.
_MANAGEMENT = (archives.ENDPOINTS, unsupported.ENDPOINTS, checkpoints.ENDPOINTS)
#: What changes nothing, or answers bit by bit: a repeat simply runs again.
_REPEATABLE = {
    "retrieve_future",
    "retrieve_futures",
    "session_heartbeat",
    "stream_sample",
    "telemetry",
    "sessions/search",
}


def routes() -> list[Route]:
    found = [Route("/", guarded(sessions.about, public=True), methods=["GET"])]
    for endpoints, public in (
        *((endpoints, False) for endpoints in _MODULES),
        (sessions.PUBLIC, True),
        (archives.PUBLIC, True),
        *((endpoints, False) for endpoints in _MANAGEMENT),
    ):
        for method, path, handler in endpoints:
            once = method == "POST" and path not in _REPEATABLE
            endpoint = guarded(handler, public=public, once=once)
            found.append(Route(wire.PREFIX + path, endpoint, methods=[method]))
    return [*found, *openai.routes()]
