"""SamplingClient: many prompts at once, in no order, whatever the server does."""

from __future__ import annotations

import pickle
import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest

import tinkex
from tests.support.fake_server import (
    FakeServer,
    answer,
    blocked,
    garbage,
    lost,
    plugged_in,
    refused,
    reset,
    session,
    status,
    timeout,
    try_again,
)
from tinkex import errors, types
from tinkex.config import SamplingLimits
from tinkex.runtime import rate_limit
from tinkex.runtime.retry import Retry
from tinkex.runtime.sample_queue import CLONE_BLOCK
from tinkex.sampling import SamplingClient

PATH = "tinker://s0:train:0/sampler_weights/a"


@pytest.fixture(autouse=True)
def a_pace_of_its_own(monkeypatch):
    """Paces are shared by all samplers of a key, and run on the real clock."""
    rate_limit._paces.clear()
    monkeypatch.setattr(rate_limit, "SMALL_PAUSE", 0.01)


@pytest.fixture(params=[False, True], ids=["poll each", "one poll for all"])
def server(request):
    """Both ways of waiting must be the same to the user."""
    return FakeServer(features={"sample_use_retrieve_futures": request.param})


@pytest.fixture
def client(server):
    with session(server) as s, SamplingClient.create(s, base_model="tinkex/tiny") as made:
        yield made


def tokens(response):
    return [sequence.tokens for sequence in response.sequences]


# One sample.


@pytest.mark.parametrize(
    "prompt",
    [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3]), types.ModelInput.from_ints([1, 2, 3])],
    ids=["list", "tuple", "numpy", "ModelInput"],
)
def test_a_prompt_is_token_ids_in_any_form(client, prompt):
    assert [[3, 2, 1]] == tokens(client.sample(prompt).result(10))


def test_a_prompt_may_be_text_where_the_tokenizer_is_known(client):
    expected = client.encode("hello")[::-1]

    assert [expected] == tokens(client.sample("hello").result(10))
    assert "hello" == client.decode(client.encode("hello"))


def test_a_request_carries_what_was_asked_for(client, server):
    params = types.SamplingParams(max_tokens=2, seed=7, temperature=0.5, top_k=5, top_p=0.9)
    client.sample([1, 2, 3], 2, params, include_prompt_logprobs=True, topk_prompt_logprobs=3)
    client.sample([1]).result(10)
    first, second = sorted(server.bodies("asample"), key=lambda b: b["seq_id"])

    assert "sampler-0" == first["sampling_session_id"]
    assert (2, True, 3) == (
        first["num_samples"],
        first["prompt_logprobs"],
        first["topk_prompt_logprobs"],
    )
    assert (2, 7, 0.5, 5, 0.9) == tuple(
        first["sampling_params"][k] for k in ("max_tokens", "seed", "temperature", "top_k", "top_p")
    )
    assert [0, 1] == [first["seq_id"], second["seq_id"]]
    assert {"1"} == {s.headers["X-Tinker-Sampling-Backpressure"] for s in server.seen("asample")}


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 2, "temperature": 0.5, "stop": "x", "seed": 3},
        {"sampling_params": {"max_tokens": 2, "temperature": 0.5, "stop": "x", "seed": 3}},
        {
            "sampling_params": types.SamplingParams(max_tokens=9, stop="x", seed=3),
            "max_tokens": 2,
            "temperature": 0.5,
        },
    ],
    ids=["keywords", "a dict", "keywords over an object"],
)
def test_sampling_parameters_may_come_in_any_form(client, server, options):
    """types.SamplingParams(max_tokens=3) is a lot to type at a prompt."""
    assert [[3, 2]] == tokens(client.sample([1, 2, 3], **options).result(10))
    list(client.sample_many([[1]], **options))

    for body in server.bodies("asample"):
        params = body["sampling_params"]
        sent = [params[k] for k in ("max_tokens", "temperature", "stop", "seed")]
        assert [2, 0.5, "x", 3] == sent


def test_decode_can_omit_special_tokens(client):
    """Among them the token that ends a text."""
    ids = client.encode("hi")
    end = client.get_tokenizer().eos_token_id

    assert "hi" == client.decode([*ids, end], skip_special_tokens=True)
    assert "hi" != client.decode([*ids, end])


