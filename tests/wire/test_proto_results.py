"""Results in protobuf: the bytes of the official SDK, and what happens with broken ones."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.broken_bytes import broken_bodies
from tinkex import types, wire
from tinkex.wire.proto_results import CLASSES

OUTPUT = bytes.fromhex(
    "0a1643726f7373456e74726f70794c6f737352657475726e1242123e0a086c6f6770726f627312320a14000080bf"
    "000000c0000040c0000080c00000a0c0121800000000000000000c00000000000000140000000000000018011802"
    "1a130a086c6f73733a73756d110000000000002e40"
)
SAMPLE = bytes.fromhex(
    "0a160801120807000000080000001a08000000bf000080be120c0000c07f000080bf000000c01a380a1800000000"
    "00000000050000000600000005000000000000001218804fc3c7804fc3c7000080bf000000c0000080bf804fc3c7"
    "18022003"
)


def message(name, **values):
    return CLASSES[name](**values)


def bytes_of(values, dtype):
    return np.asarray(values, dtype).tobytes()


# --- golden vectors -----------------------------------------------------------------------------


def test_the_golden_output_is_read_and_written():
    """Bytes that the official SDK decodes to the same values."""
    expected = types.ForwardBackwardOutput(
        [
            {"logprobs": types.TensorData([-1.0, -2.0, -3.0])},
            {"logprobs": types.TensorData([-4.0, -5.0])},
        ],
        {"loss:sum": 15.0},
        "CrossEntropyLossReturn",
    )

    assert expected == wire.decode_result(types.ForwardBackwardOutput, OUTPUT)
    assert OUTPUT == wire.encode_result(expected)


def test_the_golden_sample_is_read_and_written():
    """NaN means no log-probability, -99999 an empty top-k cell."""
    sample = wire.decode_result(types.SampleResponse, SAMPLE)

    [sequence] = sample.sequences
    assert ([7, 8], [-0.5, -0.25], "length") == (
        sequence.tokens,
        sequence.logprobs,
        sequence.stop_reason,
    )
    assert [None, -1.0, -2.0] == sample.prompt_logprobs
    assert [None, [(5, -1.0), (6, -2.0)], [(5, -1.0)]] == sample.topk_prompt_logprobs
    assert SAMPLE == wire.encode_result(sample)


# --- results ------------------------------------------------------------------------------------


def batched(data, offsets, dtype=1, trailing=()):
    return message(
        "BatchedTensor",
        data=data,
        offsets=bytes_of(offsets, "<i8"),
        dtype=dtype,
        trailing_shape=trailing,
    )


def output_of(count=0, **fields) -> bytes:
    record = message("ArrayRecord", num_datums=count)
    for name, field in fields.items():
        record.fields[name].CopyFrom(field)
    return message("ForwardBackwardOutput", loss_fn_outputs=[record]).SerializeToString()


def decoded(body):
    return wire.decode_result(types.ForwardBackwardOutput, body)


def test_bfloat16_and_int32_are_widened():
    """Servers may send smaller types; tinkex has float32 and int64 only."""
    halves = batched(bytes_of([0x3F80, 0xC040], "<u2"), [0, 4], dtype=4)
    ints = batched(bytes_of([-3, 7], "<i4"), [0, 8], dtype=3)

    [output] = decoded(output_of(1, a=halves, b=ints)).loss_fn_outputs

    assert types.TensorData([1.0, -3.0]) == output["a"]
    assert types.TensorData([-3, 7]) == output["b"]


def test_rows_wider_than_one_number_keep_their_width():
    field = batched(bytes_of(np.arange(8), "<f4"), [0, 8, 32], trailing=[2])

    outputs = decoded(output_of(2, a=field)).loss_fn_outputs

    assert [[0.0, 1.0]] == outputs[0]["a"].tolist()
    assert [[2.0, 3.0], [4.0, 5.0], [6.0, 7.0]] == outputs[1]["a"].tolist()


def test_the_count_of_datums_may_be_omitted():
    field = batched(bytes_of([1, 2], "<f4"), [0, 4, 8])

    assert [[1.0], [2.0]] == [
        o["a"].tolist() for o in decoded(output_of(0, a=field)).loss_fn_outputs
    ]


def test_datums_without_outputs_still_count():
    assert [{}, {}, {}] == decoded(output_of(3)).loss_fn_outputs


def test_records_are_joined_in_order_and_may_differ():
    result = types.ForwardBackwardOutput(
        [
            {"a": types.TensorData([[1.0, 2.0]])},
            {"a": types.TensorData([[1.0, 2.0, 3.0]])},
            {"a": types.TensorData([4])},
            {"b": types.TensorData([5.0])},
        ]
    )

    body = wire.encode_result(result)

    assert 4 == len(CLASSES["ForwardBackwardOutput"].FromString(body).loss_fn_outputs)
    assert result == decoded(body)


def test_the_output_type_is_what_follows_the_last_colon():
    body = message("ForwardBackwardOutput", loss_fn_output_type="a.b:c:Return").SerializeToString()

    assert "Return" == decoded(body).loss_fn_output_type
    assert "ArrayRecord" == decoded(b"").loss_fn_output_type


def test_results_are_writeable():
    """Like those from JSON: a script must not depend on the dialect."""
    [output, _] = decoded(OUTPUT).loss_fn_outputs
    sample = wire.decode_result(types.SampleResponse, SAMPLE)

    output["logprobs"].to_numpy()[0] = 5.0
    sample.prompt_logprobs_np[0] = 0.0
    sample.sequences[0].logprobs_np[0] = 0.0
    sample.topk_prompt_logprobs_np.logprobs[0, 0] = 0.0

    assert [5.0, -2.0, -3.0] == output["logprobs"].tolist()


def test_an_output_with_empty_rows_cannot_be_sent():
    """The format counts rows by their bytes."""
    result = types.ForwardBackwardOutput([{"a": types.TensorData(np.zeros((5, 0), np.float32))}])

    with pytest.raises(ValueError, match=r"loss output 'a' has shape \[5, 0\]"):
        wire.encode_result(result)


def test_sparse_outputs_are_made_dense():
    sparse = types.TensorData.from_dense(np.eye(10, dtype=np.float32))
    assert sparse.is_sparse

    [output] = decoded(wire.encode_result(types.ForwardBackwardOutput([{"a": sparse}])))\
        .loss_fn_outputs  # fmt: skip

    assert np.eye(10).tolist() == output["a"].tolist()


# --- errors -------------------------------------------------------------------------------------


def sequence(**values):
    return message(
        "SampleResponse", sequences=[message("SampledSequence", **values)]
    ).SerializeToString()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (output_of(1, a=batched(b"\0\0\0", [0, 3])), "holds 3 bytes, which is not a multiple of 4"),
        (output_of(1, a=batched(b"\0" * 8, [0, 8], dtype=0)), "dtype is DType 0, but must be one"),
        (output_of(1, a=batched(b"\0" * 8, [0, 8], dtype=9)), "dtype is DType 9, but must be one"),
        (output_of(1, a=batched(b"\0" * 8, [0, 12])), "offsets run from 0 to 12, but there are 8"),
        (output_of(1, a=batched(b"\0" * 8, [-4, 8])), "offsets run from -4 to 8"),
        (output_of(1, a=batched(b"\0" * 8, [2**63 - 4, -(2**63)])), "offsets run from -922337"),
        (output_of(2, a=batched(b"\0" * 8, [0, 8, 4])), "offsets do not divide the data"),
        (output_of(1, a=batched(b"\0" * 8, [0, 6])), "do not divide the data into rows of 4"),
        (output_of(1, a=batched(b"\0" * 8, [0, 4], trailing=[2])), "rows of 8 bytes"),
        (output_of(1, a=batched(b"\0" * 8, [])), "offsets do not divide"),
        (output_of(1, a=batched(b"", [0, 0], trailing=[0])), r"trailing_shape is \[0\]"),
        (output_of(1, a=batched(b"", [0, 0], trailing=[-1, -1])), r"trailing_shape is \[-1, -1\]"),
        (output_of(3, a=batched(b"\0" * 8, [0, 8])),
         r"loss_fn_outputs\[0\].fields\['a'\] has 1 datums, but the record has 3"),
        (output_of(2**60), "has 1152921504606846976 datums, but no fields"),
        (output_of(-1), "has -1 datums"),
    ],
)  # fmt: skip
def test_an_inconsistent_output_is_refused(body, sentence):
    """With a message; never an IndexError, never an array divided at the wrong place."""
    with pytest.raises(wire.DecodeError, match=sentence):
        decoded(body)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (sequence(stop_reason=7), r"sequences\[0\].stop_reason is 7, but must be 0"),
        (sequence(tokens=b"123"), r"sequences\[0\].tokens holds 3 bytes"),
        (sequence(tokens=bytes_of([-1], "<i4")), "token id -1"),
        (sequence(tokens=bytes_of([1], "<i4"), logprobs=bytes_of([1, 2], "<f4")),
         "logprobs are 2, but there are 1 tokens"),
        (message("SampleResponse", prompt_logprobs=b"12345").SerializeToString(),
         "SampleResponse.prompt_logprobs holds 5 bytes"),
        (message("SampleResponse", topk_prompt_logprobs=message(
            "TopkLogprobs", k=2, length=3, token_ids=b"1234", logprobs=b"1234"
        )).SerializeToString(), "holds 1 tokens and 1 log-probabilities, but says it is 3 x 2"),
        (message("SampleResponse", topk_prompt_logprobs=message(
            "TopkLogprobs", k=2**32 - 1, length=2**32 - 1
        )).SerializeToString(), "holds 0 tokens"),
    ],
)  # fmt: skip
def test_an_inconsistent_sample_is_refused(body, sentence):
    with pytest.raises(wire.DecodeError, match=sentence):
        wire.decode_result(types.SampleResponse, body)


def test_no_bytes_crash_the_reader():
    """Truncated, altered or random: a result or a DecodeError, nothing else."""
    refused = 0
    for body in broken_bodies(OUTPUT, SAMPLE):
        for read in (
            lambda b: wire.decode_result(types.ForwardBackwardOutput, b),
            lambda b: wire.decode_result(types.SampleResponse, b),
        ):
            try:
                read(body)
            except wire.DecodeError as exc:
                refused += 1
                assert str(exc).endswith(".")

    assert refused > 300


def test_an_error_shows_the_first_bytes():
    """So that a user can recognize the HTML page of a proxy."""
    with pytest.raises(
        wire.DecodeError,
        match=r"these 13 bytes are not a complete SampleResponse message .*3c68746d",
    ):
        wire.decode_result(types.SampleResponse, b"<html></html>")
