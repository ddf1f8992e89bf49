"""Backups: made while a server works, restored elsewhere, whole."""

from __future__ import annotations

import io
import shutil
import sqlite3
import stat
import tarfile
import threading

import pytest

from tinkex.cli import main
from tinkex.server import home_backup
from tinkex.server.auth import Keys
from tinkex.server.home import HomeError
from tinkex.server.home_backup import backup, collect_garbage, restore
from tinkex.server.home_check import check_home

ALICE = {"keys": lambda home: Keys.of_users(["bare-key-of-alice"], home.secret())}


def test_a_backup_of_a_working_server_restores_elsewhere(serve, tmp_path, capsys):
    """Checkpoints load and sample there, for the same keys; its sessions have ended."""
    served = serve(**ALICE)
    alice = served.client_with("bare-key-of-alice")
    session = alice.session()
    model = alice.model(session)
    alice.result(alice.forward_backward(model, 1, [5]))
    alice.result(alice.optim_step(model, 2))
    path = alice.result(alice.save(model, 3, "mine"))["path"]
    status = main(["home", "backup", str(tmp_path / "b.tar"), "--home", str(tmp_path / "home")])
    alice.result(alice.save(model, 4, "later"))
    main(["home", "restore", str(tmp_path / "b.tar"), "--home", str(tmp_path / "other")])
    said = capsys.readouterr().out
    served.server.close()
    (tmp_path / "home").rename(tmp_path / "gone")
    again = serve(home=tmp_path / "other", **ALICE).client_with("bare-key-of-alice")
    body = {"session_id": again.session(), "model_seq_id": 0, "path": path, "optimizer": True}
    loaded = again.result(again.post("load_weights", body))

    assert not status
    assert "1 checkpoints, all whole" in said
    assert ["weights/mine"] == [c["checkpoint_id"] for c in again.get("checkpoints")["checkpoints"]]
    assert "metrics" in again.result(again.optim_step(loaded["model_id"], 1))
    assert 410 == again.refused("session_heartbeat", {"session_id": session})[0]
    assert 0o600 == stat.S_IMODE((tmp_path / "b.tar").stat().st_mode)


def test_backups_beside_saves_and_deletes_hold_only_whole_checkpoints(serve, tmp_path):
    client = serve().client
    model = client.model()
    stop = threading.Event()

    def churn():
        seq = 1
        while not stop.is_set():
            client.result(client.save(model, seq, f"n{seq}"))
            if seq > 4:
                old = f"training_runs/{model}/checkpoints/weights/n{seq - 4}"
                client.send("DELETE", old)
            seq += 1

    worker = threading.Thread(target=churn)
    worker.start()
    counts = []
    try:
        for i in range(5):
            backup(tmp_path / "home", tmp_path / f"{i}.tar")
            counts.append(restore(tmp_path / f"{i}.tar", tmp_path / f"home-{i}"))  # checks hashes
    finally:
        stop.set()
        worker.join()

    assert max(counts) >= 1
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_restored_leaves_nothing_behind(serve, tmp_path):
    client = serve().client
    client.result(client.save(client.model(), 1, "mine"))
    backup(tmp_path / "home", tmp_path / "b.tar")
    whole = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.tar").write_bytes(b"x" * 5000)
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        member = tarfile.TarInfo("../escaped")
        tar.addfile(member)
    for name in ("cut", "noise", "evil", "missing"):
        with pytest.raises(HomeError, match="cannot be restored"):
            restore(tmp_path / f"{name}.tar", tmp_path / "new")
    with pytest.raises(HomeError, match="is not empty"):
        restore(tmp_path / "b.tar", tmp_path / "home")
    with pytest.raises(HomeError, match="exists already"):
        backup(tmp_path / "home", tmp_path / "b.tar")

    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "escaped").exists()
    assert not list(tmp_path.glob(".*"))


def test_garbage_is_collected_beside_a_running_server(serve, tmp_path):
    client = serve(limits={"reap_seconds": 3600.0}).client
    model = client.model()
    client.result(client.save(model, 1, "short", ttl_seconds=1000))
    client.result(client.save(model, 2, "kept"))
    with sqlite3.connect(tmp_path / "home" / "tinkex.sqlite") as database:
        database.execute("UPDATE checkpoints SET expires_at = 1 WHERE checkpoint_id LIKE '%short'")
    database.close()
    (tmp_path / "home" / "servers" / "free-1-dead").mkdir()

    assert 2 == collect_garbage(tmp_path / "home")
    assert ["weights/kept"] == [
        c["checkpoint_id"] for c in client.get("checkpoints")["checkpoints"]
    ]
    assert "metrics" in client.result(client.optim_step(model, 3))


