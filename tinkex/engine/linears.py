"""The frozen matrices of a base model, which adapters change. Does not know about adapters."""

from __future__ import annotations

from typing import Protocol

import attrs
from torch import Tensor


@attrs.frozen
class Part:
    """Rows start..stop of a fused weight, which are the module *name* in the checkpoint."""

    name: str
    start: int
    stop: int


@attrs.frozen(eq=False)
class Linear:
    """A frozen matrix of one or several modules, or those of all experts.

    Attributes:
        weight: (out, in), or of experts (experts, out, in).
        group: attn, mlp or unembed.
        scales: (out,) where *weight* is int8: factors of its rows.
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


class Linears(Protocol):
    """The matrices of a model, with or without an adapter."""

    def forward(self, key: str, x: Tensor) -> Tensor:
        """x (N, in) -> (N, out)."""

    def backward(self, key: str, dy: Tensor, x: Tensor, *, wants_dx: bool = True) -> Tensor | None:
        """Take the adapter's gradients of dy (N, out) at x, and give dx (N, in)."""

    def matrix(self, key: str) -> Tensor | None:
        """The (out, in) matrix where one does for all rows, and no bias or gradients are wanted."""


def given(x: Tensor | None) -> Tensor:
    """x, which cannot be None here."""
    if x is None:
        raise RuntimeError("a requested gradient was not computed.")
    return x
