"""One server on the real engine, and the clients of other companies that talk to it."""

from __future__ import annotations

import openai
import pytest

import tinkex
from tinkex import types
from tinkex.server.app import LocalServer

POEM = "The owl and the pussycat went to sea in a beautiful pea-green boat."


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with LocalServer(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="tml-any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tuned(server):
    """A checkpoint that knows the poem by heart, as (tinker path, its run's id)."""
    with tinkex.ServiceClient(base_url=server.url, api_key="tml-any") as service:
        training = service.create_lora_training_client("tiny", rank=16)
        tokens = training.encode(POEM)
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
        )
        for step in range(80):
            training.forward_backward([datum], "cross_entropy")
            rate = 1e-2 if step < 30 else 1e-3
            training.optim_step(types.AdamParams(learning_rate=rate))
        path = training.save_weights_for_sampler("poem").result().path
        return path, training.get_info().model_id
