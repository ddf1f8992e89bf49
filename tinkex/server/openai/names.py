"""Resolves `model` of a request: a base model, a checkpoint, or a training run."""

from __future__ import annotations

import os
import uuid
from typing import Any

import attrs

from tinkex import errors
from tinkex.server.http_errors import Refusal, shown
from tinkex.server.ledger import SamplerPlace
from tinkex.server.live import LiveSampler
from tinkex.server.request_context import Call
from tinkex.server.sampling_source import sampler_of
from tinkex.text import registry
from tinkex.text import tokenizer as tokenizers

SCHEME = "tinker://"
#: The kind of checkpoints with sampler weights.
SAMPLER_KIND = "sampler"
#: How many of a user's last used runs are searched for a name.
_MOST_RUNS = 1000


@attrs.frozen(eq=False)
class Model:
    """The model that a request samples from.

    Attributes:
        name: as in the request; repeated in responses.
        tokenizer: the base model's.
    """

    name: str
    place: SamplerPlace
    tokenizer: Any


async def find_model(call: Call, name: str) -> Model:
    """
    The model called *name*.

    Args:
        name: a base model; "tinker://..." of a checkpoint; "BASE;tinker://..."; or a training run,
            which stands for its newest sampler checkpoint. A run is given by its id, or by the
            "name" in its metadata (the last used run, if several have that name).

    Raises:
        Refusal: 400, or 404 if the caller has nothing of that name.
    """
    base_model, separator, path = name.partition(";")
    if name.startswith(SCHEME):
        base_model, path = "", name
    elif separator and not path.startswith(SCHEME):
        raise Refusal(400, f"model {shown(name)}: after ';' there must be a tinker:// path.")
    elif not separator and ":train:" in name:
        base_model, path = "", await _newest(call, name)
    if not path and not _is_base_model(call, base_model):
        base_model, path = "", await _newest(call, await _run_named(call, base_model))
    once = f"none:sample:{uuid.uuid4()}"
    live = await sampler_of(call, once, "", base_model or None, path or None)
    if path and base_model and base_model != live.base_model:
        raise Refusal(
            400,
            f"model {shown(name)}: the checkpoint is of the base model "
            f"{shown(live.base_model)}; write that, or the path alone.",
        )
    return Model(name, SamplerPlace(live), await _tokenizer_of(call, live))


def _base_models(call: Call) -> list[str]:
    return [*call.site.base_models, *call.site.ledger.workshop.loader.bases, *registry.KNOWN]


def _is_base_model(call: Call, name: str) -> bool:
    """False for a name that cannot be one, such as "gpt-4o", so that the hub is not queried."""
    return name in _base_models(call) or "/" in name or os.path.isdir(name)


async def _run_named(call: Call, name: str) -> str:
    """The id of the caller's run with that name. Raises Refusal (404)."""
    runs, _ = await call.site.in_pool(call.site.store.runs, call.owner, _MOST_RUNS, 0)
    for row in runs:
        if (row.user_metadata or {}).get("name") == name:
            return row.run_id
    there = ", ".join(dict.fromkeys(_base_models(call)))
    raise Refusal(
        404,
        f"there is no model {shown(name)} here; choose one of {there}, a hub id with its "
        "organization, a tinker:// path, or a training run's id or name.",
    )


async def _newest(call: Call, run_id: str) -> str:
    rows = await call.site.in_pool(call.site.store.checkpoints.of_run, run_id, call.owner)
    paths = [row.path for row in rows if row.kind == SAMPLER_KIND]
    if not paths:
        raise Refusal(
            404,
            f"training run {shown(run_id)} has no weights to sample from yet; save some with "
            "save_weights_for_sampler.",
        )
    return paths[-1]


async def _tokenizer_of(call: Call, live: LiveSampler) -> Any:
    info = call.site.ledger.workshop.loader.bases.get(live.base_model)
    told = None if info is None else info.tokenizer_source or info.tokenizer_id
    try:
        identifier = tokenizers.tokenizer_id(live.base_model, told)
        return await call.site.in_pool(tokenizers.load, identifier)
    except errors.TokenizerError as exc:
        raise Refusal(404, f"there is no model {shown(live.base_model)} here: {exc}") from exc


async def model_names(call: Call) -> list[str]:
    """Base models of the server, and the caller's sampler checkpoints, newest first."""
    rows, _ = await call.site.in_pool(call.site.store.checkpoints.of_owner, call.owner, 1000, 0)
    return [*call.site.base_models, *(row.path for row in rows if row.kind == SAMPLER_KIND)]
