"""What one user may have: models, waiting requests, disk. Another user is not affected."""

from __future__ import annotations

import threading

import pytest

from tests.support.fake_engine import FakeEngine
from tests.support.wire_client import batch
from tinkex import wire
from tinkex.server.auth import Keys


@pytest.fixture
def start(serve):
    def start(engine=None, **limits):
        keys = lambda home: Keys.of_users(["alice=alice-key", "bob=bob-key-1"], home.secret())  # noqa: E731
        served = serve(keys=keys, limits=limits, engine=engine)
        return served.client_with("alice-key"), served.client_with("bob-key-1")

    return start


def create(number, session):
    return {"session_id": session, "model_seq_id": number, "base_model": "tiny"}


def test_models_beyond_the_quota_are_refused_until_one_is_unloaded(start):
    """By a sentence that says how many there are; the same number works afterwards."""
    alice, bob = start(user_models=2)
    session = alice.session()
    models = [alice.model(session, number) for number in range(2)]
    refused = alice.refused("create_model", create(2, session))
    others = bob.model()
    again = alice.post(
        "create_model", {**create(1, session), "lora_config": {"rank": 4, "seed": 1}}
    )
    alice.result(alice.post("unload_model", {"model_id": models[0]}))

    assert (400, True) == (refused[0], "you have 2 live models" in refused[1])
    assert others
    assert models[1] == again["model_id"]  # a repeat is no new model
    assert alice.model(session, 2)


def test_requests_beyond_the_quota_wait_outside(start):
    """Over all models and samplers of the user. What all wait for is always taken."""
    gate = threading.Event()
    alice, bob = start(engine=FakeEngine(gate=gate), user_queue=4)
    gate.set()
    model, other, sampler = alice.model(), alice.model(), alice.sampler()
    theirs = bob.sampler()
    gate.clear()
    promises = [alice.sample(sampler, 0), alice.optim_step(model, 2), alice.optim_step(model, 3)]
    promises.append(alice.optim_step(other, 2))
    refused = [
        alice.send("POST", "optim_step", {"model_id": other, "seq_id": 3}),
        alice.send(
            "POST",
            "asample",
            {"sampling_session_id": sampler, "seq_id": 1, "prompt": {"chunks": []}},
        ),
    ]
    free = bob.sample(theirs, 0)
    promises += [alice.optim_step(model, 1), alice.optim_step(other, 1)]
    gate.set()
    results = [alice.result(promise) for promise in promises]
    bob.result(free)

    assert [429, 429] == [answer.status_code for answer in refused]
    assert all("Retry-After" in answer.headers for answer in refused)
    assert "4 requests waiting" in refused[0].json()["error"]
    assert all("error" not in result for result in results)
    assert "metrics" in alice.result(alice.optim_step(other, 3))


def test_checkpoints_beyond_the_quota_are_not_saved(start, tmp_path):
    """Nothing of them stays; after a delete there is room."""
    alice, bob = start(user_disk_bytes=400)
    model = alice.model()
    first = alice.result(alice.save(model, 1, "a"))
    seq, result = 2, {}
    while "error" not in result:
        result = alice.result(alice.save(model, seq, f"n{seq}"))
        seq += 1
    alice.send("DELETE", f"training_runs/{model}/checkpoints/weights/a")
    after = alice.result(alice.save(model, seq, "room"))
    overwritten = alice.result(alice.save(model, seq + 1, "room", overwrite=True))

    assert "path" in first
    assert "Delete checkpoints that you do not need" in result["error"]
    assert "user" == result["category"]
    assert "path" in after
    assert "path" in overwritten
    assert "path" in bob.result(bob.save(bob.model(), 1, "mine"))
    assert not list((tmp_path / "home").glob("servers/*/drafts/*"))


def test_copies_and_weights_of_samplers_count_too(start):
    alice, bob = start(user_disk_bytes=400)
    model = bob.model()
    path = bob.result(bob.save(model, 1, "gift"))["path"]
    bob.post(f"training_runs/{model}/checkpoints/weights/gift/publish")
    statuses = [
        alice.send("POST", "copy_weights", {"source_path": path}).status_code for _ in range(8)
    ]
    mine = bob.model()
    results = [
        bob.result(
            bob.post(
                "save_weights_for_sampler",
                {"model_id": mine, "seq_id": seq, "sampling_session_seq_id": seq},
            )
        )
        for seq in range(1, 8)
    ]

    assert "error" in results[-1]
    assert "sampling_session_id" in results[0]
    assert {200, 400} >= set(statuses)


def test_sample_requests_are_admitted_by_their_bytes(start):
    """Prompts that wait would fill the memory; a single one is always taken."""
    gate = threading.Event()
    alice, _ = start(engine=FakeEngine(gate=gate), sample_queue_bytes=50_000)
    sampler = alice.sampler()
    prompts = [list(range(900))] * 30
    sent = []
    for seq, tokens in enumerate(prompts):
        chunks = [{"type": "encoded_text", "tokens": tokens}]
        body = {"sampling_session_id": sampler, "seq_id": seq, "prompt": {"chunks": chunks}}
        sent.append(alice.send("POST", "asample", body))
    gate.set()
    taken = [answer.json() for answer in sent if answer.status_code == 200]

    assert 10 < len(taken) < 20
    assert {200, 429} == {answer.status_code for answer in sent}
    assert all(alice.result(promise)["sequences"] for promise in taken)


@pytest.mark.parametrize("limits", [{"json_values": 20}, {"json_containers": 5}])
def test_json_of_too_many_values_is_refused_before_it_is_decoded(serve, limits):
    """Each becomes an object of a hundred bytes. Other requests of the model are not affected."""
    client = serve(limits=limits).client
    model = client.model()
    path, kind, _, body = wire.encode_request(batch(model, 1, [5] * 30), protobuf=False)
    answer = client.http.post(client.url + path, data=body, headers={"Content-Type": kind})
    step = client.result(client.optim_step(model, 1))

    assert 413 == answer.status_code
    assert "send data as application/x-protobuf, or in smaller pieces" in answer.json()["error"]
    assert "metrics" in step


@pytest.mark.parametrize("limits", [{"datums": 2}, {"proto_fields": 5}])
def test_a_batch_of_too_many_datums_is_refused_before_it_is_decoded(serve, limits):
    client = serve(limits=limits).client
    model = client.model()
    request = batch(model, 1, [5], [6], [7])
    path, kind, _, body = wire.encode_request(request, protobuf=True)
    answer = client.http.post(client.url + path, data=body, headers={"Content-Type": kind})

    assert 413 == answer.status_code
    assert "send it in several requests" in answer.json()["error"]
    assert "metrics" in client.result(client.optim_step(model, 1))
