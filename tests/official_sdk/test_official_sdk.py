"""The official SDK, unmodified, trains and samples on our server, also where the network is bad.

Two versions: 0.24.1, the last that speaks JSON all through (on a server that offers nothing else),
and 0.38.0, which speaks protobuf. Each runs in its own virtual environment under build/ (made
when it is not there), mostly through a proxy that writes down what passes and meddles with it.
`make conformance` runs the whole scenario with more versions.

What a server must do for the SDK, by the number that the tests name:

 1. take flags that are `{}`, call JSON `application/json`; fields more in an answer do no harm
 2. a resend with a new idempotency key and the same number: the same request id, run once
 3. chunks that arrive out of order run in their order, and the next step waits for all of them
 4. forward_only leaves gradients alone; forward, forward_backward and optim_step keep their order
 5. a slow operation: 408 with its queue state before 40 seconds, without a warning to the user
 6. a failure: 200 with a sentence and a category, and the model continues
 7. a result that is lost: 410, from which sampling recovers by itself
 8. too many samples: 429 slows the client down, and nothing is lost
 9. a sample: its ids in the promise, as many sequences, NaN first, stop or length, little-endian
10. create, train, save, create from the state: identical log-probabilities, ids of the session
11. named and unnamed sampler weights; all samplers of a session are numbered together
12. a large result: its size once, then the result
13. metrics are called `name:how`, and `loss:sum` is always there
14. ids hold ':', raw or encoded; checkpoint ids hold '/'
15. a 400 has a body and a Content-Length
16. request bodies in zstd or in pieces, answers in gzip
17. a session lives through minutes without heartbeats; finished, it answers them with 410
"""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
import zstandard

from tests.official_sdk import sdk
from tests.official_sdk.proxy import PREFIX, Exchange, Proxy
from tinkex import types, wire

#: SDK version and the options of the server that it runs against.
DIALECTS = {"0.24.1": ("--dialect", "json"), "0.38.0": ()}
KEY = {"x-api-key": "tml-conformance"}


@pytest.fixture(scope="module", params=[pytest.param("0.24.1", marks=pytest.mark.slow), "0.38.0"])
def version(request):
    """The older one is for `make test-slow`: tests/test_dialects.py covers JSON in seconds."""
    return request.param


@pytest.fixture(scope="module")
def address(version):
    """A server as users have it."""
    with sdk.server(*DIALECTS[version]) as url:
        yield url


def outcome(version: str, url: str, *features: str) -> dict[str, str]:
    """What each feature returned, all of them having worked; under "said", what the SDK printed."""
    lines, said = sdk.scenario(version, url, *features)

    assert [] == [line for line in lines if line["state"] not in ("works", "absent", "refused")]
    assert {"works"} <= {line["state"] for line in lines}, lines
    return {line["feature"]: line["detail"] for line in lines} | {"said": said}


@pytest.fixture(scope="module")
def recorded(version, address):
    """Everything that passed while the SDK did all it can."""
    with Proxy(address) as proxy:
        proxy.outcome = outcome(version, proxy.url, "-many samples")
        yield proxy


CRAMPED = {"poll_seconds": 0.2, "metadata_bytes": 2000, "sample_queue": 8}


@pytest.fixture(scope="module")
def cramped(version):
    """What passed on a server that has little room and less patience, the first chunk of a batch
    being held back until its result has been asked for many times."""
    batches, waits, asked_often = [], [], threading.Event()

    def hold_back(exchange):
        if exchange.path == "forward_backward":
            batches.append(exchange)
            if len(batches) == 2:  # the SDK sends the first of two chunks last
                asked_often.wait(60)

    def count(exchange):
        what = exchange.headers.get("x-tinker-request-type")
        if what == "ForwardBackward" and exchange.status == 408:
            waits.append(exchange)
            if len(waits) == 20:
                asked_often.set()

    limited = sdk.server(*DIALECTS[version], **CRAMPED)
    with limited as url, Proxy(url, before=hold_back, after=count) as proxy:
        proxy.outcome = outcome(version, proxy.url, "several chunks", "many samples")
        yield proxy


