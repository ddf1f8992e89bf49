"""A bit that flips in a checkpoint's file is noticed before the weights are used."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from tinkex import cli
from tinkex.server.checkpoint_store import damage_of


def flip_a_bit(home):
    """In the middle of the weights of the only checkpoint."""
    [path] = (home / "checkpoints").rglob("adapter_model.safetensors")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.fixture
def damaged(served, tmp_path):
    """A client, and the path of its checkpoint, whose file has changed."""
    client = served.client
    model = client.model()
    path = client.result(client.save(model, 1, "a"))["path"]
    flip_a_bit(tmp_path / "home")
    return client, path


def test_it_is_not_loaded(damaged):
    client, path = damaged
    model = client.model()
    result = client.result(
        client.post("load_weights", {"model_id": model, "seq_id": 1, "path": path})
    )
    step = client.result(client.optim_step(model, 2))

    assert "adapter_model.safetensors has SHA-256" in result["error"]
    assert path in result["error"]
    assert "user" == result["category"]
    assert "metrics" in step


def test_no_model_is_made_from_it(damaged):
    client, path = damaged
    body = {"session_id": client.session(), "model_seq_id": 0, "path": path}

    assert "is damaged" in client.result(client.post("load_weights", body))["error"]


def test_nothing_is_sampled_from_it(damaged):
    client, path = damaged
    sampler = client.sampler(model_path=path)

    assert "is damaged" in client.result(client.sample(sampler, 0))["error"]


def test_it_is_not_downloaded_or_copied(damaged):
    client, path = damaged
    run, _, name = path.removeprefix("tinker://").partition("/")
    link = client.refused(f"training_runs/{run}/checkpoints/{name}/archive", method="GET")
    copy = client.refused("copy_weights", {"source_path": path})

    assert 400 == link[0] == copy[0]
    assert "is damaged" in link[1]
    assert "is damaged" in copy[1]


def test_a_missing_file_is_damage_too(served, tmp_path):
    client = served.client
    model = client.model()
    path = client.result(client.save(model, 1, "a"))["path"]
    next((tmp_path / "home" / "checkpoints").rglob("adapter_config.json")).unlink()
    sampler = client.sampler(model_path=path)

    assert "adapter_config.json cannot be read" in client.result(client.sample(sampler, 0))["error"]


def test_it_is_listed_and_can_be_deleted(damaged):
    client, path = damaged
    run, _, name = path.removeprefix("tinker://").partition("/")
    listed = client.get("checkpoints")["checkpoints"]
    client.send("DELETE", f"training_runs/{run}/checkpoints/{name}")

    assert [path] == [checkpoint["tinker_path"] for checkpoint in listed]
    assert [] == client.get("checkpoints")["checkpoints"]


def test_a_copy_has_hashes_of_its_own(served):
    client = served.client
    model = client.model()
    path = client.result(client.save(model, 1, "a"))["path"]
    client.post("copy_weights", {"source_path": path})
    rows = served.server.store.checkpoints.all_rows()

    assert 2 == len(rows)
    assert all(row.file_hashes and damage_of(row) is None for row in rows)


def test_a_database_of_an_earlier_version_is_used(serve, tmp_path):
    """Its checkpoints have no hashes, so they are taken as they are."""
    first = serve()
    model = first.client.model()
    path = first.client.result(first.client.save(model, 1, "a"))["path"]
    first.server.close()
    with sqlite3.connect(tmp_path / "home" / "tinkex.sqlite") as database:
        database.execute("ALTER TABLE checkpoints DROP COLUMN file_hashes")
    database.close()
    client = serve().client
    sampler = client.sampler(model_path=path)

    assert "sequences" in client.result(client.sample(sampler, 0))
    assert Path(tmp_path / "home" / "tinkex.sqlite").exists()


def test_home_check_names_what_is_damaged(damaged, tmp_path, capsys):
    """The exit status says it to scripts."""
    _, path = damaged
    home = ["--home", str(tmp_path / "home")]
    status = cli.main(["home", "check", *home])
    shown = capsys.readouterr().out
    cli.main(["home", "check", "--format", "json", *home])
    found = json.loads(capsys.readouterr().out)

    assert 1 == status
    assert f"damaged  {path}: adapter_model.safetensors has SHA-256" in shown
    assert "1 checkpoints checked: 1 damaged" in shown
    assert not found["ok"]
    assert ["damaged"] == [one["status"] for one in found["checkpoints"]]


def test_home_check_of_a_sound_home(served, tmp_path, capsys):
    client = served.client
    client.result(client.save(client.model(), 1, "a"))

    assert 0 == cli.main(["home", "check", "--home", str(tmp_path / "home")])
    assert "1 checkpoints checked: 0 damaged" in capsys.readouterr().out


def test_home_check_of_another_folder(tmp_path, capsys):
    assert 1 == cli.main(["home", "check", "--home", str(tmp_path)])
    assert "is not a home of tinkex" in capsys.readouterr().err
