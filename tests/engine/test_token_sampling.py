"""Choosing tokens: the right distribution, and noise that depends on the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinkex.engine import token_sampling


def _settings(n, *, seed=0, temperature=1.0, top_k=0, top_p=1.0):
    """n rows of one request, each at a separate position."""
    return token_sampling.Settings(
        np.repeat(token_sampling.sequence_keys(seed, 1), n),
        np.arange(n),
        np.full(n, temperature, np.float32),
        np.full(n, top_k, np.int64),
        np.full(n, top_p, np.float32),
    )


def _frequencies(logits, **settings):
    n = 40_000
    tokens, _ = token_sampling.choose(torch.tensor(logits).repeat(n, 1), _settings(n, **settings))
    return np.bincount(tokens, minlength=len(logits)) / n


LOGITS = [2.0, 0.0, 1.0, -1.0, 1.5, -3.0, 0.5]  # 7: not a whole number of blocks


def _softmax(logits):
    weights = np.exp(np.asarray(logits, float))
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_come_as_often_as_they_should(temperature):
    """The two-level choice is an exact sample of the softmax."""
    expected = _softmax(np.array(LOGITS) / temperature)

    assert _frequencies(LOGITS, temperature=temperature) == pytest.approx(expected, abs=0.01)


def test_top_k_keeps_the_likeliest():
    expected = np.where(np.array(LOGITS) >= 1.0, np.exp(LOGITS), 0)

    assert _frequencies(LOGITS, top_k=3) == pytest.approx(expected / expected.sum(), abs=0.01)


def test_top_p_keeps_as_many_as_are_needed():
    """The token that crosses the threshold is kept: 0.41 + 0.25 < 0.7 <= 0.41 + 0.25 + 0.15."""
    expected = np.where(np.array(LOGITS) >= 1.0, np.exp(LOGITS), 0)

    assert _frequencies(LOGITS, top_p=0.7) == pytest.approx(expected / expected.sum(), abs=0.01)


def test_top_p_is_of_what_top_k_has_left():
    """As in transformers: first top_k, then top_p of the rest."""
    kept = np.where(np.array(LOGITS) >= 1.5, np.exp(LOGITS), 0)

    actual = _frequencies(LOGITS, top_k=3, top_p=0.7)  # 0.51, 0.82, 1

    assert actual == pytest.approx(kept / kept.sum(), abs=0.01)


def test_top_p_looks_further_where_the_first_candidates_are_not_enough():
    """A flat distribution needs most of the vocabulary."""
    logits = torch.zeros(2000, 1000)

    tokens, _ = token_sampling.choose(logits, _settings(2000, top_p=0.9))

    assert len(set(tokens.tolist())) > 700


def test_temperature_zero_takes_the_likeliest():
    tokens, logprobs = token_sampling.choose(torch.tensor([LOGITS]), _settings(1, temperature=0.0))

    assert [0] == tokens.tolist()
    assert logprobs == pytest.approx(np.log(_softmax(LOGITS)[:1]), abs=1e-6)


def test_logprobs_are_those_of_temperature_one():
    """Whatever was done to the distribution: training needs the model's own."""
    logits = torch.randn(50, 700, generator=torch.Generator().manual_seed(0))
    settings = _settings(50, temperature=0.3, top_k=5, top_p=0.8)

    tokens, logprobs = token_sampling.choose(logits, settings)

    expected = logits.log_softmax(1)[torch.arange(50), torch.from_numpy(tokens)]
    np.testing.assert_allclose(logprobs, expected.numpy(), atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours():
    """Rows with other settings beside it, and another place in the batch."""
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    settings = token_sampling.Settings(
        token_sampling.sequence_keys(5, 6),
        np.arange(6) * 3,
        np.array([1, 0, 0.7, 1, 1.3, 1], np.float32),
        np.array([0, 0, 4, 0, 0, 9], np.int64),
        np.array([1, 1, 0.9, 0.5, 1, 1], np.float32),
    )

    together, _ = token_sampling.choose(logits, settings)

    for i in range(6):
        alone, _ = token_sampling.choose(logits[i : i + 1], settings.rows(np.array([i])))
        assert together[i] == alone[0]


def test_the_samples_of_a_request_differ():
    """Each sample has its own key, and so has each seed."""
    keys = {int(k) for seed in (0, 1, 2**63 - 1) for k in token_sampling.sequence_keys(seed, 50)}

    assert 150 == len(keys)


def test_the_noise_is_gumbel():
    """Mean 0.5772, variance pi^2 / 6."""
    noise = token_sampling.gumbel(
        token_sampling.sequence_keys(0, 300), np.arange(300), np.arange(1000)
    )

    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.02)
