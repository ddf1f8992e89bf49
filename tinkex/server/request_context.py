"""One HTTP exchange on the server's side: who asks, the body within limits, the answer's form.

Every refusal leaves as JSON with one sentence, whose doing it is, and a Content-Length; no
traceback does. Knows nothing of what the endpoints mean.
"""

from __future__ import annotations

import asyncio
import io
import logging
import sqlite3
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import attrs
import zstandard
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tinkex import wire
from tinkex.server.auth import Keys
from tinkex.server.http_errors import Refusal, shown
from tinkex.server.ledger import Ledger
from tinkex.server.limits import Limits
from tinkex.server.replies import Replies
from tinkex.server.results import explained
from tinkex.server.store import Store
from tinkex.wire import bounds

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: A zstd frame may ask for this much memory to be unpacked in.
_MAX_WINDOW = 128 * 1024 * 1024
#: What a decoded value of JSON, and a field of protobuf, take in memory on average.
_VALUE_BYTES = 32
_FIELD_BYTES = 100


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
    #: Where clients reach this server through a proxy, as https://host/prefix; or None.
    public_url: str | None = None
    #: Download tickets of archives: token -> what it opens (see archives).
    tickets: dict[str, Any] = attrs.field(factory=dict)
    #: Bytes that the bodies of all requests take at the moment; on the event loop only.
    decoding: int = 0
    replies: Replies = attrs.field(factory=Replies)

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
    #: Its share of `Site.decoding`.
    held: int = 0

    @property
    def content_type(self) -> str:
        """Without parameters; "" where none is given."""
        value = self.request.headers.get("content-type", "")
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

    async def body(self, *, data: bool = False) -> bytes:
        """The body, unpacked.

        Args:
            data: a batch or a prompt, which may be large.

        Raises:
            Refusal: 413 if it is too large before or after decompression, 415 for an unknown
                encoding, 400 if it cannot be unpacked, 503 if too many bodies are being read.
        """
        limits = self.site.limits
        packed = await self._packed_body(limits.body_bytes if data else limits.small_body_bytes)
        limit = limits.decoded_bytes if data else limits.small_body_bytes
        encoding = self.request.headers.get("content-encoding", "identity").strip().lower()
        if encoding in ("", "identity"):
            self.unpacked = packed
        elif len(packed) <= limits.inline_bytes // 16 and not data:
            self.unpacked = unpack(encoding, packed, limit)
        else:
            self.unpacked = await self.site.in_pool(unpack, encoding, packed, limit)
        if self.unpacked is not packed:
            self.hold(len(self.unpacked))
        return self.unpacked

    async def read_already(self) -> bytes:
        """The body, whether an endpoint has read it or not."""
        return await self.body(data=True) if self.unpacked is None else self.unpacked

    async def _packed_body(self, limit: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in self._stream():
            size += len(part)
            if size <= limit:
                parts.append(part)
                self.hold(len(part))
            elif size > max(2 * limit, self.site.limits.body_bytes):
                break  # what is a little too large is read, so that the refusal gets across
        if size > limit:
            raise Refusal(
                413,
                f"the body is larger than the {limit} bytes that this endpoint takes; send less, "
                "or data in smaller pieces.",
                {"Connection": "close"},
            )
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _stream(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises Refusal (408) if it arrives too slowly."""
        limits, stream = self.site.limits, self.request.stream()
        deadline = time.monotonic() + limits.body_seconds
        while True:
            try:
                left = deadline - time.monotonic()
                part = await asyncio.wait_for(stream.__anext__(), max(left, 0.001))
            except StopAsyncIteration:
                return
            except asyncio.TimeoutError:
                raise Refusal(
                    408,
                    f"the body did not arrive within {limits.body_seconds:.0f} s plus a second for "
                    f"every {limits.body_rate} bytes; send it again.",
                    {"Connection": "close"},
                ) from None
            deadline += len(part) / limits.body_rate
            yield part

    def hold(self, size: int) -> None:
        """Count memory that this request takes until its answer.

        Raises:
            Refusal: 503 if all requests together take too much. A single one never does.
        """
        site = self.site
        if site.decoding > self.held and site.decoding + size > site.limits.decoding_bytes:
            raise Refusal(
                503,
                "the server is receiving too much data at the moment; send the request again.",
                {"Retry-After": "1", "Connection": "close"},
            )
        self.held += size
        site.decoding += size

    def release(self) -> None:
        """The answer is there."""
        self.site.decoding -= self.held
        self.held = 0

    async def read(self, cls: type[T], *, data: bool = False) -> tuple[T, bytes]:
        """The JSON body as *cls*, and as it came. Raises Refusal or DecodeError."""
        body = await self.json_body(data=data)
        return await self.decoded(lambda: wire.from_json(cls, wire.loads(body)), body), body

    async def read_json(self) -> Any:
        """The JSON body as plain data. Raises Refusal or DecodeError."""
        body = await self.json_body()
        return await self.decoded(lambda: wire.loads(body), body)

    async def json_body(self, *, data: bool = False) -> bytes:
        """A body that says it is JSON, and is not too large to be parsed. Raises Refusal."""
        if self.content_type != wire.JSON:
            # A web page can send any other type, or none, without asking the server first.
            sent = f"not {shown(self.content_type)}" if self.content_type else "and it is missing"
            raise Refusal(415, f"this endpoint takes Content-Type {wire.JSON}, {sent}.")
        body = await self.body(data=data)
        await self.check_size(body)
        return body

    async def check_size(self, body: bytes) -> None:
        """Count what the body will become, before it does.

        Raises:
            Refusal: 413 if that is too much, 503 as for `hold`.
        """
        limits = self.site.limits
        if self.content_type == wire.JSON:
            most = limits.json_values, limits.json_containers
            size = await self.decoded(lambda: bounds.json_size(body, *most), body)
            if size.values > limits.json_values or size.containers > limits.json_containers:
                raise Refusal(
                    413,
                    f"the JSON body has more than {limits.json_values} values or "
                    f"{limits.json_containers} lists and objects; send data as {wire.PROTOBUF}, "
                    "or in smaller pieces.",
                )
            self.hold(len(body) + _VALUE_BYTES * size.values)
        else:
            most = limits.datums, limits.proto_fields
            batch = await self.decoded(lambda: bounds.batch_size(body, *most), body)
            if batch.datums > limits.datums or batch.fields > limits.proto_fields:
                raise Refusal(
                    413,
                    f"the batch has more than {limits.datums} datums or {limits.proto_fields} "
                    "fields; send it in several requests.",
                )
            self.hold(len(body) + _FIELD_BYTES * batch.fields)

    async def decoded(self, decode: Callable[[], T], body: bytes) -> T:
        """Decode here if the body is small, else on a thread of the pool."""
        if len(body) <= self.site.limits.inline_bytes:
            return decode()
        return await self.site.in_pool(decode)


def unpack(encoding: str, packed: bytes, limit: int) -> bytes:
    """A compressed body. Never holds more than *limit* bytes of it."""
    try:
        if encoding == "zstd":
            reader = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).stream_reader(packed)
            parts, size = io.BytesIO(), 0
            while size <= limit and (part := reader.read(min(limit + 1, 1 << 20))):
                size += parts.write(part)
            body, too_large = parts.getvalue(), size > limit
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


def header_key(request: Request) -> str | None:
    """The API key where the Tinker API has it."""
    return request.headers.get("x-api-key")


def _owner(keys: Keys, request: Request, key: str | None) -> str:
    """Who asks. Raises Refusal: 401, 403."""
    keys.check_visitor(request.headers)
    return keys.owner(key)


Handler = Callable[[Call], Awaitable[Response]]


class Framing:
    """Refuses requests of which proxies and servers may disagree where they end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = [name for name, _ in scope.get("headers", ())]
        if b"content-length" in names and b"transfer-encoding" in names:
            refusal = Refusal(
                400,
                "the request has both Content-Length and Transfer-Encoding; send one of them.",
                {"Connection": "close"},
            )
            await refuse(refusal)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def guarded(
    handler: Handler,
    *,
    public: bool = False,
    once: bool = False,
    key_of: Callable[[Request], str | None] = header_key,
    refuse: Callable[[Refusal], Response] = refuse,
) -> Callable[[Request], Awaitable[Response]]:
    """
    The endpoint of *handler*: it knows who asks, and every way that it can fail has an answer.

    Args:
        public: anyone may ask.
        once: a repeat under the same X-Idempotency-Key gets the first one's answer.
        key_of: where a request has its API key.
        refuse: the form of an error.
    """

    async def endpoint(request: Request) -> Response:
        site: Site = request.app.state.site
        call = Call(site, request, "")
        try:
            call.owner = "" if public else _owner(site.keys, request, key_of(request))
            key = request.headers.get("x-idempotency-key") if once else None
            if key is None:
                return await handler(call)
            named = f"{call.owner} {request.url.path} {key}"
            return await site.replies.once(named, lambda: handler(call), call.read_already)
        except Refusal as refusal:
            return refuse(refusal)
        except wire.DecodeError as exc:
            return refuse(Refusal(400, str(exc)))
        except ClientDisconnect:
            return refuse(Refusal(400, "the body is not whole."))
        except OverflowError as exc:  # of SQLite, for integers beyond 64 bit
            return refuse(Refusal(400, f"a number in the request is too large: {exc}."))
        except (OSError, sqlite3.Error) as exc:
            sentence = explained(exc)[0]
            logger.error("%s %s: %s", request.method, request.url.path, sentence)
            return refuse(Refusal(503, sentence, {"Retry-After": "5"}))
        except Exception:
            logger.exception("%s %s failed.", request.method, request.url.path)
            return refuse(Refusal(500, "the server failed on this request; its log says why."))
        finally:
            call.release()

    return endpoint
