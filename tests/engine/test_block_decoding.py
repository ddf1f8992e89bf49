"""
Decoding in blocks against the loop that takes one token at a time: the same answers.

Both run on the CPU, in float32; recording of steps is played by a fake, whose rules are those of
CUDA graphs. The tests that need CUDA compare it with the CPU.
"""

from __future__ import annotations

import contextlib
import itertools

import attrs
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import hf_reference as hf
from tinkex import types
from tinkex.engine import block_decoding, long_prompts
from tinkex.engine.engine import Engine

FAMILIES = ["llama", "gemma2", "phi3"]

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="compares CUDA with the CPU, and there is no CUDA here"
)


class HostReads(TorchDispatchMode):
    """Fails where a program waits for a number of the device."""

    READS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.is_nonzero.default,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in self.READS, f"the host reads what {func} gives"
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            came_from = {a.device.type for a in args if isinstance(a, torch.Tensor) and a.dim()}
            assert came_from <= {out.device.type}, f"{func} copies to {out.device}"
        return out


class FakeCapture:
    """Records a step by keeping it; watches that it reads nothing when it is replayed.

    Watching takes longer than the step. A replay does what the last one did, so after the first
    two, every fifth is watched.
    """

    def __init__(self):
        self.warmed = self.recorded = self.replayed = 0

    def warm_up(self, step):
        self.warmed += 1
        step()

    def record(self, step):
        self.recorded += 1
        numbers = itertools.count()

        def replay():
            self.replayed += 1
            number = next(numbers)
            with HostReads() if number < 2 or number % 5 == 0 else contextlib.nullcontext():
                step()

        return replay


class Models:
    """One base model with two adapters and the bare base, in an engine of each kind."""

    def __init__(self, folder, kind, *, device="cpu", dtype="auto", capture=None):
        base = hf.make_base(folder / "base", kind)
        adapters = {
            "a": hf.make_adapter(base, folder / "a", rank=8),
            "b": hf.make_adapter(base, folder / "b", rank=3),
        }
        self.plain = self._engine(base, adapters, Engine(device="cpu", threads=1, dtype=dtype))
        blocks = Engine(device=device, threads=1, dtype=dtype, in_blocks=True)
        blocks._capture = capture or blocks._capture
        self.blocks = self._engine(base, adapters, blocks)
        [self.sampler] = [loaded.sampler for loaded in self.blocks._bases.values()]

    @staticmethod
    def _engine(base, adapters, engine):
        engine.load_base(str(base))
        engine.open_sampler("base", str(base))
        for name, adapter in adapters.items():
            engine.open_sampler(name, str(base), directory=adapter)
        return engine

    def compare(self, requests, close=1e-4):
        """Answers of both engines to (sampler, request) pairs, all asked at once."""
        expected, actual = hf.ask(self.plain, *requests), hf.ask(self.blocks, *requests)
        for mine, theirs in zip(actual, expected):
            for one, other in zip(mine.sequences, theirs.sequences):
                assert list(other.tokens) == list(one.tokens)
                assert other.stop_reason == one.stop_reason
                np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=close)
        return actual, expected


def told(engine, asked):
    """The tokens of a request that are reported as they come."""
    seen = []
    engine.submit_sample("t", "a", asked, on_token=lambda i, token, logprob: seen.append(token))
    hf.sample_all(engine)
    return seen


def request(length=7, *, num_samples=1, start=1, more=None, **params):
    settings = {"max_tokens": 21, "seed": 7, "stop": [], "temperature": 0.0, **params}
    tokens = [(start + 13 * i) % 250 for i in range(length)]
    return types.SampleRequest(
        types.ModelInput.from_ints(tokens),
        types.SamplingParams(**settings),
        num_samples=num_samples,
        **(more or {}),
    )


@pytest.fixture(scope="module", params=FAMILIES)
def models(request, tmp_path_factory):
    return Models(tmp_path_factory.mktemp(request.param), request.param, capture=FakeCapture())


#: Every way to choose a token.
CHOICES = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "seed": 3},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 0.9, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.0, "top_k": 200},
]


def test_tokens_are_those_of_the_loop_alone(models):
    """Also over the end of a row of the cache, at 128 positions, and of any window."""
    for choice in CHOICES:
        models.compare([("a", request(120, **choice))])


def test_tokens_are_those_of_the_loop_in_company(models):
    """Of several adapters and the bare base, of all lengths, all ways to choose, and limits."""
    requests = [
        (("a", "base", "b")[i % 3], request(3 + 17 * i, start=i, max_tokens=1 + 5 * i, **choice))
        for i, choice in enumerate(CHOICES)
    ]
    requests += [("b", request(30, num_samples=5, temperature=1.0, seed=s)) for s in (1, 2)]

    models.compare(requests)


