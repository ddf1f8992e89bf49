"""GLM: interleaved pairs, in the first half of each head only, and one matrix for gate and up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinkex.engine.families.family import Family


def interleaved_settings(config: Any) -> Mapping[str, Any]:
    """The settings of a family that rotates pairs (2 i, 2 i + 1)."""
    return {"interleaved": True}


FAMILY = Family(
    "glm",
    "GLM-4-9B of 2024 (-hf), GLM-Edge",
    gate_up=("mlp.gate_up_proj",),
    partial_rotary=True,
    settings=interleaved_settings,
)
