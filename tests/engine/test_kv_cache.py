"""Attention over cached keys and values, against attention over the whole text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinkex.engine.kv_cache import SharedPool, SinglePool
from tinkex.engine.model import Spec, attention

SPEC = Spec(
    layers=2, width=16, heads=4, kv_heads=2, head_dim=8, mlp=8, vocab=10, context=999, norm_eps=1e-5
)
CPU = torch.device("cpu")


class Texts:
    """Queries, keys and values of sequences that grow, kept whole, layer by layer."""

    def __init__(self):
        self._generator = torch.Generator().manual_seed(0)
        self.k, self.v = {}, {}

    def random(self, length, heads):
        return torch.randn(SPEC.layers, length, heads, SPEC.head_dim, generator=self._generator)

    def begin(self, name, length):
        self.k[name], self.v[name] = self.random(length, 2), self.random(length, 2)

    def fork(self, name, into):
        self.k[into], self.v[into] = self.k[name], self.v[name]

    def extend(self, name):
        """One more position -> its k and v, (layers, G, D)."""
        k, v = self.random(1, 2), self.random(1, 2)
        self.k[name] = torch.cat([self.k[name], k], dim=1)
        self.v[name] = torch.cat([self.v[name], v], dim=1)
        return k[:, 0], v[:, 0]

    def attend(self, layer, name, q):
        """(H, D) query at the last position -> (H D,)."""
        keys, values = (t[name][layer].transpose(0, 1)[None] for t in (self.k, self.v))
        out = attention_at_end(q[None, :, None], keys, values)
        return out.reshape(-1)


def attention_at_end(q, k, v):
    """The last row of causal attention sees everything."""
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def step(pool, texts):
    """Extend every live sequence, and check what each attends to."""
    members = pool.begin_step()
    new = [texts.extend(member) for member in members]
    for layer in range(SPEC.layers):
        q = torch.randn(len(members), SPEC.heads, SPEC.head_dim)
        k, v = (torch.stack([pair[i][layer] for pair in new]) for i in (0, 1))
        actual = pool.attend(layer, q, k, v)
        expected = torch.stack(
            [texts.attend(layer, member, q[i]) for i, member in enumerate(members)]
        )
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    pool.end_step()


def fill(pool, place, texts, name):
    for layer in range(SPEC.layers):
        pool.fill(layer, place, texts.k[name][layer], texts.v[name][layer])


def test_single_sequences_come_and_go():
    """The last takes the place of one that ends; lengths and capacity grow."""
    pool, texts = SinglePool(SPEC, CPU, torch.float32), Texts()
    rng = np.random.default_rng(0)
    for i in range(12):
        texts.begin(i, 1 + int(rng.integers(100)))
        fill(pool, pool.add(i, texts.k[i].shape[1]), texts, i)
        for _ in range(3):
            step(pool, texts)
        if i % 3 == 2:
            pool.remove(int(rng.choice(pool.members)))

    assert 8 == len(pool.members)


@pytest.mark.parametrize("width", [2, 4])
def test_samples_of_a_prompt_share_it(width):
    """Each continues it in its own way; samples end one by one, groups when their last does."""
    pool, texts = SharedPool(SPEC, width, CPU, torch.float32), Texts()
    rng = np.random.default_rng(1)
    name = 0
    for group in range(8):
        members = list(range(name, name + width - group % 2))
        name += width
        texts.begin(members[0], 1 + int(rng.integers(100)))
        for member in members[1:]:
            texts.fork(members[0], member)
        fill(pool, pool.add(members, texts.k[members[0]].shape[1]), texts, members[0])
        for _ in range(3):
            step(pool, texts)
        live = pool.members[pool.members >= 0]
        for member in rng.choice(live, len(live) // 2, replace=False):
            pool.remove(int(member))
    while (pool.members >= 0).any():
        step(pool, texts)
        pool.remove(int(pool.members.max()))

    assert (0, width) == pool.members.shape


def test_attention_repeats_key_heads_over_query_heads():
    """Grouped queries (Ainslie et al. 2023): heads 0, 1 read key head 0, heads 2, 3 read 1."""
    q, k, v = (torch.randn(1, heads, 5, 8) for heads in (4, 2, 2))

    actual = attention(q, k, v)

    every = [t.repeat_interleave(2, dim=1) for t in (k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(q, *every, is_causal=True)
    torch.testing.assert_close(actual, expected)
