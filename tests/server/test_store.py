"""The store after a power cut, a crash or on a full disk, without a server."""

from __future__ import annotations

import os
import sqlite3
import time

import attrs
import pytest

from tinkex.server.database import CheckpointRow
from tinkex.server.home import Home, HomeError
from tinkex.server.http_errors import Refusal
from tinkex.server.store import Store

PATH = "tinker://s:train:0/weights/a"
ROW = CheckpointRow(
    path=PATH,
    run_id="s:train:0",
    checkpoint_id="weights/a",
    kind="training",
    owner="local",
    base_model="tiny",
    rank=4,
    train_mlp=True,
    train_attn=True,
    train_unembed=True,
    directory="",
    size_bytes=0,
    created_at=1000.0,
    expires_at=None,
    public=False,
    user_metadata={"epoch": 3},
    origin="s:train:0:1",
)


@pytest.fixture
def home(tmp_path):
    return Home.open(tmp_path / "home")


@pytest.fixture
def folder(home):
    folder = home.claim(1234)
    yield folder
    folder.release()


class Clock:
    def __init__(self):
        self.now = 2000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(home, clock):
    store = Store(home, clock)
    yield store
    store.close()


def draft(folder, text="weights"):
    path = folder.draft()
    (path / "adapter_model.safetensors").write_text(text)
    return path


def test_a_checkpoint_is_there_with_its_files_and_its_row(store, folder):
    store.checkpoints.add(draft(folder), ROW)
    row = store.checkpoints.find(PATH, "local")

    assert 7 == row.size_bytes
    assert {"epoch": 3} == row.user_metadata
    assert f"{store.home.checkpoints}/s_train_0/weights/a" == row.directory
    assert [] == list(folder.drafts.iterdir())


def test_files_without_a_row_are_no_checkpoint_and_are_cleaned_up_later(store, folder, clock):
    """A crash between rename and row; a recent folder may belong to a running save."""
    orphan = store.home.checkpoints / "s_train_0" / "weights" / "lost"
    orphan.mkdir(parents=True)
    young = store.home.checkpoints / "s_train_0" / "weights" / "young"
    young.mkdir()
    store.checkpoints.add(draft(folder), ROW)
    clock.now = time.time()
    os.utime(orphan, (clock.now - 7200, clock.now - 7200))
    deleted = store.checkpoints.delete_orphans()

    assert [orphan] == deleted
    assert young.exists()
    assert (store.home.checkpoints / "s_train_0" / "weights" / "a").exists()


def test_half_written_files_of_a_dead_server_are_gone_when_its_name_is_taken_again(home):
    folder = home.claim(99)
    left = draft(folder)
    os.close(folder._lock)  # it is dead
    successor = home.claim(99)

    assert not left.exists()
    successor.release()


def test_a_living_servers_name_cannot_be_taken(home, folder):
    with pytest.raises(HomeError, match="another server already uses the home"):
        home.claim(1234)


def test_a_living_servers_folder_is_not_purged(home):
    living = home.claim(0)
    dead = home.claim(0)
    os.close(dead._lock)
    forgotten = []
    purged = home.purge_dead(forgotten.append)

    assert [dead.name] == purged == forgotten
    assert living.path.exists()
    living.release()
    assert not living.path.exists()


def test_a_checkpoint_whose_row_cannot_be_written_leaves_no_files(store, folder):
    """The disk does not fill up with files that are not listed."""
    store._db._db.execute("PRAGMA query_only=1")
    files = draft(folder)
    with pytest.raises(Exception, match="readonly"):
        store.checkpoints.add(files, ROW)
    store._db._db.execute("PRAGMA query_only=0")

    assert [] == [p for p in store.home.checkpoints.rglob("*") if p.is_file()]
    with pytest.raises(Refusal):
        store.checkpoints.find(PATH, "local")


def test_overwriting_switches_from_one_whole_to_another(store, folder):
    old = store.checkpoints.add(draft(folder, "old"), ROW)
    new = store.checkpoints.add(draft(folder, "newer"), attrs.evolve(ROW, origin="s:train:0:2"))

    assert old.directory != new.directory
    assert not os.path.exists(old.directory)
    assert 5 == store.checkpoints.find(PATH, "local").size_bytes


def test_what_expires_is_gone_at_once_and_its_files_with_the_next_clean_up(store, folder, clock):
    row = store.checkpoints.add(draft(folder), attrs.evolve(ROW, expires_at=2010.0))
    clock.now = 2011.0
    with pytest.raises(Refusal):
        store.checkpoints.find(PATH, "local")
    there = os.path.exists(row.directory)
    deleted = store.checkpoints.delete_expired()

    assert there
    assert [PATH] == deleted
    assert not os.path.exists(row.directory)


def test_names_that_are_paths_are_refused(store):
    for path in ("x", "tinker://s/weights/../a", "tinker:///weights/a", "tinker://s/weights/a/b"):
        with pytest.raises(Refusal) as refused:
            store.checkpoints.find(path, "local")
        assert 400 == refused.value.status


def test_a_transaction_that_fails_in_the_middle_has_changed_nothing(store, folder):
    """And the next one works: no lock is left behind."""
    store.checkpoints.add(draft(folder), ROW)
    database = store._db
    with pytest.raises(RuntimeError, match="in the middle"), database.transaction() as db:
        db.execute("DELETE FROM checkpoints")
        raise RuntimeError("in the middle")

    assert store.checkpoints.find(PATH, ROW.owner)
    store.checkpoints.publish(PATH, ROW.owner, True)
    assert store.checkpoints.find(PATH, ROW.owner).public


@pytest.mark.parametrize("sentence", ["database or disk is full", "database is locked"])
def test_a_full_disk_can_be_cleaned_up_with_the_space_of_the_reserve(
    store, folder, home, monkeypatch, sentence
):
    """SQLite needs space to delete a row. Another failure does not cost the reserve."""
    store.checkpoints.add(draft(folder), ROW)
    change = store._db.change

    def full(sql, *values):
        if home.reserve.path.exists():
            raise sqlite3.OperationalError(sentence)
        return change(sql, *values)

    monkeypatch.setattr(store._db, "change", full)
    if "full" not in sentence:
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            store.checkpoints.delete(ROW.path, ROW.owner)
        assert store.checkpoints.find(ROW.path, ROW.owner)
        return
    store.checkpoints.delete(ROW.path, ROW.owner)

    with pytest.raises(Refusal):
        store.checkpoints.find(ROW.path, ROW.owner)
    assert home.reserve.path.exists()  # made again, for the next time
