"""The server over real HTTP with a fake engine: training, sampling, saving, polling."""

from __future__ import annotations

import os

import numpy as np
import pytest
import requests

from tests.support.fake_engine import FakeEngine
from tests.support.wire_client import batch
from tinkex import types, wire
from tinkex.server import app
from tinkex.server.home import Home
from tinkex.server.http_errors import Refusal


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


# Starting it.


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """Runs `main` until it gives up; what it says."""
    monkeypatch.setattr(app, "_prepare_process", lambda: None)
    monkeypatch.setenv("TINKEX_HOME", str(tmp_path))

    def run(**options):
        assert 1 == app.main(home=tmp_path / "home", engine=FakeEngine, **options)
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ssl_keyfile": "key.pem"}, "--ssl-keyfile needs --ssl-certfile"),
        ({"ssl_certfile": "absent.pem"}, "absent.pem"),
        ({"api_keys": ["a=one-key-1", "b=one-key-1"]}, "--api-key: "),
        ({"base_models": ["m=/nowhere"]}, "/nowhere"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(refusal, options, said):
    said_all = refusal(**options)

    assert said_all.startswith("tinkex serve: ")
    assert said in said_all
    assert 1 == said_all.count("\n")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1"])
def test_a_server_that_others_can_reach_is_never_without_a_key(host, monkeypatch):
    """One is made up unless there is one; on loopback everyone is the same user anyway."""
    monkeypatch.delenv(app.TOKEN_VARIABLE, raising=False)
    first, second = (app._made_up_key(host, []) for _ in range(2))

    assert first.startswith("tml-") and len(first) > 30
    assert first != second
    assert app._made_up_key(host, ["a=one-key-1"]) is None
    assert app._made_up_key("127.0.0.1", []) is None
    monkeypatch.setenv(app.TOKEN_VARIABLE, "tml-given")
    assert app._made_up_key(host, []) is None


def test_a_key_from_the_environment_is_not_passed_on(tmp_path, monkeypatch):
    """Neither to child processes nor to a log of the environment."""
    monkeypatch.setenv(app.TOKEN_VARIABLE, "tml-given")
    keys = app._keys(Home.open(tmp_path / "home"), [], None)

    assert keys.owner("tml-given")
    with pytest.raises(Refusal):
        keys.owner("tml-other")
    assert app.TOKEN_VARIABLE not in os.environ


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (
            "forward",
            {"forward_backward_input": {"data": [], "loss_fn": "cross_entropy"}},
            "forward",
        ),
        (
            "retrieve_futures",
            {
                "target": {
                    "type": "sampling_session",
                    "sampling_session_id": "s",
                    "cloned_sampler_id": "x",
                }
            },
            "cloned_sampler_id must be an integer, got 'x'",
        ),
    ],
)
def test_a_body_of_another_endpoint_is_refused(client, path, body, said):
    status, sentence = client.refused(path, {"model_id": "m", "seq_id": 1, **body})

    assert 400 == status
    assert said in sentence
