"""Attention over packed sequences: windows and caps, against torch's own derivative."""

from __future__ import annotations

import pytest
import torch

from tinkex.engine import attention as module
from tinkex.engine.attention import attention


def dense(q, k, v, scale, cap, window):
    """All products at once, in plain torch."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    products = q @ k.transpose(2, 3) * scale
    if cap:
        products = cap * torch.tanh(products / cap)
    at = torch.arange(q.shape[2])
    seen = (at <= at[:, None]) & (at > at[:, None] - (window or len(at)))
    return products.masked_fill(~seen, -torch.inf).softmax(dim=3) @ v


@pytest.mark.parametrize("block", [1, 10**9], ids=["many blocks", "one block"])
@pytest.mark.parametrize(("cap", "window"), [(0.0, 0), (2.0, 0), (0.0, 5), (2.0, 5), (2.0, 200)])
def test_capped_and_windowed_attention_and_its_derivative(cap, window, block, monkeypatch):
    """Whatever the size of the blocks; grouped heads; layouts as the fused matrix gives them."""
    monkeypatch.setattr(module, "BLOCK_PRODUCTS", {"cpu": block})
    monkeypatch.setattr(module, "LEAST_QUERIES", 7)
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(3, 40, heads, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    ]
    inputs = [leaf.transpose(1, 2) for leaf in leaves]
    weights = torch.randn(3, 4, 40, 8, generator=generator, dtype=torch.float64)

    actual, expected = (f(*inputs, 0.5, cap, window) for f in (attention, dense))

    torch.testing.assert_close(actual, expected, check_dtype=False, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad((out * weights).sum(), leaves) for out in (actual, expected)]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_attention_repeats_key_heads_over_query_heads():
    """Grouped queries (Ainslie et al. 2023): heads 0, 1 read key head 0, heads 2, 3 read 1."""
    q, k, v = (torch.randn(1, heads, 5, 8) for heads in (4, 2, 2))

    actual = attention(q, k, v, 8**-0.5)

    every = [t.repeat_interleave(2, dim=1) for t in (k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(q, *every, is_causal=True)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("rows", [20, 300], ids=["one block", "several blocks"])
def test_bfloat16_rounds_weights_and_values_but_not_the_products_that_softmax_reads(rows):
    """A product of 20 that is rounded to 8 bits changes its weight by up to 6 %."""
    generator = torch.Generator().manual_seed(0)
    leaves = [
        (size * torch.randn(2, rows, heads, 64, generator=generator)).bfloat16().requires_grad_()
        for heads, size in ((6, 2), (2, 2), (2, 1))
    ]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    weights = torch.randn(2, 6, rows, 64, generator=generator).bfloat16()

    out = attention(*(leaf.transpose(1, 2) for leaf in leaves), 0.125)
    expected = dense(*(leaf.transpose(1, 2) for leaf in exact), 0.125, 0, 0)

    ours = [out, *torch.autograd.grad(out, leaves, weights)]
    theirs = [expected, *torch.autograd.grad(expected, exact, weights.double())]
    errors = [float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(ours, theirs)]
    assert out.dtype == torch.bfloat16
    assert max(errors[0], errors[3]) < 0.004  # out and values; rounded products: 0.006 and more
    assert max(errors) < 0.008  # rounded products: 0.01
