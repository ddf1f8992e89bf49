"""8-bit weights for sampling: half the memory traffic of bfloat16.

Each row of a matrix has its own scale, the largest of its numbers / 127 (absmax, as in
Dettmers et al. 2022, but for weights only). Activations stay bfloat16. The logits differ from the
exact ones by about a hundredth of their spread, so these weights are not used for training: see
`Engine`. Does not know about layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from tinkex.engine.linears import Linear

#: Up to FEW rows are multiplied by torch's int8 kernel, which reads past the end of a matrix whose
#: columns are not a multiple of WHOLE. Otherwise the matrix is converted to bfloat16 by blocks.
FEW = 8
WHOLE = 16
BLOCK = 2**20


def quantized(linears: Mapping[str, Linear]) -> dict[str, Linear]:
    """The same matrices as int8, with scales."""
    made = {}
    for key, linear in linears.items():
        weight, scales = round_rows(linear.weight)
        made[key] = attrs.evolve(linear, weight=weight, scales=scales)
    return made


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (out, in) -> the nearest (out, in) int8, and scales (out,) of the type of *weight*.

    weight is about int8 times the row's scale; a row of zeros has scale 1.
    """
    largest = weight.abs().amax(dim=1).float()
    scales = torch.where(largest > 0, largest / 127, torch.ones_like(largest)).to(weight.dtype)
    rounded = (weight.float() / scales.float().unsqueeze(1)).round_().clamp_(-127, 127)
    return rounded.to(torch.int8), scales


def linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, in) bfloat16 times (weight (out, in) times scales (out,)) transposed, plus bias (out,)
    -> (N, out)."""
    if 0 < len(x) <= FEW and weight.shape[1] % WHOLE == 0 and _few_rows is not None:
        out = _few_rows(x.contiguous(), weight, scales)
    else:
        out = x.new_empty(len(x), len(weight))
        step = max(1, BLOCK // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)  # whole numbers up to 127 are exact in bfloat16
            out[:, rows] = F.linear(x, weight[rows].to(x.dtype))
        out.mul_(scales)
    return out if bias is None else out.add_(bias)


def _find_few_rows() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """torch's product of a few bfloat16 rows; None where it is missing (not public) or wrong."""
    try:
        multiply: Callable[[Tensor, Tensor, Tensor], Tensor]
        multiply = torch.ops.aten._weight_int8pack_mm.default
        x = torch.linspace(-1, 1, 64).view(2, 32).bfloat16()
        weight = torch.arange(-64, 64, dtype=torch.int8).view(4, 32)
        scales = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.bfloat16)
        expected = (x.float() @ weight.float().T) * scales.float()
        if torch.allclose(multiply(x, weight, scales).float(), expected, rtol=0.02, atol=0.5):
            return multiply
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        pass
    return None


_few_rows = _find_few_rows()
