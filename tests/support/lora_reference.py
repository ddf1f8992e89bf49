"""Adapters of random numbers, and their effect on a matrix, computed directly."""

from __future__ import annotations

import torch

from tinkex.engine import lora


def flat(layout: lora.Layout, seed: int) -> torch.Tensor:
    """An adapter of random numbers, B included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(layout.size).normal_(0, 0.1, generator=generator)


def dense(layout: lora.Layout, adapter: torch.Tensor, key: str) -> torch.Tensor:
    """W + scale B A, computed directly."""
    tensors, linear = layout.tensors(adapter), layout.linears[key]
    change = [
        tensors[f"{part.name}.lora_B"] @ tensors[f"{part.name}.lora_A"] for part in linear.parts
    ]
    return linear.weight + layout.shape.scale * torch.cat(change)
