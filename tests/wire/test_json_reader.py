"""Reading JSON: every type round-trips, variants are accepted, errors name the place."""

from __future__ import annotations

import inspect
import math

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinkex import types, wire

# --- round trips --------------------------------------------------------------------------------

EXAMPLES = {
    "points": [{"step": 1.0, "loss": 2.5}],
    "step": 1,
    "text": "4.",
    "session_id": "s",
    "sampling_session_id": "s",
    "model_id": "m",
    "request_id": "r",
    "base_model": "tiny",
    "path": "tinker://m/weights/a",
    "tinker_path": "tinker://m/weights/a",
    "jwt": "j",
    "url": "http://x",
    "sdk_version": "1",
    "state": "finished",
    "sampler_id": "s",
    "training_run_id": "m",
    "checkpoint_id": "weights/a",
    "checkpoint_type": "training",
    "model_seq_id": 4,
    "sampling_session_seq_id": 5,
    "client_counter": 2,
    "seq_id": 6,
    "target": {"type": "sampling_session"},
    "prompt": types.ModelInput.from_ints([1, 2]),
    "model_input": types.ModelInput.from_ints([1, 2]),
    "loss_fn_inputs": {"weights": [1.0, 2.0]},
    "data": [types.Datum(types.ModelInput.from_ints([3]), {"weights": [1.0]})],
    "loss_fn": "ppo",
    "training_run_ids": ["m"],
    "source_path": "tinker://m/weights/a",
    "project_id": "p",
    "urls": {"a.safetensors": "http://x"},
    "learning_rate": 0.5,
    "chunks": (types.EncodedTextChunk([1]),),
}

#: Where a field of that name is of another type.
EXAMPLES_OF = {types.RunSample: {"prompt": "2 + 2?"}}

#: Sent only inside of other types, compared by arrays (test_wire), or never sent.
NOT_ALONE = {
    types.EncodedTextChunk,
    types.ImageChunk,
    types.ImageAssetPointerChunk,
    types.SampledSequence,
    types.SampleResponse,
    types.TopkLogprobs,
    types.LossFunction,
    types.AdamOptimizerConfig,
    types.DimuonOptimizerConfig,
    types.DimuonParams,
    types.PromptAltTokens,
    types.PromptProvenanceSpan,
    types.SampledProvenanceSpan,
    types.ParsedCheckpointTinkerPath,
}


def travelling_types() -> list[type]:
    return [
        cls
        for _, cls in sorted(vars(types).items())
        if inspect.isclass(cls) and attrs.has(cls) and cls not in NOT_ALONE
    ]


@pytest.mark.parametrize("cls", travelling_types())
def test_every_type_round_trips(cls):
    """New types are included automatically."""
    required = [a.name for a in attrs.fields(cls) if a.default is attrs.NOTHING]
    examples = {**EXAMPLES, **EXAMPLES_OF.get(cls, {})}
    expected = cls(**{name: examples[name] for name in required})

    actual = wire.from_json(cls, wire.loads(wire.dumps(wire.to_json(expected, "tag"))))

    assert expected == actual


@pytest.mark.parametrize(
    "endpoint", [v for v in vars(wire).values() if isinstance(v, wire.Endpoint)]
)
def test_every_type_of_the_table_can_be_read(endpoint):
    """Otherwise a user would be the first to find a type without a JSON form."""
    for cls in (endpoint.result, endpoint.request):
        if cls not in (None, wire.Nothing):
            with pytest.raises(wire.DecodeError, match=cls.__name__):
                wire.from_json(cls, "not an object")


# --- accepted variants --------------------------------------------------------------------------


def test_unknown_fields_are_ignored():
    """An old client must work with a newer server."""
    promise = wire.from_json(
        types.Promise, {"request_id": "1", "future_id": "1", "status": "pending"}
    )

    assert types.Promise("1") == promise


