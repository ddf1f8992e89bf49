"""The losses of preference methods: pure functions of the log-probabilities of answers.

Each function takes both answers of P pairs and returns the loss of each pair, with its derivatives.
Does not know about tokens, models or servers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: Smallest 1 - p of an answer in ORPO's odds p / (1 - p).
LEAST_COMPLEMENT = 1e-7


@attrs.frozen(eq=False)
class Answers:
    """One answer of each pair.

    Attributes:
        logprobs: (P,) log-probability of the whole answer, in nats: the sum over its tokens.
        reference: (P,) the same under the reference model; zeros if the method has none.
        tokens: (P,) number of tokens of each.
    """

    logprobs: Floats
    reference: Floats
    tokens: Floats

    @property
    def gain(self) -> Floats:
        """Log-probability of the answer minus that under the reference."""
        return self.logprobs - self.reference

    @property
    def mean(self) -> Floats:
        """Log-probability per token."""
        return self.logprobs / self.tokens


@attrs.frozen(eq=False)
class Loss:
    """The loss of each pair.

    Attributes:
        value: (P,).
        chosen_slope, rejected_slope: (P,) derivatives of the loss by `Answers.logprobs`.
        chosen_reward, rejected_reward: (P,) implicit rewards; the chosen one should be higher.
    """

    value: Floats
    chosen_slope: Floats
    rejected_slope: Floats
    chosen_reward: Floats
    rejected_reward: Floats


@attrs.frozen
class Options:
    """
    Args:
        beta: how strongly the model is kept close to the reference; in SimPO the scale of the
            rewards, in ORPO the weight of the odds ratio.
        label_smoothing: DPO: assumed fraction of pairs with swapped labels.
        margin: SimPO: target difference between the two rewards.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    margin: float = 0.5


def dpo(chosen: Answers, rejected: Answers, options: Options) -> Loss:
    """-log sigmoid(beta (gain of chosen - gain of rejected)) (Rafailov et al. 2023).

    With label smoothing e: 1 - e times this, plus e times the loss of the swapped pair.
    """
    beta, smoothing = options.beta, options.label_smoothing
    x = beta * (chosen.gain - rejected.gain)
    value = -(1 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x)
    slope = beta * (np.exp(log_sigmoid(x)) - (1 - smoothing))
    return Loss(value, slope, -slope, beta * chosen.gain, beta * rejected.gain)


def ipo(chosen: Answers, rejected: Answers, options: Options) -> Loss:
    """(gap - 1 / (2 beta))^2, with the gap between the gains per token (Azar et al. 2023)."""
    beta = options.beta
    gains = chosen.gain / chosen.tokens, rejected.gain / rejected.tokens
    gap = gains[0] - gains[1] - 1 / (2 * beta)
    slope = 2 * gap
    return Loss(
        gap**2, slope / chosen.tokens, -slope / rejected.tokens, beta * gains[0], beta * gains[1]
    )


def simpo(chosen: Answers, rejected: Answers, options: Options) -> Loss:
    """-log sigmoid(beta (mean of chosen - mean of rejected) - margin) (Meng et al. 2024)."""
    beta = options.beta
    x = beta * (chosen.mean - rejected.mean) - options.margin
    slope = -beta * np.exp(log_sigmoid(-x))
    return Loss(
        -log_sigmoid(x),
        slope / chosen.tokens,
        -slope / rejected.tokens,
        beta * chosen.mean,
        beta * rejected.mean,
    )


def orpo(chosen: Answers, rejected: Answers, options: Options) -> Loss:
    """-mean of chosen - beta log sigmoid(log odds of chosen - log odds of rejected).

    The odds are p / (1 - p) of p = exp(mean) (Hong et al. 2024).
    """
    beta = options.beta
    complements = [
        np.maximum(-np.expm1(side.mean), LEAST_COMPLEMENT) for side in (chosen, rejected)
    ]
    odds = [side.mean - np.log(c) for side, c in zip((chosen, rejected), complements)]
    x = odds[0] - odds[1]
    pull = -beta * np.exp(log_sigmoid(-x))  # d loss / dx; d odds / d mean is 1 / complement
    return Loss(
        -chosen.mean - beta * log_sigmoid(x),
        (pull / complements[0] - 1) / chosen.tokens,
        -pull / complements[1] / rejected.tokens,
        beta * chosen.mean,
        beta * rejected.mean,
    )


def log_sigmoid(x: Any) -> Floats:
    """log(1 / (1 + exp(-x))), without overflow."""
    found: Floats = -np.logaddexp(0.0, -x)
    return found


LOSSES: dict[str, Callable[[Answers, Answers, Options], Loss]] = {
    loss.__name__: loss for loss in (dpo, ipo, simpo, orpo)
}

#: Methods that compare with a reference model.
WITH_REFERENCE = frozenset({"dpo", "ipo"})
