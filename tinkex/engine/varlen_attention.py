"""Attention over packed sequences by torch's varlen kernel, where available: CUDA, 16 bits.

The kernel needs no padding and supports windows. It is used only if its results on this device
agree with padded attention. Does not know how sequences are batched otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

#: (queries (N, H, D), keys (N, G, D), values, bounds (B + 1,) int32, longest, scale, window)
#: -> (N, H, D)
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, int], Tensor]


@attrs.frozen(eq=False)
class Saved:
    """What the backward pass needs: queries, keys, values and the output."""

    out: Tensor
    parts: Sequence[Tensor]


def torch_kernel(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float, window: int
) -> Tensor:
    """torch's kernel; *window* positions, including the query's, 0 is all."""
    from torch.nn.attention.varlen import varlen_attn

    # The kernel counts only positions before the query's.
    sides = (window - 1 if window else -1, 0)
    out: Tensor = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=sides, enable_gqa=True
    )
    return out


@cache
def kernel_for(device: torch.device, dtype: torch.dtype, size: int) -> Kernel | None:
    """The kernel for heads of *size* numbers; None if it is unavailable or inaccurate."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        is_right = agrees(torch_kernel, device, dtype, size)
    except (ImportError, RuntimeError, TypeError, ValueError) as exc:
        logger.info("torch's attention over packed sequences cannot be used here: %s", exc)
        return None
    if not is_right:
        logger.warning("torch's attention over packed sequences is not used: its numbers differ.")
    return torch_kernel if is_right else None


@torch.enable_grad()
def agrees(kernel: Kernel, device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """True if outputs and gradients of two sequences agree with padded attention."""
    lengths, generator = (5, 12), torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, size) for heads in (4, 2, 2)]
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    bounds = torch.tensor([0, 5, 17], dtype=torch.int32, device=device)
    for window in (0, 3):
        parts = [x.clone().requires_grad_() for x in drawn]
        others = [x.clone().requires_grad_() for x in drawn]
        q, k, v = parts
        out = kernel(q, k, v, bounds, max(lengths), size**-0.5, window)
        queries, keys, values = (x.split(lengths) for x in others)
        pieces = zip(queries, keys, values)
        expected = torch.cat([_one(q, k, v, window) for q, k, v in pieces])
        grads = torch.autograd.grad(out.float().square().sum(), parts)
        wanted = torch.autograd.grad(expected.float().square().sum(), others)
        for one, other in zip((out, *grads), (expected, *wanted)):
            if not torch.allclose(one.float(), other.float(), atol=0.1, rtol=0.1):
                return False
    return True


def _one(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention within one sequence, (T, heads, D) each."""
    at = torch.arange(len(q), device=q.device)
    seen = at <= at[:, None]
    if window:
        seen &= at > at[:, None] - window
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    return out[0].transpose(0, 1)


def forward(
    kernel: Kernel,
    parts: Sequence[Tensor],
    bounds: Tensor,
    longest: int,
    scale: float,
    window: int,
    *,
    save: bool,
) -> tuple[Tensor, Saved | None]:
    """Queries, keys and values (N, heads, D) -> out (N, H D), and what backward needs if *save*."""
    if save:
        parts = [part.detach().requires_grad_() for part in parts]
    with torch.set_grad_enabled(save):
        out = kernel(parts[0], parts[1], parts[2], bounds, longest, scale, window)
    return out.detach().reshape(len(out), -1), Saved(out, parts) if save else None


def backward(dout: Tensor, saved: Saved) -> Tensor:
    """dout (N, H D) -> (N, (H + 2 G) D)."""
    grads = torch.autograd.grad(saved.out, saved.parts, dout.reshape(saved.out.shape))
    return torch.cat(grads, dim=1).view(len(dout), -1)
