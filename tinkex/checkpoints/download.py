"""Downloads the archive of a checkpoint: streamed, resumed, verified, unpacked, moved into place.

An existing folder is replaced only when the new one is complete. Does not know about the content.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import attrs
import requests
import tenacity

from tinkex import errors, types, wire
from tinkex.checkpoints.archive import unpack
from tinkex.runtime.connection import Connection
from tinkex.runtime.responses import Answer, Stream, is_missing_route, not_offered
from tinkex.runtime.retry import (
    CUT,
    CUT_TRIES,
    PACKING_PAUSE,
    PACKING_TRIES,
    Retry,
    repeat,
    seconds,
)

logger = logging.getLogger("tinkex")

Progress = Callable[[int, "int | None"], None]

BLOCK = 1 << 16  # bytes; after a broken connection at most this many are fetched twice


def archive_url(
    connection: Connection,
    path: types.ParsedCheckpointTinkerPath,
    on_wait: Callable[[float], None] | None = None,
) -> types.CheckpointArchiveUrlResponse:
    """Request the URL of the archive: a redirect or JSON; 503 while the server packs it.

    Args:
        on_wait: called before each pause with its length in seconds.
    """

    def note(_: object) -> None:
        pause = f"next attempt in {PACKING_PAUSE:.0f} s"
        logger.warning("the server is still packing %s; %s", path.tinker_path, pause)
        if on_wait is not None:
            on_wait(PACKING_PAUSE)

    try:
        return repeat(
            partial(_ask_for_url, connection, path),
            lambda exc: getattr(exc, "status", 0) == 503,
            stop=tenacity.stop_after_attempt(PACKING_TRIES),
            wait=tenacity.wait_fixed(PACKING_PAUSE),
            sleep=connection.transport.sleep,
            note=note,
        )
    except errors.APIStatusError as exc:
        if is_missing_route(exc):
            return _ask_without_segment(connection, path, exc)
        raise


def _ask_without_segment(
    connection: Connection,
    path: types.ParsedCheckpointTinkerPath,
    refusal: errors.APIStatusError,
) -> types.CheckpointArchiveUrlResponse:
    """Request the URL with the name alone, the only form that some servers (SkyRL) support."""
    missing = not_offered(refusal, wire.CHECKPOINT_ARCHIVE.path)
    if path.checkpoint_id == path.name:
        raise missing from refusal
    try:
        return _ask_for_url(connection, attrs.evolve(path, checkpoint_id=path.name))
    except errors.APIStatusError as exc:
        raise missing from exc


def _ask_for_url(
    connection: Connection, path: types.ParsedCheckpointTinkerPath
) -> types.CheckpointArchiveUrlResponse:
    connection.check_usable()
    transport = connection.transport

    def parse(answer: Answer) -> types.CheckpointArchiveUrlResponse:
        if answer.status in (301, 302, 303, 307, 308):
            location = answer.headers.get("Location")
            if not location:
                raise errors.APIResponseValidationError(
                    f"{answer.url} redirects without a Location header.", url=answer.url
                )
            url = requests.compat.urljoin(answer.url, location)
            return types.CheckpointArchiveUrlResponse(url, answer.headers.get("Expires"))
        return transport.decode(types.CheckpointArchiveUrlResponse, answer)

    return transport.send(
        "GET",
        transport.url(
            wire.CHECKPOINT_ARCHIVE.path,
            run_id=path.training_run_id,
            checkpoint_id=path.checkpoint_id,
        ),
        retry=Retry(pass_on=frozenset({503})),
        accept=frozenset({301, 302, 303, 307, 308}),
        parse=parse,
    )


def download(
    connection: Connection,
    path: types.ParsedCheckpointTinkerPath,
    output_dir: Path,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """See `RestClient.download_checkpoint`."""
    with new_folder(output_dir, force) as scratch:
        fetch_folder(connection, path, scratch / RESULT, progress)
    return output_dir


#: The name of the new folder inside the scratch folder of `new_folder`.
RESULT = "result"


@contextmanager
def new_folder(output_dir: Path, force: bool) -> Iterator[Path]:
    """Yield a scratch folder whose `RESULT` replaces *output_dir* at the end.

    Raises:
        FileExistsError: If *output_dir* exists and is not empty, without *force*.
    """
    output_dir = output_dir.absolute()  # "." has no name and no parent
    if output_dir.exists() and not force and (output_dir.is_file() or any(output_dir.iterdir())):
        raise FileExistsError(
            f"{output_dir} already exists; choose another folder, or replace it with force=True "
            "(--force)."
        )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # Next to the target, so that the final rename stays within one file system.
    with tempfile.TemporaryDirectory(
        prefix=f".{output_dir.name}-", dir=output_dir.parent, ignore_cleanup_errors=True
    ) as scratch:
        yield Path(scratch)
        _move_into_place(Path(scratch) / RESULT, output_dir, Path(scratch))


def fetch_folder(
    connection: Connection,
    path: types.ParsedCheckpointTinkerPath,
    target: Path,
    progress: Progress | None,
) -> None:
    """Download the archive, and unpack it into the new folder *target*."""
    archive = target.with_name("archive.tar")
    fetch(connection, path, archive, progress)
    unpack(archive, target)
    archive.unlink()


def fetch(
    connection: Connection,
    path: types.ParsedCheckpointTinkerPath,
    target: Path,
    progress: Progress | None,
) -> None:
    """Stream the archive to *target*, resuming after broken connections.

    Raises:
        DownloadError: If the connection breaks repeatedly without progress, or the data does not
            match the announced size and hash.
    """
    state = _Download(connection, path, target, progress)
    try:
        repeat(
            state.fetch_rest,
            state.may_help,
            stop=lambda _: state.cuts >= CUT_TRIES,
            wait=lambda _: seconds(CUT, max(state.cuts, 1)),
            sleep=connection.transport.sleep,
        )
    except errors.APIConnectionError as exc:
        raise errors.DownloadError(
            f"the download of {path.tinker_path} broke off after {state.size} bytes, "
            f"{CUT_TRIES} times in a row: {exc}"
        ) from exc
    state.check()


class _Download:
    """A growing file, and the size and hash that the server announced."""

    def __init__(
        self,
        connection: Connection,
        path: types.ParsedCheckpointTinkerPath,
        target: Path,
        progress: Progress | None,
    ) -> None:
        self._connection = connection
        self._path = path
        self._url = self._find()
        self._target = target
        self._progress = progress
        self._total: int | None = None
        self._sha256 = ""
        self._etag = ""
        self._size_before = 0
        self.size = 0
        self.cuts = 0  # failures in a row without progress
        self.is_refused = False  # the last failure was an error status

    def may_help(self, exc: errors.APIError) -> bool:
        """Record a failure. Returns True if a retry may help."""
        status = getattr(exc, "status", None)
        self.is_refused = status in (403, 410, 416, 503)
        has_grown = self.size > self._size_before and not self.is_refused
        self.cuts = 0 if has_grown else self.cuts + 1
        if status == 416:  # the archive has changed
            self.size = 0
        return self.is_refused or isinstance(exc, errors.APIConnectionError)

    def fetch_rest(self) -> None:
        """Fetch the missing part, from a new URL if the last one has expired."""
        if self.is_refused:
            self._url = self._find()
        url = self._url
        self._size_before, self.is_refused = self.size, False
        headers = {"Accept": "*/*"}
        if self.size:
            headers["Range"] = f"bytes={self.size}-"
            if self._etag:
                headers["If-Range"] = self._etag
        with self._connection.transport.open_stream("GET", url, headers=headers) as response:
            if response.status != 206:
                self.size = 0  # the server starts again
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {self.size}-"):
                self.size = 0
                raise errors.APIConnectionError("the server sent a different part.", url=url)
            self._note(response)
            self._check_space()
            try:
                self._write(response)
            except errors.APIError:  # before OSError: a timeout is both
                raise
            except OSError as exc:
                raise errors.DownloadError(
                    f"{self._target.parent} cannot be written ({exc.strerror or exc}) after "
                    f"{self.size} bytes."
                ) from exc
        if self._total is not None and self.size < self._total:
            raise errors.APIConnectionError(
                f"only {self.size} of {self._total} bytes arrived.", url=url
            )

    def _find(self) -> str:
        url = archive_url(self._connection, self._path).url
        if not url.startswith(("http://", "https://")):  # TuFT: a folder on its own disk
            raise errors.DownloadError(
                f"the server gives {url} as the address of {self._path.tinker_path}, which only "
                "programs on the server's machine can read; copy the checkpoint from there."
            )
        return url

    def _note(self, response: Stream) -> None:
        length = response.headers.get("Content-Length", "")
        self._total = self.size + int(length) if length.isdigit() else None
        self._etag = response.headers.get("ETag", "")
        self._sha256 = _announced_sha256(response.headers) or self._sha256

    def _check_space(self) -> None:
        """Fail before the download if the archive and its unpacked files cannot fit."""
        needed = 2 * (self._total or 0) - self.size
        free = shutil.disk_usage(self._target.parent).free
        if needed > free:
            raise errors.DownloadError(
                f"the download needs {needed} bytes, but only {free} are free in "
                f"{self._target.parent.parent}; free some space, or choose another folder."
            )

    def _write(self, response: Stream) -> None:
        limit = self.size + shutil.disk_usage(self._target.parent).free // 2
        if self._total is not None:
            limit = self._total
        with open(self._target, "r+b" if self.size else "wb") as file:
            file.seek(self.size)
            for block in response.pieces(BLOCK):
                if self.size + len(block) > limit:
                    raise errors.DownloadError(
                        f"the server announced no size and has sent {self.size} bytes; more than "
                        f"half of what was free in {self._target.parent.parent} is not used."
                    )
                file.write(block)
                self.size += len(block)
                if self._progress is not None:
                    self._progress(self.size, self._total)
            file.truncate(self.size)

    def check(self) -> None:
        tinker_path = self._path.tinker_path
        if self._total is not None and self.size != self._total:
            raise errors.DownloadError(
                f"{tinker_path}: {self.size} bytes arrived, but the server announced {self._total}."
            )
        if self._sha256 and _sha256_of(self._target) != self._sha256:
            raise errors.DownloadError(
                f"{tinker_path}: the downloaded archive does not have the hash that the server "
                "announced; download it again."
            )


def _announced_sha256(headers: Mapping[str, str]) -> str:
    """The announced hash of the archive in hex (RFC 9530 or X-Content-SHA256); "" if there is
    none."""
    match = re.search(r"sha-256=:([A-Za-z0-9+/]{43}=):", headers.get("Repr-Digest", ""))
    if match is None:
        return headers.get("X-Content-SHA256", "").lower()
    return base64.b64decode(match[1]).hex()


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _move_into_place(unpacked: Path, output_dir: Path, scratch: Path) -> None:
    if output_dir.exists():
        old = scratch / "replaced"
        os.replace(output_dir, old)
        try:
            os.replace(unpacked, output_dir)
        except OSError:
            os.replace(old, output_dir)
            raise
    else:
        os.replace(unpacked, output_dir)
