"""Training data in protobuf: the layout of the bytes, and what happens with broken ones."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf import descriptor_pool

from tests.support.broken_bytes import broken_bodies
from tinkex import types, wire
from tinkex.wire import proto_requests as proto


def message(name, **values):
    return proto.CLASSES[name](**values)


def bytes_of(values, dtype):
    return np.asarray(values, dtype).tobytes()


def request(**changes) -> types.ForwardBackwardRequest:
    values = {
        "model_id": "s:train:0",
        "seq_id": 4,
        "data": [
            types.Datum(
                types.ModelInput.from_ints([19, 261, 273]),
                {"target_tokens": [261, 273, 2], "weights": [0.0, 1.0, 0.5]},
            )
        ],
        "loss_fn": "ppo",
        **changes,
    }
    return types.ForwardBackwardRequest(**values)


def parsed(a_request):
    return proto.CLASSES["ForwardBackwardRequest"].FromString(proto.encode_request(a_request))


def test_arrays_are_little_endian_in_the_request():
    """Tokens int32, targets int64, weights float32, each with its shape."""
    [datum] = parsed(request()).data

    assert bytes_of([19, 261, 273], "<i4") == datum.model_input[0].encoded_text.tokens
    targets = datum.loss_fn_inputs["target_tokens"]
    assert (bytes_of([261, 273, 2], "<i8"), 2, [3]) == (
        targets.dense,
        targets.dtype,
        list(targets.shape),
    )
    weights = datum.loss_fn_inputs["weights"]
    assert (bytes_of([0, 1, 0.5], "<f4"), 1, [3]) == (
        weights.dense,
        weights.dtype,
        list(weights.shape),
    )


@pytest.mark.parametrize("length", [1, 15, 16, 127, 128, 1023, 1025, 2047, 2049, 40_000])
def test_arrays_of_any_length_arrive_short_ones_as_copies_and_long_ones_as_views(length):
    tokens, weights = np.arange(length) % 50_000, np.linspace(-1, 1, length, dtype=np.float32)
    inputs = {
        "target_tokens": types.TensorData.from_numpy(tokens[::-1]),
        "weights": types.TensorData.from_numpy(weights),
    }
    datum = types.Datum(types.ModelInput.from_ints(tokens), inputs)
    read = parsed(request(data=[datum, datum])).data

    for one in read:
        assert bytes_of(tokens, "<i4") == one.model_input[0].encoded_text.tokens
        assert bytes_of(tokens[::-1], "<i8") == one.loss_fn_inputs["target_tokens"].dense
        assert bytes_of(weights, "<f4") == one.loss_fn_inputs["weights"].dense
        assert [length] == one.loss_fn_inputs["weights"].shape
    assert 2 == len(read)


def test_numbers_go_into_both_maps_and_texts_into_the_newer():
    """Servers before 0.27 read map 5, which cannot hold text."""
    sent = parsed(request(loss_fn_config={"low": 0.5, "mode": "a"}))

    assert {"low": 0.5} == dict(sent.loss_fn_config)
    assert 0.5 == sent.loss_fn_config_v2["low"].number
    assert "a" == sent.loss_fn_config_v2["mode"].text


def test_the_newer_map_wins_and_the_older_is_enough():
    old = message("ForwardBackwardRequest", loss_fn_config={"low": 0.5})
    new = message("ForwardBackwardRequest", loss_fn_config={"low": 0.5})
    new.loss_fn_config_v2["low"].number = 0.7

    assert {"low": 0.5} == proto.decode_request(old.SerializeToString()).loss_fn_config
    assert {"low": 0.7} == proto.decode_request(new.SerializeToString()).loss_fn_config
    assert proto.decode_request(b"").loss_fn_config is None


def test_fields_of_newer_sdks_are_skipped():
    """Field 126 of a Datum, which no version has."""
    datum = proto.CLASSES["Datum"].FromString(parsed(request()).data[0].SerializeToString())
    datum.MergeFromString(bytes.fromhex("f2070161"))
    sent = parsed(request())
    sent.data[0].CopyFrom(datum)

    assert request() == proto.decode_request(sent.SerializeToString())


def test_provenance_spans_are_messages_of_their_kind():
    """Bytes as the official SDK 0.38.0 writes them: field 3 of a Datum, then field 4."""
    [datum] = request().data
    with_spans = datum.with_provenance(
        model_input=[
            types.PromptProvenanceSpan(sequence_id="AB", length=2),
            types.SampledProvenanceSpan(sequence_id="AB", length=1),
        ],
        loss_fn_inputs=[
            types.PromptProvenanceSpan(sequence_id="AB", offset=1, length=1),
            types.SampledProvenanceSpan(sequence_id="AB", length=2),
        ],
    )
    body = proto.encode_request(request(data=[with_spans]))

    assert bytes.fromhex("1a080a060a0241421802") + bytes.fromhex("1a0812060a0241421801") in body
    assert bytes.fromhex("220a0a080a02414210011801" + "220812060a0241421802") in body
    assert [with_spans] == proto.decode_request(body).data


@pytest.mark.parametrize(
    "extra, match",
    [
        ("1a060a040a024142", "data.0. is invalid: spans come in pairs"),
        ("1a00" + "22080a060a0241421801", r"model_input_spans\[0\] is of an unknown kind"),
        ("1a040a021801" + "22080a060a0241421801", r"model_input_spans\[0\].*sequence_id must"),
    ],
)
def test_spans_that_cannot_be_are_refused_with_their_place(extra, match):
    sent = parsed(request())
    sent.data[0].MergeFromString(bytes.fromhex(extra))

    with pytest.raises(wire.DecodeError, match=match):
        proto.decode_request(sent.SerializeToString())


def test_decoded_arrays_are_views_where_nothing_is_converted():
    """A batch of megabytes is not copied."""
    decoded = proto.decode_request(proto.encode_request(request()))

    assert not decoded.data[0].loss_fn_inputs["weights"].values.flags.owndata


def test_integers_that_do_not_fit_are_refused_when_sending():
    with pytest.raises(ValueError, match="2147483648"):
        proto.encode_request(request(seq_id=2**31))


def test_the_default_pool_is_not_used():
    """The official SDK registers the same file there, in the same process."""
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindFileByName("tinker_public.proto")


# --- errors -------------------------------------------------------------------------------------


def datum(**values) -> bytes:
    return message("ForwardBackwardRequest", data=[message("Datum", **values)]).SerializeToString()


def tensor(**values) -> bytes:
    return datum(loss_fn_inputs={"w": message("Tensor", **values)})


def chunk(**values) -> bytes:
    return datum(model_input=[message("Chunk", **values)])


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (chunk(), r"data\[0\].model_input\[0\] is a chunk of an unknown kind"),
        (chunk(dmel=message("DmelChunk", dmel=b"1")), "is an audio chunk"),
        (chunk(encoded_text=message("EncodedTextChunk", tokens=b"12345")), "holds 5 bytes"),
        (chunk(encoded_text=message("EncodedTextChunk", tokens=b"\xff" * 4)), "token id -1"),
        (chunk(image=message("ImageChunk", data=b"", format="gif")), "image format must be"),
        (tensor(dense=b"1234"), r"loss_fn_inputs\['w'\].dtype is DType 0"),
        (tensor(dense=b"12345", dtype=1), "holds 5 bytes"),
        (tensor(dense=b"12345678", dtype=1, shape=[3]), "2 values do not fill shape"),
        (tensor(dense=b"12345678", dtype=1, shape=[-1, -2]), "do not fill shape"),
        (tensor(dense=b"", dtype=1, shape=[2**62, 2**62]), "more than 268435456 numbers"),
        (tensor(sparse_csr=message("SparseCsr"), dtype=1), "a sparse tensor needs"),
        (tensor(sparse_csr=message("SparseCsr", crow_indices=b"123"), dtype=1),
         r"crow_indices holds 3 bytes, which is not a multiple of 8"),
        (tensor(sparse_csr=message("SparseCsr", crow_indices=bytes_of([0, 1], "<i8")), dtype=1,
                shape=[1, 4]), "do not describe 0 values"),
    ],
)  # fmt: skip
def test_an_inconsistent_request_is_refused(body, sentence):
    with pytest.raises(wire.DecodeError, match=sentence):
        proto.decode_request(body)


def test_no_bytes_crash_the_reader():
    """Truncated, altered or random: a result or a DecodeError, nothing else."""
    refused = 0
    for body in broken_bodies(proto.encode_request(request())):
        for read in (proto.decode_request,):
            try:
                read(body)
            except wire.DecodeError as exc:
                refused += 1
                assert str(exc).endswith(".")

    assert refused > 300
