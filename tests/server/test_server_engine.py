"""The server with the real engine."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.processes import ServerProcess
from tests.support.wire_client import WireClient, batch
from tinkex import types, wire
from tinkex.server.app import LocalServer

TEXTS = [list(range(5, 40)), list(range(50, 70)), [7, 8, 9, 10], list(range(100, 130))]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    server = LocalServer(tmp_path_factory.mktemp("home"))
    with server:
        client = WireClient(server.url)
        yield client
        client.http.close()


def send(client, request, protobuf=True):
    path, kind, _, body = wire.encode_request(request, protobuf)
    return client.send_batch(path, kind, body)


def train(client, model, *batches, first=1):
    """Train with one step per batch, pipelined; returns the losses."""
    promises, seq = [], first
    for sequences in batches:
        promises.append(send(client, batch(model, seq, *sequences)))
        client.optim_step(model, seq + 1, 1e-2)
        seq += 2
    results = [client.result(p, protobuf=types.ForwardBackwardOutput) for p in promises]
    return [result.metrics["loss:sum"] for result in results]


def logprobs_of(client, model, seq):
    result = client.result(
        send(client, batch(model, seq, *TEXTS, forward_only=True)),
        protobuf=types.ForwardBackwardOutput,
    )
    return np.concatenate([out["logprobs"].to_numpy() for out in result.loss_fn_outputs])


def test_training_lowers_the_loss(client):
    model = client.model()
    losses = train(client, model, *[TEXTS] * 12)

    assert losses[-1] < 0.8 * losses[0]


def test_a_batch_in_chunks_is_the_same_training(client):
    """Losses are sums and gradients add up; the chunks arrive out of order."""
    whole, chunked = client.model(), client.model()
    train(client, whole, TEXTS)
    for seq in (2, 3, 4, 1):
        send(client, batch(chunked, seq, TEXTS[seq - 1]))
    client.optim_step(chunked, 5, 1e-2)

    np.testing.assert_allclose(
        logprobs_of(client, whole, 3), logprobs_of(client, chunked, 6), rtol=0, atol=1e-4
    )


def test_what_is_sampled_has_the_probability_that_forward_gives_it(client):
    """Sampler weights are the trained weights, and sampling computes what training does."""
    session = client.session()
    model = client.model(session)
    train(client, model, *[TEXTS] * 3)
    promise = client.post(
        "save_weights_for_sampler", {"model_id": model, "seq_id": 7, "sampling_session_seq_id": 0}
    )
    sampler = client.result(promise)["sampling_session_id"]
    prompt = TEXTS[0][:10]
    sample = client.result(
        client.sample(sampler, 0, prompt, max_tokens=20), protobuf=types.SampleResponse
    )
    tokens = [*prompt, *sample.sequences[0].tokens]
    datum = types.Datum(
        types.ModelInput.from_ints(tokens[:-1]), {"target_tokens": np.array(tokens[1:])}
    )
    request = types.ForwardBackwardRequest(model, 8, [datum], "cross_entropy", forward_only=True)
    result = client.result(send(client, request), protobuf=types.ForwardBackwardOutput)
    expected = result.loss_fn_outputs[0]["logprobs"].to_numpy()[len(prompt) - 1 :]

    np.testing.assert_allclose(expected, sample.sequences[0].logprobs_np, atol=1e-4)


def test_a_saved_state_goes_on_where_it_was(client):
    """With the optimizer state, bit by bit."""
    model = client.model()
    train(client, model, *[TEXTS] * 3)
    path = client.result(client.save(model, 7, "state"))["path"]
    on = train(client, model, *[TEXTS] * 3, first=8)
    session = client.session()
    body = {"session_id": session, "model_seq_id": 0, "path": path, "optimizer": True}
    loaded = client.result(client.post("load_weights", body))["model_id"]
    again = train(client, loaded, *[TEXTS] * 3)

    assert on == again
    np.testing.assert_array_equal(logprobs_of(client, model, 14), logprobs_of(client, loaded, 7))


def test_what_the_engine_refuses_is_a_failure_of_the_users(client):
    """The model continues."""
    model = client.model()
    outside = client.result(client.forward_backward(model, 1, [10**6]))
    unknown = client.result(client.forward_backward(model, 2, [1], loss_fn="no_such_loss"))
    step = client.result(client.optim_step(model, 3))
    client.result(client.forward_backward(model, 4, [1]))

    assert ["user"] * 3 == [result["category"] for result in (outside, unknown, step)]
    assert "1000000" in outside["error"]
    assert "no_such_loss" in unknown["error"]
    assert "metrics" in client.result(client.optim_step(model, 5))


def test_a_model_directory_that_is_none_is_told_in_the_failure(client, tmp_path):
    promise = client.post(
        "create_model",
        {"session_id": client.session(), "model_seq_id": 0, "base_model": str(tmp_path)},
    )
    failed = client.result(promise)

    assert "user" == failed["category"]
    assert str(tmp_path) in failed["error"]


def test_killed_and_restarted_the_real_engine_goes_on_to_the_bit(tmp_path):
    """Weights, optimizer state and gradients, from a snapshot and the journal after it."""
    limits = {"snapshot_bytes": 8000, "poll_seconds": 1.0}
    server = ServerProcess(tmp_path / "home", real=True, limits=limits)
    try:
        server.start()
        undisturbed, killed = server.client.model(), server.client.model()
        train(server.client, undisturbed, *[TEXTS] * 6)
        train(server.client, killed, *[TEXTS] * 3)
        server.client.result(send(server.client, batch(killed, 7, *TEXTS)))
        server.kill()
        server.start()
        server.client.optim_step(killed, 8, 1e-2)
        train(server.client, killed, *[TEXTS] * 2, first=9)
        left, right = (logprobs_of(server.client, m, 13) for m in (undisturbed, killed))
    finally:
        server.close()

    np.testing.assert_array_equal(left, right)
