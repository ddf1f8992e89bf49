"""SmolLM3: every fourth layer has no position embedding (NoPE)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinkex.engine.families.family import Family, windows


def _settings(config: Any) -> Mapping[str, Any]:
    return {"windows": windows(config)} if config.use_sliding_window else {}


def _ropes(config: Any) -> tuple[str | None, ...]:
    return tuple("" if rotates else None for rotates in config.no_rope_layers)


FAMILY = Family("smollm3", "SmolLM 3", settings=_settings, ropes=_ropes)
