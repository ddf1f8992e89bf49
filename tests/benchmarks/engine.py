"""The engine against what a user would write with transformers and PEFT, and against the machine.

Both sides compute the same numbers on the same data in one run, in turns, each in a separate
process. The machine's limit is measured in every round, too: all the products with the model's
matrices at the speed of its best product or, where weights are read for a few tokens only, at the
bandwidth at which they can be read. Attention and everything else is not in it.
"""

from __future__ import annotations

# isort: off
from tinkex.engine import tiny  # before torch: it sets how torch's threads wait for each other

# isort: on
import copy
import gc
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

import numpy as np
import torch
import transformers

from tests.benchmarks import machine
from tests.benchmarks.reference import Reference, peak_memory
from tests.benchmarks.rounds import Allowance, in_turns
from tests.benchmarks.rows import Row
from tinkex import types
from tinkex.engine.engine import Engine
from tinkex.engine.fetch import ensure
from tinkex.text.registry import KNOWN

RANK = 32
FLAGS = {"train_unembed": False}
LEARN = types.AdamParams(learning_rate=1e-4)

#: Models that are made of random numbers.
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
}

#: What is measured, the most important first: models, and how many parts of the time each gets.
MODELS = {"smollm2": 4, "small": 2, "gpt2": 1, "tiny": 1}

#: The model of the generic path, as large as *small*.
GPT2 = {
    "n_embd": 512, "n_layer": 6, "n_head": 8, "vocab_size": 32768, "n_positions": 4096,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,  # ours has no dropout
}  # fmt: skip
DTYPES = ("float32", "bfloat16")
#: Measured unless others are asked for: both of the real model, and one of the small ones, so that
#: a quarter of an hour is enough.
DTYPES_OF = dict.fromkeys(MODELS, DTYPES[:1]) | {"smollm2": DTYPES}

#: How exactly the two losses have to agree.
LOSSES_DIFFER = {"float32": 1e-4, "bfloat16": 2e-2}

#: What is wanted: parts of the limit in training, and of chats the ratio.
TRAINING_SHARE: dict[str, float | None] = {
    "tiny": 0.4, "small": 0.6, "smollm2": 0.6, "gpt2": None
}  # fmt: skip
READING_SHARE = 0.75

#: Tokens of a prompt, where decoding is measured.
PROMPT = 16
#: By streams: the share of the bandwidth, then of the smaller of the two limits.
DECODING_SHARE = {1: 0.7, 16: 0.6, 64: 0.6}


class Bench:
    """A model in the engine and in transformers + PEFT, with the same weights and adapter."""

    def __init__(
        self, name: str, folder: Path, dtype: str = "float32", device: str = "cpu"
    ) -> None:
        self.name, self.dtype, self.folder, self.device = name, dtype, folder, device
        self.base = ensure(name) if name in KNOWN else folder / name
        self.engine = Engine(device=device, dtype=dtype)
        if not self.base.exists():
            _make_model(name, self.base)
        self.engine.load_base(str(self.base))
        base = self.engine._base(str(self.base)).base
        self.vocab = base.vocab
        matrices = [linear.weight for linear in base.linears.values()]
        self._numbers = sum(weight.numel() for weight in matrices)
        self._bytes = sum(weight.numel() * weight.element_size() for weight in matrices)
        self.adapter = folder / f"{name}-adapter"
        if not self.adapter.exists():
            self._make_adapter()
        self.engine.create_model("m", str(self.base), self.lora, seed=0, adapter=self.adapter)
        self._adapter_numbers = self.engine._models["m"].layout.size
        self.engine.open_sampler("s", str(self.base), directory=self.adapter)

    @property
    def lora(self) -> types.LoraConfig:
        return types.LoraConfig(rank=RANK, **FLAGS)

    @property
    def label(self) -> str:
        """The model and the type of its weights, in a table."""
        return f"{self.name}, {self.dtype}"

    def _make_adapter(self) -> None:
        """B is random too, so that the adapter matters."""
        self.engine.create_model("first", str(self.base), self.lora, seed=1)
        generator = torch.Generator().manual_seed(1)
        self.engine._models["first"].weights.normal_(0, 0.02, generator=generator)
        self.adapter.mkdir()
        self.engine.save("first", self.adapter, optimizer=False)
        self.engine.unload("first")

    @cached_property
    def reference(self) -> Reference:
        """The same model and adapter in transformers and PEFT."""
        return Reference(self.base, self.adapter, self.dtype, self.device)

    def peak(self) -> float:
        """Operations a second of the best product of this type."""
        return machine.matmul_peak(getattr(torch, self.dtype), self.device)

    def training_limit(self) -> float:
        """Tokens a second at 4 operations for each number: forward, and the gradient of inputs.
        The adapter's own gradient is as much again for its numbers."""
        return self.peak() / (4 * self._numbers + 6 * self._adapter_numbers)

    def reading_limit(self) -> float:
        """Tokens a second at 2 operations for each number of the base model: an adapter that is
        not being trained can be merged into it."""
        return self.peak() / (2 * self._numbers)

    def decoding_limit(self, streams: int, prompt: int, length: int) -> float:
        """Tokens a second of so many streams with prompts of *prompt* tokens: the prompts at
        `reading_limit`, which gives each its first token; then steps, each at the smaller of
        `reading_limit` and of reading the weights from memory once."""
        reading = self.reading_limit()
        seconds = streams * prompt / reading
        from_memory = self._bytes / machine.read_bandwidth(self._bytes, self.device)
        seconds += (length - 1) * max(from_memory, streams / reading)
        return streams * length / seconds

    def close(self) -> None:
        """End the process that was started, and free the memory."""
        if "reference" in self.__dict__:
            self.reference.close()
        del self.engine
        gc.collect()


