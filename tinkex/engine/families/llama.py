"""Llama and models with its architecture; other families are described as differences from it."""

from __future__ import annotations

from tinkex.engine.families.family import Family

FAMILY = Family("llama", "Llama 2, Llama 3, SmolLM 1 and 2, TinyLlama")
