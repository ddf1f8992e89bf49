"""LoRA's own arithmetic: initialisation, merging, and one trained adapter."""

from __future__ import annotations

import attrs
import pytest
import torch

from tests.support.lora_reference import dense
from tests.support.lora_reference import flat as flat_of
from tinkex.engine import loading, lora


@pytest.fixture(scope="module")
def linears():
    return loading.load("tiny", torch.device("cpu")).base.linears


def test_a_fresh_adapter_has_a_as_peft_draws_it_and_b_zero(linears):
    """kaiming_uniform with a = sqrt(5): uniform between -1/sqrt(in) and 1/sqrt(in)."""
    layout = lora.Layout(linears, lora.Shape(16))

    tensors = layout.tensors(lora.initialise(layout, 0, torch.device("cpu")))

    for name, tensor in tensors.items():
        if name.endswith("lora_B"):
            assert not tensor.any()
        else:
            bound = tensor.shape[1] ** -0.5
            assert bound * 0.99 < float(tensor.abs().max()) <= bound
            assert float(tensor.std()) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_one_seed_gives_one_adapter(linears):
    layout = lora.Layout(linears, lora.Shape(4))
    device = torch.device("cpu")

    one, same, other = (lora.initialise(layout, seed, device) for seed in (1, 1, 2))

    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_alpha_is_32_for_every_rank():
    assert [32.0, 1.0, 0.5] == [lora.Shape(rank).scale for rank in (1, 32, 64)]


@pytest.mark.parametrize("key", ["0.qkv", "1.o", "2.gate_up", "3.down", "head"])
def test_merged_or_not_the_product_is_the_same(linears, key):
    """Forward, backward and gradients; merging, and keeping A x, are for speed only."""
    layout = lora.Layout(linears, lora.Shape(8))
    flat = flat_of(layout, 0)
    weight = dense(layout, flat, key)
    x, dy = torch.randn(40, weight.shape[1]), torch.randn(40, len(weight))
    gradients = []
    for workspace, kept in ((None, None), (None, {}), (lora.Workspace(), {})):
        gradient = torch.zeros_like(flat)
        trained = lora.TrainedLinears(linears, layout, flat, gradient, workspace, "me")

        y = trained.forward(key, x, kept)
        assert bool(kept) == (workspace is None and kept is not None)
        torch.testing.assert_close(y, x @ weight.T, rtol=1e-4, atol=1e-4)
        dx = trained.backward(key, dy, x, kept)
        torch.testing.assert_close(dx, dy @ weight, rtol=1e-4, atol=1e-4)
        gradients.append(gradient)

    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-3)
    assert gradients[0].any()


def test_in_bfloat16_the_adapter_stays_beside_the_matrices(linears):
    """Merged, its small updates would be lost. Its gradient is float32."""
    half = {k: attrs.evolve(v, weight=v.weight.bfloat16()) for k, v in linears.items()}
    layout = lora.Layout(half, lora.Shape(8))
    flat = flat_of(layout, 0)
    gradient, reference = torch.zeros_like(flat), torch.zeros_like(flat)
    trained = lora.TrainedLinears(half, layout, flat, gradient)
    exact = lora.TrainedLinears(linears, layout, flat, reference)
    x = torch.randn(40, half["0.qkv"].weight.shape[1])
    dy = torch.randn(40, len(half["0.qkv"].weight))

    y = trained.forward("0.qkv", x.bfloat16())
    dx = trained.backward("0.qkv", dy.bfloat16(), x.bfloat16())

    torch.testing.assert_close(y.float(), exact.forward("0.qkv", x), rtol=0.02, atol=0.05)
    torch.testing.assert_close(dx.float(), exact.backward("0.qkv", dy, x), rtol=0.02, atol=0.1)
    assert torch.float32 == gradient.dtype
    assert (gradient - reference).norm() < 0.01 * reference.norm()


def test_a_workspace_never_lends_one_adapter_anothers_matrices(linears):
    """Two models take turns; a new version of one is merged again."""
    layout, room = lora.Layout(linears, lora.Shape(8)), lora.Workspace()
    first, second = flat_of(layout, 1), flat_of(layout, 2)
    x = torch.randn(3, layout.linears["0.qkv"].weight.shape[1])

    def product(flat, owner):
        return lora.TrainedLinears(linears, layout, flat, None, room, owner).forward("0.qkv", x)

    for flat, owner in ((first, "a"), (second, "b"), (first, "a"), (second, ("a", 2))):
        expected = x @ dense(layout, flat, "0.qkv").T
        torch.testing.assert_close(product(flat, owner), expected, rtol=1e-4, atol=1e-4)
