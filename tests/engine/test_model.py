"""The model's own forward and backward passes. Their numbers: test_families.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support import hf_reference as hf
from tests.support.frozen_linears import FrozenLinears
from tinkex.engine import loading, lora
from tinkex.engine.attention import Packing
from tinkex.engine.model import Training


def _hidden(base, lengths, tokens):
    packing = Packing(lengths, base.device)
    return Training(base, FrozenLinears(base), packing).forward(tokens, save=False)


@pytest.fixture(scope="module")
def base():
    return loading.load("tiny", torch.device("cpu")).base


@torch.no_grad()
def test_a_sequence_is_blind_to_what_is_packed_beside_it(base):
    """Packing is for speed; no number may depend on it."""
    rng = np.random.default_rng(1)
    texts = [torch.from_numpy(rng.integers(0, 256, n)) for n in (70, 64, 63, 7, 1)]

    together = _hidden(base, [len(t) for t in texts], torch.cat(texts))

    alone = torch.cat([_hidden(base, [len(text)], text) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_recomputing_gives_the_same_gradient(base):
    """Long sequences keep only each layer's input; what is computed again must be the same."""
    layout = lora.Layout(base.linears, lora.Shape(4))
    flat = lora.initialise(layout, 0, base.device).uniform_(-0.1, 0.1)
    tokens = torch.arange(60) % 256
    gradients = []
    for recompute in (False, True):
        gradient = torch.zeros_like(flat)
        linears = lora.TrainedLinears(base.linears, layout, flat, gradient)
        training = Training(base, linears, Packing([40, 20], base.device), recompute=recompute)
        hidden = training.forward(tokens, save=True)
        training.backward(torch.ones_like(hidden))
        gradients.append(gradient)

    assert torch.equal(*gradients)


def test_no_packing_pads_much():
    """Sequences of one padded attention batch are of similar length."""
    lengths = sorted(np.random.default_rng(0).integers(1, 512, 300).tolist(), reverse=True)

    packing = Packing(lengths, torch.device("cpu"))

    assert packing.padded_rows < 1.15 * packing.rows
    assert sum(count for _, count, _ in packing.buckets) == len(lengths)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_backward_pass_needs_a_forward_pass_that_kept_something(kind, tmp_path):
    """On both paths: a gradient of nothing would be zero, and the step would change nothing."""
    base = loading.load(str(hf.make_base(tmp_path, kind)), torch.device("cpu")).base
    layout = lora.Layout(base.linears, lora.Shape(4))
    flat = lora.initialise(layout, 0, base.device)
    linears = lora.TrainedLinears(base.linears, layout, flat, torch.zeros_like(flat))
    batch = base.training_batch(linears, [5], recompute=False)
    hidden = batch.forward(torch.arange(5), save=False)

    with pytest.raises(RuntimeError, match=r"needs forward\(save=True\) before it"):
        batch.backward(torch.ones_like(hidden))
