"""What a caller may sample from: base models of this server, and checkpoints they may read."""

from __future__ import annotations

import os
from pathlib import Path

from tinkex.server.http_errors import Refusal, shown
from tinkex.server.live import LiveSampler
from tinkex.server.request_context import Call


def check_base_model(call: Call, base_model: str) -> None:
    """Check a base model's name. With several users, it may only be a directory given at start.

    Raises:
        Refusal: 400.
    """
    if not base_model:
        raise Refusal(400, "base_model is empty; name one, such as 'tiny'.")
    if "\0" in base_model or len(base_model) > 1000:
        raise Refusal(400, f"base_model {shown(base_model)} is neither a name nor a directory.")
    if not call.site.keys.several_users or base_model in call.site.base_models:
        return
    if base_model.startswith(("/", ".", "~")) or os.path.exists(base_model):
        raise Refusal(
            400,
            f"base_model {shown(base_model)} is a directory that this server was not started "
            f"with; choose one of {', '.join(call.site.base_models)} or a hub id.",
        )


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
        check_base_model(call, base_model)
        return LiveSampler(sampler_id, session_id, call.owner, base_model, None, None)
    row = await call.site.in_pool(call.site.store.checkpoints.find, model_path, call.owner)
    return LiveSampler(
        sampler_id, session_id, call.owner, row.base_model, model_path, Path(row.directory)
    )
