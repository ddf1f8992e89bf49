"""A corpus of invalid requests: each gets a 4xx with a helpful sentence, and has no effect.

No traceback, no changed state, no used number, and the server continues.
"""

from __future__ import annotations

import gzip
import json

import attrs
import pytest
import requests
import zstandard

from tests.server.conftest import QUICK, Served
from tests.support.wire_client import batch
from tinkex import wire

#: In bodies and paths: replaced by what the fixture made.
SESSION, MODEL, SAMPLER = "@session", "@model", "@sampler"
JSON, PROTOBUF = wire.JSON, wire.PROTOBUF
CHECKPOINT = f"training_runs/{MODEL}/checkpoints/weights/kept"

CASES = []


def case(name, method, path, body=b"", status=400, headers=None, says=""):
    CASES.append(pytest.param(method, path, body, status, headers or {}, says, id=name))


def text(payload):
    return json.dumps(payload).encode()


# --- bodies that are no JSON, on every endpoint that takes one ------------------------------------

TAKES_JSON = (
    "create_session", "session_heartbeat", "create_model", "get_info", "forward_backward",
    "forward", "optim_step", "save_weights", "save_weights_for_sampler", "load_weights",
    "unload_model", "weights_info", "create_sampling_session", "asample", "stream_sample",
    "join_sampling_session", "retrieve_future", "retrieve_futures", "cancel_future",
    f"sessions/{SESSION}/finish", "sessions/search", "copy_weights",
)  # fmt: skip
NOT_JSON = {
    "cut off": b'{"model_id": "x", ',
    "bad UTF-8": b'{"model_id": "\xff\xfe"}',
    "a list": b"[1, 2]",
    "deeply nested": b'{"a":' * 100_000,
}
for endpoint in TAKES_JSON:
    for kind, raw in NOT_JSON.items():
        case(f"{endpoint}: {kind}", "POST", endpoint, raw)
case("ttl: no JSON", "PUT", f"{CHECKPOINT}/ttl", b"ttl")
case("ttl: a list", "PUT", f"{CHECKPOINT}/ttl", b"[]")
case("project: no JSON", "PUT", f"sessions/{SESSION}/project", b"\x00")
case("project: a number", "PUT", f"sessions/{SESSION}/project", b'{"project_id": 7}')

# --- fields that are missing or wrong -------------------------------------------------------------

GOOD = {
    "create_model": {
        "session_id": SESSION,
        "model_seq_id": 7,
        "base_model": "tiny",
        "lora_config": {"rank": 4},
    },
    "get_info": {"model_id": MODEL},
    "optim_step": {"model_id": MODEL, "seq_id": 2, "adam_params": {"learning_rate": 0.1}},
    "save_weights": {"model_id": MODEL, "seq_id": 2, "path": "name"},
    "save_weights_for_sampler": {"model_id": MODEL, "seq_id": 2, "path": "name"},
    "load_weights": {"model_id": MODEL, "seq_id": 2, "path": "tinker://r/weights/n"},
    "create_sampling_session": {
        "session_id": SESSION,
        "sampling_session_seq_id": 7,
        "base_model": "tiny",
    },
    "asample": {
        "sampling_session_id": SAMPLER,
        "seq_id": 2,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
        "sampling_params": {"max_tokens": 2},
    },
    "forward_backward": {
        "model_id": MODEL,
        "seq_id": 2,
        "forward_backward_input": {
            "data": [
                {
                    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
                    "loss_fn_inputs": {
                        "target_tokens": {"data": [2, 3], "dtype": "int64", "shape": [2]},
                        "weights": {"data": [1, 1], "dtype": "float32", "shape": [2]},
                    },
                }
            ],
            "loss_fn": "cross_entropy",
        },
    },
    "retrieve_futures": {
        "target": {"type": "sampling_session", "sampling_session_id": SAMPLER},
        "prev_cursor": 0,
    },
}
NOTHING = object()
DATUM = ("forward_backward_input", "data", 0)


def changed(payload, path, value):
    """A copy with one place changed, or taken out."""
    payload = json.loads(json.dumps(payload))
    inside = payload
    for key in path[:-1]:
        inside = inside[key]
    if value is NOTHING:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return payload


def wrong(endpoint, path, *values, status=400, says=None):
    for value in values:
        shown = "missing" if value is NOTHING else repr(value)[:40]
        name = f"{endpoint}: {'.'.join(map(str, path))} = {shown}"
        body = text(changed(GOOD[endpoint], path, value))
        expected = str(path[-1]) if says is None else says
        case(name, "POST", endpoint, body, status, says=expected)


