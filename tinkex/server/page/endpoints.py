"""The endpoints of the page: its files, signing in, live updates, and actions.

Everything except the files and signing in needs the cookie or an API key. Deleting, publishing,
downloading and chatting use the API's own endpoints, with the cookie.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from tinkex.server.http_errors import Refusal
from tinkex.server.openai.chat import chat_completions
from tinkex.server.openai.completions import completions
from tinkex.server.openai.events import event, named_event_stream
from tinkex.server.page.sign_in import COOKIE_SECONDS, check_same_origin
from tinkex.server.page.state import overview, overview_event, run_details
from tinkex.server.request_context import Call, guarded, header_key, reply
from tinkex.server.routes import archives, checkpoints, metrics, sessions

_FILES = Path(__file__).parent / "static"
_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
#: The browser loads and runs our own files only, whatever a name or a prompt contains.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
#: Seconds after which an idle stream sends a keep-alive comment.
_KEEP_ALIVE_SECONDS = 15.0


def _file(name: str) -> Response:
    path = _FILES / name
    return Response(path.read_bytes(), 200, _HEADERS, _TYPES[path.suffix])


async def index(call: Call) -> Response:
    """The page for a browser, name and version for a program."""
    if "text/html" in call.request.headers.get("accept", ""):
        return _file("index.html")
    return await sessions.about(call)


async def asset(call: Call) -> Response:
    name = call.parameter("name")
    if name not in {path.name for path in _FILES.iterdir()}:
        raise Refusal(404, "the page has no such file.")
    return _file(name)


# Signing in.


def _cookie_name(request: Request) -> str:
    """The cookie's name, with the port, because browsers share cookies between ports of a host."""
    return f"tinkex_{request.url.port or 0}"


def cookie_key(request: Request) -> str | None:
    """The API key from the header, or from the cookie's sign-in. Raises Refusal (403)."""
    key = header_key(request)
    cookie = request.cookies.get(_cookie_name(request))
    if key is not None or cookie is None:
        return key
    check_same_origin(request.headers)
    found: str | None = request.app.state.site.sign_ins.key_of(cookie)
    return found


def _signed_in(call: Call, cookie: str, response: Response) -> Response:
    response.set_cookie(
        _cookie_name(call.request),
        cookie,
        max_age=int(COOKIE_SECONDS),
        httponly=True,
        samesite="strict",
        secure=call.request.url.scheme == "https",
    )
    return response


async def give_token(call: Call) -> Response:
    """A path that signs a browser in once, for `tinkex ui` to open."""
    key = header_key(call.request)
    if key is None:
        return reply({"path": "/"})
    return reply({"path": f"/ui/enter?token={quote(call.site.sign_ins.give_token(key))}"})


async def enter(call: Call) -> Response:
    cookie = call.site.sign_ins.exchange(call.request.query_params.get("token", ""))
    return _signed_in(call, cookie, RedirectResponse("/", 303))


async def sign_in(call: Call) -> Response:
    """Sign in with a key that the user has typed."""
    check_same_origin(call.request.headers)
    body = await call.read_json()
    key = body.get("key") if isinstance(body, dict) else None
    if not isinstance(key, str):
        raise Refusal(400, "key must be a string.")
    call.site.keys.owner(key)
    return _signed_in(call, call.site.sign_ins.give_cookie(key), reply({}))


async def sign_out(call: Call) -> Response:
    check_same_origin(call.request.headers)
    name = _cookie_name(call.request)
    call.site.sign_ins.forget(call.request.cookies.get(name, ""))
    response = reply({})
    response.delete_cookie(name)
    return response


# Live updates.


async def state(call: Call) -> Response:
    return reply(await overview(call))


async def run(call: Call) -> Response:
    return reply(await run_details(call, call.parameter("run_id")))


async def events(call: Call) -> Response:
    """Server-sent events: "state" when it has changed, "points" of the displayed run.

    Query: run, and after (see `RunMetrics.read`).
    """
    run_id = call.request.query_params.get("run")
    if run_id is not None:
        await call.site.in_pool(call.site.store.run, run_id, call.owner)
    return named_event_stream(_changes(call, run_id, call.number("after", 0, 2**53)))


async def _changes(call: Call, run_id: str | None, after: int) -> AsyncIterator[bytes]:
    site, shown, spoke = call.site, b"", time.monotonic()
    metrics, read = site.ledger.workshop.metrics, -1
    while not site.ledger.shared.stopping and _is_signed_in(call):
        try:
            current = await overview_event(call)
            if current is not shown:
                shown, spoke = current, time.monotonic()
                yield current
            if run_id is not None and metrics.written_at(run_id) != read:
                read = metrics.written_at(run_id)
                points, following = await site.in_pool(metrics.read, run_id, after)
                if points:
                    after, spoke = following, time.monotonic()
                    yield event({"run": run_id, "points": points, "next": after}, "points")
        except Refusal:  # the server is shutting down
            return
        if time.monotonic() - spoke > _KEEP_ALIVE_SECONDS:
            spoke = time.monotonic()
            yield b": still here\n\n"
        await asyncio.sleep(site.limits.page_seconds)


def _is_signed_in(call: Call) -> bool:
    """False as soon as the cookie has expired, or its key is no longer accepted."""
    try:
        return call.site.keys.owner(cookie_key(call.request)) == call.owner
    except Refusal:
        return False


#: Endpoints of the API that the page uses.
_SHARED = [
    endpoint
    for endpoint in (*archives.ENDPOINTS, *checkpoints.ENDPOINTS, *metrics.ENDPOINTS)
    if endpoint[0] in ("GET", "DELETE") or endpoint[1].endswith("/publish")
]


def routes() -> list[Route]:
    public: list[tuple[str, str, Any]] = [
        ("GET", "/", index),
        ("GET", "/ui/enter", enter),
        ("POST", "/ui/sign-in", sign_in),
        ("POST", "/ui/sign-out", sign_out),
        ("GET", "/ui/files/{name}", asset),
    ]
    own: list[tuple[str, str, Any]] = [
        ("POST", "/ui/token", give_token),
        ("GET", "/ui/state", state),
        ("GET", "/ui/events", events),
        ("GET", "/ui/runs/{run_id}", run),
        ("POST", "/ui/chat/completions", chat_completions),
        ("POST", "/ui/completions", completions),
        *((method, f"/ui/{path}", handler) for method, path, handler in _SHARED),
    ]
    return [
        *(Route(path, guarded(do, public=True), methods=[method]) for method, path, do in public),
        *(
            Route(path, guarded(do, key_of=cookie_key), methods=[method])
            for method, path, do in own
        ),
    ]
