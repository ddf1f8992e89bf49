"""The engine against what a user would write with transformers and PEFT, as ratios.

Both sides compute the same numbers on the same data in one run, in turns, each in a process of its
own; a figure is the median of its rounds. Training goes through the SDK and HTTP. Run `python -m
tests.benchmarks.engine [case ...]`; each case is a function here that returns rows. Absolute times
mean nothing outside the run.
"""

from __future__ import annotations

# isort: off
from tinkex.engine import tiny  # before torch: it sets how torch's threads wait for each other

# isort: on
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
import transformers

import tinkex
from tests.benchmarks.reference import Reference, peak_memory
from tinkex import types
from tinkex.engine import matmul
from tinkex.engine.engine import Engine

ROUNDS = 3
RANK = 32
FLAGS = {"train_unembed": False}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 512,
    },
    "small": {
        "num_hidden_layers": 6,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 32768,
    },
    "deep": {  # SmolLM2-135M
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}

#: Cases that are measured on the deep model, too; the others would take many minutes on it.
DEEP_CASES = ("training", "training_equal", "sampling")


#: What is wanted of training: ratio by case and model, and share of the matmul peak by model.
TRAINING_TARGETS = {
    ("training, equal lengths", "tiny"): ">= 1.2",
    ("training, equal lengths", "small"): ">= 1.2",
    ("training, equal lengths", "deep"): ">= 1.2",
    ("training", "deep"): ">= 2",
}
SHARE_TARGETS = {"tiny": ">= 0.4", "small": ">= 0.6", "deep": ">= 0.75"}

#: Tokens a second against a size, by what is grown.
Curves = dict[str, list[tuple[int, float]]]


@attrs.frozen
class Row:
    """One line of the table.

    Attributes:
        ratio: how much better ours is, whichever way better is.
        limit: what the machine could do at most, had it nothing to compute but the products with
            the model's matrices, all at the speed of its best product.
    """

    case: str
    model: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    target: str
    limit: float | None = None


