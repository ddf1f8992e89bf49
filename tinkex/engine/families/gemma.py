"""Gemma: norm weights are stored minus 1, embeddings are scaled by the root of their width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinkex.engine.families.family import Family


def scaled_embedding(config: Any) -> Mapping[str, Any]:
    """The settings of Gemma."""
    return {"embedding_scale": config.hidden_size**0.5}


FAMILY = Family("gemma", "Gemma 1, CodeGemma", norm_offset=1.0, settings=scaled_embedding)
