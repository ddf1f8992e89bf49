"""The protobuf form of the results of training and sampling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tinkex import types
from tinkex.wire import proto_messages, proto_tensors
from tinkex.wire.problems import Wrong, make, short
from tinkex.wire.proto_tensors import (
    DTYPES,
    INT64,
    LAYOUTS,
    at,
    from_bytes,
    read_floats,
    read_tensor,
    read_tokens,
    to_bytes,
    write_tensor,
)

Output = dict[str, types.TensorData]

MESSAGES = """
ForwardBackwardOutput
  1 string                      loss_fn_output_type
  2 repeated ArrayRecord        loss_fn_outputs
  3 map double                  metrics
ArrayRecord
  1 string                      type_tag
  2 map BatchedTensor           fields
  3 int64                       num_datums
BatchedTensor
  1 bytes                       data
  2 bytes                       offsets
  3 DType                       dtype
  4 repeated int64              trailing_shape
SampleResponse
  1 repeated SampledSequence    sequences
  2 optional bytes              prompt_logprobs
  3 optional TopkLogprobs       topk_prompt_logprobs
  4 int32                       prompt_cache_hit_tokens
  5 optional Tensor             target_prompt_logprobs
  6 optional PromptAltTokens    prompt_alt_tokens
PromptAltTokens
  1 Tensor                      tokens
  2 Tensor                      logprobs
SampledSequence
  1 StopReason                  stop_reason
  2 bytes                       tokens
  3 optional bytes              logprobs
  4 optional TopkLogprobs       topk_sampled_logprobs
TopkLogprobs
  1 bytes                       token_ids
  2 bytes                       logprobs
  3 uint32                      k
  4 uint32                      length
