"""The protobuf form of training data and of the results of training and sampling.

The messages are described below as a table, and built in a pool of our own: protobuf's default pool
is one per process, and the official SDK registers the same names there. Arrays go to bytes and
back whole. Imported when first needed, as protobuf is; knows nothing of HTTP.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError as BrokenMessage
from google.protobuf.message import Message

from tinkex import types
from tinkex.wire.problems import DecodeError, Wrong, make, make_tensor, short

R = TypeVar("R")
Output = dict[str, types.TensorData]

PACKAGE = "tinker_public"

# Message by message: field number, type, name; "oneof:name" where one excludes another. What is
# never sent or read (provenance spans, sampling parameters) is left out: the reader skips unknown
# fields.
MESSAGES = """
ForwardBackwardRequest
  1 string                      model_id
  2 int32                       seq_id
  3 repeated Datum              data
  4 string                      loss_fn
  5 map double                  loss_fn_config
  6 bool                        forward_only
  7 map LossConfigValue         loss_fn_config_v2
LossConfigValue
  1 double                      number                  oneof:value
  2 string                      text                    oneof:value
Datum
  1 repeated Chunk              model_input
  2 map Tensor                  loss_fn_inputs
Chunk
  1 EncodedTextChunk            encoded_text            oneof:chunk
  2 ImageChunk                  image                   oneof:chunk
  3 DmelChunk                   dmel                    oneof:chunk
EncodedTextChunk
  1 bytes                       tokens
ImageChunk
  1 bytes                       data
  2 string                      format
  3 optional int32              expected_tokens
DmelChunk
  1 bytes                       dmel
Tensor
  1 bytes                       dense                   oneof:encoding
  2 SparseCsr                   sparse_csr              oneof:encoding
  3 DType                       dtype
  4 repeated int64              shape
SparseCsr
  1 bytes                       values
  2 bytes                       crow_indices
  3 bytes                       col_indices
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

ENUMS = {
    "StopReason": ("STOP_REASON_STOP", "STOP_REASON_LENGTH"),
    "DType": (
        "DTYPE_UNSPECIFIED",
        "DTYPE_FLOAT32",
        "DTYPE_INT64",
        "DTYPE_INT32",
        "DTYPE_BFLOAT16",
    ),
}

_STOP_REASONS = ("stop", "length")
_FLOAT32, _INT64, _INT32, _BFLOAT16 = 1, 2, 3, 4
#: How the numbers of each DType lie in the bytes: little-endian, whatever the machine.
_LAYOUTS = {_FLOAT32: "<f4", _INT64: "<i8", _INT32: "<i4", _BFLOAT16: "<u2"}
_DTYPES = {"float32": _FLOAT32, "int64": _INT64}

#: Most datums of a record without fields; a few bytes could otherwise ask for billions.
MAX_EMPTY_DATUMS = 2**20


# --- the messages ---------------------------------------------------------------------------------

_Field = descriptor_pb2.FieldDescriptorProto


def _build(description: str) -> dict[str, type[Message]]:
    """The message classes of *description*, in a pool of their own."""
    file = descriptor_pb2.FileDescriptorProto(
        name="tinker_public.proto", package=PACKAGE, syntax="proto3"
    )
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for line in description.strip().splitlines():
        if line.startswith(" "):
            _add_field(file.message_type[-1], line.split())
        else:
            file.message_type.add(name=line)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        message.name: message_factory.GetMessageClass(
            pool.FindMessageTypeByName(f"{PACKAGE}.{message.name}")
        )
        for message in file.message_type
    }


def _add_field(message: descriptor_pb2.DescriptorProto, words: list[str]) -> None:
    number, *kind, name = [word for word in words if not word.startswith("oneof:")]
    oneof = words[-1].partition("oneof:")[2]
    field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
    if kind[0] in ("repeated", "map"):
        field.label = _Field.LABEL_REPEATED
    if kind[0] == "map":
        kind[-1] = f"{message.name}.{_add_map_entry(message, name, kind[-1])}"
    if kind[0] == "optional":
        field.proto3_optional = True
        oneof = f"_{name}"
    _set_type(field, kind[-1])
    if oneof:
        if oneof not in [known.name for known in message.oneof_decl]:
            message.oneof_decl.add(name=oneof)
        field.oneof_index = [known.name for known in message.oneof_decl].index(oneof)


