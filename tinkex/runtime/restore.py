"""A new model from a checkpoint: in one request if the server supports it, else in three."""

from __future__ import annotations

import logging
import uuid
from typing import Any

import attrs

from tinkex import errors, types, wire
from tinkex.futures import OperationFuture
from tinkex.runtime.model_queue import ModelQueue
from tinkex.runtime.new_model import NewModel, create_model, made_model
from tinkex.runtime.session import Session

logger = logging.getLogger("tinkex")


def restore(session: Session, path: str, *, optimizer: bool, **options: Any) -> NewModel:
    """Create a model from the checkpoint at *path*, with its rank and flags.

    *options* are base_model (by default the checkpoint's own), weights_access_token,
    optimizer_config and user_metadata.

    Servers that do not support the single request get the three older ones: look up the base model,
    create a model of the same shape, load the weights. A failed restore leaves no model, and its
    number is reused.
    """
    check_restore(path, **options)
    if session.restores_at_once is not False:
        try:
            return _restore_at_once(session, path, optimizer, **options)
        except errors.APIStatusError as exc:
            if session.restores_at_once or not _wants_older_calls(exc):
                raise
            session.restores_at_once = False
    return _restore_by_three_calls(session, path, optimizer, **options)


def check_restore(
    path: str,
    user_metadata: object = None,
    base_model: object = None,
    weights_access_token: object = None,
    optimizer_config: object = None,
) -> None:
    """Raise ValueError or TypeError if the arguments of `restore` are invalid."""
    types.ParsedCheckpointTinkerPath.from_tinker_path(path)
    types.check_metadata(user_metadata)
    if base_model is not None and (not isinstance(base_model, str) or not base_model.strip()):
        raise TypeError(
            f"base_model must be the name of a model, got {base_model!r}; metadata is given as "
            "user_metadata={...}."
        )
    if weights_access_token is not None and not isinstance(weights_access_token, str):
        raise TypeError("weights_access_token must be a str or None.")


def _restore_at_once(
    session: Session,
    path: str,
    optimizer: bool,
    **options: Any,
) -> NewModel:
    def request(number: int) -> types.LoadWeightsRequest:
        return types.LoadWeightsRequest(
            path, optimizer, session_id=session.session_id, model_seq_id=number, **options
        )

    future: OperationFuture[types.LoadWeightsResponse]
    future = OperationFuture(f"create_training_client_from_state of {path}")
    made, number = made_model(session, wire.LOAD_WEIGHTS, request, future)
    session.restores_at_once = True
    return NewModel(made.model_id or f"{session.session_id}:train:{number}")


def copy_headers(weights_access_token: str | None) -> dict[str, str]:
    """The headers of a request that copies a checkpoint: the first identifies a resend, the second
    has the key that may read the checkpoint."""
    headers = {"X-Idempotency-Key": str(uuid.uuid4())}
    if weights_access_token is not None:
        headers[wire.WEIGHTS_ACCESS_TOKEN] = weights_access_token
    return headers


def _wants_older_calls(exc: errors.APIStatusError) -> bool:
    """True if the server supports only the older form: its error names model_id or seq_id."""
    return exc.status == 422 or (
        exc.status in (400, 404) and any(w in exc.detail for w in ("model_id", "seq_id"))
    )


def _restore_by_three_calls(
    session: Session,
    path: str,
    optimizer: bool,
    *,
    base_model: str | None = None,
    weights_access_token: str | None = None,
    **options: Any,
) -> NewModel:
    info = session.call(wire.WEIGHTS_INFO, types.WeightsInfoRequest(path))
    lora = types.LoraConfig(
        rank=info.lora_rank or types.LoraConfig().rank,
        train_unembed=info.train_unembed,
        train_mlp=info.train_mlp is not False,
        train_attn=info.train_attn is not False,
    )
    made = create_model(session, base_model or info.base_model, lora, **options)
    queue = ModelQueue(session, made.model_id, name=f"restore-{made.model_id}")
    try:
        queue.operation(
            wire.LOAD_WEIGHTS,
            lambda seq_id: types.LoadWeightsRequest(
                path,
                optimizer,
                model_id=made.model_id,
                seq_id=seq_id,
                weights_access_token=weights_access_token,
            ),
            None,
        ).result()
    except BaseException:
        _abandon(queue)
        raise
    queue.close()
    return attrs.evolve(made, first_seq_id=queue.seq_id + 1)


def _abandon(queue: ModelQueue) -> None:
    """Unload a model that will not be used; failures are only logged."""
    try:
        queue.unload().result(timeout=10)
    except Exception as exc:
        logger.debug("the model of a failed restore was not unloaded: %s", exc)
    queue.close(cancel=True, timeout=5)
