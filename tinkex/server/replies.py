"""Responses to POSTs by X-Idempotency-Key: a repeated request gets the first response."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import attrs
from starlette.responses import Response

from tinkex.server.http_errors import Refusal

#: Responses that are kept. Clients repeat a request for minutes at most.
MOST = 10_000


@attrs.frozen
class _Reply:
    response: Response
    body_digest: bytes


class Replies:
    """Use it on the event loop only.

    Only successes are kept: a refused request had no effect and may be retried. Responses are
    promises and ids, so they are small; they are lost when the process ends.
    """

    def __init__(self) -> None:
        self._done: OrderedDict[bytes, _Reply] = OrderedDict()
        self._running: dict[bytes, asyncio.Future[None]] = {}

    async def once(
        self,
        key: str,
        make: Callable[[], Awaitable[Response]],
        read_body: Callable[[], Awaitable[bytes]],
    ) -> Response:
        """The response to the request with *key*: the stored one, or else the result of *make*.

        A repeat that arrives while the first request runs waits for it. `read_body` returns the
        body of this request, before or after *make* has run.

        Raises:
            Refusal: 400 if the key was used for another body; whatever *make* raises.
        """
        name = _digest(key.encode("utf-8", "surrogateescape"))
        while name in self._running:
            await asyncio.wait({self._running[name]})
        known = self._done.get(name)
        if known is not None:
            if _digest(await read_body()) != known.body_digest:
                raise Refusal(
                    400,
                    "this X-Idempotency-Key was used for a request with another body; use a new "
                    "key for a new request.",
                )
            return known.response
        ended = self._running[name] = asyncio.get_running_loop().create_future()
        try:
            response = await make()
            if response.status_code == 200:
                self._done[name] = _Reply(response, _digest(await read_body()))
                if len(self._done) > MOST:
                    self._done.popitem(last=False)
            return response
        finally:
            del self._running[name]
            ended.set_result(None)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
