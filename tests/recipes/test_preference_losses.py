"""The losses of preference methods, against the papers' formulas in PyTorch and its autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from tinkex.recipes.preference_losses import LOSSES, Answers, Options

OPTIONS = Options(beta=0.3, label_smoothing=0.1, margin=0.7)


def by_torch(name, chosen, rejected, references, tokens):
    """The formula as the paper writes it, on sums of log-probabilities."""
    beta = OPTIONS.beta
    if name == "dpo":
        h = beta * ((chosen - references[0]) - (rejected - references[1]))
        return -0.9 * logsigmoid(h) - 0.1 * logsigmoid(-h)
    if name == "ipo":
        h = (chosen - references[0]) / tokens[0] - (rejected - references[1]) / tokens[1]
        return (h - 1 / (2 * beta)) ** 2
    means = chosen / tokens[0], rejected / tokens[1]
    if name == "simpo":
        return -logsigmoid(beta * (means[0] - means[1]) - OPTIONS.margin)
    odds = [mean - torch.log1p(-torch.exp(mean)) for mean in means]
    return -means[0] - beta * logsigmoid(odds[0] - odds[1])


@pytest.fixture
def numbers():
    """Four pairs: log-probabilities, references, tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 20, (2, 4)).astype(float)
    return -rng.uniform(0.2, 3, (2, 4)) * tokens, -rng.uniform(0.2, 3, (2, 4)) * tokens, tokens


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_slopes_are_those_of_the_formula(name, numbers):
    logprobs, references, tokens = numbers
    chosen, rejected = (torch.tensor(x, requires_grad=True) for x in logprobs)
    expected = by_torch(name, chosen, rejected, torch.tensor(references), torch.tensor(tokens))
    expected.sum().backward()

    loss = LOSSES[name](*(Answers(*parts) for parts in zip(logprobs, references, tokens)), OPTIONS)

    np.testing.assert_allclose(loss.value, expected.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(loss.chosen_slope, chosen.grad.numpy(), rtol=1e-10)
    np.testing.assert_allclose(loss.rejected_slope, rejected.grad.numpy(), rtol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_pairs_stay_finite(name):
    """An answer that is certain, and one that is all but impossible."""
    sides = [Answers(np.array([value]), np.zeros(1), np.array([5.0])) for value in (-1e-12, -1e5)]
    for pair in (sides, sides[::-1]):
        loss = LOSSES[name](*pair, Options())

        assert np.isfinite([loss.value, loss.chosen_slope, loss.rejected_slope]).all()


def test_the_untrained_model_has_no_margin():
    same = Answers(np.array([-7.0]), np.array([-7.0]), np.array([3.0]))
    other = Answers(np.array([-9.0]), np.array([-9.0]), np.array([4.0]))

    loss = LOSSES["dpo"](same, other, Options())

    assert [0.0] == loss.chosen_reward - loss.rejected_reward
    assert [pytest.approx(np.log(2))] == loss.value
