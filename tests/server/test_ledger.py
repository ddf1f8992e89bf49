"""Parts of the ledger: without HTTP first, then what a client sees of their failures."""

from __future__ import annotations

import sqlite3
import time
from concurrent.futures import Future

from hypothesis import given
from hypothesis import strategies as st

from tests.support.processes import free_port
from tests.support.wire_client import batch
from tinkex import types, wire
from tinkex.server.ledger.ranges import Numbers
from tinkex.server.results import fingerprint


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=200))
def test_numbers_are_a_set(changes):
    """Stored as ranges, it behaves like a set."""
    numbers, reference = Numbers(), set()
    for add, number in changes:
        if add:
            numbers.add(number)
            reference.add(number)
        else:
            numbers.discard(number)
            reference.discard(number)

    assert reference == {number for number in range(-1, 42) if number in numbers}


def test_numbers_in_order_take_no_space():
    """A run of a million operations is one range."""
    numbers = Numbers()
    for number in [*range(0, 1000, 2), *range(1, 1000, 2)]:
        numbers.add(number)

    assert ([0], [999]) == (numbers._starts, numbers._ends)


def test_a_fingerprint_is_of_what_is_said():
    """It depends on all values of the request, but not on its encoding."""
    request = batch("m", 1, [1, 2], [3])
    _, kind, _, body = wire.encode_request(request, protobuf=True)
    written = wire.decode_request(kind, body)
    others = [
        batch("m", 1, [1, 2], [4]),
        batch("m", 2, [1, 2], [3]),
        batch("m", 1, [1], [2, 3]),
        batch("m", 1, [1, 2], [3], loss_fn="ppo"),
        batch("m", 1, [1, 2], [3], forward_only=True),
        types.OptimStepRequest("m", 1),
    ]

    assert fingerprint(request) == fingerprint(written)
    assert 7 == len({fingerprint(each) for each in [request, *others]})


# What the ledger does when something fails in the middle, over HTTP.


def until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def fail_once(monkeypatch, target, name):
    """The next call of a method fails, as on a full disk; those after it work."""
    method = getattr(target, name)

    def fail(*arguments, **named):
        monkeypatch.setattr(target, name, method)
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(target, name, fail)


def test_the_number_of_a_sampler_that_could_not_be_stored_is_free(served, monkeypatch):
    """For another sampler, too: the one that failed never existed."""
    client = served.client
    session = client.session()
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    fail_once(monkeypatch, served.server.ledger.shared.store, "add_sampler")
    answer = client.send("POST", "create_sampling_session", body)
    other = {**body, "base_model": "other"}

    assert answer.status_code >= 500
    sampler = client.post("create_sampling_session", other)["sampling_session_id"]
    assert client.result(client.sample(sampler, 0))["sequences"]


def test_a_repeated_sampler_that_could_not_be_stored_again_keeps_its_number(served, monkeypatch):
    """It was created by the first request."""
    client = served.client
    session = client.session()
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    sampler = client.post("create_sampling_session", body)["sampling_session_id"]
    fail_once(monkeypatch, served.server.ledger.shared.store, "add_sampler")
    client.send("POST", "create_sampling_session", body)
    status, _ = client.refused("create_sampling_session", {**body, "base_model": "other"})

    assert 400 == status
    assert client.result(client.sample(sampler, 0))["sequences"]


def test_the_number_of_a_sample_that_could_not_be_noted_is_free(serve, monkeypatch):
    """A resend runs it; otherwise its client would wait for a result that nothing computes."""
    served = serve(port=free_port())
    client = served.client
    sampler = client.sampler()
    journal = served.server.ledger.entries._journal
    full = Future()
    full.set_exception(sqlite3.OperationalError("database or disk is full"))
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    body = {"sampling_session_id": sampler, "seq_id": 0, "prompt": prompt}
    with monkeypatch.context() as patch:
        patch.setattr(journal, "accept", lambda *arguments, **named: full)
        answer = client.send("POST", "asample", {**body, "sampling_params": {"max_tokens": 2}})

    assert 503 == answer.status_code
    assert client.result(client.sample(sampler, 0))["sequences"]


def test_samples_of_a_session_that_ends_are_cancelled(served):
    """They would take the places of others' samples, for no one."""
    client = served.client
    session = client.session()
    sampler = client.sampler(session)
    served.engine.gate.clear()
    client.sample(sampler, 0)
    until(lambda: served.engine.has_samples)
    client.post(f"sessions/{session}/finish", {"reason": {"type": "success"}})
    served.engine.gate.set()

    until(lambda: not served.engine.has_samples)
    assert client.send(
        "POST", "join_sampling_session", {"sampling_session_id": sampler}
    ).status_code in (404, 410)


def test_a_creation_that_is_sent_again_after_its_result_was_forgotten_creates_nothing(serve):
    served = serve(limits={"grace_seconds": 0.0})
    client = served.client
    session = client.session()
    model = client.model(session)
    client.model(session, number=1)  # with its fetch, the first result is forgotten
    body = {"session_id": session, "model_seq_id": 0, "base_model": "tiny"}
    again = client.post("create_model", {**body, "lora_config": {"rank": 4, "seed": 1}})

    assert model == again["model_id"]
    assert 2 == sum(call[0] == "create" for call in served.engine.log)


def test_of_more_results_than_are_kept_the_oldest_go(serve):
    """A client that never fetches must not fill the memory; what came last is still there."""
    served = serve(limits={"result_bytes": 300, "reap_seconds": 0.02})
    client, records = served.client, served.server.ledger.entries
    model = client.model()
    promises = [client.optim_step(model, seq) for seq in range(1, 40)]
    client.result(promises[-1])
    until(lambda: records.get(promises[0]["request_id"]) is None)

    assert 410 == client.refused("retrieve_future", promises[0])[0]
    assert "metrics" in client.result(promises[-2])


def test_a_number_of_a_model_is_not_taken_for_a_copy(client):
    """Nor the other way round: both name a run."""
    session = client.session()
    model = client.model(session)
    path = client.result(client.save(model, 1, "a"))["path"]
    body = {"source_path": path, "session_id": session, "model_seq_id": 0}
    status, sentence = client.refused("copy_weights", body)
    copied = client.post("copy_weights", {**body, "model_seq_id": 1})

    assert 400 == status
    assert f"model_seq_id 0 of session {session} was used before; use the next" in sentence
    assert copied == client.post("copy_weights", {**body, "model_seq_id": 1})
    other = {**body, "source_path": f"{path}-2", "model_seq_id": 1}
    assert "was used before" in client.refused("copy_weights", other)[1]
