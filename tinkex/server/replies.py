"""Answers to POSTs by their X-Idempotency-Key: a repeat gets the first one's answer."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import attrs
from starlette.responses import Response

from tinkex.server.http_errors import Refusal

#: Answers that are kept. Clients repeat a request for minutes at most.
MOST = 10_000


@attrs.frozen
class _Reply:
    response: Response
    body_digest: bytes


class Replies:
    """Lives on the event loop.

    Only successes are kept: what was refused has done nothing and may be tried again. Answers are
    promises and ids, so they are small; the process forgets them when it ends.
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
        """The answer to the request named *key*: the first one's, or that of *make*.

        A repeat that comes while the first one runs waits for it. `read_body` gives the body of
        this request, before or after *make* has run.

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
