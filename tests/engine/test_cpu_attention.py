"""Compiled attention and its derivative, against all products at once in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinkex.engine import cpu_attention, cpu_kernels
from tinkex.engine.cpu_attention import Settings
from tinkex.engine.engine import Engine

pytestmark = pytest.mark.skipif(
    cpu_kernels.load_attention() is None, reason="this machine has no C compiler for attention"
)

TYPES = [torch.float32, torch.bfloat16]

#: Of one token, of less and more than a block of queries, and of keys; none fills a tile.
LENGTHS = [1, 5, 95, 97, 193, 401]


def _bounds(lengths):
    return np.append(0, np.cumsum(lengths))


def _inputs(lengths, settings, dtype):
    generator = torch.Generator().manual_seed(0)
    columns = (
        settings.heads * settings.size,
        (settings.heads + 2 * settings.kv_heads) * settings.size,
    )
    return [torch.randn(sum(lengths), c, generator=generator).to(dtype) for c in columns]


def _ours(lengths, settings, dout, qkv):
    kernel = cpu_kernels.load_attention()
    out, saved = cpu_attention.forward(kernel, qkv, _bounds(lengths), settings)
    return out, cpu_attention.backward(kernel, dout, saved)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        Settings(4, 4, 32, 0.2),
        Settings(9, 3, 64, 0.125),
        Settings(2, 1, 16, 0.25, cap=2.0),
        Settings(4, 2, 48, 0.2, window=30),
        Settings(2, 2, 96, 0.2, cap=2.0, window=200),
    ],
    ids=["heads", "groups", "cap", "window", "cap and wide window"],
)
def test_attention_and_its_derivative(settings, dtype):
    dout, qkv = _inputs(LENGTHS, settings, dtype)

    actual = _ours(LENGTHS, settings, dout, qkv)

    expected = cpu_attention._by_torch(qkv.double(), dout.double(), _bounds(LENGTHS), settings)
    error = {torch.float32: 2e-6, torch.bfloat16: 4e-3}[dtype]
    for ours, exact in zip(actual, expected):
        assert float((ours - exact).norm()) < error * float(exact.norm())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_sequence_has_the_same_results_in_any_company_and_with_any_number_of_threads(dtype):
    settings = Settings(4, 2, 32, 0.2)
    dout, qkv = _inputs(LENGTHS, settings, dtype)
    together = _ours(LENGTHS, settings, dout, qkv)
    threads = torch.get_num_threads()

    torch.set_num_threads(1)
    parts = [
        _ours([len(d)], settings, d, x) for d, x in zip(dout.split(LENGTHS), qkv.split(LENGTHS))
    ]
    torch.set_num_threads(threads)

    for whole, own in zip(together, zip(*parts)):
        assert torch.equal(whole, torch.cat(own))


def test_numbers_that_are_not_finite_are_seen_in_their_sequence_alone():
    settings = Settings(1, 1, 16, 1.0)
    dout, qkv = _inputs([20, 20], settings, torch.float32)
    qkv[25] = torch.nan

    out, dqkv = _ours([20, 20], settings, dout, qkv)

    assert out[:20].isfinite().all() and dqkv[:20].isfinite().all()
    assert out[25:].isnan().all() and dqkv[25:].isnan().any()


def test_wrong_numbers_are_noticed():
    right = cpu_kernels.load_attention()

    def wrong(arguments):
        right(arguments)
        at = arguments["dqkv"][0]
        if at:
            (cpu_kernels.ctypes.c_float * 1000).from_address(int(at))[:] = [0.5] * 1000

    assert cpu_attention.agrees_with_torch(right, torch.float32)
    assert not cpu_attention.agrees_with_torch(wrong, torch.float32)


def test_the_engine_attends_in_compiled_code_unless_it_is_told_not_to():
    for compiled in (True, False):
        engine = Engine(device="cpu", compiled=compiled)
        engine.load_base("tiny")
        assert compiled == (engine._base("tiny").base.attention is not None)


def test_heads_that_fill_no_vector_are_torchs():
    cpu = torch.device("cpu")
    assert cpu_attention.kernel_for(cpu, torch.float32, 32) is not None
    assert cpu_attention.kernel_for(cpu, torch.float32, 40) is None
    assert cpu_attention.kernel_for(cpu, torch.float64, 32) is None
