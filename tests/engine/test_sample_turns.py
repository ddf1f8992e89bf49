"""Whose turn it is; test_sample_pools.py has the same with pools of keys and values."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.support import hf_reference as hf
from tinkex import types
from tinkex.engine import sample_turns
from tinkex.engine.engine import Engine
from tinkex.engine.generic import sampling
from tinkex.engine.sample_turns import Turns


def had(turns, rows, shares, steps, most=10.0):
    """How often each item advances, if each costs 5."""
    costs = dict.fromkeys(rows, 5.0)
    chosen = (turns.choose(rows, shares, costs, most) for _ in range(steps))
    return Counter(item for items in chosen for item in items)


def test_all_advance_if_that_costs_no_more_than_it_may():
    rows = {"x": [1], "y": [2]}
    assert {"x": 4, "y": 4} == had(Turns(), rows, {1: "a", 2: "b"}, 4)
    assert {"x": 4, "y": 4} == had(Turns(), rows, {1: "a", 2: "b"}, 4, most=None)


def test_a_small_share_advances_in_every_step_and_a_big_one_is_not_shut_out():
    rows = {**{f"big {i}": list(range(10 * i, 10 * i + 10)) for i in range(4)}, "small": [99]}
    shares = {row: "big" for own in rows.values() for row in own} | {99: "small"}
    found = had(Turns(), rows, shares, 40)

    assert found["small"] >= 39  # at first none has got any
    assert all(found[f"big {i}"] >= 9 for i in range(4))


def test_items_that_are_gone_are_forgotten():
    turns = Turns()
    had(turns, {"x": [1], "y": [2]}, {1: "a", 2: "b"}, 3)
    had(turns, {"y": [2]}, {2: "b"}, 3)

    assert {"y"} == set(turns._last)
    assert {"b"} == set(turns._tokens)


# -- the states of the generic path, which take turns, too ----------------------------------------


@pytest.fixture(params=["gpt2", "qwen3_next", "averaging"])
def engine(request, tmp_path):
    base = hf.make_base(tmp_path / "base", request.param)
    engine = Engine(device="cpu", threads=1)
    engine.load_base(str(base))
    engine.open_sampler("base", str(base))
    return engine


def submit(engine, ticket, share, **params):
    settings = {"max_tokens": 40, "seed": 7, "stop": [], **params}
    count = settings.pop("num_samples", 1)
    one = types.SampleRequest(
        types.ModelInput.from_ints([1, 2, 3]), types.SamplingParams(**settings), num_samples=count
    )
    engine.submit_sample(ticket, "base", one, share=share)


def test_a_step_has_time_for_twice_as_many_operations_where_16_bits_are_twice_as_fast(monkeypatch):
    monkeypatch.setattr(sample_turns, "HALF_SPEED", 2.0)
    step = sample_turns.step_operations
    assert step("cpu", torch.bfloat16) == 2 * step("cpu", torch.float32)
    assert step("cuda", torch.bfloat16) == step("cuda", torch.float32)


@pytest.fixture
def little_time(monkeypatch):
    """A step has time for little more than one batch, or for a few texts."""
    monkeypatch.setitem(sample_turns.STEP_BYTES, "cpu", 0)
    monkeypatch.setitem(sampling.BATCH_ROWS, "cpu", 4)
    monkeypatch.setitem(sample_turns.STEP_OPERATIONS, "cpu", 1)


def test_a_small_request_gets_a_token_in_every_step_beside_many(engine, little_time):
    """In a model of the generic path, with a cache and without."""
    [loaded] = engine._bases.values()
    rows = loaded.sampler._rows
    submit(engine, "many", "greedy", num_samples=24)
    engine.sample_step()
    submit(engine, "small", "other", max_tokens=6)
    ended = []
    for _ in range(7):
        ended += [ticket for ticket, _ in engine.sample_step()]

    assert ["small"] == ended
    assert int(rows.length.max()) < 10
    assert {"many"} == set(hf.sample_all(engine))


def test_turns_change_no_token_of_the_generic_path(engine, little_time, monkeypatch):
    def sampled():
        for i in range(6):
            submit(engine, i, i % 3, num_samples=3, seed=i, max_tokens=7)
        found = hf.sample_all(engine)
        return [[s.tokens for s in found[i].sequences] for i in range(6)]

    in_turn = sampled()
    monkeypatch.setitem(sample_turns.STEP_BYTES, "cpu", 2**28)
    monkeypatch.setitem(sample_turns.STEP_OPERATIONS, "cpu", 16e9)
    assert sampled() == in_turn
