"""The endpoints of the API in groups, and which of them a group requires."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tinkex import wire

#: Group -> all endpoints of the group, and the required ones among them.
GROUPS: Mapping[str, tuple[tuple[wire.Endpoint[Any], ...], tuple[wire.Endpoint[Any], ...]]] = {
    "sessions": (
        (
            wire.CREATE_SESSION,
            wire.SESSION_HEARTBEAT,
            wire.FINISH_SESSION,
            wire.RETRIEVE_FUTURE,
            wire.RETRIEVE_FUTURES,
            wire.CANCEL_FUTURE,
        ),
        (wire.CREATE_SESSION, wire.RETRIEVE_FUTURE),
    ),
    "training": (
        (
            wire.CREATE_MODEL,
            wire.GET_INFO,
            wire.FORWARD,
            wire.FORWARD_BACKWARD,
            wire.OPTIM_STEP,
            wire.SAVE_WEIGHTS,
            wire.SAVE_WEIGHTS_FOR_SAMPLER,
            wire.LOAD_WEIGHTS,
            wire.UNLOAD_MODEL,
        ),
        (wire.CREATE_MODEL, wire.FORWARD_BACKWARD, wire.OPTIM_STEP),
    ),
    "sampling": (
        (
            wire.CREATE_SAMPLING_SESSION,
            wire.JOIN_SAMPLING_SESSION,
            wire.GET_SAMPLER,
            wire.SAMPLE,
            wire.STREAM_SAMPLE,
        ),
        (wire.SAMPLE,),
    ),
    "stored": (
        (
            wire.LIST_TRAINING_RUNS,
            wire.GET_TRAINING_RUN,
            wire.LIST_CHECKPOINTS,
            wire.LIST_USER_CHECKPOINTS,
            wire.WEIGHTS_INFO,
            wire.CHECKPOINT_ARCHIVE,
            wire.PUBLISH_CHECKPOINT,
            wire.UNPUBLISH_CHECKPOINT,
            wire.SET_CHECKPOINT_TTL,
            wire.DELETE_CHECKPOINT,
            wire.LIST_SESSIONS,
            wire.GET_SESSION,
        ),
        (),
    ),
}


def label(endpoint: wire.Endpoint[Any]) -> str:
    """The path with * for its parameters, after the method if that is not POST."""
    path = re.sub(r"{\w+}", "*", endpoint.path)
    return path if endpoint.method == "POST" else f"{endpoint.method} {path}"
