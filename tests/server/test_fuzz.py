"""No request gets a 500: every endpoint, with odd values in every path, query, header and field."""

from __future__ import annotations

import json
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.server.conftest import Served
from tests.server.test_bad_requests import GOOD, MODEL, SAMPLER, SESSION
from tinkex import types, wire
from tinkex.server.app import make_engine
from tinkex.server.openai.endpoints import ANTHROPIC_PREFIXES, OPENAI_PREFIXES
from tinkex.server.routes import routes

#: numpy warns of overflow; outside of tests a warning is no error.
overflow_is_no_error = pytest.mark.filterwarnings("ignore::RuntimeWarning")

#: Good bodies of the endpoints that the corpus of bad requests has none for.
MORE = {
    "create_session": {"tags": ["a"], "user_metadata": {"a": 1}, "display_name": "x"},
    "session_heartbeat": {"session_id": SESSION},
    "sessions/search": {"limit": 5, "cursor": {"last_created_at": 1.5, "last_session_id": "x"},
                        "user_metadata": {"a": 1}, "statuses": [{"type": "active"}],
                        "project_ids": ["p"], "display_name": "x", "session_id": SESSION},
    "retrieve_future": {"request_id": f"{MODEL}:0"},
    "cancel_future": {"request_id": f"{MODEL}:0"},
    "join_sampling_session": {"sampling_session_id": SAMPLER},
    "weights_info": {"tinker_path": f"tinker://{MODEL}/weights/kept"},
    "copy_weights": {"source_path": f"tinker://{MODEL}/weights/kept", "ttl_seconds": 60},
    "stream_sample": {**GOOD["asample"], "seq_id": None},
    "telemetry": {"events": [{"a": 1}]},
    "ttl": {"ttl_seconds": 60},
    "project": {"project_id": "p"},
    "finish": {"reason": {"type": "success"}, "detail": "x"},
    "/ui/chat/completions": {"model": "tiny", "max_tokens": 2, "stream": True,
                             "messages": [{"role": "user", "content": "hi"}]},
    "/ui/completions": {"model": "tiny", "max_tokens": 2, "prompt": "hi"},
}  # fmt: skip
BODIES = {**GOOD, **MORE}

NUMBERS = st.one_of(
    st.sampled_from([0, -1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 2**70, -(2**70), 10**308]),
    st.sampled_from([1e308, -1e308, 1e-320, 3.5e38, 0.5, float(2**63)]),
    st.integers(),
)
TEXTS = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        ["\0", "\n", "\r\nX: y", '"', "ÿ", "\u2028", "😀", "..", "../..", "a/b", "%00"]
    ),
    st.sampled_from(["x" * 300, "x" * 5000, "tinker://a/weights/b", "tinker://\0/weights/b"]),
)
ODD = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(TEXTS, inside, max_size=3),
    max_leaves=4,
)
#: What may stand in a header: any byte but the ends of lines.
HEADER_VALUES = st.one_of(
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f")),
    st.sampled_from(["bytes=0-", "bytes=5-1", "bytes=-9999999999999999999", '"x"', "gzip, zstd"]),
).map(lambda text: text.strip().encode("latin-1"))
HEADERS = (
    "Accept", "Content-Encoding", "Content-Type", "If-None-Match", "If-Range", "Range",
    "X-API-Key", "X-Idempotency-Key", "X-Forwarded-Proto", "Expect", "Accept-Encoding",
)  # fmt: skip

QUIET = settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
#: Generating endpoints of other dialects have tests of their own, in openai/test_fuzz.py.
DIALECTS = (*OPENAI_PREFIXES, *ANTHROPIC_PREFIXES)
ALL = [(method, route.path) for route in routes() for method in sorted(route.methods - {"HEAD"})]
ENDPOINTS = [
    (method, path) for method, path in ALL if method == "GET" or not path.startswith(DIALECTS)
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("home"))
    client = served.client
    session = client.session()
    model = client.model(session)
    client.result(client.save(model, 1, "kept"))
    names = {SESSION: session, MODEL: model, SAMPLER: client.sampler(session, 0)}
    yield served, names
    served.close()


def places(payload, path=()):
    """Every place in a body."""
    yield path
    items = payload.items() if isinstance(payload, dict) else ()
    if isinstance(payload, list):
        items = enumerate(payload)
    for key, inside in items:
        yield from places(inside, (*path, key))


def with_odd_places(data, payload):
    """A copy of a body with one or two places changed."""
    payload = json.loads(json.dumps(payload))
    for _ in range(data.draw(st.integers(0, 2))):
        place, value = data.draw(st.sampled_from(list(places(payload)))), data.draw(ODD)
        if not place:
            return value
        inside = payload
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = value
    return payload


