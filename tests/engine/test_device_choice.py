"""Choices on the device against those of token_sampling.py: the same noise, the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinkex.engine import device_choice, token_sampling

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="computes with CUDA, and there is no CUDA here"
)


def settings(temperature, top_k, top_p, *, seed=0):
    n = len(temperature)
    keys = np.random.default_rng(seed).integers(0, 2**64, n, np.uint64)
    return token_sampling.Settings(
        keys,
        np.arange(n, dtype=np.int64),
        np.array(temperature, np.float32),
        np.array(top_k, np.int64),
        np.array(top_p, np.float32),
    )


def on_device(of, device="cpu"):
    return device_choice.RowSettings(
        torch.from_numpy(of.keys.view(np.int64)).to(device),
        torch.from_numpy(of.positions).to(device),
        torch.from_numpy(of.temperature).to(device),
        torch.from_numpy(of.top_k).to(device),
        torch.from_numpy(of.top_p).to(device),
    )


def check(logits, of, device="cpu"):
    choice = device_choice.choice_for(of.temperature, of.top_k, of.top_p, 0, logits.shape[1])
    expected, of_expected = token_sampling.choose(logits.clone(), of)
    tokens, logprobs = device_choice.choose(logits.to(device), on_device(of, device), choice)

    assert expected.tolist() == tokens.tolist()
    np.testing.assert_allclose(logprobs.cpu().numpy(), of_expected, rtol=0, atol=1e-4)


def test_noise_is_that_of_the_host_bit_by_bit():
    """Of keys in both halves of 64 bits, whose products wrap around."""
    rng = np.random.default_rng(1)
    edges = np.array([0, 2**63, 2**64 - 1], np.uint64)
    keys = np.concatenate([rng.integers(0, 2**64, 50, np.uint64), edges])
    positions = rng.integers(0, 10**6, len(keys))
    streams = np.arange(37)
    expected = token_sampling.gumbel(keys, positions, streams)

    actual = device_choice.gumbel(
        torch.from_numpy(keys.view(np.int64)),
        torch.from_numpy(positions),
        torch.from_numpy(streams),
    )

    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-13)


@pytest.mark.parametrize("vocab", [5, 257, 4096, 5000])
def test_every_way_to_choose(vocab):
    """Alone and mixed in one batch; over many rows, sharp and flat."""
    torch.manual_seed(vocab)
    n = 60
    for spread in (0.1, 3.0, 30.0):
        logits = torch.randn(n, vocab) * spread
        check(logits, settings([0.0] * n, [0] * n, [1.0] * n))
        check(logits, settings([1.0] * n, [0] * n, [1.0] * n))
        check(logits, settings([0.6] * n, [3] * n, [1.0] * n))
        check(logits, settings([1.4] * n, [0] * n, [0.8] * n))
        check(
            logits,
            settings(
                [0.0, 1.0, 0.5, 2.0, 1.0, 1e-5] * 10,
                [0, 0, 4, 200, 10**9, 1] * 10,
                [1.0, 1.0, 0.9, 0.3, 0.95, 1.0] * 10,
            ),
        )


def test_candidates_suffice_for_the_rows():
    """None where nothing is filtered; all for a top-p alone; else a power of two."""

    def look(temperature, top_k, top_p, vocab=50000):
        of = settings(temperature, top_k, top_p)
        return device_choice.choice_for(of.temperature, of.top_k, of.top_p, 0, vocab).look

    assert 0 == look([0.0, 1.0], [5, 0], [0.5, 1.0])
    assert 128 == look([1.0], [5], [1.0])
    assert 256 == look([1.0, 1.0], [129, 3], [0.1, 1.0])
    assert 50000 == look([1.0, 1.0], [129, 0], [1.0, 0.9])
    assert 300 == look([1.0], [299], [1.0], vocab=300)


@needs_cuda
def test_cuda_chooses_the_same():
    logits = torch.randn(60, 5000)
    check(logits, settings([0.0, 1.0, 0.5] * 20, [0, 0, 40] * 20, [1.0, 1.0, 0.9] * 20), "cuda")
    check(logits, settings([1.0] * 60, [0] * 60, [0.7] * 60), "cuda")
