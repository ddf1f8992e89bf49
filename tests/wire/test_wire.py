"""Both dialects carry the same requests and results."""

from __future__ import annotations

import subprocess
import sys
import time

import attrs
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tinkex import types, wire

TOKENS = arrays.arrays(np.int32, st.integers(0, 20), elements=st.integers(0, 2**31 - 1))
NAMES = st.sampled_from(["target_tokens", "weights", "advantages", "logprobs", "anything else"])
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
FLOATS = arrays.arrays(np.float32, arrays.array_shapes(max_dims=2, min_side=0), elements=FINITE)
INTS = arrays.arrays(np.int64, arrays.array_shapes(max_dims=2, min_side=0))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def sparse_tensors(draw):
    dense = draw(
        arrays.arrays(np.int64, st.tuples(st.integers(1, 6), st.integers(1, 30)), fill=st.just(0))
    )
    return types.TensorData.from_dense(dense)


CHUNKS = st.one_of(
    TOKENS.map(types.EncodedTextChunk),
    st.builds(
        types.ImageChunk,
        st.binary(max_size=20),
        st.sampled_from(["png", "jpeg"]),
        st.none() | st.integers(0, 5000),
    ),
)
TENSORS = st.one_of(FLOATS.map(types.TensorData), INTS.map(types.TensorData), sparse_tensors())
DATUMS = st.builds(
    types.Datum,
    st.lists(CHUNKS, max_size=3).map(types.ModelInput),
    st.dictionaries(NAMES, TENSORS, max_size=3),
)
REQUESTS = st.builds(
    types.ForwardBackwardRequest,
    model_id=TEXTS,
    seq_id=st.integers(0, 2**31 - 1),
    data=st.lists(DATUMS, max_size=3),
    loss_fn=TEXTS,
    loss_fn_config=st.none() | st.dictionaries(TEXTS, NUMBERS | TEXTS, min_size=1, max_size=3),
    forward_only=st.booleans(),
)


@given(REQUESTS, st.booleans())
def test_a_batch_is_unchanged_by_either_dialect(request_, protobuf):
    """The server trains on exactly what the caller passed."""
    _, content_type, _, body = wire.encode_request(request_, protobuf)

    actual = wire.decode_request(content_type, body)

    assert request_ == actual


@given(REQUESTS)
def test_the_same_batch_has_the_same_bytes(request_):
    """A resend must carry the same bytes, or the server takes it for another request."""
    again = attrs.evolve(request_)

    assert wire.encode_request(request_, True) == wire.encode_request(again, True)
    assert wire.encode_request(request_, False) == wire.encode_request(again, False)


@st.composite
def outputs(draw):
    names = draw(st.lists(NAMES, unique=True, max_size=2))
    rows = draw(st.integers(0, 4))
    return [
        {name: types.TensorData(draw(FLOATS.filter(lambda a: a.size > 0))) for name in names}
        for _ in range(rows)
    ]


@given(st.lists(outputs(), max_size=3), st.dictionaries(TEXTS, NUMBERS, max_size=3))
def test_outputs_of_any_shape_are_unchanged_by_protobuf(groups, metrics):
    """Ragged outputs, fields that differ between datums, (T,) and (T, K): records are built from
    any of them."""
    result = types.ForwardBackwardOutput([o for group in groups for o in group], metrics, "X")

    actual = wire.decode_result(types.ForwardBackwardOutput, wire.encode_result(result))

    assert result == actual


def same_sample(a: types.SampleResponse, b: types.SampleResponse) -> None:
    assert len(a.sequences) == len(b.sequences)
    for one, other in zip(a.sequences, b.sequences):
        assert one.tokens == other.tokens
        assert one.logprobs == other.logprobs
        assert one.stop_reason == other.stop_reason
        assert one.topk_logprobs == other.topk_logprobs
    assert a.prompt_logprobs == b.prompt_logprobs
    assert a.topk_prompt_logprobs == b.topk_prompt_logprobs
    assert a.target_prompt_logprobs == b.target_prompt_logprobs
    assert a.prompt_cache_hit_tokens == b.prompt_cache_hit_tokens


CELLS = st.tuples(st.integers(0, 2**31 - 1), st.floats(-100, 0, width=32))
TOPK = st.lists(st.none() | st.lists(CELLS, min_size=1, max_size=3), min_size=1, max_size=4).filter(
    any
)


@st.composite
def sequences(draw):
    tokens = draw(TOKENS.filter(len))
    logprobs = draw(arrays.arrays(np.float32, len(tokens), elements=st.floats(-50, 0, width=32)))
    return types.SampledSequence(
        tokens=tokens,
        logprobs=draw(st.sampled_from([None, logprobs])),
        stop_reason=draw(st.sampled_from(["stop", "length"])),
        topk_logprobs=draw(st.none() | TOPK.map(types.TopkLogprobs.from_list)),
    )


