"""Families of models that the fast path computes: packed sequences, backward passes by hand.

To add a family, add a file with its differences from Llama, name it below, and add a row to
tests/engine/test_families.py.
"""

from __future__ import annotations

from tinkex.engine.families import llama, mistral, qwen2, qwen3
from tinkex.engine.families.family import Family

#: Families of the fast path by model_type in config.json.
FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in (llama, mistral, qwen2, qwen3)
}
