"""Reads single JSON values: numbers, text, arrays, tensors, chunks.

A value of the wrong type raises `Wrong`; nothing is converted silently. The readers of whole
objects are in json_reader.
"""

from __future__ import annotations

import base64
import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinkex import types
from tinkex.types.data import MAX_TOKEN_ID, Chunk
from tinkex.wire.problems import Wrong, make, make_tensor, refuse, short

Reader = Callable[[Any], Any]

#: Deepest nesting of user-defined data (user_metadata and the like).
MAX_DEPTH = 50
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def read_text(value: Any) -> str:
    """A string without lone surrogates."""
    if not isinstance(value, str):
        refuse(value, "a string")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        refuse(value, "Unicode text (it contains half of a surrogate pair)")
    return value


def read_boolean(value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        refuse(value, "true or false")
    return value


def read_integer(value: Any) -> int:
    """A whole number; 3.0 counts as 3."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    refuse(value, "a whole number")


def read_number(value: Any) -> float:
    """A finite number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):  # 1e999 is JSON, and infinity
            return number
    refuse(value, "a finite number")


def read_number_or_text(value: Any) -> float | str:
    """A finite number or a string: a setting of a loss."""
    return value if isinstance(value, str) else read_number(value)


def read_free_form(value: Any) -> dict[str, Any]:
    """An object with user-defined content; refuses only values that could not be written again."""
    if not isinstance(value, dict):
        refuse(value, "an object")
    _check_free_form(value, 0)
    return value


