"""Reads settings of a transformers configuration, wherever a family puts them, for both paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

#: Settings that give the context length, in order of precedence; and the default without any.
_CONTEXT = ("max_position_embeddings", "max_sequence_length", "seq_length", "context_length")
_ANY_CONTEXT = 32768


class Unsupported(ValueError):
    """Why a model cannot be computed: the rest of a sentence that begins "base model 'x'"."""


def rope_parameters(config: Any) -> Iterable[Mapping[str, Any]]:
    """Settings of each rotary embedding; one empty mapping if there is none."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [own for own in parameters.values() if isinstance(own, Mapping)] or [parameters]


def context(config: Any) -> int:
    """Context length, in tokens. For LongRoPE the original one: beyond it all angles differ."""
    known = (getattr(config, name, None) for name in _CONTEXT)
    longest: int = next(filter(None, known), _ANY_CONTEXT)
    for own in rope_parameters(config):
        if own.get("rope_type") == "longrope":
            longest = min(longest, own.get("original_max_position_embeddings") or longest)
    return longest


def eos_tokens(config: Any, generation_config: Any = None) -> tuple[int, ...]:
    """Tokens that end a text: from the generation config, or else from the model's config."""
    eos = getattr(generation_config, "eos_token_id", None)
    if eos is None:
        eos = getattr(config, "eos_token_id", None)
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
