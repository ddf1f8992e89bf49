"""OLMo 2: norms after attention and MLP, none before; all queries are normed together."""

from __future__ import annotations

from tinkex.engine.families.family import Family, NormNames

NORMS = NormNames("", "post_attention_layernorm", "", "post_feedforward_layernorm")

FAMILY = Family("olmo2", "OLMo 2", norms=NORMS)
