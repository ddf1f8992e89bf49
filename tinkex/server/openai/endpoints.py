"""The endpoints in the style of other APIs: their paths, keys and errors."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinkex.server.http_errors import Refusal
from tinkex.server.openai import messages as anthropic
from tinkex.server.openai.chat import chat_completions
from tinkex.server.openai.completions import completions
from tinkex.server.openai.events import error_body
from tinkex.server.openai.names import find_model, model_names
from tinkex.server.request_context import Call, Handler, guarded, header_key, reply

#: OpenAI's prefix, and the official service's.
OPENAI_PREFIXES = ("/v1/", "/oai/api/v1/")
#: Prefixes of Anthropic's form: the official service's, whose clients append "/v1/" to the base
#: URL, and that of clients with "/anthropic" as base URL.
ANTHROPIC_PREFIXES = ("/anthropic/api/v1/", "/anthropic/v1/")


async def models(call: Call) -> Response:
    return reply({"object": "list", "data": [_model(name) for name in await model_names(call)]})


async def model(call: Call) -> Response:
    name = call.parameter("name")
    await find_model(call, name)
    return reply(_model(name))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "tinkex"}


def bearer_key(request: Request) -> str | None:
    """The API key from OpenAI's header, or from our own."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key else header_key(request)


def refuse(refusal: Refusal) -> Response:
    return reply(error_body(refusal), refusal.status, refusal.headers)


_OPENAI: list[tuple[str, str, Handler]] = [
    ("POST", "chat/completions", chat_completions),
    ("POST", "completions", completions),
    ("GET", "models", models),
    ("GET", "models/{name:path}", model),
]


_ANTHROPIC: list[tuple[str, str, Handler]] = [
    ("POST", "messages", anthropic.messages),
    ("POST", "messages/count_tokens", anthropic.count_tokens),
]


def routes() -> list[Route]:
    openai = [
        Route(prefix + path, guarded(handler, key_of=bearer_key, refuse=refuse), methods=[method])
        for prefix in OPENAI_PREFIXES
        for method, path, handler in _OPENAI
    ]
    others = [
        Route(
            prefix + path,
            guarded(handler, key_of=bearer_key, refuse=anthropic.refuse),
            methods=[method],
        )
        for prefix in ANTHROPIC_PREFIXES
        for method, path, handler in _ANTHROPIC
    ]
    return [*openai, *others]