def _make_model(name: str, directory: Path) -> None:
    torch.manual_seed(0)
    ends = {"bos_token_id": 256, "eos_token_id": 257}
    config: transformers.PretrainedConfig
    if name == "gpt2":
        config = transformers.GPT2Config(**GPT2, **ends)
    else:
        config = transformers.LlamaConfig(**SIZES[name], max_position_embeddings=4096, **ends)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tiny.write_tokenizer(directory)


def chats(count: int, vocab: int, *, seed: int = 0) -> list[np.ndarray]:
    """Token ids in lengths like chats': log-normal, median 90, 16 to 512."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.normal(np.log(90), 0.8, count)), 16, 512).astype(int)
    return [rng.integers(0, vocab, length + 1) for length in lengths]


def prompts_of(lengths: Sequence[int], vocab: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, length) for length in lengths]


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


def speeds(amount: float, seconds: Sequence[float]) -> list[float]:
    """So many tokens in each of these times, as tokens a second."""
    return [amount / taken for taken in seconds]


# -- training ------------------------------------------------------------------------------------


def training(bench: Bench, seconds: float) -> list[Row]:
    """Real tokens a second of a step over chats, which the other side pads."""
    count = {"tiny": 32, "smollm2": 8}.get(bench.name, 16)
    target = {"smollm2": 2.0, "gpt2": 1.0}.get(bench.name, 3.0)
    texts = chats(count, bench.vocab)
    return [_training(bench, "training, chats of 16 to 512 tokens", texts, target, seconds)]


def training_equal(bench: Bench, seconds: float) -> list[Row]:
    """The same of texts of 256 tokens: no padding to save."""
    texts = prompts_of([257] * (8 if bench.name == "tiny" else 4), bench.vocab)
    target = 1.0 if bench.name == "gpt2" else 1.2
    return [_training(bench, "training, equal lengths", texts, target, seconds)]


def _training(
    bench: Bench, case: str, texts: Sequence[np.ndarray], target: float, seconds: float
) -> Row:
    tokens = sum(len(text) - 1 for text in texts)
    data = data_of(texts)
    found: dict[str, float] = {}

    def ours() -> None:
        output = drive(bench.engine.forward_backward("m", data, "cross_entropy", None))
        bench.engine.optim_step("m", LEARN)
        found.setdefault("ours", output.loss)

    def theirs() -> None:
        # 8 at a time, as its memory needs: all logits of padded chats are held at once
        found.setdefault("theirs", bench.reference.call("step", texts, 8))

    a, b, limits = in_turns((ours, theirs, bench.training_limit), seconds)
    if abs(found["ours"] / found["theirs"] - 1) > LOSSES_DIFFER[bench.dtype]:
        raise RuntimeError(f"the losses differ: {found}")
    return Row(case, "tok/s", speeds(tokens, a), speeds(tokens, b), bench.label, target, True,
               limits=limits, share_target=TRAINING_SHARE[bench.name])  # fmt: skip


def adapters_in_turn(bench: Bench, seconds: float) -> list[Row]:
    """8 adapters trained one after the other, against one doing the same work."""
    names = [f"t{i}" for i in range(8)]
    for i, name in enumerate(names):
        bench.engine.create_model(name, str(bench.base), bench.lora, seed=i)
    data = data_of(chats(16 if bench.name == "tiny" else 2, bench.vocab))
    tokens = len(names) * sum(datum.model_input.length for datum in data)

    def train(which: Sequence[str]) -> None:
        for name in which:
            drive(bench.engine.forward_backward(name, data, "cross_entropy", None))
            bench.engine.optim_step(name, LEARN)

    a, b = in_turns((lambda: train(names), lambda: train(names[:1] * 8)), seconds)
    for name in names:
        bench.engine.unload(name)
    return [Row("8 adapters trained in turn, against one", "tok/s", speeds(tokens, a),
                speeds(tokens, b), bench.label, 0.9, True)]  # fmt: skip


# -- sampling ------------------------------------------------------------------------------------


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


def decoding(streams: int) -> Callable[[Bench, float], list[Row]]:
    """So many streams of different 16-token prompts, against generate on the batch."""

    def case(bench: Bench, seconds: float) -> list[Row]:
        length = 64 if bench.name == "tiny" else 32
        prompts = prompts_of([PROMPT] * streams, bench.vocab)
        a, b, limits = in_turns(
            (
                lambda: ask(bench, prompts, 1, length),
                lambda: bench.reference.call("generate", prompts, 1, length),
                lambda: bench.decoding_limit(streams, PROMPT, length),
            ),
            seconds,
        )
        total = streams * length
        share = DECODING_SHARE.get(streams) if bench.name == "smollm2" else None
        return [Row(f"decoding, streams: {streams}", "tok/s", speeds(total, a), speeds(total, b),
                    bench.label, 1.0, True, limits=limits, share_target=share)]  # fmt: skip

    return case


def rounded(bench: Bench, seconds: float) -> list[Row]:
    """One stream with weights of 8 bits, against the same engine with this bench's type."""
    twin = copy.copy(bench)
    twin.engine = Engine(device=bench.device, dtype="int8")
    twin.engine.load_base(str(bench.base))
    twin.engine.open_sampler("s", str(bench.base), directory=bench.adapter)
    size = twin.engine._base(str(bench.base)).base.nbytes
    prompts = prompts_of([16], bench.vocab)
    a, b, limits = in_turns(
        (
            lambda: ask(twin, prompts, 1, 32),
            lambda: ask(bench, prompts, 1, 32),
            lambda: machine.read_bandwidth(size, bench.device) / size,
        ),
        seconds,
    )
    case = f"decoding, streams: 1, weights int8; against ours with {bench.dtype}"
    return [Row(case, "tok/s", speeds(32, a), speeds(32, b), bench.name, 1.0, True,
                limits=limits)]  # fmt: skip


