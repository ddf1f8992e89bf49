"""The home's folder on a disk that is full or cannot be written."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest

from tinkex.server.home import Home, HomeError


def _failing(monkeypatch, code, is_over):
    """Writing the probe fails with *code* until *is_over*."""
    write = Path.write_bytes

    def write_bytes(self, data):
        if self.name.startswith(".probe-") and not is_over():
            raise OSError(code, "refused")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


def test_on_a_full_disk_the_reserve_makes_room_to_delete_checkpoints(tmp_path, monkeypatch, caplog):
    """Otherwise the server could not start, and nothing could be deleted with its help."""
    reserve = Home.open(tmp_path / "home").reserve
    assert reserve.path.exists()
    _failing(monkeypatch, errno.ENOSPC, lambda: not reserve.path.exists())

    with caplog.at_level(logging.WARNING):
        home = Home.open(tmp_path / "home")

    assert "nothing can be saved until there is room" in caplog.text
    assert [] == list(home.path.glob(".probe-*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_home_that_cannot_be_written_is_refused_with_the_fix(code, tmp_path, monkeypatch):
    """A full disk without a reserve, too. A reserve is not given up for another reason."""
    reserve = Home.open(tmp_path / "home").reserve
    if code == errno.ENOSPC:
        reserve.release()
    _failing(monkeypatch, code, lambda: False)

    with pytest.raises(HomeError, match="cannot be written: refused; free disk space or fix"):
        Home.open(tmp_path / "home")

    assert (code == errno.EROFS) == reserve.path.exists()
