"""LoRA: low-rank matrices beside the frozen ones (Hu et al. 2021), y = W x + (alpha / rank) B A x.

An adapter is one flat float32 vector with a view for each matrix, so that the optimizer, clipping
and snapshots are single operations on it. Contains its layout, merging and training;
`finished_lora` samples with it. Knows the base model's matrices by their keys; does not know about
layers, losses or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import attrs
import torch
from torch import Tensor

from tinkex.engine import matmul
from tinkex.engine.linears import Kept, Linear

#: alpha of every adapter, whatever its rank.
ALPHA = 32

#: Adapters are merged into copies of the matrices for training only up to this size, in bytes.
MERGE_LIMIT = 2**30

GROUPS = ("attn", "mlp", "unembed")


@attrs.frozen
class Shape:
    """Rank and adapted groups; adapters of the same base model and shape have the same layout."""

    rank: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True

    @property
    def scale(self) -> float:
        """Factor on B A x."""
        return ALPHA / self.rank

    @property
    def words(self) -> str:
        """The shape in an error message."""
        return f"rank {self.rank} on {', '.join(self.groups)}"

    @property
    def groups(self) -> tuple[str, ...]:
        chosen = (self.train_attn, self.train_mlp, self.train_unembed)
        return tuple(group for group, wanted in zip(GROUPS, chosen) if wanted)


@attrs.frozen(eq=False)
class Factors:
    """The low-rank matrices of one fused matrix.

    Attributes:
        a: (parts * rank, in) view; the A of the parts, stacked.
        b: for each part its (out, rank) view.

    For experts, a is (experts * rank, in), expert by expert, and b (out, rank * experts), rank by
    rank, as in PEFT.
    """

    a: Tensor
    b: tuple[Tensor, ...]


class Layout:
    """Where each adapter matrix lies in the flat vector.

    Attributes:
        linears: the adapted matrices, by key.
        left_out: names of modules that could be adapted but are not.
    """

    def __init__(self, linears: Mapping[str, Linear], shape: Shape) -> None:
        self.shape = shape
        self.left_out = [
            part.name
            for linear in linears.values()
            if linear.group not in shape.groups
            for part in linear.parts
        ]
        self.linears = {k: linear for k, linear in linears.items() if linear.group in shape.groups}
        self.size = sum(
            shape.rank * linear.experts * (len(linear.parts) * linear.weight.shape[-1])
            + shape.rank * linear.experts * linear.weight.shape[-2]
            for linear in self.linears.values()
        )

    def factors(self, flat: Tensor) -> dict[str, Factors]:
        """Views of *flat* (size,) by key."""
        rank, offset, factors = self.shape.rank, 0, {}

        def view(rows: int, columns: int) -> Tensor:
            nonlocal offset
            offset += rows * columns
            return flat[offset - rows * columns : offset].view(rows, columns)

        for key, linear in self.linears.items():
            each = rank * linear.experts
            a = view(len(linear.parts) * each, linear.weight.shape[-1])
            factors[key] = Factors(a, tuple(view(p.stop - p.start, each) for p in linear.parts))
        return factors

    def tensors(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of *flat* by name: "model.layers.0.self_attn.q_proj.lora_A", ..."""
        named = {}
        for key, factors in self.factors(flat).items():
            rank = factors.b[0].shape[1]
            for i, part in enumerate(self.linears[key].parts):
                named[f"{part.name}.lora_A"] = factors.a[i * rank : (i + 1) * rank]
                named[f"{part.name}.lora_B"] = factors.b[i]
        return named


def initialise(layout: Layout, seed: int, device: torch.device) -> Tensor:
    """A fresh adapter: A uniform in +-1/sqrt(in) (PEFT's kaiming_uniform, a = sqrt(5)), B zero.

    Drawn on the CPU, so that one seed gives one adapter on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    flat = torch.zeros(layout.size)
    for factors in layout.factors(flat).values():
        bound = 1 / math.sqrt(factors.a.shape[1])
        factors.a.uniform_(-bound, bound, generator=generator)
    return flat.to(device)


def of_experts(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Views (experts, rank, in) and (experts, out, rank) of a `Factors` of experts."""
    a = a.view(experts, -1, a.shape[1])
    return a, b.view(len(b), -1, experts).permute(2, 0, 1)


