"""Attention over packed sequences by a kernel for them, which a stand-in computes on the CPU."""

from __future__ import annotations

import pytest
import torch

from tinkex.engine import varlen_attention
from tinkex.engine.attention import PackedAttention, Packing, attention
from tinkex.engine.spec import Spec

CPU = torch.device("cpu")

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="runs torch's kernel, and there is no CUDA here"
)


def stand_in(q, k, v, bounds, longest, scale, window):
    """The same numbers, sequence by sequence."""
    assert max(bounds.diff().tolist()) == longest
    outs = []
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:]):
        own = [x[start:stop].transpose(0, 1)[None] for x in (q, k, v)]
        outs.append(attention(*own, scale, window=window)[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("windows", [(), (4, 0)])
def test_outputs_and_gradients_are_those_of_padded_attention(windows, monkeypatch):
    spec = Spec(2, 32, 4, 2, 8, 48, 100, 256, 1e-5, windows=windows, attention_scale=0.3)
    packing = Packing([30, 9, 8, 1], CPU)
    qkv, dout = torch.randn(packing.rows, spec.qkv), torch.randn(packing.rows, 32)
    for layer in range(2):
        found = []
        for kernel in (None, stand_in):
            monkeypatch.setattr(varlen_attention, "kernel_for", lambda *_, kernel=kernel: kernel)
            packed = PackedAttention(packing, spec)
            out, saved = packed.forward(layer, qkv, save=True)
            found.append((out, packed.backward(dout, saved), packed.forward(layer, qkv)[0]))

        assert isinstance(saved, varlen_attention.Saved)
        for one, other in zip(*found):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_a_kernel_with_other_numbers_is_not_used():
    """One that does not attend, and one that counts windows otherwise."""

    def wider(q, k, v, bounds, longest, scale, window):
        return stand_in(q, k, v, bounds, longest, scale, window + 2 if window else 0)

    def not_at_all(q, k, v, *_):
        return q + 0 * (k.sum() + v.sum())

    assert varlen_attention.agrees(stand_in, CPU, torch.float32, 16)
    assert varlen_attention.agrees(stand_in, CPU, torch.bfloat16, 16)
    assert not varlen_attention.agrees(wider, CPU, torch.float32, 16)
    assert not varlen_attention.agrees(not_at_all, CPU, torch.float32, 16)


def test_a_cpu_has_none():
    assert varlen_attention.kernel_for(CPU, torch.bfloat16, 64) is None


@needs_cuda
def test_cuda_gives_what_padded_attention_gives():
    device = torch.device("cuda")

    assert varlen_attention.agrees(varlen_attention.torch_kernel, device, torch.bfloat16, 64)
