"""Matrix products as the machine likes them. Knows nothing of what they mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: From how many columns on a result is wide: the CPU computes so many of them at a time, if rows
#: are few, and fewer if they are many, so that a block stays in the cache.
WIDE = 8192
BLOCK = 1024

#: Up to so many rows the CPU computes the result transposed: the large matrix then comes first in
#: the product, which the libraries spread over the cores and read once. Where the result is TALL
#: times as wide as the rows, up to the second number. (Measured with MKL: 4 times faster for 2
#: rows, a third for 16.)
FEW = 4
TALL = 4
FEW_OF_TALL = 16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, in) times weight (out, in) transposed, plus bias (out,) -> (N, out)."""
    is_wide = len(weight) >= WIDE
    is_tall = len(weight) >= TALL * x.shape[1]
    is_few = 0 < len(x) <= (FEW_OF_TALL if is_tall else FEW)
    if x.device.type != "cpu" or not (is_wide or is_few):
        return F.linear(x, weight, bias)
    out = x.new_empty(len(x), len(weight))
    if is_few:
        # A single row is doubled: the product of a matrix and a vector uses one core only.
        columns = x.T if len(x) > 1 else x.repeat(2, 1).T
        for start in range(0, len(weight), WIDE):
            some = slice(start, start + WIDE)
            out[:, some] = torch.mm(weight[some], columns)[:, : len(x)].T
    else:
        for start in range(0, len(weight), BLOCK):
            some = slice(start, start + BLOCK)
            torch.mm(x, weight[some].T, out=out[:, some])
    return out if bias is None else out.add_(bias)
