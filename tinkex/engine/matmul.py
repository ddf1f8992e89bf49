"""Matrix products by the fastest library for their shape. Does not know what they are for.

torch multiplies float32 on a CPU with MKL, which uses its AVX-512 kernels only on Intel's
processors: on others it reaches half of the cores' peak. oneDNN, which torch includes, reaches the
peak. So oneDNN is used on processors with AVX-512, for products large enough to repay its set-up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tinkex.engine import int8

#: Products with fewer multiplications than this are not worth oneDNN's set-up cost for a new shape,
#: unless the matrix is LARGE: decoding multiplies with it at every step.
WORTH_ASKING = 2**24
LARGE = 2**18

#: A result with at least this many columns is wide: the CPU computes it in blocks that stay in the
#: cache, of this many columns if rows are few, of fewer columns if they are many.
WIDE = 8192
BLOCK = 1024

#: Up to this many float32 rows, MKL computes the result transposed: the large matrix is then the
#: first operand, which MKL divides among the cores and reads once. If the result is at least TALL
#: times as wide as the rows, up to FEW_OF_TALL rows. (4 times faster for 2 rows, by a third for 16;
#: slower for matrices smaller than twice LARGE.)
FEW = 4
TALL = 4
FEW_OF_TALL = 16


def _find_onednn() -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """(x, weight, bias) -> x weight^T + bias by oneDNN; None where it is missing or no faster."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        linear = torch.ops.mkldnn._linear_pointwise.default
        x, weight = torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(0, 1, 8).view(2, 4)
        if not torch.allclose(linear(x, weight, None, "none", [], ""), x @ weight.T):
            return None
    except (AttributeError, RuntimeError, TypeError):  # not part of torch's public API
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
    if not is_ours:  # in bfloat16 torch's default is up to twice as fast
        return F.linear(x, weight, bias)
    out = x.new_empty(len(x), len(weight))
    if is_few:
        # A single row is doubled, because a matrix-vector product uses one core only.
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
    else:  # the thinner one first: it is the one that may have to be copied
        total.add_(_onednn(y.T.contiguous(), _dense(x), None).T, alpha=scale)


def _is_worth(x: Tensor, weight: Tensor) -> bool:
    """True if oneDNN multiplies these faster. It does not support autograd."""
    return (
        (x.numel() * len(weight) >= WORTH_ASKING or weight.numel() >= LARGE)
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


def _rows_together(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _dense(weight: Tensor) -> Tensor:
    """*weight* as a dense matrix, by rows or columns: strided ones are a thousand times slower."""
    if weight.is_contiguous() or weight.T.is_contiguous():
        return weight
    return weight.T.contiguous().T if weight.stride(0) == 1 else weight.contiguous()