def test_null_means_the_default():
    """Old SDKs send prompt_logprobs: null, servers metrics: null."""
    assert types.OptimStepResponse({}) == wire.from_json(types.OptimStepResponse, {"metrics": None})
    assert types.ForwardBackwardOutput() == wire.from_json(types.ForwardBackwardOutput, {})
    sample = wire.from_json(
        types.SampleRequest,
        {"prompt": {"chunks": []}, "prompt_logprobs": None, "sampling_params": None},
    )
    assert types.SampleRequest(types.ModelInput.empty()) == sample


def test_whole_numbers_may_be_written_as_floats_and_floats_as_ints():
    """JSON writers differ in how they write 3.0."""
    adam = wire.from_json(types.AdamParams, {"learning_rate": 1})
    request = wire.from_json(types.OptimStepRequest, {"model_id": "m", "seq_id": 3.0})

    assert 1.0 == adam.learning_rate
    assert 3 == request.seq_id
    assert isinstance(request.seq_id, int)


def test_chunks_may_lack_a_type():
    assert types.ModelInput.from_ints([1, 2]) == wire.from_json(
        types.ModelInput, {"chunks": [{"tokens": [1, 2]}]}
    )


def test_a_tensor_without_shape_is_flat():
    """The Elixir SDK omits the shape in training requests."""
    tensor = wire.from_json(types.TensorData, {"data": [1, 2], "dtype": "float32", "shape": None})

    assert types.TensorData([1.0, 2.0]) == tensor


def test_models_may_be_bare_names():
    capabilities = wire.from_json(
        types.GetServerCapabilitiesResponse,
        {"supported_models": ["a", {"model_name": "b", "arch": "llama"}, None]},
    )

    assert ["a", "b"] == capabilities.model_names


def test_the_base_model_may_be_in_several_places():
    """SkyRL sends base_model next to model_data, or instead of model_name."""
    inside = {"model_id": "m", "model_data": {"base_model": "b", "lora_config": {"rank": 8}}}
    outside = {"model_id": "m", "base_model": "b", "is_lora": False}

    assert "b" == wire.from_json(types.GetInfoResponse, inside).base_model
    assert "b" == wire.from_json(types.GetInfoResponse, outside).base_model
    assert False is wire.from_json(types.GetInfoResponse, outside).is_lora


def test_a_training_run_may_have_an_id_field_and_booleans_as_text():
    run = wire.from_json(types.TrainingRun, {"id": "m", "is_lora": "false", "corrupted": "true"})

    assert types.TrainingRun("m", is_lora=False, corrupted=True) == run


def test_cursors_may_hold_numbers_as_text():
    assert types.Cursor(20, 10, 0) == wire.from_json(types.Cursor, {"offset": "20", "limit": 10})


def test_top_k_cells_may_be_pairs_or_objects():
    sample = wire.from_json(
        types.SampleResponse,
        {
            "sequences": [
                {"tokens": [1], "topk_logprobs": [[{"token_id": 5, "logprob": -1.0}]]},
            ],
            "topk_prompt_logprobs": [None, [[5, -1.0], [6, -2.0]], []],
        },
    )

    assert [None, [(5, -1.0), (6, -2.0)], None] == sample.topk_prompt_logprobs
    assert [[(5, -1.0)]] == sample.sequences[0].topk_logprobs


def test_metrics_that_are_not_numbers_are_skipped():
    """The gradients are already computed; a label must not lose the result."""
    output = wire.from_json(
        types.ForwardBackwardOutput,
        {
            "metrics": {
                "loss:sum": 2,
                "host": "a",
                "ok": True,
                "odd name": 0.5,
                "diverged": None,
                "count": 10**400,
            }
        },
    )

    assert {"loss:sum": 2.0, "ok": 1.0, "odd name": 0.5} == {
        name: value for name, value in output.metrics.items() if not math.isnan(value)
    }
    assert math.isnan(output.metrics["diverged"])


