"""Training data for the checks, and a measure of gradients: how far one small step moves a model.

Most servers do not report gradients, so their size is measured with a step. With beta1 = beta2 = 0
and an eps much larger than the gradient, AdamW is plain gradient descent (update = rate *
gradient), and twice the gradient reduces the loss twice as much. A server that divides gradients by
weights or sequences, drops a chunk or runs one twice is thus detected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tinkex import types
from tinkex.conformance.client import Broken
from tinkex.conformance.context import Model
from tinkex.runtime.responses import Answer

#: Much larger than the gradients of a sum over a dozen tokens.
_EPS = 1e4
#: Relative change of the loss by one step: above rounding errors, below the effect of curvature.
_AIM = 0.005
#: Relative difference of two changes that should be equal.
TOLERANCE = 0.3

#: Token ids that every vocabulary has.
TOKENS = np.random.default_rng(5).integers(40, 120, 16).tolist()
OTHERS = np.random.default_rng(6).integers(40, 120, 16).tolist()


def datum(tokens: Sequence[int] = TOKENS, weight: float = 1.0) -> types.Datum:
    """A datum that trains to predict each of *tokens* from those before it."""
    return types.Datum(
        types.ModelInput.from_ints(list(tokens[:-1])),
        {"target_tokens": list(tokens[1:]), "weights": [weight] * (len(tokens) - 1)},
    )


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest absolute difference."""
    return float(np.abs(a - b).max())


class Slope:
    """Compares the effect of small steps of plain gradient descent on a model."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._rate = 1e-6
        self._calibrate()

    def _calibrate(self) -> None:
        """Find a rate at which one datum of weight 1 changes the loss a little."""
        for _ in range(15):
            before = self.loss()
            share = abs(self.fall([datum()])) / before
            if 0.3 * _AIM < share < 3 * _AIM:
                return
            self._rate *= float(np.clip(_AIM / max(share, 1e-9), 0.02, 30.0))
        raise Broken("no learning rate changes the loss by a small amount")

    def loss(self) -> float:
        """The loss of one datum of weight 1, in nats, from its log-probabilities."""
        return -float(self._model.logprobs([datum()]).sum())

    def step(self) -> Answer:
        """Send an optimizer step."""
        return self._model.step(learning_rate=self._rate * _EPS, beta1=0.0, beta2=0.0, eps=_EPS)

    def fall(self, *batches: list[types.Datum]) -> float:
        """How much a step on *batches*, one request each, reduces the loss."""
        return self.fall_by(lambda: [self._model.output(self._model.batch(b)) for b in batches])

    def fall_by(self, accumulate: Callable[[], object]) -> float:
        """How much a step reduces the loss after *accumulate* has added gradients."""
        before = self.loss()
        accumulate()
        self._model.run(self.step(), "optim_step")
        return before - self.loss()

    def check(self, expected: float, accumulate: Callable[[], object], wrong: str) -> float:
        """Measure *accumulate* and a step in units of one datum of weight 1.

        Raises:
            Broken: If the result is not *expected*; *wrong* begins the message.
        """
        unit = self.fall([datum()])
        ratio = self.fall_by(accumulate) / unit
        if abs(ratio - expected) > TOLERANCE * max(expected, 1.0):
            raise Broken(
                f"{wrong}: the step changed the loss {ratio:.2f} times as "
                f"much, not {expected:g} times"
            )
        return ratio
