"""The server over real HTTP with a fake engine: training, sampling, saving, polling."""

from __future__ import annotations

import numpy as np
import pytest
import requests

from tests.support.wire_client import batch
from tinkex import types, wire


def test_a_model_is_created_trained_saved_and_sampled_from(client):
    """The main path of the protocol, in JSON."""
    session = client.session()
    model = client.model(session)
    steps = [client.forward_backward(model, 1, [1, 2, 3]), client.optim_step(model, 2)]
    saved = client.save_for_sampler(model, 3, "final")
    [loss, step, path] = [client.result(promise) for promise in [*steps, saved]]
    sampler = client.sampler(session, model_path=path["path"])
    sample = client.result(client.sample(sampler, 0, num_samples=2))

    assert f"{session}:train:0" == model
    assert loss["metrics"]["loss:sum"] > 0
    assert step["metrics"]["weight"] != 0
    assert f"tinker://{model}/sampler_weights/final" == path["path"]
    assert 2 == len(sample["sequences"])
    assert "length" == sample["sequences"][0]["stop_reason"]
    assert f"{session}:sample:0" == sampler


def test_protobuf_and_json_give_the_same(client):
    """The request's dialect is its Content-Type, the result's is Accept."""
    model = client.model()
    requests = [batch(model, seq, [5, 6, 7], [8, 9], forward_only=True) for seq in (1, 2)]
    path, kind, _, body = wire.encode_request(requests[0], protobuf=True)
    in_protobuf = client.result(
        client.send_batch(path, kind, body), protobuf=types.ForwardBackwardOutput
    )
    path, kind, _, body = wire.encode_request(requests[1], protobuf=False)
    in_json = client.result(client.send_batch(path, kind, body))

    assert in_json["metrics"] == in_protobuf.metrics
    for left, right in zip(in_json["loss_fn_outputs"], in_protobuf.loss_fn_outputs):
        np.testing.assert_array_equal(
            np.float32(left["logprobs"]["data"]), right["logprobs"].to_numpy()
        )


def test_health_is_told_in_the_words_of_the_protocol(client):
    answer = client.send("GET", "healthz")

    assert {"status": "ok"} == answer.json()
    assert answer.headers["X-Tinkex-Version"]


@pytest.mark.parametrize("name", ["healthz", "readyz"])
def test_health_is_also_where_orchestrators_look_for_it(served, name):
    answer = requests.get(f"{served.server.url}/{name}", timeout=30)

    assert (200, served.client.get(name)) == (answer.status_code, answer.json())
