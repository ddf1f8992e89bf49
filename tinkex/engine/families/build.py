"""Builds a `FastModel` from a family's configuration and tensors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, MutableMapping
from typing import Any

import attrs
import torch
from torch import Tensor

from tinkex.engine import configuration
from tinkex.engine.families.family import Family
from tinkex.engine.fast_path import FastModel
from tinkex.engine.linears import Linear, Part
from tinkex.engine.model import HeadNorm, Norms, Rope
from tinkex.engine.row_operations import ACTIVATIONS
from tinkex.engine.spec import Spec
from tinkex.engine.weight_store import IN_MEMORY, WeightStore

#: Supported kinds of position embedding. LongRoPE's angles depend on the length of the text; only
#: texts within the original context are supported.
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


def check_config(family: Family, config: Any) -> None:
    """Check that the fast path supports a configuration of *family*.

    Raises:
        Unsupported: With the reason.
    """
    if _activation(config) not in ACTIVATIONS:
        raise configuration.Unsupported(
            f"has the activation {_activation(config)!r}; supported are {', '.join(ACTIVATIONS)}"
        )
    for own in configuration.rope_parameters(config):
        rope_type = own.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise configuration.Unsupported(
                f"has position embeddings of type {rope_type!r}; supported are "
                f"{', '.join(ROPE_TYPES)}"
            )


def _activation(config: Any) -> str:
    name: str = getattr(config, "hidden_activation", None) or config.hidden_act
    return name


def _head_dim(config: Any) -> int:
    size: int | None = getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads


def spec_of(family: Family, config: Any, generation_config: Any = None) -> Spec:
    """Sizes and settings of a model, from its configuration.

    Raises:
        Unsupported: If the fast path does not support these settings.
    """
    return Spec(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        mlp=config.intermediate_size,
        vocab=config.vocab_size,
        context=configuration.context(config),
        norm_eps=config.rms_norm_eps,
        eos_tokens=configuration.eos_tokens(config, generation_config),
        activation=_activation(config),
        **family.settings(config),
    )


def ropes_of(
    family: Family, config: Any, rotary: Any, device: torch.device
) -> tuple[Rope | None, ...]:
    """The rotary embedding of each layer.

    Args:
        rotary: transformers' module that holds the angles.

    Raises:
        Unsupported: If it rotates only a part of each head and the family does not support that.
    """
    ropes: dict[str | None, Rope | None] = {None: None}
    head_dim, kinds = _head_dim(config), family.ropes(config)
    for kind in filter(lambda kind: kind is not None, dict.fromkeys(kinds)):
        prefix = f"{kind}_" if kind else ""
        frequencies = getattr(rotary, f"{prefix}inv_freq")
        if 2 * len(frequencies) != head_dim and not family.partial_rotary:
            raise configuration.Unsupported(
                f"rotates {2 * len(frequencies)} of the {head_dim} numbers of a head by position; "
                f"models of the family {family.model_type} rotate all of them"
            )
        scaling = float(getattr(rotary, f"{prefix}attention_scaling"))
        ropes[kind] = Rope(frequencies.to(device), scaling)
    return tuple(ropes[kind] for kind in kinds)


def assemble(
    family: Family,
    spec: Spec,
    tensors: MutableMapping[str, Tensor],
    ropes: tuple[Rope | None, ...],
    store: WeightStore = IN_MEMORY,
) -> FastModel:
    """Fuse tensors with Hugging Face's names into a `FastModel`; removes them from *tensors*.

    Args:
        tensors: may read each tensor only when it is accessed, as `weights.Weights` does.
        store: where matrices and embedding are kept.
    """
    linears: dict[str, Linear] = {}
    norms = []
    embedding = store.keep(tensors.pop("model.embed_tokens.weight"))
    for i in range(spec.layers):
        layer = f"model.layers.{i}"
        for key, group, rows in _matrices(family, spec):
            named = {f"{layer}.{module}": count for module, count in rows.items()}
            linears[f"{i}.{key}"] = _fuse(tensors, named, group, embedding, store)
        norms.append(_norms(family, spec, tensors, layer))
    own_head = tensors.pop("lm_head.weight", None)
    head = embedding if own_head is None else store.keep(own_head)  # tied if there is none
    linears["head"] = Linear(head, None, (Part("lm_head", 0, len(head)),), "unembed")
    final_norm = _norm_weight(family, tensors.pop("model.norm.weight"))
    if spec.logit_scale != 1:  # the head has no bias, so a factor on its input scales the logits
        final_norm = final_norm.float() * spec.logit_scale
    return FastModel(_rounded(spec, embedding), embedding, tuple(norms), final_norm, linears, ropes)


def _rounded(spec: Spec, embedding: Tensor) -> Spec:
    """Round the factor on embeddings to their type, as in training of these models."""
    return attrs.evolve(
        spec, embedding_scale=torch.tensor(spec.embedding_scale).to(embedding.dtype).item()
    )


def _matrices(family: Family, spec: Spec) -> list[tuple[str, str, dict[str, int]]]:
    """For each matrix of a layer: key, group, and rows of the modules fused into it."""
    heads, kv_heads = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    qkv = [heads, kv_heads, kv_heads] if len(family.qkv) == 3 else [spec.qkv]
    gate_up = [spec.mlp, spec.mlp] if len(family.gate_up) == 2 else [2 * spec.mlp]
    return [
        ("qkv", "attn", dict(zip(family.qkv, qkv))),
        ("o", "attn", {"self_attn.o_proj": spec.width}),
        ("gate_up", "mlp", dict(zip(family.gate_up, gate_up))),
        ("down", "mlp", {"mlp.down_proj": spec.width}),
    ]


def _norms(family: Family, spec: Spec, tensors: MutableMapping[str, Tensor], layer: str) -> Norms:
    def norm(name: str) -> Tensor | None:
        return _norm_weight(family, tensors.pop(f"{layer}.{name}.weight")) if name else None

    names = family.norms
    return Norms(
        norm(names.before_attention),
        norm(names.before_mlp),
        norm(names.after_attention),
        norm(names.after_mlp),
        _head_norms(family, spec, tensors, layer),
    )


def _head_norms(
    family: Family, spec: Spec, tensors: MutableMapping[str, Tensor], layer: str
) -> tuple[HeadNorm, ...]:
    """Norms of queries and keys, of each head or of all heads together; () where there are none."""
    weights = [tensors.pop(f"{layer}.self_attn.{name}_norm.weight", None) for name in ("q", "k")]
    if weights[0] is None or weights[1] is None:
        return ()
    q, k = (_norm_weight(family, weight) for weight in weights if weight is not None)
    end_of_q = spec.heads * spec.head_dim
    end_of_k = end_of_q + spec.kv_heads * spec.head_dim
    if len(q) == spec.head_dim:
        every = torch.cat([q.expand(spec.heads, -1), k.expand(spec.kv_heads, -1)])
        return (HeadNorm(0, end_of_k, every),)
    return HeadNorm(0, end_of_q, q[None]), HeadNorm(end_of_q, end_of_k, k[None])


def _norm_weight(family: Family, weight: Tensor) -> Tensor:
    """In float32 if an offset is added, which 16 bits would round away."""
    return weight.float() + family.norm_offset if family.norm_offset else weight


def _fuse(
    tensors: MutableMapping[str, Tensor],
    rows: Mapping[str, int],
    group: str,
    embedding: Tensor,
    store: WeightStore,
) -> Linear:
    """Stack the matrices of modules that read the same input.

    Each matrix is copied and freed before the next one is read, so that at most one of them is in
    memory beside the result.

    Args:
        rows: of each module's matrix, by its name.
        embedding: (V, width), of the type and on the device of the result.
    """
    starts = list(itertools.accumulate(rows.values(), initial=0))
    parts = tuple(Part(name, *bounds) for name, bounds in zip(rows, itertools.pairwise(starts)))
    if len(parts) == 1:
        weight = store.keep(tensors.pop(f"{parts[0].name}.weight"))
    else:
        weight = store.empty((starts[-1], embedding.shape[1]), embedding)
        for part in parts:
            weight[part.start : part.stop] = tensors.pop(f"{part.name}.weight")
    biases = [tensors.pop(f"{part.name}.bias", None) for part in parts]
    if all(bias is None for bias in biases):
        return Linear(weight, None, parts, group)
    bias = embedding.new_zeros(starts[-1])
    for part, own in zip(parts, biases):
        if own is not None:
            bias[part.start : part.stop] = own
    return Linear(weight, bias, parts, group)
