"""The base model: frozen weights of a Llama-style causal LM, and its forward and backward passes.

The (N, width) rows of a batch are the tokens of all its sequences; only attention.py knows where
one ends. The backward pass is written by hand: no gradients of base weights, little saved, the rest
recomputed. Families differ only in data: norms, ropes and `Spec`.

Does not know about LoRA; takes `Linears`, which apply the matrices and accumulate their gradients.

Notation in comments: N tokens, d width, H heads, G key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from tinkex.engine.attention import PackedAttention, Packing
from tinkex.engine.cpu_kernels import Kernel
from tinkex.engine.linears import Kept, Linear, Linears, given
from tinkex.engine.row_operations import TORCH_ROWS, RowOperations
from tinkex.engine.spec import Spec


@attrs.frozen(eq=False)
class HeadNorm:
    """RMSNorm of columns start..stop of queries, keys and values.

    Attributes:
        weight: (n, size); each row is the weight for *size* columns.
    """

    start: int
    stop: int
    weight: Tensor

    def columns(self, qkv: Tensor) -> Tensor:
        """View (N, n, size) of the columns in qkv (N, (H + 2 G) D)."""
        return qkv[:, self.start : self.stop].view(len(qkv), *self.weight.shape)


@attrs.frozen(eq=False)
class Norms:
    """RMSNorm weights (d,) of one layer; None where the model has none."""

    before_attention: Tensor | None
    before_mlp: Tensor | None
    after_attention: Tensor | None = None
    after_mlp: Tensor | None = None
    heads: tuple[HeadNorm, ...] = ()


@attrs.frozen(eq=False)
class Base:
    """A frozen model. Its matrices are "0.qkv", "0.o", "0.gate_up", "0.down", ..., "head".

    Attributes:
        final_norm: (d,) with the factor on logits in it.
        ropes: of each layer; None for a layer without position embedding.
        attention: compiled code that computes it for packed sequences; None is torch.
        rows: what computes the operations on rows.
    """

    spec: Spec
    embedding: Tensor
    norms: tuple[Norms, ...]
    final_norm: Tensor
    linears: dict[str, Linear]
    ropes: tuple[Rope | None, ...]
    attention: Kernel | None = None
    rows: RowOperations = TORCH_ROWS

    def embed(self, tokens: Tensor) -> Tensor:
        """(N,) token ids -> (N, d) input of the first layer."""
        x = F.embedding(tokens, self.embedding)
        return x if self.spec.embedding_scale == 1 else x.mul_(self.spec.embedding_scale)

    def finish(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, d) output of the last layer -> final norm of it, and 1 / rms (N, 1) float32."""
        return self.rows.norm(x, self.final_norm, self.spec.norm_eps)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices, which every step reads."""
        return sum(linear.weight.nbytes for linear in self.linears.values())

    @property
    def has_tied_head(self) -> bool:
        """True if the head's matrix is the embedding."""
        return self.linears["head"].weight is self.embedding


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
        # A recorded step (decode_graph.py) reads the old table, so it is kept. All old tables
        # together are smaller than the newest.
        self._outgrown: list[tuple[Tensor, Tensor]] = []

    def at(self, positions: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """(N, 1, D / 2) cosines and sines at *positions* (N,), all below *longest*."""
        cos, sin = self._table
        if longest > len(cos):
            rows = 1 << max(longest - 1, 255).bit_length()
            self._outgrown.append(self._table)
            steps = torch.arange(rows, device=self._inv_freq.device, dtype=torch.float32)
            angles = torch.outer(steps, self._inv_freq)
            cos, sin = self._table = angles.cos() * self._scaling, angles.sin() * self._scaling
        return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)


