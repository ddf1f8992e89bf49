"""Writing JSON: what the official SDK sends, and what becomes null or is omitted."""

from __future__ import annotations

import json
import math

import attrs
import numpy as np
import pytest

from tinkex import types, wire


def test_optim_step_is_what_the_official_sdk_sends():
    """All six numbers are sent, also defaults: servers may have different defaults."""
    request = types.OptimStepRequest("m", 3, types.AdamParams(learning_rate=0.01))

    assert {
        "model_id": "m",
        "seq_id": 3,
        "type": "optim_step",
        "adam_params": {
            "learning_rate": 0.01,
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-12,
            "weight_decay": 0.0,
            "grad_clip_norm": 0.0,
        },
    } == wire.to_json(request, "optim_step")


def test_create_model_omits_what_older_servers_do_not_know():
    """Servers that refuse unknown fields must accept it."""
    request = types.CreateModelRequest("s", 0, "tiny", types.LoraConfig(rank=8, seed=7))

    assert {
        "session_id": "s",
        "model_seq_id": 0,
        "base_model": "tiny",
        "lora_config": {
            "rank": 8,
            "seed": 7,
            "train_mlp": True,
            "train_attn": True,
        },
    } == wire.to_json(request)


def test_a_newer_field_is_sent_if_it_is_used():
    request = types.SampleRequest(
        types.ModelInput.from_ints([1]), topk_sample_logprobs=2, record_stability_info=True
    )

    plain = wire.to_json(request)

    assert 2 == plain["topk_sample_logprobs"]
    assert True is plain["record_stability_info"]


def test_sample_is_what_the_official_sdk_sends_without_newer_defaults():
    request = types.SampleRequest(
        types.ModelInput.from_ints([19, 261]),
        types.SamplingParams(max_tokens=8, seed=3, stop=["9"], temperature=0.7, top_k=50),
        num_samples=3,
        sampling_session_id="s",
        seq_id=1,
    )

    assert {
        "num_samples": 3,
        "prompt": {"chunks": [{"tokens": [19, 261], "type": "encoded_text"}]},
        "sampling_params": {
            "max_tokens": 8,
            "seed": 3,
            "stop": ["9"],
            "temperature": 0.7,
            "top_k": 50,
            "top_p": 1.0,
        },
        "sampling_session_id": "s",
        "seq_id": 1,
        "prompt_logprobs": False,
        "topk_prompt_logprobs": 0,
        "type": "sample",
    } == wire.to_json(request, "sample")


def test_stop_none_differs_from_an_empty_list():
    """None: end of text stops a sample. An empty list: nothing does, so it must be sent."""
    nothing = types.SampleRequest(types.ModelInput.empty(), types.SamplingParams(stop=[]))
    default = types.SampleRequest(types.ModelInput.empty(), types.SamplingParams())

    assert [] == wire.to_json(nothing)["sampling_params"]["stop"]
    assert "stop" not in wire.to_json(default)["sampling_params"]


def test_a_batch_is_what_sdk_0_24_sends():
    request = types.ForwardBackwardRequest(
        "m",
        2,
        [
            types.Datum(
                types.ModelInput.from_ints([19, 261, 273]),
                {"target_tokens": [261, 273, 2], "weights": [0.0, 1.0, 1.0]},
            )
        ],
        "cross_entropy",
    )
    batch = {
        "data": [
            {
                "loss_fn_inputs": {
                    "target_tokens": {"data": [261, 273, 2], "dtype": "int64", "shape": [3]},
                    "weights": {"data": [0.0, 1.0, 1.0], "dtype": "float32", "shape": [3]},
                },
                "model_input": {"chunks": [{"tokens": [19, 261, 273], "type": "encoded_text"}]},
            }
        ],
        "loss_fn": "cross_entropy",
    }

    assert {"forward_backward_input": batch, "model_id": "m", "seq_id": 2} == wire.to_json(request)
    forward = attrs.evolve(request, forward_only=True)
    assert {"forward_input": batch, "model_id": "m", "seq_id": 2} == wire.to_json(forward)


def test_images_are_sent_as_base64():
    chunk = types.ImageChunk(b"\x89PNG", "png", expected_tokens=4)
    pointer = types.ImageAssetPointerChunk("asset://1", "jpeg")

    assert {"chunks": [
        {"type": "image", "data": "iVBORw==", "format": "png", "expected_tokens": 4},
        {"type": "image_asset_pointer", "location": "asset://1", "format": "jpeg"},
    ]} == wire.to_json(types.ModelInput((chunk, pointer)))  # fmt: skip


def test_an_image_asset_cannot_go_into_protobuf():
    """The messages cannot carry it; an error is better than a missing image."""
    chunk = types.ImageAssetPointerChunk("asset://1", "jpeg")
    request = types.ForwardBackwardRequest(
        "m", 1, [types.Datum(types.ModelInput((chunk,)), {})], "cross_entropy"
    )

    with pytest.raises(ValueError, match=r"data\[0\] holds an ImageAssetPointerChunk"):
        wire.encode_request(request, protobuf=True)


def test_a_sparse_tensor_is_sent_in_its_parts():
    tensor = types.TensorData.from_dense(np.array([[0] * 9 + [5], [0] * 10, [7] + [0] * 9]))

    assert {
        "data": [5, 7],
        "dtype": "int64",
        "shape": [3, 10],
        "sparse_crow_indices": [0, 1, 1, 2],
        "sparse_col_indices": [9, 0],
    } == wire.to_json(tensor)


def test_fields_with_send_null_are_sent_as_null():
    """A TTL of null means "never"; an omitted one changes nothing."""
    assert {"ttl_seconds": None} == wire.to_json(types.SetTtlRequest())
    assert {"ttl_seconds": 3600} == wire.to_json(types.SetTtlRequest(3600))


def test_results_that_are_not_finite_become_null():
    """A diverged loss must be reported; JSON has no NaN."""
    output = types.ForwardBackwardOutput(
        [{"logprobs": types.TensorData(np.array([-1.0, np.nan, -np.inf], np.float32))}],
        {"loss:sum": math.nan},
    )

    plain = json.loads(wire.dumps(wire.to_json(output)))
    back = wire.from_json(types.ForwardBackwardOutput, plain)

    assert [-1.0, None, None] == plain["loss_fn_outputs"][0]["logprobs"]["data"]
    assert {"loss:sum": None} == plain["metrics"]
    assert math.isnan(back.loss)
    np.testing.assert_array_equal(
        [-1.0, np.nan, np.nan], back.loss_fn_outputs[0]["logprobs"].to_numpy()
    )


def test_numpy_numbers_are_numbers():
    request = types.OptimStepRequest("m", np.int64(3), types.AdamParams(np.float32(0.5)))

    assert b'"seq_id":3,' in wire.dumps(wire.to_json(request))


@pytest.mark.parametrize("payload", [{"a": math.nan}, {"a": math.inf}, {"a": object()}, {"a": {1}}])
def test_what_is_not_json_is_not_sent(payload):
    """Python would write NaN, which other readers refuse."""
    with pytest.raises(ValueError, match="cannot be sent as JSON"):
        wire.dumps(payload)