def shared_prompt(bench: Bench, seconds: float) -> list[Row]:
    """16 samples of one 512-token prompt, against generate prompt by prompt."""
    [prompt] = prompts_of([512], bench.vocab)
    a, b = in_turns(
        (
            lambda: ask(bench, [prompt], 16, 64),
            lambda: bench.reference.call("generate_one_by_one", prompt, 16, 64),
        ),
        seconds,
    )
    return [Row("16 samples of a 512-token prompt", "tok/s", speeds(1024, a), speeds(1024, b),
                bench.label, 4.0, True)]  # fmt: skip


def prompt_logprobs(bench: Bench, seconds: float) -> list[Row]:
    """Log-probabilities of prompts of 256 tokens, against transformers one by one."""
    count = 64 if bench.name == "tiny" else 8
    prompts = prompts_of([256] * count, bench.vocab)
    a, b, limits = in_turns(
        (
            lambda: ask(bench, prompts, 1, 1, prompt_logprobs=True),
            lambda: bench.reference.call("prompt_logprobs", prompts),
            bench.reading_limit,
        ),
        seconds,
    )
    total = 256 * count
    return [Row("prompt log-probabilities", "tok/s", speeds(total, a), speeds(total, b),
                bench.label, 1.0, True, limits=limits, share_target=READING_SHARE)]  # fmt: skip