def test_statement_24_nulls_are_never_sent(client, server):
    """prompt_logprobs: null is refused by servers. (statement 24)"""
    client.sample([1]).result(10)
    [seen] = server.seen("asample")

    assert b"null" not in seen.raw
    assert "target_prompt_logprobs" not in seen.body


def test_a_response_has_arrays_and_on_demand_lists(client):
    response = client.sample([1, 2], 2, include_prompt_logprobs=True).result(10)

    assert np.int32 == response.sequences[0].tokens_np.dtype
    assert [[2, 1], [2, 1]] == tokens(response)
    assert [None, -0.25] == response.prompt_logprobs


def test_compute_logprobs_gives_those_of_the_prompt(client, server):
    assert [None, -0.25, -0.25] == client.compute_logprobs([1, 2, 3]).result(10)
    assert 1 == server.bodies("asample")[0]["sampling_params"]["max_tokens"]


def test_a_server_without_prompt_logprobs_is_told_so(client, server):
    server.results["asample"] = lambda seen: types.SampleResponse([types.SampledSequence([1])])

    with pytest.raises(errors.APIResponseValidationError, match="no prompt logprobs"):
        client.compute_logprobs([1, 2]).result(10)


def test_sequences_carry_the_names_the_promise_gave_them(client, server):
    def named(server, request, limits, behave):
        promise = behave().json()
        return answer({**promise, "sample_sequence_ids": ["a", "b"]})(server, request, None, None)

    server.script("asample", named)
    response = client.sample([1], 3).result(10)

    assert ["a", "b", None] == [sequence.sequence_id for sequence in response.sequences]


def test_an_immediate_answer_is_a_result_too():
    server = FakeServer(immediate={"asample"})
    server.results["asample"] = lambda seen: {"sequences": [{"tokens": [1], "stop_reason": "stop"}]}
    with session(server) as s:
        client = SamplingClient.create(s, base_model="m")

        assert [[1]] == tokens(client.sample([5]).result(10))


# Many.


def test_hundreds_are_under_way_at_once():
    server = FakeServer(not_yet=3, seed=4)
    with session(server) as s:
        client = SamplingClient.create(s, base_model="m")
        futures = [client.sample([i, i + 1]) for i in range(300)]

        assert [[[i + 1, i]] for i in range(300)] == [tokens(f.result(30)) for f in futures]
    assert list(range(300)) == sorted(body["seq_id"] for body in server.bodies("asample"))


def test_one_poll_serves_them_all_where_the_server_offers_it():
    server = FakeServer(features={"sample_use_retrieve_futures": True})
    with session(server) as s:
        client = SamplingClient.create(s, base_model="m")
        futures = [client.sample([i]) for i in range(100)]
        for future in futures:
            future.result(30)
    polls = server.bodies("retrieve_futures")

    assert 100 == len(server.seen("retrieve_future"))
    assert {"sampler-0"} == {body["target"]["sampling_session_id"] for body in polls}
    assert [0] == sorted({body["target"]["cloned_sampler_id"] for body in polls})


def test_a_server_that_turns_out_not_to_offer_it_is_polled_for_each(caplog):
    server = FakeServer(features={"sample_use_retrieve_futures": True}, lacks={"retrieve_futures"})
    with session(server) as s:
        client = SamplingClient.create(s, base_model="m")

        assert [[[1]], [[2]]] == [
            tokens(f.result(10)) for f in [client.sample([1]), client.sample([2])]
        ]


@pytest.mark.parametrize(
    "fault",
    [status(503), reset(), lost(), timeout(), garbage(), refused()],
    ids=["503", "reset", "lost", "timeout", "garbage", "refused"],
)
def test_trouble_with_the_one_poll_loses_nothing(fault):
    server = FakeServer(features={"sample_use_retrieve_futures": True})
    server.script("retrieve_futures", fault, fault, fault)
    with session(server) as s:
        client = SamplingClient.create(s, base_model="m")
        futures = [client.sample([i]) for i in range(20)]

        assert all(f.result(20) for f in futures)