class Bench:
    """A model of one size, in the engine and in transformers + PEFT, with the same weights."""

    def __init__(self, name: str, folder: Path, *, threads: int | None = None) -> None:
        self.name = name
        self.base = folder / name
        self.vocab = SIZES[name]["vocab_size"]
        self.engine = Engine(device="cpu", threads=threads)
        if not self.base.exists():
            _make_model(name, self.base)
        self.engine.load_base(str(self.base))
        self.adapter = folder / f"{name}-adapter"
        if not self.adapter.exists():
            self._make_adapter()
        self.engine.create_model("m", str(self.base), self.lora, seed=0, adapter=self.adapter)
        self.engine.open_sampler("s", str(self.base), directory=self.adapter)

    @property
    def lora(self) -> types.LoraConfig:
        return types.LoraConfig(rank=RANK, **FLAGS)

    def _make_adapter(self, name: str = "first", seed: int = 1) -> None:
        """B is random too, so that the adapter matters."""
        self.engine.create_model(name, str(self.base), self.lora, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        self.engine._models[name].weights.normal_(0, 0.02, generator=generator)
        self.adapter.mkdir(exist_ok=True)
        self.engine.save(name, self.adapter, optimizer=False)
        self.engine.unload(name)

    @cached_property
    def reference(self) -> Reference:
        """The same model and adapter in transformers and PEFT."""
        return Reference(self.base, self.adapter)

    @cached_property
    def service(self) -> tinkex.ServiceClient:
        """An embedded engine, in a separate process."""
        os.environ["TINKEX_HOME"] = str(self.base.parent / "home")
        return tinkex.ServiceClient()

    def client(self) -> tinkex.TrainingClient:
        """The same model and adapter through the SDK."""
        return self.service.create_lora_training_client(
            str(self.base), rank=RANK, adapter=str(self.adapter), **FLAGS
        )

    @cached_property
    def peak(self) -> float:
        """Floating-point operations a second of the fastest of some 1024^3 products, by either
        library."""
        a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
        multiply = (torch.mm, matmul.product)
        return 2 * 1024**3 / min(_seconds(lambda f=f: f(a, b)) for f in multiply * 60)

    def used(self, *, adapter: bool) -> int:
        """Numbers that each token is multiplied with, with or without the adapter's own."""
        head = self.vocab * SIZES[self.name]["hidden_size"]
        return int(self.reference.call("parameters_used", adapter)) + head

    @cached_property
    def training_limit(self) -> float:
        """Tokens a second at 4 operations for each number used."""
        return self.peak / (4 * self.used(adapter=True))

    @cached_property
    def reading_limit(self) -> float:
        """Tokens a second at 2 operations for each number of the base model: an adapter that is
        not being trained can be folded into it."""
        return self.peak / (2 * self.used(adapter=False))

    def close(self) -> None:
        """End the processes that were started."""
        if "reference" in self.__dict__:
            self.reference.close()
        if "service" in self.__dict__:
            self.service.close()


def _make_model(name: str, directory: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES[name], max_position_embeddings=4096, bos_token_id=256, eos_token_id=257
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tiny.write_tokenizer(directory)


def chats(count: int, vocab: int, *, seed: int = 0) -> list[np.ndarray]:
    """Token ids in lengths like chats': log-normal, median 90, 16 to 512."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.normal(np.log(90), 0.8, count)), 16, 512).astype(int)
    return [rng.integers(0, vocab, length + 1) for length in lengths]


def data_of(texts: Sequence[np.ndarray]) -> list[types.Datum]:
    return [
        types.Datum(types.ModelInput.from_ints(text[:-1]), {"target_tokens": text[1:]})
        for text in texts
    ]


def drive(pass_: Any) -> Any:
    while True:
        try:
            next(pass_)
        except StopIteration as stop:
            return stop.value


def in_turns(first: Callable[[], Any], second: Callable[[], Any], rounds: int = ROUNDS) -> Any:
    """Median seconds of both, each run once to warm up, then in turns."""
    first(), second()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for spent, call in zip(times, (first, second)):
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
    return tuple(float(np.median(spent)) for spent in times)


# -- training ------------------------------------------------------------------------------------


def training(bench: Bench, *, count: int = 32, size: int = 32, rounds: int = ROUNDS) -> list[Row]:
    """Real tokens a second of a step over chats, and the share of the matmul peak."""
    if bench.name == "deep":
        size = 8  # 32 padded chats and their logits do not fit in the reference's memory
    return _training(bench, "training", chats(count, bench.vocab), size, rounds)


def training_equal(bench: Bench, *, rounds: int = ROUNDS) -> list[Row]:
    """The same of 8 texts of 256 tokens: no padding to save."""
    texts = prompts_of([257] * 8, bench.vocab)
    return _training(bench, "training, equal lengths", texts, 8, rounds)


def _training(
    bench: Bench, case: str, texts: Sequence[np.ndarray], size: int, rounds: int
) -> list[Row]:
    tokens = sum(len(text) - 1 for text in texts)
    data = data_of(texts)
    client, reference = bench.client(), bench.reference
    found: dict[str, float] = {}

    def ours() -> None:
        output = client.forward_backward(data, "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-4)).result()
        found.setdefault("ours", output.result().loss)

    def theirs() -> None:
        found.setdefault("theirs", reference.call("step", texts, size))

    a, b = in_turns(ours, theirs, rounds)
    if abs(found["ours"] / found["theirs"] - 1) > 1e-4:
        raise RuntimeError(f"the losses differ: {found}")
    limit = bench.training_limit
    share = [tokens / seconds / limit for seconds in (a, b)]
    return [
        Row(f"{case}, real tokens/s", bench.name, tokens / a, tokens / b, "tok/s", b / a,
            TRAINING_TARGETS.get((case, bench.name), ">= 3"), limit),
        Row(f"{case}, share of matmul peak", bench.name, share[0], share[1], "of peak",
            share[0] / share[1], SHARE_TARGETS[bench.name]),
    ]  # fmt: skip


def in_turn(bench: Bench, *, adapters: int = 8, rounds: int = 2) -> list[Row]:
    """Several adapters trained one after the other, against one doing the same work."""
    for i in range(adapters):
        if f"t{i}" not in bench.engine._models:
            bench.engine.create_model(f"t{i}", str(bench.base), bench.lora, seed=i)
    data = data_of(chats(16, bench.vocab))
    tokens = adapters * sum(datum.model_input.length for datum in data)

    def train(names: Sequence[str]) -> None:
        for name in names:
            drive(bench.engine.forward_backward(name, data, "cross_entropy", None))
            bench.engine.optim_step(name, types.AdamParams())

    a, b = in_turns(
        lambda: train([f"t{i}" for i in range(adapters)]),
        lambda: train(["t0"] * adapters),
        rounds,
    )
    return [
        Row(f"{adapters} adapters trained in turn, against one", bench.name, tokens / a,
            tokens / b, "tok/s", b / a, ">= 0.83"),
    ]  # fmt: skip


# -- sampling ------------------------------------------------------------------------------------


def prompts_of(lengths: Sequence[int], vocab: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, length) for length in lengths]


def ask(
    bench: Bench,
    prompts: Sequence[np.ndarray],
    samples: int,
    length: int,
    samplers: Sequence[str] = ("s",),
    **more: Any,
) -> int:
    """All at once; how many tokens came."""
    params = types.SamplingParams(max_tokens=length, seed=1, stop=[])
    for i, prompt in enumerate(prompts):
        request = types.SampleRequest(
            types.ModelInput.from_ints(prompt), params, num_samples=samples, **more
        )
        bench.engine.submit_sample(i, samplers[i % len(samplers)], request)
    tokens = 0
    while bench.engine.has_samples:
        for _, response in bench.engine.sample_step():
            if isinstance(response, Exception):
                raise response
            tokens += sum(len(sequence) for sequence in response.sequences)
    return tokens


def sampling(bench: Bench, *, rounds: int = ROUNDS) -> list[Row]:
    """8 prompts x 8 samples x 64 tokens, against generate on the batch."""
    prompts = prompts_of([32, 64, 40, 90, 128, 70, 50, 100], bench.vocab)
    a, b = in_turns(
        lambda: ask(bench, prompts, 8, 64),
        lambda: bench.reference.call("generate", prompts, 8, 64),
        rounds,
    )
    total = 8 * 8 * 64
    target = ">= 3" if bench.name == "small" else ">= 2"
    return [
        Row("sampling 8 x 8 x 64", bench.name, total / a, total / b, "tok/s", b / a, target,
            bench.reading_limit),
    ]  # fmt: skip


def shared_prompt(bench: Bench, *, rounds: int = 2) -> list[Row]:
    """16 samples of one 512-token prompt, against generate prompt by prompt."""
    [prompt] = prompts_of([512], bench.vocab)
    a, b = in_turns(
        lambda: ask(bench, [prompt], 16, 64),
        lambda: bench.reference.call("generate_one_by_one", prompt, 16, 64),
        rounds,
    )
    return [
        Row("16 samples of a 512-token prompt", bench.name, 1024 / a, 1024 / b, "tok/s", b / a,
            ">= 4"),
    ]  # fmt: skip


def prompt_logprobs(bench: Bench, *, rounds: int = 1, count: int = 256) -> list[Row]:
    """Log-probabilities of 256 prompts of 256 tokens, against transformers one by one."""
    prompts = prompts_of([256] * count, bench.vocab)
    a, b = in_turns(
        lambda: ask(bench, prompts, 1, 1, prompt_logprobs=True),
        lambda: bench.reference.call("prompt_logprobs", prompts),
        rounds,
    )
    total = 256 * count
    return [
        Row(f"prompt logprobs of {count} x 256", bench.name, total / a, total / b, "tok/s", b / a,
            ">= 3", bench.reading_limit),
    ]  # fmt: skip


def mixed_adapters(bench: Bench, *, adapters: int = 8, rounds: int = ROUNDS) -> list[Row]:
    """8 adapters sampled together, against one doing the same work."""
    folder = Path(tempfile.mkdtemp())
    names = []
    for i in range(adapters):
        directory = folder / str(i)
        directory.mkdir()
        bench.engine.create_model("temporary", str(bench.base), bench.lora, seed=i)
        bench.engine._models["temporary"].weights.normal_(0, 0.02)
        bench.engine.save("temporary", directory, optimizer=False)
        bench.engine.unload("temporary")
        names.append(f"mixed{i}")
        bench.engine.open_sampler(names[-1], str(bench.base), directory=directory)
    prompts = prompts_of([64] * 64, bench.vocab)
    a, b = in_turns(
        lambda: ask(bench, prompts, 1, 64, names), lambda: ask(bench, prompts, 1, 64), rounds
    )
    for name in names:
        bench.engine.close_sampler(name)
    shutil.rmtree(folder)
    total = 64 * 64
    return [
        Row(f"{adapters} adapters sampled together, against one", bench.name, total / a,
            total / b, "tok/s", b / a, ">= 0.83"),
    ]  # fmt: skip


def continuous(bench: Bench, *, count: int = 200) -> list[Row]:
    """Requests of different lengths arriving over time, against one after another.

    They arrive three times as fast as one after another could answer them. What that would give
    for the same arrivals is computed from the time that each takes alone.
    """
    rng = np.random.default_rng(0)
    prompts = prompts_of(rng.integers(8, 200, count).tolist(), bench.vocab)
    lengths = rng.integers(8, 64, count).tolist()
    alone = [_seconds(lambda i=i: ask(bench, [prompts[i]], 1, lengths[i])) for i in range(count)]
    arrivals = np.arange(count) * sum(alone) / (3 * count)
    ends = []
    for arrival, seconds in zip(arrivals, alone):
        ends.append(max(arrival, ends[-1] if ends else 0.0) + seconds)
    ours = _arriving(bench, prompts, lengths, arrivals)
    total = sum(lengths)
    a, b = (float(np.median(np.array(e) - arrivals)) for e in (ours, ends))
    return [
        Row(f"{count} requests arriving, against one after another", bench.name,
            total / max(ours), total / max(ends), "tok/s", max(ends) / max(ours), ">= 2"),
        Row("their median latency", bench.name, 1e3 * a, 1e3 * b, "ms", b / a, "> 1"),
    ]  # fmt: skip


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _arriving(
    bench: Bench, prompts: Sequence[np.ndarray], lengths: Sequence[int], arrivals: np.ndarray
) -> list[float]:
    """When each request was answered, in seconds after the first arrival."""
    engine, ends, submitted = bench.engine, [0.0] * len(prompts), 0
    start = time.perf_counter()
    while submitted < len(prompts) or engine.has_samples:
        now = time.perf_counter() - start
        while submitted < len(prompts) and arrivals[submitted] <= now:
            params = types.SamplingParams(max_tokens=lengths[submitted], seed=1, stop=[])
            prompt = types.ModelInput.from_ints(prompts[submitted])
            engine.submit_sample(submitted, "s", types.SampleRequest(prompt, params))
            submitted += 1
        if not engine.has_samples:
            time.sleep(arrivals[submitted] - now)
        for i, _ in engine.sample_step():
            ends[i] = time.perf_counter() - start
    return ends


def latency(bench: Bench, *, rounds: int = 20) -> list[Row]:
    """One 8-token sample alone; creating a model."""
    prompts = prompts_of([32], bench.vocab)
    names = iter(range(10**6))

    def create() -> None:
        name = f"l{next(names)}"
        bench.engine.create_model(name, str(bench.base), bench.lora, seed=0)
        bench.engine.unload(name)

    a, b = in_turns(lambda: ask(bench, prompts, 1, 8), create, rounds)
    return [
        Row("one 8-token sample alone", bench.name, 1e3 * a, 40.0, "ms", 40 / (1e3 * a),
            "<= 40 ms (tiny)"),
        Row("create a LoRA model", bench.name, 1e3 * b, 300.0, "ms", 300 / (1e3 * b), "<= 300 ms"),
    ]  # fmt: skip


# -- memory --------------------------------------------------------------------------------------


def memory(bench: Bench) -> list[Row]:
    """Peak resident memory of a process that takes one step over 16k tokens."""
    texts = chats(133, bench.vocab)
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.engine", "--memory", bench.name,
         str(bench.base.parent)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    reference = Reference(bench.base, bench.adapter)
    reference.call("step", texts, 16)
    theirs = reference.call("peak") / 2**20
    reference.close()
    ours = json.loads(done.stdout.splitlines()[-1])["peak"] / 2**20
    return [
        Row("peak memory, 16k tokens in a request", bench.name, ours, theirs, "MiB",
            theirs / ours, ">= 2"),
    ]  # fmt: skip


def _measure_memory(name: str, folder: Path) -> None:
    bench = Bench(name, folder)
    data = data_of(chats(133, bench.vocab))
    drive(bench.engine.forward_backward("m", data, "cross_entropy", None))
    bench.engine.optim_step("m", types.AdamParams())
    print(json.dumps({"peak": peak_memory()}))


# -- curves -------------------------------------------------------------------------------------


def curves_of(bench: Bench) -> Curves:
    """Tokens a second: training against batch size and length, sampling against sequences."""
    rng = np.random.default_rng(0)

    def train(count: int, length: int) -> float:
        data = data_of([rng.integers(0, bench.vocab, length + 1) for _ in range(count)])
        work = lambda: drive(bench.engine.forward_backward("m", data, "cross_entropy", None))  # noqa: E731
        work()
        return count * length / min(_seconds(work) for _ in range(3))

    def sample(count: int) -> float:
        prompts = prompts_of([64] * count, bench.vocab)
        return count * 32 / min(_seconds(lambda: ask(bench, prompts, 1, 32)) for _ in range(2))

    curves = {
        "training: sequences of 128 tokens": [(n, train(n, 128)) for n in (1, 4, 16, 64)],
        "training: length of sequences (4,096 tokens)": [
            (n, train(4096 // n, n)) for n in (16, 64, 256, 1024, 4096)
        ],
        "sampling: sequences at a time": [(n, sample(n)) for n in (1, 4, 16, 64, 256)],
    }
    bench.engine.clear_gradients("m")
    return curves


CASES: dict[str, Callable[[Bench], list[Row]]] = {
    case.__name__: case
    for case in (
        training,
        training_equal,
        in_turn,
        sampling,
        shared_prompt,
        prompt_logprobs,
        mixed_adapters,
        continuous,
        latency,
        memory,
    )
}


def run(
    cases: Sequence[str] = (), models: Sequence[str] = tuple(SIZES), *, growth: bool = False
) -> tuple[list[Row], dict[str, Curves]]:
    """All rows (of the named cases), printed as they come; with *growth* each model's curves."""
    folder = Path(tempfile.mkdtemp(prefix="tinkex-bench-"))
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    rows, curves = [], {}
    try:
        for name in models:
            bench = Bench(name, folder)
            for case in cases or (DEEP_CASES if name == "deep" else CASES):
                for row in CASES[case](bench):
                    rows.append(row)
                    print(
                        f"{row.model:6} {row.case:48} {row.ours:12,.4g} {row.theirs:12,.4g} "
                        f"{row.unit:8} {row.ratio:6.2f}  target {row.target}",
                        flush=True,
                    )
            bench.close()
            if growth and name != "deep":
                curves[name] = curves_of(bench)
    finally:
        shutil.rmtree(folder)
    return rows, curves


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        _measure_memory(sys.argv[2], Path(sys.argv[3]))
    else:
        named = [word for word in sys.argv[1:] if word in CASES]
        run(named, [word for word in sys.argv[1:] if word in SIZES] or tuple(SIZES))
