"""A model that has memorized a poem: small enough for a test, with known answers."""

from __future__ import annotations

import tinkex
from tinkex import types

POEM = "The owl and the pussycat went to sea in a beautiful pea-green boat."


def train_poem(url):
    """Train it on the server at *url*: (tinker path of its sampler weights, id of its run)."""
    with tinkex.ServiceClient(base_url=url, api_key="tml-any") as service:
        training = service.create_lora_training_client(
            "tiny", rank=16, seed=5, user_metadata={"name": "the owl"}
        )
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
