"""The sampling state of the fast path: order of results, and what removal leaves behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinkex.engine import finished_lora, loading, lora
from tinkex.engine.base_model import Prompt
from tinkex.engine.cpu_parallel import Workers


@pytest.fixture(scope="module")
def base():
    return loading.load("tiny", torch.device("cpu")).base


def _adapter(base, seed):
    layout = lora.Layout(base.linears, lora.Shape(4))
    flat = torch.empty(layout.size).normal_(0, 0.1, generator=torch.manual_seed(seed))
    return finished_lora.Finished(layout, flat, torch.float32)


def _prompt(tokens, adapter, *rows):
    return Prompt(np.array(tokens, np.int32), adapter, rows)


@torch.no_grad()
def test_results_come_in_the_order_of_the_prompts(base):
    """They are computed in order of adapter and length, which callers do not see."""
    a, b = _adapter(base, 1), _adapter(base, 2)
    prompts = [_prompt(range(9), b), _prompt(range(3), a), _prompt(range(5), None)]
    seen = {}

    def keep(numbers, states):
        seen.update(zip(numbers, states))

    together = base.sampling_state(Workers(1)).begin(prompts, keep)

    for i, prompt in enumerate(prompts):
        alone = base.sampling_state(Workers(1)).begin([prompt], None)
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-4)
        assert len(prompt.tokens) == len(seen[i])


@torch.no_grad()
def test_a_removed_sequence_leaves_the_others_as_they_were(base):
    """Singles and samples that share a prompt, of several adapters, one of which goes."""
    adapter = _adapter(base, 1)
    prompts = [_prompt(range(6), adapter, [0, 1]), _prompt(range(4), None, [2], [3, 4])]
    results = []
    for removed in ([], [0, 2]):
        state = base.sampling_state(Workers(1))
        state.begin(prompts, None)
        for row in removed:
            state.remove(row)
        rows, logits = state.advance(
            np.arange(5) + 7, np.array([6, 6, 4, 4, 4]), dict.fromkeys(range(5)), in_turn=False
        )
        results.append(dict(zip(rows.tolist(), logits)))

    assert [{0, 1, 2, 3, 4}, {1, 3, 4}] == [set(found) for found in results]
    for row, logits in results[1].items():
        torch.testing.assert_close(logits, results[0][row], rtol=1e-4, atol=1e-4)


def test_memory_is_counted_once_for_a_shared_prompt(base):
    state = base.sampling_state(Workers(1))
    one = state.bytes_needed(1, 0, 0)

    assert one == 2 * base.spec.layers * base.spec.kv_heads * base.spec.head_dim * 4
    assert (100 + 8 * 20) * one == state.bytes_needed(100, 8, 20)