def _add_map_entry(message: descriptor_pb2.DescriptorProto, name: str, kind: str) -> str:
    """A map is a repeated message of key and value."""
    entry = message.nested_type.add(name=name.title().replace("_", "") + "Entry")
    entry.options.map_entry = True
    _add_field(entry, ["1", "string", "key"])
    _add_field(entry, ["2", kind, "value"])
    return entry.name


def _set_type(field: descriptor_pb2.FieldDescriptorProto, kind: str) -> None:
    if kind[0].islower():
        field.type = _Field.Type.Value(f"TYPE_{kind.upper()}")
    else:
        field.type = _Field.TYPE_ENUM if kind in ENUMS else _Field.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{kind}"


#: The message classes by name.
CLASSES: dict[str, Any] = _build(MESSAGES)


# --- arrays -------------------------------------------------------------------------------------


def _to_bytes(array: np.ndarray, layout: str) -> bytes:
    return array.astype(layout, copy=False).tobytes()


def _from_bytes(data: bytes, dtype: int) -> np.ndarray:
    """The numbers in *data*, a read-only view where nothing has to be converted."""
    if dtype not in _LAYOUTS:
        raise Wrong(
            f"is DType {dtype}, but must be one of {', '.join(ENUMS['DType'][1:])}.", "dtype"
        )
    layout = np.dtype(_LAYOUTS[dtype])
    if len(data) % layout.itemsize:
        raise Wrong(f"holds {len(data)} bytes, which is no multiple of {layout.itemsize}.")
    array = np.frombuffer(data, layout)
    if dtype == _INT32:
        return array.astype(np.int64)
    if dtype == _BFLOAT16:  # the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(layout.newbyteorder("="), copy=False)


def _tokens(data: bytes) -> np.ndarray:
    return _from_bytes(data, _INT32)


def _floats(data: bytes) -> np.ndarray:
    return _from_bytes(data, _FLOAT32)


def _at(place: str, read: Callable[..., R], *arguments: Any) -> R:
    try:
        return read(*arguments)
    except Wrong as wrong:
        wrong.inside(place)
        raise


def _parse(name: str, body: bytes) -> Any:
    message = CLASSES[name]()
    try:
        message.ParseFromString(body)
    except BrokenMessage as exc:
        raise DecodeError(
            f"these {len(body)} bytes are no {name} message, or not all of one ({exc}); "
            f"they begin {bytes(body[:16]).hex()!r}."
        ) from exc
    return message


# --- training data ------------------------------------------------------------------------------


def encode_request(request: types.ForwardBackwardRequest) -> bytes:
    """Raises ValueError for what the messages have no room for: an image asset pointer."""
    message = CLASSES["ForwardBackwardRequest"](
        model_id=request.model_id,
        seq_id=request.seq_id,
        loss_fn=request.loss_fn,
        forward_only=request.forward_only,
    )
    for name, value in (request.loss_fn_config or {}).items():
        if isinstance(value, str):
            message.loss_fn_config_v2[name].text = value
        else:  # in the old map for servers that do not know the new one
            message.loss_fn_config[name] = float(value)
            message.loss_fn_config_v2[name].number = float(value)
    body = _Body()
    body.parts.append(message.SerializeToString())
    for i, datum in enumerate(request.data):
        body.add(3, _datum(datum, i))
    return b"".join(body.parts)


