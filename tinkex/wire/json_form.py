"""The JSON form of the types: plain data out, checked types in.

What is written is what the official SDK writes, less the fields of its newer versions that hold
their defaults, so that servers which refuse unknown fields take it. What is read may hold unknown
fields, and the differences between servers listed at `_PREPARE`; but a value of the wrong type is
refused with its place, never bent into the right one. Reader and writer of a class are worked out
from its fields once. Knows nothing of paths, headers or protobuf.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import types as builtin_types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NoReturn, TypeVar, Union

import attrs
import numpy as np

from tinkex import types
from tinkex.types.data import MAX_TOKEN_ID, Chunk
from tinkex.types.losses import LossConfigValue
from tinkex.types.sampling import Stop
from tinkex.wire import large_json
from tinkex.wire.problems import DecodeError, Wrong, make, make_tensor, refuse, short

T = TypeVar("T")
Reader = Callable[[Any], Any]
Writer = Callable[[Any], Any]

#: Deepest nesting of data whose inside we do not know (user_metadata and the like).
MAX_DEPTH = 50
#: Texts with more characters are parsed in pieces.
_LARGE_TEXT = 1 << 18
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


# --- text ---------------------------------------------------------------------------------------


def dumps(payload: Any) -> bytes:
    """*payload* as compact JSON.

    Raises:
        ValueError: If it holds what JSON cannot say: NaN, infinity, or objects of other types.
    """
    try:
        return json.dumps(payload, allow_nan=False, separators=(",", ":")).encode("ascii")
    except (ValueError, TypeError, RecursionError) as exc:
        raise ValueError(f"this cannot be sent as JSON: {exc}") from exc


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def loads(body: bytes) -> Any:
    """The inverse of `dumps`.

    Raises:
        DecodeError: If *body* is not UTF-8, not JSON (NaN and Infinity are not), or nested too
            deeply to read.
    """
    try:
        text = body.decode("utf-8")
        if len(text) > _LARGE_TEXT:
            return large_json.loads(text, _no_constant)
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError as exc:
        raise DecodeError("the body is not readable JSON: it is nested too deeply.") from exc
    except ValueError as exc:  # also JSONDecodeError and UnicodeDecodeError
        raise DecodeError(f"the body is not JSON ({exc}): it begins {body[:40]!r}.") from exc


# --- writing ------------------------------------------------------------------------------------

#: Fields that older servers do not know: left out while they hold their default.
_LATER_FIELDS = frozenset(
    {
        "adapter",
        "kind",
        "optimizer_config",
        "prompt_alt_tokens_k",
        "prompt_cache_hit_tokens",
        "prompt_logprobs_last_n",
        "record_stability_info",
        "target_prompt_logprobs",
        "topk_sample_logprobs",
    }
)

#: Names that differ between our type and the wire.
_WIRE_NAMES: dict[tuple[type, str], str] = {
    (types.SampledSequence, "topk_logprobs"): "topk_sampled_logprobs",
}


def to_json(obj: Any, tag: str | None = None) -> dict[str, Any]:
    """An object of `tinkex.types` as plain data, ready for `dumps`.

    Fields that are None are left out, unless the field's metadata has `send_null`. Numbers in
    arrays that are not finite become null, as JSON has no other word for them.

    Args:
        tag: goes in as "type", where the protocol wants one.
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
            _wire_name(cls, field),
            field.default if field.name in _LATER_FIELDS else None,
            bool(field.metadata.get("send_null")),
        )
        for field in attrs.fields(cls)
    ]

    def write(obj: Any) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        for name, key, left_out, send_null in fields:
            value = getattr(obj, name)
            if value is None and send_null:
                plain[key] = None
            elif value is not None and (left_out is None or value != left_out):
                plain[key] = _plain(value)
        return plain

    return write


def _wire_name(cls: type, field: attrs.Attribute[Any]) -> str:
    alias = field.alias or field.name
    return _WIRE_NAMES.get((cls, alias), alias)


def _array(array: np.ndarray) -> list[Any]:
    values: list[Any] = array.tolist()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return _without_nan(values)
    return values


def _without_nan(values: list[Any]) -> list[Any]:
    return [
        _without_nan(x) if isinstance(x, list) else x if math.isfinite(x) else None for x in values
    ]


