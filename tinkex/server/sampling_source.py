"""Resolves what a caller may sample from: base models of this server, and readable checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

from tinkex.engine import tiny
from tinkex.server import base_models
from tinkex.server.http_errors import Refusal, shown
from tinkex.server.live import LiveSampler
from tinkex.server.request_context import Call


def checked_base_model(call: Call, base_model: str) -> str:
    """The name of the base model that *base_model*, possibly a variant, stands for.

    With several users, directories are allowed only if they were given at the start.

    Raises:
        Refusal: 400.
    """
    base_model, context = base_models.split_variant(base_model)
    if not base_model:
        raise Refusal(400, "base_model is empty; name one, such as 'tiny'.")
    if "\0" in base_model or len(base_model) > 1000:
        raise Refusal(400, f"base_model {shown(base_model)} is neither a name nor a directory.")
    if base_model == tiny.NAME and base_model not in call.site.base_models:
        raise Refusal(
            400,
            f"this server runs without the built-in model {base_model!r}; choose one of "
            f"{', '.join(call.site.base_models) or 'the models of the hub'}.",
        )
    info = call.site.ledger.workshop.loader.bases.get(base_model)
    if context is not None and info is not None and context > info.max_context_length:
        raise Refusal(
            400,
            f"{shown(base_model)} has a context of {info.max_context_length} tokens, not "
            f"{context}; ask for that or fewer.",
        )
    if not call.site.keys.several_users or base_model in call.site.base_models:
        return base_model
    if base_model.startswith(("/", ".", "~")) or os.path.exists(base_model):
        raise Refusal(
            400,
            f"base_model {shown(base_model)} is a directory that this server was not started "
            f"with; choose one of {', '.join(call.site.base_models)} or a hub id.",
        )
    return base_model


async def sampler_of(
    call: Call, sampler_id: str, session_id: str, base_model: str | None, model_path: str | None
) -> LiveSampler:
    """What to sample from: a base model, or a checkpoint and so its base model.

    Raises:
        Refusal: 400, or 404 if the checkpoint does not exist.
    """
    if model_path is None:
        if base_model is None:
            raise Refusal(
                400,
                "give model_path (tinker://...) or base_model (such as 'tiny') to sample from.",
            )
        base_model = checked_base_model(call, base_model)
        return LiveSampler(sampler_id, session_id, call.owner, base_model, None, None)
    row = await call.site.in_pool(call.site.store.checkpoints.find_model, model_path, call.owner)
    return LiveSampler(
        sampler_id, session_id, call.owner, row.base_model, model_path, Path(row.directory)
    )
