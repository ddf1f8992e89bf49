"""Sizes and settings of a model. Does not know where they come from, or its weights."""

from __future__ import annotations

import attrs


@attrs.frozen
class Spec:
    """Sizes of a model, the tokens that end a text, and settings in which families differ.

    Attributes:
        attention_scale: factor on products of queries and keys; None is head_dim ** -0.5.
        attention_cap: these products are capped softly at +- this before softmax; 0 is no cap.
        logit_cap: the same for logits.
        embedding_scale: factor on the rows of the embedding.
        residual_scale: factor on what attention and MLP add to their input.
        logit_scale: factor on logits.
        activation: "silu" or "gelu_pytorch_tanh", of the MLP's gate.
        windows: of each layer, positions that a token attends to, including its own; 0 is all.
            Empty if no layer has a window.
        interleaved: True if rotated pairs are (2 i, 2 i + 1), not (i, i + D / 2).
    """

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
    attention_scale: float | None = None
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    activation: str = "silu"
    windows: tuple[int, ...] = ()
    interleaved: bool = False

    @property
    def qkv(self) -> int:
        """Columns of queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def scale(self) -> float:
        """Factor on products of queries and keys."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def window(self, layer: int) -> int:
        """Positions that a token of *layer* attends to, including its own; 0 is all."""
        return self.windows[layer] if self.windows else 0

    @property
    def distinct_windows(self) -> tuple[int, ...]:
        """The different windows of the layers."""
        return tuple(sorted(set(self.windows))) or (0,)
