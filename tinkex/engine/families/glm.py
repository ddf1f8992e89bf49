"""GLM: interleaved pairs, in the first half of each head only, and one matrix for gate and up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinkex.engine.families.family import Family


def _settings(config: Any) -> Mapping[str, Any]:
    return {"interleaved": True}


FAMILY = Family(
    "glm",
    "GLM-4-9B of 2024 (-hf), GLM-Edge",
    gate_up=("mlp.gate_up_proj",),
    partial_rotary=True,
    settings=_settings,
)
