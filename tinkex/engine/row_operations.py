"""Operations on the rows of a batch: norms, gated activations and rotations, and their derivatives;
and sums of likelihoods.

They are all of a layer that is neither a product with a matrix nor attention, and what sampling a
token reads all logits for. `TorchRows` computes them on any device; `cpu_rows.CompiledRows` on a
CPU with a C compiler. Do not know about layers.

Notation: N rows, d width, M width of an MLP, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

#: Activations of the MLP's gate, by their names in config.json: the function and its derivative,
#: (gradient, input) -> gradient at the input.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu_pytorch_tanh": (
        partial(F.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
}


class RowOperations(Protocol):
    """What the layers of a model and token sampling need."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """RMSNorm over the last dimension of x (..., d) -> (normed, 1 / rms (..., 1) float32)."""

    def norm_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, plus: Tensor | None = None
    ) -> Tensor:
        """Gradient at x (..., d) of `norm`, and *plus* (..., d) added."""

    def gate(self, gate_up: Tensor, activation: str) -> Tensor:
        """gate_up (N, 2 M) -> activation(gate) up (N, M)."""

    def gate_backward(self, dact: Tensor, gate_up: Tensor, activation: str) -> Tensor:
        """Gradient at gate_up (N, 2 M) of `gate`. May overwrite *dact* (N, M)."""

    def rotate_(
        self, heads: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, back: bool
    ) -> None:
        """Rotate the first R columns of each of heads (N, H, D) in place, or *back*.

        Args:
            cos, sin: (N, 1, R / 2) of the type of *heads*.
            interleaved: pairs are (2 i, 2 i + 1); else (i, i + R / 2), as in transformers' Llama.
        """

    def block_sums(self, logits: Tensor, temperatures: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """float32 logits (N, V) -> the largest (N, 1), and for each *block* of columns the sum
        (N, blocks) of e^((logit - largest) / temperature).

        Args:
            temperatures: (N, 1) float32.
        """


class TorchRows:
    """By torch, on any device."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        rstd = (norm.square_().div_(x.shape[-1])).add_(eps).rsqrt_()
        if weight.dtype != x.dtype:  # weight is more precise than x: round the result once
            return (x * rstd).mul_(weight).to(x.dtype), rstd
        return torch.mul(x, rstd.to(x.dtype)).mul_(weight), rstd

    def norm_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, plus: Tensor | None = None
    ) -> Tensor:
        """rstd w dy - x rstd^3 mean(w dy x), plus *plus*."""
        if weight.dtype != x.dtype:
            exact = self.norm_backward(dy.to(weight.dtype), x.to(weight.dtype), weight, rstd)
            dx = exact.to(dy.dtype)
        else:
            dx = dy * weight
            dot = torch.linalg.vecdot(dx, x).unsqueeze(-1)
            scale = rstd.to(x.dtype)
            dx.mul_(scale)
            dx.addcmul_(x, dot.mul_(scale**3).div_(x.shape[-1]), value=-1)
        return dx if plus is None else dx.add_(plus)

    def gate(self, gate_up: Tensor, activation: str) -> Tensor:
        gate, up = gate_up.chunk(2, dim=1)
        return ACTIVATIONS[activation][0](gate).mul_(up)

    def gate_backward(self, dact: Tensor, gate_up: Tensor, activation: str) -> Tensor:
        activate, activate_backward = ACTIVATIONS[activation]
        gate, up = gate_up.chunk(2, dim=1)
        dgate_up = torch.empty_like(gate_up)
        dgate, dup = dgate_up.chunk(2, dim=1)
        torch.mul(dact, activate(gate), out=dup)
        dgate.copy_(activate_backward(dact.mul_(up), gate))
        return dgate_up

    def rotate_(
        self, heads: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, back: bool
    ) -> None:
        half = cos.shape[-1]
        if interleaved:
            first, second = heads[..., : 2 * half : 2], heads[..., 1 : 2 * half : 2]
        else:
            first, second = heads[..., :half], heads[..., half : 2 * half]
        sin = -sin if back else sin
        turned = first * sin
        first.mul_(cos).addcmul_(second, sin, value=-1)
        second.mul_(cos).add_(turned)

    def block_sums(self, logits: Tensor, temperatures: Tensor, block: int) -> tuple[Tensor, Tensor]:
        largest = logits.amax(dim=1, keepdim=True)
        likelihoods = torch.sub(logits, largest).div_(temperatures).exp_()
        missing = -logits.shape[1] % block
        if missing:
            likelihoods = F.pad(likelihoods, (0, missing))
        return largest, likelihoods.view(len(logits), -1, block).sum(dim=2)


TORCH_ROWS = TorchRows()
