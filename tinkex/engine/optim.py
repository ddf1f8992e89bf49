"""AdamW over one flat vector of parameters (Loshchilov and Hutter 2019), as torch.optim.AdamW.

Each step brings its own settings; only the moments and the step count are kept. Does not know what
the parameters mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tinkex import types
from tinkex.engine.memory import kind_of

#: Parameters that are updated at a time, by kind of device: on a CPU so few that they stay in the
#: caches, and need no temporary vector of all of them.
PARAMETERS = {"cpu": 2**18, "cuda": 2**30}


class AdamW:
    """Moments and step count for a flat vector of *size* parameters.

    Attributes:
        m, v: (size,) float32, running means of the gradient and of its square.
        steps: how many steps have been taken.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.m = torch.zeros(size, device=device)
        self.v = torch.zeros(size, device=device)
        self.steps = 0

    def step(self, weights: Tensor, gradient: Tensor, params: types.AdamParams) -> None:
        """One update of *weights* in place; *gradient* is not changed."""
        self.steps += 1
        step_size = params.learning_rate / (1 - params.beta1**self.steps)
        root = math.sqrt(1 - params.beta2**self.steps)
        most = PARAMETERS[kind_of(weights.device)]
        parts = (x.split(most) for x in (weights, gradient, self.m, self.v))
        for w, g, m, v in zip(*parts):
            m.lerp_(g, 1 - params.beta1)
            v.mul_(params.beta2).addcmul_(g, g, value=1 - params.beta2)
            w.mul_(1 - params.learning_rate * params.weight_decay)
            denominator = v.sqrt().div_(root).add_(params.eps)
            w.addcdiv_(m, denominator, value=-step_size)


def clip_(gradient: Tensor, norm: float, largest: float) -> None:
    """Scale *gradient*, whose L2 norm is *norm*, in place so that its norm is at most *largest*.

    As torch.nn.utils.clip_grad_norm_, whose 1e-6 guards against division by zero.
    """
    if norm > largest:
        gradient.mul_(largest / (norm + 1e-6))
