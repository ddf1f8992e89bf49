"""The base model: frozen weights of a Llama-style causal LM, and its forward and backward passes.

Sequences are packed: a batch is the (N, width) rows of all its tokens, one sequence after the
other, without padding. Attention alone knows where one sequence ends. The backward pass is written
by hand (no gradient of base weights, little saved, the rest recomputed); only the attention kernel
itself is differentiated by torch.

Does not know about LoRA; takes `Linears`, which apply the matrices and accumulate their gradients.

Notation in comments: N tokens, d width, H heads, G key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinkex.engine import matmul

#: A sequence joins a padded attention batch while it is at least this part of the longest there.
LEAST_FILL = 0.85


@attrs.frozen
class Spec:
    """Sizes of a model, and the tokens that end a text."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    context: int
    norm_eps: float
    eos_tokens: tuple[int, ...] = ()

    @property
    def qkv(self) -> int:
        """Columns of queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@attrs.frozen
class Part:
    """Rows start..stop of a fused weight, which are the module *name* in the checkpoint."""

    name: str
    start: int
    stop: int


@attrs.frozen(eq=False)
class Linear:
    """A frozen matrix (out, in) of one or several modules; *group* is attn, mlp or unembed."""

    weight: Tensor
    bias: Tensor | None
    parts: tuple[Part, ...]
    group: str


@attrs.frozen(eq=False)
class Norms:
    """RMSNorm weights of one layer; those of queries and keys only where the model has them."""

    attention: Tensor
    mlp: Tensor
    q: Tensor | None = None
    k: Tensor | None = None


@attrs.frozen(eq=False)
class Base:
    """A frozen model. Its matrices are "0.qkv", "0.o", "0.gate_up", "0.down", ..., "head"."""

    spec: Spec
    embedding: Tensor
    norms: tuple[Norms, ...]
    final_norm: Tensor
    linears: dict[str, Linear]
    rope: Rope

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its matrices, which every step reads."""
        return sum(linear.weight.nbytes for linear in self.linears.values())

    @property
    def has_tied_head(self) -> bool:
        """True if the head's matrix is the embedding."""
        return self.linears["head"].weight is self.embedding


class Linears(Protocol):
    """The matrices of a model, with or without an adapter."""

    def forward(self, key: str, x: Tensor) -> Tensor:
        """x (N, in) -> (N, out)."""

    def backward(self, key: str, dy: Tensor, x: Tensor, *, wants_dx: bool = True) -> Tensor | None:
        """Take the adapter's gradients of dy (N, out) at x, and give dx (N, in)."""

    def matrix(self, key: str) -> Tensor | None:
        """The (out, in) matrix where one does for all rows, and no bias or gradients are wanted."""


@attrs.frozen(eq=False)
class FrozenLinears:
    """The base model's own matrices, without any adapter."""

    base: Base

    def forward(self, key: str, x: Tensor) -> Tensor:
        linear = self.base.linears[key]
        return matmul.linear(x, linear.weight, linear.bias)

    def backward(self, key: str, dy: Tensor, x: Tensor, *, wants_dx: bool = True) -> Tensor | None:
        return matmul.product(dy, self.base.linears[key].weight) if wants_dx else None

    def matrix(self, key: str) -> Tensor | None:
        linear = self.base.linears[key]
        return linear.weight if linear.bias is None else None


