"""The lock of a run's folder."""

from __future__ import annotations

import os

import pytest

from tinkex.recipes import run_folder


def test_a_locked_folder_is_refused_with_its_holder(tmp_path):
    with (
        run_folder.locked(tmp_path / "run"),
        pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "),
        run_folder.locked(tmp_path / "run"),
    ):
        raise AssertionError("locked twice")


def test_a_lock_leaves_nothing_behind(tmp_path):
    """A mistyped command makes no folder."""
    folder = tmp_path / "run"
    with run_folder.locked(folder):
        pass
    assert not folder.exists()

    with run_folder.locked(folder):
        (folder / "state.json").write_text("{}")
    assert ["state.json"] == [path.name for path in folder.iterdir()]


def test_a_stale_file_is_no_obstacle(tmp_path):
    (tmp_path / "lock").write_text("process 1 on a machine that is gone")

    with run_folder.locked(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / "lock").read_text()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(OSError, match="file"), run_folder.locked(tmp_path / "file" / "run"):
        pass
