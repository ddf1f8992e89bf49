"""Killed with -9 and restarted, the server has the same state, bit by bit."""

from __future__ import annotations

import json
import random
import sqlite3
import threading
import time
from contextlib import closing

import pytest

from tests.support.fake_engine import FakeEngine
from tests.support.processes import ServerProcess, free_port, patiently
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


# In one process: stopped in an orderly way, and started again on the same home and port.


@pytest.fixture
def again(serve, tmp_path):
    """Starts a server on the same home and port each time, each with a fresh engine."""
    port = free_port()

    def start(gate=None, **limits):
        return serve(home=tmp_path / "home", port=port, engine=FakeEngine(gate=gate), limits=limits)

    return start


def open_gate():
    gate = threading.Event()
    gate.set()
    return gate


def test_what_was_accepted_before_a_stop_runs_after_it(again):
    """What had ended is answered as before; the rest runs in its order, on the same state."""
    gate = open_gate()
    first = again(gate)
    client = first.client
    session = client.session()
    model = client.model(session)
    step = client.optim_step(model, 2)
    done = [client.result(client.forward_backward(model, 1, [3, 4])), client.result(step)]
    saved = client.post(
        "save_weights_for_sampler",
        {"model_id": model, "seq_id": 3, "sampling_session_seq_id": 0},
    )
    sampler = client.result(saved)["sampling_session_id"]
    early = client.sample(sampler, 0)
    sampled = client.result(early)
    gate.clear()
    waiting = [
        client.forward_backward(model, 4, [5, 6]),
        client.optim_step(model, 5),
        client.sample(sampler, 1, params={"seed": 7}),
    ]
    first.close()
    client = again().client
    rest = [client.result(promise) for promise in waiting]

    reference = client.model(session, number=1)
    client.result(client.forward_backward(reference, 1, [3, 4]))
    client.result(client.optim_step(reference, 2))
    client.result(client.forward_backward(reference, 3, [5, 6]))
    undisturbed = client.result(client.optim_step(reference, 4))

    assert [done[1], sampled] == [client.result(step), client.result(early)]
    assert undisturbed["metrics"] == rest[1]["metrics"]
    assert rest[2]["sequences"]
    assert "metrics" in client.result(client.optim_step(model, 6))


def change(path, statement):
    with closing(sqlite3.connect(path)) as database, database:
        assert database.execute(statement).rowcount == 1


@pytest.fixture
def with_a_sample_that_waits(again):
    """A stopped server that had accepted a sample, the client of the next one, the promise."""

    def stop(disturb):
        first = again()
        sampler = first.client.sampler()
        first.engine.gate.clear()
        promise = first.client.sample(sampler, 0)
        first.close()
        disturb()
        return again().client, promise, sampler

    return stop


def test_an_operation_that_cannot_be_read_is_skipped(with_a_sample_that_waits, tmp_path, caplog):
    """The others run all the same, and so does what is sent then."""

    def disturb():
        [journal] = (tmp_path / "home").glob("servers/*/journal*.sqlite")
        change(journal, "UPDATE operations SET body = x'00'")

    client, promise, sampler = with_a_sample_that_waits(disturb)
    status, _ = client.refused("retrieve_future", {"request_id": promise["request_id"]})

    assert 410 == status
    assert f"Operation {promise['request_id']} in the journal cannot be read" in caplog.text
    assert client.result(client.sample(sampler, 1))["sequences"]


def test_a_sample_whose_sampler_is_gone_fails(with_a_sample_that_waits, tmp_path):
    def disturb():
        [store] = (tmp_path / "home").glob("*.sqlite")
        change(store, "DELETE FROM samplers")

    client, promise, _ = with_a_sample_that_waits(disturb)

    assert "its session is gone; send it again" in client.result(promise)["error"]


@pytest.mark.parametrize("snapshot_bytes", [1, 2**20])
def test_numbers_that_were_used_stay_used(again, snapshot_bytes):
    """Of operations in a snapshot, and of those that run again although their results were fetched
    and forgotten: a resend must not run them a second time."""
    first = again(snapshot_bytes=snapshot_bytes, grace_seconds=0.0)
    client = first.client
    model = client.model()
    for seq in (1, 3):
        client.result(client.forward_backward(model, seq, [5]))
        client.result(client.optim_step(model, seq + 1))
    first.close()
    client = again(grace_seconds=0.0).client
    client.forward_backward(model, 1, [5])
    client.forward_backward(model, 3, [5])
    step = client.result(client.optim_step(model, 5))

    reference = client.model(number=1)
    for seq in (1, 3):
        client.result(client.forward_backward(reference, seq, [5]))
        client.result(client.optim_step(reference, seq + 1))
    assert step == client.result(client.optim_step(reference, 5))


def test_a_refused_operation_that_others_wait_for_fails_after_a_restart_too(again):
    """Its number is used up, so that what came behind it runs."""
    gate = open_gate()
    first = again(gate)
    client = first.client
    model = client.model()
    gate.clear()
    held = client.forward_backward(model, 1, [5])
    behind = client.optim_step(model, 3)
    wrong = {"model_id": model, "seq_id": 2, "adam_params": {"learning_rate": "fast"}}
    status, _ = client.refused("optim_step", wrong)
    first.close()
    client = again().client

    assert 400 == status
    assert client.result(held)["loss_fn_outputs"]
    assert "metrics" in client.result(behind)
    assert "metrics" in client.result(client.optim_step(model, 4))