def adapters_together(bench: Bench, seconds: float) -> list[Row]:
    """8 adapters sampled together, against one doing the same work."""
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    names = []
    for i in range(8):
        directory = folder / str(i)
        directory.mkdir()
        bench.engine.create_model("temporary", str(bench.base), bench.lora, seed=i)
        bench.engine._models["temporary"].weights.normal_(0, 0.02)
        bench.engine.save("temporary", directory, optimizer=False)
        bench.engine.unload("temporary")
        names.append(f"mixed{i}")
        bench.engine.open_sampler(names[-1], str(bench.base), directory=directory)
    prompts = prompts_of([64] * 64, bench.vocab)
    length = 64 if bench.name == "tiny" else 16
    a, b = in_turns(
        (lambda: ask(bench, prompts, 1, length, names), lambda: ask(bench, prompts, 1, length)),
        seconds,
    )
    for name in names:
        bench.engine.close_sampler(name)
    total = 64 * length
    return [Row("8 adapters sampled together, against one", "tok/s", speeds(total, a),
                speeds(total, b), bench.label, 0.9, True)]  # fmt: skip


def continuous(bench: Bench, seconds: float, *, count: int = 200) -> list[Row]:
    """Requests of different lengths arriving over time, against one after another.

    They arrive three times as fast as one after another could answer them. What that would give
    for the same arrivals is computed from the time that each takes alone.
    """
    rng = np.random.default_rng(0)
    prompts = prompts_of(rng.integers(8, 200, count).tolist(), bench.vocab)
    lengths = rng.integers(8, 64, count).tolist()
    alone = [_seconds(lambda i=i: ask(bench, [prompts[i]], 1, lengths[i])) for i in range(count)]
    arrivals = np.arange(count) * sum(alone) / (3 * count)
    ends: list[float] = []
    for arrival, taken in zip(arrivals, alone):
        ends.append(max(arrival, ends[-1] if ends else 0.0) + taken)
    ours = _arriving(bench, prompts, lengths, arrivals)
    total = sum(lengths)
    a, b = (float(np.median(np.array(e) - arrivals)) for e in (ours, ends))
    return [
        Row("200 requests arriving, against one after another", "tok/s", [total / max(ours)],
            [total / max(ends)], bench.label, 2.0, True),
        Row("their median latency", "ms", [1e3 * a], [1e3 * b], bench.label, 1.0),
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


def latency(bench: Bench, seconds: float) -> list[Row]:
    """One 8-token sample alone; creating a model; against the time that each may take."""
    prompts = prompts_of([32], bench.vocab)

    def create() -> None:
        bench.engine.create_model("created", str(bench.base), bench.lora, seed=0)
        bench.engine.unload("created")

    a, b = in_turns((lambda: ask(bench, prompts, 1, 8), create), seconds)
    return [
        Row("one 8-token sample alone, against the time allowed", "ms", [1e3 * s for s in a],
            [40.0], bench.label, 1.0),
        Row("create a LoRA model, against the time allowed", "ms", [1e3 * s for s in b], [300.0],
            bench.label, 1.0),
    ]  # fmt: skip


def memory(count: int, size: int, case: str) -> Callable[[Bench, float], list[Row]]:
    """Peak resident memory of a process that loads the model, and then takes one step over *count*
    chats, which the other side pads *size* at a time."""

    def measured(bench: Bench, seconds: float) -> list[Row]:
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.engine",
             str(bench.base), str(bench.adapter), bench.dtype, str(count)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        reference = Reference(bench.base, bench.adapter, bench.dtype)
        loaded = reference.call("peak")
        reference.call("step", chats(count, bench.vocab), size)
        theirs = {"loaded": loaded, "stepped": reference.call("peak")}
        reference.close()
        ours = json.loads(done.stdout.splitlines()[-1])
        return [
            Row(f"peak memory, {name}", "MiB", [ours[at] / 2**20], [theirs[at] / 2**20],
                bench.label, wanted)
            for at, name, wanted in (("loaded", "model loaded", None), ("stepped", case, 0.5))
        ]  # fmt: skip

    return measured


def _measure_memory(base: str, adapter: str, dtype: str, count: str) -> None:
    """Print the peaks of this process as JSON."""
    engine = Engine(dtype=dtype)
    engine.load_base(base)
    loaded = peak_memory()
    config = types.LoraConfig(rank=RANK, **FLAGS)
    engine.create_model("m", base, config, seed=0, adapter=Path(adapter))
    data = data_of(chats(int(count), engine._base(base).base.vocab))
    drive(engine.forward_backward("m", data, "cross_entropy", None))
    engine.optim_step("m", LEARN)
    print(json.dumps({"loaded": loaded, "stepped": peak_memory()}))


Case = Callable[[Bench, float], list[Row]]

#: Measured of every model and type.
CASES: dict[str, Case] = {
    "training": training,
    "training_equal": training_equal,
    "decoding_1": decoding(1),
    "decoding_16": decoding(16),
    "decoding_64": decoding(64),
    "prompt_logprobs": prompt_logprobs,
    "adapters_together": adapters_together,
    "adapters_in_turn": adapters_in_turn,
}
#: What is measured on an accelerator. Weights of 8 bits and resident memory are of a CPU only.
CASES_OF_GPU: dict[str, Case] = {
    "training": training,
    "training_equal": training_equal,
    **{f"decoding_{streams}": decoding(streams) for streams in (1, 8, 64, 256)},
}
#: Measured of one model and type only; those of the tiny one say something of the scheduling.
MORE: dict[tuple[str, str], dict[str, Case]] = {
    ("smollm2", "float32"): {"memory": memory(8, 8, "a step over 8 chats")},
    ("smollm2", "bfloat16"): {
        "memory": memory(8, 8, "a step over 8 chats"),
        "rounded": rounded,
    },
    ("tiny", "float32"): {
        "shared_prompt": shared_prompt,
        "continuous": continuous,
        "latency": latency,
        "memory": memory(133, 16, "16k tokens in a request"),
    },
}


def run(
    seconds: float,
    models: Sequence[str] = tuple(MODELS),
    dtypes: Sequence[str] = (),
    cases: Sequence[str] = (),
    device: str = "cpu",
) -> tuple[list[Row], list[str]]:
    """All rows, printed as they come, and the names of what there was no time for.

    Args:
        dtypes: of every model; default `DTYPES_OF` it on a CPU, all on another device.
    """
    folder = Path(tempfile.mkdtemp(prefix="tinkex-bench-"))
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    rows: list[Row] = []
    left_out: list[str] = []
    usual = DTYPES_OF if device == "cpu" else dict.fromkeys(MODELS, DTYPES)
    pairs = [(name, dtype) for name in models for dtype in dtypes or usual[name]]
    parts = sum(MODELS[name] for name, _ in pairs)
    end = time.perf_counter() + seconds
    try:
        for name, dtype in pairs:
            given = (end - time.perf_counter()) * MODELS[name] / parts
            parts -= MODELS[name]
            bench = Bench(name, folder, dtype, device)
            _run_cases(bench, given, cases, rows, left_out)
            bench.close()
    finally:
        shutil.rmtree(folder)
    return rows, left_out


def _run_cases(
    bench: Bench, seconds: float, cases: Sequence[str], rows: list[Row], left_out: list[str]
) -> None:
    known = {**CASES, **MORE.get((bench.name, bench.dtype), {})}
    if bench.device != "cpu":
        known = CASES_OF_GPU
    wanted = [case for case in known if not cases or case in cases]
    allowance = Allowance(seconds, len(wanted))
    for case in wanted:
        given = allowance.next()
        if not given:
            left_out.append(f"{case} of {bench.label}")
            continue
        found = known[case](bench, given)
        rows += found
        for row in found:
            print(f"{row.key:70} ratio {row.ratio}   share {row.share}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TINKEX_LOG", "warning")
    _measure_memory(*sys.argv[1:])
