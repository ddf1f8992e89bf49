"""How a request is divided into micro-batches, and when layers are recomputed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinkex.engine import cpu_parallel, training_pass
from tinkex.engine.fast_path import FastModel
from tinkex.engine.spec import Spec


def _batches(lengths, most, widths=None):
    batches = training_pass.micro_batches(lengths, widths or [1] * len(lengths), most)
    return [[lengths[i] for i in batch] for batch in batches]


@pytest.mark.parametrize("seed", range(5))
def test_every_sequence_is_in_one_batch_of_bounded_size(seed):
    """The bound limits memory, and how long other requests wait."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 500, 200).tolist()

    batches = training_pass.micro_batches(lengths, [1] * 200, 1000)

    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert max(sum(lengths[i] for i in batch) for batch in batches) <= 1000


def test_sequences_of_a_batch_are_of_similar_length():
    assert [[9, 8], [5, 5, 3, 2, 1]] == _batches([1, 9, 5, 3, 8, 2, 5], 17)


def test_a_sequence_longer_than_the_bound_is_alone():
    """It cannot be divided; its layers are recomputed if it does not fit in memory."""
    assert [[500], [30, 20]] == _batches([20, 500, 30], 100)


def test_batches_are_about_as_large_as_each_other():
    """A small last batch would be computed slowly."""
    assert [60, 60] == [sum(batch) for batch in _batches([10] * 12, 110)]


def test_a_batch_has_one_number_of_targets_per_token():
    """Its targets form one array."""
    assert [[3, 2], [9]] == _batches([3, 9, 2], 100, [1, 4, 1])


def _base(layers, width, mlp, heads, kv_heads):
    spec = Spec(layers, width, heads, kv_heads, width // heads, mlp, 512, 2048, 1e-5)
    return FastModel(spec, torch.zeros(1, width), (), torch.ones(width), {}, ())


@pytest.mark.parametrize(
    "sizes",
    [(4, 128, 384, 4, 4), (6, 512, 1536, 8, 8), (30, 576, 1536, 9, 3), (80, 8192, 28672, 64, 8)],
)
def test_micro_batches_of_any_model_are_large_enough_for_all_workers(sizes):
    """A deep model keeps more per token; that must not lead to tiny micro-batches."""
    base = _base(*sizes)
    tokens = training_pass.tokens_per_batch(base.device, base.activation_bytes)

    assert cpu_parallel.MAX_WORKERS * cpu_parallel.MIN_PORTION <= tokens <= 2048


def test_activations_are_kept_while_they_take_an_eighth_of_the_memory(monkeypatch):
    """A 30-layer model on 8 GB keeps a whole micro-batch; an 80-layer one recomputes its layers."""
    monkeypatch.setattr(training_pass, "total_memory", lambda device: 8 * 2**30)
    deep, huge = _base(30, 576, 1536, 9, 3), _base(80, 8192, 28672, 64, 8)

    assert training_pass.tokens_to_keep(deep) == 2**30 // deep.activation_bytes
    deep_batch, huge_batch = (
        training_pass.tokens_per_batch(base.device, base.activation_bytes) for base in (deep, huge)
    )
    assert training_pass.tokens_to_keep(deep) >= deep_batch
    assert training_pass.tokens_to_keep(huge) < huge_batch
