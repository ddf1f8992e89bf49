"""The protobuf form of training data: forward and forward_backward requests."""

from __future__ import annotations

from typing import Any

from tinkex import types
from tinkex.wire import proto_messages, proto_tensors
from tinkex.wire.problems import Wrong, make
from tinkex.wire.proto_tensors import (
    Body,
    at,
    bytes_of,
    read_tensor,
    read_tokens,
    write_tensor,
)

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
  3 repeated ProvenanceSpan     model_input_spans
  4 repeated ProvenanceSpan     loss_fn_input_spans
ProvenanceSpan
  1 Span                        prompt_tokens           oneof:span
  2 Span                        sampled_tokens          oneof:span
Span
  1 string                      sequence_id
  2 int64                       offset
  3 int64                       length
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
"""

#: The message classes by name.
CLASSES = proto_messages.build(MESSAGES + proto_tensors.MESSAGES)


def encode_request(request: types.ForwardBackwardRequest) -> bytes:
    """Write *request* as a message.

    Raises:
        ValueError: If it holds an image asset pointer, which the messages cannot carry.
    """
    message = CLASSES["ForwardBackwardRequest"](
        model_id=request.model_id,
        seq_id=request.seq_id,
        loss_fn=request.loss_fn,
        forward_only=request.forward_only,
    )
    for name, value in (request.loss_fn_config or {}).items():
        if isinstance(value, str):
            message.loss_fn_config_v2[name].text = value
        else:  # in both maps: older servers know the first one only
            message.loss_fn_config[name] = float(value)
            message.loss_fn_config_v2[name].number = float(value)
    body = Body()
    body.parts.append(message.SerializeToString())
    for i, datum in enumerate(request.data):
        body.add_message(3, _datum(datum, i))
    return b"".join(body.parts)


def _datum(datum: types.Datum, index: int) -> Body:
    body = Body()
    for chunk in datum.model_input.chunks:
        body.add_message(1, _chunk(chunk, index))
    for name, tensor in datum.loss_fn_inputs.items():
        entry = Body()
        entry.add(1, name.encode())
        entry.add_message(2, write_tensor(tensor))
        body.add_message(2, entry)
    for number, spans in ((3, datum.model_input_spans), (4, datum.loss_fn_input_spans)):
        for span in spans or ():
            body.add(number, _span(span))
    return body


def _span(span: types.ProvenanceSpan) -> bytes:
    message = CLASSES["ProvenanceSpan"]()
    is_prompt = isinstance(span, types.PromptProvenanceSpan)
    inner = message.prompt_tokens if is_prompt else message.sampled_tokens
    inner.sequence_id, inner.offset, inner.length = span.sequence_id, span.offset, span.length
    written: bytes = message.SerializeToString()
    return written


def _chunk(chunk: Any, index: int) -> Body:
    body = Body()
    if isinstance(chunk, types.EncodedTextChunk):
        text = Body()
        text.add(1, bytes_of(chunk.tokens_np, "<i4"))
        body.add_message(1, text)
        return body
    if isinstance(chunk, types.ImageChunk):
        message = CLASSES["Chunk"]()
        message.image.data, message.image.format = chunk.data, chunk.format
        if chunk.expected_tokens is not None:
            message.image.expected_tokens = chunk.expected_tokens
        body.add_fields(message.SerializeToString())
        return body
    raise ValueError(
        f"data[{index}] holds an ImageAssetPointerChunk, which protobuf requests cannot "
        "carry; give the image itself as an ImageChunk."
    )


def decode_request(body: bytes) -> types.ForwardBackwardRequest:
    """The inverse of `encode_request`; arrays are read-only views where nothing is converted.

    Raises:
        DecodeError: If *body* is not such a message, or its values are inconsistent.
    """
    message = proto_messages.parse(CLASSES["ForwardBackwardRequest"], body)
    try:
        return types.ForwardBackwardRequest(
            model_id=message.model_id,
            seq_id=message.seq_id,
            data=[at(f"data[{i}]", _read_datum, datum) for i, datum in enumerate(message.data)],
            loss_fn=message.loss_fn,
            loss_fn_config=_read_config(message),
            forward_only=message.forward_only,
        )
    except Wrong as wrong:
        raise wrong.about("ForwardBackwardRequest") from wrong.__cause__


def place_of(body: bytes) -> tuple[str, int, bool]:
    """(model_id, seq_id, forward_only) of a request whose data may be invalid.

    Raises:
        DecodeError: If *body* is not a complete message.
    """
    message = proto_messages.parse(CLASSES["ForwardBackwardRequest"], body)
    return message.model_id, message.seq_id, message.forward_only


def _read_config(message: Any) -> dict[str, float | str] | None:
    newer = {
        name: value.text if value.WhichOneof("value") == "text" else value.number
        for name, value in message.loss_fn_config_v2.items()
    }
    return newer or dict(message.loss_fn_config) or None


def _read_datum(message: Any) -> types.Datum:
    chunks = [
        at(f"model_input[{i}]", _read_chunk, chunk) for i, chunk in enumerate(message.model_input)
    ]
    inputs = {
        name: at(f"loss_fn_inputs[{name!r}]", read_tensor, tensor)
        for name, tensor in message.loss_fn_inputs.items()
    }
    values: dict[str, Any] = {"model_input": types.ModelInput(chunks), "loss_fn_inputs": inputs}
    for name in ("model_input_spans", "loss_fn_input_spans"):
        spans = getattr(message, name)
        if spans:
            values[name] = [at(f"{name}[{i}]", _read_span, span) for i, span in enumerate(spans)]
    return make(types.Datum, values)


def _read_span(message: Any) -> types.ProvenanceSpan:
    kind = message.WhichOneof("span")
    if kind is None:
        raise Wrong("is of an unknown kind, but must be prompt_tokens or sampled_tokens.")
    inner = getattr(message, kind)
    values = {"sequence_id": inner.sequence_id, "offset": inner.offset, "length": inner.length}
    if kind == "prompt_tokens":
        return make(types.PromptProvenanceSpan, values)
    return make(types.SampledProvenanceSpan, values)


def _read_chunk(message: Any) -> types.Chunk:
    kind = message.WhichOneof("chunk")
    if kind == "encoded_text":
        return make(types.EncodedTextChunk, {"tokens": read_tokens(message.encoded_text.tokens)})
    if kind == "image":
        image = message.image
        length = image.expected_tokens if image.HasField("expected_tokens") else None
        values = {"data": image.data, "format": image.format, "expected_tokens": length}
        return make(types.ImageChunk, values)
    what = "an audio chunk" if kind == "dmel" else "a chunk of an unknown kind"
    raise Wrong(f"is {what}, but must be encoded_text or image.")
