"""A folder as a tar stream: the size is known in advance, and any range can be read.

The tar is not compressed (safetensors do not compress) and not written to disk. Its bytes are
reproducible: sorted members, no owners, one date. Does not know about checkpoints or HTTP.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

import attrs

_PIECE = 1 << 18


@attrs.frozen
class _Part:
    """A part of the tar: given bytes or a file, padded with zeros to `size` bytes."""

    size: int
    content: bytes = b""
    path: Path | None = None


@attrs.frozen
class Archive:
    size: int
    _parts: tuple[_Part, ...]

    @classmethod
    def of(cls, folder: Path, mtime: float) -> Archive:
        """The regular files in *folder*. Raises FileNotFoundError."""
        if not folder.is_dir():
            raise FileNotFoundError(f"the folder {folder} does not exist.")
        parts: list[_Part] = []
        for path in sorted(folder.iterdir()):
            if path.is_symlink() or not path.is_file():
                continue
            member = tarfile.TarInfo(path.name)
            member.size, member.mtime, member.mode = path.stat().st_size, int(mtime), 0o644
            header = member.tobuf(tarfile.PAX_FORMAT)
            parts.append(_Part(len(header), header))
            padded = -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            parts.append(_Part(padded, path=path))
        length = sum(part.size for part in parts) + 2 * tarfile.BLOCKSIZE
        end = -(-length // tarfile.RECORDSIZE) * tarfile.RECORDSIZE - length
        parts.append(_Part(2 * tarfile.BLOCKSIZE + end))
        return cls(length + end, tuple(parts))

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes from *start* up to *end* (exclusive)."""
        at = 0
        for part in self._parts:
            first, last = max(start - at, 0), min(end - at, part.size)
            at += part.size
            if first < last:
                yield from _read(part, first, last)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for piece in self.read(0, self.size):
            digest.update(piece)
        return digest.hexdigest()


def _read(part: _Part, first: int, last: int) -> Iterator[bytes]:
    if part.path is None:
        yield part.content.ljust(part.size, b"\0")[first:last]
        return
    with part.path.open("rb") as file:
        file.seek(first)
        left = last - first
        while left > 0:
            piece = file.read(min(_PIECE, left))
            if not piece:  # end of the file; the rest is padding
                break
            left -= len(piece)
            yield piece
    if left > 0:
        yield b"\0" * left