def test_the_one_poll_is_given_up_when_the_server_stays_away():
    """Every future resolves: after the patience with a silent server, with its last error."""
    server = FakeServer(features={"sample_use_retrieve_futures": True})
    server.always("retrieve_futures", status(503, {"message": "down for good"}))
    with session(server) as s:
        future = SamplingClient.create(s, base_model="m").sample([1])

        with pytest.raises(errors.InternalServerError, match="down for good"):
            future.result(30)


def test_a_key_that_is_refused_at_the_one_poll_is_told_at_once():
    server = FakeServer(features={"sample_use_retrieve_futures": True})
    for path in ("retrieve_futures", "retrieve_future"):
        server.always(path, status(401, {"detail": "this key has been revoked"}))
    with session(server) as s:
        future = SamplingClient.create(s, base_model="m").sample([1])

        with pytest.raises(errors.AuthenticationError, match="has been revoked"):
            future.result(10)


def test_the_one_poll_is_no_hot_loop():
    """Against a server that answers "nothing yet" at once, instead of waiting."""
    server = FakeServer(features={"sample_use_retrieve_futures": True})
    nothing = answer({"completions": [], "cursor": 0})
    server.script("retrieve_futures", *[nothing] * 20)
    with session(server) as s:
        SamplingClient.create(s, base_model="m").sample([1]).result(10)

    assert 20 == len(server.clock.slept)
    assert 20 < sum(server.clock.slept) < 60


def test_a_poll_timeout_holds_with_the_one_poll_too():
    server = FakeServer(features={"sample_use_retrieve_futures": True})
    server.always("retrieve_futures", timeout())
    with session(server) as s:
        future = SamplingClient.create(s, base_model="m").sample([1], poll_timeout=30)

        with pytest.raises(errors.APITimeoutError, match="Timed out while polling"):
            future.result(10)


def test_sample_many_yields_results_as_they_finish(client):
    prompts = ([i, i + 1] for i in range(200))
    found = dict(client.sample_many(prompts, in_flight=20))

    assert {i: [[i + 1, i]] for i in range(200)} == {i: tokens(r) for i, r in found.items()}


def test_sample_many_takes_prompts_only_as_there_is_room(client, server):
    taken = []

    def prompts():
        for i in range(50):
            taken.append(i)
            yield [i]

    results = client.sample_many(prompts(), in_flight=5)
    assert [] == taken
    next(results)
    assert len(taken) <= 6
    assert 49 == len(list(results))


def test_sample_many_shows_a_bar_if_asked(client, capsys):
    assert 3 == len(list(client.sample_many([[1]] * 3, progress=True)))
    assert "3/3" in capsys.readouterr().err


def test_sample_many_raises_the_first_failure(client, server):
    server.script("asample", status(422, {"detail": "too long"}))

    with pytest.raises(errors.UnprocessableEntityError, match="too long"):
        list(client.sample_many([[1]] * 3))


# Trouble.

TROUBLE = {
    "503": status(503),
    "reset": reset(),
    "answer lost": lost(),
    "timeout": timeout(),
    "refused": refused(),
    "garbage": garbage(),
    "429": status(429),
}


@pytest.mark.parametrize("fault", TROUBLE.values(), ids=TROUBLE)
def test_a_resend_keeps_its_number_so_that_the_server_samples_once(client, server, fault):
    """In the SDK we follow every try is a new sample, to be paid for again."""
    server.script("asample", fault, fault)

    assert [[2, 1]] == tokens(client.sample([1, 2]).result(20))
    assert [0, 0, 0] == [body["seq_id"] for body in server.bodies("asample")]


def test_a_sample_that_the_server_has_lost_is_made_anew_under_a_new_number(client, server):
    gone = status(410, {"detail": "gone"})
    server.script("retrieve_future", gone, gone)

    assert client.sample([1]).result(10)
    assert [0, 0, 1] == [body["seq_id"] for body in server.bodies("asample")]


def test_but_not_for_ever(client, server):
    server.always("retrieve_future", status(410, {"detail": "gone"}))

    with pytest.raises(errors.PromiseExpiredError):
        client.sample([1]).result(10)
    assert 6 == len(server.seen("asample"))


def eventually(is_true, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.005)
    return is_true()


