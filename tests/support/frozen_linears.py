"""A base model's own matrices, without any adapter: the simplest `Linears`."""

from __future__ import annotations

import attrs
from torch import Tensor

from tinkex.engine import matmul
from tinkex.engine.linears import Kept
from tinkex.engine.model import Base


@attrs.frozen(eq=False)
class FrozenLinears:
    """Implements `linears.Linears`."""

    base: Base

    def forward(self, key: str, x: Tensor, kept: Kept | None = None) -> Tensor:
        linear = self.base.linears[key]
        return matmul.linear(x, linear.weight, linear.bias, linear.scales)

    def backward(
        self, key: str, dy: Tensor, x: Tensor, kept: Kept | None = None, *, wants_dx: bool = True
    ) -> Tensor | None:
        return matmul.product(dy, self.base.linears[key].weight) if wants_dx else None

    def matrix(self, key: str) -> Tensor | None:
        linear = self.base.linears[key]
        return linear.weight if linear.bias is None and linear.scales is None else None
