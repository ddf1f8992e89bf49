"""Which samples a step advances, when there are more keys and values than it has time for."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tinkex.engine.kv_cache import SharedPool, SinglePool
from tinkex.engine.sample_pools import POOL_ROWS, Pools
from tinkex.engine.spec import Spec

SPEC = Spec(
    layers=1, width=16, heads=4, kv_heads=2, head_dim=8, mlp=8, vocab=10, context=999, norm_eps=1e-5
)
#: Bytes of one position's keys and values.
POSITION = 2 * 2 * 8 * 4
MOST = POOL_ROWS["cpu"]


@pytest.fixture
def make():
    return lambda positions=10**9: Pools(
        SPEC, torch.device("cpu"), torch.float32, positions * POSITION
    )


def add(pools, rows, prompt_length=10):
    """Single samples."""
    return [pools.add([row], prompt_length)[0] for row in rows]


def advance(pools, shares):
    """One step; give the rows that it advances."""
    found = []
    for pool in pools.choose(shares, in_turn=True):
        found += pool.begin_step()
        pool.end_step()
    return found


def test_a_pool_holds_so_many_samples_and_a_place_that_is_left_is_used_again(make):
    pools = make()
    homes = add(pools, range(MOST + 1))
    pools.remove(3)
    (again,) = add(pools, [999])

    assert homes[:MOST] == [homes[0]] * MOST and homes[MOST] is not homes[0]
    assert again is homes[0]
    assert [MOST, 1] == [pool.rows for pool in pools]


def test_a_pool_goes_with_its_last_sample(make):
    pools = make()
    add(pools, [1, 2])
    pools.remove(1)
    pools.remove(2)
    pools.remove(7)  # has ended with its first token, and never had a place

    assert [] == list(pools)


def test_samples_of_one_prompt_share_a_pool_of_groups(make):
    pools = make()
    group, place = pools.add([5, 6, 7], 10)
    single, _ = pools.add([8], 10)
    other, _ = pools.add([9], 1000)  # with so much longer a prompt it is a pool of its own

    assert isinstance(group, SharedPool) and 0 == place
    assert isinstance(single, SinglePool) and single is not other
    assert [4, 1, 1] == [pool.rows for pool in pools]


def test_all_advance_where_that_is_quick(make):
    pools = make()
    add(pools, range(3 * MOST))
    shares = dict.fromkeys(range(3 * MOST), "a")

    assert set(shares) == set(advance(pools, shares)) == set(advance(pools, shares))


def test_otherwise_they_take_turns(make):
    """No step reads much more than it may, and in four steps each has had one."""
    pools = make(positions=MOST * 11)
    add(pools, range(4 * MOST))
    shares = dict.fromkeys(range(4 * MOST), "a")
    steps = [advance(pools, shares) for _ in range(4)]

    assert {MOST, 2 * MOST} >= {len(rows) for rows in steps}
    assert set(shares) == {row for rows in steps for row in rows}


def test_the_share_with_the_fewest_tokens_comes_first(make):
    """A few samples beside many big ones get a token in every step."""
    pools = make(positions=MOST * 11)
    add(pools, range(4 * MOST))
    shares = dict.fromkeys(range(4 * MOST), "greedy")
    advance(pools, shares)
    add(pools, [1000], prompt_length=200)
    shares[1000] = "small"
    advance(pools, shares)
    had = Counter(row for _ in range(12) for row in advance(pools, shares))

    assert 12 == had[1000]
    assert all(had[row] >= 2 for row in range(4 * MOST))


def test_who_comes_back_is_not_given_what_it_has_missed(make):
    """A share that was away does not shut out the others until it has as many tokens."""
    pools = make(positions=MOST * 11)
    add(pools, range(2 * MOST))
    shares = dict.fromkeys(range(MOST), "a") | dict.fromkeys(range(MOST, 2 * MOST), "b")
    for _ in range(50):
        advance(pools, shares)
    for row in range(MOST, 2 * MOST):
        pools.remove(row)
    for _ in range(50):
        advance(pools, shares)
    add(pools, range(MOST, 2 * MOST))
    had = Counter(shares[row] for _ in range(20) for row in advance(pools, shares))

    assert had["a"] >= 8 * MOST and had["b"] >= 8 * MOST
