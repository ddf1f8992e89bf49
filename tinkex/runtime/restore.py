"""A new model of a checkpoint: in one request where the server takes it so, else in three.

Knows the two ways; the model itself is training.py's.
"""

from __future__ import annotations

import logging
from typing import Any

from tinkex import errors, types, wire
from tinkex.futures import OperationFuture
from tinkex.runtime.session import Session
from tinkex.training import TrainingClient, made_model

logger = logging.getLogger("tinkex")


def restore(session: Session, path: str, *, optimizer: bool, **options: Any) -> TrainingClient:
    """A new model of the checkpoint at *path*, with its rank and flags.

    One request where the server takes it so; else the older three: what is it of? make one like it;
    load. A restore that fails leaves nothing behind, and its number is used again.
    """
    check_restore(path, options.get("user_metadata"))
    if session.restores_at_once is not False:
        try:
            return _restore_at_once(session, path, optimizer, **options)
        except errors.APIStatusError as exc:
            if session.restores_at_once or not _wants_older_calls(exc):
                raise
            session.restores_at_once = False
    return _restore_by_three_calls(session, path, optimizer, **options)


def check_restore(path: str, user_metadata: object) -> None:
    """ValueError or TypeError for what can be seen to be wrong."""
    types.ParsedCheckpointTinkerPath.from_tinker_path(path)
    types.check_metadata(user_metadata)


def _restore_at_once(
    session: Session,
    path: str,
    optimizer: bool,
    *,
    user_metadata: dict[str, Any] | None = None,
    **options: Any,
) -> TrainingClient:
    number = session.model_numbers.take()
    request = types.LoadWeightsRequest(
        path,
        optimizer,
        session_id=session.session_id,
        model_seq_id=number,
        user_metadata=user_metadata,
    )
    future: OperationFuture[types.LoadWeightsResponse]
    future = OperationFuture(f"create_training_client_from_state of {path}")
    model_id = made_model(session, wire.LOAD_WEIGHTS, request, future, number).model_id
    session.restores_at_once = True
    return TrainingClient(session, model_id or f"{session.session_id}:train:{number}", **options)


def _wants_older_calls(exc: errors.APIStatusError) -> bool:
    """How servers that know only the older form answer: they miss model_id or seq_id."""
    return exc.status == 422 or (
        exc.status in (400, 404) and any(w in exc.detail for w in ("model_id", "seq_id"))
    )


def _restore_by_three_calls(
    session: Session, path: str, optimizer: bool, **options: Any
) -> TrainingClient:
    info = session.call(wire.WEIGHTS_INFO, types.WeightsInfoRequest(path))
    lora = types.LoraConfig(
        rank=info.lora_rank or types.LoraConfig().rank,
        train_unembed=info.train_unembed is not False,
        train_mlp=info.train_mlp is not False,
        train_attn=info.train_attn is not False,
    )
    client = TrainingClient.create(session, info.base_model, lora, **options)
    try:
        load = client.load_state_with_optimizer if optimizer else client.load_state
        load(path).result()
    except BaseException:
        _abandon(client)
        raise
    return client


def _abandon(client: TrainingClient) -> None:
    """End a model that nobody will use; its server may be the reason, so without a word."""
    try:
        client.unload_model().result(timeout=10)
    except Exception as exc:
        logger.debug("the model of a failed restore was not unloaded: %s", exc)
    client.close(cancel=True, timeout=5)
