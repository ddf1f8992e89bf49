"""The database of a home: files of earlier versions are brought up to date, newer ones refused."""

from __future__ import annotations

import sqlite3

import pytest

from tests.server.conftest import Served
from tinkex.server.home import HomeError

#: The tables of the first version, as they were then. Never to be changed.
FIRST = """
CREATE TABLE IF NOT EXISTS sessions (
    session_id TEXT PRIMARY KEY, owner TEXT NOT NULL, server TEXT NOT NULL,
    created_at REAL NOT NULL, status TEXT NOT NULL, detail TEXT, user_metadata TEXT NOT NULL,
    tags TEXT NOT NULL, display_name TEXT, project_id TEXT);
CREATE TABLE IF NOT EXISTS runs (
    run_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, owner TEXT NOT NULL,
    base_model TEXT NOT NULL, rank INTEGER NOT NULL, train_mlp INTEGER NOT NULL,
    train_attn INTEGER NOT NULL, train_unembed INTEGER NOT NULL, user_metadata TEXT,
    created_at REAL NOT NULL, last_request_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS samplers (
    sampler_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, owner TEXT NOT NULL,
    server TEXT NOT NULL, base_model TEXT NOT NULL, model_path TEXT, directory TEXT,
    origin TEXT NOT NULL, clones INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS checkpoints (
    path TEXT PRIMARY KEY, run_id TEXT NOT NULL, checkpoint_id TEXT NOT NULL, kind TEXT NOT NULL,
    owner TEXT NOT NULL, base_model TEXT NOT NULL, rank INTEGER NOT NULL,
    train_mlp INTEGER NOT NULL, train_attn INTEGER NOT NULL, train_unembed INTEGER NOT NULL,
    directory TEXT NOT NULL, size_bytes INTEGER NOT NULL, created_at REAL NOT NULL,
    expires_at REAL, public INTEGER NOT NULL DEFAULT 0, user_metadata TEXT, origin TEXT NOT NULL,
    sha256 TEXT, file_hashes TEXT);
CREATE INDEX IF NOT EXISTS sessions_by_owner ON sessions (owner, created_at);
CREATE INDEX IF NOT EXISTS runs_by_owner ON runs (owner, last_request_at);
CREATE INDEX IF NOT EXISTS runs_by_session ON runs (session_id);
CREATE INDEX IF NOT EXISTS samplers_by_session ON samplers (session_id);
CREATE INDEX IF NOT EXISTS checkpoints_by_run ON checkpoints (run_id);
CREATE INDEX IF NOT EXISTS checkpoints_by_owner ON checkpoints (owner, created_at);
CREATE INDEX IF NOT EXISTS checkpoints_by_expiry ON checkpoints (expires_at);
"""
#: Those from before checkpoints had hashes.
BEFORE_HASHES = FIRST.replace("sha256 TEXT, file_hashes TEXT", "sha256 TEXT")


def make(home, schema, version=0):
    """A home of that time, with one run and one checkpoint of the user "local"."""
    (home / "checkpoints" / "r" / "weights" / "old").mkdir(parents=True)
    directory = home / "checkpoints" / "r" / "weights" / "old"
    (directory / "adapter_model.safetensors").write_text("x")
    database = sqlite3.connect(home / "tinkex.sqlite")
    with database:
        database.executescript(schema)
        database.execute(
            "INSERT INTO sessions VALUES ('s', 'local', 'port-1', 1.0, 'active', NULL, '{}', "
            "'[]', NULL, NULL)"
        )
        database.execute(
            "INSERT INTO runs VALUES ('r', 's', 'local', 'tiny', 4, 1, 1, 1, NULL, 1.0, 1.0)"
        )
        database.execute(
            "INSERT INTO checkpoints (path, run_id, checkpoint_id, kind, owner, base_model, rank, "
            "train_mlp, train_attn, train_unembed, directory, size_bytes, created_at, origin) "
            "VALUES ('tinker://r/weights/old', 'r', 'weights/old', 'training', 'local', 'tiny', 4, "
            "1, 1, 1, ?, 1, 1.0, 'r:1')",
            (str(directory),),
        )
        database.execute(f"PRAGMA user_version={version}")
    database.close()


@pytest.mark.parametrize("schema", [FIRST, BEFORE_HASHES], ids=["first", "before hashes"])
def test_a_home_of_an_earlier_version_is_served_and_saved_to(serve, tmp_path, schema):
    """Twice: the second time it is up to date."""
    (tmp_path / "home").mkdir()
    make(tmp_path / "home", schema)
    for name in ("a", "b"):
        served = serve()
        client = served.client
        client.result(client.save(client.model(), 1, name))
        listed = {c["checkpoint_id"] for c in client.get("checkpoints")["checkpoints"]}
        run = client.get("training_runs/r")["base_model"]
        served.server.close()
        assert {"weights/old", f"weights/{name}"} <= listed
        assert "tiny" == run


def test_a_database_of_a_newer_version_is_refused_and_not_changed(tmp_path):
    (tmp_path / "home").mkdir()
    make(tmp_path / "home", FIRST, version=99)
    with pytest.raises(HomeError, match=r"newer version of tinkex \(format 99"):
        Served(tmp_path / "home")
    with sqlite3.connect(tmp_path / "home" / "tinkex.sqlite") as database:
        tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master")}
    database.close()

    assert "recorded" not in tables
