"""Matrix products by the fastest library for their shape. Does not know what they mean.

torch multiplies float32 on a CPU with MKL, which keeps its AVX-512 kernels for Intel's processors:
on others it reaches half of what the cores can do. oneDNN, which torch brings along, reaches all of
it. So it is asked where there is AVX-512, and the product large enough to repay the asking.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tinkex.engine import int8

#: So many multiplications repay what oneDNN costs to prepare a product of a shape that was not
#: there before, as micro-batches have. So does any product with a LARGE matrix, with which decoding
#: multiplies again and again.
WORTH_ASKING = 2**24
LARGE = 2**18

#: From how many columns on a result is wide: the CPU computes so many of them at a time, if rows
#: are few, and fewer if they are many, so that a block stays in the cache.
WIDE = 8192
BLOCK = 1024

#: Up to so many rows of float32 MKL computes the result transposed: the large matrix then comes
#: first in the product, which it spreads over the cores and reads once. Where the result is TALL
#: times as wide as the rows, up to the second number. (4 times faster for 2 rows, a third for 16;
#: slower for matrices of less than twice LARGE.)
FEW = 4
TALL = 4
FEW_OF_TALL = 16


def _find_onednn() -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """(x, weight, bias) -> x weight^T + bias by oneDNN; None where it is not there or no better."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        linear = torch.ops.mkldnn._linear_pointwise.default
        x, weight = torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(0, 1, 8).view(2, 4)
        if not torch.allclose(linear(x, weight, None, "none", [], ""), x @ weight.T):
            return None
    except (AttributeError, RuntimeError, TypeError):  # it is not a public part of torch
        return None
    return lambda x, weight, bias: linear(x, weight, bias, "none", [], "")


_onednn = _find_onednn()


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None
) -> Tensor:
    """x (N, in) times weight (out, in) transposed, plus bias (out,) -> (N, out).

    Args:
        scales: (out,) of a weight that is int8.
    """
    if scales is not None:
        return int8.linear(x, weight, scales, bias)
    if _onednn is not None and _is_worth(x, weight):
        return _onednn(_rows_together(x), _dense(weight), bias)
    is_wide = len(weight) >= WIDE
    is_tall = len(weight) >= TALL * x.shape[1]
    is_few = 0 < len(x) <= (FEW_OF_TALL if is_tall else FEW) and weight.numel() >= 2 * LARGE
    is_ours = x.device.type == "cpu" and x.dtype == torch.float32 and (is_wide or is_few)
    if not is_ours:  # in bfloat16 oneDNN's own way is up to twice as fast as either
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


def product(x: Tensor, y: Tensor) -> Tensor:
    """x (M, K) times y (K, N) -> (M, N)."""
    if _onednn is not None and _is_worth(x, y.T):
        return _onednn(_rows_together(x), _dense(y.T), None)
    return torch.mm(x, y)


def add_product(total: Tensor, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
    """total (M, N) += scale times x (M, K) times y (K, N), in the precision of *total*."""
    if x.dtype != total.dtype:
        total.add_(torch.mm(x, y), alpha=scale)
    elif _onednn is None or not _is_worth(x, y.T):
        total.addmm_(x, y, alpha=scale)
    elif len(x) <= y.shape[1]:
        total.add_(_onednn(x.contiguous(), _dense(y.T), None), alpha=scale)
    else:  # the thinner one first: if one has to be copied, it is that one
        total.add_(_onednn(y.T.contiguous(), _dense(x), None).T, alpha=scale)


def _is_worth(x: Tensor, weight: Tensor) -> bool:
    """True if oneDNN can multiply these faster. It computes no derivatives."""
    return (
        (x.numel() * len(weight) >= WORTH_ASKING or weight.numel() >= LARGE)
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


def _rows_together(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _dense(weight: Tensor) -> Tensor:
    """Without gaps, by rows or by columns: with gaps it is multiplied a thousand times slower."""
    if weight.is_contiguous() or weight.T.is_contiguous():
        return weight
    return weight.T.contiguous().T if weight.stride(0) == 1 else weight.contiguous()
