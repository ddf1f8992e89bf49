"""Phi-3 and Phi-4: one matrix for queries, keys and values, one for gate and up."""

from __future__ import annotations

from tinkex.engine.families.family import Family, window_everywhere

FAMILY = Family(
    "phi3",
    "Phi-3 mini and medium, Phi-3.5 mini, Phi-4, Phi-4-mini",
    qkv=("self_attn.qkv_proj",),
    gate_up=("mlp.gate_up_proj",),
    partial_rotary=True,
    settings=window_everywhere,
    limits="texts beyond the original context, where positions are scaled by LongRoPE",
)
