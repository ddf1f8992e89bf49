"""Sampling over HTTP: streams, polls for a whole session, clones, cancelling."""

from __future__ import annotations

import json
import threading
import time

from tests.support.fake_engine import FakeEngine
from tinkex import types


def events_of(client, sampler, **fields):
    """The events of a stream, and the last data line."""
    body = {
        "sampling_session_id": sampler,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
        "sampling_params": {"max_tokens": 3, "seed": 1},
        **fields,
    }
    answer = client.send("POST", "stream_sample", body, stream=True)
    assert 200 == answer.status_code, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.iter_lines(decode_unicode=True) if line]
    return lines


def test_a_stream_tells_every_token_as_it_comes(client):
    """It is the same sample as without streaming."""
    sampler = client.sampler()
    lines = events_of(client, sampler, num_samples=2)
    whole = client.result(client.sample(sampler, 0, (1, 2), 2, max_tokens=3, params={"seed": 1}))
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    tokens = [[e["token"] for e in events if e["index"] == i and "token" in e] for i in (0, 1)]

    assert "data: [DONE]" == lines[-1]
    assert [sequence["tokens"] for sequence in whole["sequences"]] == tokens
    assert [
        {"index": 0, "stop_reason": "length"},
        {"index": 1, "stop_reason": "length"},
    ] == events[-2:]
    assert all({"index", "token", "logprob"} == set(e) for e in events[:-2])


def test_a_stream_that_fails_says_so(client):
    sampler = client.sampler()
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [99999]}]}
    lines = events_of(client, sampler, prompt=prompt)

    assert "event: error" == lines[0]
    assert "user" == json.loads(lines[1].removeprefix("data: "))["category"]


def test_a_stream_that_nobody_reads_any_more_is_taken_back(serve):
    """Its rows in the batch become available to others."""
    gate = threading.Event()
    served = serve(engine=FakeEngine(gate=gate))
    sampler = served.client.sampler()
    body = {
        "sampling_session_id": sampler,
        "prompt": {"chunks": []},
        "sampling_params": {"max_tokens": 100_000},
    }
    answer = served.client.send("POST", "stream_sample", body, stream=True)
    deadline = time.monotonic() + 5
    while not served.engine.has_samples and time.monotonic() < deadline:
        time.sleep(0.01)
    answer.close()
    served.client.http.close()
    while served.engine.has_samples and time.monotonic() < deadline:
        time.sleep(0.01)

    assert not served.engine.has_samples


def completions(client, sampler, clone=0, cursor=0, **fields):
    target = {
        "type": "sampling_session",
        "sampling_session_id": sampler,
        "cloned_sampler_id": clone,
    }
    return client.post(
        "retrieve_futures",
        {"target": target, "prev_cursor": cursor, "retrieved_request_ids": [], **fields},
    )


def test_one_poll_tells_of_all_samples_of_a_session(client):
    """Samples that ended after the cursor, with their size; each is reported once."""
    sampler = client.sampler()
    promises = [client.sample(sampler, seq) for seq in range(20)]
    told, cursor, deadline = [], 0, time.monotonic() + 10
    while len(told) < 20 and time.monotonic() < deadline:
        answer = completions(client, sampler, cursor=cursor)
        told += answer["completions"]
        cursor = answer["cursor"]
    results = [client.result(entry["request_id"]) for entry in told]

    assert {promise["request_id"] for promise in promises} == {e["request_id"] for e in told}
    assert 20 == len(told)
    assert {"finished"} == {entry["state"] for entry in told}
    assert all(entry["response_payload_uncompressed_size"] > 0 for entry in told)
    assert all(len(result["sequences"]) == 1 for result in results)


def test_a_lost_answer_is_told_again(client):
    """A client sends the last cursor that it received."""
    sampler = client.sampler()
    client.result(client.sample(sampler, 0))
    first, second = completions(client, sampler), completions(client, sampler)

    assert first == second
    assert 1 == len(first["completions"])


def test_acknowledged_results_are_forgotten(client):
    """timeout 0 only acknowledges."""
    sampler = client.sampler()
    promise = client.sample(sampler, 0)
    client.result(promise)
    answer = completions(client, sampler, timeout=0, retrieved_request_ids=[promise["request_id"]])

    assert [] == answer["completions"]
    assert 410 == client.refused("retrieve_future", promise)[0]
    assert promise["request_id"] == client.sample(sampler, 0)["request_id"]  # not run again