def path_of(data, route, names):
    """A route's path with its parameters filled in: with good names or with odd text."""
    known = {"session_id": SESSION, "run_id": MODEL, "sampler_id": SAMPLER}
    parts = []
    for part in route.split("/"):
        if part.startswith("{"):
            name = part.strip("{}").partition(":")[0]
            good = names.get(known.get(name, ""), "weights/kept")
            text = good if data.draw(st.integers(0, 3)) else data.draw(TEXTS)
            parts.append(quote(text, safe="/" if ":path" in part else ""))
        else:
            parts.append(part)
    return "/".join(parts)


def ask(served, names, method, path, body, headers):
    text = json.dumps(body)
    for mark, name in names.items():
        text = text.replace(mark, name)
    answer = served.client.http.request(
        method,
        served.server.url + path,
        data=None if method == "GET" else text.encode(),
        headers=headers,
        allow_redirects=False,
        timeout=30,
        stream=True,
    )
    if path.startswith("/ui/events") and answer.status_code == 200:
        answer.close()  # it never ends
    else:
        assert answer.content is not None
    return answer


def check(answer):
    assert answer.status_code < 500, (answer.request.url, answer.request.body, answer.text)
    if answer.status_code >= 400 and answer.status_code != 408:
        # A request that is no HTTP at all is refused by the HTTP server, in plain text.
        assert answer.headers["content-type"].startswith(("application/json", "text/plain"))
        assert answer.text.strip()
        assert "Traceback" not in answer.text


def test_every_route_is_fuzzed_here_or_with_the_dialects():
    """A new route is in one of the two lists, or this fails."""
    from tests.server.openai.test_fuzz import FUZZED

    assert set(ALL) == set(ENDPOINTS) | FUZZED
    assert len(ALL) > 60


@QUIET
@given(data=st.data())
def test_odd_fields_and_paths(site, data):
    served, names = site
    method, route = data.draw(st.sampled_from(ENDPOINTS))
    assume(not route.endswith("/finish"))  # ends the session that the others need
    name = route.removeprefix(wire.PREFIX)
    body = BODIES.get(name) or BODIES.get(name.rpartition("/")[2]) or {}
    path = path_of(data, route, names)
    if method == "DELETE":
        path += "x"
    query = data.draw(st.dictionaries(st.sampled_from(["limit", "offset", "ticket"]), TEXTS))
    if query:
        path += "?" + "&".join(f"{key}={quote(value)}" for key, value in query.items())
    body = with_odd_places(data, body)
    check(ask(served, names, method, path, body, {"Content-Type": wire.JSON}))


@QUIET
@given(data=st.data())
def test_odd_headers(site, data):
    served, names = site
    method, route = data.draw(st.sampled_from(ENDPOINTS))
    assume(not route.endswith("/finish") and method != "DELETE")
    headers = {"Content-Type": wire.JSON}
    headers |= data.draw(st.dictionaries(st.sampled_from(HEADERS), HEADER_VALUES, max_size=3))
    name = route.removeprefix(wire.PREFIX)
    body = BODIES.get(name) or BODIES.get(name.rpartition("/")[2]) or {}
    path = path_of(data, route, names)
    check(ask(served, names, method, path, body, headers))