def results_of(proxy: Proxy, *names: str) -> list[Exchange]:
    """The finished polls for operations of these names."""
    return [
        e
        for e in proxy.to("retrieve_future")
        if e.headers["x-tinker-request-type"] in names and e.status == 200
    ]


def read(exchange: Exchange, cls):
    """A result, in whichever dialect it came."""
    if exchange.answer_type == wire.PROTOBUF:
        return wire.decode_result(cls, exchange.answer)
    return wire.from_json(cls, exchange.answer_json)


def succeeded(exchanges: list[Exchange]) -> list[Exchange]:
    return [e for e in exchanges if "error" not in (e.answer_json or {})]


# --- in good weather ------------------------------------------------------------------------------


def test_every_answer_says_what_it_is(recorded):
    """Rule 1: the SDK refuses JSON without its content type."""
    kinds = Counter(e.answer_type for e in recorded.exchanges if e.answer)

    assert {wire.JSON, wire.PROTOBUF} >= set(kinds)
    assert all(json.loads(e.answer) is not None for e in recorded.exchanges
               if e.answer_type == wire.JSON)  # fmt: skip


def test_unknown_fields_in_answers_do_no_harm(version, address):
    """Rule 1: and no flag at all is a set of flags."""

    def meddle(exchange):
        if exchange.path == "client/config":
            exchange.answer = b"{}"
        elif exchange.answer_type == wire.JSON and exchange.answer.startswith(b"{"):
            exchange.answer = b'{"of_a_later_server":[1],' + exchange.answer[1:].lstrip()
            exchange.answer = exchange.answer.replace(b"[1],}", b"[1]}")

    with Proxy(address, after=meddle) as proxy:
        outcome(version, proxy.url, "forward_backward: one", "sample: num_samples")


def test_a_failure_is_an_answer(recorded):
    """Rule 6: 200 with a sentence and a category; the scenario continued after it."""
    failures = [e.answer_json for e in results_of(recorded, "ForwardBackward")]
    failures = [answer for answer in failures if answer and "error" in answer]

    assert failures
    assert {"user"} == {answer["category"] for answer in failures}
    assert any("100000000" in answer["error"] for answer in failures)


def test_a_sample_is_whole(recorded):
    """Rule 9: as many ids and sequences as were asked for, one log-probability per token,
    stop or length, and nothing for the first token of the prompt."""
    asked = {e.answer_json["request_id"]: e for e in recorded.to("asample") if e.status == 200}
    responses = succeeded(results_of(recorded, "Sample"))

    assert len(responses) > 20
    for exchange in responses:
        promise = asked[exchange.json["request_id"]]
        sample = read(exchange, types.SampleResponse)
        assert promise.json["num_samples"] == len(sample.sequences)
        assert promise.json["num_samples"] == len(set(promise.answer_json["sample_sequence_ids"]))
        for sequence in sample.sequences:
            assert len(sequence.tokens) == len(sequence.logprobs)
            assert sequence.stop_reason in ("stop", "length")
        if promise.json["prompt_logprobs"]:
            prompt = promise.json["prompt"]["chunks"][0]["tokens"]
            assert len(prompt) == len(sample.prompt_logprobs)
            assert sample.prompt_logprobs[0] is None


def test_model_ids_follow_from_the_session(recorded):
    """Rule 10: SDK 0.38.0 works out the id of a model that it creates from a checkpoint."""
    created = succeeded(results_of(recorded, "CreateModel"))
    loaded = [e for e in recorded.to("load_weights") if "session_id" in e.json]

    for exchange in created:
        assert ":train:" in exchange.answer_json["model_id"]
    for exchange in loaded:
        expected = f"{exchange.json['session_id']}:train:{exchange.json['model_seq_id']}"
        assert expected == exchange.answer_json["model_id"]


