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
    """A frozen matrix (out, in) of one or several modules; *group* is attn, mlp or unembed.

    Attributes:
        scales: (out,) where *weight* is int8: factors of its rows.
    """

    weight: Tensor
    bias: Tensor | None
    parts: tuple[Part, ...]
    group: str
    scales: Tensor | None = None


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
