"""The model's own forward and backward passes, against transformers and PEFT."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support import hf_reference as hf
from tinkex import types
from tinkex.engine import loading, lora
from tinkex.engine.engine import Engine
from tinkex.engine.model import FrozenLinears, Packing, Training


@pytest.mark.parametrize("kind", hf.CONFIGS)
def test_logits_are_those_of_transformers(kind, tmp_path):
    """Every architecture, and every feature that sets one apart, is computed exactly."""
    directory = hf.make_base(tmp_path / "base", kind)
    base = loading.load(str(directory), torch.device("cpu")).base
    tokens = np.random.default_rng(0).integers(0, hf.VOCAB, 100)
    with torch.no_grad():
        expected = hf.load_base(directory)(input_ids=torch.from_numpy(tokens)[None]).logits[0]

        hidden = Training(base, FrozenLinears(base), Packing([100], base.device)).forward(
            torch.from_numpy(tokens), save=False
        )
        actual = FrozenLinears(base).forward("head", hidden)

    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", hf.CONFIGS)
def test_gradients_are_those_of_peft(kind, tmp_path):
    """The hand-written backward pass, for every architecture, on sequences of mixed lengths."""
    base = hf.make_base(tmp_path / "base", kind)
    adapter = hf.make_adapter(base, tmp_path / "adapter")
    rng = np.random.default_rng(0)
    data = [hf.datum(rng.integers(0, hf.VOCAB, n + 1)) for n in (3, 40, 17, 18, 1, 90)]
    reference = hf.load_adapter(base, adapter)
    losses = []
    for datum in data:
        target = datum.loss_fn_inputs["target_tokens"].to_numpy()
        losses.append(-hf.logprobs(reference, datum.model_input.tokens, target).sum())
    total = torch.stack(losses).sum()
    total.backward()
    expected = hf.peft_gradients(reference)
    engine = Engine(device="cpu", threads=1)
    engine.load_base(str(base))
    engine.create_model("m", str(base), types.LoraConfig(rank=8), seed=0, adapter=adapter)

    output = hf.drive(engine.forward_backward("m", data, "cross_entropy", None))
    actual = hf.gradients(engine, "m", tmp_path / "snapshot")

    assert output.loss == pytest.approx(total.item(), rel=1e-5)
    assert expected.keys() == actual.keys()
    for name in expected:
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5 * scale)


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
