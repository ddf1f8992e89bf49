"""A folder as a tar stream: any range of it, and files that change under it."""

from __future__ import annotations

import io
import tarfile

import pytest

from tinkex.server.archive import Archive


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "b.safetensors").write_bytes(bytes(range(256)) * 5)
    (path / "a.json").write_text("{}")
    (path / "empty").write_bytes(b"")
    return path


def read(archive, start=0, end=None):
    return b"".join(archive.read(start, archive.size if end is None else end))


def test_any_range_is_a_part_of_the_whole(folder):
    """Across the borders of headers, files and padding."""
    archive = Archive.of(folder, 1000.0)
    whole = read(archive)

    borders = [0, 1, 511, 512, 513, 1024, 1500, 2048, len(whole) - 1, len(whole)]
    for start in borders:
        for end in borders:
            assert whole[start:end] == read(archive, start, end)


def test_only_regular_files_are_in_it(folder, tmp_path):
    """A link could lead out of the checkpoint."""
    (tmp_path / "secret").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "folder").mkdir()

    with tarfile.open(fileobj=io.BytesIO(read(Archive.of(folder, 1000.0)))) as tar:
        assert ["a.json", "b.safetensors", "empty"] == tar.getnames()
        assert bytes(range(256)) * 5 == tar.extractfile("b.safetensors").read()


def test_a_file_that_has_become_shorter_is_filled_up(folder):
    """The size is promised in a header before the first byte is sent."""
    archive = Archive.of(folder, 1000.0)
    whole = read(archive)
    (folder / "b.safetensors").write_bytes(bytes(range(100)))

    shorter = read(archive)

    assert len(whole) == len(shorter)
    at = whole.index(bytes(range(256)))
    assert bytes(range(100)) + bytes(400) == shorter[at : at + 500]


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Archive.of(tmp_path / "gone", 1000.0)
