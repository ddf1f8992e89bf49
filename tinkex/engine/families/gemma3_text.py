"""Gemma 3: Gemma 2 with norms of queries and keys instead of caps, and two sets of angles."""

from __future__ import annotations

from tinkex.engine.families import gemma2
from tinkex.engine.families.family import Family, ropes_by_layer_type

FAMILY = Family(
    "gemma3_text",
    "Gemma 3 270M and 1B, and others saved without their vision tower",
    norms=gemma2.NORMS,
    norm_offset=1.0,
    settings=gemma2.settings,
    ropes=ropes_by_layer_type,
)
