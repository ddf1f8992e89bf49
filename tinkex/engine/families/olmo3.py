"""OLMo 3: OLMo 2 with sliding windows in most layers, which use different angles."""

from __future__ import annotations

from tinkex.engine.families.family import Family, ropes_by_layer_type, sliding_settings
from tinkex.engine.families.olmo2 import NORMS

FAMILY = Family(
    "olmo3", "OLMo 3", norms=NORMS, settings=sliding_settings, ropes=ropes_by_layer_type
)