class Rope:
    """Rotary position embedding (Su et al. 2021): cosines and sines by position.

    Args:
        inv_freq: (D / 2,) float32, angle per position, scaled as the model asks.
        scaling: factor on cosines and sines (YaRN's attention factor; 1 for most models).
    """

    def __init__(self, inv_freq: Tensor, scaling: float = 1.0) -> None:
        self._inv_freq = inv_freq.float()
        self._scaling = scaling
        empty = torch.empty(0, len(inv_freq), device=inv_freq.device)
        self._table = empty, empty  # replaced as one, since several threads read it

    def at(self, positions: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """(N, 1, D / 2) cosines and sines at *positions* (N,), all below *longest*."""
        cos, sin = self._table
        if longest > len(cos):
            rows = 1 << max(longest - 1, 255).bit_length()
            steps = torch.arange(rows, device=self._inv_freq.device, dtype=torch.float32)
            angles = torch.outer(steps, self._inv_freq)
            cos, sin = self._table = angles.cos() * self._scaling, angles.sin() * self._scaling
        return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn (N, heads, D) in place: pairs are (i, i + D / 2), as in transformers' Llama."""
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    turned = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(turned)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension -> (normed, 1 / rms (..., 1) float32)."""
    size = x.shape[-1]
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    rstd = (norm.square_().div_(size)).add_(eps).rsqrt_()
    return torch.mul(x, rstd.to(x.dtype)).mul_(weight), rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """dx of `rms_norm`: rstd w dy - x rstd^3 mean(w dy x)."""
    dx = dy * weight
    dot = torch.linalg.vecdot(dx, x).unsqueeze(-1)
    scale = rstd.to(x.dtype)
    dx.mul_(scale)
    return dx.addcmul_(x, dot.mul_(scale**3).div_(x.shape[-1]), value=-1)


class Packing:
    """Where the sequences of a packed batch lie, and how attention batches them.

    Attention runs on padded batches of sequences of similar length: *buckets* are
    (first padded row, sequences, longest). `pad` and `unpad` go between the two layouts.

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
        # A padding row repeats row 0; what it computes reaches no real row.
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


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (B, H, T, D) queries over (B, G, T, D) keys and values."""
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )


class PackedAttention:
    """Causal attention within each sequence of a packed batch, and its derivative."""

    def __init__(self, packing: Packing, spec: Spec) -> None:
        self._packing = packing
        self._spec = spec

    def forward(self, qkv: Tensor, *, save: bool = False) -> tuple[Tensor, object]:
        """qkv (N, (H + 2 G) D), positions applied -> out (N, H D), and what backward needs."""
        padded = self._packing.pad(qkv)
        outs, graph = [], []
        for bucket in self._packing.buckets:
            parts = _heads_first(padded, bucket, self._spec)
            if save:
                parts = [part.detach().requires_grad_() for part in parts]
                with torch.enable_grad():
                    out = attention(*parts)
                graph.append((out, parts))
            else:
                out = attention(*parts)
            outs.append(out.detach().transpose(1, 2).reshape(-1, self._spec.heads * out.shape[-1]))
        joined = outs[0] if len(outs) == 1 else torch.cat(outs)
        return self._packing.unpad(joined), graph

    def backward(self, dout: Tensor, saved: object) -> Tensor:
        """dout (N, H D) -> dqkv (N, (H + 2 G) D)."""
        padded = self._packing.pad(dout, zero=True)
        dqkv = padded.new_empty(self._packing.padded_rows, self._spec.qkv)
        graph: list[tuple[Tensor, list[Tensor]]] = saved  # type: ignore[assignment]
        for bucket, (out, parts) in zip(self._packing.buckets, graph):
            first, count, longest = bucket
            rows = padded[first : first + count * longest]
            grad = rows.view(count, longest, self._spec.heads, -1).transpose(1, 2)
            grads = torch.autograd.grad(out, parts, grad)
            for target, value in zip(_heads_first(dqkv, bucket, self._spec), grads):
                target.copy_(value)
        return self._packing.unpad(dqkv)


@attrs.define(eq=False)
class Saved:
    """What one layer keeps from forward to backward."""

    x: Tensor  # (N, d) into the layer
    rstd: Tensor
    raw: Tensor | None  # (N, (H + G), D) queries and keys before their norm, where there is one
    head_rstd: Tensor | None
    attended: Tensor  # (N, H D)
    graph: object  # of the attention
    middle: Tensor  # (N, d) between attention and MLP
    middle_rstd: Tensor
    gate_up: Tensor  # (N, 2 mlp)


Attend = Callable[[int, Tensor], tuple[Tensor, object]]


class Forward:
    """One pass of packed rows through the layers.

    Args:
        linears: the matrices, with or without an adapter.
        positions: (N,) of each row in its sequence; all below *longest*.
        attend: (layer, qkv with positions applied) -> (attended (N, H D), what backward needs).
    """

    def __init__(
        self, base: Base, linears: Linears, positions: Tensor, longest: int, attend: Attend
    ) -> None:
        self._base = base
        self._linears = linears
        self._attend = attend
        cos, sin = base.rope.at(positions, longest)
        self._cos, self._sin = cos.to(base.dtype), sin.to(base.dtype)

    def layer(self, i: int, x: Tensor, *, save: bool = False) -> tuple[Tensor, Saved | None]:
        """Layer *i* of x (N, d) -> (N, d), and what `Backward` needs if *save*."""
        spec, norms = self._base.spec, self._base.norms[i]
        h, rstd = rms_norm(x, norms.attention, spec.norm_eps)
        qkv = self._linears.forward(f"{i}.qkv", h)
        turned = qkv.view(len(x), -1, spec.head_dim)[:, : spec.heads + spec.kv_heads]
        raw, head_rstd = self._head_norms(norms, turned, save)
        rotate_(turned, self._cos, self._sin)
        attended, graph = self._attend(i, qkv)
        middle = self._linears.forward(f"{i}.o", attended).add_(x)
        h, middle_rstd = rms_norm(middle, norms.mlp, spec.norm_eps)
        gate_up = self._linears.forward(f"{i}.gate_up", h)
        act = F.silu(gate_up[:, : spec.mlp]).mul_(gate_up[:, spec.mlp :])
        out = self._linears.forward(f"{i}.down", act).add_(middle)
        if not save:
            return out, None
        return out, Saved(x, rstd, raw, head_rstd, attended, graph, middle, middle_rstd, gate_up)

    def _head_norms(
        self, norms: Norms, turned: Tensor, save: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Norm queries and keys in place, where the model does (Qwen3)."""
        if norms.q is None or norms.k is None:
            return None, None
        weight = head_weight(norms.q, norms.k, self._base.spec)
        raw = turned.clone() if save else None
        normed, rstd = rms_norm(turned, weight, self._base.spec.norm_eps)
        turned.copy_(normed)
        return raw, rstd


def head_weight(q: Tensor, k: Tensor, spec: Spec) -> Tensor:
    """(H + G, D) norm weights of all query and key heads."""
    return torch.cat([q.expand(spec.heads, -1), k.expand(spec.kv_heads, -1)])


class Training:
    """Forward and backward of one packed batch of training sequences.

    Args:
        recompute: keep only each layer's input, and compute the layer again in the backward pass
            (for sequences too long to keep everything).
    """

    def __init__(
        self, base: Base, linears: Linears, packing: Packing, *, recompute: bool = False
    ) -> None:
        self._base = base
        self._linears = linears
        self._attention = PackedAttention(packing, base.spec)
        self._saving = False
        self._forward = Forward(base, linears, packing.positions, packing.longest, self._attend)
        self._recompute = recompute
        self._kept: list[Tensor | Saved] = []

    def _attend(self, layer: int, qkv: Tensor) -> tuple[Tensor, object]:
        return self._attention.forward(qkv, save=self._saving)

    def _layer(self, i: int, x: Tensor, save: bool) -> tuple[Tensor, Saved | None]:
        self._saving = save
        return self._forward.layer(i, x, save=save)

    def forward(self, tokens: Tensor, *, save: bool) -> Tensor:
        """(N,) token ids -> (N, d) hidden states, final norm applied."""
        spec = self._base.spec
        x = F.embedding(tokens, self._base.embedding)
        for i in range(spec.layers):
            keeps_all = save and not self._recompute
            out, saved = self._layer(i, x, keeps_all)
            if save:
                self._kept.append(saved if saved is not None else x)
            x = out
        hidden, rstd = rms_norm(x, self._base.final_norm, spec.norm_eps)
        self._end = (x, rstd) if save else None
        return hidden

    def backward(self, dhidden: Tensor) -> None:
        """Take the adapter's gradients of all layers; uses up what forward kept."""
        if self._end is None:
            raise RuntimeError("backward() needs forward(save=True) before it.")
        x, rstd = self._end
        dx = rms_norm_backward(dhidden, x, self._base.final_norm, rstd)
        for i in reversed(range(self._base.spec.layers)):
            kept = self._kept.pop()
            saved = kept if isinstance(kept, Saved) else self._layer(i, kept, True)[1]
            if saved is None:
                raise RuntimeError("a layer saved nothing for its backward pass.")
            dx = self._layer_backward(i, dx, saved)

    def _layer_backward(self, i: int, dout: Tensor, saved: Saved) -> Tensor:
        """Gradient at a layer's output (N, d) -> at its input; takes the adapter's on the way."""
        spec, norms, linears = self._base.spec, self._base.norms[i], self._linears
        dmiddle = self._mlp_backward(i, dout, saved).add_(dout)
        dattended = given(linears.backward(f"{i}.o", dmiddle, saved.attended))
        dqkv = self._attention.backward(dattended, saved.graph)
        turned = dqkv.view(len(dout), -1, spec.head_dim)[:, : spec.heads + spec.kv_heads]
        rotate_(turned, self._forward._cos, -self._forward._sin)
        if saved.raw is not None and norms.q is not None and norms.k is not None:
            weight = head_weight(norms.q, norms.k, spec)
            turned.copy_(rms_norm_backward(turned, saved.raw, weight, given(saved.head_rstd)))
        h = torch.mul(saved.x, saved.rstd.to(dout.dtype)).mul_(norms.attention)
        dh = linears.backward(f"{i}.qkv", dqkv, h, wants_dx=i > 0)
        if dh is None:  # the first layer: nothing below it is trained
            return dmiddle
        return rms_norm_backward(dh, saved.x, norms.attention, saved.rstd).add_(dmiddle)

    def _mlp_backward(self, i: int, dout: Tensor, saved: Saved) -> Tensor:
        spec, norms, linears = self._base.spec, self._base.norms[i], self._linears
        gate, up = saved.gate_up[:, : spec.mlp], saved.gate_up[:, spec.mlp :]
        silu = F.silu(gate)
        dact = given(linears.backward(f"{i}.down", dout, silu * up))
        dgate_up = torch.empty_like(saved.gate_up)
        torch.mul(dact, silu, out=dgate_up[:, spec.mlp :])
        dgate_up[:, : spec.mlp] = torch.ops.aten.silu_backward(dact.mul_(up), gate)
        h = torch.mul(saved.middle, saved.middle_rstd.to(dout.dtype)).mul_(norms.mlp)
        dh = given(linears.backward(f"{i}.gate_up", dgate_up, h))
        return rms_norm_backward(dh, saved.middle, norms.mlp, saved.middle_rstd)


def kind_of(device: torch.device) -> str:
    """ "cpu" or "cuda" (any accelerator): what tables of sizes go by."""
    return "cpu" if device.type == "cpu" else "cuda"


def given(x: Tensor | None) -> Tensor:
    """x, which cannot be None here."""
    if x is None:
        raise RuntimeError("a requested gradient was not computed.")
    return x
