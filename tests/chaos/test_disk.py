"""The disk can be full: what cannot be kept fails and says why, nothing is corrupt, and when there
is room again, everything continues."""

from __future__ import annotations

import errno
import os
import subprocess

import pytest

import tinkex
from tests.chaos import scenario
from tests.chaos.servers import Server
from tinkex import errors, types
from tinkex.server.database import CheckpointRow
from tinkex.server.home import Home
from tinkex.server.store import Store

IMPATIENT = tinkex.Patience(no_answer=2.0, report_after=0.5)
SIZE = 24 * 2**20


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"only who may mount can make a small disk ({done.stderr.strip()})")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, leave):
    """Write until *leave* bytes are free. The server may take room in the middle of it."""
    room = os.statvfs(folder)
    try:
        (folder / "ballast").write_bytes(b"\0" * (room.f_bavail * room.f_bsize - leave))
    except OSError as exc:
        if exc.errno != errno.ENOSPC:
            raise


def step_of(training):
    """The loss before a step, and the step."""
    batch = training.forward_backward(scenario.batch(1), "cross_entropy")
    step = training.optim_step(types.AdamParams(learning_rate=1e-2))
    return batch.result(60).metrics["loss:sum"], step.result(60)


def test_a_full_disk_is_told_and_corrupts_nothing(small_disk, tmp_path):
    """The real engine, SQLite and files, on a disk that is really full."""
    with (
        Server(small_disk / "home") as server,
        tinkex.ServiceClient(server.url, "tml-any", patience=IMPATIENT) as service,
    ):
        training = service.create_lora_training_client("tiny", rank=4, seed=1)
        step_of(training)
        good = training.save_state("good").result(60)
        expected = scenario.weights(server.home, good.path)
        fill(small_disk, leave=200_000)
        with pytest.raises(errors.RequestFailedError, match="No space left on device"):
            training.save_state("too-much").result(60)
        with pytest.raises(errors.RequestFailedError, match="No space left on device"):
            training.save_weights_and_get_sampling_client().result(60)
        drafts = list(server.home.rglob("drafts/*"))
        (small_disk / "ballast").unlink()
        after, _ = step_of(training)
        again = training.save_state("too-much").result(60)

        other = service.create_training_client_from_state_with_optimizer(good.path)
        same, _ = step_of(other)
        saved = other.save_state("same").result(60)

    assert [] == drafts
    assert after == same
    assert expected == scenario.weights(small_disk / "home", good.path)
    assert scenario.weights(small_disk / "home", again.path) == scenario.weights(
        small_disk / "home", saved.path
    )


@pytest.mark.parametrize("restart", [False, True], ids=["running", "started on the full disk"])
def test_a_full_disk_can_be_emptied_through_the_server(small_disk, restart):
    """Deleting writes, too; there is a reserve for that."""
    server = Server(small_disk / "home")
    with server, tinkex.ServiceClient(server.url) as service:
        training = service.create_lora_training_client("tiny", rank=4, seed=1)
        paths = [training.save_state(name).result(60).path for name in ("a", "b", "c")]
        if restart:
            server.kill()
        fill(small_disk, leave=0)
        if restart:
            server.start()
        rest = service.create_rest_client()
        before = [c.tinker_path for c in rest.list_user_checkpoints().checkpoints]
        rest.delete_checkpoint_from_tinker_path(paths[0])
        after = [c.tinker_path for c in rest.list_user_checkpoints().checkpoints]

    assert set(paths) == set(before)
    assert set(paths[1:]) == set(after)


def test_what_cannot_be_written_down_is_not_promised(small_disk, tmp_path):
    """The journal has no room: the request is refused with why, and so is a new session; both are
    taken when there is room, and a restart has all that was promised."""
    server = Server(small_disk / "home")
    with server, tinkex.ServiceClient(server.url, "tml-any", patience=IMPATIENT) as service:
        training = service.create_lora_training_client("tiny", rank=4, seed=1)
        first, _ = step_of(training)
        fill(small_disk, leave=0)
        with pytest.raises(errors.InternalServerError, match="cannot write its journal"):
            training.forward_backward(scenario.batch(2, 500), "cross_entropy").result(60)
        with pytest.raises(errors.InternalServerError, match="disk"):
            for _ in range(500):  # until what SQLite has in reserve is used up
                tinkex.ServiceClient(server.url, "tml-any", patience=IMPATIENT)
        (small_disk / "ballast").unlink()
        server.kill()
        server.start()
        again = tinkex.TrainingClient.start(
            model_id=training.model_id, base_url=server.url, api_key="tml-any", seq_id=2
        )
        second, _ = step_of(again)
        again.close()

    with Server(tmp_path / "undisturbed") as server, tinkex.ServiceClient(server.url) as service:
        training = service.create_lora_training_client("tiny", rank=4, seed=1)
        expected = [step_of(training)[0] for _ in range(2)]
    assert expected == [first, second]


def test_a_checkpoint_is_on_disk_before_it_is_listed(tmp_path, monkeypatch):
    """A power cut at any moment leaves all of it or nothing: its files, their folder, the folder
    under its name, the folders above that, and only then the row."""
    store = Store(Home.open(tmp_path / "home"))
    draft = tmp_path / "home" / "draft"
    draft.mkdir()
    (draft / "adapter_model.safetensors").write_bytes(b"weights")
    happened = []

    def noting(function, name, of):
        def call(*given):
            happened.append((name, of(*given)))
            return function(*given)

        return call

    monkeypatch.setattr(os, "fsync", noting(os.fsync, "sync", lambda fd: name_of(fd, tmp_path)))
    monkeypatch.setattr(os, "rename", noting(os.rename, "rename", lambda old, new: new.name))
    database = store.checkpoints._db
    monkeypatch.setattr(database, "change", noting(database.change, "row", lambda *_: None))
    store.checkpoints.add(draft, ROW)
    store.close()

    assert [
        ("sync", "adapter_model.safetensors"),
        ("sync", "draft"),
        ("rename", "one"),
        ("sync", "weights"),
        ("sync", "run"),
        ("sync", "home"),
        ("row", None),
    ] == happened


def name_of(descriptor, folder):
    """Of what is open under it, somewhere in *folder*."""
    number = os.fstat(descriptor).st_ino
    return next(path.name for path in folder.rglob("*") if path.stat().st_ino == number)


ROW = CheckpointRow(
    path="tinker://run/weights/one", run_id="run", checkpoint_id="weights/one", kind="training",
    owner="local", base_model="tiny", rank=4, train_mlp=True, train_attn=True, train_unembed=True,
    directory="", size_bytes=0, created_at=1.0, expires_at=None, public=False, user_metadata=None,
    origin="test",
)  # fmt: skip