for endpoint in ("optim_step", "save_weights", "save_weights_for_sampler", "forward_backward"):
    wrong(endpoint, ("model_id",), NOTHING, 7, None, [])
    wrong(endpoint, ("model_id",), "unknown", "../../etc", "", status=404, says="is not known")
    wrong(endpoint, ("seq_id",), NOTHING, "2", 2.5, True, -1, 2**31, 10**30, None)
    wrong(endpoint, ("seq_id",), 0, says="seq_id")
wrong("optim_step", ("adam_params",), 3, [], "x")
wrong("optim_step", ("adam_params", "learning_rate"), "0.1", -1, True)
wrong("optim_step", ("adam_params", "beta1"), 1, -0.1)
wrong("optim_step", ("adam_params", "eps"), 0)
wrong("optim_step", ("optimizer_params",), {"type": "dimuon", "learning_rate": 1}, says="dimuon")
for nan in (b"NaN", b"Infinity", b"-Infinity"):
    raw = text(GOOD["optim_step"]).replace(b"0.1", nan)
    case(f"optim_step: learning_rate {nan.decode()}", "POST", "optim_step", raw)
NAMES = ("../x", "a/b", "..", ".hidden", "", "a" * 300, "a b", "x\n", "x\0", "näme", "a\\b", "~x")
wrong("save_weights", ("path",), *NAMES)
wrong("save_weights_for_sampler", ("path",), *NAMES)
wrong("save_weights", ("path",), NOTHING, 7)
wrong("save_weights", ("ttl_seconds",), 0, -5, 1.5, "3600", 10**12)
wrong("save_weights", ("overwrite",), "yes")
wrong("save_weights_for_sampler", ("path",), NOTHING, says="path")
wrong("save_weights_for_sampler", ("kind",), "live", says="inflight")
wrong("save_weights_for_sampler", ("ttl_seconds",), -1)
wrong(
    "load_weights", ("path",), "weights/n", "tinker://r/n", "tinker://r/weights/../n", says="path"
)
wrong("load_weights", ("path",), "tinker://a/b/c/d", "tinker://r/other/n", NOTHING, says="path")
wrong("load_weights", ("model_id",), NOTHING, says="session_id")
wrong("create_model", ("session_id",), NOTHING, 7)
wrong("create_model", ("session_id",), "unknown", status=404, says="is not known")
wrong("create_model", ("model_seq_id",), NOTHING, -1, "1", 1.5, 10**20)
wrong("create_model", ("base_model",), NOTHING, 7, "", "a\0b", "x" * 2000)
wrong("create_model", ("lora_config", "rank"), 0, -1, 100_000, "8", 1.5)
wrong("create_model", ("lora_config", "seed"), -1, 0.5)
wrong("create_model", ("lora_config", "train_mlp"), "yes")
wrong(
    "create_model",
    ("lora_config",),
    {"rank": 4, "train_mlp": False, "train_attn": False, "train_unembed": False},
    says="train_mlp",
)
wrong("create_model", ("optimizer_config",), {"type": "dimuon", "version": 1}, says="dimuon")
wrong("create_model", ("adapter",), "/no/such/folder", "a\0b")
wrong("create_sampling_session", ("session_id",), NOTHING)
wrong("create_sampling_session", ("sampling_session_seq_id",), NOTHING, -1, "1", 10**12)
wrong("create_sampling_session", ("base_model",), NOTHING, says="model_path")
wrong("create_sampling_session", ("model_path",), "/etc/passwd", "tinker://x", says="tinker://")
wrong("create_sampling_session", ("model_path",), "tinker://r/weights/n", status=404, says="never")
wrong("asample", ("sampling_session_id",), "unknown", status=404, says="is not known")
wrong("asample", ("sampling_session_id",), NOTHING, says="model_path")
wrong("asample", ("seq_id",), -1, "1", 1.5, 10**30)
wrong("asample", ("num_samples",), 0, -1, 10**9, "2", 1.5)
wrong("asample", ("prompt",), NOTHING, [1, 2], "text")
wrong("asample", ("prompt", "chunks"), NOTHING, [{"type": "unheard of"}], [7], [{"tokens": "x"}])
wrong("asample", ("prompt", "chunks", 0, "tokens"), [-1], [1.5], ["a"], [2**40], [[1]], None)
wrong("asample", ("sampling_params", "max_tokens"), 0, -5, 10**12, "7", 1.5)
wrong("asample", ("sampling_params", "temperature"), -1, "hot")
wrong("asample", ("sampling_params", "top_p"), 0, 1.5)
wrong("asample", ("sampling_params", "top_k"), 0, -2, 0.5, 2**31, 2**70)
wrong("asample", ("sampling_params", "seed"), -1, 2**64, "x")
wrong("asample", ("sampling_params", "stop"), [""], ["a", 1], {"a": 1}, [-1], [2**31], [2**70])
wrong("asample", ("topk_prompt_logprobs",), -1, "5")
wrong("asample", ("prompt_alt_tokens_k",), 10_000)
for place in ("model_input", "loss_fn_inputs"):
    wrong("forward_backward", (*DATUM, place), NOTHING, 7)
