"""Growth in the engine: `python -m tests.benchmarks.growth_case context|vocabulary`, prints JSON.

Costs by text length and by vocabulary size, for a model of width 128 with two layers and two heads.
Runs in a separate process, whose peak memory is reset before each measurement. Times are the
shortest of a few tries, since other load can only add to them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tinkex.engine import tiny  # before torch: it sets how torch's threads wait

# isort: split
import torch
import transformers
from transformers.utils import logging

from tests.benchmarks import engine as bench
from tests.benchmarks.plots import Curve
from tests.benchmarks.reference import peak_memory
from tinkex import types
from tinkex.engine import attention
from tinkex.engine.engine import Engine

CONTEXTS = (1024, 2048, 4096, 8192, 16_384, 32_768)
VOCABULARIES = (512, 4096, 32_768, 131_072, 262_144)
#: Tokens of the step with which vocabularies are measured.
TOKENS = 1024

WIDTH, LAYERS, HEADS = 128, 2, 2
#: Number of tokens sampled after a prompt, and how many of the last ones are measured.
SAMPLED, MEASURED = 17, 12
#: Tries are repeated for at most this many seconds, as often as `TRIES`.
SECONDS, TRIES = 4.0, 5

Curves = dict[str, Curve]


class Case:
    """A model with a vocabulary, for texts up to a length."""

    def __init__(self, vocab: int, length: int) -> None:
        self.vocab = vocab
        self.engine = Engine(device="cpu")
        with tempfile.TemporaryDirectory(prefix="tinkex-bench-") as folder:
            config = transformers.LlamaConfig(
                num_hidden_layers=LAYERS, hidden_size=WIDTH, intermediate_size=3 * WIDTH,
                num_attention_heads=HEADS, vocab_size=vocab,
                max_position_embeddings=length + SAMPLED,
            )  # fmt: skip
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            tiny.write_tokenizer(Path(folder))
            self.engine.load_base(folder)
            lora = types.LoraConfig(rank=8, train_unembed=False)
            self.engine.create_model("m", folder, lora, seed=0)
            self.engine.open_sampler("s", folder)

    def step(self, length: int) -> tuple[float, float]:
        """A training step of one text: seconds, and additional bytes of the process."""
        data = bench.data_of(bench.prompts_of([length + 1], self.vocab))

        def train() -> None:
            bench.drive(self.engine.forward_backward("m", data, "cross_entropy", None))
            self.engine.optim_step("m", types.AdamParams())

        return _measured(train)

    def sample(self, length: int) -> tuple[float, float, float]:
        """A sample: seconds for its prompt, seconds for a token after it, and bytes added."""
        taken: list[float] = []

        def ask() -> None:
            [prompt] = bench.prompts_of([length], self.vocab, len(taken))
            params = types.SamplingParams(max_tokens=SAMPLED, seed=1, stop=[], temperature=1.0)
            request = types.SampleRequest(types.ModelInput.from_ints(prompt), params)
            self.engine.submit_sample(0, "s", request)
            while self.engine.has_samples:
                started = time.perf_counter()
                self.engine.sample_step()
                taken.append(time.perf_counter() - started)

        whole, memory = _measured(ask)
        token = statistics.median(taken[-MEASURED:])
        return whole - SAMPLED * token, token, memory


def _measured(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the fastest try, and additional bytes of the process."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # return free memory, which would hide additional bytes
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current size
    before, end, taken = peak_memory(), time.perf_counter() + SECONDS, []
    while not taken or (len(taken) < TRIES and time.perf_counter() < end):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken), peak_memory() - before


def context() -> Curves:
    """Costs by the length of a text."""
    names = ("step", "attention", "prompt", "token", "step memory", "sample memory")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    case = Case(512, max(CONTEXTS))
    for length in CONTEXTS:
        step, memory = case.step(length)
        prompt, token, kept = case.sample(length)
        found["step"].append((length, 1e3 * step / length))
        found["attention"].append((length, 1e3 * _attention(length) / length))
        found["prompt"].append((length, 1e3 * prompt / length))
        found["token"].append((length, 1e3 * token))
        found["step memory"].append((length, memory / 2**20))
        found["sample memory"].append((length, kept / 2**20))
    return dict(found)


def _attention(length: int) -> float:
    """Seconds of attention in a step: all layers, forward and backward."""
    shape = 1, HEADS, length, WIDTH // HEADS
    parts = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    grad = torch.randn(shape)

    def layer() -> None:
        out = attention.attention(parts[0], parts[1], parts[2], shape[3] ** -0.5)
        torch.autograd.grad(out, parts, grad)

    return LAYERS * _measured(layer)[0]


def vocabulary() -> Curves:
    """Costs by the size of the vocabulary."""
    names = ("step", "products", "token", "step memory")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for vocab in VOCABULARIES:
        case = Case(vocab, TOKENS)
        step, memory = case.step(TOKENS)
        found["step"].append((vocab, 1e3 * step))
        found["products"].append((vocab, 1e3 * _products(vocab)))
        found["token"].append((vocab, 1e3 * case.sample(16)[1]))
        found["step memory"].append((vocab, memory / 2**20))
    return dict(found)


def _products(vocab: int) -> float:
    """Seconds of the two unavoidable products with the head in a step."""
    hidden, head = torch.randn(TOKENS, WIDTH), torch.randn(vocab, WIDTH)

    def both() -> None:
        for start in range(0, vocab, TOKENS):
            block = head[start : start + TOKENS]
            (hidden @ block.T) @ block

    return _measured(both)[0]


if __name__ == "__main__":
    logging.disable_progress_bar()
    print(json.dumps({"context": context, "vocabulary": vocabulary}[sys.argv[1]]()))
