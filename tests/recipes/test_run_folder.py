"""The folder of a run: its lock, and disks that are full."""

from __future__ import annotations

import os

import pytest

from tinkex.recipes import run_folder
from tinkex.recipes.settings import Settings


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


# Full disks.


def test_a_full_disk_is_an_error_at_the_start(tmp_path, monkeypatch):
    """Not after hours of training, and before the folder exists."""
    usage = type("Usage", (), {"free": run_folder.MIN_FREE - 1})
    monkeypatch.setattr("tinkex.recipes.run_folder.shutil.disk_usage", lambda path: usage)

    with pytest.raises(OSError, match=f"only 63 MB are free in {tmp_path}/a/run"):
        run_folder.check_space(tmp_path / "a" / "run")
    assert [] == list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_reported_with_the_file(tmp_path):
    """write() on a full disk does not name the file; /dev/full fails like that."""
    metrics = run_folder.RowFile(tmp_path, 0)
    metrics.close()
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    metrics._file = (tmp_path / "metrics.jsonl").open("a")

    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
        metrics.append({"step": 1})
    with pytest.raises(OSError, match="No space left"):
        metrics.close()


def test_a_full_disk_keeps_the_state_of_the_last_checkpoint(tmp_path):
    state = run_folder.State(Settings(base_model="tiny"), "data.jsonl", "hash", step=3)
    run_folder.save_state(tmp_path, state)
    (tmp_path / "state.json.new").symlink_to("/dev/full")

    with pytest.raises(OSError, match=r"No space left on device: .*state\.json\.new"):
        run_folder.save_state(tmp_path, state)
    assert state == run_folder.load_state(tmp_path)
