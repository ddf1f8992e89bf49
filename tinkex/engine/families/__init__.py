"""Families of models that the fast path computes: packed sequences, backward passes by hand.

To add a family, add a file with its differences from Llama, name it below, and add a row to
tests/engine/test_families.py.
"""

from __future__ import annotations

from tinkex.engine.families import (
    gemma,
    gemma2,
    gemma3_text,
    glm,
    glm4,
    granite,
    llama,
    mistral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    smollm3,
)
from tinkex.engine.families.family import Family

_MODULES = (
    llama, mistral, qwen2, qwen3, smollm3, granite, olmo2, olmo3, phi3, glm, glm4, gemma, gemma2,
    gemma3_text,
)  # fmt: skip

#: Families of the fast path by model_type in config.json.
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}