def test_a_model_whose_session_has_ended_is_unloaded_after_its_last_operation(again):
    """What was accepted still runs; then the memory is free."""
    gate = open_gate()
    first = again(gate)
    client = first.client
    session = client.session()
    model = client.model(session)
    gate.clear()
    promise = client.forward_backward(model, 1, [5])
    client.post(f"sessions/{session}/finish", {"reason": {"type": "success"}})
    first.close()
    second = again()
    result = second.client.result(promise)
    deadline = time.monotonic() + 10
    while second.engine.models and time.monotonic() < deadline:
        time.sleep(0.01)

    assert result["loss_fn_outputs"]
    assert {} == second.engine.models


def test_bodies_too_large_for_the_memory_are_read_from_the_journal_when_they_run(again):
    gate = open_gate()
    first = again(gate)
    client = first.client
    model = client.model()
    gate.clear()
    promises = [client.forward_backward(model, 1, [5] * 50), client.optim_step(model, 2)]
    first.close()
    client = again(spool_bytes=20).client

    assert client.result(promises[0])["loss_fn_outputs"]
    assert "metrics" in client.result(promises[1])


def test_the_number_of_a_sampler_that_is_being_saved_stays_taken(again):
    """By the save that has not run yet, although there is no sampler of it."""
    gate = open_gate()
    first = again(gate)
    client = first.client
    session = client.session()
    model = client.model(session)
    gate.clear()
    client.forward_backward(model, 1, [5])
    saved = client.post(
        "save_weights_for_sampler", {"model_id": model, "seq_id": 2, "sampling_session_seq_id": 0}
    )
    first.close()
    gate = open_gate()
    gate.clear()
    client = again(gate).client
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    status, sentence = client.refused("create_sampling_session", body)
    gate.set()

    assert 400 == status
    assert "was used before for something else" in sentence
    assert client.result(saved)["sampling_session_id"]


def test_a_sample_outside_of_a_session_fails_after_a_restart(again):
    """It has no sampler that could come back; the client sends it again."""
    first = again()
    first.engine.gate.clear()
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    body = {"base_model": "tiny", "prompt": prompt, "sampling_params": {"max_tokens": 4}}
    promise = first.client.post("asample", body)
    first.close()

    assert "send it again" in again().client.result(promise)["error"]


def test_a_sample_that_had_ended_is_listed_for_the_one_poll(again):
    """A client that waits for all its samples at once sees it after the restart as before it."""
    first = again()
    sampler = first.client.sampler()
    promise = first.client.sample(sampler, 0)
    while first.client.send("POST", "retrieve_future", promise).status_code == 408:
        pass
    first.close()
    target = {"type": "sampling_session", "sampling_session_id": sampler}
    listed = again().client.post("retrieve_futures", {"target": target, "timeout": 0.3})

    assert promise["request_id"] in json.dumps(listed)


def test_a_session_that_is_asked_for_again_under_its_key_is_the_same_after_a_restart(again):
    """Also one that has ended meanwhile: it is not brought back."""
    keys = [{"X-Idempotency-Key": name} for name in ("a", "b")]
    first = again()
    before = [first.client.post("create_session", {}, headers=key) for key in keys]
    first.client.post(f"sessions/{before[1]['session_id']}/finish", {"reason": {"type": "success"}})
    first.close()
    client = again().client
    after = [client.post("create_session", {}, headers=key) for key in keys]

    assert before == after
    assert {} == client.post("session_heartbeat", {"session_id": after[0]["session_id"]})
    assert 410 == client.refused("session_heartbeat", {"session_id": after[1]["session_id"]})[0]


def test_a_save_that_was_done_just_before_the_end_is_not_refused_as_a_second_one(again, tmp_path):
    """The files and their row were there, the note that the operation has ended was not."""
    first = again()
    client = first.client
    model = client.model()
    promise = client.save(model, 1, "a")
    saved = client.result(promise)
    first.close()
    [journal] = (tmp_path / "home").glob("servers/*/journal*.sqlite")
    body = json.dumps({"model_id": model, "seq_id": 1, "path": "a"}).encode().hex()
    change(
        journal,
        f"UPDATE operations SET form = NULL, answer = NULL, body = x'{body}' WHERE seq = 1",
    )
    client = again().client

    assert saved["path"] == client.result(promise)["path"]
    assert 1 == len(client.get("checkpoints")["checkpoints"])


def test_what_had_failed_fails_again_and_is_not_computed(again):
    """Its failure is part of the model's state: the gradients behind it are incomplete."""
    first = again()
    client = first.client
    model = client.model()
    client.result(client.forward_backward(model, 1, [5]))
    promise = client.forward_backward(model, 2, [666])
    failed = client.result(promise)
    first.close()
    second = again()
    client = second.client
    step = client.result(client.optim_step(model, 3))

    assert "token 666 is cursed" in failed["error"]
    assert failed == client.result(promise)
    assert "gradients are incomplete" in step["error"]
    assert 1 == sum(call[0] == "forward_backward" for call in second.engine.log)


def test_a_sample_that_had_ended_is_still_answered_when_its_sampler_is_gone(again, tmp_path):
    first = again()
    sampler = first.client.sampler()
    promise = first.client.sample(sampler, 0)
    before = first.client.result(promise)
    first.close()
    [store] = (tmp_path / "home").glob("*.sqlite")
    change(store, "DELETE FROM samplers")

    assert before == again().client.result(promise)


def test_a_model_is_described_before_anything_has_run_on_it_again(again):
    """With what the engine chose when it was made; its base model is loaded for that."""
    first = again(snapshot_bytes=1)
    model = first.client.model()
    first.client.result(first.client.optim_step(model, 1))
    before = first.client.post("get_info", {"model_id": model})
    first.close()

    assert before == again().client.post("get_info", {"model_id": model})
    assert "FakeForCausalLM" == before["model_data"]["arch"]
    assert before["train_unembed"] is True
