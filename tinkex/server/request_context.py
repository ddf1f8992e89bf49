"""One HTTP exchange on the server's side: who asks, the body within limits, the answer's form.

Every refusal leaves as JSON with one sentence, whose doing it is, and a Content-Length; no
traceback does. Knows nothing of what the endpoints mean.
"""

from __future__ import annotations

import logging
import sqlite3
import zlib
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import attrs
import zstandard
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from tinkex import wire
from tinkex.server.auth import Keys
from tinkex.server.http_errors import Refusal, shown
from tinkex.server.ledger import Ledger
from tinkex.server.limits import Limits
from tinkex.server.results import explained
from tinkex.server.store import Store

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: A zstd frame may ask for this much memory to be unpacked in.
_MAX_WINDOW = 128 * 1024 * 1024


@attrs.define(eq=False)
class Site:
    """What every endpoint can reach."""

    ledger: Ledger
    store: Store
    keys: Keys
    limits: Limits
    base_models: tuple[str, ...]
    takes_protobuf: bool
    version: str
    #: Download tickets of archives: token -> what it opens (see archives).
    tickets: dict[str, Any] = attrs.field(factory=dict)

    def in_pool(self, function: Callable[..., T], *arguments: Any) -> Awaitable[T]:
        """Run on another thread what would hold up the event loop."""
        return self.ledger.shared.in_pool(function, *arguments)


@attrs.define(eq=False)
class Call:
    """One request on its way through an endpoint."""

    site: Site
    request: Request
    owner: str
    #: The body, as soon as it has been read.
    unpacked: bytes | None = None

    @property
    def content_type(self) -> str:
        """Without parameters; JSON where none is given."""
        value = self.request.headers.get("content-type") or wire.JSON
        return value.split(";")[0].strip().lower()

    @property
    def wants_protobuf(self) -> bool:
        accept = self.request.headers.get("accept", "")
        return self.site.takes_protobuf and wire.PROTOBUF in accept

    def parameter(self, name: str) -> str:
        """Of the path."""
        return str(self.request.path_params[name])

    def number(self, name: str, default: int, highest: int) -> int:
        """A whole number of the query string. Raises Refusal (400)."""
        text = self.request.query_params.get(name)
        if text is None or text == "":
            return default
        if not text.isascii() or not text.isdigit() or len(text) > 12:
            raise Refusal(400, f"{name} must be a whole number from 0, got {shown(text)}.")
        return min(int(text), highest)

    async def body(self) -> bytes:
        """The body, unpacked.

        Raises:
            Refusal: 413 if it is too large before or after, 415 for an unknown encoding, 400 if
                it cannot be unpacked.
        """
        self.unpacked = await self._unpacked_body()
        return self.unpacked

    async def _unpacked_body(self) -> bytes:
        packed = await self._packed_body()
        encoding = self.request.headers.get("content-encoding", "identity").strip().lower()
        if encoding in ("", "identity"):
            return packed
        if len(packed) <= self.site.limits.inline_bytes // 16:
            return unpack(encoding, packed, self.site.limits.decoded_bytes)
        return await self.site.in_pool(unpack, encoding, packed, self.site.limits.decoded_bytes)

    async def _packed_body(self) -> bytes:
        limit = self.site.limits.body_bytes
        parts: list[bytes] = []
        size = 0
        async for part in self.request.stream():
            size += len(part)
            if size <= limit:
                parts.append(part)
            elif size > 2 * limit:
                break  # what is a little too large is read, so that the refusal gets across
        if size > limit:
            raise Refusal(
                413,
                f"the body is larger than the {limit} bytes that this server takes; send the data "
                "in smaller pieces.",
                {"Connection": "close"},
            )
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def read(self, cls: type[T]) -> tuple[T, bytes]:
        """The JSON body as *cls*, and as it came. Raises Refusal or DecodeError."""
        if self.content_type != wire.JSON:
            raise Refusal(415, f"this endpoint takes {wire.JSON}, not {shown(self.content_type)}.")
        body = await self.body()
        return await self.decoded(lambda: wire.from_json(cls, wire.loads(body)), body), body

    async def decoded(self, decode: Callable[[], T], body: bytes) -> T:
        """Decode here if the body is small, else where it holds up nobody."""
        if len(body) <= self.site.limits.inline_bytes:
            return decode()
        return await self.site.in_pool(decode)


def unpack(encoding: str, packed: bytes, limit: int) -> bytes:
    """A compressed body. Never holds more than *limit* bytes of it."""
    try:
        if encoding == "zstd":
            reader = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).stream_reader(packed)
            parts, size = [], 0
            while size <= limit and (part := reader.read(min(limit + 1, 1 << 20))):
                parts.append(part)
                size += len(part)
            body, too_large = b"".join(parts), size > limit
        elif encoding in ("gzip", "deflate"):
            inflater = zlib.decompressobj(wbits=47 if encoding == "gzip" else 15)
            body = inflater.decompress(packed, limit + 1)
            too_large = len(body) > limit
            if not too_large and not inflater.eof:
                raise zlib.error("it is cut off")
        else:
            raise Refusal(
                415,
                f"a body with Content-Encoding {shown(encoding)} cannot be read; send zstd, gzip, "
                "deflate or none.",
            )
    except (zlib.error, zstandard.ZstdError) as exc:
        raise Refusal(400, f"the body is not {encoding}: {exc}.") from exc
    if too_large:
        raise Refusal(413, f"the body is larger than {limit} bytes once it is unpacked.")
    return body


def reply(payload: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Plain data, an attrs object, or ready JSON bytes."""
    if attrs.has(type(payload)):
        payload = wire.to_json(payload)
    body = payload if isinstance(payload, bytes) else wire.dumps(payload)
    return Response(body, status, headers, wire.JSON)


def refuse(refusal: Refusal) -> Response:
    body = {"error": refusal.sentence, "category": refusal.category}
    return reply(body, refusal.status, refusal.headers)


def _owner(keys: Keys, request: Request) -> str:
    """Who asks. Raises Refusal: 401, 403."""
    keys.check_visitor(request.headers.get("host", ""), request.headers.get("origin"))
    return keys.owner(request.headers.get("x-api-key"))


Handler = Callable[[Call], Awaitable[Response]]


def guarded(handler: Handler, *, public: bool = False) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint of *handler*: it knows who asks (unless *public*), and every way that it can
    go wrong has an answer."""

    async def endpoint(request: Request) -> Response:
        site: Site = request.app.state.site
        try:
            owner = "" if public else _owner(site.keys, request)
            return await handler(Call(site, request, owner))
        except Refusal as refusal:
            return refuse(refusal)
        except wire.DecodeError as exc:
            return refuse(Refusal(400, str(exc)))
        except ClientDisconnect:
            return refuse(Refusal(400, "the body is not whole."))
        except (OSError, sqlite3.Error) as exc:
            sentence = explained(exc)[0]
            logger.error("%s %s: %s", request.method, request.url.path, sentence)
            return refuse(Refusal(503, sentence, {"Retry-After": "5"}))
        except Exception:
            logger.exception("%s %s failed.", request.method, request.url.path)
            return refuse(Refusal(500, "the server failed on this request; its log says why."))

    return endpoint
