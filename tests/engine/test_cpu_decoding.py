"""The compiled step against torch: every family, types of weights, adapters, company, threads."""

from __future__ import annotations

import logging

import attrs
import numpy as np
import pytest
import torch
import transformers

from tests.support import hf_reference as hf
from tinkex.engine import cpu_decoding, cpu_kernels, finished_lora, int8, loading, lora
from tinkex.engine.base_model import Prompt
from tinkex.engine.cpu_parallel import Workers, set_threads
from tinkex.engine.fast_path import FastSampling
from tinkex.engine.kv_cache import SinglePool

pytestmark = pytest.mark.skipif(
    cpu_kernels.load() is None, reason="this machine has no C compiler for the step"
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=hf.CONFIGS)
def base(request, tmp_path_factory):
    directory = hf.make_base(tmp_path_factory.mktemp(request.param) / "base", request.param)
    return loading.load(str(directory), CPU).base


@pytest.fixture(scope="module")
def tiny():
    return loading.load("tiny", CPU).base


def _adapter(base, rank, seed, *, dtype=torch.float32, **reach):
    layout = lora.Layout(base.linears, lora.Shape(rank, **reach))
    flat = torch.empty(layout.size).normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    return finished_lora.Finished(layout, flat, dtype)


def _prompts(base, adapters, *, seed=0, longest=60):
    """Single samples and groups of several that share a prompt, by turns of these adapters."""
    rng = np.random.default_rng(seed)
    prompts, row = [], 0
    for i, count in enumerate([1, 3, 1, 1, 2, 5, 1, 1, 1, 4]):
        tokens = rng.integers(0, base.vocab, rng.integers(1, longest)).astype(np.int32)
        rows = list(range(row, row + count))
        prompts.append(Prompt(tokens, adapters[i % len(adapters)], [rows]))
        row += count
    return prompts


@torch.no_grad()
def _steps(base, prompts, compiled, *, steps=4, removed=(2, 7), seed=3):
    """Logits of all sequences over some steps, two of which end after the first."""
    state = FastSampling(base, Workers(1), compiled=compiled)
    state.begin(prompts, None)
    lengths = {row: len(p.tokens) for p in prompts for group in p.rows for row in group}
    rng, found = np.random.default_rng(seed), []
    for step in range(steps):
        tokens = rng.integers(0, base.vocab, len(lengths) + len(removed)).astype(np.int64)
        positions = np.zeros_like(tokens)
        for row, length in lengths.items():
            positions[row] = length + step
        rows, logits = state.advance(tokens, positions, dict.fromkeys(lengths), in_turn=False)
        found.append({int(row): own.clone() for row, own in zip(rows, logits)})
        if step == 0:
            for row in removed:
                state.remove(row)
                del lengths[row]
    return found


def _compare(actual, expected, **tolerance):
    assert [a.keys() for a in actual] == [e.keys() for e in expected]
    for ours, theirs in zip(actual, expected):
        for row in ours:
            torch.testing.assert_close(ours[row], theirs[row], **tolerance)


def test_every_family_comes_out_as_with_torch(base):
    """Norms, ropes, caps, windows, biases; several adapters of different rank and reach at once."""
    compiled = cpu_decoding.step_of(base)
    adapters = [_adapter(base, 8, 1), None, _adapter(base, 3, 2, train_mlp=False)]
    prompts = _prompts(base, adapters)

    actual, expected = (_steps(base, prompts, step) for step in (compiled, None))

    assert compiled is not None
    scale = max(1.0, max(float(own.abs().max()) for own in expected[0].values()))
    _compare(actual, expected, rtol=1e-4, atol=1e-5 * scale)


@torch.no_grad()
def test_short_prompts_are_read_as_with_torch(base):
    """Each token as a sequence of its own; also prompts that nothing continues."""
    adapters = [_adapter(base, 8, 1), None, _adapter(base, 3, 2)]
    prompts = _prompts(base, adapters, longest=20)
    prompts[4] = attrs.evolve(prompts[4], rows=())
    states = [
        FastSampling(base, Workers(1), compiled=step) for step in (cpu_decoding.step_of(base), None)
    ]

    actual, expected = (state.begin(prompts, None) for state in states)

    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * scale)
    for ours, theirs in zip(states[0]._pools, states[1]._pools):
        assert ours.members == pytest.approx(theirs.members)