def test_statement_23_a_429_slows_every_sampler_of_the_key(server):
    """And the server's own wish for a pause is followed. (statement 23)"""
    with session(server) as s:
        one, other = (SamplingClient.create(s, base_model="m") for _ in range(2))
        server.script("asample", status(429, {"message": "slow"}, retry_after_ms=20))
        one.sample([1]).result(10)

        assert one._queue.pace is other._queue.pace
        # A result may be there before the thread that submitted the sample has counted it.
        assert eventually(lambda: 200 + 1 == other.limit)
        for _ in range(3):
            other.sample([1]).result(10)
        assert eventually(lambda: 204 == one.limit)


def test_a_429_is_told_with_its_reason(client, server, caplog):
    body = {"queue_state": "paused_rate_limit", "message": "slow"}
    server.script("asample", status(429, body), status(429, body))
    client.sample([1]).result(10)

    assert ["Sampling is paused for sampler-0. Reason: concurrent sampler weights limit hit"] == [
        r.getMessage() for r in caplog.records if "paused" in r.getMessage()
    ]


def test_a_pause_told_by_a_poll_is_logged_once_a_minute(client, server, caplog):
    server.script("retrieve_future", try_again("paused_capacity", "node 7 is being replaced"))
    client.sample([1]).result(10)
    server.script("retrieve_future", try_again("paused_capacity"))
    client.sample([1]).result(10)

    assert ["Sampling is paused for sampler-0. Reason: node 7 is being replaced"] == [
        r.getMessage() for r in caplog.records if "paused" in r.getMessage()
    ]


def test_a_retry_policy_of_one_s_own_is_followed(server):
    with session(server) as s:
        client = SamplingClient.create(s, base_model="m", retry_config=Retry(budget=0))
        server.script("asample", status(503, {"message": "no"}))
        with pytest.raises(errors.InternalServerError):
            client.sample([1]).result(10)
        server.script("asample", status(429, {"message": "slow"}))
        with pytest.raises(errors.RateLimitError):
            client.sample([1]).result(10)

    assert 2 == len(server.seen("asample"))


def test_a_refusal_is_final_and_typed(client, server):
    server.script("asample", status(400, {"detail": "the prompt is longer than the context"}))

    with pytest.raises(errors.BadRequestError, match="longer than the context"):
        client.sample([1]).result(10)


def test_a_failure_on_the_server_is_told(client, server):
    server.script("retrieve_future", answer({"error": "out of memory", "category": "server"}))

    with pytest.raises(errors.RequestFailedError, match="sample from sampler-0 failed on the"):
        client.sample([1]).result(10)


@pytest.mark.parametrize("stage", ["submit", "poll", "decode"])
def test_statement_31_an_exception_in_any_stage_ends_in_the_future(client, monkeypatch, stage):
    """Submitting, polling, decoding: never a hang. (statement 31)"""
    problem = RuntimeError("injected")

    def broken(*args, **options):
        raise problem

    target = {
        "submit": "tinkex.runtime.sample_queue.SampleQueue.take_number",
        "poll": "tinkex.runtime.polling.Poller.ask",
        "decode": "tinkex.runtime.polling.wire.decode_result",
    }[stage]
    monkeypatch.setattr(target, broken)

    assert problem is client.sample([1]).exception(10)


# Streams.


def events(*lines):
    body = "".join(f"data: {line}\n\n" for line in lines).encode()
    return garbage(body, "text/event-stream")


def test_a_stream_yields_each_token(client, server):
    server.script(
        "stream_sample",
        events(
            '{"index": 0, "token": 5, "logprob": -0.5}',
            '{"index": 1, "token": 6, "logprob": -0.25}',
            '{"index": 0, "stop_reason": "stop"}',
            "[DONE]",
        ),
    )
    chunks = list(client.sample_stream([1, 2], 2))

    assert [5, 6, None] == [chunk.token for chunk in chunks]
    assert "stop" == chunks[-1].stop_reason
    assert "text/event-stream" == server.seen("stream_sample")[0].headers["Accept"]