def test_recorded_answers_of_skyrl_are_read():
    sample = wire.from_json(
        types.SampleResponse,
        {
            "sequences": [{"stop_reason": "length", "tokens": [27, 2], "logprobs": [-5.9, -5.8]}],
            "prompt_logprobs": None,
            "topk_prompt_logprobs": None,
        },
    )
    model = wire.from_json(
        types.CreateModelResponse,
        {"model_id": "model_d11a67f2", "lora_config": {"rank": 8, "alpha": 32.0, "seed": 7}},
    )
    saved = wire.from_json(
        types.SaveWeightsForSamplerResponse,
        {"path": None, "type": "save_weights_for_sampler", "sampling_session_id": "sampling_4d"},
    )

    assert [27, 2] == sample.sequences[0].tokens
    assert types.CreateModelResponse("model_d11a67f2") == model
    assert types.SaveWeightsForSamplerResponse(None, "sampling_4d") == saved


# --- errors -------------------------------------------------------------------------------------

BATCH = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
    "loss_fn_inputs": {"weights": {"data": [1.0, 2.0], "dtype": "float32", "shape": [2]}},
}


def training_request(**changes):
    batch = {"data": [{**BATCH, **changes}], "loss_fn": "ppo"}
    return {"forward_backward_input": batch, "model_id": "m", "seq_id": 1}


def weights(**changes):
    tensor = {"data": [1.0, 2.0], "dtype": "float32", "shape": [2], **changes}
    return training_request(loss_fn_inputs={"weights": tensor})


def chunk(chunk):
    return training_request(model_input={"chunks": [chunk]})


def tokens(tokens):
    return chunk({"type": "encoded_text", "tokens": tokens})


IN_WEIGHTS = r"ForwardBackwardRequest.forward_backward_input.data\[0\].loss_fn_inputs.weights"
IN_CHUNK = r"forward_backward_input.data\[0\].model_input.chunks\[0\]"


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (None, "ForwardBackwardRequest is None, but must be an object"),
        ({}, "forward_backward_input is missing"),
        ({"forward_input": 3}, "forward_input is 3, but must be an object"),
        ({"forward_backward_input": {"loss_fn": "ppo"}}, "forward_backward_input.data is missing"),
        ({**training_request(), "seq_id": "1"}, "seq_id is '1', but must be a whole number"),
        ({**training_request(), "seq_id": 1.5}, "seq_id is 1.5, but must be a whole number"),
        ({**training_request(), "seq_id": True}, "seq_id is True, but must be a whole number"),
        ({**training_request(), "model_id": 3}, "model_id is 3, but must be a string"),
        ({**training_request(), "model_id": "\ud800"}, "must be Unicode text"),
        (training_request(model_input=[1, 2]), r"model_input is \[1, 2\], but must be an object"),
        (training_request(model_input={}), "model_input.chunks is missing"),
        (tokens([1, "2"]), rf"{IN_CHUNK}.tokens holds '2', but must be a flat list of token ids"),
        (tokens([1, True]), "holds True, but must be a flat list of token ids"),
        (tokens([1, None]), "holds None, but must be a flat list of token ids"),
        (tokens([[1]]), r"holds \[1\], but must be a flat list of token ids"),
        (tokens([1, 2.5]), "holds numbers with a fraction, but must be token ids"),
        (tokens([-1]), r"holds token id -1, which is outside 0\.\.2147483647"),
        (tokens([2**31]), "holds token id 2147483648"),
        (tokens([10**30]), "holds a number outside the range of int64"),
        (tokens([1e308]), "holds a number outside the range of int64"),
        (tokens([math.inf]), "holds a number outside the range of int64"),
        (chunk({"type": "image", "data": "\x80", "format": "png"}), "data is not base64"),
        (tokens("12"), "is '12', but must be a list of token ids"),
        (chunk({"type": "dmel", "dmel": ""}),
         rf"{IN_CHUNK}.type is 'dmel', but must be one of encoded_text, image, image_asset_poin"),
        (chunk({"type": "image", "data": "%", "format": "png"}),
         rf"{IN_CHUNK}.data is not base64"),
        (chunk({"type": "image", "data": "", "format": "gif"}),
         'is invalid: image format must be "png" or "jpeg"'),
        (weights(data=None), rf"{IN_WEIGHTS}.data is missing"),
        (weights(data=[1.0, "2"]), rf"{IN_WEIGHTS}.data holds '2'"),
        (weights(data=[1.0, 1e39]), "data holds a number outside the range of float32"),
        (weights(data=[1.0, 10**400]), "data holds a number outside the range of float32"),
        (weights(dtype="float64"), r"dtype is 'float64', but must be \"int64\" or \"float32\""),
        (weights(dtype=None), "dtype is None"),
        (weights(shape=[3]), "2 values do not fill shape"),
        (weights(shape=[-2]), "do not fill shape"),
        (weights(shape=[2.5]), "shape holds numbers with a fraction"),
        (weights(shape=[2] + [1] * 100), "has 101 dimensions, but at most 8"),
        (weights(shape=[2**40, 2**40]), "more than 268435456 numbers"),
        (weights(sparse_crow_indices=[0, 2]), "a sparse tensor needs"),
        (weights(shape=[1, 2**40], sparse_crow_indices=[0, 2], sparse_col_indices=[0, 1]),
         "more than 268435456 numbers"),
        (weights(shape=[3, 2], sparse_crow_indices=[0, 2**62 + 1, -(2**62), 2],
                 sparse_col_indices=[0, 1]), "4 row indices and 2 column indices do not describe"),
        (weights(shape=[1, 2], sparse_crow_indices=[0, 2], sparse_col_indices=[0, 2]),
         r"a column index is outside 0\.\.1"),
    ],
)  # fmt: skip
def test_a_bad_batch_is_refused_with_its_place(payload, message):
    """The message is all that the author of another client sees."""
    with pytest.raises(wire.DecodeError, match=message):
        wire.from_json(types.ForwardBackwardRequest, payload)