def test_long_texts_are_attended_to_in_pieces(tiny):
    """Prompts end within a piece and where one ends; so do their continuations."""
    compiled = cpu_decoding.step_of(tiny)
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(rng.integers(0, tiny.vocab, length).astype(np.int32), None, [rows])
        for length, rows in ((256, [0]), (255, [1, 2]), (700, [3, 4, 5]), (513, [6]), (1, [7]))
    ]

    actual, expected = (
        _steps(tiny, prompts, step, steps=3, removed=()) for step in (compiled, None)
    )

    _compare(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_window_begins_within_the_prompt_and_after_it(tiny):
    spec = attrs.evolve(tiny.spec, windows=(300, 5, 0, 256)[: tiny.spec.layers])
    narrow = attrs.evolve(tiny, spec=spec)
    prompts = _prompts(narrow, [None], longest=600)

    actual, expected = (
        _steps(narrow, prompts, step, steps=7) for step in (cpu_decoding.step_of(narrow), None)
    )

    _compare(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_sequence_comes_out_the_same_in_any_company_and_with_any_threads(dtype):
    """To the last bit: alone, with 21 others of three adapters, by one thread or three."""
    base = loading.load("tiny", CPU, dtype).base
    compiled = cpu_decoding.step_of(base)
    adapters = [_adapter(base, 5, 1, dtype=dtype), None, _adapter(base, 8, 2, dtype=dtype)]
    numbers, lengths = np.sort(np.arange(22) % 3), [1, 7, 300, 45, 256, 20] * 3 + [9, 11, 600, 2]
    pool = SinglePool(base.spec, CPU, dtype)
    for row, length in enumerate(lengths):
        pool.add(row, length)
        for layer in range(base.spec.layers):
            pool.fill(
                layer, row, *_random(2, length, base.spec.kv_heads, base.spec.head_dim, dtype)
            )
    pool.begin_step()
    x, at = base.embed(torch.arange(22)), torch.tensor(lengths)

    def logits(rows, threads):
        before = torch.get_num_threads()
        set_threads(threads)
        try:
            return compiled.logits(x[rows], at[rows], pool.spans()[rows], adapters, numbers[rows])
        finally:
            set_threads(before)

    everyone = logits(slice(None), 1)

    assert torch.equal(everyone, logits(slice(None), 3))
    for row in range(22):
        assert torch.equal(everyone[row : row + 1], logits(slice(row, row + 1), 2))
    assert torch.equal(everyone[5:9], logits(slice(5, 9), 2))


def _random(count, length, heads, size, dtype):
    return torch.randn(
        count, length, heads, size, generator=torch.Generator().manual_seed(length)
    ).to(dtype)


def test_bfloat16_is_as_exact_as_with_torch(tiny):
    """Against float32 of the same rounded weights, from the same keys and values."""
    narrow = loading.load("tiny", CPU, torch.bfloat16).base
    wide = _wide(narrow)
    prompts = _prompts(narrow, [_adapter(narrow, 8, 1, dtype=torch.bfloat16), None])
    exact_prompts = _prompts(wide, [_adapter(wide, 8, 1), None])

    exact = _steps(wide, exact_prompts, None)
    ours, torchs = (_steps(narrow, prompts, step) for step in (cpu_decoding.step_of(narrow), None))

    assert _error(ours, exact) < 1.05 * _error(torchs, exact)


def test_int8_is_as_exact_as_with_torch(tiny):
    narrow = loading.load("tiny", CPU, torch.bfloat16).base
    rounded = attrs.evolve(narrow, linears=int8.quantized(narrow.linears))
    adapters = [_adapter(narrow, 8, 1, dtype=torch.bfloat16), None]

    exact = _steps(_wide(rounded), _prompts(narrow, [_adapter(tiny, 8, 1), None]), None)
    ours, torchs = (
        _steps(rounded, _prompts(rounded, adapters), step)
        for step in (cpu_decoding.step_of(rounded), None)
    )

    assert _error(ours, exact) < 1.05 * _error(torchs, exact)


def _wide(base):
    """The same numbers in float32."""
    linears = {}
    for key, linear in base.linears.items():
        weight = linear.weight.float()
        if linear.scales is not None:
            weight = weight * linear.scales.float().unsqueeze(1)
        linears[key] = attrs.evolve(linear, weight=weight, scales=None)
    norms = tuple(
        attrs.evolve(
            own,
            before_attention=own.before_attention.float(),
            before_mlp=own.before_mlp.float(),
        )
        for own in base.norms
    )
    return attrs.evolve(
        base,
        embedding=base.embedding.float(),
        norms=norms,
        final_norm=base.final_norm.float(),
        linears=linears,
    )


def _error(found, exact):
    pairs = [(own[row], right[row]) for own, right in zip(found, exact) for row in own]
    return float(sum((a - b).norm() for a, b in pairs) / sum(b.norm() for _, b in pairs))


@pytest.mark.parametrize("mlp", [1030, 2100])
def test_long_rows_of_a_matrix_are_multiplied_in_parts(mlp, tmp_path, monkeypatch):
    """Longer than the columns of a tile, and no multiple of them."""
    config = lambda: transformers.LlamaConfig(**(hf.SIZES | {"intermediate_size": mlp}))  # noqa: E731
    monkeypatch.setitem(hf.CONFIGS, "long", config)
    base = loading.load(str(hf.make_base(tmp_path / "base", "long")), CPU).base
    prompts = _prompts(base, [_adapter(base, 8, 1), None])

    together, alone, expected = (
        _steps(base, own, step, removed=())
        for own, step in (
            (prompts, cpu_decoding.step_of(base)),
            (prompts[:1], cpu_decoding.step_of(base)),
            (prompts, None),
        )
    )

    _compare(together, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone[0][0], expected[0][0], rtol=1e-4, atol=1e-5)


def test_more_sequences_than_a_tile_takes(tiny):
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(rng.integers(0, tiny.vocab, 5).astype(np.int32), None, [[row]]) for row in range(131)
    ]

    actual, expected = (
        _steps(tiny, prompts, step, steps=2, removed=())
        for step in (cpu_decoding.step_of(tiny), None)
    )

    _compare(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_step_that_computes_wrong_numbers_is_not_used(caplog):
    """The message asks for a report."""
    right = cpu_kernels.load()

    def wrong(step):
        right(step)
        count = int(step["count"][0] * step["ld_logits"][0])
        at = int(step["logits"][0])
        numbers = (cpu_kernels.ctypes.c_float * count).from_address(at)
        numbers[3] += 1.0

    caplog.set_level(logging.WARNING, "tinkex")

    assert cpu_decoding.agrees_with_torch(right, torch.float32, torch.float32)
    assert not cpu_decoding.agrees_with_torch(wrong, torch.float32, torch.float32)
    assert "is not used: the results differ from PyTorch's" in caplog.text
    assert "Please report this with the version of your C compiler" in caplog.text


def test_what_the_step_does_not_know_is_left_to_torch(tiny):
    odd = attrs.evolve(tiny, spec=attrs.evolve(tiny.spec, activation="relu"))

    assert cpu_decoding.step_of(odd) is None