class _Body:
    """A message being written: what is in it, and its length in bytes.

    protobuf itself copies an array three times until it is in a request; here it is copied once,
    when the parts are joined.
    """

    __slots__ = ("parts", "size")

    def __init__(self) -> None:
        self.parts: list[bytes | memoryview] = []
        self.size = 0

    def add(self, number: int, content: bytes | memoryview | _Body) -> None:
        """Field *number*, of bytes, a string in UTF-8 or a message."""
        size = content.size if isinstance(content, _Body) else len(content)
        head = _varint(number << 3 | 2) + _varint(size)
        self.parts.append(head)
        if isinstance(content, _Body):
            self.parts += content.parts
        else:
            self.parts.append(content)
        self.size += len(head) + size

    def add_number(self, number: int, value: int) -> None:
        """Field *number*, of an enum."""
        part = _varint(number << 3) + _varint(value)
        self.parts.append(part)
        self.size += len(part)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    if value < 0x80:
        return bytes((value,))
    groups = bytearray()
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _in_place(array: np.ndarray, layout: str) -> memoryview:
    """The bytes of *array*, where they are if they lie as they should."""
    return np.ascontiguousarray(array, layout).reshape(-1).view(np.uint8).data


def _datum(datum: types.Datum, index: int) -> _Body:
    body = _Body()
    for chunk in datum.model_input.chunks:
        body.add(1, _chunk(chunk, index))
    for name, tensor in datum.loss_fn_inputs.items():
        entry = _Body()
        entry.add(1, name.encode())
        entry.add(2, _tensor(tensor))
        body.add(2, entry)
    return body


def _chunk(chunk: Any, index: int) -> _Body | bytes:
    if isinstance(chunk, types.EncodedTextChunk):
        text, body = _Body(), _Body()
        text.add(1, _in_place(chunk.tokens, "<i4"))
        body.add(1, text)
        return body
    if isinstance(chunk, types.ImageChunk):
        message = CLASSES["Chunk"]()
        message.image.data, message.image.format = chunk.data, chunk.format
        if chunk.expected_tokens is not None:
            message.image.expected_tokens = chunk.expected_tokens
        written: bytes = message.SerializeToString()
        return written
    raise ValueError(
        f"data[{index}] holds an ImageAssetPointerChunk, which protobuf requests have no "
        "room for; give the image itself as an ImageChunk."
    )


def _tensor(tensor: types.TensorData) -> _Body:
    dtype = _DTYPES[tensor.dtype]
    values = _in_place(tensor.data, _LAYOUTS[dtype])
    body = _Body()
    if tensor.sparse_crow_indices is not None and tensor.sparse_col_indices is not None:
        sparse = _Body()
        sparse.add(1, values)
        sparse.add(2, _in_place(tensor.sparse_crow_indices, "<i8"))
        sparse.add(3, _in_place(tensor.sparse_col_indices, "<i8"))
        body.add(2, sparse)
    else:
        body.add(1, values)
    body.add_number(3, dtype)
    body.add(4, b"".join(map(_varint, tensor.shape)))
    return body


def decode_request(body: bytes) -> types.ForwardBackwardRequest:
    """The inverse of `encode_request`; arrays are read-only views where nothing is converted.

    Raises:
        DecodeError: If *body* is no such message, or what it says does not fit together.
    """
    message = _parse("ForwardBackwardRequest", body)
    try:
        return types.ForwardBackwardRequest(
            model_id=message.model_id,
            seq_id=message.seq_id,
            data=[_at(f"data[{i}]", _read_datum, datum) for i, datum in enumerate(message.data)],
            loss_fn=message.loss_fn,
            loss_fn_config=_read_config(message),
            forward_only=message.forward_only,
        )
    except Wrong as wrong:
        raise wrong.about("ForwardBackwardRequest") from wrong.__cause__


def place_of(body: bytes) -> tuple[str, int, bool]:
    """(model_id, seq_id, forward_only) of a request whose data may be wrong. Raises DecodeError."""
    message = _parse("ForwardBackwardRequest", body)
    return message.model_id, message.seq_id, message.forward_only


def _read_config(message: Any) -> dict[str, float | str] | None:
    newer = {
        name: value.text if value.WhichOneof("value") == "text" else value.number
        for name, value in message.loss_fn_config_v2.items()
    }
    return newer or dict(message.loss_fn_config) or None


def _read_datum(message: Any) -> types.Datum:
    chunks = [
        _at(f"model_input[{i}]", _read_chunk, chunk) for i, chunk in enumerate(message.model_input)
    ]
    inputs = {
        name: _at(f"loss_fn_inputs[{name!r}]", _read_tensor, tensor)
        for name, tensor in message.loss_fn_inputs.items()
    }
    return types.Datum(types.ModelInput(chunks), inputs)


