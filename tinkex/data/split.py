"""Splits examples into training and held-out ones, and orders them.

Pure functions of a few numbers, so that a resumed run sees the same order.
"""

from __future__ import annotations

from functools import lru_cache

import attrs
import numpy as np


def split(count: int, eval_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """
    Indices of the examples to train on, and of those held out; the same for the same arguments.

    At least one is held out if *eval_fraction* > 0 and there are at least two.
    """
    held_out = round(count * eval_fraction)
    if eval_fraction > 0 and count >= 2:
        held_out = min(max(held_out, 1), count - 1)
    order = np.random.default_rng([seed, 0]).permutation(count)
    return sorted(order[held_out:].tolist()), sorted(order[:held_out].tolist())


@attrs.frozen
class Plan:
    """The examples of each step: a pure function of these numbers.

    Steps count from 1. Each epoch uses every example once, in its own order; its last batch may be
    smaller. *max_steps* limits the plan; None is no limit.
    """

    examples: int
    batch_size: int
    epochs: int
    seed: int
    max_steps: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.examples // self.batch_size)

    @property
    def total_steps(self) -> int:
        steps = self.epochs * self.steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def epoch(self, step: int) -> int:
        """The epoch of *step*, from 1."""
        return (step - 1) // self.steps_per_epoch + 1

    def batch(self, step: int) -> list[int]:
        """Positions, among the training examples, of those in *step*."""
        start = (step - 1) % self.steps_per_epoch * self.batch_size
        order = _epoch_order(self.examples, self.seed, self.epoch(step))
        return order[start : start + self.batch_size]


@lru_cache(maxsize=2)
def _epoch_order(examples: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = np.random.default_rng([seed, 1, epoch]).permutation(examples).tolist()
    return order