"""

#: The message classes by name.
CLASSES = proto_messages.build(MESSAGES + proto_tensors.MESSAGES)

_STOP_REASONS = ("stop", "length")

#: Most datums in a record without fields: a few bytes could otherwise allocate gigabytes.
MAX_EMPTY_DATUMS = 2**20


def encode_result(result: types.ForwardBackwardOutput | types.SampleResponse) -> bytes:
    """Write a result as a message; sparse loss outputs become dense, as the messages require.

    Raises:
        ValueError: If a loss output has a dimension of size 0 after its first.
    """
    if isinstance(result, types.SampleResponse):
        body: bytes = _sample_message(result).SerializeToString()
        return body
    message = CLASSES["ForwardBackwardOutput"](loss_fn_output_type=result.loss_fn_output_type)
    for kind, outputs in itertools.groupby(result.loss_fn_outputs, _kind):
        _write_record(message.loss_fn_outputs.add(), [name for name, *_ in kind], list(outputs))
    for name, value in result.metrics.items():
        message.metrics[name] = float(value)
    body = message.SerializeToString()
    return body


def decode_result(cls: type[Any], body: bytes) -> Any:
    """The inverse of `encode_result`, for the expected class.

    Raises:
        DecodeError: If *body* is not such a message, or its values are inconsistent.
    """
    message = proto_messages.parse(CLASSES[cls.__name__], body)
    try:
        return _READERS[cls](message)
    except Wrong as wrong:
        raise wrong.about(cls.__name__) from wrong.__cause__


def _kind(output: Output) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """Field names, dtypes and row shapes: equal for all datums of one record."""
    return tuple(sorted((name, t.dtype, t.shape[1:]) for name, t in output.items()))


def _write_record(message: Any, names: Sequence[str], outputs: Sequence[Output]) -> None:
    message.num_datums = len(outputs)
    for name in names:
        arrays = [output[name].to_numpy() for output in outputs]
        if 0 in arrays[0].shape[1:]:
            raise ValueError(
                f"loss output {name!r} has shape {list(arrays[0].shape)}: only its first "
                "dimension may be 0."
            )
        field = message.fields[name]
        field.dtype = DTYPES[outputs[0][name].dtype]
        layout = np.dtype(LAYOUTS[field.dtype])
        sizes = np.cumsum([0] + [a.size for a in arrays]) * layout.itemsize
        field.data = to_bytes(np.concatenate([a.reshape(-1) for a in arrays]), layout.str)
        field.offsets = to_bytes(sizes, "<i8")
        field.trailing_shape.extend(arrays[0].shape[1:])


def _read_output(message: Any) -> types.ForwardBackwardOutput:
    outputs = [
        output
        for i, record in enumerate(message.loss_fn_outputs)
        for output in at(f"loss_fn_outputs[{i}]", _read_record, record)
    ]
    kind = message.loss_fn_output_type.rsplit(":", 1)[-1]
    return types.ForwardBackwardOutput(outputs, dict(message.metrics), kind or "ArrayRecord")


def _read_record(message: Any) -> list[Output]:
    """The outputs of each datum: the fields of a record, split at their offsets."""
    count = message.num_datums
    columns = {
        name: list(at(f"fields[{name!r}]", _cut, field)) for name, field in message.fields.items()
    }
    if count == 0 and columns:  # the count may be omitted
        count = len(next(iter(columns.values())))
    for name, column in columns.items():
        if len(column) != count:
            raise Wrong(
                f"has {len(column)} datums, but the record has {count}.", f"fields[{name!r}]"
            )
    if not 0 <= count <= MAX_EMPTY_DATUMS and not columns:
        raise Wrong(f"has {count} datums, but no fields.")
    return [{name: column[i] for name, column in columns.items()} for i in range(count)]


def _cut(message: Any) -> Iterator[types.TensorData]:
    data = from_bytes(message.data, message.dtype)
    if not data.flags.writeable:  # users may change results, as with JSON
        data = data.copy()
    width = np.dtype(LAYOUTS[message.dtype]).itemsize
    trailing = list(message.trailing_shape)
    row = math.prod(trailing)
    offsets = at("offsets", from_bytes, message.offsets, INT64)
    if row < 1 or min(trailing, default=1) < 1:
        raise Wrong(f"is {short(trailing)}, but must hold positive sizes.", "trailing_shape")
    low, high = offsets.min(initial=0), offsets.max(initial=0)
    if low < 0 or high > len(message.data):
        there = len(message.data)
        raise Wrong(f"run from {low} to {high}, but there are {there} bytes.", "offsets")
    if offsets.size == 0 or (np.diff(offsets) < 0).any() or (offsets % (width * row)).any():
        raise Wrong(f"do not divide the data into rows of {width * row} bytes.", "offsets")
    cuts = (offsets // width).tolist()
    return (
        types.TensorData(data[start:end].reshape(-1, *trailing))
        for start, end in itertools.pairwise(cuts)
    )


def _sample_message(result: types.SampleResponse) -> Any:
    message = CLASSES["SampleResponse"](prompt_cache_hit_tokens=result.prompt_cache_hit_tokens)
    for sequence in result.sequences:
        added = message.sequences.add(stop_reason=_STOP_REASONS.index(sequence.stop_reason))
        added.tokens = to_bytes(sequence.tokens_np, "<i4")
        if sequence.logprobs_np is not None:
            added.logprobs = to_bytes(sequence.logprobs_np, "<f4")
        if sequence.topk_logprobs_np is not None:
            _write_topk(added.topk_sampled_logprobs, sequence.topk_logprobs_np)
    if result.prompt_logprobs_np is not None:
        message.prompt_logprobs = to_bytes(result.prompt_logprobs_np, "<f4")
    if result.topk_prompt_logprobs_np is not None:
        _write_topk(message.topk_prompt_logprobs, result.topk_prompt_logprobs_np)
    if result.target_prompt_logprobs is not None:
        tensor = write_tensor(result.target_prompt_logprobs)
        message.target_prompt_logprobs.MergeFromString(b"".join(tensor.parts))
    if result.prompt_alt_tokens is not None:
        for name in ("tokens", "logprobs"):
            tensor = write_tensor(getattr(result.prompt_alt_tokens, name))
            getattr(message.prompt_alt_tokens, name).MergeFromString(b"".join(tensor.parts))
    return message


def _write_topk(message: Any, topk: types.TopkLogprobs) -> None:
    message.length, message.k = topk.token_ids.shape
    message.token_ids = to_bytes(topk.token_ids, "<i4")
    message.logprobs = to_bytes(topk.logprobs, "<f4")


def _read_sample(message: Any) -> types.SampleResponse:
    return types.SampleResponse(
        sequences=[
            at(f"sequences[{i}]", _read_sequence, sequence)
            for i, sequence in enumerate(message.sequences)
        ],
        prompt_logprobs=at("prompt_logprobs", _own_floats, message.prompt_logprobs),
        topk_prompt_logprobs=at("topk_prompt_logprobs", _read_topk, message.topk_prompt_logprobs),
        target_prompt_logprobs=(
            at("target_prompt_logprobs", read_tensor, message.target_prompt_logprobs)
            if message.HasField("target_prompt_logprobs")
            else None
        ),
        prompt_cache_hit_tokens=message.prompt_cache_hit_tokens,
        prompt_alt_tokens=(
            at("prompt_alt_tokens", _read_alt_tokens, message.prompt_alt_tokens)
            if message.HasField("prompt_alt_tokens")
            else None
        ),
    )


def _read_alt_tokens(message: Any) -> types.PromptAltTokens:
    return types.PromptAltTokens(
        at("tokens", read_tensor, message.tokens), at("logprobs", read_tensor, message.logprobs)
    )


def _read_sequence(message: Any) -> types.SampledSequence:
    if message.stop_reason >= len(_STOP_REASONS):
        raise Wrong(f"is {message.stop_reason}, but must be 0 (stop) or 1 (length).", "stop_reason")
    tokens = at("tokens", read_tokens, message.tokens)
    logprobs = at("logprobs", _own_floats, message.logprobs)
    if logprobs is not None and logprobs.size != tokens.size:
        raise Wrong(f"are {logprobs.size}, but there are {tokens.size} tokens.", "logprobs")
    values = {
        "tokens": tokens,
        "logprobs": logprobs,
        "stop_reason": _STOP_REASONS[message.stop_reason],
        "topk_logprobs": at("topk_sampled_logprobs", _read_topk, message.topk_sampled_logprobs),
    }
    sequence: types.SampledSequence = make(types.SampledSequence, values)
    return sequence


def _own_floats(data: bytes) -> np.ndarray | None:
    """A writeable array of float32; None if absent or empty."""
    return read_floats(data).copy() if data else None


def _read_topk(message: Any) -> types.TopkLogprobs | None:
    """The top-k table, or None if it has no cells; absent cells keep their marker value."""
    shape = (message.length, message.k)
    if 0 in shape:
        return None
    tokens, logprobs = read_tokens(message.token_ids), read_floats(message.logprobs)
    cells = message.length * message.k
    if tokens.size != cells or logprobs.size != cells:
        raise Wrong(
            f"holds {tokens.size} tokens and {logprobs.size} log-probabilities, but says it is "
            f"{message.length} x {message.k}."
        )
    return types.TopkLogprobs(
        tokens.astype(np.int32).reshape(shape), logprobs.copy().reshape(shape)
    )


_READERS: dict[type[Any], Callable[[Any], Any]] = {
    types.ForwardBackwardOutput: _read_output,
    types.SampleResponse: _read_sample,
}