def test_a_checkpoint_that_is_deleted_while_it_is_copied_is_left_out(serve, tmp_path, monkeypatch):
    """As a whole: half of it would be reported as damaged when it is restored."""
    client = serve().client
    model = client.model()
    for seq, name in enumerate(("gone", "kept"), start=1):
        client.result(client.save(model, seq, name))
    copy = shutil.copytree

    def delete_then_copy(source, target):
        if not client.deleted:
            client.deleted = True
            answer = client.send("DELETE", f"training_runs/{model}/checkpoints/weights/gone")
            assert 200 == answer.status_code
        return copy(source, target)

    client.deleted = False
    monkeypatch.setattr(home_backup.shutil, "copytree", delete_then_copy)
    made = backup(tmp_path / "home", tmp_path / "b.tar")

    assert 1 == made.checkpoints
    assert 1 == restore(tmp_path / "b.tar", tmp_path / "new")


def test_a_checkpoint_that_cannot_be_read_fails_the_backup(serve, tmp_path, monkeypatch):
    """It is listed, so a backup without it would be incomplete."""
    client = serve().client
    client.result(client.save(client.model(), 1, "mine"))

    def fail(source, target):
        raise OSError(5, "Input/output error", str(source))

    monkeypatch.setattr(home_backup.shutil, "copytree", fail)

    with pytest.raises(HomeError, match=r"cannot be written: .*Input/output error"):
        backup(tmp_path / "home", tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_is_no_home_is_not_touched(tmp_path):
    (tmp_path / "other").mkdir()
    for change in (lambda home: backup(home, tmp_path / "b.tar"), collect_garbage):
        with pytest.raises(HomeError, match="is not a home of tinkex"):
            change(tmp_path / "other")

    assert [] == list((tmp_path / "other").iterdir())


def _rewritten(source, target, change):
    """A backup whose members' content *change* may replace."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            content = old.extractfile(member).read() if member.isfile() else None
            if content is not None:
                content = change(member.name, content)
                member.size = len(content)
            new.addfile(member, None if content is None else io.BytesIO(content))


def test_a_backup_of_a_later_version_is_refused(serve, tmp_path):
    serve().server.close()
    backup(tmp_path / "home", tmp_path / "b.tar")
    _rewritten(
        tmp_path / "b.tar",
        tmp_path / "later.tar",
        lambda name, content: (
            b'{"version": 2, "home": "/x"}' if name.endswith(".json") else content
        ),
    )

    with pytest.raises(HomeError, match="it is of version 2"):
        restore(tmp_path / "later.tar", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_damaged_checkpoint_is_named_and_the_others_are_restored(serve, tmp_path):
    """Into a folder that is there, and empty."""
    client = serve().client
    model = client.model()
    for seq, name in enumerate(("bad", "good"), start=1):
        client.result(client.save(model, seq, name))
    rows = client.get("checkpoints")["checkpoints"]
    backup(tmp_path / "home", tmp_path / "b.tar")
    damaged = []

    def damage(name, content):
        if name.endswith("adapter_model.safetensors") and not damaged:
            damaged.append(name)
            return b"x" * len(content)
        return content

    _rewritten(tmp_path / "b.tar", tmp_path / "damaged.tar", damage)
    (tmp_path / "new").mkdir()

    with pytest.raises(HomeError, match="1 checkpoints of the backup are damaged, tinker://"):
        restore(tmp_path / "damaged.tar", tmp_path / "new")
    found = check_home(tmp_path / "new")
    assert ["damaged", "ok"] == sorted(one.status for one in found)
    assert len(rows) == len(found)


def test_a_checkpoint_without_hashes_is_checked_as_far_as_it_can_be(serve, tmp_path):
    """Early versions saved none: whether the folder is there can be said all the same."""
    client = serve().client
    client.result(client.save(client.model(), 1, "mine"))
    with sqlite3.connect(tmp_path / "home" / "tinkex.sqlite") as database:
        database.execute("UPDATE checkpoints SET file_hashes = NULL")
    database.close()
    [before] = check_home(tmp_path / "home")
    shutil.rmtree(before.directory)
    [after] = check_home(tmp_path / "home")

    assert ("unknown", "damaged") == (before.status, after.status)
    assert "its folder is missing" == after.detail
