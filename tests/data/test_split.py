"""Which example goes where: the held-out part, and the order of the others."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tinkex.data.split import Plan, split


@given(st.integers(0, 300), st.floats(0, 1, exclude_max=True), st.integers(0, 2**32))
def test_every_example_is_either_held_out_or_trained_on(count, fraction, seed):
    train, held_out = split(count, fraction, seed)

    assert list(range(count)) == sorted(train + held_out)
    assert (train, held_out) == split(count, fraction, seed)
    if count >= 2 and fraction > 0:
        assert train
        assert held_out


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 3), st.integers(0, 9))
def test_an_epoch_has_every_example_once(count, batch_size, epochs, seed):
    plan = Plan(count, batch_size, epochs, seed)

    for epoch in range(epochs):
        first = epoch * plan.steps_per_epoch + 1
        batches = [plan.batch(first + i) for i in range(plan.steps_per_epoch)]
        assert list(range(count)) == sorted(itertools.chain(*batches))
    assert epochs * plan.steps_per_epoch == plan.total_steps


def test_each_epoch_has_its_own_order():
    plan = Plan(100, 100, 2, seed=0)

    assert plan.batch(1) != plan.batch(2)


def test_max_steps_cuts_a_plan_short():
    assert 3 == Plan(100, 10, 1, seed=0, max_steps=3).total_steps
    assert 10 == Plan(100, 10, 1, seed=0, max_steps=30).total_steps


def test_the_order_is_the_same_on_every_machine():
    """A run may be resumed elsewhere; numpy promises its generators' streams per version only,
    so that this tells when they change."""
    assert [2, 7, 0] == Plan(10, 3, 1, seed=0).batch(1)
    assert np.array_equal([4], split(10, 0.1, 0)[1])