TARGETS = (*DATUM, "loss_fn_inputs", "target_tokens")
wrong("forward_backward", (*TARGETS, "data"), ["a"], [1.5, 2], NOTHING)
wrong("forward_backward", (*TARGETS, "shape"), [3], [-1, -2], "2")
wrong("forward_backward", (*TARGETS, "dtype"), "int7")
wrong("forward_backward", ("forward_backward_input",), NOTHING, 7, [])
wrong("forward_backward", ("forward_backward_input", "data"), 7, [7], NOTHING)
wrong("forward_backward", ("forward_backward_input", "loss_fn"), NOTHING, 7)
wrong("retrieve_futures", ("target",), NOTHING, {}, {"type": "other"}, says="target")
wrong(
    "retrieve_futures", ("target", "sampling_session_id"), "unknown", status=404, says="not known"
)
wrong("retrieve_futures", ("prev_cursor",), "x")
wrong("retrieve_futures", ("timeout",), "soon")
case("retrieve_future: unknown", "POST", "retrieve_future", text({"request_id": "x:1"}), 410)
case("retrieve_future: nothing", "POST", "retrieve_future", b"{}")
case("retrieve_future: a number", "POST", "retrieve_future", text({"request_id": 5}))
case("cancel_future: unknown", "POST", "cancel_future", text({"request_id": "x:1"}), 410)
case("get_info: unknown", "POST", "get_info", text({"model_id": "x"}), 404)
case("unload_model: unknown", "POST", "unload_model", text({"model_id": "x"}), 404)
case("heartbeat: unknown", "POST", "session_heartbeat", text({"session_id": "x"}), 404)
case("finish: unknown", "POST", "sessions/x/finish", b"{}", 404)
case(
    "finish: reason",
    "POST",
    f"sessions/{SESSION}/finish",
    text({"reason": {"type": "bored"}}),
    says="reason",
)
case("join: unknown", "POST", "join_sampling_session", text({"sampling_session_id": "x"}), 404)
case("search: limit", "POST", "sessions/search", text({"limit": 0}), says="limit")
case("search: cursor", "POST", "sessions/search", text({"cursor": {"last_created_at": "x"}}))
case("weights_info: no path", "POST", "weights_info", text({"tinker_path": "/etc/passwd"}))
case("copy: unknown", "POST", "copy_weights", text({"source_path": "tinker://r/weights/n"}), 404)

# --- protobuf, compression, sizes -----------------------------------------------------------------

_, _, _, PROTO = wire.encode_request(batch("unknown", 1, [1, 2, 3]), protobuf=True)
IN_PROTO = {"Content-Type": PROTOBUF}
case("protobuf: garbage", "POST", "forward_backward", b"\xff\xff\xff\xff", headers=IN_PROTO)
case("protobuf: cut off", "POST", "forward_backward", PROTO[:-3], headers=IN_PROTO)
case("protobuf: empty", "POST", "forward_backward", b"", 404, headers=IN_PROTO)
case("protobuf: unknown model", "POST", "forward_backward", PROTO, 404, headers=IN_PROTO)
case("protobuf to optim_step", "POST", "create_session", PROTO, 415, headers=IN_PROTO)
case(
    "a form",
    "POST",
    "create_model",
    b"a=b",
    415,
    headers={"Content-Type": "application/x-www-form-urlencoded"},
)
case("xml batch", "POST", "forward_backward", b"<x/>", 415, headers={"Content-Type": "text/xml"})
ZSTD, GZIP = {"Content-Encoding": "zstd"}, {"Content-Encoding": "gzip"}
BOMB = b'{"a": "' + b" " * 40_000_000
case("zstd: a bomb", "POST", "optim_step", zstandard.compress(BOMB), 413, ZSTD, "decompression")
case("gzip: a bomb", "POST", "optim_step", gzip.compress(BOMB, 1), 413, GZIP, "decompression")
case("zstd: no zstd", "POST", "optim_step", b"{}", 400, ZSTD, "zstd")
case("zstd: cut off", "POST", "optim_step", zstandard.compress(b"{}" * 50)[:-5], 400, ZSTD)
case("gzip: cut off", "POST", "optim_step", gzip.compress(b"{}" * 50)[:-5], 400, GZIP, "gzip")
case("deflate: garbage", "POST", "optim_step", b"{}", 400, {"Content-Encoding": "deflate"})
case("br", "POST", "optim_step", b"{}", 415, {"Content-Encoding": "br"}, "br")
case("too large", "POST", "optim_step", b" " * 5_000_000, 413, says="larger")

