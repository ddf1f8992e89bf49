"""How a family of models differs from Llama: names of tensors, norms and settings.

Does not import torch, so that programs can list the families without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs


@attrs.frozen
class NormNames:
    """Names of a layer's norms in the checkpoint; "" where the family has none."""

    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""


def no_settings(config: Any) -> Mapping[str, Any]:
    """The settings of Llama: none beyond the sizes."""
    return {}


def one_rope(config: Any) -> tuple[str | None, ...]:
    """All layers rotate by the same angles."""
    return ("",) * config.num_hidden_layers


def windows(config: Any) -> tuple[int, ...]:
    """Window of each layer by `layer_types`; 0 where it attends to all positions."""
    size: int = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None) or ()
    return tuple(size if kind == "sliding_attention" else 0 for kind in kinds)


def window_everywhere(config: Any) -> Mapping[str, Any]:
    """Settings of a family whose only difference is one sliding window for all layers."""
    window = getattr(config, "sliding_window", None) or 0
    return {"windows": (window,) * config.num_hidden_layers}


def ropes_by_layer_type(config: Any) -> tuple[str | None, ...]:
    """Layers with a window use different angles from layers without."""
    return tuple(config.layer_types)


def sliding_settings(config: Any) -> Mapping[str, Any]:
    """Settings of a family whose only difference is sliding windows by `layer_types`."""
    return {"windows": windows(config)}


@attrs.frozen
class Family:
    """One family of the fast path; the defaults are Llama's.

    Attributes:
        model_type: its name in config.json.
        title: its models, as users know them.
        norms: names of a layer's norms.
        qkv: modules of queries, keys and values, or the one module that holds all three.
        gate_up: the same for the two matrices into the MLP.
        norm_offset: added to every norm's weight.
        partial_rotary: True if models may rotate only the first part of each head.
        settings: configuration -> fields of `Spec` that are not sizes.
        ropes: configuration -> kind of rotary embedding of each layer: "" if there is one kind, its
            name if there are several, None for a layer without.
        limits: unsupported parts of the family; "" if there are none.
    """

    model_type: str
    title: str
    norms: NormNames = NormNames()
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    norm_offset: float = 0.0
    partial_rotary: bool = False
    settings: Callable[[Any], Mapping[str, Any]] = no_settings
    ropes: Callable[[Any], tuple[str | None, ...]] = one_rope
    limits: str = ""
