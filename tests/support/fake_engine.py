"""A fake engine with the engine's interface: deterministic, instant, and strict.

A model is one float: forward_backward adds the mean target token to its gradient, a step moves
the weight by learning rate times gradient plus momentum. Wrong order, repeats, lost state and wrong
merging therefore change the numbers.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from functools import partial
from pathlib import Path

import attrs
import numpy as np

from tinkex import types

VOCABULARY = 1000


@attrs.frozen
class BaseInfo:
    name: str
    architecture: str = "FakeForCausalLM"
    tokenizer_id: str = "tiny"
    tokenizer_source: str = ""
    vocab_size: int = VOCABULARY
    max_context_length: int = 4096


@attrs.define
class Model:
    base_model: str
    weight: float
    rank: int
    momentum: float = 0.0
    steps: int = 0
    gradient: float = 0.0

    def state(self):
        return attrs.asdict(self)


class FakeEngine:
    """`gate`: while it is cleared, forward_backward yields without progress. `log`: the calls, in
    order."""

    def __init__(self, *, micro_batch=1, gate=None):
        self.models = {}
        self.samplers = {}
        self.log = []
        self.gate = gate or threading.Event()
        if gate is None:
            self.gate.set()
        self._queue = deque()
        self._bases = {}
        self._micro_batch = micro_batch

    def has_base(self, base_model):
        return base_model in self._bases

    def read_base(self, base_model, on_progress):
        if base_model.startswith("missing"):
            raise ValueError(f"base model {base_model!r} cannot be loaded: it is not there.")
        return BaseInfo(base_model)

    def enter_base(self, base_model, loaded):
        self._bases[base_model] = loaded

    def base_info(self, base_model):
        return self._bases[base_model]

    def create_model(self, model_id, base_model, lora, *, seed, adapter=None):
        if model_id in self.models:
            raise ValueError(f"model {model_id!r} already exists.")
        self.log.append(("create", model_id))
        self.models[model_id] = Model(base_model, np.random.default_rng(seed).random(), lora.rank)

    def lora_config(self, model_id):
        return types.LoraConfig(self._model(model_id).rank, train_unembed=True)

    def _model(self, model_id):
        if model_id not in self.models:
            raise ValueError(f"there is no model {model_id!r}.")
        return self.models[model_id]

    def forward_backward(self, model_id, data, loss_fn, loss_fn_config, *, forward_only=False):
        model = self._model(model_id)
        types.check_config(loss_fn, loss_fn_config)
        types.check_data(data, loss_fn)
        outputs, loss = [], 0.0
        for i, datum in enumerate(data):
            if i % self._micro_batch == 0:
                while True:
                    yield
                    if self.gate.wait(0.001):
                        break
            targets = datum.loss_fn_inputs["target_tokens"].to_numpy().astype(np.float64)
            if (targets == 666).any():
                raise ValueError("token 666 is cursed; leave it out.")
            if (targets == 668).any():
                np.empty(2**50, np.uint8)  # raises MemoryError
            if (targets == 667).any():
                raise RuntimeError("a bug was found.")
            logprobs = -np.abs(np.sin(targets + model.weight))
            loss -= float(logprobs.sum())
            outputs.append({"logprobs": types.TensorData(logprobs.astype(np.float32))})
            if not forward_only:
                model.gradient += float(targets.mean()) * 1e-3
        self.log.append(("forward" if forward_only else "forward_backward", model_id, loss))
        return types.ForwardBackwardOutput(outputs, {"loss:sum": loss}, "FakeReturn")

    def optim_step(self, model_id, params):
        model = self._model(model_id)
        model.momentum = 0.9 * model.momentum + model.gradient
        model.weight -= params.learning_rate * model.momentum
        model.steps += 1
        model.gradient = 0.0
        self.log.append(("optim_step", model_id, model.steps))
        return types.OptimStepResponse({"weight": model.weight})

    def clear_gradients(self, model_id):
        self._model(model_id).gradient = 0.0

    def save(self, model_id, directory, *, optimizer):
        state = self._model(model_id).state() | {"gradient": 0.0}
        if not optimizer:
            state |= {"momentum": None, "steps": None}
        self.log.append(("save", model_id))
        (directory / "adapter_model.safetensors").write_bytes(json.dumps(state).encode())
        (directory / "adapter_config.json").write_text("{}")

    def load(self, model_id, directory, *, optimizer):
        state = json.loads((directory / "adapter_model.safetensors").read_bytes())
        model = self._model(model_id)
        if optimizer and state["steps"] is None:
            raise ValueError("the checkpoint holds no optimizer state.")
        self.log.append(("load", model_id))
        model.weight, model.gradient = state["weight"], 0.0
        model.momentum = state["momentum"] if optimizer else 0.0
        model.steps = state["steps"] if optimizer else 0

    def snapshot(self, model_id, directory):
        (directory / "state.json").write_text(json.dumps(self._model(model_id).state()))

    def restore(self, model_id, directory):
        self.models[model_id] = Model(**json.loads((directory / "state.json").read_text()))

    def unload(self, model_id):
        self._model(model_id)
        del self.models[model_id]

    def open_sampler(self, sampler_id, base_model, *, directory=None):
        weight = 0.0
        if directory is not None:
            text = (directory / "adapter_model.safetensors").read_bytes()
            weight = json.loads(text)["weight"]
        self.log.append(("open_sampler", sampler_id))
        self.samplers[sampler_id] = weight

    def close_sampler(self, sampler_id):
        self.log.append(("close_sampler", sampler_id))
        del self.samplers[sampler_id]

    def unread_tokenizer(self, base_model, request):
        return None

    def submit_sample(self, ticket, sampler_id, request, *, on_token=None, share=None):
        prompt = request.prompt.tokens
        if prompt.size and int(prompt.max()) >= VOCABULARY:
            raise ValueError(f"the prompt holds token {int(prompt.max())} of {VOCABULARY}.")
        params = request.sampling_params
        generators = [
            np.random.default_rng([params.seed or 0, i]) for i in range(request.num_samples)
        ]
        self._queue.append((ticket, self.samplers[sampler_id], request, generators, [], on_token))

    @property
    def has_samples(self):
        return bool(self._queue)

    def sample_step(self):
        if not self.gate.wait(0.001):
            return []
        finished, going_on = [], deque()
        for job in self._queue:
            ticket, weight, request, generators, rows, on_token = job
            row = [int(generator.integers(VOCABULARY)) for generator in generators]
            rows.append(row)
            for i, token in enumerate(row):
                if on_token:
                    on_token(i, token, -weight)
            if len(rows) == (request.sampling_params.max_tokens or 8):
                finished.append((ticket, self._response(request, weight, rows)))
            else:
                going_on.append(job)
        self._queue = going_on
        return finished

    def _response(self, request, weight, rows):
        sequences = [
            types.SampledSequence(
                tokens=[row[i] for row in rows], logprobs=[-weight] * len(rows),
                stop_reason="length",
            )
            for i in range(request.num_samples)
        ]  # fmt: skip
        logprobs = None
        if request.prompt_logprobs:
            logprobs = [np.nan, *([-weight] * (request.prompt.length - 1))]
        return types.SampleResponse(sequences, prompt_logprobs=logprobs)

    def free_idle(self):
        self.log.append(("free_idle",))

    def cancel_sample(self, ticket):
        self._queue = deque(job for job in self._queue if job[0] != ticket)


def main():
    """The server on the fake engine: python -m tests.support.fake_engine [PORT [HOME [OPTIONS]]].

    OPTIONS: those of `main`, `limits`, `real` for the real engine, and
    `stuck` for one that never finishes a batch or a sample, in JSON.
    """
    import sys

    from tinkex.server import app
    from tinkex.server.limits import Limits

    port, home, text = [*sys.argv[1:], None, None, None][:3]
    options = json.loads(text or "{}")
    limits = Limits(**options.pop("limits", {}))
    for name in {"announce"} & set(options):
        options[name] = Path(options[name])
    engine = app.make_engine if options.pop("real", False) else FakeEngine
    if options.pop("stuck", False):
        engine = partial(FakeEngine, gate=threading.Event())
    sys.exit(
        app.main(
            port=int(port or 0),
            home=Path(home) if home else None,
            engine=engine,
            limits=limits,
            **options,
        )
    )


if __name__ == "__main__":
    main()
