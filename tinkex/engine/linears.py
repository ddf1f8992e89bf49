"""The frozen matrices of a base model, which adapters change. Does not know about adapters."""

from __future__ import annotations

from typing import Protocol

import attrs
from torch import Tensor


@attrs.frozen
class Part:
    """Rows start..stop of a fused weight: the module *name* in the checkpoint."""

    name: str
    start: int
    stop: int


@attrs.frozen(eq=False)
class Linear:
    """A frozen matrix of one module, of several fused modules, or of all experts.

    Attributes:
        weight: (out, in), or of experts (experts, out, in).
        group: attn, mlp or unembed.
        scales: (out,) factors of the rows if *weight* is int8.
        parameter: name of the parameter that holds the matrices of experts.
    """

    weight: Tensor
    bias: Tensor | None
    parts: tuple[Part, ...]
    group: str
    scales: Tensor | None = None
    parameter: str = ""

    @property
    def experts(self) -> int:
        """How many matrices it has."""
        return len(self.weight) if self.weight.dim() == 3 else 1


#: Products of the forward pass that `Linears.backward` need not compute again, by the matrix's key.
Kept = dict[str, Tensor]


class Linears(Protocol):
    """The matrices of a model, with or without an adapter."""

    def forward(self, key: str, x: Tensor, kept: Kept | None = None) -> Tensor:
        """x (N, in) -> (N, out). Adds to *kept*."""

    def backward(
        self, key: str, dy: Tensor, x: Tensor, kept: Kept | None = None, *, wants_dx: bool = True
    ) -> Tensor | None:
        """Accumulate the adapter's gradients from dy (N, out) at x; return dx (N, in)."""

    def matrix(self, key: str) -> Tensor | None:
        """The (out, in) matrix if one serves all rows, without bias or gradient; else None."""


def given(x: Tensor | None) -> Tensor:
    """Return x; RuntimeError if it is None."""
    if x is None:
        raise RuntimeError("a requested gradient was not computed.")
    return x