@pytest.mark.parametrize(
    "fault, kind, words",
    [
        (status(404, {"detail": "Not Found"}), errors.NotOfferedError, "does not offer stream_s"),
        (status(401, {"detail": "bad key"}), errors.AuthenticationError, "bad key"),
        (events('{"error": "zu groß"}'), errors.RequestFailedError, "zu groß"),
        (events('{"token": "x"}'), errors.APIResponseValidationError, "unreadable"),
        (events("not json"), errors.APIResponseValidationError, "unreadable"),
        (events("[1]"), errors.APIResponseValidationError, "unreadable"),
        (events('{"token": 5}'), errors.APIConnectionError, "broke off before its end"),
        (reset(), errors.APIConnectionError, "the connection broke"),
    ],
    ids=["404", "401", "error", "wrong type", "not json", "a list", "no end", "reset"],
)
def test_a_stream_ends_in_an_error_of_ours(client, server, fault, kind, words):
    server.script("stream_sample", fault)

    with pytest.raises(kind, match=words):
        list(client.sample_stream([1]))


def test_a_stream_of_an_engine_that_has_died_names_the_reason(client, server, monkeypatch):
    died = "the embedded engine has died (status -9)."
    monkeypatch.setattr(client._session.transport, "obituary", lambda: died)
    server.script("stream_sample", events('{"token": 5}'))

    with pytest.raises(errors.EngineError, match=r"has died \(status -9\)"):
        list(client.sample_stream([1]))


# Beginning and ending.


def test_a_client_is_of_a_path_or_of_a_base_model(server):
    with session(server) as s:
        SamplingClient.create(s, model_path=PATH)
        SamplingClient.create(s, base_model="tiny")
        with pytest.raises(ValueError, match="Either model_path or base_model must be provided"):
            SamplingClient.create(s)

    assert [
        {
            "session_id": "s0",
            "sampling_session_seq_id": 0,
            "model_path": PATH,
            "type": "create_sampling_session",
        },
        {
            "session_id": "s0",
            "sampling_session_seq_id": 1,
            "base_model": "tiny",
            "type": "create_sampling_session",
        },
    ] == server.bodies("create_sampling_session")


def test_a_refused_client_s_number_is_used_again(server):
    with session(server) as s:
        server.script("create_sampling_session", status(404, {"detail": "no such checkpoint"}))
        with pytest.raises(errors.NotFoundError, match="no such checkpoint"):
            SamplingClient.create(s, model_path=PATH)

        assert "sampler-0" == SamplingClient.create(s, model_path=PATH).sampling_session_id


def test_the_base_model_is_asked_for_where_it_is_not_known(server):
    server.stored["GET", "samplers/sampler-0"] = (
        200,
        {"sampler_id": "sampler-0", "base_model": "tinkex/tiny", "model_path": PATH},
    )
    with session(server) as s:
        client = SamplingClient.create(s, model_path=PATH)

        assert "tinkex/tiny" == client.get_base_model()
        assert "a b" == client.decode(client.encode("a b"))


def test_close_waits_for_what_is_under_way(client, server):
    server.not_yet = 3
    futures = [client.sample([i]) for i in range(20)]
    client.close()

    assert all(future.done() and future.result() for future in futures)
    with pytest.raises(errors.ClientClosedError, match="This SamplingClient is closed"):
        client.sample([1])


def test_close_says_what_was_not_done_in_time(client, server):
    entered, release = threading.Event(), threading.Event()
    for path in ("retrieve_future", "retrieve_futures"):
        server.always(path, blocked(entered, release))
    future = client.sample([1])
    entered.wait(10)

    with pytest.raises(
        errors.ClientClosedError, match=r"1 operation \(0 not sent, 1 in progress\)"
    ):
        client.close(timeout=0.05)
    release.set()
    assert isinstance(future.exception(5), errors.ClientClosedError)


def test_samples_that_the_caller_has_abandoned_are_not_waited_for(client, server):
    """Leaving the loop over sample_many early must not make close() wait for thousands."""
    entered, release = threading.Event(), threading.Event()
    stream = client.sample_many([[i] for i in range(10)], in_flight=1)
    next(stream)
    for path in ("retrieve_future", "retrieve_futures"):
        server.always(path, blocked(entered, release))
    waiting = threading.Thread(target=lambda: next(stream, None))
    waiting.start()
    entered.wait(10)
    client._session.pending.wait(None, 0)
    release.set()
    waiting.join(10)
    stream.close()

    assert [] == client._session.pending.open()


