"""Mistral: Llama with a sliding window in all layers, or in none."""

from __future__ import annotations

from tinkex.engine.families.family import Family, window_everywhere

FAMILY = Family("mistral", "Mistral 7B, Mistral Nemo, Mistral Small", settings=window_everywhere)