def merge_into(out: Tensor, linear: Linear, factors: Factors, scale: float) -> None:
    """Write W + scale B A into *out*, of the shape of W."""
    if linear.weight.dim() == 3:
        a, b = of_experts(factors.a, factors.b[0], linear.experts)
        torch.baddbmm(linear.weight, b, a, alpha=scale, out=out)
        return
    for i, part in enumerate(linear.parts):
        rank = factors.b[i].shape[1]
        a, rows = factors.a[i * rank : (i + 1) * rank], slice(part.start, part.stop)
        torch.addmm(linear.weight[rows], factors.b[i], a, alpha=scale, out=out[rows])


class Workspace:
    """Room for one merged copy of a base model's matrices, used by one adapter at a time."""

    def __init__(self) -> None:
        self._room: dict[str, Tensor] = {}
        self._owner: object = None
        self._merged: set[str] = set()

    def clear(self) -> None:
        """Free the merged copy."""
        self._room.clear()
        self._merged.clear()
        self._owner = None

    def belongs_to(self, owner: object) -> bool:
        """True if the merged copies are *owner*'s."""
        return bool(owner == self._owner)

    def merged(
        self, owner: object, key: str, weight: Tensor, merge_into: Callable[[Tensor], object]
    ) -> Tensor:
        """*weight* with an adapter merged in.

        Args:
            owner: names the adapter and its version.
            merge_into: writes the merged matrix into a tensor; called only if the copy is not
                *owner*'s.
        """
        if owner != self._owner:
            self._owner = owner
            self._merged.clear()
        if key not in self._merged:
            if key not in self._room:
                self._room[key] = torch.empty_like(weight)
            merge_into(self._room[key])
            self._merged.add(key)
        return self._room[key]


def can_merge(linears: Mapping[str, Linear]) -> bool:
    """True if merging adapters into copies of the matrices is exact enough and fits in memory."""
    weights = [linear.weight for linear in linears.values()]
    size = sum(w.numel() * w.element_size() for w in weights)
    return size <= MERGE_LIMIT and all(w.dtype == torch.float32 for w in weights)