SAMPLES = st.builds(
    types.SampleResponse,
    sequences=st.lists(sequences(), max_size=3),
    prompt_logprobs=st.none()
    | st.lists(st.none() | st.floats(-50, 0, width=32), min_size=1, max_size=5),
    topk_prompt_logprobs=st.none() | TOPK.map(types.TopkLogprobs.from_list),
    target_prompt_logprobs=st.none() | FLOATS.map(types.TensorData),
    prompt_cache_hit_tokens=st.integers(0, 100),
)


@given(SAMPLES)
def test_a_sample_is_unchanged_by_either_dialect(sample):
    """Also absent fields: no log-probabilities differ from an empty list of them."""
    through_proto = wire.decode_result(types.SampleResponse, wire.encode_result(sample))
    through_json = wire.from_json(
        types.SampleResponse, wire.loads(wire.dumps(wire.to_json(sample, "sample")))
    )

    same_sample(sample, through_proto)
    same_sample(sample, through_json)


REQUEST = types.ForwardBackwardRequest(
    "m", 3, [types.Datum(types.ModelInput.from_ints([1, 2]), {"weights": [1.0, 0.0]})], "ppo"
)


@pytest.mark.parametrize(
    ("protobuf", "forward_only", "path", "content_type"),
    [
        (False, False, "forward_backward", "application/json"),
        (False, True, "forward", "application/json"),
        (True, False, "forward_backward", "application/x-protobuf"),
        (True, True, "forward_backward", "application/x-protobuf"),
    ],
)
def test_each_dialect_has_its_endpoint_for_a_batch(protobuf, forward_only, path, content_type):
    """`forward` exists in JSON only; a protobuf request says forward_only instead."""
    request = attrs.evolve(REQUEST, forward_only=forward_only)

    actual_path, actual_type, encoding, body = wire.encode_request(request, protobuf)

    assert (path, content_type, None) == (actual_path, actual_type, encoding)
    assert forward_only == wire.decode_request(content_type, body).forward_only


def test_only_protobuf_is_compressed():
    """Servers announce zstd for protobuf requests; none announces it for JSON."""
    *_, encoding, body = wire.encode_request(REQUEST, protobuf=True, compress=True)
    *_, json_encoding, json_body = wire.encode_request(REQUEST, protobuf=False, compress=True)

    assert "zstd" == encoding
    assert wire.encode_request(REQUEST, True)[3] == zstandard.ZstdDecompressor().decompress(body)
    assert json_encoding is None
    assert wire.encode_request(REQUEST, False)[3] == json_body


def test_without_zstandard_nothing_is_compressed(monkeypatch):
    """The package is an extra; a client without it still trains."""
    monkeypatch.setitem(sys.modules, "zstandard", None)

    *_, encoding, body = wire.encode_request(REQUEST, protobuf=True, compress=True)

    assert encoding is None
    assert REQUEST == wire.decode_request(wire.PROTOBUF, body)


def test_the_content_type_decides_how_a_body_is_read():
    body = wire.encode_request(REQUEST, False)[3]

    assert REQUEST == wire.decode_request("Application/JSON; charset=utf-8", body)
    with pytest.raises(wire.DecodeError, match=r"'text/plain' cannot be read; send application/js"):
        wire.decode_request("text/plain", body)


def test_json_needs_no_protobuf():
    """`import tinkex` and JSON must not load a library that they do not use."""
    script = (
        "import sys; from tinkex import wire, types;"
        "wire.dumps(wire.to_json(types.OptimStepRequest('m', 1)));"
        "print([m for m in sys.modules if m.startswith('google')])"
    )

    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert "[]" == out.stdout.strip()


def best_time(work, times: int) -> float:
    """Seconds of the fastest of several runs: the machine may be busy with something else."""
    spans = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        spans.append(time.perf_counter() - start)
    return min(spans)


def test_an_optimizer_step_costs_microseconds():
    """Measured 12 us; ten times that would slow down a training loop of small models."""
    request = types.OptimStepRequest("m", 1)

    def there_and_back():
        wire.from_json(types.OptimStepRequest, wire.loads(wire.dumps(wire.to_json(request))))

    assert best_time(there_and_back, 50) < 100e-6


def test_arrays_are_converted_without_a_python_loop():
    """A batch of 131,072 tokens: the json module itself takes most of the time."""
    rng = np.random.default_rng(0)
    data = [
        types.Datum(
            types.ModelInput.from_ints(rng.integers(0, 150_000, 1024)),
            {"target_tokens": rng.integers(0, 150_000, 1024)},
        )
        for _ in range(128)
    ]
    request = types.ForwardBackwardRequest("m", 1, data, "cross_entropy")
    plain = wire.to_json(request)
    body = wire.dumps(plain)

    ours = best_time(lambda: wire.to_json(request), 5)
    ours += best_time(lambda: wire.from_json(types.ForwardBackwardRequest, plain), 5)
    theirs = best_time(lambda: wire.dumps(plain), 5) + best_time(lambda: wire.loads(body), 5)

    assert ours < 1.5 * theirs