def test_stop_tokens_strings_and_the_end_of_the_text(models):
    """Wherever in a block they come."""
    [free], _ = models.compare([("a", request(9, temperature=1.0, max_tokens=40))])
    tokens = list(free.sequences[0].tokens)
    for at in (0, 1, 7, 8, 9, 23):
        first = tokens.index(tokens[at])
        [ended], _ = models.compare(
            [("a", request(9, temperature=1.0, max_tokens=40, stop=[tokens[at]]))]
        )
        assert "stop" == ended.sequences[0].stop_reason
        assert tokens[: first + 1] == list(ended.sequences[0].tokens)
    models.compare([("a", request(9, temperature=1.0, max_tokens=40, stop=list(range(40))))])
    models.compare([("base", request(240, max_tokens=None))])  # 256 positions are all


def test_a_stop_string_ends_a_text_and_the_surplus_is_cut_off(models):
    """The host finds it a block late; nothing behind it is returned or reported."""
    decode = models.plain._bases[next(iter(models.plain._bases))].sampler
    decode._read_decoder()
    [free] = hf.ask(models.plain, *[("a", request(9, temperature=1.0, max_tokens=40))])
    tokens = list(free.sequences[0].tokens)
    for at in (2, 8, 17):
        text = decode._decode(tokens[at : at + 1])
        if not text.strip("\ufffd"):
            continue
        asked = request(9, temperature=1.0, max_tokens=40, stop=[text])
        [ended], _ = models.compare([("a", asked)])
        assert "stop" == ended.sequences[0].stop_reason

        assert list(ended.sequences[0].tokens) == told(models.blocks, asked)


def test_the_likeliest_tokens_are_reported(models):
    asked = [
        ("a", request(9, temperature=1.0, more={"topk_sample_logprobs": 3})),
        ("b", request(12, more={"topk_sample_logprobs": 7}, max_tokens=30)),
        ("b", request(12, start=5)),
    ]

    for mine, theirs in zip(*models.compare(asked)):
        one, other = mine.sequences[0].topk_logprobs, theirs.sequences[0].topk_logprobs
        assert (one is None) == (other is None)
        for here, there in zip(one or (), other or ()):
            assert [token for token, _ in there] == [token for token, _ in here]
            np.testing.assert_allclose(
                [logprob for _, logprob in here], [logprob for _, logprob in there], atol=1e-4
            )


def test_rows_join_and_leave_while_others_run(models):
    """A request that comes in the middle, and one that is cancelled, change no one's tokens."""
    first = request(40, temperature=1.0, max_tokens=60)
    late = request(20, start=3, temperature=1.0, max_tokens=30, num_samples=3)
    expected = hf.ask(models.plain, *[("a", first), ("b", late)])
    engine, seen = models.blocks, []
    engine.submit_sample("first", "a", first, on_token=lambda i, t, lp: seen.append(t))
    engine.submit_sample("gone", "b", request(30, max_tokens=60))
    results = {}
    for _ in range(3):
        results.update(engine.sample_step())
    assert 0 < len(seen) < 60, "the first runs when the second comes"
    engine.submit_sample("late", "b", late)
    engine.cancel_sample("gone")

    results.update(hf.sample_all(engine))

    assert {"first", "late"} == set(results)
    for ticket, other in zip(("first", "late"), expected):
        for one, wanted in zip(results[ticket].sequences, other.sequences):
            assert list(wanted.tokens) == list(one.tokens)
    assert list(expected[0].sequences[0].tokens) == seen


def test_long_prompts_are_read_in_pieces_between_blocks(models, monkeypatch):
    """While others run; all samples of the prompt then have its keys and values."""
    monkeypatch.setitem(long_prompts.PREFILL_TOKENS, "cpu", 16)
    monkeypatch.setattr(long_prompts, "LEAST_PIECE", 8)

    models.compare(
        [
            ("a", request(9, temperature=1.0, max_tokens=60)),
            ("b", request(200, temperature=1.0, num_samples=3)),
        ]
    )


def test_a_read_by_the_host_is_noticed():
    """By what watches the steps above."""
    with HostReads(), pytest.raises(AssertionError, match="the host reads"):
        bool(torch.ones(1) > 0)


def test_what_was_put_back_is_computed_again_to_the_same_tokens(models):
    """A share that has all rows gives half of them back to one that comes later."""
    many = request(5, temperature=1.0, num_samples=256, max_tokens=40)
    other = request(8, temperature=1.0, num_samples=100, max_tokens=10, start=9)
    expected = hf.ask(models.plain, *[("base", many), ("a", other)])
    engine, released = models.blocks, []
    preempt = models.sampler._preempt
    models.sampler._preempt = lambda *args: (released.append(args[0]), preempt(*args))
    engine.submit_sample(0, "base", many, share="one")
    results = {}
    for _ in range(3):
        results.update(engine.sample_step())
    engine.submit_sample(1, "a", other, share="two")
    results.update(hf.sample_all(engine))
    models.sampler._preempt = preempt

    assert released
    for i, wanted in enumerate(expected):
        for one, theirs in zip(results[i].sequences, wanted.sequences):
            assert list(theirs.tokens) == list(one.tokens)