@pytest.mark.parametrize(
    ("cls", "payload", "message"),
    [
        (types.OptimStepRequest, {"model_id": "m", "seq_id": 1, "adam_params": {"beta1": "x"}},
         "OptimStepRequest.adam_params.beta1 is 'x', but must be a finite number"),
        (types.OptimStepRequest, {"model_id": "m", "seq_id": 1, "adam_params": {"beta1": 2}},
         r"OptimStepRequest.adam_params is invalid: beta1 must be a number in \[0, 1\)"),
        (types.AdamParams, {"learning_rate": True}, "learning_rate is True"),
        (types.AdamParams, {"learning_rate": math.inf}, "learning_rate is inf"),
        (types.LoraConfig, {"rank": 0}, "rank must be an integer from 1 to 4096, got 0"),
        (types.LoraConfig, {"train_mlp": 1}, "train_mlp is 1, but must be true or false"),
        (types.SamplingParams, {"stop": {"a": 1}}, "stop must be a str, a list of str"),
        (types.SamplingParams, {"stop": ["a", 1]}, "stop must hold strings only or token ids only"),
        (types.CreateSessionRequest, {"tags": "a"}, "tags is 'a', but must be a list"),
        (types.CreateSessionRequest, {"tags": ["a", 1]}, r"tags\[1\] is 1, but must be a string"),
        (types.CreateSessionRequest, {"user_metadata": {"a": math.inf}}, "user_metadata is inf"),
        (types.CreateSessionResponse, {}, "CreateSessionResponse.session_id is missing"),
        (types.SampledSequence, {"tokens": [1], "stop_reason": "eos"},
         "stop_reason is 'eos', but must be 'stop' or 'length'"),
        (types.SampleResponse, {"sequences": [], "topk_prompt_logprobs": [[["5", -1.0]]]},
         r"topk_prompt_logprobs\[0\] is \[\['5', -1.0\]\], but must be a row of pairs"),
        (types.SampleResponse, {"sequences": [], "topk_prompt_logprobs": [3]}, "a row of pairs"),
        (types.SampleResponse, {"sequences": [], "topk_prompt_logprobs": [[[5, 3.5e38]]]},
         "a row of pairs"),
        (types.Cursor, {"offset": "x"}, "offset is 'x'"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_with_its_place(cls, payload, message):
    with pytest.raises(wire.DecodeError, match=message):
        wire.from_json(cls, payload)


def test_deeply_nested_metadata_is_refused():
    """It could be read, but not be written again."""
    deep = {}
    for _ in range(60):
        deep = {"a": deep}

    with pytest.raises(wire.DecodeError, match="user_metadata is nested more than 50 deep"):
        wire.from_json(types.CreateSessionRequest, {"user_metadata": deep})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b"{'a': 1}",
        b'{"a": 1} x',
        '{"a": 1}'.encode("utf-16"),
        b'\xef\xbb\xbf{"a": 1}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 10_000,
    ],
)
def test_what_is_not_json_is_refused(body):
    """Always with a DecodeError."""
    with pytest.raises(wire.DecodeError, match="the body is not"):
        wire.loads(body)


ODDITIES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, 1e-320, "1", "\ud800"])
    | st.floats(allow_nan=False)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)