def test_a_closed_client_fails_what_is_under_way_and_takes_nothing_more(client, server):
    entered, release = threading.Event(), threading.Event()
    for path in ("retrieve_future", "retrieve_futures"):
        server.always(path, blocked(entered, release))
    future = client.sample([1])
    entered.wait(10)
    client.close(cancel=True)
    client.close()

    with pytest.raises(errors.ClientClosedError, match="was closed"):
        future.result(5)
    with pytest.raises(errors.ClientClosedError, match="This SamplingClient is closed"):
        client.sample([1])
    release.set()


def test_closing_the_session_resolves_what_is_under_way_at_once(server):
    entered, release = threading.Event(), threading.Event()
    for path in ("retrieve_future", "retrieve_futures"):
        server.always(path, blocked(entered, release))
    with session(server) as s:
        future = SamplingClient.create(s, base_model="m").sample([1])
        entered.wait(10)

    with pytest.raises(errors.ClientClosedError):
        future.result(5)
    release.set()


def test_closing_resolves_what_waits_for_room(server):
    """Neither behind a full pool of threads nor in a pause of five minutes."""
    entered, release = threading.Event(), threading.Event()
    server.script("asample", status(429, None, retry_after=300), blocked(entered, release))
    limits = SamplingLimits(connections=2)
    with session(server, sampling=limits) as s:
        client = SamplingClient.create(s, base_model="m")
        futures = [client.sample([i]) for i in range(50)]
        threading.Event().wait(0.05)
        client.close(cancel=True)
        release.set()

        assert all(isinstance(f.exception(5), errors.ClientClosedError) for f in futures)


def test_a_sample_that_is_not_submitted_yet_can_be_cancelled(server):
    entered, release = threading.Event(), threading.Event()
    server.script("asample", blocked(entered, release))
    with session(server, sampling=SamplingLimits(connections=1)) as s:
        client = SamplingClient.create(s, base_model="m")
        first, second = client.sample([1]), client.sample([2])
        entered.wait(10)

        assert second.cancel()
        release.set()
        assert first.result(10)
        with pytest.raises(CancelledError):
            second.result()
    assert 1 == len(server.seen("asample"))


# In another process.


def test_a_pickled_client_holds_no_secret(server, monkeypatch):
    plugged_in(monkeypatch, server)
    monkeypatch.setenv("TINKER_API_KEY", "tml-very-secret")
    with tinkex.ServiceClient() as service:
        client = service.create_sampling_client(base_model="m")
        data = pickle.dumps(client)

        assert b"very-secret" not in data
        assert "very-secret" not in repr(client) + repr(service)


def test_a_copy_works_with_numbers_of_its_own(monkeypatch):
    """Two that count from 0 would be taken for resends of each other."""
    server = FakeServer(features={"sample_join_sampling_session": True})
    plugged_in(monkeypatch, server)
    with tinkex.ServiceClient() as service:
        client = service.create_sampling_client(base_model="m")
        with pickle.loads(pickle.dumps(client)) as copy:
            client.sample([1]).result(10)
            assert [[2, 1]] == tokens(copy.sample([1, 2]).result(10))

    assert [0, 7 * CLONE_BLOCK] == [body["seq_id"] for body in server.bodies("asample")]
    assert {"sampler-0"} == {b["sampling_session_id"] for b in server.bodies("asample")}


def test_a_copy_draws_its_block_where_the_server_has_no_counter(monkeypatch):
    server = FakeServer()
    plugged_in(monkeypatch, server)
    with tinkex.ServiceClient() as service:
        client = service.create_sampling_client(base_model="m")
        with pickle.loads(pickle.dumps(client)) as copy:
            copy.sample([1]).result(10)

    number = server.bodies("asample")[0]["seq_id"]
    assert number >= CLONE_BLOCK and number % CLONE_BLOCK == 0
    assert 1 == len(server.seen("create_session"))


def test_its_repr_says_what_it_is(client):
    assert "<SamplingClient sampler-0 [0 sampled]>" == repr(client)
    client.sample([1]).result(10)
    assert "<SamplingClient sampler-0 [1 sampled]>" == repr(client)
    client.close()
    assert "<SamplingClient sampler-0 [closed]>" == repr(client)
