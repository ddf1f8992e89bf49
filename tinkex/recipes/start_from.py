"""The initial weights of a run: another run's, a PEFT adapter's, or a checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import attrs

from tinkex.recipes import peft_adapter, run_folder
from tinkex.service import ServiceClient
from tinkex.text.tokenizer import resolve_base_model


class StartError(ValueError):
    """The weights named by the setting start_from do not exist."""


def resolve(
    given: Mapping[str, Any], connect: Callable[[], AbstractContextManager[ServiceClient]]
) -> dict[str, Any]:
    """
    Resolve start_from to the settings that follow from it: start_from, base_model, rank and others.

    Args:
        given: settings; start_from is a run's folder, a PEFT adapter's folder, or tinker://...

    Raises:
        StartError: If start_from is none of these, or for another base model.
        TinkexError: If a server does not know the checkpoint.
    """
    source = str(given["start_from"])
    model = given.get("base_model")
    if source.startswith("tinker://"):
        if model is not None:
            return {}
        with connect() as service:
            info = service.create_rest_client().get_weights_info_by_tinker_path(source)
        return {"base_model": info.base_model, "rank": info.lora_rank or given.get("rank", 32)}
    folder = Path(source)
    state = run_folder.load_state(folder) or run_folder.load_state(folder.parent)
    if state is None and (folder / peft_adapter.CONFIG).is_file():
        return _from_adapter(model, folder)
    if state is None or state.checkpoint is None:
        raise StartError(
            f"--from {source} is neither a run with a checkpoint, nor a PEFT adapter folder, nor "
            "a tinker:// path."
        )
    if (model or state.settings.base_model) != state.settings.base_model:
        raise StartError(
            f"--base-model is {model}, but the weights of --from {source} are for "
            f"{state.settings.base_model}."
        )
    return {
        "base_model": state.settings.base_model,
        "start_from": state.checkpoint,
        "rank": state.settings.rank,
    }


def _from_adapter(model: str | None, folder: Path) -> dict[str, Any]:
    """The rank and the layers of a PEFT adapter, and its base model if none is given."""
    adapter = peft_adapter.read(folder)
    return {
        **attrs.asdict(adapter),
        "base_model": model or resolve_base_model(adapter.base_model) or None,
        "start_from": str(folder.resolve()),
    }