WHOLE = {
    types.ForwardBackwardRequest: weights(sparse_crow_indices=[0, 2], sparse_col_indices=[0, 1]),
    types.SampleRequest: {
        "prompt": {"chunks": [{"tokens": [1, 2]}, {"type": "image", "data": "", "format": "png"}]},
        "sampling_params": {"stop": ["a"], "max_tokens": 3, "top_k": 5, "temperature": 0.5},
        "target_prompt_logprobs": {"data": [1, 2], "dtype": "int64", "shape": [1, 2]},
        "num_samples": 1,
    },
    types.SampleResponse: {
        "sequences": [{"tokens": [1], "logprobs": [-1.0], "stop_reason": "stop"}],
        "prompt_logprobs": [None, -1.0],
        "topk_prompt_logprobs": [None, [[5, -1.0], {"token_id": 6, "logprob": -2.0}]],
    },
    types.CreateModelRequest: {
        "session_id": "s",
        "model_seq_id": 0,
        "base_model": "tiny",
        "lora_config": {"rank": 8, "seed": 1, "train_mlp": True},
        "user_metadata": {"a": [1, {"b": 2.5}]},
    },
    types.ForwardBackwardOutput: {
        "loss_fn_outputs": [{"logprobs": {"data": [-1.0], "dtype": "float32", "shape": [1]}}],
        "metrics": {"loss:sum": 1.0},
    },
    types.TrainingRunsResponse: {
        "training_runs": [{"id": "m", "is_lora": "true", "last_checkpoint": {"time": "now"}}],
        "cursor": {"offset": "3", "limit": 10},
    },
    types.GetServerCapabilitiesResponse: {"supported_models": ["a", {"model_name": "b"}]},
}


def places(value, path=()):
    """Every place in a payload, as a tuple of keys."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, item in items:
        yield from places(item, (*path, key))


def replaced(value, path, odd):
    if not path:
        return odd
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], odd)
    return copy


@settings(max_examples=500)
@given(st.data())
def test_no_payload_crashes_the_reader(data):
    """One odd value anywhere in a good payload gives an object or a DecodeError, and an accepted
    object can be written again."""
    cls = data.draw(st.sampled_from(list(WHOLE)))
    payload = WHOLE[cls]
    path = data.draw(st.sampled_from(list(places(payload))))

    try:
        obj = wire.from_json(cls, replaced(payload, path, data.draw(ODDITIES)))
    except wire.DecodeError as exc:
        assert str(exc).startswith(cls.__name__)
    else:
        wire.dumps(wire.to_json(obj))