def _read_chunk(message: Any) -> types.Chunk:
    kind = message.WhichOneof("chunk")
    if kind == "encoded_text":
        return make(types.EncodedTextChunk, {"tokens": _tokens(message.encoded_text.tokens)})
    if kind == "image":
        image = message.image
        length = image.expected_tokens if image.HasField("expected_tokens") else None
        values = {"data": image.data, "format": image.format, "expected_tokens": length}
        return make(types.ImageChunk, values)
    what = "an audio chunk" if kind == "dmel" else "a chunk of a kind that is not known here"
    raise Wrong(f"is {what}, but must be encoded_text or image.")


def _read_tensor(message: Any) -> types.TensorData:
    shape = list(message.shape) or None
    if message.WhichOneof("encoding") != "sparse_csr":
        return make_tensor(_from_bytes(message.dense, message.dtype), shape)
    sparse = message.sparse_csr
    return make_tensor(
        _at("values", _from_bytes, sparse.values, message.dtype),
        shape,
        _at("crow_indices", _from_bytes, sparse.crow_indices, _INT64),
        _at("col_indices", _from_bytes, sparse.col_indices, _INT64),
    )


# --- results ------------------------------------------------------------------------------------


def encode_result(result: types.ForwardBackwardOutput | types.SampleResponse) -> bytes:
    """The bytes of a result; sparse loss outputs are made dense, as the messages ask."""
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
    """The inverse of `encode_result`, for the class that is expected.

    Raises:
        DecodeError: If *body* is no such message, or what it says does not fit together.
    """
    message = _parse(cls.__name__, body)
    try:
        return _READERS[cls](message)
    except Wrong as wrong:
        raise wrong.about(cls.__name__) from wrong.__cause__


def _kind(output: Output) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """What the datums of one record must agree in."""
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
        field.dtype = _DTYPES[outputs[0][name].dtype]
        layout = np.dtype(_LAYOUTS[field.dtype])
        sizes = np.cumsum([0] + [a.size for a in arrays]) * layout.itemsize
        field.data = _to_bytes(np.concatenate([a.reshape(-1) for a in arrays]), layout.str)
        field.offsets = _to_bytes(sizes, "<i8")
        field.trailing_shape.extend(arrays[0].shape[1:])


def _read_output(message: Any) -> types.ForwardBackwardOutput:
    outputs = [
        output
        for i, record in enumerate(message.loss_fn_outputs)
        for output in _at(f"loss_fn_outputs[{i}]", _read_record, record)
    ]
    kind = message.loss_fn_output_type.rsplit(":", 1)[-1]
    return types.ForwardBackwardOutput(outputs, dict(message.metrics), kind or "ArrayRecord")


