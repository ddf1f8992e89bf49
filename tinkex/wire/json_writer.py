"""Writes objects of `tinkex.types` as plain data, ready for JSON.

The result equals the official SDK's, without newer fields that have their default: some servers
reject unknown fields. The writer of a class is derived once from its attrs fields; the few classes
with another form on the wire have their own function.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import attrs
import numpy as np

from tinkex import types
from tinkex.wire.json_variants import wire_name

Writer = Callable[[Any], Any]

#: Fields that older servers do not know: omitted if they have their default.
_LATER_FIELDS = frozenset(
    {
        "adapter",
        "kind",
        "optimizer_config",
        "prompt_alt_tokens",
        "prompt_alt_tokens_k",
        "prompt_cache_hit_tokens",
        "prompt_logprobs_last_n",
        "record_stability_info",
        "target_prompt_logprobs",
        "topk_sample_logprobs",
    }
)


def to_json(obj: Any, tag: str | None = None) -> dict[str, Any]:
    """Convert an object of `tinkex.types` to plain data, ready for `dumps`.

    Fields that are None are omitted, unless the field's metadata has `send_null`. Numbers in
    arrays that are not finite become null, because JSON cannot express them.

    Args:
        tag: the value of "type", for requests that have one.
    """
    plain: dict[str, Any] = _plain(obj)
    if tag is not None:
        plain["type"] = tag
    return plain


def _plain(value: Any) -> Any:
    writer = _WRITERS.get(type(value))
    if writer is None:
        writer = _WRITERS[type(value)] = _make_writer(type(value))
    return writer(value)


def _as_is(value: Any) -> Any:
    return value


def _make_writer(cls: type) -> Writer:
    if attrs.has(cls):
        return _object_writer(cls)
    if issubclass(cls, np.ndarray):
        return _array
    if issubclass(cls, np.generic):
        return lambda value: value.item()
    if issubclass(cls, Mapping):
        return lambda value: {key: _plain(item) for key, item in value.items()}
    if issubclass(cls, (list, tuple)):
        return lambda value: [_plain(item) for item in value]
    return _as_is


def _object_writer(cls: type) -> Writer:
    fields = [
        (
            field.name,
            wire_name(cls, field),
            field.default if field.name in _LATER_FIELDS else None,
            bool(field.metadata.get("send_null")),
        )
        for field in attrs.fields(cls)
    ]

    def write(obj: Any) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        for name, key, omitted, send_null in fields:
            value = getattr(obj, name)
            if value is None and send_null:
                plain[key] = None
            elif value is not None and (omitted is None or value != omitted):
                plain[key] = _plain(value)
        return plain

    return write


def _array(array: np.ndarray) -> list[Any]:
    values: list[Any] = array.tolist()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return _nulls_for_nan(values)
    return values


def _nulls_for_nan(values: list[Any]) -> list[Any]:
    return [
        _nulls_for_nan(x) if isinstance(x, list) else x if math.isfinite(x) else None
        for x in values
    ]


def _float(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tensor(tensor: types.TensorData) -> dict[str, Any]:
    plain = {
        "data": _array(tensor.values),
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
    }
    if tensor.sparse_crow_indices is not None and tensor.sparse_col_indices is not None:
        plain["sparse_crow_indices"] = tensor.sparse_crow_indices.tolist()
        plain["sparse_col_indices"] = tensor.sparse_col_indices.tolist()
    return plain


def _image(chunk: types.ImageChunk) -> dict[str, Any]:
    data = base64.b64encode(chunk.data).decode("ascii")
    return _with_length({"type": "image", "data": data, "format": chunk.format}, chunk)


def _image_asset(chunk: types.ImageAssetPointerChunk) -> dict[str, Any]:
    plain = {
        "type": "image_asset_pointer",
        "location": chunk.location,
        "format": chunk.format,
    }
    return _with_length(plain, chunk)


def _with_length(
    plain: dict[str, Any], chunk: types.ImageChunk | types.ImageAssetPointerChunk
) -> dict[str, Any]:
    if chunk.expected_tokens is not None:
        plain["expected_tokens"] = chunk.expected_tokens
    return plain


def _span(span: types.ProvenanceSpan) -> dict[str, Any]:
    kind = "prompt_tokens" if isinstance(span, types.PromptProvenanceSpan) else "sampled_tokens"
    return {kind: attrs.asdict(span)}


def _training_request(request: types.ForwardBackwardRequest) -> dict[str, Any]:
    batch: dict[str, Any] = {
        "data": [_plain(datum) for datum in request.data],
        "loss_fn": request.loss_fn,
    }
    if request.loss_fn_config is not None:
        batch["loss_fn_config"] = dict(request.loss_fn_config)
    key = "forward_input" if request.forward_only else "forward_backward_input"
    return {key: batch, "model_id": request.model_id, "seq_id": request.seq_id}


_WRITERS: dict[type, Writer] = {
    bool: _as_is,
    int: _as_is,
    str: _as_is,
    float: _float,
    datetime: lambda moment: moment.isoformat().replace("+00:00", "Z"),
    np.ndarray: _array,
    types.TensorData: _tensor,
    types.TopkLogprobs: lambda topk: topk.tolist(),
    types.EncodedTextChunk: lambda c: {"type": "encoded_text", "tokens": c.tokens},
    types.ImageChunk: _image,
    types.ImageAssetPointerChunk: _image_asset,
    types.ForwardBackwardRequest: _training_request,
    types.PromptProvenanceSpan: _span,
    types.SampledProvenanceSpan: _span,
}
