"""Qwen2: biases on queries, keys and values; optional sliding windows in upper layers."""

from __future__ import annotations

from tinkex.engine.families.family import Family, sliding_settings

FAMILY = Family("qwen2", "Qwen 2 and 2.5, and distilled DeepSeek-R1", settings=sliding_settings)