def _float(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tensor(tensor: types.TensorData) -> dict[str, Any]:
    plain = {
        "data": _array(tensor.data),
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
    np.ndarray: _array,
    types.TensorData: _tensor,
    types.TopkLogprobs: lambda topk: topk.tolist(),
    types.EncodedTextChunk: lambda c: {"type": "encoded_text", "tokens": c.tokens.tolist()},
    types.ImageChunk: _image,
    types.ImageAssetPointerChunk: _image_asset,
    types.ForwardBackwardRequest: _training_request,
}


# --- reading ------------------------------------------------------------------------------------


def from_json(cls: type[T], payload: Any) -> T:
    """*payload*, as `loads` gives it, as an object of *cls*.

    Unknown fields are ignored, and null stands for a field's default. An int is taken for a float,
    a float without fraction for an int; nothing else is converted.

    Raises:
        DecodeError: If something is missing, of the wrong type or refused by the type's own checks.
    """
    hint: Any = cls
    try:
        obj: T = _reader(hint)(payload)
    except Wrong as wrong:
        raise wrong.about(cls.__name__) from wrong.__cause__
    return obj


def resembles(cls: type, payload: dict[str, Any]) -> bool:
    """Whether an object has any field of *cls*, or none at all. Where all fields have defaults,
    `from_json` takes everything, a proxy's {"ok": true} too."""
    names = {_wire_name(cls, field) for field in attrs.fields(cls)} | {"type"}
    return not payload or not names.isdisjoint(payload)


@cache
def _reader(hint: Any) -> Reader:
    """What reads a field of this type."""
    if hint in _READERS:
        return _READERS[hint]
    if isinstance(hint, type) and attrs.has(hint):
        return _object_reader(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, builtin_types.UnionType):
        return _optional_reader(arguments)
    if origin is typing.Literal:
        return _literal_reader(arguments)
    if origin in (list, tuple):
        return _list_reader(_reader(arguments[0]))
    if origin is not None and issubclass(origin, Mapping):
        return _free_form if arguments[1] is Any else _mapping_reader(_reader(arguments[1]))
    raise TypeError(f"no JSON form is known for {hint!r}.")


def _object_reader(cls: type) -> Reader:
    hints = typing.get_type_hints(cls)
    fields = [
        (
            _wire_name(cls, field),
            field.alias,
            _reader(hints[field.name]),
            field.default is attrs.NOTHING,
        )
        for field in attrs.fields(cls)
        if field.init
    ]
    prepare = _PREPARE.get(cls)

    def read(payload: Any) -> Any:
        if prepare is not None:
            payload = prepare(payload)
        if not isinstance(payload, dict):
            refuse(payload, "an object")
        values = {}
        for key, alias, reader, required in fields:
            value = payload.get(key)
            if value is not None:
                try:
                    values[alias] = reader(value)
                except Wrong as wrong:
                    wrong.inside(key)
                    raise
            elif required:
                raise Wrong("is missing.", key)
        return make(cls, values)

    return read


def _optional_reader(arguments: tuple[Any, ...]) -> Reader:
    """A type or None: None never gets here, `_object_reader` takes care of it."""
    [inner] = [a for a in arguments if a is not type(None)]
    return _reader(inner)


def _literal_reader(values: tuple[Any, ...]) -> Reader:
    wanted = " or ".join(map(repr, values))

    def read(value: Any) -> Any:
        if not isinstance(value, str) or value not in values:
            refuse(value, wanted)
        return value

    return read


def _list_reader(reader: Reader) -> Reader:
    def read(value: Any) -> list[Any]:
        if not isinstance(value, list):
            refuse(value, "a list")
        items = []
        try:
            for item in value:
                items.append(reader(item))
        except Wrong as wrong:
            wrong.inside(f"[{len(items)}]")
            raise
        return items

    return read


def _mapping_reader(reader: Reader) -> Reader:
    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            refuse(value, "an object")
        items = {}
        for key, item in value.items():
            try:
                items[_text(key)] = reader(item)
            except Wrong as wrong:
                wrong.inside(key)
                raise
        return items

    return read


def _text(value: Any) -> str:
    if not isinstance(value, str):
        refuse(value, "a string")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        refuse(value, "Unicode text (it holds half of a surrogate pair)")
    return value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        refuse(value, "true or false")
    return value


def _integer(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    refuse(value, "a whole number")


def _number(value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):  # 1e999 is JSON, and infinity
            return number
    refuse(value, "a finite number")


def _number_or_text(value: Any) -> float | str:
    return value if isinstance(value, str) else _number(value)


def _free_form(value: Any) -> dict[str, Any]:
    """An object whose inside is the user's: only what would break later is refused."""
    if not isinstance(value, dict):
        refuse(value, "an object")
    _check_free_form(value, 0)
    return value


def _check_free_form(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise Wrong(f"is nested more than {MAX_DEPTH} deep.")
    if isinstance(value, float):
        _number(value)
    elif isinstance(value, str):
        _text(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            _text(key)
            _check_free_form(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_free_form(item, depth + 1)


def _metrics(value: Any) -> dict[str, float]:
    """Numbers by name; null is NaN. What is no number is left out: the operation has run, and its
    result must not be lost for a metric we cannot show."""
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


def numbers(values: Any, dtype: type[np.generic], what: str) -> np.ndarray:
    """A flat JSON list as an array, without a loop in Python. null is NaN among floats.

    Raises:
        Wrong: If it holds anything but numbers, or ones that do not fit *dtype*.
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
        raise Wrong(f"holds a number beyond {np.dtype(dtype)}.") from exc


def _tokens(value: Any) -> np.ndarray:
    array = numbers(value, np.int64, "token ids")
    if array.size and not (int(array.min()) >= 0 and int(array.max()) <= MAX_TOKEN_ID):
        bad = int(array.min()) if int(array.min()) < 0 else int(array.max())
        raise Wrong(f"holds token id {bad}, which is outside 0..{MAX_TOKEN_ID}.")
    return array.astype(np.int32)


def _floats(value: Any) -> np.ndarray:
    return numbers(value, np.float32, "numbers")


def _read_tensor(value: Any) -> types.TensorData:
    if not isinstance(value, dict):
        refuse(value, "an object with data, dtype and shape")
    dtype = value.get("dtype")
    if dtype not in ("int64", "float32"):
        raise Wrong(f'is {short(dtype)}, but must be "int64" or "float32".', "dtype")
    kind = np.float32 if dtype == "float32" else np.int64
    parts: dict[str, Any] = {}
    for key, read in (
        ("data", lambda v: numbers(v, kind, "numbers")),
        ("shape", lambda v: numbers(v, np.int64, "whole numbers").tolist()),
        ("sparse_crow_indices", lambda v: numbers(v, np.int64, "whole numbers")),
        ("sparse_col_indices", lambda v: numbers(v, np.int64, "whole numbers")),
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


def _read_topk(value: Any) -> types.TopkLogprobs:
    """Rows of [token, logprob] pairs, or of {"token_id", "logprob"}; null where there are none."""
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
    token = _integer(cell[0])
    if not 0 <= token <= MAX_TOKEN_ID:
        refuse(token, "a token id")
    logprob = _number(cell[1])
    if abs(logprob) > _LARGEST_FLOAT32:
        refuse(logprob, "a float32 number")
    return token, logprob


def _read_text_chunk(value: dict[str, Any]) -> Chunk:
    return types.EncodedTextChunk(_at("tokens", value, _tokens))


def _read_image(value: dict[str, Any]) -> Chunk:
    data = _at("data", value, _base64)
    return make(types.ImageChunk, {"data": data, **_format_and_length(value)})


def _read_image_asset(value: dict[str, Any]) -> Chunk:
    location = _at("location", value, _text)
    return make(types.ImageAssetPointerChunk, {"location": location, **_format_and_length(value)})


def _format_and_length(value: dict[str, Any]) -> dict[str, Any]:
    length = value.get("expected_tokens")
    return {
        "format": _at("format", value, _text),
        "expected_tokens": None if length is None else _at("expected_tokens", value, _integer),
    }


def _at(key: str, value: dict[str, Any], reader: Reader) -> Any:
    if value.get(key) is None:
        raise Wrong("is missing.", key)
    try:
        return reader(value[key])
    except Wrong as wrong:
        wrong.inside(key)
        raise


def _base64(value: Any) -> bytes:
    try:
        return base64.b64decode(_text(value), validate=True)
    except ValueError as exc:
        raise Wrong(f"is not base64: {exc}.") from exc


_CHUNKS: dict[str, Callable[[dict[str, Any]], Chunk]] = {
    "encoded_text": _read_text_chunk,
    "image": _read_image,
    "image_asset_pointer": _read_image_asset,
}


def _read_chunk(value: Any) -> Chunk:
    if not isinstance(value, dict):
        refuse(value, "an object with a type")
    kind = value.get("type", "encoded_text")  # SDKs up to 0.15 name no type
    read = _CHUNKS.get(kind) if isinstance(kind, str) else None
    if read is None:
        raise Wrong(f"is {short(kind)}, but must be one of {', '.join(_CHUNKS)}.", "type")
    return read(value)


@attrs.frozen
class _Batch:
    data: list[types.Datum]
    loss_fn: str
    loss_fn_config: dict[str, LossConfigValue] | None = None


def _read_training_request(value: Any) -> types.ForwardBackwardRequest:
    if not isinstance(value, dict):
        refuse(value, "an object")
    forward_only = value.get("forward_backward_input") is None and "forward_input" in value
    batch = _at(
        "forward_input" if forward_only else "forward_backward_input", value, _reader(_Batch)
    )
    return types.ForwardBackwardRequest(
        model_id=_at("model_id", value, _text),
        seq_id=_at("seq_id", value, _integer),
        data=batch.data,
        loss_fn=batch.loss_fn,
        loss_fn_config=batch.loss_fn_config,
        forward_only=forward_only,
    )


_READERS: dict[Any, Reader] = {
    Any: _as_is,
    str: _text,
    bool: _boolean,
    int: _integer,
    float: _number,
    bytes: _base64,
    Stop: _as_is,  # SamplingParams checks it, with a better sentence
    LossConfigValue: _number_or_text,
    Chunk: _read_chunk,
    dict[str, float]: _metrics,
    types.TensorData: _read_tensor,
    types.TopkLogprobs: _read_topk,
    types.ForwardBackwardRequest: _read_training_request,
    typing.get_type_hints(types.EncodedTextChunk)["tokens"]: _tokens,
    typing.get_type_hints(types.TopkLogprobs)["logprobs"]: _floats,
}


# --- where servers differ -----------------------------------------------------------------------


def _renamed(old: str, new: str) -> Callable[[Any], Any]:
    """Takes *old* for *new* where *new* is missing."""

    def prepare(value: Any) -> Any:
        if isinstance(value, dict) and value.get(new) is None and value.get(old) is not None:
            return {**value, new: value[old]}
        return value

    return prepare


def _training_run(value: Any) -> Any:
    """`id` for training_run_id; booleans may be text."""
    value = _renamed("id", "training_run_id")(value)
    if not isinstance(value, dict):
        return value
    spoken = {"true": True, "false": False}
    return {
        key: spoken.get(item, item)
        if key in ("is_lora", "corrupted") and isinstance(item, str)
        else item
        for key, item in value.items()
    }


def _cursor(value: Any) -> Any:
    """Numbers may be text."""
    if not isinstance(value, dict):
        return value
    return {
        key: int(item) if isinstance(item, str) and item.isdecimal() and len(item) < 19 else item
        for key, item in value.items()
    }


def _supported_model(value: Any) -> Any:
    """A model may be its bare name."""
    return {"model_name": value} if isinstance(value, str) else value


def _capabilities(value: Any) -> Any:
    """The list may hold null."""
    if not isinstance(value, dict) or not isinstance(value.get("supported_models"), list):
        return value
    models = [model for model in value["supported_models"] if model is not None]
    return {**value, "supported_models": models}


#: What is done to a payload before it is read, for the servers that say it differently.
_PREPARE: dict[type, Callable[[Any], Any]] = {
    types.Cursor: _cursor,
    types.GetInfoResponse: _renamed("base_model", "model_name"),
    types.GetServerCapabilitiesResponse: _capabilities,
    types.ModelData: _renamed("base_model", "model_name"),
    types.SampledSequence: _renamed("topk_logprobs", "topk_sampled_logprobs"),
    types.SupportedModel: _supported_model,
    types.TrainingRun: _training_run,
}
