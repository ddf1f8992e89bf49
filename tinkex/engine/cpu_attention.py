"""Attention within packed sequences and its derivative in compiled code, on a CPU.

torch's kernels take two to six times as long for sequences as short as chats: they work on padded
batches, convert bfloat16 to float32, and compute what no query attends to. Knows the layout of
`cpu_attention.c`; does not know about models.
"""

from __future__ import annotations

import functools

import attrs
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinkex.engine import cpu_kernels
from tinkex.engine.cpu_kernels import ATTENTION, WIDEST, Kernel

#: Largest relative difference from torch's results in float64, by type.
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 0.02}


@attrs.frozen(eq=False)
class Settings:
    """What attention does, besides its inputs.

    Attributes:
        heads, kv_heads, size: H, G and D of queries, keys and values (N, (H + 2 G) D).
        scale: factor on products of queries and keys.
        cap: soft cap of the scaled products, at +-cap; 0 is no cap.
        window: positions that a query attends to, including its own; 0 is all.
    """

    heads: int
    kv_heads: int
    size: int
    scale: float
    cap: float = 0.0
    window: int = 0


@attrs.frozen(eq=False)
class Saved:
    """What the backward pass needs.

    Attributes:
        out: (N, H D)
        ends: (N, H) float32, logarithms of the sums of the weights.
    """

    qkv: Tensor
    bounds: npt.NDArray[np.int64]
    out: Tensor
    ends: Tensor
    settings: Settings


def kernel_for(device: torch.device, dtype: torch.dtype, size: int) -> Kernel | None:
    """The compiled code for heads of *size* numbers; None if torch is used instead.

    Compiles it if needed, which takes some seconds.
    """
    if device.type != "cpu" or dtype not in LARGEST_ERROR or size % WIDEST:
        return None
    kernel = cpu_kernels.load_attention()
    return kernel if kernel is not None and agrees_with_torch(kernel, dtype) else None


def forward(
    kernel: Kernel, qkv: Tensor, bounds: npt.NDArray[np.int64], settings: Settings
) -> tuple[Tensor, Saved]:
    """qkv (N, (H + 2 G) D), positions applied -> out (N, H D), and what `backward` needs.

    Args:
        bounds: (B + 1,) where each sequence starts, and N.
    """
    qkv = qkv.contiguous()
    out = qkv.new_empty(len(qkv), settings.heads * settings.size)
    saved = Saved(qkv, bounds, out, torch.empty(len(qkv), settings.heads), settings)
    kernel(_arguments(saved))
    return out, saved


def backward(kernel: Kernel, dout: Tensor, saved: Saved) -> Tensor:
    """dout (N, H D) -> dqkv (N, (H + 2 G) D)."""
    dout, dqkv = dout.contiguous(), torch.empty_like(saved.qkv)
    arguments = _arguments(saved)
    arguments["dout"], arguments["dqkv"] = dout.data_ptr(), dqkv.data_ptr()
    kernel(arguments)
    return dqkv


def _arguments(saved: Saved) -> npt.NDArray[np.void]:
    arguments, settings = np.zeros(1, ATTENTION), saved.settings
    for name in ("qkv", "out", "ends"):
        arguments[name] = getattr(saved, name).data_ptr()
    for name in ("heads", "kv_heads", "size", "scale", "cap", "window"):
        arguments[name] = getattr(settings, name)
    arguments["bounds"] = saved.bounds.ctypes.data
    arguments["sequences"] = len(saved.bounds) - 1
    arguments["is_half"] = saved.qkv.dtype == torch.bfloat16
    arguments["threads"] = torch.get_num_threads()
    return arguments


@functools.cache
def agrees_with_torch(kernel: Kernel, dtype: torch.dtype) -> bool:
    """True if the results for random inputs agree with torch's derivative in float64.

    Guards against faulty compilers and emulated processors, because wrong numbers would go
    unnoticed.
    """
    settings = Settings(4, 2, 2 * WIDEST, 0.3, 5.0, 40)
    bounds = np.array([0, 3, 120, 400])
    generator = torch.Generator().manual_seed(1)
    count, queries = int(bounds[-1]), settings.heads * settings.size
    qkv = torch.randn(count, 2 * queries, generator=generator).to(dtype)
    dout = torch.randn(count, queries, generator=generator).to(dtype)
    out, saved = forward(kernel, qkv, bounds, settings)
    actual = out, backward(kernel, dout, saved)
    expected = _by_torch(qkv.double(), dout.double(), bounds, settings)
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(actual, expected))
    return cpu_kernels.is_close_enough("Compiled attention is", error, LARGEST_ERROR[dtype])


@torch.enable_grad()
def _by_torch(
    qkv: Tensor, dout: Tensor, bounds: npt.NDArray[np.int64], settings: Settings
) -> tuple[Tensor, Tensor]:
    """Attention (N, H D) by all products at once, and the gradient at qkv."""
    qkv = qkv.detach().requires_grad_()
    heads, groups = settings.heads, settings.kv_heads
    outs = []
    for own in qkv.split(np.diff(bounds).tolist()):
        q, k, v = (
            own.view(len(own), -1, settings.size).transpose(0, 1).split([heads, groups, groups])
        )
        k, v = (x.repeat_interleave(heads // groups, dim=0) for x in (k, v))
        scores = q @ k.transpose(1, 2) * settings.scale
        if settings.cap:
            scores = settings.cap * torch.tanh(scores / settings.cap)
        at = torch.arange(len(own))
        seen = (at <= at[:, None]) & (at > at[:, None] - (settings.window or len(own)))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=2)
        outs.append((weights @ v).transpose(0, 1).flatten(1))
    out = torch.cat(outs)
    [dqkv] = torch.autograd.grad((out * dout).sum(), [qkv])
    return out.detach(), dqkv
