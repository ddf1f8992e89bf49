"""Merges an adapter into a model of the generic path, and writes it as a directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tinkex.engine.configuration import Unsupported
from tinkex.engine.generic import loading
from tinkex.engine.generic.adapted import adaptable, head_linear, head_of
from tinkex.engine.linears import Linear
from tinkex.engine.lora import Factors, merge_into


@torch.no_grad()
def merge(source: Path, tensors: Mapping[tuple[str, str], Tensor], scale: float, out: Path) -> None:
    """Write the model in *source*, with an adapter merged in, into the directory *out*.

    Args:
        tensors: the adapter's matrices by (module, "A" or "B").
        scale: factor on B A.

    Raises:
        ValueError: If the model cannot be loaded, or the adapter does not fit it.
    """
    try:
        model = loading.read(source)
    except Unsupported as exc:
        raise ValueError(f"base model {str(source)!r} {exc}.") from exc
    left = {module for module, _ in tensors}
    name, head = head_of(model)
    linears = [linear for _, found in adaptable(model) for linear in found.values()]
    if name in left and model.config.tie_word_embeddings:
        # The head changes and the embedding does not: they are no longer tied.
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    for linear in [*linears, head_linear(name, head)]:
        [part] = linear.parts
        if part.name in left:
            factors = Factors(tensors[part.name, "A"].float(), (tensors[part.name, "B"].float(),))
            _merge(linear, factors, scale, part.name)
            left.discard(part.name)
    if left:
        raise ValueError(
            f"the adapter changes {min(left)!r}, which the base model does not have; it belongs to "
            "another base model."
        )
    model.save_pretrained(out)


def _merge(linear: Linear, factors: Factors, scale: float, name: str) -> None:
    """Change a weight in place, computed in float32."""
    weight = linear.weight
    rows, columns = len(factors.b[0]), factors.a.shape[1]
    if weight.shape[-2:] != (rows, columns):
        raise ValueError(
            f"the adapter changes {name!r} by shape {[rows, columns]}, but the base model's has "
            f"{list(weight.shape[-2:])}; it belongs to another base model."
        )
    exact = Linear(weight.float(), None, linear.parts, linear.group)
    merged = torch.empty_like(exact.weight)
    merge_into(merged, exact, factors, scale)
    weight.copy_(merged)
