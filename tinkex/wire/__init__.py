"""The wire format: the endpoint table, and the JSON and protobuf forms of each type.

Everything can be sent as JSON; batches of training data and the results of training and sampling
also as protobuf. Does no I/O, and knows only the content types of HTTP.
"""

from __future__ import annotations

from typing import TypeVar

from tinkex.types import ForwardBackwardOutput, ForwardBackwardRequest, SampleResponse
from tinkex.wire.bounds import json_size as json_size
from tinkex.wire.json_reader import from_json as from_json
from tinkex.wire.json_reader import resembles as resembles
from tinkex.wire.json_text import dumps as dumps
from tinkex.wire.json_text import loads as loads
from tinkex.wire.json_writer import to_json as to_json
from tinkex.wire.problems import DecodeError as DecodeError
from tinkex.wire.table import *  # noqa: F403 - so that an endpoint is named in the table alone
from tinkex.wire.table import FORWARD, FORWARD_BACKWARD

R = TypeVar("R", ForwardBackwardOutput, SampleResponse)

JSON = "application/json"
PROTOBUF = "application/x-protobuf"


def load_protobuf() -> None:
    """Import what the protobuf form needs (some 20 ms), while something is waited for anyway."""
    from tinkex.wire import proto_requests, proto_results  # noqa: F401


def encode_request(
    request: ForwardBackwardRequest, protobuf: bool, compress: bool = False
) -> tuple[str, str, str | None, bytes]:
    """Write a batch of training data: (path, content type, content encoding, body).

    In protobuf, forward and forward_backward share one endpoint; in JSON each has its own.

    Args:
        compress: compress a protobuf body with zstd, for servers that accept it. Ignored if the
            `zstandard` package is not installed.

    Raises:
        ValueError: If the dialect cannot express the data (an image asset in protobuf, NaN in
            JSON).
    """
    if not protobuf:
        endpoint = FORWARD if request.forward_only else FORWARD_BACKWARD
        return endpoint.path, JSON, None, dumps(to_json(request))
    from tinkex.wire import proto_requests

    body = proto_requests.encode_request(request)
    packed = _zstd(body) if compress else None
    if packed is not None:
        return FORWARD_BACKWARD.path, PROTOBUF, "zstd", packed
    return FORWARD_BACKWARD.path, PROTOBUF, None, body


def _zstd(body: bytes) -> bytes | None:
    """*body* compressed, or None where the zstandard package is not installed."""
    try:
        import zstandard
    except ImportError:
        return None
    return zstandard.ZstdCompressor().compress(body)


def decode_request(content_type: str, body: bytes) -> ForwardBackwardRequest:
    """The inverse of `encode_request`, for a decompressed body.

    Raises:
        DecodeError: If the body is not a batch of training data, with the place and the reason.
    """
    kind = content_type.split(";")[0].strip().lower()
    if kind == JSON:
        return from_json(ForwardBackwardRequest, loads(body))
    if kind == PROTOBUF:
        from tinkex.wire import proto_requests

        return proto_requests.decode_request(body)
    raise DecodeError(
        f"a body of content type {content_type!r} cannot be read; send {JSON} or {PROTOBUF}."
    )


def place_of(content_type: str, body: bytes) -> tuple[str, int, bool] | None:
    """(model_id, seq_id, forward_only) of a numbered request whose other content may be invalid.

    None if *body* does not hold a model and a number.
    """
    try:
        if content_type == PROTOBUF:
            from tinkex.wire import proto_requests

            return proto_requests.place_of(body)
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
    """Write the result of forward, forward_backward or sample in protobuf."""
    from tinkex.wire import proto_results

    return proto_results.encode_result(result)


def decode_result(cls: type[R], body: bytes) -> R:
    """The inverse of `encode_result`.

    Raises:
        DecodeError: If the body is not such a result, with the place and the reason.
    """
    from tinkex.wire import proto_results

    result: R = proto_results.decode_result(cls, body)
    return result
