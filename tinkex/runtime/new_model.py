"""New models on the server, and the number that each takes in its session."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import attrs

from tinkex import errors, types, wire
from tinkex.futures import OperationFuture
from tinkex.runtime import operation_log
from tinkex.runtime.session import Session

T = TypeVar("T")


@attrs.frozen
class NewModel:
    """A model on the server.

    Attributes:
        base_model: its name; None if the server did not say.
        first_seq_id: number of its next operation.
    """

    model_id: str
    base_model: str | None = None
    first_seq_id: int = 1


def check_base_model(base_model: object) -> None:
    """ValueError or TypeError unless *base_model* is the name of a model."""
    if base_model is None:
        raise ValueError("base_model is required to create a model.")
    if not isinstance(base_model, str):
        raise TypeError(f"invalid base_model: {base_model!r} (a str is needed).")
    if not base_model.strip():
        raise ValueError("base_model must not be empty.")


def create_model(
    session: Session,
    base_model: str,
    lora_config: types.LoraConfig,
    *,
    user_metadata: dict[str, Any] | None = None,
    model_seq_id: int | None = None,
    adapter: str | None = None,
    optimizer_config: dict[str, Any] | None = None,
) -> NewModel:
    """Create a model in *session*. A number whose model was refused is used again."""
    number = model_seq_id if model_seq_id is not None else session.model_numbers.take()
    request = types.CreateModelRequest(
        session.session_id,
        number,
        base_model,
        lora_config,
        user_metadata,
        optimizer_config=optimizer_config,
        adapter=adapter,
    )
    future: OperationFuture[types.CreateModelResponse]
    future = OperationFuture(f"create_model of {base_model}")
    operation_log.submitted(future, model=base_model)
    created = made_model(
        session, wire.CREATE_MODEL, request, future, number, is_ours=model_seq_id is None
    )
    return NewModel(created.model_id, base_model)


def made_model(
    session: Session,
    operation: wire.Operation[T],
    request: Any,
    future: OperationFuture[T],
    number: int,
    *,
    is_ours: bool = True,
) -> T:
    """The result of an operation that makes a model under *number*.

    A number whose request was refused is given back. One that the server has accepted is not, even
    if the operation then fails: sent again it would mean the same failed operation.
    """
    try:
        queue = f"create-{session.session_id}-{number}"
        session.start(operation, partial(session.post, operation, request), future, queue=queue)
    except errors.TinkexError as exc:
        if is_ours and not getattr(exc, "outcome_unknown", False):
            session.model_numbers.give_back(number)
        raise
    return future.result()