def _read_record(message: Any) -> list[Output]:
    """The outputs of each datum: the fields of a record, cut at their offsets."""
    count = message.num_datums
    columns = {
        name: list(_at(f"fields[{name!r}]", _cut, field)) for name, field in message.fields.items()
    }
    if count == 0 and columns:  # the count may be left to the fields
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
    data = _from_bytes(message.data, message.dtype)
    if not data.flags.writeable:  # the user's to change, as results in JSON are
        data = data.copy()
    width = np.dtype(_LAYOUTS[message.dtype]).itemsize
    trailing = list(message.trailing_shape)
    row = math.prod(trailing)
    offsets = _at("offsets", _from_bytes, message.offsets, _INT64)
    if row < 1 or min(trailing, default=1) < 1:
        raise Wrong(f"is {short(trailing)}, but must hold positive sizes.", "trailing_shape")
    low, high = offsets.min(initial=0), offsets.max(initial=0)
    if low < 0 or high > len(message.data):
        there = len(message.data)
        raise Wrong(f"run from {low} to {high}, but there are {there} bytes.", "offsets")
    if offsets.size == 0 or (np.diff(offsets) < 0).any() or (offsets % (width * row)).any():
        raise Wrong(f"do not cut the data into rows of {width * row} bytes.", "offsets")
    cuts = (offsets // width).tolist()
    return (
        types.TensorData(data[start:end].reshape(-1, *trailing))
        for start, end in itertools.pairwise(cuts)
    )


def _sample_message(result: types.SampleResponse) -> Any:
    message = CLASSES["SampleResponse"](prompt_cache_hit_tokens=result.prompt_cache_hit_tokens)
    for sequence in result.sequences:
        added = message.sequences.add(stop_reason=_STOP_REASONS.index(sequence.stop_reason))
        added.tokens = _to_bytes(sequence.tokens_np, "<i4")
        if sequence.logprobs_np is not None:
            added.logprobs = _to_bytes(sequence.logprobs_np, "<f4")
        if sequence.topk_logprobs_np is not None:
            _write_topk(added.topk_sampled_logprobs, sequence.topk_logprobs_np)
    if result.prompt_logprobs_np is not None:
        message.prompt_logprobs = _to_bytes(result.prompt_logprobs_np, "<f4")
    if result.topk_prompt_logprobs_np is not None:
        _write_topk(message.topk_prompt_logprobs, result.topk_prompt_logprobs_np)
    if result.target_prompt_logprobs is not None:
        tensor = _tensor(result.target_prompt_logprobs)
        message.target_prompt_logprobs.MergeFromString(b"".join(tensor.parts))
    return message


def _write_topk(message: Any, topk: types.TopkLogprobs) -> None:
    message.length, message.k = topk.token_ids.shape
    message.token_ids = _to_bytes(topk.token_ids, "<i4")
    message.logprobs = _to_bytes(topk.logprobs, "<f4")


def _read_sample(message: Any) -> types.SampleResponse:
    return types.SampleResponse(
        sequences=[
            _at(f"sequences[{i}]", _read_sequence, sequence)
            for i, sequence in enumerate(message.sequences)
        ],
        prompt_logprobs=_at("prompt_logprobs", _own_floats, message.prompt_logprobs),
        topk_prompt_logprobs=_at("topk_prompt_logprobs", _read_topk, message.topk_prompt_logprobs),
        target_prompt_logprobs=(
            _at("target_prompt_logprobs", _read_tensor, message.target_prompt_logprobs)
            if message.HasField("target_prompt_logprobs")
            else None
        ),
        prompt_cache_hit_tokens=message.prompt_cache_hit_tokens,
    )


def _read_sequence(message: Any) -> types.SampledSequence:
    if message.stop_reason >= len(_STOP_REASONS):
        raise Wrong(f"is {message.stop_reason}, but must be 0 (stop) or 1 (length).", "stop_reason")
    tokens = _at("tokens", _tokens, message.tokens)
    logprobs = _at("logprobs", _own_floats, message.logprobs)
    if logprobs is not None and logprobs.size != tokens.size:
        raise Wrong(f"are {logprobs.size}, but there are {tokens.size} tokens.", "logprobs")
    values = {
        "tokens": tokens,
        "logprobs": logprobs,
        "stop_reason": _STOP_REASONS[message.stop_reason],
        "topk_logprobs": _at("topk_sampled_logprobs", _read_topk, message.topk_sampled_logprobs),
    }
    sequence: types.SampledSequence = make(types.SampledSequence, values)
    return sequence


def _own_floats(data: bytes) -> np.ndarray | None:
    """Float32 numbers in an array of their own; absent and empty alike are None."""
    return _floats(data).copy() if data else None


def _read_topk(message: Any) -> types.TopkLogprobs | None:
    """None if there are no cells; absent cells stay what they are."""
    shape = (message.length, message.k)
    if 0 in shape:
        return None
    tokens, logprobs = _tokens(message.token_ids), _floats(message.logprobs)
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


# --- compression --------------------------------------------------------------------------------


def zstd(body: bytes) -> bytes | None:
    """*body* compressed, or None where no zstandard package is installed."""
    try:
        import zstandard
    except ImportError:
        return None
    return zstandard.ZstdCompressor().compress(body)
