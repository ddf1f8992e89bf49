"""Mistral: Llama with a sliding window in all layers, or in none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinkex.engine.families.family import Family


def _settings(config: Any) -> Mapping[str, Any]:
    window = getattr(config, "sliding_window", None) or 0
    return {"windows": (window,) * config.num_hidden_layers}


FAMILY = Family("mistral", "Mistral 7B, Mistral Nemo, Mistral Small", settings=_settings)
