"""Reads plain data, as JSON gives it, into checked objects of `tinkex.types`.

Unknown fields are ignored, and differences between servers are normalized by json_variants. A value
of the wrong type is refused with its place. The reader of a class is derived once from its attrs
fields; the few classes with another form on the wire have their own function.
"""

from __future__ import annotations

import types as builtin_types
import typing
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Any, TypeVar, Union

import attrs

from tinkex import types
from tinkex.types.data import Chunk
from tinkex.types.losses import LossConfigValue
from tinkex.types.sampling import Stop
from tinkex.wire.json_values import (
    Reader,
    read_base64,
    read_boolean,
    read_chunk,
    read_floats,
    read_free_form,
    read_integer,
    read_metrics,
    read_number,
    read_number_or_text,
    read_required,
    read_tensor,
    read_text,
    read_tokens,
    read_topk,
)
from tinkex.wire.json_variants import PREPARE, wire_name
from tinkex.wire.problems import Wrong, make, refuse

T = TypeVar("T")


def from_json(cls: type[T], payload: Any) -> T:
    """Read *payload*, the result of `loads`, as an object of *cls*.

    Unknown fields are ignored; null means the field's default. An int is accepted as a float, and a
    float without a fraction as an int; nothing else is converted.

    Raises:
        DecodeError: If a field is missing, has the wrong type or fails the checks of *cls*.
    """
    hint: Any = cls
    try:
        obj: T = _reader(hint)(payload)
    except Wrong as wrong:
        raise wrong.about(cls.__name__) from wrong.__cause__
    return obj


def resembles(cls: type, payload: dict[str, Any]) -> bool:
    """True if *payload* is empty or has at least one field of *cls*.

    If all fields of *cls* have defaults, `from_json` accepts any object, even {"ok": true} from a
    proxy; this function detects that.
    """
    names = {wire_name(cls, field) for field in attrs.fields(cls)} | {"type"}
    return not payload or not names.isdisjoint(payload)


@cache
def _reader(hint: Any) -> Reader:
    """The reader for a field with this type hint."""
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
        return read_free_form if arguments[1] is Any else _mapping_reader(_reader(arguments[1]))
    raise TypeError(f"{hint!r} has no JSON form.")


def _object_reader(cls: type) -> Reader:
    hints = typing.get_type_hints(cls)
    fields = [
        (
            wire_name(cls, field),
            field.alias,
            _reader(hints[field.name]),
            field.default is attrs.NOTHING,
        )
        for field in attrs.fields(cls)
        if field.init
    ]
    prepare = PREPARE.get(cls)

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
    """A type or None. `_object_reader` handles None, so only the type needs a reader."""
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
                items[read_text(key)] = reader(item)
            except Wrong as wrong:
                wrong.inside(key)
                raise
        return items

    return read


def _as_is(value: Any) -> Any:
    return value


@attrs.frozen
class _Batch:
    data: list[types.Datum]
    loss_fn: str
    loss_fn_config: dict[str, LossConfigValue] | None = None


def _read_training_request(value: Any) -> types.ForwardBackwardRequest:
    if not isinstance(value, dict):
        refuse(value, "an object")
    forward_only = value.get("forward_backward_input") is None and "forward_input" in value
    batch = read_required(
        "forward_input" if forward_only else "forward_backward_input", value, _reader(_Batch)
    )
    return types.ForwardBackwardRequest(
        model_id=read_required("model_id", value, read_text),
        seq_id=read_required("seq_id", value, read_integer),
        data=batch.data,
        loss_fn=batch.loss_fn,
        loss_fn_config=batch.loss_fn_config,
        forward_only=forward_only,
    )


def _read_span(value: Any) -> types.ProvenanceSpan:
    if isinstance(value, dict):
        for key, cls in _SPANS.items():
            if value.get(key) is not None:
                span: types.ProvenanceSpan = read_required(key, value, _reader(cls))
                return span
    refuse(value, "an object with prompt_tokens or sampled_tokens")


_SPANS = {
    "prompt_tokens": types.PromptProvenanceSpan,
    "sampled_tokens": types.SampledProvenanceSpan,
}

_READERS: dict[Any, Reader] = {
    Any: _as_is,
    str: read_text,
    bool: read_boolean,
    int: read_integer,
    float: read_number,
    bytes: read_base64,
    datetime: read_text,  # the type converts it to a datetime
    Stop: _as_is,  # SamplingParams checks it, with a better message
    LossConfigValue: read_number_or_text,
    Chunk: read_chunk,
    types.ProvenanceSpan: _read_span,
    dict[str, float]: read_metrics,
    types.TensorData: read_tensor,
    types.TopkLogprobs: read_topk,
    types.ForwardBackwardRequest: _read_training_request,
    typing.get_type_hints(types.EncodedTextChunk)["tokens_np"]: read_tokens,
    typing.get_type_hints(types.TopkLogprobs)["logprobs"]: read_floats,
}