def _check_free_form(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise Wrong(f"is nested more than {MAX_DEPTH} deep.")
    if isinstance(value, float):
        read_number(value)
    elif isinstance(value, str):
        read_text(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            read_text(key)
            _check_free_form(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_free_form(item, depth + 1)


def read_metrics(value: Any) -> dict[str, float]:
    """Numbers by name; null is NaN.

    Skips values that are not numbers: the operation has run, and its result must not be lost
    because of an unreadable metric.
    """
    if not isinstance(value, dict):
        refuse(value, "an object")
    metrics = {}
    for name, number in value.items():
        if number is None:
            metrics[name] = math.nan
        elif isinstance(number, (int, float)):
            with contextlib.suppress(OverflowError):  # an int of hundreds of digits
                metrics[name] = float(number)
    return metrics


def read_array(values: Any, dtype: type[np.generic], what: str) -> np.ndarray:
    """A flat JSON list as an array of *dtype*, without a loop in Python; null is NaN in floats.

    Args:
        what: the name of the items in an error message.

    Raises:
        Wrong: If it holds anything except numbers, or numbers outside the range of *dtype*.
    """
    if not isinstance(values, list):
        refuse(values, f"a list of {what}")
    floating = issubclass(dtype, np.floating)
    kinds = set(map(type, values))
    if not kinds <= ({int, float, type(None)} if floating else {int, float}):
        bad = next(v for v in values if type(v) not in (int, float))
        raise Wrong(f"holds {short(bad)}, but must be a flat list of {what}.")
    try:
        with np.errstate(over="raise", invalid="raise"):
            array = np.array(values, np.float64 if float in kinds else dtype)
            if not floating and float in kinds and not (array == np.rint(array)).all():
                raise Wrong(f"holds numbers with a fraction, but must be {what}.")
            if np.isinf(array).any():  # 1e999 is JSON
                raise OverflowError
            return array.astype(dtype, copy=False)
    except (OverflowError, FloatingPointError) as exc:
        raise Wrong(f"holds a number outside the range of {np.dtype(dtype)}.") from exc


def read_tokens(value: Any) -> np.ndarray:
    """Token ids, (N,) int32."""
    array = read_array(value, np.int64, "token ids")
    if array.size and not (int(array.min()) >= 0 and int(array.max()) <= MAX_TOKEN_ID):
        bad = int(array.min()) if int(array.min()) < 0 else int(array.max())
        raise Wrong(f"holds token id {bad}, which is outside 0..{MAX_TOKEN_ID}.")
    return array.astype(np.int32)


def read_floats(value: Any) -> np.ndarray:
    """Numbers, (N,) float32; null is NaN."""
    return read_array(value, np.float32, "numbers")


def read_tensor(value: Any) -> types.TensorData:
    """A tensor of {"data", "dtype"}, with "shape" and the indices of a sparse one if present."""
    if not isinstance(value, dict):
        refuse(value, "an object with data, dtype and shape")
    dtype = value.get("dtype")
    if dtype not in ("int64", "float32"):
        raise Wrong(f'is {short(dtype)}, but must be "int64" or "float32".', "dtype")
    kind = np.float32 if dtype == "float32" else np.int64
    parts: dict[str, Any] = {}
    for key, read in (
        ("data", lambda v: read_array(v, kind, "numbers")),
        ("shape", lambda v: read_array(v, np.int64, "whole numbers").tolist()),
        ("sparse_crow_indices", lambda v: read_array(v, np.int64, "whole numbers")),
        ("sparse_col_indices", lambda v: read_array(v, np.int64, "whole numbers")),
    ):
        if value.get(key) is not None:
            try:
                parts[key] = read(value[key])
            except Wrong as wrong:
                wrong.inside(key)
                raise
    if "data" not in parts:
        raise Wrong("is missing.", "data")
    return make_tensor(**parts)


def read_topk(value: Any) -> types.TopkLogprobs:
    """Rows of [token, logprob] pairs or of {"token_id", "logprob"} objects; a row may be null."""
    if not isinstance(value, list):
        refuse(value, "a list of rows")
    rows: list[list[tuple[int, float]] | None] = []
    try:
        for row in value:
            rows.append(None if row is None else [_read_pair(cell) for cell in row])
    except (Wrong, TypeError) as exc:
        row = short(value[len(rows)])
        raise Wrong(f"is {row}, but must be a row of pairs.", f"[{len(rows)}]") from exc
    return types.TopkLogprobs.from_list(rows)


def _read_pair(cell: Any) -> tuple[int, float]:
    if isinstance(cell, dict):
        cell = [cell.get("token_id"), cell.get("logprob")]
    if not isinstance(cell, list) or len(cell) != 2:
        refuse(cell, "a pair")
    token = read_integer(cell[0])
    if not 0 <= token <= MAX_TOKEN_ID:
        refuse(token, "a token id")
    logprob = read_number(cell[1])
    if abs(logprob) > _LARGEST_FLOAT32:
        refuse(logprob, "a float32 number")
    return token, logprob


def read_required(key: str, value: dict[str, Any], reader: Reader) -> Any:
    """Read the field *key* of *value*; raises Wrong if it is missing or null."""
    if value.get(key) is None:
        raise Wrong("is missing.", key)
    try:
        return reader(value[key])
    except Wrong as wrong:
        wrong.inside(key)
        raise


def _read_text_chunk(value: dict[str, Any]) -> Chunk:
    return types.EncodedTextChunk(read_required("tokens", value, read_tokens))


def _read_image(value: dict[str, Any]) -> Chunk:
    data = read_required("data", value, read_base64)
    return make(types.ImageChunk, {"data": data, **_format_and_length(value)})


def _read_image_asset(value: dict[str, Any]) -> Chunk:
    location = read_required("location", value, read_text)
    return make(types.ImageAssetPointerChunk, {"location": location, **_format_and_length(value)})


def _format_and_length(value: dict[str, Any]) -> dict[str, Any]:
    length = value.get("expected_tokens")
    return {
        "format": read_required("format", value, read_text),
        "expected_tokens": (
            None if length is None else read_required("expected_tokens", value, read_integer)
        ),
    }


def read_base64(value: Any) -> bytes:
    """Bytes in base64."""
    try:
        return base64.b64decode(read_text(value), validate=True)
    except ValueError as exc:
        raise Wrong(f"is not base64: {exc}.") from exc


_CHUNKS: dict[str, Callable[[dict[str, Any]], Chunk]] = {
    "encoded_text": _read_text_chunk,
    "image": _read_image,
    "image_asset_pointer": _read_image_asset,
}


def read_chunk(value: Any) -> Chunk:
    """A chunk of a prompt, of the kind in its "type"."""
    if not isinstance(value, dict):
        refuse(value, "an object with a type")
    kind = value.get("type", "encoded_text")  # SDKs up to 0.15 send no type
    read = _CHUNKS.get(kind) if isinstance(kind, str) else None
    if read is None:
        raise Wrong(f"is {short(kind)}, but must be one of {', '.join(_CHUNKS)}.", "type")
    return read(value)
