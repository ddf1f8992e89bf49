"""
A ServiceClient that really trains, in this process: a unigram model.

Its logits are one number per token, independent of the context, and its optimizer is momentum. So
the loss falls, order matters, and a checkpoint without optimizer state is noticed.
"""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np

from tinkex import types


class ByteTokenizer:
    """One token per byte; 256 begins a text, 257 ends it."""

    bos_token_id, eos_token_id = 256, 257
    chat_template = None

    def encode(self, text, add_special_tokens=True):
        return [*[256] * add_special_tokens, *text.encode()]

    def decode(self, tokens, skip_special_tokens=False):
        return bytes(t for t in tokens if t < 256).decode(errors="replace")


class FakeService:
    """
    Args:
        on_operation: called with the name of each submitted operation.
    """

    base_url = "http://fake"

    def __init__(self, on_operation=lambda name: None):
        self.checkpoints = {}
        self.created, self.prompts = [], []
        self.deleted, self.steps = [], []
        self.on_operation = on_operation
        self.reported = []  # (run, points) of each report of metrics
        self.said = []  # samples in these reports
        self.hangs = False  # stop answering

    def create_lora_training_client(self, base_model, adapter=None, **settings):
        if adapter is not None:
            settings["adapter"] = adapter
        self.created.append((base_model, settings))
        return FakeTraining(self, len(self.created), np.zeros(258), np.zeros(258))

    def create_training_client_from_state_with_optimizer(self, path):
        self.created.append((path, {}))
        logits, momentum = self.checkpoints[path]
        return FakeTraining(self, len(self.created), logits.copy(), momentum.copy())

    def create_training_client_from_state(self, path):
        self.created.append((path, {"weights_only": True}))
        logits, _ = self.checkpoints[path]
        return FakeTraining(self, len(self.created), logits.copy(), np.zeros(258))

    def create_sampling_client(self, model_path=None, base_model=None):
        logits = np.zeros(258) if model_path is None else self.checkpoints[model_path][0]
        return FakeSampling(self, logits)

    def create_rest_client(self):
        return self

    def report_run_metrics(self, run_id, points, samples=()):
        self.reported.append((run_id, points))
        self.said += samples

    def get_weights_info_by_tinker_path(self, path):
        return types.WeightsInfoResponse("fake", is_lora=True, lora_rank=7)

    def delete_checkpoint_from_tinker_path(self, path):
        self.deleted.append(path)
        del self.checkpoints[path]

    def download_checkpoint(self, path, output_dir, force=False):
        output_dir.mkdir(exist_ok=force)
        np.save(output_dir / "adapter_model.npy", self.checkpoints[path][0])
        return output_dir

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()


class FakeTraining:
    def __init__(self, service, number, logits, momentum):
        self.service, self.number = service, number
        self.model_id = f"fake:train:{number}"
        self.logits, self.momentum, self.gradient = logits, momentum, np.zeros(258)
        self.is_closed = False

    def get_tokenizer(self):
        return ByteTokenizer()

    def get_info(self):
        return types.GetInfoResponse(self.model_id, train_unembed=True)

    def forward(self, data, loss_fn):
        return self._answer("forward", lambda: self._output(data))

    def forward_backward_custom(self, data, loss_fn, framework):
        outputs = self._output(data).loss_fn_outputs
        gradients = loss_fn(data, [output["logprobs"].to_numpy() for output in outputs])[2]
        weighted = [
            types.Datum(d.model_input, {**d.loss_fn_inputs, "weights": types.TensorData(-g)})
            for d, g in zip(data, gradients)
        ]
        return self._answer("forward_backward", lambda: self._accumulate(weighted))

    def forward_backward(self, data, loss_fn):
        return self._answer("forward_backward", lambda: self._accumulate(data))

    def optim_step(self, params):
        self.service.steps.append(params)
        return self._answer("optim_step", lambda: self._step(params.learning_rate))

    def save_state(self, name):
        return self._answer("save_state", lambda: self._save("weights", name))

    def save_weights_for_sampler(self, name):
        return self._answer("save_weights", lambda: self._save("sampler_weights", name))

    def load_state(self, path):
        self.logits, _ = (part.copy() for part in self.service.checkpoints[path])
        return self._answer("load_state", lambda: None)

    def save_weights_and_get_sampling_client(self):
        future = Future()
        future.set_result(FakeSampling(self.service, self.logits.copy()))
        return future

    def save_weights_and_get_sampling_client_sync(self):
        return FakeSampling(self.service, self.logits.copy())

    def close(self, *, cancel=False, timeout=None):
        self.is_closed = True

    def _answer(self, name, operation):
        """Run at once, in the order of the calls; the future is already resolved."""
        self.service.on_operation(name)
        future = Future()
        result = operation()
        if not self.service.hangs:
            future.set_result(result)
        return future

    def _output(self, data):
        logprobs = self.logits - np.log(np.exp(self.logits).sum())
        outputs = [
            {"logprobs": types.TensorData(logprobs[d.loss_fn_inputs["target_tokens"].to_numpy()])}
            for d in data
        ]
        return types.ForwardBackwardOutput(loss_fn_outputs=outputs, metrics={})

    def _accumulate(self, data):
        """The gradient of -sum(weights * logprobs): softmax minus the weighted targets."""
        p = np.exp(self.logits) / np.exp(self.logits).sum()
        for datum in data:
            weights = datum.loss_fn_inputs["weights"].to_numpy().astype(float)
            self.gradient += weights.sum() * p
            np.subtract.at(self.gradient, datum.loss_fn_inputs["target_tokens"].to_numpy(), weights)
        return self._output(data)

    def _step(self, learning_rate):
        self.momentum = 0.9 * self.momentum + self.gradient
        self.logits = self.logits - learning_rate * self.momentum
        self.gradient = np.zeros(258)
        return types.OptimStepResponse()

    def _save(self, kind, name):
        path = f"tinker://run{self.number}/{kind}/{name}"
        assert path not in self.service.checkpoints, f"{path} is saved twice"
        self.service.checkpoints[path] = self.logits.copy(), self.momentum.copy()
        return types.SaveWeightsResponse(path)


class FakeSampling:
    """Always samples the likeliest token."""

    def __init__(self, service, logits):
        self.service, self.logits = service, logits

    def get_base_model(self):
        return "fake"

    def close(self):
        pass

    def get_tokenizer(self):
        return ByteTokenizer()

    def sample(self, prompt, num_samples=1, sampling_params=None):
        self.service.prompts.append(ByteTokenizer().decode(prompt.to_ints()))
        tokens = [int(self.logits.argmax())] * min(sampling_params.max_tokens, 8)
        sequence = types.SampledSequence(tokens, [-1.0] * len(tokens), "length")
        future = Future()
        future.set_result(types.SampleResponse([sequence] * num_samples))
        return future

    def sample_stream(self, prompt, num_samples=1, sampling_params=None):
        [sequence] = self.sample(prompt, num_samples, sampling_params).result().sequences
        for token, logprob in zip(sequence.tokens, sequence.logprobs):
            yield types.SampleStreamChunk(0, token, logprob)
        yield types.SampleStreamChunk(0, stop_reason=sequence.stop_reason)
