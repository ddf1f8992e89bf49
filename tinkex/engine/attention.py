"""Causal attention over packed sequences, and its derivative.

Sequences are packed: a batch is the rows of all its tokens, one sequence after the other, without
padding. Only attention knows where a sequence ends. Compiled code (cpu_attention.py) computes it on
a CPU where it can, and a kernel of torch on CUDA (varlen_attention.py). Otherwise sequences of
similar length are padded for torch's usual kernel, unless scores are capped, or of 16 bits on a CPU
and trained. Then, or with a window, queries are computed in blocks: scores stay in the caches, and
memory and arithmetic grow with the window, not with the square of the length.

Notation: N tokens, H heads, G key/value heads, D head size, T positions, B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinkex.engine import cpu_attention, varlen_attention
from tinkex.engine.cpu_kernels import Kernel
from tinkex.engine.memory import kind_of
from tinkex.engine.spec import Spec

#: A sequence joins a padded batch if it is at least this fraction of the batch's longest.
LEAST_FILL = 0.85

#: Attention scores held at a time, by kind of device: on a CPU so few that they stay in a core's
#: cache.
BLOCK_PRODUCTS = {"cpu": 2**17, "cuda": 64 * 2**20}

#: Fewest queries of a block.
LEAST_QUERIES = 64


class Packing:
    """Where the sequences of a packed batch lie, and how attention batches them.

    Attention runs on padded batches of sequences of similar length: *buckets* are
    (first padded row, sequences, longest). `pad` and `unpad` convert between the two layouts.

    Args:
        lengths: tokens of each sequence, best sorted by length.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)
        self.longest = max(self.lengths)
        sizes = np.asarray(self.lengths)
        self.starts = np.cumsum(sizes) - sizes
        self.rows = int(sizes.sum())
        within = np.arange(self.rows) - np.repeat(self.starts, sizes)
        self.positions = torch.from_numpy(within).to(device)
        self.buckets = self._buckets()
        self._gather(sizes, within, device)

    @cached_property
    def bounds(self) -> Tensor:
        """(B + 1,) int32: where each sequence starts, and where the last ends."""
        bounds = np.append(self.starts, self.rows).astype(np.int32)
        return torch.from_numpy(bounds).to(self.positions.device)

    def _buckets(self) -> list[tuple[int, int, int]]:
        buckets: list[tuple[int, int, int]] = []
        first = begin = 0
        for i in range(1, len(self.lengths) + 1):
            longest = max(self.lengths[begin:i])
            ends = i == len(self.lengths) or (
                min(longest, self.lengths[i]) < LEAST_FILL * max(longest, self.lengths[i])
            )
            if ends:
                buckets.append((first, i - begin, longest))
                first, begin = first + (i - begin) * longest, i
        return buckets

    def _gather(self, sizes: np.ndarray, within: np.ndarray, device: torch.device) -> None:
        """Row numbers of the two layouts; None where they are the same."""
        padded_starts = np.concatenate(
            [first + longest * np.arange(count) for first, count, longest in self.buckets]
        )
        first, count, longest = self.buckets[-1]
        self.padded_rows = first + count * longest
        self._unpad: Tensor | None = None
        if self.padded_rows == self.rows:
            return
        unpad = np.repeat(padded_starts, sizes) + within
        # A padding row repeats row 0; its results are discarded.
        pad = np.zeros(self.padded_rows, np.int64)
        pad[unpad] = np.arange(self.rows)
        filler = np.ones(self.padded_rows, bool)
        filler[unpad] = False
        self._unpad = torch.from_numpy(unpad).to(device)
        self._pad = torch.from_numpy(pad).to(device)
        self._filler = torch.from_numpy(np.flatnonzero(filler)).to(device)

    def pad(self, x: Tensor, *, zero: bool = False) -> Tensor:
        """(N, c) -> (padded rows, c); padding holds zeros or, if not *zero*, anything finite."""
        if self._unpad is None:
            return x
        padded = x.index_select(0, self._pad)
        return padded.index_fill_(0, self._filler, 0.0) if zero else padded

    def unpad(self, x: Tensor) -> Tensor:
        """(padded rows, c) -> (N, c)."""
        return x if self._unpad is None else x.index_select(0, self._unpad)