# --- places and methods that are none -------------------------------------------------------------

case("no endpoint", "POST", "train_everything", b"{}", 404, says="does not offer")
case("no endpoint with dots", "GET", "../../etc/passwd", b"", 404)
case("wrong method", "GET", "optim_step", b"", 405, says="POST")
case("wrong method too", "DELETE", "create_session", b"", 405)
for absent in ("billing/usage/events", "audit"):
    case(f"not offered: {absent}", "GET", absent, b"", 404, says="does not offer")
for absent in (
    "create_custom_loss",
    "auth/token",
    "checkpoints/search",  # these two are of SDK 0.39
    "external_weights_upload_start",
):
    case(f"not offered: {absent}", "POST", absent, b"{}", 404, says="does not offer")
case("trace", "GET", f"sessions/{SESSION}/trace_export", b"", 404, says="does not offer")
case("run: unknown", "GET", "training_runs/x", b"", 404)
case("run's checkpoints: unknown", "GET", "training_runs/x/checkpoints", b"", 404)
case("session: unknown", "GET", "sessions/x", b"", 404)
case("sampler: unknown", "GET", "samplers/x", b"", 404)
for number in ("-1", "x", "1.5", "9" * 30, "%00"):
    case(f"limit {number}", "GET", f"training_runs?limit={number}", says="limit")
    case(f"offset {number}", "GET", f"checkpoints?offset={number}", says="offset")
for name in ("weights/none", "weights/..", "other/kept", "weights/kept/more", "weights", "%00"):
    place = f"training_runs/{MODEL}/checkpoints/{name}"
    status = 404 if name == "weights/none" else (400, 404, 405)
    case(f"delete {name}", "DELETE", place, b"", status)
    case(f"archive of {name}", "GET", f"{place}/archive", b"", status)
for ttl in (0, -1, 1.5, "x", 10**15, True):
    case(f"ttl {ttl!r}", "PUT", f"{CHECKPOINT}/ttl", text({"ttl_seconds": ttl}), says="ttl")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """One server for all cases, with a model that has done one step, a sampler, a checkpoint."""
    limits = {"body_bytes": 4_000_000, "decoded_bytes": 20_000_000}
    served = Served(tmp_path_factory.mktemp("home"), limits=attrs.evolve(QUICK, **limits))
    client = served.client
    session = client.session()
    model = client.model(session)
    client.result(client.save(model, 1, "kept"))
    sampler = client.sampler(session, 0)
    client.result(client.sample(sampler, 0))
    yield served, {SESSION: session, MODEL: model, SAMPLER: sampler}
    served.close()


def state(client):
    """Everything that a request could have changed."""
    return [client.get(path) for path in ("training_runs", "checkpoints", "sessions")]


def test_the_corpus_is_large():
    assert len(CASES) >= 300


@pytest.mark.parametrize("method, path, body, status, headers, says", CASES)
def test_a_bad_request_is_refused(site, caplog, method, path, body, status, headers, says):
    served, names = site
    for mark, name in names.items():
        path, body = path.replace(mark, name), body.replace(mark.encode(), name.encode())
    headers = {"Content-Type": JSON, **headers}
    url = served.client.url + path
    request = requests.Request(method, url, data=body or None, headers=headers).prepare()
    request.url = url  # as it is: requests would resolve the dots
    answer = served.client.http.send(request, timeout=20)
    expected = status if isinstance(status, tuple) else (status,)

    assert answer.status_code in expected, answer.text
    assert answer.headers["content-type"] == JSON
    assert "content-length" in answer.headers
    payload = answer.json()
    assert {"error", "category"} == set(payload)
    assert "user" == payload["category"]
    assert says in payload["error"], payload["error"]
    assert 10 < len(payload["error"]) < 800
    assert "Traceback" not in answer.text
    assert [] == [r for r in caplog.records if r.levelname == "ERROR" and "tinkex" in r.name]


def test_after_all_that_nothing_has_changed(site):
    """The model's next number is still 2, it can be trained, and no object was added."""
    served, names = site
    client = served.client
    step = client.result(client.optim_step(names[MODEL], 2))
    runs, checkpoints, sessions = state(client)

    assert "metrics" in step
    assert [names[MODEL]] == [run["training_run_id"] for run in runs["training_runs"]]
    assert ["weights/kept"] == [c["checkpoint_id"] for c in checkpoints["checkpoints"]]
    assert checkpoints["checkpoints"][0].get("expires_at") is None
    assert "create_session" not in sessions["sessions"]
    assert {"status": "ok"} == client.get("healthz")