@attrs.define(eq=False)
class Saved:
    """What a layer saves for the backward pass. Fields of norms that it lacks are None."""

    x: Tensor  # (N, d) input of the layer
    rstd: Tensor | None
    heads: list[tuple[Tensor, Tensor]]  # (N, n, size) input of each `HeadNorm`, and its rstd
    attended: Tensor  # (N, H D)
    graph: object  # of the attention
    attention_end: tuple[Tensor, Tensor] | None  # (N, d) input of the norm after attention, rstd
    middle: Tensor  # (N, d) between attention and MLP
    middle_rstd: Tensor | None
    gate_up: Tensor  # (N, 2 mlp)
    mlp_end: tuple[Tensor, Tensor] | None
    kept: Kept  # of the matrices


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
        self._angles: dict[Rope, tuple[Tensor, Tensor]] = {}
        for rope in base.ropes:
            if rope is not None and rope not in self._angles:
                cos, sin = rope.at(positions, longest)
                self._angles[rope] = cos.to(base.dtype), sin.to(base.dtype)

    def layer(self, i: int, x: Tensor, *, save: bool = False) -> tuple[Tensor, Saved | None]:
        """Layer *i* of x (N, d) -> (N, d), and what the backward pass needs if *save*."""
        spec, norms = self._base.spec, self._base.norms[i]
        kept: Kept | None = {} if save else None
        h, rstd = self.norm(x, norms.before_attention)
        qkv = self._linears.forward(f"{i}.qkv", h, kept)
        heads = self._norm_heads(norms, qkv, save)
        self.rotate_(i, qkv)
        attended, graph = self._attend(i, qkv)
        branch = self._linears.forward(f"{i}.o", attended, kept)
        middle, attention_end = self._join(x, branch, norms.after_attention)
        h, middle_rstd = self.norm(middle, norms.before_mlp)
        gate_up = self._linears.forward(f"{i}.gate_up", h, kept)
        act = self._base.rows.gate(gate_up, spec.activation)
        branch = self._linears.forward(f"{i}.down", act, kept)
        out, mlp_end = self._join(middle, branch, norms.after_mlp)
        if kept is None:
            return out, None
        ends = attention_end, middle, middle_rstd, gate_up, mlp_end, kept
        return out, Saved(x, rstd, heads, attended, graph, *ends)

    def rotate_(self, i: int, qkv: Tensor, *, back: bool = False) -> None:
        """Rotate the queries and keys in qkv (N, (H + 2 G) D) by position, or *back*."""
        spec, rope = self._base.spec, self._base.ropes[i]
        if rope is None:
            return
        turned = qkv.view(len(qkv), -1, spec.head_dim)[:, : spec.heads + spec.kv_heads]
        cos, sin = self._angles[rope]
        self._base.rows.rotate_(turned, cos, sin, interleaved=spec.interleaved, back=back)

    def norm(self, x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """RMSNorm of x (N, d) and 1 / rms; x itself where there is no norm."""
        if weight is None:
            return x, None
        return self._base.rows.norm(x, weight, self._base.spec.norm_eps)

    def _norm_heads(self, norms: Norms, qkv: Tensor, save: bool) -> list[tuple[Tensor, Tensor]]:
        """Norm queries and keys in place, where the model does; return what backward needs."""
        kept = []
        for norm in norms.heads:
            columns = norm.columns(qkv)
            raw = columns.clone() if save else columns
            normed, rstd = self._base.rows.norm(columns, norm.weight, self._base.spec.norm_eps)
            columns.copy_(normed)
            kept.append((raw, rstd))
        return kept

    def _join(
        self, x: Tensor, branch: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """x (N, d) + the output of a branch, normed if the model does; and what backward needs."""
        kept = None
        if weight is not None:
            normed, rstd = self._base.rows.norm(branch, weight, self._base.spec.norm_eps)
            kept = branch, rstd
            branch = normed
        scale = self._base.spec.residual_scale
        return (branch if scale == 1 else branch.mul_(scale)).add_(x), kept


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
        self._attention = PackedAttention(packing, base.spec, base.attention)
        self._saving = False
        self._forward = Forward(base, linears, packing.positions, packing.longest, self._attend)
        self._recompute = recompute
        self._kept: list[Tensor | Saved] = []

    def _attend(self, layer: int, qkv: Tensor) -> tuple[Tensor, object]:
        return self._attention.forward(layer, qkv, save=self._saving)

    def _layer(self, i: int, x: Tensor, save: bool) -> tuple[Tensor, Saved | None]:
        self._saving = save
        return self._forward.layer(i, x, save=save)

    def forward(self, tokens: Tensor, *, save: bool) -> Tensor:
        """(N,) token ids -> (N, d) hidden states, final norm applied."""
        x = self._base.embed(tokens)
        for i in range(self._base.spec.layers):
            keeps_all = save and not self._recompute
            out, saved = self._layer(i, x, keeps_all)
            if save:
                self._kept.append(saved if saved is not None else x)
            x = out
        hidden, rstd = self._base.finish(x)
        self._end = (x, rstd) if save else None
        return hidden

    def backward(self, dhidden: Tensor) -> None:
        """Accumulate the adapter's gradients of all layers; frees what forward saved."""
        if self._end is None:
            raise RuntimeError("backward() needs forward(save=True) before it.")
        x, rstd = self._end
        dx = self._base.rows.norm_backward(dhidden, x, self._base.final_norm, rstd)
        for i in reversed(range(self._base.spec.layers)):
            kept = self._kept.pop()
            saved = kept if isinstance(kept, Saved) else self._layer(i, kept, True)[1]
            if saved is None:
                raise RuntimeError("a layer saved nothing for its backward pass.")
            dx = self._layer_backward(i, dx, saved)

    def _layer_backward(self, i: int, dout: Tensor, saved: Saved) -> Tensor:
        """Gradient at a layer's output (N, d) -> at its input; accumulates the adapter's."""
        norms, linears = self._base.norms[i], self._linears
        dmiddle = self._mlp_backward(i, dout, saved)
        dbranch = self._branch_backward(dmiddle, norms.after_attention, saved.attention_end)
        dattended = given(linears.backward(f"{i}.o", dbranch, saved.attended, saved.kept))
        dqkv = self._attention.backward(dattended, saved.graph)
        self._forward.rotate_(i, dqkv, back=True)
        for norm, (raw, rstd) in zip(norms.heads, saved.heads):
            columns = norm.columns(dqkv)
            columns.copy_(self._base.rows.norm_backward(columns, raw, norm.weight, rstd))
        h, _ = self._forward.norm(saved.x, norms.before_attention)
        dh = linears.backward(f"{i}.qkv", dqkv, h, saved.kept, wants_dx=i > 0)
        if dh is None:  # the first layer: nothing below it is trained
            return dmiddle
        return self._norm_backward(dh, saved.x, norms.before_attention, saved.rstd, dmiddle)

    def _mlp_backward(self, i: int, dout: Tensor, saved: Saved) -> Tensor:
        """Gradient at a layer's output (N, d) -> at the MLP's input and the sum after it."""
        rows, norms, linears = self._base.rows, self._base.norms[i], self._linears
        activation = self._base.spec.activation
        dbranch = self._branch_backward(dout, norms.after_mlp, saved.mlp_end)
        act = rows.gate(saved.gate_up, activation)
        dact = given(linears.backward(f"{i}.down", dbranch, act, saved.kept))
        dgate_up = rows.gate_backward(dact, saved.gate_up, activation)
        h, _ = self._forward.norm(saved.middle, norms.before_mlp)
        dh = given(linears.backward(f"{i}.gate_up", dgate_up, h, saved.kept))
        return self._norm_backward(dh, saved.middle, norms.before_mlp, saved.middle_rstd, dout)

    def _branch_backward(
        self, dout: Tensor, weight: Tensor | None, kept: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Gradient at the sum after a branch (N, d) -> at its last matrix's output."""
        scale = self._base.spec.residual_scale
        dbranch = dout if scale == 1 else dout * scale
        return dbranch if kept is None else self._norm_backward(dbranch, kept[0], weight, kept[1])

    def _norm_backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        rstd: Tensor | None,
        plus: Tensor | None = None,
    ) -> Tensor:
        """Gradient at the input of a norm, and *plus* added; dy itself where there is no norm."""
        if weight is None or rstd is None:
            return dy if plus is None else dy.add_(plus)
        return self._base.rows.norm_backward(dy, x, weight, rstd, plus)