def test_a_poll_of_a_session_waits_for_the_next(serve):
    """A long poll returns when a sample ends."""
    gate = threading.Event()
    served = serve(engine=FakeEngine(gate=gate), limits={"poll_seconds": 20.0})
    client = served.client
    sampler = client.sampler()
    client.sample(sampler, 0)
    threading.Timer(0.2, gate.set).start()
    started = time.monotonic()
    answer = completions(client, sampler)
    waited = time.monotonic() - started

    assert 1 == len(answer["completions"])
    assert 0.1 < waited < 5


def test_clones_hear_of_their_own_samples_only(client):
    """Each clone counts from its own multiple of a billion."""
    sampler = client.sampler()
    numbers = [
        client.post("join_sampling_session", {"sampling_session_id": sampler})["client_counter"]
        for _ in range(2)
    ]
    for clone in (0, *numbers):
        client.result(client.sample(sampler, clone * 10**9 + 5))
    heard = [completions(client, sampler, clone)["completions"] for clone in (0, *numbers)]

    assert [1, 2] == numbers
    assert [1, 1, 1] == [len(entries) for entries in heard]
    assert 3 == len({entries[0]["request_id"] for entries in heard})


def test_a_cancelled_sample_ends(serve):
    gate = threading.Event()
    served = serve(engine=FakeEngine(gate=gate))
    client = served.client
    promise = client.sample(client.sampler(), 0)
    client.post("cancel_future", {"request_id": promise["request_id"]})
    result = client.result(promise)
    gate.set()

    assert "cancelled" in result["error"]


def test_failed_samples_are_told_as_failed(client):
    sampler = client.sampler()
    failed = client.sample(sampler, 0, tokens=(5000,))
    result = client.result(failed)

    assert "user" == result["category"]
    assert "failed" == completions(client, sampler)["completions"][0]["state"]


def test_sampling_without_a_session_still_works(client):
    """The oldest form: base_model or model_path in the request itself."""
    body = {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]},
        "sampling_params": {"max_tokens": 2},
        "base_model": "tiny",
    }
    first, second = client.post("asample", body), client.post("asample", body)

    assert first["request_id"] != second["request_id"]
    assert 1 == len(client.result(first)["sequences"])


def test_large_results_are_announced_first(serve):
    """A client with bounded memory frees space before it polls again."""
    served = serve(limits={"metadata_bytes": 100})
    client = served.client
    promise = client.sample(client.sampler(), 0, num_samples=20, max_tokens=20)
    whole = client.result(promise, protobuf=types.SampleResponse)
    asked = client.post("retrieve_future", {**promise, "allow_metadata_only": True})

    assert "complete_metadata" == asked["status"]
    assert asked["response_payload_size"] > 100
    assert 20 == len(whole.sequences)


def test_a_deleted_checkpoint_is_named_by_who_samples_from_it(client):
    """Weights that cannot be read are not replaced by others."""
    model = client.model()
    path = client.result(client.save_for_sampler(model, 1, "gone"))["path"]
    sampler = client.sampler(model_path=path)
    client.send("DELETE", f"training_runs/{model}/checkpoints/sampler_weights/gone")
    result = client.result(client.sample(sampler, 0))

    assert path in result["error"]
    assert "deleted" in result["error"]


def test_idle_samplers_are_closed(serve):
    """A loop that saves and samples for a day needs no more memory than for a minute."""
    served = serve(limits={"open_samplers": 2})
    client = served.client
    session = client.session()
    model = client.model(session)
    for number in range(5):
        promise = client.post(
            "save_weights_for_sampler",
            {"model_id": model, "seq_id": number + 1, "sampling_session_seq_id": number},
        )
        sampler = client.result(promise)["sampling_session_id"]
        client.result(client.sample(sampler, 0))
    first = client.result(client.sample(f"{session}:sample:0", 1))
    # Closing comes after the answer; what the compute thread does next comes after the closing.
    client.result(client.optim_step(model, 6))

    assert 2 == len(served.engine.samplers)
    assert "sequences" in first


def test_many_samples_at_once_all_come_back(client):
    """No number is lost or mixed up."""
    sampler = client.sampler()
    promises = [client.sample(sampler, seq, params={"seed": seq}) for seq in range(300)]
    first = [client.result(promise)["sequences"][0]["tokens"] for promise in promises]
    second = [
        client.result(client.sample(sampler, 1000 + seq, params={"seed": seq}))["sequences"][0]
        for seq in (0, 150, 299)
    ]

    assert [first[0], first[150], first[299]] == [sequence["tokens"] for sequence in second]
