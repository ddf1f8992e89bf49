"""FakeService for training on sampled answers: it samples, and supports policy losses."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np

from tests.support import fake_service
from tinkex import types

#: Factor on gradients, since its optimizer does not normalize them and learning rates are at most
#: 1.
SPEED = 150


class FakeService(fake_service.FakeService):
    """
    Attributes:
        losses: name and settings of the loss of each forward_backward.
        sampled: requests, as (prompt, num_samples, sampling_params).
    """

    def __init__(self, on_operation=lambda name: None):
        super().__init__(on_operation)
        self.losses, self.sampled = [], []

    def create_lora_training_client(self, base_model, adapter=None, **settings):
        return self._of(super().create_lora_training_client(base_model, adapter, **settings))

    def create_training_client_from_state_with_optimizer(self, path):
        return self._of(super().create_training_client_from_state_with_optimizer(path))

    def _of(self, training):
        return FakeTraining(self, training.number, training.logits, training.momentum)

    def create_sampling_client(self, model_path=None, base_model=None):
        logits = np.zeros(258) if model_path is None else self.checkpoints[model_path][0]
        return FakeSampling(self, logits)


class FakeTraining(fake_service.FakeTraining):
    def forward_backward(self, data, loss_fn, loss_fn_config=None):
        """The gradient on policy: that of cross-entropy weighted by the advantages, times SPEED."""
        self.service.losses.append((loss_fn, loss_fn_config))
        if loss_fn == "cross_entropy":
            return super().forward_backward(data, loss_fn)
        weighted = [
            types.Datum(
                d.model_input,
                {
                    "target_tokens": d.loss_fn_inputs["target_tokens"],
                    "weights": d.loss_fn_inputs["advantages"].to_numpy() * np.float32(SPEED),
                },
            )
            for d in data
        ]
        return super().forward_backward(weighted, "cross_entropy")

    def save_weights_and_get_sampling_client(self):
        future = Future()
        future.set_result(self.save_weights_and_get_sampling_client_sync())
        return future

    def save_weights_and_get_sampling_client_sync(self):
        return FakeSampling(self.service, self.logits.copy())


class FakeSampling(fake_service.FakeSampling):
    """Draws each token from the softmax of the logits; the same for the same seed."""

    def sample(self, prompt, num_samples=1, sampling_params=None):
        self.service.sampled.append((prompt.to_ints(), num_samples, sampling_params))
        logprobs = self.logits - np.log(np.exp(self.logits).sum())
        heat = max(sampling_params.temperature, 1e-3)
        p = np.exp((logprobs - logprobs.max()) / heat)
        rng = np.random.default_rng(sampling_params.seed)
        sequences = []
        for _ in range(num_samples):
            tokens = rng.choice(258, sampling_params.max_tokens, p=p / p.sum())
            sequences.append(types.SampledSequence(tokens, logprobs[tokens], "length"))
        future = Future()
        future.set_result(types.SampleResponse(sequences))
        return future

    def compute_logprobs(self, prompt):
        logprobs = self.logits - np.log(np.exp(self.logits).sum())
        future = Future()
        future.set_result([None, *logprobs[prompt.to_ints()[1:]].tolist()])
        return future
