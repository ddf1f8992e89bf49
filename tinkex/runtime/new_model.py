"""Creates models on the server, numbered within their session."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import attrs

from tinkex import types, wire
from tinkex.futures import OperationFuture
from tinkex.runtime import operation_log
from tinkex.runtime.session import Session

T = TypeVar("T")


@attrs.frozen
class NewModel:
    """A model on the server.

    Attributes:
        base_model: its name; None if the server did not send it.
        first_seq_id: number of its next operation.
    """

    model_id: str
    base_model: str | None = None
    first_seq_id: int = 1


def check_base_model(base_model: object) -> None:
    """Raise ValueError or TypeError unless *base_model* is the name of a model."""
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
    """Create a model in *session*. The number of a refused model is reused."""

    def request(number: int) -> types.CreateModelRequest:
        return types.CreateModelRequest(
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
    created, _ = made_model(session, wire.CREATE_MODEL, request, future, model_seq_id)
    return NewModel(created.model_id, base_model)


def made_model(
    session: Session,
    operation: wire.Operation[T],
    request: Callable[[int], Any],
    future: OperationFuture[T],
    number: int | None = None,
) -> tuple[T, int]:
    """The result of an operation that creates a model under *number* (None: the next), and the
    number.

    The number of a refused request is returned for reuse. An accepted number is not, even if the
    operation then fails: a request with it would mean the same failed operation.
    """
    with session.model_numbers.lent() if number is None else nullcontext(number) as taken:
        post = partial(session.post, operation, request(taken))
        session.start(operation, post, future, queue=f"create-{session.session_id}-{taken}")
    wire.load_protobuf()  # for the first batch
    return future.result(), taken