class TrainedLinears:
    """A base model's matrices with an adapter in training.

    With a workspace, W + scale B A is computed once for all rows, which is cheaper than two
    low-rank products per row as soon as there are more rows than columns.

    Args:
        flat: (size,) the adapter.
        gradient: (size,) backward adds to it; None for forward only.
        workspace: where to merge; None if the matrices are too large or the rows too few.
        owner: names the adapter and its version to the workspace.
        rounded: *flat* in the type of the weights, if it is there already.
    """

    def __init__(
        self,
        linears: Mapping[str, Linear],
        layout: Layout,
        flat: Tensor,
        gradient: Tensor | None,
        workspace: Workspace | None = None,
        owner: object = None,
        rounded: Tensor | None = None,
    ) -> None:
        self._linears = linears
        self._layout = layout
        self._flat = flat
        self._gradient = gradient
        self._owner = owner
        self._scale = layout.shape.scale
        # Rounded once, not for each product.
        self._rounded = _rounded(linears, flat) if rounded is None else rounded
        self._factors = layout.factors(self._rounded)
        self._gradients = None if gradient is None else layout.factors(gradient)
        self._workspace = workspace

    def prepare(self) -> None:
        """Merge or stack now, so that several threads do not do the same work at once."""
        for key in self._factors:
            self._weight(key)

    def twin(self) -> TrainedLinears:
        """The same matrices with a separate gradient, for another thread."""
        gradient = None if self._gradient is None else torch.zeros_like(self._gradient)
        return TrainedLinears(
            self._linears,
            self._layout,
            self._flat,
            gradient,
            self._workspace,
            self._owner,
            self._rounded,
        )

    def add_gradients(self, twins: Iterable[TrainedLinears]) -> None:
        """Add the gradients of *twins* to this one's gradient."""
        for twin in twins:
            if self._gradient is not None and twin._gradient is not None:
                self._gradient.add_(twin._gradient)

    def _weight(self, key: str) -> Tensor:
        """The matrix, merged if there is a workspace."""
        if self._workspace is None or key not in self._factors:
            return self._linears[key].weight
        linear, factors, scale = self._linears[key], self._factors[key], self._scale
        return self._workspace.merged(
            self._owner, key, linear.weight, lambda out: merge_into(out, linear, factors, scale)
        )

    def stacked(self, key: str) -> Tensor:
        """W + scale B A (experts, out, in) of experts."""
        weight = self._weight(key)
        if key in self._factors and self._workspace is None:
            weight = torch.empty_like(weight)
            factors = _cast(self._factors[key], weight.dtype)
            merge_into(weight, self._linears[key], factors, self._scale)
        return weight

    def stacked_backward(self, key: str, dweight: Tensor) -> None:
        """Accumulate the adapter's gradients from dweight (experts, out, in)."""
        if key not in self._factors or self._gradients is None:
            return
        factors, gradient, experts = self._factors[key], self._gradients[key], len(dweight)
        a, b = of_experts(factors.a, factors.b[0], experts)
        da, db = of_experts(gradient.a, gradient.b[0], experts)
        da.add_(torch.bmm(b.transpose(1, 2).to(dweight.dtype), dweight), alpha=self._scale)
        db.add_(torch.bmm(dweight, a.transpose(1, 2).to(dweight.dtype)), alpha=self._scale)

    def forward(self, key: str, x: Tensor, kept: Kept | None = None) -> Tensor:
        linear = self._linears[key]
        y = matmul.linear(x, self._weight(key), linear.bias)
        if key in self._factors and self._workspace is None:
            inner = add_low_rank(y, x, linear, self._factors[key], self._scale)
            if kept is not None:
                kept[key] = inner
        return y

    def backward(
        self, key: str, dy: Tensor, x: Tensor, kept: Kept | None = None, *, wants_dx: bool = True
    ) -> Tensor | None:
        dx = matmul.product(dy, self._weight(key)) if wants_dx else None
        if key not in self._factors or self._gradients is None:
            return dx
        linear, factors, gradient = self._linears[key], self._factors[key], self._gradients[key]
        a = factors.a.to(x.dtype)
        inner = None if kept is None else kept.pop(key, None)  # (N, parts * rank)
        inner = matmul.linear(x, a) if inner is None else inner
        dinner = torch.empty_like(inner)
        for i, part in enumerate(linear.parts):
            rank = factors.b[i].shape[1]
            dy_part, columns = dy[:, part.start : part.stop], slice(i * rank, (i + 1) * rank)
            dinner[:, columns] = matmul.product(dy_part, factors.b[i].to(x.dtype))
            matmul.add_product(gradient.b[i], dy_part.T, inner[:, columns], self._scale)
        matmul.add_product(gradient.a, dinner.T, x, self._scale)
        if dx is not None and self._workspace is None:
            matmul.add_product(dx, dinner, a, self._scale)
        return dx

    def matrix(self, key: str) -> Tensor | None:
        is_adapted = key in self._factors
        is_trained = is_adapted and self._gradients is not None
        is_apart = is_adapted and self._workspace is None
        if is_trained or is_apart or self._linears[key].bias is not None:
            return None
        return self._weight(key)


def _rounded(linears: Mapping[str, Linear], flat: Tensor) -> Tensor:
    dtypes = {linear.weight.dtype for linear in linears.values()}
    same = dtypes.pop() if len(dtypes) == 1 else flat.dtype
    return flat.to(same) if same.is_floating_point else flat


def _cast(factors: Factors, dtype: torch.dtype) -> Factors:
    return Factors(factors.a.to(dtype), tuple(b.to(dtype) for b in factors.b))


def add_low_rank(y: Tensor, x: Tensor, linear: Linear, factors: Factors, scale: float) -> Tensor:
    """y (N, out) += scale B A x (N, in); returns A x (N, parts * rank)."""
    inner = matmul.linear(x, factors.a.to(x.dtype))
    for i, part in enumerate(linear.parts):
        rank = factors.b[i].shape[1]
        b = factors.b[i].to(x.dtype)
        y[:, part.start : part.stop].addmm_(inner[:, i * rank : (i + 1) * rank], b.T, alpha=scale)
    return inner
