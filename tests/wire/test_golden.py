"""What tinkex sends is what the official SDK sends for the same input.

Compared with recordings of two versions (golden/, made by make.py there): 0.24.1, the last to send
training data as JSON, and 0.38.0, which sends it as protobuf.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import attrs
import pytest

from tinkex import types, wire
from tinkex.wire import proto_requests

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = ("0.24.1", "0.38.0")

MODEL = "s:train:0"
STATE = "tinker://s:train:0/weights/a"
PROMPT = types.ModelInput.from_ints([19, 261, 273])


def datum(**inputs) -> types.Datum:
    return types.Datum(PROMPT, inputs)


POLICY = {
    "target_tokens": [261, 273, 2],
    "logprobs": [-1.0, -2.0, -0.25],
    "advantages": [1.0, -1.0, 0.5],
}
WIDE = {
    "target_tokens": [[1, 2], [3, 4], [5, 6]],
    "weights": [[1, 0], [0.5, 0.5], [0, 1]],
}

#: The batches of make.py, in its order.
BATCHES = [
    types.ForwardBackwardRequest(
        MODEL,
        1,
        [datum(target_tokens=[261, 273, 2], weights=[0.0, 1.0, 0.5])],
        "cross_entropy",
    ),
    types.ForwardBackwardRequest(
        MODEL,
        2,
        [datum(target_tokens=[5, 6, 7], weights=[1.0, 1.0, 0.0])],
        "cross_entropy",
        forward_only=True,
    ),
    types.ForwardBackwardRequest(
        MODEL, 3, [datum(**POLICY)], "ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}
    ),
    types.ForwardBackwardRequest(MODEL, 4, [datum(**WIDE)], "cross_entropy"),
]

SAMPLER = {"sampling_session_id": "s:sample:0"}

#: All other requests: endpoint, index of the recorded request, and ours.
REQUESTS = [
    (wire.CREATE_MODEL, 0, types.CreateModelRequest("s", 0, "tiny", types.LoraConfig(8, 7, True))),
    (
        wire.OPTIM_STEP,
        0,
        types.OptimStepRequest(MODEL, 5, types.AdamParams(learning_rate=0.01, weight_decay=0.1)),
    ),
    (wire.SAVE_WEIGHTS, 0, types.SaveWeightsRequest(MODEL, 6, "a")),
    (
        wire.SAVE_WEIGHTS_FOR_SAMPLER,
        0,
        types.SaveWeightsForSamplerRequest(MODEL, 7, "a", ttl_seconds=3600),
    ),
    (wire.LOAD_WEIGHTS, 0, types.LoadWeightsRequest(STATE, False, MODEL, 8)),
    (wire.LOAD_WEIGHTS, 1, types.LoadWeightsRequest(STATE, True, MODEL, 9)),
    (
        wire.SAVE_WEIGHTS_FOR_SAMPLER,
        1,
        types.SaveWeightsForSamplerRequest(MODEL, 10, sampling_session_seq_id=0),
    ),
    (
        wire.CREATE_SAMPLING_SESSION,
        0,
        types.CreateSamplingSessionRequest("s", 1, base_model="tiny"),
    ),
    (
        wire.SAMPLE,
        0,
        types.SampleRequest(
            PROMPT,
            types.SamplingParams(8, 3, ["9"], 0.7, 50, 0.95),
            num_samples=2,
            seq_id=0,
            **SAMPLER,
        ),
    ),
    (
        wire.SAMPLE,
        1,
        types.SampleRequest(
            PROMPT,
            types.SamplingParams(stop=[2]),
            num_samples=2,
            seq_id=1,
            prompt_logprobs=True,
            topk_prompt_logprobs=5,
            **SAMPLER,
        ),
    ),
    (
        wire.SAMPLE,
        2,
        types.SampleRequest(
            PROMPT, types.SamplingParams(max_tokens=1), seq_id=2, prompt_logprobs=True, **SAMPLER
        ),
    ),
    (wire.FINISH_SESSION, 0, types.FinishSessionRequest()),
    (wire.SET_CHECKPOINT_TTL, 0, types.SetTtlRequest(3600)),
    (wire.SET_CHECKPOINT_TTL, 1, types.SetTtlRequest(None)),
    (wire.WEIGHTS_INFO, 0, types.WeightsInfoRequest(STATE)),
    (wire.GET_INFO, 0, types.GetInfoRequest(MODEL)),
    (wire.RETRIEVE_FUTURE, 0, types.RetrieveFutureRequest("r", allow_metadata_only=True)),
]

#: Requests that a version sends differently, or not at all.
NOT_CALLED = {
    ("0.24.1", wire.FINISH_SESSION.path),
    ("0.24.1", wire.GET_INFO.path),
    ("0.38.0", wire.WEIGHTS_INFO.path),
}

#: Defaults that 0.38.0 sends and we omit, for servers that do not know the fields.
NEWER_DEFAULTS = {
    "create_model": {"optimizer_config": {"type": "adamw"}},
    "save_weights_for_sampler": {"kind": "snapshot"},
    "asample": {
        "topk_sample_logprobs": 0,
        "prompt_alt_tokens_k": 0,
        "record_stability_info": False,
    },
}


def recorded(version: str, path: str) -> list[dict]:
    """The requests to *path*, in order; {parameters} in it match anything."""
    everything = json.loads((GOLDEN / f"{version}.json").read_text())["requests"]
    tail = path.rsplit("}/", 1)[-1]
    return [
        request
        for request in everything
        if request["path"] == path or ("{" in path and request["path"].endswith(tail))
    ]


@pytest.mark.parametrize(
    ("version", "endpoint", "which", "ours"),
    [
        (version, *request)
        for version in VERSIONS
        for request in REQUESTS
        if (version, request[0].path) not in NOT_CALLED
    ],
)
def test_a_request_is_the_official_one(version, endpoint, which, ours):
    """Field by field; only the fields of NEWER_DEFAULTS may be missing."""
    theirs = recorded(version, endpoint.path)
    newer = NEWER_DEFAULTS.get(endpoint.path, {}) if version == "0.38.0" else {}

    assert theirs[which]["json"] == {**wire.to_json(ours, endpoint.tag), **newer}


@pytest.mark.parametrize("which", range(len(BATCHES)))
def test_a_batch_in_protobuf_is_the_official_one(which):
    """Equal messages of equal length: only the order of map entries may differ."""
    theirs = base64.b64decode(recorded("0.38.0", "forward_backward")[which]["protobuf"])

    path, content_type, _, ours = wire.encode_request(BATCHES[which], protobuf=True)

    parse = proto_requests.CLASSES["ForwardBackwardRequest"].FromString
    assert ("forward_backward", "application/x-protobuf") == (path, content_type)
    assert parse(theirs) == parse(ours)
    assert len(theirs) == len(ours)
    assert BATCHES[which] == wire.decode_request(content_type, theirs)


def test_batches_in_json_are_the_official_ones():
    """Forward has its own endpoint and its own key."""
    backward = recorded("0.24.1", "forward_backward")
    theirs = [backward[0], *recorded("0.24.1", "forward"), *backward[1:]]

    for expected, batch in zip(theirs, BATCHES, strict=True):
        path, content_type, _, body = wire.encode_request(batch, protobuf=False)

        assert (expected["path"], expected["json"]) == (path, wire.loads(body))
        assert batch == wire.decode_request(content_type, wire.dumps(expected["json"]))


def test_the_messages_are_the_official_ones_by_number():
    """A batch with every kind of field, compared with field numbers written by hand."""
    batch = attrs.evolve(
        BATCHES[0],
        seq_id=5,
        data=[
            types.Datum(types.ModelInput((types.ImageChunk(b"\x89", "png", 3),)), {}),
            types.Datum(PROMPT, {"weights": types.TensorData.from_dense([[0] * 9 + [1]] * 2)}),
        ],
        loss_fn="x",
    )

    body = wire.encode_request(batch, protobuf=True)[3]

    image = "0a0c120a0a01891203706e671803"
    text = "0a100a0e0a0c130000000501000011010000"
    values = "0a10" + "0100000000000000" * 2
    rows = "1218000000000000000001000000000000000200000000000000"
    columns = "1a10" + "0900000000000000" * 2
    sparse = "123e" + values + rows + columns
    tensor = "0a07" + b"weights".hex() + "1246" + sparse + "1802" + "2202020a"
    assert (
        "0a09"
        + MODEL.encode().hex()
        + "1005"
        + "2201"
        + b"x".hex()
        + "1a0e"
        + image
        + "1a65"
        + text
        + "1251"
        + tensor
    ) == body.hex()
