"""GLM-4: GLM with additional norms after attention and MLP."""

from __future__ import annotations

import attrs

from tinkex.engine.families import glm
from tinkex.engine.families.family import NormNames

FAMILY = attrs.evolve(
    glm.FAMILY,
    model_type="glm4",
    title="GLM-4 of 2025, GLM-Z1",
    norms=NormNames(
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    ),
)
