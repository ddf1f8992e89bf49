"""The context of one HTTP request: its owner, its body within limits, and the response.

Every refusal is sent as JSON with a message, a category and a Content-Length, never as a traceback.
Does not know what the endpoints do.
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
from tinkex.server import tracing
from tinkex.server.audit import Audit
from tinkex.server.auth import Keys
from tinkex.server.http_errors import Refusal, shown
from tinkex.server.ledger import Ledger
from tinkex.server.limits import Limits
from tinkex.server.page.sign_in import SignIns
from tinkex.server.replies import Replies
from tinkex.server.results import explained
from tinkex.server.store import Store
from tinkex.wire import bounds

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Largest window, in bytes, that a zstd frame may require.
_MAX_WINDOW = 128 * 1024 * 1024
#: Average bytes in memory of a decoded JSON value or protobuf field.
_VALUE_BYTES = 32
_FIELD_BYTES = 100


@attrs.define(eq=False)
class Site:
    """The objects that all endpoints share."""

    ledger: Ledger
    store: Store
    keys: Keys
    limits: Limits
    base_models: tuple[str, ...]
    takes_protobuf: bool
    version: str
    #: Where clients reach this server through a proxy, as https://host/prefix; or None.
    public_url: str | None = None
    #: Download tickets of archives: token -> ticket (see routes/archives.py).
    tickets: dict[str, Any] = attrs.field(factory=dict)
    #: Bytes of the bodies of all current requests; used on the event loop only.
    decoding: int = 0
    replies: Replies = attrs.field(factory=Replies)
    audit: Audit = attrs.field(factory=lambda: Audit(None))
    sign_ins: SignIns = attrs.field(factory=SignIns)
    #: The overview shown on each user's open pages, by owner (see page/state.py).
    pages: dict[str, Any] = attrs.field(factory=dict)

    def in_pool(self, function: Callable[..., T], *arguments: Any) -> Awaitable[T]:
        """Run a function that would block the event loop on a pool thread."""
        return self.ledger.shared.in_pool(function, *arguments)


@attrs.define(eq=False)
class Call:
    """One request, passed to an endpoint."""

    site: Site
    request: Request
    owner: str
    #: The API key of the request.
    key: str | None = attrs.field(default=None, repr=False)
    #: The decompressed body, once it has been read.
    unpacked: bytes | None = None
    #: Its share of `Site.decoding`.
    held: int = 0

    @property
    def content_type(self) -> str:
        """The Content-Type without parameters; "" if there is none."""
        value = self.request.headers.get("content-type", "")
        return value.split(";")[0].strip().lower()

    @property
    def wants_protobuf(self) -> bool:
        accept = self.request.headers.get("accept", "")
        return self.site.takes_protobuf and wire.PROTOBUF in accept

    def parameter(self, name: str) -> str:
        """A parameter of the path."""
        return str(self.request.path_params[name])

    def number(self, name: str, default: int, highest: int) -> int:
        """An integer of the query string, at most *highest*. Raises Refusal (400)."""
        text = self.request.query_params.get(name)
        if text is None or text == "":
            return default
        if not text.isascii() or not text.isdigit() or len(text) > 12:
            raise Refusal(400, f"{name} must be an integer >= 0, got {shown(text)}.")
        return min(int(text), highest)

    async def body(self, *, data: bool = False) -> bytes:
        """Read and decompress the body.

        Args:
            data: a batch or a prompt, which may be large.

        Raises:
            Refusal: 413 if it is too large before or after decompression, 415 for an unknown
                encoding, 400 if it cannot be decompressed, 503 if too many bodies are being read.
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
        """The body, read now if the endpoint has not read it."""
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
                break  # reading more just to deliver the refusal would be too expensive
        if size > limit:
            raise Refusal(
                413,
                f"the body is larger than the {limit} bytes that this endpoint takes; send less, "
                "or data in smaller pieces.",
                {"Connection": "close"},
            )
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _stream(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives. Raises Refusal (408) if it arrives too slowly."""
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
        """Count memory that this request needs until it is answered.

        Raises:
            Refusal: 503 if all requests together need too much. A single request is always
                accepted.
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
        """Release the memory counted by `hold`, when the request is answered."""
        self.site.decoding -= self.held
        self.held = 0

    async def read(self, cls: type[T], *, data: bool = False) -> tuple[T, bytes]:
        """The JSON body as *cls*, and its bytes. Raises Refusal or DecodeError."""
        body = await self.json_body(data=data)
        return await self.decoded(lambda: wire.from_json(cls, wire.loads(body)), body), body

    async def read_json(self) -> Any:
        """The JSON body as plain data. Raises Refusal or DecodeError."""
        body = await self.json_body()
        return await self.decoded(lambda: wire.loads(body), body)

    async def json_body(self, *, data: bool = False) -> bytes:
        """Read a body with Content-Type JSON that is not too large to parse. Raises Refusal."""
        if self.content_type != wire.JSON:
            # Browsers allow web pages to send some other types, or none, without a CORS preflight.
            sent = f"not {shown(self.content_type)}" if self.content_type else "and it is missing"
            raise Refusal(415, f"this endpoint takes Content-Type {wire.JSON}, {sent}.")
        body = await self.body(data=data)
        await self.check_size(body)
        return body

    async def check_size(self, body: bytes) -> None:
        """Check the number of objects in the body before it is decoded.

        Raises:
            Refusal: 413 if there are too many, 503 as for `hold`.
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
        """Decode a small body here, a large one on a pool thread."""
        if len(body) <= self.site.limits.inline_bytes:
            return decode()
        return await self.site.in_pool(decode)


def unpack(encoding: str, packed: bytes, limit: int) -> bytes:
    """Decompress a body, up to *limit* bytes. Raises Refusal."""
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
                raise zlib.error("it is incomplete")
        else:
            raise Refusal(
                415,
                f"a body with Content-Encoding {shown(encoding)} is not supported; send zstd, "
                "gzip, deflate or none.",
            )
    except (zlib.error, zstandard.ZstdError) as exc:
        raise Refusal(400, f"the body is not valid {encoding}: {exc}.") from exc
    if too_large:
        raise Refusal(413, f"the body is larger than {limit} bytes after decompression.")
    return body


def reply(payload: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response from plain data, an attrs object, or encoded JSON."""
    if attrs.has(type(payload)):
        payload = wire.to_json(payload)
    body = payload if isinstance(payload, bytes) else wire.dumps(payload)
    return Response(body, status, headers, wire.JSON)


def refuse(refusal: Refusal) -> Response:
    body = {"error": refusal.sentence, "category": refusal.category}
    return reply(body, refusal.status, refusal.headers)


def header_key(request: Request) -> str | None:
    """The API key in the header that the Tinker API uses."""
    return request.headers.get("x-api-key")


def _owner(keys: Keys, request: Request, key: str | None) -> str:
    """The owner of a request. Raises Refusal: 401, 403."""
    keys.check_visitor(request.headers)
    return keys.owner(key)


Handler = Callable[[Call], Awaitable[Response]]


class Framing:
    """Refuses requests with ambiguous framing, which proxies may split differently."""

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
    name: str = "",
    public: bool = False,
    once: bool = False,
    key_of: Callable[[Request], str | None] = header_key,
    refuse: Callable[[Refusal], Response] = refuse,
) -> Callable[[Request], Awaitable[Response]]:
    """Wrap *handler* with authentication, and turn every exception into a response.

    Args:
        name: for `/metrics`; "" is the handler's name.
        public: no key is required.
        once: a repeat with the same X-Idempotency-Key gets the first response.
        key_of: reads the API key of a request.
        refuse: makes the response of a refusal.
    """

    async def endpoint(request: Request) -> Response:
        site: Site = request.app.state.site
        call = Call(site, request, "")
        started = time.monotonic()
        tracing.enter(request.headers)
        response = await answered(site, call, request)
        seconds = time.monotonic() - started
        site.ledger.workshop.monitor.answered(
            name or handler.__name__, response.status_code, seconds
        )
        host = None if request.client is None else request.client.host
        site.audit.note(
            request.method,
            request.url.path,
            response.status_code,
            call.owner,
            lambda: site.keys.id_of(call.key),
            host,
        )
        return response

    async def answered(site: Site, call: Call, request: Request) -> Response:
        try:
            if not public:
                call.key = key_of(request)
                call.owner = _owner(site.keys, request, call.key)
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
            return refuse(Refusal(400, "the connection was closed before the body was complete."))
        except OverflowError as exc:  # of SQLite, for integers beyond 64 bit
            return refuse(Refusal(400, f"a number in the request is too large: {exc}."))
        except (OSError, sqlite3.Error) as exc:
            sentence = explained(exc)[0]
            logger.error("%s %s: %s", request.method, request.url.path, sentence)
            return refuse(Refusal(503, sentence, {"Retry-After": "5"}))
        except Exception:
            logger.exception("%s %s failed.", request.method, request.url.path)
            return refuse(Refusal(500, "the server failed on this request; see its log."))
        finally:
            call.release()

    return endpoint