def _heads_first(qkv: Tensor, bucket: tuple[int, int, int], spec: Spec) -> list[Tensor]:
    """One bucket's queries, keys, values: (sequences, heads, longest, D) views of *qkv*."""
    first, count, longest = bucket
    rows = qkv[first : first + count * longest].view(count, longest, -1, spec.head_dim)
    split = rows.split([spec.heads, spec.kv_heads, spec.kv_heads], dim=2)
    return [part.transpose(1, 2) for part in split]


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cap: float = 0.0, window: int = 0
) -> Tensor:
    """Causal attention of (B, H, n, D) queries over (B, G, T, D) keys and values.

    Queries are at the last n of T positions. Differentiable if n is T.

    Args:
        scale: factor on the scores (products of queries and keys).
        cap: soft cap of the scaled scores, at +-cap; 0 is no cap.
        window: positions that a query attends to, including its own; 0 is all.
    """
    is_half_on_cpu = q.device.type == "cpu" and q.dtype.itemsize == 2
    if cap or (is_half_on_cpu and q.requires_grad):
        out: Tensor = _InBlocks.apply(q, k, v, scale, cap, window)
        return out
    kernel = partial(
        F.scaled_dot_product_attention, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    if q.shape[2] == k.shape[2] and not 0 < window < k.shape[2]:
        return kernel(q, k, v, is_causal=True)
    outs = [
        kernel(q[:, :, own], k[:, :, keys], v[:, :, keys], attn_mask=_seen(at, keys, window, q))
        for own, at, keys in _blocks(q, k, window)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def soft_cap_(x: Tensor, cap: float) -> Tensor:
    """cap tanh(x / cap), in place."""
    return x.div_(cap).tanh_().mul_(cap)


class _InBlocks(torch.autograd.Function):
    """Attention in blocks of queries, over the keys that any of them attends to.

    The backward pass recomputes the scores, as flash attention does (Dao et al. 2022). torch's
    kernel has no soft cap, and its derivative takes two to four times as long for bfloat16 on a
    CPU. (Its forward pass, on all cores, is the faster one.) As in that kernel, scores are float32
    there: rounding them to bfloat16 would change weights by percents.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, cap: float, window: int
    ) -> Tensor:
        out = torch.empty_like(q)
        keys_of, values_of = _flat(k), _flat(v)
        for block in _blocks(q, k, window):
            queries, _, keys = block
            own = _by_group(q[:, :, queries], k.shape[1])
            weights, _ = _weights(own, keys_of[:, keys], block, scale, cap, window)
            out[:, :, queries] = _by_head(weights.to(v.dtype) @ values_of[:, keys], q.shape)
        ctx.save_for_backward(q, k, v, out)
        ctx.settings = scale, cap, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        scale, cap, window = ctx.settings
        groups = k.shape[1]
        keys_of, values_of = _flat(k), _flat(v)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=_exact(x)) for x in (keys_of, values_of))
        for block in _blocks(q, k, window):
            queries, _, keys = block
            own, dout = (_by_group(x[:, :, queries], groups) for x in (q, grads[0]))
            weights, steepness = _weights(own, keys_of[:, keys], block, scale, cap, window)
            dot = (dout * _by_group(out[:, :, queries], groups)).sum(
                dim=2, keepdim=True, dtype=weights.dtype
            )
            dscores = (dout @ values_of[:, keys].transpose(1, 2)).sub(dot).mul_(weights)
            if steepness is not None:
                dscores.mul_(steepness)
            dscores = dscores.to(q.dtype)
            dv[:, keys] += weights.to(q.dtype).transpose(1, 2) @ dout
            dq[:, :, queries] = _by_head((dscores @ keys_of[:, keys]).mul_(scale), q.shape)
            dk[:, keys] += dscores.transpose(1, 2) @ own
        dk, dv = dk.mul_(scale).view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype)
        return dq, dk, dv, None, None, None


#: Queries of a block, their positions, and the keys that they may attend to.
_Block = tuple[slice, slice, slice]


def _blocks(q: Tensor, k: Tensor, window: int) -> list[_Block]:
    count, heads, queries, _ = q.shape
    length = k.shape[2]
    step = max(LEAST_QUERIES, BLOCK_PRODUCTS[kind_of(q.device)] // (count * heads * length))
    blocks = []
    for start in range(0, queries, step):
        own = slice(start, min(start + step, queries))
        at = slice(own.start + length - queries, own.stop + length - queries)
        first = max(0, at.start - window + 1) if window else 0
        blocks.append((own, at, slice(first, at.stop)))
    return blocks


def _exact(x: Tensor) -> torch.dtype:
    """The type for scores and sums of products of x: float32 or better."""
    return torch.promote_types(x.dtype, torch.float32)


def _flat(x: Tensor) -> Tensor:
    """(B, G, T, D) -> (B G, T, D)."""
    return x.reshape(-1, *x.shape[2:])


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(B, H, n, D) -> (B G, H / G n, D): the queries of one key head side by side."""
    count, heads, rows, size = x.shape
    return x.reshape(count * groups, heads // groups * rows, size)


def _by_head(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `_by_group`, with the count and heads of *shape*."""
    return x.view(shape[0], shape[1], -1, x.shape[2])


def _weights(
    own: Tensor, keys_of: Tensor, block: _Block, scale: float, cap: float, window: int
) -> tuple[Tensor, Tensor | None]:
    """A block's weights (B G, H / G n, m) after softmax, and the derivative of the cap, 1 - tanh^2,
    at each score.

    Args:
        own: (B G, H / G n, D) queries of the block.
        keys_of: (B G, m, D) keys of the block.
    """
    _, at, keys = block
    exact = _exact(own)
    if own.device.type == "cpu":
        own, keys_of = own.to(exact), keys_of.to(exact)
    scores = ((own * scale) @ keys_of.transpose(1, 2)).to(exact)
    steepness = None
    if cap:
        soft_cap_(scores, cap)
        steepness = 1 - (scores / cap).square_()
    # Without a window, every query attends to all keys before the block.
    some = slice(keys.start if window else max(keys.start, at.start), keys.stop)
    unseen = ~_seen(at, some, window, scores)
    each = scores.view(len(scores), -1, *(at.stop - at.start, scores.shape[2]))
    each[..., some.start - keys.start :].masked_fill_(unseen, -torch.inf)
    return torch.softmax(scores, dim=2), steepness


def _seen(at: slice, keys: slice, window: int, like: Tensor) -> Tensor:
    """(n, m): True where a query at one of these positions attends to a key."""
    asking = torch.arange(at.start, at.stop, device=like.device)[:, None]
    asked = torch.arange(keys.start, keys.stop, device=like.device)
    seen = asked <= asking
    return seen & (asked > asking - window) if window else seen


class _Seed(torch.autograd.Function):
    """A zero whose derivative by `out` is `grad`.

    `torch.autograd.grad(out, parts, grad)` gives the same, but its first call imports sympy, which
    adds a third of a second to the first training step.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.grad, None


class PackedAttention:
    """Causal attention within each sequence of a packed batch, and its derivative.

    Args:
        compiled: from `cpu_attention.kernel_for`; None is torch.
    """

    def __init__(self, packing: Packing, spec: Spec, compiled: Kernel | None = None) -> None:
        self._packing = packing
        self._spec = spec
        self._compiled = compiled

    def forward(self, layer: int, qkv: Tensor, *, save: bool = False) -> tuple[Tensor, object]:
        """qkv (N, (H + 2 G) D), positions applied -> out (N, H D), and what backward needs."""
        if self._compiled is not None:
            return self._forward_compiled(self._compiled, layer, qkv)
        kernel = None
        if not self._spec.attention_cap:
            kernel = varlen_attention.kernel_for(qkv.device, qkv.dtype, self._spec.head_dim)
        if kernel is not None:
            return self._forward_unpadded(kernel, layer, qkv, save)
        spec, padded = self._spec, self._packing.pad(qkv)
        settings = spec.scale, spec.attention_cap, spec.window(layer)
        outs, graph = [], []
        for bucket in self._packing.buckets:
            parts = _heads_first(padded, bucket, spec)
            if save:
                parts = [part.detach().requires_grad_() for part in parts]
            with torch.set_grad_enabled(save):
                out = attention(parts[0], parts[1], parts[2], *settings)
            if save:
                graph.append((out, parts))
            outs.append(out.detach().transpose(1, 2).reshape(-1, spec.heads * out.shape[-1]))
        joined = outs[0] if len(outs) == 1 else torch.cat(outs)
        return self._packing.unpad(joined), graph

    def _forward_compiled(self, kernel: Kernel, layer: int, qkv: Tensor) -> tuple[Tensor, object]:
        spec = self._spec
        settings = cpu_attention.Settings(
            spec.heads, spec.kv_heads, spec.head_dim, spec.scale, spec.attention_cap,
            spec.window(layer),
        )  # fmt: skip
        bounds = np.append(self._packing.starts, self._packing.rows)
        return cpu_attention.forward(kernel, qkv, bounds, settings)

    def _forward_unpadded(
        self, kernel: varlen_attention.Kernel, layer: int, qkv: Tensor, save: bool
    ) -> tuple[Tensor, object]:
        spec, packing = self._spec, self._packing
        heads = qkv.view(len(qkv), -1, spec.head_dim)
        parts = heads.split([spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
        settings = packing.bounds, packing.longest, spec.scale, spec.window(layer)
        return varlen_attention.forward(kernel, parts, *settings, save=save)

    def backward(self, dout: Tensor, saved: object) -> Tensor:
        """dout (N, H D) -> dqkv (N, (H + 2 G) D)."""
        if self._compiled is not None and isinstance(saved, cpu_attention.Saved):
            return cpu_attention.backward(self._compiled, dout, saved)
        if isinstance(saved, varlen_attention.Saved):
            return varlen_attention.backward(dout, saved)
        padded = self._packing.pad(dout, zero=True)
        dqkv = padded.new_empty(self._packing.padded_rows, self._spec.qkv)
        graph: list[tuple[Tensor, list[Tensor]]] = saved  # type: ignore[assignment]
        for bucket, (out, parts) in zip(self._packing.buckets, graph):
            first, count, longest = bucket
            rows = padded[first : first + count * longest]
            grad = rows.view(count, longest, self._spec.heads, -1).transpose(1, 2)
            with torch.enable_grad():
                seed = _Seed.apply(out, grad)
            grads = torch.autograd.grad(seed, parts)
            for target, value in zip(_heads_first(dqkv, bucket, self._spec), grads):
                target.copy_(value)
        return self._packing.unpad(dqkv)
