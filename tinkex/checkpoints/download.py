"""Fetching a checkpoint's archive: streamed, resumed, checked, unpacked safely, moved into place.

Nothing that exists is deleted before the new one is complete. Knows nothing of what is inside.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import requests

from tinkex import errors, types, wire
from tinkex.runtime.responses import Answer, connection_error
from tinkex.runtime.retry import Retry
from tinkex.runtime.session import Connection, is_missing_route, not_offered

logger = logging.getLogger("tinkex")

Progress = Callable[[int, "int | None"], None]

PACKING_TRIES = 6
PACKING_PAUSE = 30.0  # seconds
CUT_TRIES = 8  # broken connections in a row without a byte of progress
BLOCK = 1 << 16  # bytes; of what a broken connection brought, at most so many come twice


def archive_url(
    connection: Connection,
    path: types.ParsedCheckpointTinkerPath,
    on_wait: Callable[[float], None] | None = None,
) -> types.CheckpointArchiveUrlResponse:
    """Where the archive is: a redirect or a JSON answer; 503 while the server still packs it.

    *on_wait* is told of each pause, in seconds, before it.
    """
    for attempt in range(PACKING_TRIES):
        try:
            return _ask_for_url(connection, path)
        except errors.APIStatusError as exc:
            if is_missing_route(exc):
                return _ask_without_segment(connection, path, exc)
            if exc.status != 503 or attempt == PACKING_TRIES - 1:
                raise
            logger.warning("the server is still packing %s; again in 30 s", path.tinker_path)
            if on_wait is not None:
                on_wait(PACKING_PAUSE)
            connection.transport.sleep(PACKING_PAUSE)
    raise errors.DownloadError(f"the server never finished packing {path.tinker_path}.")


def _ask_without_segment(
    connection: Connection,
    path: types.ParsedCheckpointTinkerPath,
    refusal: errors.APIStatusError,
) -> types.CheckpointArchiveUrlResponse:
    """Some servers (SkyRL) know a checkpoint by its name alone."""
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
                    f"{answer.url} redirects without saying where.", url=answer.url
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


#: What becomes the new folder, in the scratch folder of `new_folder`.
RESULT = "result"


@contextmanager
def new_folder(output_dir: Path, force: bool) -> Iterator[Path]:
    """Gives a scratch folder. What is its `RESULT` in the end takes the place of *output_dir*.

    Raises:
        FileExistsError: If *output_dir* is there and not empty, without *force*.
    """
    output_dir = output_dir.absolute()  # "." has neither a name nor a place beside it
    if output_dir.exists() and not force and (output_dir.is_file() or any(output_dir.iterdir())):
        raise FileExistsError(
            f"{output_dir} is there already; give another folder, or force (--force) to replace it."
        )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename on one file system.
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
    """Fetch the archive, and unpack it into the new folder *target*."""
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
    """Stream the archive to *target*, going on from where a broken connection left it."""
    url = archive_url(connection, path).url
    cuts, state = 0, _Download(target, progress)
    while True:
        before = state.size
        try:
            state.go_on(connection, url)
            break
        except errors.APIConnectionError as exc:
            cuts = 0 if state.size > before else cuts + 1
            if cuts >= CUT_TRIES:
                raise errors.DownloadError(
                    f"the download of {path.tinker_path} broke off after {state.size} bytes, "
                    f"{CUT_TRIES} times in a row: {exc}"
                ) from exc
            connection.transport.sleep(min(0.1 * 2**cuts, 5.0))
        except errors.APIStatusError as exc:
            if exc.status not in (403, 410, 416, 503) or cuts >= CUT_TRIES:
                raise
            cuts += 1
            if exc.status == 416:  # what we have is not the beginning of what is there
                state.size = 0
            connection.transport.sleep(min(0.1 * 2**cuts, 5.0))
            url = archive_url(connection, path).url  # the old one has expired
    state.check(path.tinker_path)


class _Download:
    """A file that grows, and what the server says it should become."""

    def __init__(self, target: Path, progress: Progress | None) -> None:
        self._target = target
        self._progress = progress
        self._total: int | None = None
        self._sha256 = ""
        self._etag = ""
        self.size = 0

    def go_on(self, connection: Connection, url: str) -> None:
        headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
        if self.size:
            headers["Range"] = f"bytes={self.size}-"
            if self._etag:
                headers["If-Range"] = self._etag
        with connection.transport.open_stream("GET", url, headers=headers) as response:
            if response.status_code != 206:
                self.size = 0  # the server begins again
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {self.size}-"):
                self.size = 0
                raise errors.APIConnectionError("another part came than was asked for.", url=url)
            self._note(response)
            try:
                self._write(response)
            except requests.RequestException as exc:
                raise connection_error(exc, "GET", url, 0) from exc
        if self._total is not None and self.size < self._total:
            raise errors.APIConnectionError(f"{self.size} of {self._total} bytes came.", url=url)

    def _note(self, response: requests.Response) -> None:
        length = response.headers.get("Content-Length", "")
        self._total = self.size + int(length) if length.isdigit() else None
        self._etag = response.headers.get("ETag", "")
        self._sha256 = _told_sha256(response.headers) or self._sha256

    def _write(self, response: requests.Response) -> None:
        with open(self._target, "r+b" if self.size else "wb") as file:
            file.seek(self.size)
            for block in response.iter_content(BLOCK):
                file.write(block)
                self.size += len(block)
                if self._progress is not None:
                    self._progress(self.size, self._total)
            file.truncate(self.size)

    def check(self, tinker_path: str) -> None:
        if self._total is not None and self.size != self._total:
            raise errors.DownloadError(
                f"{tinker_path}: {self.size} bytes came, the server announced {self._total}."
            )
        if self._sha256 and _sha256_of(self._target) != self._sha256:
            raise errors.DownloadError(
                f"{tinker_path}: what came does not have the hash that the server announced; "
                "download it again."
            )


def _told_sha256(headers: Mapping[str, str]) -> str:
    """The hash of the whole archive, in hex, if the server tells it (RFC 9530, or plainly)."""
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


def unpack(archive: Path, target: Path) -> None:
    """Unpack a tar (plain or compressed) into the new folder *target*.

    Raises:
        DownloadError: For a damaged archive, or a member that is not a plain file or folder inside
            *target* (absolute, `..`, links, devices).
    """
    target.mkdir()
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                _unpack_member(tar, member, target)
            _read_to_the_end(tar.fileobj)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as exc:
        raise errors.DownloadError(f"the archive cannot be unpacked: {exc}") from exc


def _read_to_the_end(stream: Any) -> None:
    """The checksum of a compressed archive stands behind the last member."""
    while stream.read(BLOCK):
        pass


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    parts = Path(member.name).parts
    inside = (
        not member.name.startswith(("/", "\\")) and ".." not in parts and ":" not in member.name
    )
    if not inside or not (member.isfile() or member.isdir()):
        raise errors.DownloadError(
            f"the archive has a member that is not safe to unpack: {member.name!r}."
        )
    place = target.joinpath(*parts)
    if member.isdir():
        place.mkdir(parents=True, exist_ok=True)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    source: Any = tar.extractfile(member)
    with source, open(place, "xb") as file:
        shutil.copyfileobj(source, file, BLOCK)


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
