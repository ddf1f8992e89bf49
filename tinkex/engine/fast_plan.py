"""What the fast path needs to know of a model, and plain Llamas read without transformers.

Importing transformers takes longer than everything else between the start and the first token of a
small model. A configuration with only known fields is therefore read here. transformers reads, or
refuses, every other one, including those with mistakes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import torch

from tinkex.engine import model_files
from tinkex.engine.families import FAMILIES, build
from tinkex.engine.families.family import Family
from tinkex.engine.model import Rope
from tinkex.engine.spec import Spec

#: Fields of a plain Llama: sizes, those that may be None, those with one value, and those that
#: change nothing here.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_SIZES_OR_NONE = ("num_key_value_heads", "head_dim")
_FIXED = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_scaling": None,
}
_IGNORED = (
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "initializer_range",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
_OTHERS = ("eos_token_id", "rms_norm_eps", "rope_parameters", "rope_theta", "tie_word_embeddings")
_KNOWN = {*_SIZES, *_SIZES_OR_NONE, *_FIXED, *_IGNORED, *_OTHERS}
_NEEDED = {*_SIZES, "model_type", "architectures", "hidden_act", "eos_token_id", "rms_norm_eps"}


@attrs.frozen(eq=False)
class FastPlan:
    """What the fast path computes of a model.

    Attributes:
        architecture: the model's class in transformers.
        ropes: of each layer.
        shapes: of its tensors by name, including a tied head's.
        parameters: how many; tied ones count once.
    """

    family: Family
    architecture: str
    spec: Spec
    ropes: tuple[Rope | None, ...]
    shapes: Mapping[str, tuple[int, ...]]
    has_tied_head: bool
    parameters: int


def of_plain_llama(directory: Path, device: torch.device) -> FastPlan | None:
    """The plan of the model in *directory*; None if it is anything but a plain Llama."""
    try:
        content = model_files.read_json(directory / "config.json")
        generation = _generation(directory)
    except (OSError, ValueError):
        return None
    if not (_is_plain(content) and _is_end(generation.eos_token_id)):
        return None
    family, config = FAMILIES["llama"], _with_defaults(content)
    spec = build.spec_of(family, config, generation)
    steps = torch.arange(0, spec.head_dim, 2, dtype=torch.float32)
    frequencies = 1.0 / (config.rope_parameters["rope_theta"] ** (steps / spec.head_dim))
    shapes = _shapes(spec)
    tied = config.tie_word_embeddings
    counted = [shape for name, shape in shapes.items() if not (tied and name == "lm_head.weight")]
    return FastPlan(
        family,
        content["architectures"][0],
        spec,
        (Rope(frequencies.to(device)),) * spec.layers,
        shapes,
        tied,
        sum(map(math.prod, counted)),
    )


def _generation(directory: Path) -> SimpleNamespace:
    """The tokens that end a text, by generation_config.json if there is one."""
    file = directory / "generation_config.json"
    content = model_files.read_json(file) if file.is_file() else {}
    if not isinstance(content, Mapping):
        raise ValueError(f"{file.name} holds no JSON object")
    return SimpleNamespace(eos_token_id=content.get("eos_token_id"))


def _is_plain(content: Any) -> bool:
    """True if every field of config.json is known, and means here what it means to transformers."""
    return (
        isinstance(content, Mapping)
        and content.keys() <= _KNOWN
        and content.keys() >= _NEEDED
        and all(content.get(name, value) == value for name, value in _FIXED.items())
        and all(_is_size(content[name]) for name in _SIZES)
        and all(content.get(name) is None or _is_size(content[name]) for name in _SIZES_OR_NONE)
        and isinstance(content.get("tie_word_embeddings", False), bool)
        and _is_end(content["eos_token_id"])
        and isinstance(content["rms_norm_eps"], float)
        and _are_heads(content)
        and _theta(content) is not None
    )


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _is_end(value: object) -> bool:
    """True if *value* may be an `eos_token_id`: one id, several, or None."""
    several = value if isinstance(value, list) else [] if value is None else [value]
    return all(type(one) is int and one >= 0 for one in several)


def _are_heads(content: Mapping[str, Any]) -> bool:
    """True if heads divide the width, their size is even, and key heads divide query heads."""
    heads, width = content["num_attention_heads"], content["hidden_size"]
    size = content.get("head_dim") or width // heads
    groups = content.get("num_key_value_heads") or heads
    return width % heads == 0 and size % 2 == 0 and size > 0 and heads % groups == 0


def _theta(content: Mapping[str, Any]) -> float | None:
    """The RoPE base, from either place; None if the rotary embedding is not the default one."""
    given = content.get("rope_parameters")
    if given is None:
        given = {"rope_type": "default", "rope_theta": content.get("rope_theta")}
    elif "rope_theta" in content:
        return None
    if not isinstance(given, Mapping) or set(given) != {"rope_type", "rope_theta"}:
        return None
    theta = given["rope_theta"]
    is_number = type(theta) in (int, float) and math.isfinite(theta) and theta > 0
    return float(theta) if given["rope_type"] == "default" and is_number else None


def _with_defaults(content: Mapping[str, Any]) -> SimpleNamespace:
    """The fields that are used, with the defaults of transformers."""
    filled = {
        "num_key_value_heads": content.get("num_key_value_heads") or content["num_attention_heads"],
        "head_dim": content.get("head_dim"),
        "tie_word_embeddings": content.get("tie_word_embeddings", False),
        "rope_parameters": {"rope_type": "default", "rope_theta": _theta(content)},
    }
    return SimpleNamespace(**{**content, **filled})


def _shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a Llama, by transformers' names."""
    width, queries, keys = spec.width, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    of_layer = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (spec.mlp, width),
        "mlp.up_proj": (spec.mlp, width),
        "mlp.down_proj": (width, spec.mlp),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    layers = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(spec.layers)
        for name, shape in of_layer.items()
    }
    ends = {"model.embed_tokens.weight": (spec.vocab, width), "model.norm.weight": (width,)}
    return {**ends, **layers, "lm_head.weight": (spec.vocab, width)}
