"""Reads the configuration of a PEFT adapter: base model, rank, and adapted layers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import attrs

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@attrs.frozen
class PeftAdapter:
    """An adapter to start training from.

    Attributes:
        base_model: the name in its configuration; "" if there is none.
    """

    base_model: str
    rank: int
    train_mlp: bool
    train_attn: bool
    train_unembed: bool


def read(folder: Path) -> PeftAdapter:
    """
    Read the configuration, and the names of the tensors.

    Raises:
        ValueError: If the folder has no PEFT adapter of safetensors.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        names = _tensor_names(folder / WEIGHTS)
        return PeftAdapter(
            base_model=str(config.get("base_model_name_or_path") or ""),
            rank=int(config["r"]),
            train_mlp=any(".mlp." in name for name in names),
            train_attn=any("attn." in name for name in names),
            train_unembed=any("lm_head" in name for name in names),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as exc:
        raise ValueError(f"{folder} is not a PEFT adapter ({exc}).") from exc


def _tensor_names(path: Path) -> list[str]:
    """Tensor names from the header of a safetensors file: its length in 8 bytes, then JSON."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError(f"{path.name} is not a safetensors file")
        header: dict[str, Any] = json.loads(file.read(length))
    return [name for name in header if name != "__metadata__"]
