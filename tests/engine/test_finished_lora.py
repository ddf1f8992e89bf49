"""Finished adapters: rows of several of them at once, each multiplied with its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.lora_reference import dense
from tests.support.lora_reference import flat as flat_of
from tinkex.engine import finished_lora, loading, lora
from tinkex.engine.linears import Linear, Part


@pytest.fixture(scope="module")
def linears():
    return loading.load("tiny", torch.device("cpu")).base.linears


@pytest.mark.parametrize(
    "counts", [(2, 2, 2), (3, 2, 3), (1, 5, 3), (4, 0, 1), (40, 20, 60), (99, 0, 1)]
)
@pytest.mark.parametrize("key", ["0.qkv", "3.down", "head"])
def test_rows_of_several_adapters_are_each_multiplied_with_their_own(linears, counts, key):
    """Of different ranks and reach, the bare base model among them, in any numbers."""
    shapes = (lora.Shape(8), lora.Shape(3, train_unembed=False))
    layouts = [lora.Layout(linears, shape) for shape in shapes]
    flats = [flat_of(layout, i) for i, layout in enumerate(layouts)]
    adapters = [finished_lora.Finished(*pair, torch.float32) for pair in zip(layouts, flats)]
    rows = np.repeat([0, 1, 2], counts)
    stack = finished_lora.Stack([adapters[0], None, adapters[1]])
    x = torch.randn(len(rows), linears[key].weight.shape[1])

    actual = finished_lora.MixedLinears(linears, stack, rows).forward(key, x)

    for i, row in enumerate(rows):
        which = {0: 0, 2: 1}.get(int(row))
        weight = linears[key].weight
        if which is not None and key in layouts[which].linears:
            weight = dense(layouts[which], flats[which], key)
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
    flats = [flat_of(layout, seed) for seed in (1, 2)]
    stack = finished_lora.Stack(
        [finished_lora.Finished(layout, flat, torch.float32) for flat in flats]
    )
    x = torch.randn(4, 12, generator=generator)

    rows = np.repeat([0, 1], counts)
    actual = finished_lora.MixedLinears(layout.linears, stack, rows).forward("qkv", x)

    expected = [dense(layout, flats[row], "qkv") @ x[i] for i, row in enumerate(rows)]
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("room", [None, lora.Workspace()])
def test_rows_of_one_adapter_merged_or_not(linears, room):
    layout = lora.Layout(linears, lora.Shape(8))
    flat = flat_of(layout, 0)
    stack = finished_lora.Stack([finished_lora.Finished(layout, flat, torch.float32)])
    x = torch.randn(5, linears["1.gate_up"].weight.shape[1])

    actual = finished_lora.MixedLinears(linears, stack, np.zeros(5, np.int64), room).forward(
        "1.gate_up", x
    )

    expected = x @ dense(layout, flat, "1.gate_up").T
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
