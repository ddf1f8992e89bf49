"""Matrix products as the machine likes them. Knows nothing of what they mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Columns of a wide result computed at a time on the CPU: a block that stays in the cache makes
#: the product of few rows with a large vocabulary up to a third faster.
BLOCK = 1024

#: From how many columns on a result is wide.
WIDE = 8192


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, in) times weight (out, in) transposed, plus bias (out,) -> (N, out)."""
    if x.device.type != "cpu" or len(weight) < WIDE:
        return F.linear(x, weight, bias)
    out = x.new_empty(len(x), len(weight))
    for start in range(0, len(weight), BLOCK):
        columns = slice(start, start + BLOCK)
        torch.mm(x, weight[columns].T, out=out[:, columns])
    return out if bias is None else out.add_(bias)
