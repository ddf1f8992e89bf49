"""Granite: Llama with factors on embeddings, attention, residuals and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinkex.engine.families.family import Family


def _settings(config: Any) -> Mapping[str, Any]:
    return {
        "embedding_scale": config.embedding_multiplier,
        "attention_scale": config.attention_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": 1 / config.logits_scaling,
    }


FAMILY = Family("granite", "Granite 3 without experts", settings=_settings)
