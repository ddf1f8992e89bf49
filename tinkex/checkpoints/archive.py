"""Unpacks the archive of a checkpoint safely: the server that sent it is not trusted.

Accepts only plain files and folders below the target, and limits their number and bytes to those of
plausible checkpoints. Does not know about HTTP or the content of the files.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tinkex import errors

#: Members of an archive, folders included; a checkpoint has about ten files.
MAX_MEMBERS = 1000
#: Deepest nesting of folders.
MAX_DEPTH = 8
#: An archive may unpack to this many times its size, and to at least `MIN_BYTES`. Weights compress
#: little; a new adapter with its optimizer state is five sixths zeros.
MAX_RATIO = 100
MIN_BYTES = 64 << 20
#: Largest extended header, which holds a long name; tarfile reads it into memory.
MAX_HEADER = 64 << 10
_BLOCK = 1 << 16

_HEADERS = frozenset(
    {
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    }
)
_OPENERS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}


def unpack(archive: Path, target: Path) -> None:
    """Unpack a tar file (plain, gz, bz2 or xz) into the new folder *target*.

    Raises:
        DownloadError: If the archive is damaged, exceeds a bound of this module, or has a member
            that is not a plain file or folder inside *target*.
    """
    target.mkdir()
    size = archive.stat().st_size
    limit = max(MAX_RATIO * size, MIN_BYTES)
    try:
        with open(archive, "rb") as file:
            stream: Any = _Bounded(_decompressed(file), limit, size)
            with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as tar:
                for count, member in enumerate(tar, start=1):
                    if count > MAX_MEMBERS:
                        raise errors.DownloadError(
                            f"the archive has more than {MAX_MEMBERS} files and folders; a "
                            "checkpoint has about ten."
                        )
                    _unpack_member(tar, member, target)
            stream.read_to_the_end()
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as exc:
        raise errors.DownloadError(
            f"the archive cannot be unpacked into {target.parent.parent}: {exc}"
        ) from exc


def _decompressed(file: IO[bytes]) -> IO[bytes]:
    """The content of *file*, decompressed if its first bytes are those of a known compression."""
    begin = file.read(8)
    file.seek(0)
    for magic, opener in _OPENERS.items():
        if begin.startswith(magic):
            stream: IO[bytes] = opener(file)
            return stream
    return file


class _Bounded:
    """A stream that raises after *limit* bytes: a small archive can unpack to terabytes."""

    def __init__(self, stream: IO[bytes], limit: int, archive_size: int) -> None:
        self._stream = stream
        self._left = self._limit = limit
        self._archive_size = archive_size

    def read(self, size: int = _BLOCK) -> bytes:
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise errors.DownloadError(
                f"the archive has {self._archive_size} bytes, but unpacks to more than "
                f"{self._limit}; a checkpoint does not."
            )
        return data

    def read_to_the_end(self) -> None:
        """Read the rest: the checksum of a compressed archive follows the last member."""
        while self.read():
            pass


class _Member(tarfile.TarInfo):
    """A member whose extended headers are small."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        if member.type in _HEADERS and member.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {member.size} bytes is too large")
        return member


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    problem = _problem_of(member)
    if problem:
        raise errors.DownloadError(
            f"the archive has a member that is not safe to unpack: {member.name[:200]!r} {problem}."
        )
    place = target.joinpath(*Path(member.name).parts)
    if member.isdir():
        place.mkdir(parents=True, exist_ok=True)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    source: Any = tar.extractfile(member)
    with source, open(place, "xb") as file:
        shutil.copyfileobj(source, file, _BLOCK)


def _problem_of(member: tarfile.TarInfo) -> str:
    """Why *member* must not be unpacked; "" if it may."""
    name, parts = member.name, Path(member.name).parts
    if not name.isprintable():
        return "has control characters in its name"
    if name.startswith(("/", "\\")) or ".." in parts or ":" in name:
        return "is outside of the folder"
    if not (member.isfile() or member.isdir()):
        return "is neither a file nor a folder"
    if member.issparse():
        return "is a sparse file"
    if len(parts) > MAX_DEPTH:
        return f"is more than {MAX_DEPTH} folders deep"
    return ""