def test_all_samplers_of_a_session_are_numbered_together(recorded):
    """Rule 11: those of saved weights and those of live ones."""
    from_checkpoints = [
        e.answer_json["sampling_session_id"] for e in recorded.to("create_sampling_session")
    ]
    saves = succeeded(results_of(recorded, "SaveWeightsForSampler"))
    from_models = [e.answer_json.get("sampling_session_id") for e in saves]
    from_models = [sampler for sampler in from_models if sampler]
    paths = [e.answer_json["path"] for e in saves if e.answer_json.get("path")]

    assert from_checkpoints
    assert from_models
    samplers = from_checkpoints + from_models
    assert len(samplers) == len(set(samplers))
    assert all(":sample:" in sampler for sampler in samplers)
    assert all("/sampler_weights/" in path for path in paths)


def test_metrics_say_how_they_are_joined(recorded):
    """Rule 13: the SDK cannot join the metrics of two chunks without a suffix."""
    for exchange in succeeded(results_of(recorded, "Forward", "ForwardBackward")):
        metrics = read(exchange, types.ForwardBackwardOutput).metrics

        assert "loss:sum" in metrics
        assert all(":" in name for name in metrics), metrics


def test_polls_answer_in_time(recorded):
    """Rule 5: the SDK gives a poll 45 seconds."""
    from tinkex.server.limits import Limits

    assert Limits().poll_seconds <= 35


# --- in bad weather -------------------------------------------------------------------------------


def test_everything_sent_twice_runs_once(version, address, recorded):
    """Rule 2: the SDK resends with a new idempotency key; the number says what it is."""
    answers = []

    def twice(exchange):
        if exchange.path in (
            "create_model",
            "forward_backward",
            "optim_step",
            "forward",
            "asample",
        ):
            copy = Exchange(exchange.method, exchange.path, dict(exchange.headers),
                            exchange.body, exchange.number)  # fmt: skip
            copy.headers["x-idempotency-key"] += "-again"
            proxy.send(copy)
            proxy.send(exchange)
            answers.append((copy.answer_json, exchange.answer_json))

    with Proxy(address, before=twice) as proxy:
        through = outcome(version, proxy.url, "pipelined", "sample: num_samples")

    assert len(answers) > 30
    assert [a["request_id"] for a, _ in answers] == [b["request_id"] for _, b in answers]
    assert recorded.outcome["pipelined steps"] == through["pipelined steps"]


def seq_of(exchange: Exchange) -> int:
    body = exchange.body
    if exchange.headers.get("content-encoding") == "zstd":
        body = zstandard.ZstdDecompressor().decompress(body)
    return wire.decode_request(exchange.headers["content-type"], body).seq_id


def test_chunks_run_in_their_order_not_in_that_of_arrival(recorded, cramped):
    """Rule 3: the SDK sends the first chunk of a batch last; here it comes later still."""
    feature = "forward_backward: several chunks"
    arrived = [seq_of(e) for e in sorted(cramped.to("forward_backward"), key=lambda e: e.number)]

    assert [2, 1] == arrived[:2]
    assert recorded.outcome[feature] == cramped.outcome[feature]


def test_an_operation_may_take_many_polls(cramped):
    """Rule 5: "not yet" is 408 with what is waited for, and the SDK has nothing to say to its user;
    ten minutes are twenty polls of thirty seconds."""
    polls = cramped.to("retrieve_future")
    waits = [e.answer_json for e in polls if e.status == 408]
    most = Counter(e.json["request_id"] for e in polls).most_common(1)[0][1]

    assert most >= 20
    assert {"active"} == {answer["queue_state"] for answer in waits}
    assert any("has not arrived" in answer["queue_state_reason"] for answer in waits)
    # 0.38.0 may log that a poll of its own failed because it was closed itself.
    said = cramped.outcome["said"].splitlines()
    assert [] == [line for line in said if "Internal client holder is closed" not in line]


