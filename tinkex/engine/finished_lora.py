"""Finished LoRA adapters for sampling: several adapters of one base model in one product.

Each row of a batch may use a different adapter. Takes the layout of an adapter from `lora`; does
not know about layers, requests or files.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import attrs
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from tinkex.engine import matmul
from tinkex.engine.linears import Kept, Linear
from tinkex.engine.lora import Factors, Layout, Workspace, of_experts

#: With at least this many rows on average, each adapter is multiplied with its own rows. With
#: fewer, all are multiplied at once, padded to the most rows of one.
MANY_ROWS = 32


class Finished:
    """A finished adapter: its low-rank matrices, ready to multiply with.

    `thin[key]` is a `Factors` of A (parts * rank, in) and, part by part, scale B (out, rank). The
    latter follow each other in memory.
    """

    def __init__(self, layout: Layout, flat: Tensor, dtype: torch.dtype) -> None:
        self.rank = layout.shape.rank
        self.thin: dict[str, Factors] = {}
        for key, factors in layout.factors(flat).items():
            scaled = (torch.cat(factors.b) * layout.shape.scale).to(dtype)
            b = scaled.split([len(m) for m in factors.b])
            self.thin[key] = Factors(factors.a.to(dtype, copy=True), b)

    def add(self, key: str, y: Tensor, x: Tensor, linear: Linear) -> None:
        """y (N, out) += scale B A x (N, in), if the adapter has that matrix."""
        if key not in self.thin:
            return
        factors = self.thin[key]
        inner = matmul.linear(x, factors.a).split(self.rank, dim=1)
        for part, columns, b in zip(linear.parts, inner, factors.b):
            y[:, part.start : part.stop].addmm_(columns, b.T)

    def merge_into(self, out: Tensor, key: str, linear: Linear) -> None:
        """Write W + scale B A into *out*, of the shape of W."""
        factors = self.thin[key]
        if linear.weight.dim() == 3:
            a, b = of_experts(factors.a, factors.b[0], linear.experts)
            torch.baddbmm(linear.weight, b, a, out=out)
            return
        for part, a, b in zip(linear.parts, factors.a.split(self.rank), factors.b):
            rows = slice(part.start, part.stop)
            torch.addmm(linear.weight[rows], b, a, out=out[rows])


@attrs.frozen(eq=False)
class Segment:
    """Adjacent parts of a fused matrix with the same width, for several adapters.

    Attributes:
        start: first of their rows in the fused matrix.
        parts: how many.
        b: (adapters * parts, rank, width); of each part scale B^T.
    """

    start: int
    parts: int
    b: Tensor

    @property
    def stop(self) -> int:
        return self.start + self.parts * self.b.shape[2]


def _add_segment(y: Tensor, inner: Tensor, segment: Segment) -> None:
    """y (adapters * rows, parts * width), dense, += (B A x)^T of inner A x (adapters, parts * rank,
    rows)."""
    adapters, _, rows = inner.shape
    each = inner.reshape(adapters * segment.parts, -1, rows).transpose(1, 2)
    if segment.parts == 1:
        y.view(adapters, rows, -1).baddbmm_(each, segment.b)
        return
    change = torch.bmm(each, segment.b).view(adapters, segment.parts, rows, -1).transpose(1, 2)
    y.view(change.shape).add_(change)


@attrs.frozen(eq=False)
class Stacked:
    """The low-rank matrices of several adapters for one fused matrix: A (adapters, parts * rank,
    in), and B."""

    a: Tensor
    segments: tuple[Segment, ...]


class Stack:
    """Several finished adapters (None: the bare base model), stacked when first multiplied with.

    Lower ranks are zero-padded to the highest. Parts of the same width are stacked like adapters,
    so that one product serves them all.
    """

    def __init__(self, adapters: Sequence[Finished | None]) -> None:
        self.adapters = tuple(adapters)
        self.rank = max((a.rank for a in self.adapters if a is not None), default=0)
        self._stacked: dict[str, Stacked | None] = {}

    def get(self, key: str) -> Stacked | None:
        """The low-rank matrices of *key*; None if no adapter has any."""
        if key not in self._stacked:
            self._stacked[key] = self._stack(key)
        return self._stacked[key]

    def _stack(self, key: str) -> Stacked | None:
        thin = [None if a is None else a.thin.get(key) for a in self.adapters]
        first = next((factors for factors in thin if factors is not None), None)
        if first is None:
            return None
        filled = [self._of_highest_rank(factors, first) for factors in thin]
        segments, start = [], 0
        every = range(len(first.b))
        for width, parts in itertools.groupby(every, lambda i: len(first.b[i])):
            alike = list(parts)
            b = torch.stack([factors.b[i].T for factors in filled for i in alike])
            segments.append(Segment(start, len(alike), b))
            start += len(alike) * width
        return Stacked(torch.stack([factors.a for factors in filled]), tuple(segments))

    def _of_highest_rank(self, factors: Factors | None, like: Factors) -> Factors:
        """*factors*, or zeros in the shape of *like*, zero-padded to the highest rank."""
        if factors is None:
            factors = Factors(like.a[:0], tuple(m[:, :0] for m in like.b))
        rank = factors.b[0].shape[1]
        if rank == self.rank:
            return factors
        more = self.rank - rank
        a = F.pad(factors.a.reshape(len(factors.b), rank, factors.a.shape[1]), (0, 0, 0, more))
        return Factors(a.flatten(0, 1), tuple(F.pad(m, (0, more)) for m in factors.b))


class MixedLinears:
    """A base model's matrices for rows that belong to different finished adapters.

    Args:
        rows: (N,) number in the stack of each row's adapter; sorted. One is enough if all are of
            the same adapter.
        workspace: where to merge the adapter if all rows have the same; None not to merge.
    """

    def __init__(
        self,
        linears: Mapping[str, Linear],
        stack: Stack,
        rows: npt.NDArray[np.int64],
        workspace: Workspace | None = None,
    ) -> None:
        self._linears = linears
        self._workspace = workspace
        self._stack = stack
        self._single = stack.adapters[rows[0]]
        self._is_mixed = bool(rows[0] != rows[-1])
        #: Each adapter and its rows, where each is multiplied with its own rows alone.
        self._alone: list[tuple[Finished | None, slice]] = []
        if not self._is_mixed:
            self._alone = [(self._single, slice(None))]
            return
        present, starts = np.unique(rows, return_index=True)
        if len(rows) >= MANY_ROWS * len(present):
            bounds = itertools.pairwise([*starts.tolist(), len(rows)])
            self._alone = [(stack.adapters[i], slice(*pair)) for i, pair in zip(present, bounds)]
        else:
            self._group(rows, next(iter(linears.values())).weight.device)

    def _group(self, rows: npt.NDArray[np.int64], device: torch.device) -> None:
        """Lay rows out as (adapters, most rows of one); a plain view if all have equally many."""
        counts = np.bincount(rows, minlength=len(self._stack.adapters))
        self._places: Tensor | None = None
        if (counts == counts[0]).all():
            return
        rank = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        places = rows * counts.max() + rank
        members = np.zeros(len(counts) * counts.max(), np.int64)
        members[places] = np.arange(len(rows))
        self._members = torch.from_numpy(members).to(device)
        self._places = torch.from_numpy(places).to(device)

    def forward(self, key: str, x: Tensor, kept: Kept | None = None) -> Tensor:
        linear = self._linears[key]
        whole = self._whole(key)
        if whole is not None:
            return matmul.linear(x, whole, linear.bias, linear.scales)
        y = matmul.linear(x, linear.weight, linear.bias, linear.scales)
        for adapter, own in self._alone:
            if adapter is not None:
                adapter.add(key, y[own], x[own], linear)
        if not self._alone:
            self._add_mixed(key, y, x)
        return y

    def stacked(self, key: str) -> Tensor:
        """W + scale B A (experts, out, in) of experts, where all rows have the same adapter."""
        whole = self._whole(key)
        if whole is None:
            if self._single is None:
                raise RuntimeError("experts are computed for one adapter at a time.")
            whole = torch.empty_like(self._linears[key].weight)
            self._single.merge_into(whole, key, self._linears[key])
        return whole

    def prepare(self) -> None:
        """Merge or stack now, so that several threads do not do the same work at once."""
        if self._is_mixed and self._alone:
            return
        need = self._stack.get if self._is_mixed else self._whole
        for key in self._linears:
            need(key)

    def _grouped(self, x: Tensor) -> Tensor:
        """x (N, in) -> (adapters, most rows of one, in)."""
        grouped = x if self._places is None else x.index_select(0, self._members)
        return grouped.view(len(self._stack.adapters), -1, x.shape[1])

    def _whole(self, key: str) -> Tensor | None:
        """The matrix, merged with the adapter of all rows if any; None if unavailable."""
        linear, single = self._linears[key], self._single
        if self._is_mixed:
            return None
        if single is None or key not in single.thin:
            return linear.weight
        if self._workspace is None:
            return None
        return self._workspace.merged(
            single, key, linear.weight, lambda out: single.merge_into(out, key, linear)
        )

    def matrix(self, key: str) -> Tensor | None:
        linear = self._linears[key]
        return self._whole(key) if linear.bias is None and linear.scales is None else None

    def _add_mixed(self, key: str, y: Tensor, x: Tensor) -> None:
        stacked = self._stack.get(key)
        if stacked is None:
            return
        # A x rather than x^T A^T: with few rows, A is then used in its memory layout.
        inner = torch.bmm(stacked.a, self._grouped(x).transpose(1, 2))
        if self._places is None and len(stacked.segments) == 1:
            _add_segment(y, inner, stacked.segments[0])
            return
        adapters, _, rows = inner.shape
        ranks = [segment.parts * self._stack.rank for segment in stacked.segments]
        for segment, own in zip(stacked.segments, inner.split(ranks, dim=1)):
            change = y.new_zeros(adapters * rows, segment.stop - segment.start)
            _add_segment(change, own, segment)
            if self._places is not None:
                change = change.index_select(0, self._places)
            y[:, segment.start : segment.stop].add_(change)

    def backward(
        self, key: str, dy: Tensor, x: Tensor, kept: Kept | None = None, *, wants_dx: bool = True
    ) -> Tensor | None:
        raise RuntimeError("finished adapters are not trained.")
