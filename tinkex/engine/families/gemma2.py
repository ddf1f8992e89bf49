"""Gemma 2: norms around attention and MLP, soft caps, windows in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinkex.engine.configuration import Unsupported
from tinkex.engine.families.family import Family, NormNames, windows
from tinkex.engine.families.gemma import scaled_embedding

NORMS = NormNames(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def settings(config: Any) -> Mapping[str, Any]:
    """Settings that Gemma 2 and 3 share."""
    if getattr(config, "use_bidirectional_attention", False):
        raise Unsupported("attends to later tokens, too; only causal models can be trained here")
    return {
        **scaled_embedding(config),
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "logit_cap": config.final_logit_softcapping or 0.0,
        "windows": windows(config),
    }


def _settings(config: Any) -> Mapping[str, Any]:
    return {**settings(config), "attention_cap": config.attn_logit_softcapping or 0.0}


FAMILY = Family("gemma2", "Gemma 2", norms=NORMS, norm_offset=1.0, settings=_settings)