@settings(QUIET, max_examples=100)
@given(name=TEXTS, headers=st.dictionaries(st.sampled_from(HEADERS), HEADER_VALUES, max_size=2))
def test_odd_names_of_an_archive(site, name, headers):
    """The name in the URL is not repeated in a header."""
    served, names = site
    client = served.client
    link = client.send(
        "GET",
        f"training_runs/{names[MODEL]}/checkpoints/weights/kept/archive",
        allow_redirects=False,
    ).headers["Location"]
    ticket = link.partition("?")[2]
    url = f"{client.url}archives/{quote(name, safe='')}?{ticket}"
    answer = client.http.get(url, headers=headers, allow_redirects=False)

    check(answer)
    assert "\n" not in answer.headers.get("Content-Disposition", "")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The real engine on the tiny model."""
    served = Served(tmp_path_factory.mktemp("real"), make_engine=make_engine)
    yield served
    served.close()


TENSORS = st.one_of(
    st.lists(st.sampled_from([0, 1, 5, -1, 255, 300, 2**31 - 1, 2**62]), max_size=4).map(
        lambda values: {"data": values, "dtype": "int64", "shape": [len(values)]}
    ),
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 3e38, -3e38, 1e-40, 50.0, 1e9]), max_size=4).map(
        lambda values: {"data": values, "dtype": "float32", "shape": [len(values)]}
    ),
    st.just({"data": [1.0] * 8, "dtype": "float32", "shape": [4, 2]}),
    st.just({"data": [1] * 8, "dtype": "int64", "shape": [4, 2]}),
)
LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "unheard_of")
INPUTS = ("target_tokens", "weights", "logprobs", "advantages", "mask", "odd")
CONFIG = st.dictionaries(
    st.sampled_from(["clip_low_threshold", "clip_high_threshold", "beta", "odd"]),
    st.one_of(NUMBERS, TEXTS),
    max_size=2,
)


@overflow_is_no_error
@settings(QUIET, max_examples=150)
@given(data=st.data())
def test_odd_batches_on_the_real_engine(real, data):
    """Types that do not fit, ids beyond the vocabulary, numbers that overflow: the user's fault,
    or the right answer; never the server's fault."""
    client = real.client
    if not hasattr(real, "model"):
        real.model, real.seq = client.model(), 0
    good = [5, 6, 7, 8]
    inputs = {
        "target_tokens": {"data": good, "dtype": "int64", "shape": [4]},
        "weights": {"data": [1.0] * 4, "dtype": "float32", "shape": [4]},
        "logprobs": {"data": [-1.0] * 4, "dtype": "float32", "shape": [4]},
        "advantages": {"data": [1.0] * 4, "dtype": "float32", "shape": [4]},
    }
    for name in data.draw(st.lists(st.sampled_from(INPUTS), max_size=2)):
        inputs[name] = data.draw(TENSORS)
    tokens = data.draw(
        st.one_of(st.just(good), st.lists(st.sampled_from([0, 1, 255, 300, 2**31 - 1]), max_size=5))
    )
    batch = {
        "data": [
            {
                "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
                "loss_fn_inputs": inputs,
            }
        ],
        "loss_fn": data.draw(st.sampled_from(LOSSES)),
        "loss_fn_config": data.draw(CONFIG) or None,
    }
    real.seq += 1
    body = {"model_id": real.model, "seq_id": real.seq, "forward_backward_input": batch}
    answer = client.send("POST", "forward_backward", body)
    check(answer)
    if answer.status_code == 200:
        result = client.result(answer.json(), protobuf=types.ForwardBackwardOutput)
        if isinstance(result, dict):
            assert "user" == result["category"], result
    else:
        real.seq -= 1


@overflow_is_no_error
@settings(QUIET, max_examples=100)
@given(data=st.data())
def test_odd_samples_on_the_real_engine(real, data):
    client = real.client
    if not hasattr(real, "sampler"):
        real.sampler = client.sampler()
    params = {
        "max_tokens": data.draw(st.sampled_from([1, 3])),
        "temperature": data.draw(st.sampled_from([0, 1e-300, 1e-40, 1, 1e300, 5e-324])),
        "top_k": data.draw(st.sampled_from([-1, 1, 300, 2**31 - 1])),
        "top_p": data.draw(st.sampled_from([5e-324, 1e-40, 0.5, 1])),
        "seed": data.draw(st.sampled_from([None, 0, 2**63 - 1])),
        "stop": data.draw(
            st.sampled_from([None, [], "x", ["a"] * 50, [0, 2**31 - 1], ["\0"], list(range(300))])
        ),
    }
    body = {
        "sampling_session_id": real.sampler,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "sampling_params": params,
        "num_samples": data.draw(st.sampled_from([1, 2])),
        "topk_prompt_logprobs": data.draw(st.sampled_from([0, 3, 256, 2**40])),
        "topk_sample_logprobs": data.draw(st.sampled_from([0, 3, 256, 2**40])),
        "prompt_logprobs": data.draw(st.booleans()),
        "prompt_logprobs_last_n": data.draw(st.sampled_from([None, 0, 1, 2**70])),
    }
    answer = client.send("POST", "asample", body)
    check(answer)
    if answer.status_code == 200:
        result = client.result(answer.json(), protobuf=types.SampleResponse)
        if isinstance(result, dict):
            assert "user" == result["category"], result
        else:
            for sequence in result.sequences:
                assert not np.isnan(sequence.logprobs_np).any(), params


@overflow_is_no_error
@pytest.mark.parametrize("rate", [1e300, 3.5e38, 1e38, 1e-320])
def test_steps_that_overflow(real, rate):
    """What comes out may be infinite, which is an answer; the server reports it and lives."""
    client = real.client
    model = client.model()
    client.result(client.forward_backward(model, 1, [5, 6]))
    client.result(client.optim_step(model, 2, learning_rate=rate))
    result = client.result(client.forward_backward(model, 3, [5, 6]))
    step = client.result(client.optim_step(model, 4))

    for outcome in (result, step):
        assert "metrics" in outcome or "user" == outcome["category"], outcome
