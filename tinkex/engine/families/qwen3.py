"""Qwen3: norms of each query and key head; optional sliding windows in upper layers."""

from __future__ import annotations

from tinkex.engine.families.family import Family, sliding_settings

FAMILY = Family("qwen3", "Qwen 3 without experts", settings=sliding_settings)
