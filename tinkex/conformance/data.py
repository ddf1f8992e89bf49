"""Training data for the checks, and how far one small step moves a model.

Most servers let nobody see a gradient. So its size is read off a step: with beta1 = beta2 = 0 and
an eps that dwarfs it, AdamW is plain gradient descent (update = rate * gradient), and twice the
gradient makes the loss fall twice as far. Whatever a server does to gradients (divides them by
weights or sequences, drops a chunk, runs one twice) shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tinkex import types
from tinkex.conformance.asking import Broken
from tinkex.conformance.lab import Model
from tinkex.runtime.responses import Answer

#: Dwarfs the gradients of a sum over a dozen tokens.
_EPS = 1e4
#: How far a step should move the loss: well above rounding, well below where curvature shows.
_AIM = 0.005
#: Of two movements that should be the same.
TOLERANCE = 0.3

#: Ids that every vocabulary has.
TOKENS = np.random.default_rng(5).integers(40, 120, 16).tolist()
OTHERS = np.random.default_rng(6).integers(40, 120, 16).tolist()


def datum(tokens: Sequence[int] = TOKENS, weight: float = 1.0) -> types.Datum:
    """*tokens*, each to be predicted from those before it."""
    return types.Datum(
        types.ModelInput.from_ints(list(tokens[:-1])),
        {"target_tokens": list(tokens[1:]), "weights": [weight] * (len(tokens) - 1)},
    )


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference."""
    return float(np.abs(a - b).max())


class Slope:
    """Small steps of plain gradient descent on a model, measured against each other."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._rate = 1e-6
        self._calibrate()

    def _calibrate(self) -> None:
        """Find a rate at which one datum of weight 1 moves the loss a little."""
        for _ in range(15):
            before = self.loss()
            share = abs(self.fall([datum()])) / before
            if 0.3 * _AIM < share < 3 * _AIM:
                return
            self._rate *= float(np.clip(_AIM / max(share, 1e-9), 0.02, 30.0))
        raise Broken("no step of any size moves the loss a little")

    def loss(self) -> float:
        """Of one datum of weight 1, in nats, from its log-probabilities."""
        return -float(self._model.logprobs([datum()]).sum())

    def step(self) -> Answer:
        """Send the step."""
        return self._model.step(learning_rate=self._rate * _EPS, beta1=0.0, beta2=0.0, eps=_EPS)

    def fall(self, *batches: list[types.Datum]) -> float:
        """How far the loss falls by a step on *batches*, each a request."""
        return self.fall_by(lambda: [self._model.output(self._model.batch(b)) for b in batches])

    def fall_by(self, accumulate: Callable[[], object]) -> float:
        """How far the loss falls by a step on what *accumulate* adds up."""
        before = self.loss()
        accumulate()
        self._model.run(self.step(), "optim_step")
        return before - self.loss()

    def check(self, expected: float, accumulate: Callable[[], object], wrong: str) -> float:
        """
        How far *accumulate* and a step move the loss, in units of one datum of weight 1.

        Raises:
            Broken: If that is not *expected*; *wrong* says what it would mean.
        """
        unit = self.fall([datum()])
        ratio = self.fall_by(accumulate) / unit
        if abs(ratio - expected) > TOLERANCE * max(expected, 1.0):
            raise Broken(f"{wrong}: the step went {ratio:.2f} times as far, not {expected:g}")
        return ratio
