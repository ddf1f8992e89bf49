"""How a request is cut into micro-batches."""

from __future__ import annotations

import numpy as np
import pytest

from tinkex.engine import training_pass


def _batches(lengths, most, widths=None):
    batches = training_pass.micro_batches(lengths, widths or [1] * len(lengths), most)
    return [[lengths[i] for i in batch] for batch in batches]


@pytest.mark.parametrize("seed", range(5))
def test_every_sequence_is_in_one_batch_of_bounded_size(seed):
    """The bound is what keeps memory bounded, and others from waiting long."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 500, 200).tolist()

    batches = training_pass.micro_batches(lengths, [1] * 200, 1000)

    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert max(sum(lengths[i] for i in batch) for batch in batches) <= 1000


def test_sequences_of_a_batch_are_of_similar_length():
    assert [[9, 8], [5, 5, 3, 2, 1]] == _batches([1, 9, 5, 3, 8, 2, 5], 17)


def test_a_sequence_longer_than_the_bound_is_alone():
    """It is computed layer by layer, keeping less."""
    assert [[500], [30, 20]] == _batches([20, 500, 30], 100)


def test_batches_are_about_as_large_as_each_other():
    """Not all full but the last: a small batch wastes the machine."""
    assert [60, 60] == [sum(batch) for batch in _batches([10] * 12, 110)]


def test_a_batch_has_one_number_of_targets_per_token():
    """So that its targets form one array."""
    assert [[3, 2], [9]] == _batches([3, 9, 2], 100, [1, 4, 1])