def test_a_step_that_fails_ends_no_other_request(models, monkeypatch):
    """All rows are computed again, and what was under way is dropped."""
    asked = [("a", request(9, temperature=1.0)), ("b", request(12, temperature=1.0))]
    expected, fails = hf.ask(models.plain, *asked), [True]
    step = block_decoding.BlockDecoding._step

    def broken(self, *args):
        if fails:
            fails.clear()
            raise RuntimeError("the device is out of order")
        step(self, *args)

    monkeypatch.setattr(block_decoding.BlockDecoding, "_step", broken)
    actual = hf.ask(models.blocks, *asked)

    for one, other in zip(actual, expected):
        assert list(other.sequences[0].tokens) == list(one.sequences[0].tokens)


def test_steps_are_recorded_once_and_replayed(tmp_path):
    """One shape: a step as it is, a recording, and replays of it from then on."""
    capture = FakeCapture()
    models = Models(tmp_path, "llama", capture=capture)

    models.compare([("a", request(9, max_tokens=50))])
    once = capture.warmed, capture.recorded
    models.compare([("b", request(20, max_tokens=50))])

    assert (1, 1) == once == (capture.warmed, capture.recorded)
    assert 2 * 49 - 1 == capture.replayed


def test_recordings_that_read_replaced_buffers_are_dropped(tmp_path):
    """More rows, more adapters or more stop tokens need larger buffers, at other addresses."""
    capture = FakeCapture()
    models = Models(tmp_path, "llama", capture=capture)
    for asked in (
        [("a", request())],
        [("a", request()), ("b", request(start=4))],
        [("a", request(start=i)) for i in range(20)],
        [("a", request(stop=list(range(200, 230))))],
    ):
        models.compare(asked)
        state = models.sampler._state
        there = {slab.number for slab in state._cache}
        kept = list(state._graphs._replays)

        assert kept
        assert all(number in there for shape in kept for number, _ in shape.parts)
        assert {state._slots.version} == {shape.adapters for shape in kept}
        assert {state._on_device.stops} == {shape.stops for shape in kept}

    models.blocks.free_idle()
    assert 0 == len(models.sampler._state._graphs)


@pytest.mark.parametrize("kind", FAMILIES)
def test_16_bit_blocks_stay_as_close_as_the_loop_does(kind, tmp_path):
    """Log-probabilities of greedy tokens, of both paths against float32."""
    models = Models(tmp_path, kind, dtype="bfloat16", capture=FakeCapture())
    asked = [("a", request(20, max_tokens=1 + n)) for n in (1, 12)] + [("base", request(30))]
    for one, other in zip(hf.ask(models.blocks, *asked), hf.ask(models.plain, *asked)):
        mine, theirs = one.sequences[0], other.sequences[0]
        same = int((np.equal(mine.tokens, theirs.tokens)).cumprod().sum())  # until a near tie
        assert same >= 2
        np.testing.assert_allclose(mine.logprobs[:same], theirs.logprobs[:same], atol=0.1)


def test_a_step_reads_no_number_of_the_device(tmp_path, monkeypatch):
    """With tensors of the device "meta", which have shapes but no numbers to read."""
    models = Models(tmp_path, "gemma2")
    shapes = []
    step = block_decoding.BlockDecoding._step

    def watched(self, shape, slabs):
        shapes.append((shape, slabs))
        step(self, shape, slabs)

    monkeypatch.setattr(block_decoding.BlockDecoding, "_step", watched)
    more = {"topk_sample_logprobs": 2}
    asked = [("a", request(9, temperature=1.0, top_p=0.5, more=more)), ("b", request(200, top_k=4))]
    hf.ask(models.blocks, *asked)
    state = models.sampler._state
    _to_meta(state)
    with torch.no_grad():
        for shape, slabs in dict(shapes).items():
            with HostReads():
                step(state, shape, [_to_meta(slab) for slab in slabs])

    with pytest.raises(RuntimeError):  # what such a read comes to
        bool(state._on_device.at)


def _to_meta(value, seen=None):
    """*value* with every tensor in it moved to the device "meta", in place."""
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, (tuple, list)):
        return type(value)(_to_meta(item, seen) for item in value)
    if isinstance(value, dict):
        return {key: _to_meta(item, seen) for key, item in value.items()}
    if type(value).__module__.startswith("tinkex.engine") and not callable(value):
        seen[id(value)] = value
        names = getattr(value, "__dict__", None) or [a.name for a in attrs.fields(type(value))]
        for name in list(names):
            object.__setattr__(value, name, _to_meta(getattr(value, name), seen))
    return value


@needs_cuda
@pytest.mark.parametrize("kind", FAMILIES)
def test_cuda_gives_the_tokens_of_the_cpu(kind, tmp_path):
    """With recorded steps, in float32."""
    models = Models(tmp_path, kind, device="cuda", dtype="float32")
    requests = [
        (("a", "base", "b")[i % 3], request(3 + 17 * i, max_tokens=40, **choice))
        for i, choice in enumerate(CHOICES)
    ]

    models.compare(requests, close=1e-3)

    assert len(models.sampler._state._graphs)
