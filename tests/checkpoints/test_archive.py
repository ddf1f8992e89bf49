"""Unpacking archives of servers that are not trusted: every bound, and memory."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import tracemalloc

import pytest

from tinkex import errors
from tinkex.checkpoints import archive as archives
from tinkex.checkpoints.archive import unpack


def tar(*members, format=tarfile.PAX_FORMAT):
    """An archive of (name, content) pairs and of TarInfos without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as out:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                out.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def unpacked(tmp_path):
    """Unpacks bytes; the new folder."""

    def unpacked(content):
        path = tmp_path / "archive.tar"
        path.write_bytes(content)
        unpack(path, tmp_path / "result")
        return tmp_path / "result"

    return unpacked


def zeros(size):
    """A gzip file of that many zeros, after the header of a tar member of that size."""
    info = tarfile.TarInfo("weights.bin")
    info.size = size
    return gzip.compress(info.tobuf() + bytes(size), 1)


def test_a_small_archive_that_unpacks_to_much_is_refused(unpacked, monkeypatch):
    """1 MB of gzip can hold 1 GiB of zeros; here 128 MiB in 0.6 MB."""
    content = zeros(128 << 20)
    assert len(content) < 1 << 20

    with pytest.raises(
        errors.DownloadError, match=rf"has {len(content)} bytes, but unpacks to more than 67108864"
    ):
        unpacked(content)


def test_zeros_up_to_the_bound_are_accepted(unpacked):
    """A new adapter's optimizer state is zeros."""
    folder = unpacked(gzip.compress(tar(("optimizer.bin", bytes(32 << 20))), 1))

    assert 32 << 20 == (folder / "optimizer.bin").stat().st_size


def test_many_members_are_refused_soon(unpacked):
    """tarfile would spend half a minute on 100,000 of them."""
    content = tar(*[(f"{i}", b"") for i in range(archives.MAX_MEMBERS + 1)])

    with pytest.raises(errors.DownloadError, match="more than 1000 files and folders"):
        unpacked(content)


def test_a_sparse_member_is_refused(unpacked):
    """A few bytes of it stand for 4 GiB."""
    info = tarfile.TarInfo("weights.bin")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 0
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:398] = b"00000000000\0"  # one hole at 0, of no bytes
    header[483:495] = b"37777777777\0"  # the real size: 8 GiB less one byte
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)

    with pytest.raises(errors.DownloadError, match=r"'weights.bin' is a sparse file"):
        unpacked(bytes(header) + bytes(1024))


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\nb", "a\x07", "\u202egpj.exe"])
def test_control_characters_do_not_reach_the_terminal(unpacked, name):
    with pytest.raises(errors.DownloadError) as caught:
        unpacked(tar((name, b"x")))

    assert "has control characters in its name" in str(caught.value)
    assert str(caught.value).isprintable()


def test_deep_folders_are_refused(unpacked):
    with pytest.raises(errors.DownloadError, match="is more than 8 folders deep"):
        unpacked(tar(("a/" * 8 + "b", b"x")))


def test_a_large_extended_header_is_refused_without_reading_it(unpacked):
    """tarfile would read all of it into memory."""
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 48 << 20
    content = gzip.compress(header.tobuf() + bytes(48 << 20), 1)
    tracemalloc.start()
    with pytest.raises(errors.DownloadError, match="a header of 50331648 bytes is too large"):
        unpacked(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 8 << 20


def test_long_names_are_possible(unpacked):
    name = "layer-" + "a" * 150 + ".safetensors"

    assert (unpacked(tar((name, b"x"))) / name).exists()


def test_a_wrong_checksum_after_the_last_member_is_found(unpacked):
    content = bytearray(lzma.compress(tar(("a", b"x" * 100))))
    content[-20] ^= 0xFF

    with pytest.raises(errors.DownloadError, match="cannot be unpacked"):
        unpacked(bytes(content))
