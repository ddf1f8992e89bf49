"""Keeps large requests on disk while they wait.

With a journal they are on disk already; otherwise each gets a file. A separate thread reads and
decodes them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from tinkex.server.journal import Journal


class Spool:
    """The requests of one server that wait on disk.

    Args:
        folder: for files; emptied when the server's folder is created.
        journal: contains accepted requests anyway; or None.

    Attributes:
        kept: how many requests have been stored so far.
    """

    def __init__(self, folder: Path, journal: Journal | None) -> None:
        self._folder = folder
        self._journal = journal
        self.kept = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tinkex-spool")

    @property
    def has_journal(self) -> bool:
        return self._journal is not None

    def write(self, body: bytes) -> Path:
        """Write a body to a new file. Raises OSError."""
        path = self._folder / secrets.token_hex(8)
        path.write_bytes(body)
        return path

    def in_file(self, path: Path, decode: Callable[[bytes], Any]) -> Stored:
        """A request written by `write`; *decode* turns its body into the request."""
        self.kept += 1
        return Stored(self._pool, partial(_read_once, path), decode)

    def in_journal(self, request_id: str, decode: Callable[[bytes], Any]) -> Stored:
        """A request that the journal has accepted."""
        if self._journal is None:
            raise RuntimeError("this server has no journal.")
        self.kept += 1
        return Stored(self._pool, partial(self._journal.body, request_id), decode)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


@attrs.frozen(eq=False)
class Stored:
    """A request on disk; see `live.StoredRequest`."""

    _pool: ThreadPoolExecutor
    _body: Callable[[], bytes]
    _decode: Callable[[bytes], Any]

    def read(self) -> Future[Any]:
        """Start reading and decoding it. Call it once."""
        return self._pool.submit(lambda: self._decode(self._body()))


def _read_once(path: Path) -> bytes:
    body = path.read_bytes()
    path.unlink()
    return body
