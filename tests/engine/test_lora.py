"""LoRA's own arithmetic: initialisation, merging, and rows of several adapters at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinkex.engine import loading, lora
from tinkex.engine.linears import Linear, Part


@pytest.fixture(scope="module")
def linears():
    return loading.load("tiny", torch.device("cpu")).base.linears


def _flat(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(layout.size).normal_(0, 0.1, generator=generator)


def _dense(layout, flat, key):
    """W + scale B A, written out."""
    tensors, linear = layout.tensors(flat), layout.linears[key]
    change = [
        tensors[f"{part.name}.lora_B"] @ tensors[f"{part.name}.lora_A"] for part in linear.parts
    ]
    return linear.weight + layout.shape.scale * torch.cat(change)


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
    """Forward, backward and gradients; merging is for speed only."""
    layout = lora.Layout(linears, lora.Shape(8))
    flat = _flat(layout, 0)
    weight = _dense(layout, flat, key)
    x, dy = torch.randn(40, weight.shape[1]), torch.randn(40, len(weight))
    gradients = []
    for workspace in (None, lora.Workspace()):
        gradient = torch.zeros_like(flat)
        trained = lora.TrainedLinears(linears, layout, flat, gradient, workspace, "me")

        torch.testing.assert_close(trained.forward(key, x), x @ weight.T, rtol=1e-4, atol=1e-4)
        dx = trained.backward(key, dy, x)
        torch.testing.assert_close(dx, dy @ weight, rtol=1e-4, atol=1e-4)
        gradients.append(gradient)

    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)
    assert gradients[0].any()


def test_a_workspace_never_lends_one_adapter_anothers_matrices(linears):
    """Two models take turns; a new version of one is merged again."""
    layout, room = lora.Layout(linears, lora.Shape(8)), lora.Workspace()
    first, second = _flat(layout, 1), _flat(layout, 2)
    x = torch.randn(3, layout.linears["0.qkv"].weight.shape[1])

    def product(flat, owner):
        return lora.TrainedLinears(linears, layout, flat, None, room, owner).forward("0.qkv", x)

    for flat, owner in ((first, "a"), (second, "b"), (first, "a"), (second, ("a", 2))):
        expected = x @ _dense(layout, flat, "0.qkv").T
        torch.testing.assert_close(product(flat, owner), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("counts", [(2, 2, 2), (3, 2, 3), (1, 5, 3), (4, 0, 1)])
@pytest.mark.parametrize("key", ["0.qkv", "3.down", "head"])
def test_rows_of_several_adapters_are_each_multiplied_with_their_own(linears, counts, key):
    """Of different ranks and reach, the bare base model among them, in any numbers."""
    shapes = (lora.Shape(8), lora.Shape(3, train_unembed=False))
    layouts = [lora.Layout(linears, shape) for shape in shapes]
    flats = [_flat(layout, i) for i, layout in enumerate(layouts)]
    adapters = [lora.Finished(*pair, torch.float32) for pair in zip(layouts, flats)]
    rows = np.repeat([0, 1, 2], counts)
    stack = lora.Stack([adapters[0], None, adapters[1]])
    x = torch.randn(len(rows), linears[key].weight.shape[1])

    actual = lora.MixedLinears(linears, stack, rows).forward(key, x)

    for i, row in enumerate(rows):
        which = {0: 0, 2: 1}.get(int(row))
        weight = linears[key].weight
        if which is not None and key in layouts[which].linears:
            weight = _dense(layouts[which], flats[which], key)
        torch.testing.assert_close(actual[i], weight @ x[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("counts", [(2, 2), (3, 1)])
@pytest.mark.parametrize("widths", [(16, 8, 8), (8, 8, 16), (8, 16, 8), (8, 16)])
def test_parts_of_any_widths_get_their_own_change(widths, counts):
    """Fewer key and value heads than query heads: parts of one width are multiplied together."""
    generator = torch.Generator().manual_seed(0)
    stops = np.cumsum(widths).tolist()
    parts = tuple(Part(f"p{i}", stop - w, stop) for i, (stop, w) in enumerate(zip(stops, widths)))
    weight = torch.randn(stops[-1], 12, generator=generator)
    layout = lora.Layout({"qkv": Linear(weight, None, parts, "attn")}, lora.Shape(4))
    flats = [_flat(layout, seed) for seed in (1, 2)]
    stack = lora.Stack([lora.Finished(layout, flat, torch.float32) for flat in flats])
    x = torch.randn(4, 12, generator=generator)

    rows = np.repeat([0, 1], counts)
    actual = lora.MixedLinears(layout.linears, stack, rows).forward("qkv", x)

    expected = [_dense(layout, flats[row], "qkv") @ x[i] for i, row in enumerate(rows)]
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("room", [None, lora.Workspace()])
def test_rows_of_one_adapter_merged_or_not(linears, room):
    layout = lora.Layout(linears, lora.Shape(8))
    flat = _flat(layout, 0)
    stack = lora.Stack([lora.Finished(layout, flat, torch.float32)])
    x = torch.randn(5, linears["1.gate_up"].weight.shape[1])

    actual = lora.MixedLinears(linears, stack, np.zeros(5, np.int64), room).forward("1.gate_up", x)

    expected = x @ _dense(layout, flat, "1.gate_up").T
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
