"""Products with many adapters at once, against products with each alone."""

from __future__ import annotations

import weakref

import pytest
import torch

from tinkex.engine import finished_lora, lora
from tinkex.engine.adapter_slots import NO_SLOT, AdapterSlots
from tinkex.engine.linears import Linear, Part


@pytest.fixture(scope="module")
def linears():
    """A fused matrix of three parts, two of them narrow, and one of one part."""
    torch.manual_seed(0)
    parts = (Part("q", 0, 8), Part("k", 8, 12), Part("v", 12, 16))
    return {
        "0.qkv": Linear(torch.randn(16, 6), torch.randn(16), parts, "attn"),
        "0.down": Linear(torch.randn(6, 10), None, (Part("down", 0, 6),), "mlp"),
    }


def adapter(linears, seed, rank=4, **shape):
    layout = lora.Layout(linears, lora.Shape(rank, **shape))
    flat = torch.empty(layout.size).normal_(generator=torch.manual_seed(seed))
    return finished_lora.Finished(layout, flat, torch.float32)


def check(linears, slots, rows):
    """Each row of a batch as if it were alone with its adapter."""
    places = slots.place(rows)
    numbers = torch.tensor([places[row] for row in rows])
    for key, linear in linears.items():
        x = torch.randn(len(rows), linear.weight.shape[1])
        expected = x @ linear.weight.T + (0 if linear.bias is None else linear.bias)
        for i, row in enumerate(rows):
            if row is not None:
                row.add(key, expected[i : i + 1], x[i : i + 1], linear)
        actual = slots.linears(numbers).forward(key, x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_rows_of_all_adapters_in_any_order(linears):
    """Of different ranks, of matrices that only some adapt, and without any."""
    a, b = adapter(linears, 1), adapter(linears, 2, rank=11)
    c = adapter(linears, 3, train_attn=False)

    check(linears, AdapterSlots(linears, torch.float32), [b, None, a, c, a, None, b])


def test_who_has_a_slot_keeps_it_when_buffers_grow(linears):
    a, b, c = (adapter(linears, i, rank=i) for i in (1, 4, 20))
    slots = AdapterSlots(linears, torch.float32)
    first = slots.place([a])
    version = slots.version

    later = slots.place([c, b, a, None])

    assert first[a] == later[a]
    assert NO_SLOT == later[None]
    assert slots.version > version
    check(linears, slots, [a, b, c, a])


def test_buffers_stay_where_they_are_while_adapters_come_and_go(linears):
    """Recorded steps read from them."""
    slots = AdapterSlots(linears, torch.float32)
    slots.place([adapter(linears, 1), adapter(linears, 2)])
    version = slots.version
    addresses = [pair.a.data_ptr() for pair in slots._buffers.values()]
    for seed in range(3, 8):
        one, other = adapter(linears, seed, rank=3), adapter(linears, seed + 10)
        check(linears, slots, [one, other, one])

    assert version == slots.version
    assert addresses == [pair.a.data_ptr() for pair in slots._buffers.values()]


def test_an_adapter_that_comes_back_is_not_copied_again(linears, monkeypatch):
    slots, a = AdapterSlots(linears, torch.float32), adapter(linears, 1)
    slots.place([a])
    monkeypatch.setattr(slots, "_copy", lambda *_: pytest.fail("copied"))

    assert 0 == slots.place([a])[a]


def test_an_adapter_that_is_gone_is_not_kept(linears):
    slots, a = AdapterSlots(linears, torch.float32), adapter(linears, 1)
    slots.place([a])
    ref = weakref.ref(a)
    del a

    assert ref() is None
    check(linears, slots, [adapter(linears, 2)])
    assert 1 == len(slots)