def test_a_lost_sample_is_sampled_again(version, address):
    """Rule 7: a 410 makes the SDK sample again, without its user noticing."""
    lost = []

    def forget(exchange):
        if exchange.headers.get("x-tinker-request-type") == "Sample" and not lost:
            lost.append(exchange)
            exchange.body = json.dumps({**exchange.json, "request_id": "s-0:sample:0:0"}).encode()

    with Proxy(address, before=forget) as proxy:
        outcome(version, proxy.url, "sample: num_samples")

    assert [410] == [e.status for e in proxy.to("retrieve_future") if e.status >= 400][:1]
    assert 410 == lost[0].status
    assert 2 == len(proxy.to("asample"))


def test_too_many_samples_slow_the_client_down(cramped):
    """Rule 8: 429, and not one of them is lost."""
    statuses = Counter(e.status for e in cramped.to("asample"))

    assert 100 == statuses[200]
    assert statuses[429] > 0
    assert {200, 429} == set(statuses)


def test_large_results_are_announced_first(cramped):
    """Rule 12: the size once, so that the client can make room, then the result."""
    polls = [e for e in cramped.to("retrieve_future") if e.status == 200]
    announced = [e for e in polls if (e.answer_json or {}).get("status") == "complete_metadata"]

    assert announced
    for announcement in announced:
        request_id = announcement.json["request_id"]
        [payload] = [
            e
            for e in polls
            if e.json["request_id"] == request_id and not e.json["allow_metadata_only"]
        ]
        assert announcement.answer_json["response_payload_size"] > 2000
        assert len(payload.answer) > 2000


def test_each_dialect_is_spoken_where_it_is_offered(version, recorded):
    """Rules 1 and 16: JSON all through, or protobuf with its requests in zstd."""
    sent = {
        (e.headers["content-type"], e.headers.get("content-encoding"))
        for e in recorded.to("forward_backward")
    }
    answered = {e.answer_type for e in succeeded(results_of(recorded, "ForwardBackward", "Sample"))}

    expected = {
        "0.24.1": ({(wire.JSON, None)}, {wire.JSON}),
        "0.38.0": ({(wire.PROTOBUF, "zstd")}, {wire.PROTOBUF}),
    }
    assert expected[version] == (sent, answered)


# --- without the SDK ------------------------------------------------------------------------------


def ask(address: str, method: str, path: str, body: bytes | None = None, **headers: str):
    """(status, headers, body) of one plain request."""
    request = urllib.request.Request(
        f"{address}{PREFIX}{path}", body, {**KEY, **headers}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.headers, exc.read()


def post(address: str, path: str, payload: object) -> dict:
    body = json.dumps(payload).encode()
    status, _, answer = ask(address, "POST", path, body, **{"content-type": wire.JSON})
    assert 200 == status, answer
    return json.loads(answer)


def new_session(address: str) -> str:
    session = {"tags": [], "user_metadata": {}, "sdk_version": "0", "type": "create_session"}
    return post(address, "create_session", session)["session_id"]


@pytest.fixture(scope="module")
def session_id(address):
    return new_session(address)


def heartbeat(address: str, session_id: str) -> int:
    beat = json.dumps({"session_id": session_id, "type": "session_heartbeat"}).encode()
    return ask(address, "POST", "session_heartbeat", beat, **{"content-type": wire.JSON})[0]


def test_a_session_outlives_its_heartbeats():
    """Rule 17: a call that holds the interpreter for minutes silences the SDK's heartbeat; whatever
    else the session asks for is a sign of life too."""
    from tinkex.server.limits import Limits

    assert Limits().session_seconds >= 300
    with sdk.server(session_seconds=1.0, reap_seconds=0.1) as url:
        silent, busy = new_session(url), new_session(url)
        for n in range(4):
            time.sleep(0.5)
            sampler = {"sampling_session_seq_id": n, "base_model": "tiny"}
            post(url, "create_sampling_session", {"session_id": busy, **sampler})

        assert (200, 410) == (heartbeat(url, busy), heartbeat(url, silent))


def test_ids_in_paths_may_be_encoded(address, session_id):
    """Rule 14: both spellings of ':' are in use."""
    sampler = post(
        address,
        "create_sampling_session",
        {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": "tiny"},
    )["sampling_session_id"]
    assert ":" in sampler

    raw = ask(address, "GET", f"samplers/{sampler}")
    encoded = ask(address, "GET", f"samplers/{quote(sampler, safe='')}")

    assert (200, 200) == (raw[0], encoded[0])
    assert raw[2] == encoded[2]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("create_session", b"{"),
        ("asample", b'{"num_samples":0}'),
        ("optim_step", b"[]"),
        ("forward_backward", b"\xff"),
    ],
)
def test_a_400_has_a_body_and_its_length(address, path, body):
    """Rule 15: the SDK takes a 400 without them for a fault of the network, and retries."""
    status, headers, answer = ask(address, "POST", path, body, **{"content-type": wire.JSON})

    assert 400 == status
    assert len(answer) == int(headers["content-length"]) > 0
    assert json.loads(answer)["error"]


