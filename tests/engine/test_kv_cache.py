"""Attention over cached keys and values, against attention over the whole text."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch

from tinkex.engine import kv_cache
from tinkex.engine.kv_cache import SharedPool, SinglePool
from tinkex.engine.spec import Spec

SPEC = Spec(
    layers=2, width=16, heads=4, kv_heads=2, head_dim=8, mlp=8, vocab=10, context=999, norm_eps=1e-5
)
#: With a window in one layer, and products capped to a part of their range.
CAPPED = attrs.evolve(SPEC, windows=(0, 9), attention_cap=1.5, attention_scale=0.7)
CPU = torch.device("cpu")


@pytest.fixture(params=[SPEC, CAPPED], ids=["plain", "capped"])
def spec(request, monkeypatch):
    monkeypatch.setattr(kv_cache, "FIRST_STEP", 4)
    return request.param


class Texts:
    """Queries, keys and values of sequences that grow, kept whole, layer by layer."""

    def __init__(self, spec):
        self._spec = spec
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
        return attention_at_end(self._spec, layer, q[None, :, None], keys, values).reshape(-1)


def attention_at_end(spec, layer, q, k, v):
    """The last row of causal attention sees everything, or all within its window."""
    window = spec.window(layer) or k.shape[2]
    k, v = (t[:, :, -window:].repeat_interleave(2, dim=1) for t in (k, v))
    products = q @ k.transpose(2, 3) * spec.scale
    if spec.attention_cap:
        products = spec.attention_cap * torch.tanh(products / spec.attention_cap)
    return products.softmax(dim=3) @ v


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


def test_single_sequences_come_and_go(spec):
    """The last takes the place of one that ends; lengths and capacity grow."""
    pool, texts = SinglePool(spec, CPU, torch.float32), Texts(spec)
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
def test_samples_of_a_prompt_share_it(spec, width):
    """Each continues it in its own way; samples end one by one, groups when their last does."""
    pool, texts = SharedPool(spec, width, CPU, torch.float32), Texts(spec)
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


def test_what_every_window_has_left_is_not_read():
    """A step's time depends on the window, not on the text; shapes change every so many steps."""
    ends = np.array([100, 90])

    assert 0 == kv_cache._first_seen(ends, 0, 101)
    assert 0 == kv_cache._first_seen(ends, 50, 101)
    assert 64 == kv_cache._first_seen(ends, 10, 101)
    assert 0 == kv_cache._first_seen(ends, 10, 1)


@pytest.mark.parametrize("width", [1, 2])
def test_in_bfloat16_a_step_seldom_has_another_shape(spec, width):
    """oneDNN prepares each new shape; what lies between the end and the next step is not seen."""
    texts = Texts(spec)
    texts.begin(0, 20)
    if width == 1:
        pool = SinglePool(spec, CPU, torch.bfloat16)
        place = pool.add(0, 20)
    else:
        texts.fork(0, 1)
        pool = SharedPool(spec, width, CPU, torch.bfloat16)
        place = pool.add([0, 1], 20)
    fill(pool, place, texts, 0)
    spans = set()
    for _ in range(60):
        members = pool.begin_step()
        new = [texts.extend(member) for member in members]
        for layer in range(SPEC.layers):
            q = torch.randn(len(members), SPEC.heads, SPEC.head_dim)
            k, v = (torch.stack([pair[i][layer] for pair in new]) for i in (0, 1))
            actual = pool.attend(layer, q.bfloat16(), k.bfloat16(), v.bfloat16())
            expected = torch.stack(
                [texts.attend(layer, member, q[i]) for i, member in enumerate(members)]
            )
            torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)
        spans.add(pool._span if width == 1 else pool._own_span)
        pool.end_step()

    assert len(spans) <= 3
