"""A new model with the weights of a checkpoint: one request where it is taken so, else three."""

from __future__ import annotations

import threading

import pytest

from tests.support.fake_server import FakeServer, session, status
from tinkex import errors, types
from tinkex.runtime.new_model import NewModel
from tinkex.runtime.restore import restore
from tinkex.training import TrainingClient

ADAM = types.AdamParams(learning_rate=1e-3)
CHECKPOINT = "tinker://s0:train:0/weights/best"


@pytest.fixture
def server():
    return FakeServer()


def test_a_model_is_restored_by_one_request_where_the_server_takes_it(server):
    with session(server) as s:
        made = restore(s, CHECKPOINT, optimizer=True, user_metadata={"a": 1})

        assert NewModel("s0:train:0") == made
        TrainingClient(s, made.model_id).optim_step(ADAM).result(10)
    [body] = server.bodies("load_weights")
    assert (True, 0, {"a": 1}) == (body["optimizer"], body["model_seq_id"], body["user_metadata"])
    assert [(1, "optim_step")] == [(seq_id, what) for _, seq_id, what in server.executed]


@pytest.mark.parametrize(
    "fault",
    [
        status(422, {"detail": [{"loc": ["body", "model_id"], "msg": "Field required"}]}),
        status(400, {"detail": "model_id is missing"}),
    ],
)
def test_an_older_server_is_asked_by_the_older_three(server, fault):
    """Rank and flags are the checkpoint's."""
    server.script("load_weights", fault)
    with session(server) as s:
        first = restore(s, CHECKPOINT, optimizer=False)
        second = restore(s, CHECKPOINT, optimizer=False)
    lora = server.bodies("create_model")[0]["lora_config"]

    assert (8, False, True) == (lora["rank"], lora["train_mlp"], lora["train_attn"])
    assert ["s0:train:0", "s0:train:1"] == [first.model_id, second.model_id]
    assert 2 == first.first_seq_id  # the load was the first operation
    assert [False, True, True] == ["model_id" in b for b in server.bodies("load_weights")]


def test_a_failed_restore_leaves_nothing_and_its_number_is_used_again(server):
    with session(server) as s:
        server.script("load_weights", status(404, {"detail": "no such checkpoint"}))
        with pytest.raises(errors.NotFoundError, match="no such checkpoint"):
            restore(s, CHECKPOINT, optimizer=False)

        assert "s0:train:0" == restore(s, CHECKPOINT, optimizer=False).model_id
        assert [] == [t for t in threading.enumerate() if t.name.startswith("tinkex-s0")]


def test_a_failed_restore_by_three_calls_ends_the_model_it_made(server):
    """Theirs is left running."""
    missing = status(422, {"detail": "model_id: field required"})
    server.script("load_weights", missing, status(403, {"detail": "not yours"}))
    with session(server) as s, pytest.raises(errors.PermissionDeniedError, match="not yours"):
        restore(s, CHECKPOINT, optimizer=False)

    assert [{"model_id": "s0:train:0", "type": "unload_model"}] == server.bodies("unload_model")
