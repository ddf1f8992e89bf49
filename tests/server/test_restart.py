"""Killed with -9 and restarted, the server has the same state, bit by bit."""

from __future__ import annotations

import json
import random
import threading
import time

import pytest

from tests.support.processes import ServerProcess, patiently
from tests.support.wire_client import batch
from tinkex import wire

#: Snapshots every few operations, so that a short run has many.
OFTEN = {"poll_seconds": 0.5, "snapshot_bytes": 20_000, "reap_seconds": 0.1}


@pytest.fixture
def process(tmp_path):
    running = []

    def make(**options):
        server = ServerProcess(tmp_path / "home", **options)
        running.append(server)
        server.start()
        return server

    yield make
    for server in running:
        server.close()


def test_a_killed_server_comes_back_as_it_was(process):
    """Models, optimizer state, accumulated gradients, samplers and unfetched results."""
    server = process(limits=OFTEN)
    client = server.client
    session = client.session()
    model = client.model(session)
    for seq in range(1, 30, 2):
        client.result(client.forward_backward(model, seq, [seq, 2]))
        client.result(client.optim_step(model, seq + 1))
    accumulated = client.forward_backward(model, 31, [7, 7])
    sampler = client.result(
        client.post(
            "save_weights_for_sampler",
            {"model_id": model, "seq_id": 32, "sampling_session_seq_id": 0},
        )
    )["sampling_session_id"]
    sample = client.sample(sampler, 0, num_samples=2, prompt_logprobs=True)
    before = [client.result(promise) for promise in (accumulated, sample)]
    server.kill()
    server.start()
    after = [client.result(promise) for promise in (accumulated, sample)]
    step = client.result(client.optim_step(model, 33, 0.1))
    again = client.result(client.sample(sampler, 1, prompt_logprobs=True))
    heartbeat = client.post("session_heartbeat", {"session_id": session})

    reference = process(limits=OFTEN, port=None)
    other = reference.client.model()
    for seq in range(1, 30, 2):
        reference.client.forward_backward(other, seq, [seq, 2])
        reference.client.optim_step(other, seq + 1)
    reference.client.forward_backward(other, 31, [7, 7])
    undisturbed = reference.client.result(reference.client.optim_step(other, 32, 0.1))

    assert before == after
    assert undisturbed == step
    assert before[1]["prompt_logprobs"] == again["prompt_logprobs"]
    assert {} == heartbeat


def run_of(client, session, steps):
    """All kinds of operations of a run: (path, body) in order, without numbers."""
    model = f"{session}:train:0"
    for i in range(steps):
        yield "forward_backward", wire.to_json(batch(model, 0, [i, i + 1], [3]))
        if i % 5 == 4:
            cursed = batch(model, 0, [666])
            yield "forward_backward", wire.to_json(cursed)
            yield "optim_step", {"model_id": model, "adam_params": {"learning_rate": 9.0}}
            yield "forward_backward", wire.to_json(batch(model, 0, [i]))
        if i % 4 == 1:
            path, _, _, body = wire.encode_request(batch(model, 0, [i], forward_only=True), False)
            yield path, json.loads(body)
        yield "optim_step", {"model_id": model, "adam_params": {"learning_rate": 0.01}}
        if i % 6 == 3:
            yield "save_weights", {"model_id": model, "path": f"state-{i}"}
        if i % 6 == 5:
            path = f"tinker://{model}/weights/state-{i - 2}"
            yield "load_weights", {"model_id": model, "path": path, "optimizer": True}
        if i % 7 == 2:
            yield "save_weights_for_sampler", {"model_id": model, "sampling_session_seq_id": i}


def drive(client, steps, disturb=lambda: None):
    """Run all operations, a few at a time, resending after lost responses; returns the results."""
    session = patiently(client.session)
    promise = patiently(
        client.post,
        "create_model",
        {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": "tiny",
            "lora_config": {"rank": 4, "seed": 7},
        },
    )
    flying, results = [promise], []
    for seq, (path, body) in enumerate(run_of(client, session, steps), start=1):
        disturb()
        flying.append(patiently(client.post, path, {**body, "seq_id": seq}))
        if len(flying) > 4:
            results.append(patiently(client.result, flying.pop(0)))
    results += [patiently(client.result, left) for left in flying]
    return json.loads(json.dumps(results).replace(session, "SESSION"))


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3))])
def test_killed_at_random_moments_a_run_ends_the_same(process, seed):
    """Exactly once: the client only resends and waits."""
    chance = random.Random(seed)
    undisturbed = drive(process(limits=OFTEN).client, 40)
    server = process(limits=OFTEN)
    over = threading.Event()

    def killer():
        for _ in range(6):
            if not over.wait(chance.uniform(0.02, 0.3)):
                server.kill()
                server.start()

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        disturbed = drive(server.client, 40)
    finally:
        over.set()
        thread.join()

    assert undisturbed == disturbed


def test_a_seed_that_the_server_drew_is_drawn_once(process):
    """A model or sample without a seed is the same after a restart."""
    server = process(limits=OFTEN)
    client = server.client
    session = client.session()
    promise = client.post(
        "create_model", {"session_id": session, "model_seq_id": 0, "base_model": "tiny"}
    )
    model = client.result(promise)["model_id"]
    first = client.result(client.forward_backward(model, 1, [5]))
    sampler = client.sampler(session)
    sample = client.sample(sampler, 0, max_tokens=10)
    sampled = client.result(sample)
    server.kill()
    server.start()
    second = client.result(client.forward_backward(model, 2, [5]))

    assert first["metrics"] == second["metrics"]
    assert sampled == client.result(sample)


def test_a_deleted_checkpoint_is_not_brought_back_by_a_restart(process):
    """Only operations that rebuild the model run again."""
    server = process(limits={"poll_seconds": 0.5})
    client = server.client
    model = client.model()
    client.result(client.save(model, 1, "old"))
    client.result(client.post(
        "load_weights",
        {"model_id": model, "seq_id": 2, "path": f"tinker://{model}/weights/old"},
    ))  # fmt: skip
    client.send("DELETE", f"training_runs/{model}/checkpoints/weights/old")
    server.kill()
    server.start()
    step = client.result(client.optim_step(model, 3))

    assert "metrics" in step
    assert [] == client.get("checkpoints")["checkpoints"]


def test_the_journal_stays_bounded(process, tmp_path):
    """After a snapshot, earlier operations are not needed."""
    server = process(limits={**OFTEN, "grace_seconds": 0.0})
    client = server.client
    model = client.model()
    for seq in range(1, 100, 2):
        client.forward_backward(model, seq, list(range(2000)))
        client.result(client.optim_step(model, seq + 1))
    time.sleep(0.5)
    [folder] = (tmp_path / "home" / "servers").iterdir()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert size < 500_000  # where 50 bodies of 25 kB went in
    assert 1 == len(list((folder / "snapshots").iterdir()))


def test_sigterm_ends_it_at_once_even_under_way(process):
    """While a long poll is open and a computation is running."""
    server = process(limits={"poll_seconds": 30.0})
    client = server.client
    model = client.model()
    waiting = client.optim_step(model, 5)  # its predecessors never come
    poll = threading.Thread(target=client.send, args=("POST", "retrieve_future", waiting))
    poll.start()
    time.sleep(0.2)
    started = time.monotonic()
    server.process.terminate()
    server.end()
    poll.join()

    assert time.monotonic() - started < 2.0
    assert 0 == server.process.returncode
