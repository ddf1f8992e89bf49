"""Backups: made while a server works, restored elsewhere, whole."""

from __future__ import annotations

import sqlite3
import stat
import tarfile
import threading

import pytest

from tinkex.cli import main
from tinkex.server.auth import Keys
from tinkex.server.home import HomeError
from tinkex.server.home_backup import backup, collect_garbage, restore

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