def test_a_body_may_come_in_pieces(address):
    """Rule 16: Transfer-Encoding chunked, without a Content-Length."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.request(
        "POST",
        f"{PREFIX}client/config",
        iter([b'{"sdk_', b'version":"0"}']),
        {**KEY, "content-type": wire.JSON},
        encode_chunked=True,
    )

    assert 200 == connection.getresponse().status
    connection.close()


def test_a_large_answer_may_come_compressed(address):
    """Rule 16: what `Accept-Encoding: gzip` gets is gzip or plain, and says which."""
    plain = ask(address, "GET", "training_runs?limit=100")
    offered = ask(address, "GET", "training_runs?limit=100", **{"accept-encoding": "gzip"})

    if offered[1].get("content-encoding") == "gzip":
        import gzip

        assert json.loads(plain[2]).keys() == json.loads(gzip.decompress(offered[2])).keys()
    else:
        assert json.loads(plain[2]).keys() == json.loads(offered[2]).keys()


@pytest.mark.parametrize("version", ["0.38.0"], indirect=True)
def test_numbers_are_little_endian_on_the_wire(address, session_id):
    """Rule 9: read here by hand, not by the codec that wrote them."""
    request = {
        "session_id": session_id, "sampling_session_seq_id": 1, "base_model": "tiny",
    }  # fmt: skip
    sampler = post(address, "create_sampling_session", request)["sampling_session_id"]
    sample = {
        "sampling_session_id": sampler, "seq_id": 0, "num_samples": 1, "prompt_logprobs": True,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [20, 21, 22]}]},
        "sampling_params": {"max_tokens": 2, "stop": [], "temperature": 0.0},
    }  # fmt: skip
    promise = post(address, "asample", sample)

    poll = json.dumps({"request_id": promise["request_id"]}).encode()
    kinds = {"content-type": wire.JSON, "accept": wire.PROTOBUF}
    status, headers, body = ask(address, "POST", "retrieve_future", poll, **kinds)

    assert (200, wire.PROTOBUF) == (status, headers["content-type"])
    # 0a 16: the first sequence, 22 bytes; 08 01: length; 12 08: two tokens; 1a 08: their logprobs
    assert bytes.fromhex("0a1608011208") == body[:6]
    assert bytes.fromhex("1a08") == body[14:16]
    assert (np.frombuffer(body[6:14], "<i4") >= 0).all()
    assert (np.frombuffer(body[16:24], "<f4") <= 0).all()
    # 12 0c: three log-probabilities of the prompt, the first of them NaN
    assert bytes.fromhex("120c") == body[24:26]
    assert [True, False, False] == np.isnan(np.frombuffer(body[26:38], "<f4")).tolist()
