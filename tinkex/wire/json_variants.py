"""Differences of JSON from our types, and between servers: other names, numbers as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from tinkex import types

#: Names that differ between our type and the wire.
_WIRE_NAMES: dict[tuple[type, str], str] = {
    (types.SampledSequence, "topk_logprobs"): "topk_sampled_logprobs",
}


def wire_name(cls: type, field: attrs.Attribute[Any]) -> str:
    """The name of a field of *cls* in JSON."""
    alias = field.alias or field.name
    return _WIRE_NAMES.get((cls, alias), alias)


def _renamed(old: str, new: str) -> Callable[[Any], Any]:
    """Read *old* as *new* if *new* is missing."""

    def prepare(value: Any) -> Any:
        if isinstance(value, dict) and value.get(new) is None and value.get(old) is not None:
            return {**value, new: value[old]}
        return value

    return prepare


def _training_run(value: Any) -> Any:
    """`id` means training_run_id; booleans may be text."""
    value = _renamed("id", "training_run_id")(value)
    if not isinstance(value, dict):
        return value
    texts = {"true": True, "false": False}
    return {
        key: texts.get(item, item)
        if key in ("is_lora", "corrupted") and isinstance(item, str)
        else item
        for key, item in value.items()
    }


def _cursor(value: Any) -> Any:
    """Numbers may be text."""
    if not isinstance(value, dict):
        return value
    return {
        key: int(item) if isinstance(item, str) and item.isdecimal() and len(item) < 19 else item
        for key, item in value.items()
    }


def _supported_model(value: Any) -> Any:
    """A model may be its bare name."""
    return {"model_name": value} if isinstance(value, str) else value


def _capabilities(value: Any) -> Any:
    """The list may hold null."""
    if not isinstance(value, dict) or not isinstance(value.get("supported_models"), list):
        return value
    models = [model for model in value["supported_models"] if model is not None]
    return {**value, "supported_models": models}


#: Applied to the payload of a class before it is read.
PREPARE: dict[type, Callable[[Any], Any]] = {
    types.Cursor: _cursor,
    types.GetInfoResponse: _renamed("base_model", "model_name"),
    types.GetServerCapabilitiesResponse: _capabilities,
    types.ModelData: _renamed("base_model", "model_name"),
    types.SampledSequence: _renamed("topk_logprobs", "topk_sampled_logprobs"),
    types.SupportedModel: _supported_model,
    types.TrainingRun: _training_run,
}
