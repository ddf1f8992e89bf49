"""How types travel: the table of the API, and the JSON and the protobuf form of each type.

JSON goes everywhere; batches of training data and the results of training and sampling may go as
protobuf. Knows nothing of HTTP beyond the names of the content types, and does no I/O.
"""

from __future__ import annotations

from typing import TypeVar

from tinkex.types import ForwardBackwardOutput, ForwardBackwardRequest, SampleResponse
from tinkex.wire.json_form import dumps, from_json, loads, resembles, to_json
from tinkex.wire.problems import DecodeError
from tinkex.wire.table import (
    AUTH_TOKEN,
    CANCEL_FUTURE,
    CAPABILITIES,
    CHECKPOINT_ARCHIVE,
    CLIENT_CONFIG,
    CREATE_MODEL,
    CREATE_SAMPLING_SESSION,
    CREATE_SESSION,
    DELETE_CHECKPOINT,
    FINISH_SESSION,
    FORWARD,
    FORWARD_BACKWARD,
    GET_INFO,
    GET_SAMPLER,
    GET_SESSION,
    GET_TRAINING_RUN,
    HEALTHZ,
    JOIN_SAMPLING_SESSION,
    LIST_CHECKPOINTS,
    LIST_SESSIONS,
    LIST_TRAINING_RUNS,
    LIST_USER_CHECKPOINTS,
    LOAD_WEIGHTS,
    OPERATIONS,
    OPTIM_STEP,
    PREFIX,
    PUBLISH_CHECKPOINT,
    RETRIEVE_FUTURE,
    RETRIEVE_FUTURES,
    SAMPLE,
    SAVE_WEIGHTS,
    SAVE_WEIGHTS_FOR_SAMPLER,
    SESSION_HEARTBEAT,
    SET_CHECKPOINT_TTL,
    STREAM_SAMPLE,
    TELEMETRY,
    UNLOAD_MODEL,
    UNPUBLISH_CHECKPOINT,
    WEIGHTS_INFO,
    Endpoint,
    Nothing,
    Operation,
)

R = TypeVar("R", ForwardBackwardOutput, SampleResponse)

JSON = "application/json"
PROTOBUF = "application/x-protobuf"

__all__ = [
    "AUTH_TOKEN",
    "CANCEL_FUTURE",
    "CAPABILITIES",
    "CHECKPOINT_ARCHIVE",
    "CLIENT_CONFIG",
    "CREATE_MODEL",
    "CREATE_SAMPLING_SESSION",
    "CREATE_SESSION",
    "DELETE_CHECKPOINT",
    "FINISH_SESSION",
    "FORWARD",
    "FORWARD_BACKWARD",
    "GET_INFO",
    "GET_SAMPLER",
    "GET_SESSION",
    "GET_TRAINING_RUN",
    "HEALTHZ",
    "JOIN_SAMPLING_SESSION",
    "JSON",
    "LIST_CHECKPOINTS",
    "LIST_SESSIONS",
    "LIST_TRAINING_RUNS",
    "LIST_USER_CHECKPOINTS",
    "LOAD_WEIGHTS",
    "OPERATIONS",
    "OPTIM_STEP",
    "PREFIX",
    "PROTOBUF",
    "PUBLISH_CHECKPOINT",
    "RETRIEVE_FUTURE",
    "RETRIEVE_FUTURES",
    "SAMPLE",
    "SAVE_WEIGHTS",
    "SAVE_WEIGHTS_FOR_SAMPLER",
    "SESSION_HEARTBEAT",
    "SET_CHECKPOINT_TTL",
    "STREAM_SAMPLE",
    "TELEMETRY",
    "UNLOAD_MODEL",
    "UNPUBLISH_CHECKPOINT",
    "WEIGHTS_INFO",
    "DecodeError",
    "Endpoint",
    "Nothing",
    "Operation",
    "decode_request",
    "decode_result",
    "dumps",
    "encode_request",
    "encode_result",
    "from_json",
    "loads",
    "place_of",
    "resembles",
    "to_json",
]


def encode_request(
    request: ForwardBackwardRequest, protobuf: bool, compress: bool = False
) -> tuple[str, str, str | None, bytes]:
    """A batch of training data as (path, content type, content encoding, body).

    In protobuf both forward and forward_backward go to one endpoint, in JSON each has its own.
    *compress* is for servers that say they take zstd; it needs the `zstandard` package and is left
    undone without it.

    Raises:
        ValueError: If the data hold what the dialect cannot say (an image asset in protobuf, NaN
            in JSON).
    """
    if not protobuf:
        endpoint = FORWARD if request.forward_only else FORWARD_BACKWARD
        return endpoint.path, JSON, None, dumps(to_json(request))
    from tinkex.wire import proto

    body = proto.encode_request(request)
    packed = proto.zstd(body) if compress else None
    if packed is not None:
        return FORWARD_BACKWARD.path, PROTOBUF, "zstd", packed
    return FORWARD_BACKWARD.path, PROTOBUF, None, body


def decode_request(content_type: str, body: bytes) -> ForwardBackwardRequest:
    """The inverse of `encode_request`, for a body that is no longer compressed.

    Raises:
        DecodeError: If the body is not a batch of training data, saying where and why.
    """
    kind = content_type.split(";")[0].strip().lower()
    if kind == JSON:
        return from_json(ForwardBackwardRequest, loads(body))
    if kind == PROTOBUF:
        from tinkex.wire import proto

        return proto.decode_request(body)
    raise DecodeError(
        f"a body of content type {content_type!r} cannot be read; send {JSON} or {PROTOBUF}."
    )


def place_of(content_type: str, body: bytes) -> tuple[str, int, bool] | None:
    """
    The model, the number and whether it is a forward pass alone, of a numbered request that may be
    wrong in all else; None if it does not say so much.
    """
    try:
        if content_type == PROTOBUF:
            from tinkex.wire import proto

            return proto.place_of(body)
        payload = loads(body)
    except DecodeError:
        return None
    if not isinstance(payload, dict):
        return None
    model_id, seq_id = payload.get("model_id"), payload.get("seq_id")
    if not isinstance(model_id, str) or not isinstance(seq_id, int) or isinstance(seq_id, bool):
        return None
    return model_id, seq_id, "forward_input" in payload


def encode_result(result: ForwardBackwardOutput | SampleResponse) -> bytes:
    """The result of forward, forward_backward or sample in protobuf."""
    from tinkex.wire import proto

    return proto.encode_result(result)


def decode_result(cls: type[R], body: bytes) -> R:
    """The inverse of `encode_result`.

    Raises:
        DecodeError: If the body is not such a result, saying where and why.
    """
    from tinkex.wire import proto

    result: R = proto.decode_result(cls, body)
    return result
