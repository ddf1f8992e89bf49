"""The static cache against attention over each row's own keys; where rows are, and move to."""

from __future__ import annotations

import pytest
import torch

from tinkex.engine.spec import Spec
from tinkex.engine.static_cache import SHORTEST, SlabReading, StaticCache, positions_of_row

CPU = torch.device("cpu")
FILLER = 99


def spec(**more):
    return Spec(2, 32, 4, 2, 8, 48, 100, 4096, 1e-5, **more)


def cache(budget=2**40, **more):
    return StaticCache(spec(**more), CPU, torch.float32, budget, FILLER)


def fill(static, rows, length, seed):
    """Random keys and values of a prompt, (layers, length, G, D) each."""
    k, v = torch.randn(2, 2, length, 2, 8, generator=torch.manual_seed(seed))
    store, place = static.add(rows, length)
    for layer in range(2):
        store.fill(layer, place, k[layer], v[layer])
    return k, v


def slot_of(static, row):
    return next((slab, slab.rows.index(row)) for slab in static if row in slab.rows)


@pytest.mark.parametrize("windows", [(), (5, 0)])
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_attention_is_that_over_each_rows_own_keys(windows, cap):
    """Of rows of different lengths beside free ones, over several tokens."""
    static = cache(windows=windows, attention_cap=cap)
    lengths = {3: 10, 5: 2, 8: 100}
    kept = {row: fill(static, [row], n, seed=row) for row, n in lengths.items()}
    static.remove(5)
    del kept[5], lengths[5]
    [slab] = static.tell_members({3, 8})
    torch.manual_seed(0)
    for step in range(3):
        members = slab.members[: slab.prefix].tolist()
        positions = torch.tensor([lengths.get(row, -step) + step for row in members])
        reading = SlabReading(spec(windows=windows, attention_cap=cap), slab, positions)
        for layer in range(2):
            q, k, v = (torch.randn(len(members), heads, 8) for heads in (4, 2, 2))
            out = reading.attend(layer, q, k, v)
            for i, row in enumerate(members):
                if row != FILLER:
                    keys, values = (
                        torch.cat([own[layer][: lengths[row] + step], new[i : i + 1]])
                        for own, new in zip(kept[row], (k, v))
                    )
                    expected = _attend(q[i], keys, values, windows[layer] if windows else 0, cap)
                    torch.testing.assert_close(out[i], expected, rtol=1e-5, atol=1e-5)
            for i, row in enumerate(members):
                if row != FILLER:
                    _append(kept, row, layer, lengths[row] + step, k[i], v[i])


def _append(kept, row, layer, length, k, v):
    longer = []
    for own, new in zip(kept[row], (k, v)):
        if own.shape[1] <= length:
            own = torch.cat([own, torch.zeros(2, 1, *own.shape[2:])], dim=1)
        own[layer, length] = new
        longer.append(own)
    kept[row] = tuple(longer)


def _attend(q, keys, values, window, cap):
    """(H, D) queries of the last of T positions, over (T, G, D) keys and values -> (H D,)."""
    if window:
        keys, values = keys[-window:], values[-window:]
    keys, values = (x.repeat_interleave(2, dim=1) for x in (keys, values))
    products = torch.einsum("hd,thd->ht", q, keys) * 8**-0.5
    if cap:
        products = cap * torch.tanh(products / cap)
    return torch.einsum("ht,thd->hd", products.softmax(dim=1), values).flatten()


def test_rows_of_one_prompt_have_it_each():
    static = cache()
    k, v = fill(static, [1, 2, 3], 7, seed=0)
    for row in (1, 2, 3):
        slab, slot = slot_of(static, row)
        torch.testing.assert_close(slab.k[:, slot, :, :7], k.transpose(1, 2))
        torch.testing.assert_close(slab.v[:, slot, :, :7], v.transpose(1, 2))


def test_a_row_moves_when_it_has_outgrown_its_slab():
    static = cache()
    k, _ = fill(static, [1], 100, seed=0)
    fill(static, [2], 100, seed=1)
    static.fit(1, SHORTEST)
    assert SHORTEST == slot_of(static, 1)[0].positions

    static.fit(1, SHORTEST + 1)

    slab, slot = slot_of(static, 1)
    assert 2 * SHORTEST == slab.positions
    torch.testing.assert_close(slab.k[:, slot, :, :100], k.transpose(1, 2))
    assert SHORTEST == slot_of(static, 2)[0].positions
    assert {1, 2} == set(static.rows)


def test_a_full_slab_is_replaced_by_a_larger_one_with_the_same_rows():
    """Its number changes, which ends what was recorded of it."""
    static = cache()
    kept = {row: fill(static, [row], 5, seed=row) for row in range(8)}
    [before] = [slab.number for slab in static]

    kept[8] = fill(static, [8], 5, seed=8)

    [after] = static
    assert 16 == len(after.rows)
    assert before != after.number
    for row, (k, _) in kept.items():
        torch.testing.assert_close(after.k[:, after.rows.index(row), :, :5], k.transpose(1, 2))


def test_few_rows_are_read_when_most_have_gone():
    static = cache()
    kept = {row: fill(static, [row], 5, seed=row) for row in range(16)}
    for row in range(14):
        static.remove(row)
    [slab] = static
    assert 16 == slab.prefix

    static.close_gaps()

    assert 2 == slab.prefix
    [told] = static.tell_members({14, 15})
    assert {14, 15} == set(told.members[:2].tolist())
    for row in (14, 15):
        found = slab.k[:, slot_of(static, row)[1], :, :5]
        torch.testing.assert_close(found, kept[row][0].transpose(1, 2))


def test_rows_that_are_not_going_are_told_as_none():
    static = cache()
    for row in range(3):
        fill(static, [row], 5, seed=row)

    [slab] = static.tell_members({1})

    assert [FILLER, 1, FILLER] == slab.members[:3].tolist()
    assert [] == static.tell_members({7})


def test_beyond_the_budget_slabs_have_the_rows_that_are_needed():
    """And what is empty makes room first."""
    row_bytes = SHORTEST * cache().position_bytes
    static = cache(budget=9 * row_bytes)
    fill(static, [0], 5, seed=0)
    static.remove(0)
    assert 8 * row_bytes == static.nbytes

    fill(static, [1], 2 * SHORTEST - 1, seed=1)

    assert [2 * SHORTEST] == [slab.positions for slab in static]
    assert static.nbytes <= 9 * row_bytes
    fill(static, list(range(10, 20)), 5, seed=2)  # the sampler has reserved it
    assert set(range(10, 20)) <= set(static.rows)


def test_lengths_of_rows_are_powers_of_two():
    assert [128, 128, 256, 4096] == [positions_of_row(n) for n in (1, 128, 129, 2049)]
