"""TrainingClient: the operations of one model, in the order in which they are called."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import pickle
import subprocess
import sys
import textwrap
import threading
import weakref
from concurrent.futures import CancelledError, Future, as_completed, wait
from pathlib import Path

import numpy as np
import pytest

from tests.support.fake_server import (
    MODEL,
    URL,
    FakeServer,
    after,
    answer,
    blocked,
    datum,
    garbage,
    half_protobuf,
    logprobs_of,
    lost,
    not_yet_408,
    plugged_in,
    refused,
    reset,
    session,
    status,
    timeout,
    training,
    try_again,
)
from tests.support.fake_service import ByteTokenizer
from tinkex import errors, types
from tinkex.config import Patience
from tinkex.training import ClientSpec, TrainingClient

ADAM = types.AdamParams(learning_rate=1e-3)
CHECKPOINT = "tinker://s0:train:0/weights/best"


@pytest.fixture
def server():
    return FakeServer()


@pytest.fixture
def client(server):
    with training(server, base_model="tinkex/tiny") as made:
        yield made


def half_of(data, logprobs):
    """A loss of one's own with its gradient given: sum(lp) / 2."""
    return sum(lp.sum() for lp in logprobs) / 2, {}, [lp * 0 + 0.5 for lp in logprobs]


def steps(server):
    """What the server ran, without the model's name."""
    return [(seq_id, what) for _, seq_id, what in server.executed]


# Numbers.


def test_statement_1_numbers_are_contiguous_from_1_over_all_operations():
    """Four datums forced into two batches: 1, 2; the next step 3; the next save 4. (statement 1)"""
    server = FakeServer(features={"fwdbwd_max_chunk_len": 2})
    with training(server) as client:
        client.forward_backward([datum()] * 4, "cross_entropy")
        client.optim_step(ADAM)
        client.save_state("a").result(10)

    assert [
        (1, "forward_backward"),
        (2, "forward_backward"),
        (3, "optim_step"),
        (4, "save_weights"),
    ] == steps(server)


@pytest.mark.parametrize("count, batches", [(1, [1]), (1024, [1024]), (1025, [1024, 1])])
def test_statement_2_a_request_holds_1024_datums_at_most(client, server, count, batches):
    """1,024 tiny datums are one request, 1,025 are two. (statement 2)"""
    client.forward_backward([datum(1)] * count, "cross_entropy").result(20)

    assert batches == [len(body.data) for body in server.bodies("forward_backward")]


def of_bytes(n):
    """A datum estimated at *n* bytes: 4 a token, 8 a target."""
    return datum(*[1] * (n // 16))


@pytest.mark.parametrize(
    "sizes, batches",
    [
        ([3_000_000, 3_000_000], [1, 1]),
        ([2_500_000, 2_500_000], [2]),
        ([2_500_000, 2_500_000, 16], [2, 1]),
        ([6_000_000], [1]),
        ([6_000_000, 16], [1, 1]),
        ([16, 6_000_000, 16], [1, 1, 1]),
    ],
    ids=["too big together", "just fit", "one more", "statement 4", "and one", "between"],
)
def test_statements_3_and_4_a_request_holds_five_million_bytes_and_is_never_empty(
    client, server, sizes, batches
):
    """The limit is inclusive; a datum beyond it goes alone, wherever it stands.
    (statement 3, statement 4)"""
    client.forward([of_bytes(n) for n in sizes], "cross_entropy").result(20)

    assert batches == [len(body.data) for body in server.bodies("forward_backward")]


def test_the_server_s_own_limits_are_kept():
    server = FakeServer(features={"fwdbwd_max_chunk_bytes_count": 100})
    with training(server) as client:
        client.forward([datum(1, 2, 3)] * 3, "cross_entropy").result(10)

    assert [2, 1] == [len(body.data) for body in server.bodies("forward_backward")]


BAD = {
    "loss_fn": lambda c: c.forward_backward([datum()], "cross_entropie"),
    "loss_fn_config": lambda c: c.forward_backward([datum()], "ppo", {"clip": True}),
    "ttl": lambda c: c.save_state("a", ttl_seconds=-1),
    "name": lambda c: c.save_weights_for_sampler("../a"),
    "path": lambda c: c.load_state("weights/a"),
    "no data": lambda c: c.forward([], "cross_entropy"),
    "adam": lambda c: c.optim_step({"rate": 1}),
    "custom": lambda c: c.forward_backward_custom([datum()], "mse"),
}


@pytest.mark.parametrize("call", BAD.values(), ids=BAD)
def test_statement_5_what_can_be_seen_to_be_wrong_is_raised_here_and_uses_no_number(
    client, server, call
):
    """A number that is never sent would stop the model for ever. (statement 5)"""
    with pytest.raises((ValueError, TypeError)):
        call(client)
    client.optim_step(ADAM).result(10)

    assert [1] == server.seq_ids()


def test_statement_6_settings_of_a_loss_travel_as_numbers(client, server):
    """{"clip": 1, "x": " 0.5 "} is 1.0 and 0.5; booleans and lists are mistakes. (statement 6)"""
    data = [
        types.Datum(
            types.ModelInput.from_ints([1]),
            {"target_tokens": [2], "logprobs": [-1.0], "advantages": [1.0]},
        )
    ]
    client.forward_backward(data, "ppo", {"clip": 1, "x": " 0.5 "}).result(10)

    assert {"clip": 1.0, "x": 0.5} == server.bodies("forward_backward")[0].loss_fn_config
    for bad in (True, [1], None, "high", float("nan")):
        with pytest.raises(ValueError, match=r"loss_fn_config\['x'\] = .* is not a finite number"):
            client.forward_backward(data, "ppo", {"x": bad})


def test_statement_7_bodies_in_json_are_the_protocol_s():
    """forward_input, forward_backward_input, optimizer; a "type" only where there is one.
    (statement 7)"""
    server = FakeServer(features={"proto_write_fwdbwd": False})
    with training(server) as client:
        client.forward([datum()], "cross_entropy")
        client.forward_backward([datum()], "cross_entropy")
        client.load_state_with_optimizer(CHECKPOINT)
        client.load_state(CHECKPOINT).result(10)
    raw = [seen.raw for seen in server.seen("forward", "forward_backward", "load_weights")]

    assert b'"forward_input":' in raw[0] and b'"type":"forward' not in raw[0]
    assert b'"forward_backward_input":' in raw[1]
    assert [True, False] == [body["optimizer"] for body in server.bodies("load_weights")]
    assert "load_weights" == server.bodies("load_weights")[0]["type"]


def test_nulls_are_never_sent(client, server):
    """Several servers refuse them. (statement 24)"""
    client.optim_step(ADAM)
    client.save_state("a").result(10)

    assert all(b"null" not in seen.raw for seen in server.seen("optim_step", "save_weights"))


# Every operation.


def test_forward_backward_gives_log_probabilities_and_metrics(client):
    data = [datum(1, 2), datum(3, weights=[0.5])]
    output = client.forward_backward(data, "cross_entropy").result(10)

    assert isinstance(output, types.ForwardBackwardOutput)
    for one, expected in zip(output.loss_fn_outputs, data):
        np.testing.assert_array_equal(logprobs_of(expected), one["logprobs"].to_numpy())
    assert pytest.approx(output.loss) == sum(
        -(logprobs_of(d) * d.loss_fn_inputs["weights"].to_numpy()).sum() for d in data
    )


def test_forward_leaves_the_gradients_as_they_are(client, server):
    """In protobuf the two share an endpoint: one flag is between a look and a change."""
    client.forward([datum()], "cross_entropy").result(10)
    client.forward_backward([datum()], "cross_entropy").result(10)

    assert [True, False] == [body.forward_only for body in server.bodies("forward_backward")]


def test_results_of_several_batches_are_joined_in_order():
    """Whatever the order in which they come in."""
    server = FakeServer(features={"fwdbwd_max_chunk_len": 2}, not_yet=5, seed=3)
    data = [datum(i) for i in range(7)]
    with training(server) as client:
        output = client.forward_backward(data, "cross_entropy").result(10)
    got = [one["logprobs"].to_numpy() for one in output.loss_fn_outputs]

    np.testing.assert_array_equal([logprobs_of(d) for d in data], got)
    assert 7.0 == output.metrics["datums:sum"]


def test_statement_18_metrics_of_several_batches_are_joined_by_their_rule():
    """The rules themselves are batching.py's. (statement 18)"""
    server = FakeServer(features={"fwdbwd_max_chunk_len": 1})
    values = itertools.count(1)

    def result(seen):
        value = float(next(values))
        metrics = {"a:sum": value, "b:max": value, "loss": value, "c:unique": value}
        return types.ForwardBackwardOutput([{}], metrics)

    server.results["forward_backward"] = result
    with training(server) as client:
        output = client.forward_backward([datum()] * 2, "cross_entropy").result(10)

    assert {
        "a:sum": 3.0,
        "b:max": 2.0,
        "loss": 1.5,
        "c:unique": 1.0,
        "c:unique_2": 2.0,
    } == output.metrics


def test_a_single_batch_s_metrics_are_left_untouched(client, server):
    server.results["forward_backward"] = lambda seen: types.ForwardBackwardOutput(
        [], {"a:mean": 3.0, "odd:rule:hash_unordered": 7.0}
    )
    output = client.forward_backward([datum()], "cross_entropy").result(10)

    assert {"a:mean": 3.0, "odd:rule:hash_unordered": 7.0} == output.metrics


def test_optim_step_sends_the_parameters(client, server):
    params = types.AdamParams(3e-4, 0.8, 0.9, 1e-8, weight_decay=0.1, grad_clip_norm=1.0)
    response = client.optim_step(params).result(10)

    assert types.OptimStepResponse() == response
    assert {
        "model_id": MODEL,
        "seq_id": 1,
        "type": "optim_step",
        "adam_params": {
            "learning_rate": 3e-4,
            "beta1": 0.8,
            "beta2": 0.9,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "grad_clip_norm": 1.0,
        },
    } == server.bodies("optim_step")[0]


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.optim_step({"learning_rate": 0.5, "beta1": 0.8}),
        lambda c: c.optim_step(learning_rate=0.5, beta1=0.8),
        lambda c: c.optim_step(types.AdamParams(learning_rate=9.0, beta1=0.8), learning_rate=0.5),
    ],
    ids=["a dict", "keywords", "keywords over an object"],
)
def test_optim_step_takes_its_parameters_in_any_form(client, server, call):
    """types.AdamParams(learning_rate=...) is a lot to type at a prompt."""
    call(client).result(10)

    sent = server.bodies("optim_step")[0]["adam_params"]
    assert (0.5, 0.8, 0.95) == (sent["learning_rate"], sent["beta1"], sent["beta2"])


def test_a_step_without_a_gradient_warns(client, caplog):
    """Nothing was accumulated: most likely a forward_backward was forgotten."""
    client.forward_backward([datum()], "cross_entropy")
    client.optim_step(ADAM).result(10)
    assert "" == caplog.text

    client.optim_step(ADAM).result(10)

    assert "no forward_backward was called since the last step" in caplog.text


def test_decode_can_omit_special_tokens(client):
    options = {"load_fn": lambda identifier: ByteTokenizer()}

    assert "ab" == client.decode([97, 98, 257], skip_special_tokens=True, **options)


def test_save_state_gives_the_path_to_load_it_from(client, server):
    saved = client.save_state(
        "best", ttl_seconds=60, overwrite=True, user_metadata={"loss": 1.5}
    ).result(10)

    assert f"tinker://{MODEL}/weights/best" == saved.path
    assert {
        "model_id": MODEL,
        "seq_id": 1,
        "path": "best",
        "ttl_seconds": 60,
        "overwrite": True,
        "user_metadata": {"loss": 1.5},
        "type": "save_weights",
    } == server.bodies("save_weights")[0]


def test_what_is_kept_with_a_checkpoint_is_as_it_was_when_called(client, server):
    """Later changes to the caller's dict, or list, do not matter."""
    entered, release = threading.Event(), threading.Event()
    server.script("optim_step", blocked(entered, release))
    metadata, data = {"step": 1}, [datum(1)]
    client.optim_step(ADAM)
    client.save_state("a", user_metadata=metadata)
    client.forward(data, "cross_entropy")
    metadata["step"] = 2
    data.append(datum(2))
    release.set()
    client.close()

    assert {"step": 1} == server.bodies("save_weights")[0]["user_metadata"]
    assert 1 == len(server.bodies("forward_backward")[0].data)


@pytest.mark.parametrize("immediate", [(), ("save_weights", "load_weights")])
def test_statement_21_saving_and_loading_take_promises_and_immediate_answers(immediate):
    """Some servers answer small operations at once. (statement 21)"""
    with training(FakeServer(immediate=immediate)) as client:
        path = client.save_state("a").result(10).path
        assert path == client.load_state(path).result(10).path
        assert path == client.load_state_with_optimizer(path).result(10).path


@pytest.mark.parametrize("immediate", [(), ("save_weights_for_sampler",)])
def test_save_weights_for_sampler_has_a_typed_result(immediate):
    """Theirs is a raw map once it was polled for."""
    with training(FakeServer(immediate=immediate)) as client:
        saved = client.save_weights_for_sampler("a", ttl_seconds=5).result(10)

    expected = types.SaveWeightsForSamplerResponse(f"tinker://{MODEL}/sampler_weights/a")
    assert expected == saved


# Sampling clients.


def test_statement_20_a_named_save_opens_a_sampling_session_of_its_path(client, server):
    """One call for the user, two requests on the wire. (statement 20)"""
    sampler = client.save_weights_and_get_sampling_client("a").result(10)
    [body] = server.bodies("create_sampling_session")

    assert f"tinker://{MODEL}/sampler_weights/a" == body["model_path"] == sampler.model_path
    assert [3, 2, 1] == sampler.sample([1, 2, 3]).result(10).sequences[0].tokens


def test_statement_20_an_unnamed_save_is_a_sampling_session_already(client, server):
    """And works with the real SamplingClient, which theirs does not. (statement 20)"""
    first = client.save_weights_and_get_sampling_client_sync()
    second = client.save_weights_and_get_sampling_client_sync()

    assert [0, 1] == [
        b["sampling_session_seq_id"] for b in server.bodies("save_weights_for_sampler")
    ]
    assert [] == server.seen("create_sampling_session")
    assert ["sampler-0", "sampler-1"] == [s.sampling_session_id for s in (first, second)]
    assert [2, 1] == first.sample([1, 2]).result(10).sequences[0].tokens


def test_statement_20_an_answer_with_neither_is_an_error(client, server):
    """No path and no session: there is nothing to sample from. (statement 20)"""
    server.results["save_weights_for_sampler"] = lambda seen: {"type": "save"}

    with pytest.raises(errors.APIResponseValidationError, match="neither path nor"):
        client.save_weights_and_get_sampling_client_sync()


def test_all_sampling_sessions_of_a_session_share_their_numbers(client, server):
    """Three counters feed one field in the SDK we follow, so that they collide."""
    client.save_weights_and_get_sampling_client_sync()
    client.create_sampling_client("tinker://r/sampler_weights/x")
    client.save_weights_and_get_sampling_client_sync()
    numbers = [
        b["sampling_session_seq_id"]
        for b in server.bodies("save_weights_for_sampler", "create_sampling_session")
    ]

    assert [0, 1, 2] == numbers


def test_a_number_of_a_refused_unnamed_save_is_used_again(client, server):
    server.script("save_weights_for_sampler", status(402, {"detail": "no credit"}))
    with pytest.raises(errors.BillingError):
        client.save_weights_and_get_sampling_client_sync()

    assert "sampler-0" == client.save_weights_and_get_sampling_client_sync().sampling_session_id


def test_a_sampling_client_comes_although_its_training_client_was_closed_meanwhile(server):
    """The save was called before the close; its future keeps its promise."""
    entered, release = threading.Event(), threading.Event()
    with session(server) as s:
        client = TrainingClient(s, MODEL)
        server.script("retrieve_future", blocked(entered, release))
        future = client.save_weights_and_get_sampling_client("a")
        entered.wait(10)
        threading.Timer(0.05, release.set).start()
        client.close()

        assert future.result(0).model_path.endswith("/sampler_weights/a")


def test_create_sampling_client_has_a_future_twin(client):
    path = "tinker://r/sampler_weights/x"

    assert path == client.create_sampling_client(path).model_path
    assert path == client.create_sampling_client_async(path).result(10).model_path


# Lookups.


def test_get_info_is_asked_once(client, server):
    first, second = client.get_info(), client.get_info()

    assert first is second
    assert "tinkex/tiny" == first.base_model
    assert 1 == len(server.seen("get_info"))


def test_text_is_encoded_by_the_model_s_tokenizer(client, server):
    """One question about the model, however many texts: theirs asks twice for each."""
    ids = client.encode("hello there")

    assert "hello there" == client.decode(ids)
    assert types.ModelInput.from_text("hello there", client).to_ints() == ids
    assert 1 == len(server.seen("get_info"))


class Reversed:
    def encode(self, text):
        return [ord(c) for c in reversed(text)]

    def decode(self, ids):
        return "".join(chr(i) for i in reversed(ids))


def test_a_tokenizer_of_one_s_own_is_loaded_by_load_fn(client):
    loaded = []

    def load(identifier):
        loaded.append(identifier)
        return Reversed()

    assert [98, 97] == client.encode("ab", load_fn=load)
    assert "ab" == client.decode([98, 97], load_fn=load)
    assert ["tinkex/tiny"] == loaded


def test_load_fun_and_info_fun_are_other_names_of_load_fn_and_info_fn(client):
    """The Elixir SDK calls them so."""
    load, info = (lambda identifier: Reversed()), (lambda client: client.get_info())

    assert isinstance(client.get_tokenizer(load_fun=load, info_fun=info), Reversed)
    assert [98, 97] == client.encode("ab", load_fun=load)
    with pytest.raises(TypeError, match="load_fn and load_fun are the same argument"):
        client.get_tokenizer(load_fn=load, load_fun=load)


def test_info_fn_takes_the_place_of_the_server(client, server):
    info = types.GetInfoResponse("m", types.ModelData("org/model/variant", None, None))
    loaded = []
    client.get_tokenizer(info_fn=lambda c: info, load_fn=lambda i: loaded.append(i) or Reversed())

    assert ["org/model"] == loaded
    assert [] == server.seen("get_info")


def test_there_is_no_telemetry_unless_it_was_asked_for(client):
    assert client.get_telemetry() is None


# Order.


def test_statement_9_a_step_never_overtakes_the_custom_loss_called_before_it():
    """A thousand times, against a server that answers late and in any order. (statement 9)"""
    server = FakeServer(not_yet=1, seed=1)
    with training(server) as client:
        futures = []
        for _ in range(1000):
            futures.append(client.forward_backward_custom([datum()], half_of))
            futures.append(client.optim_step(ADAM))
        for future in futures:
            future.result(60)
    kinds = [what for _, what in steps(server)]

    assert ["forward", "forward_backward", "optim_step"] * 1000 == kinds
    assert list(range(1, 3001)) == server.seq_ids()


def test_statement_9_calls_of_several_threads_are_numbered_as_they_arrive():
    """Contiguous, ascending, and each thread's own in its own order. (statement 9)"""
    server = FakeServer(not_yet=2, seed=2)
    with training(server) as client:

        def loop(rate):
            for i in range(40):
                client.forward_backward([datum(rate)], "cross_entropy")
                client.optim_step(types.AdamParams(learning_rate=rate + i / 100)).result(60)

        threads = [threading.Thread(target=loop, args=(t,)) for t in range(1, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    rates = [body["adam_params"]["learning_rate"] for body in server.bodies("optim_step")]

    assert list(range(1, 481)) == server.seq_ids()
    for t in range(1, 7):
        mine = [rate for rate in rates if t <= rate < t + 1]
        assert [t + i / 100 for i in range(40)] == pytest.approx(mine)


def test_futures_may_be_awaited_in_any_order():
    server = FakeServer(not_yet=3, seed=5)
    with training(server) as client:
        futures = [client.optim_step(ADAM) for _ in range(50)]

        assert types.OptimStepResponse() == futures[-1].result(10)
        assert set(futures) == set(as_completed(futures, 10))


def test_the_same_script_works_with_await():
    async def script(client):
        backward = client.forward_backward([datum()], "cross_entropy")
        step = client.optim_step(ADAM)
        return await asyncio.gather(backward, step)

    with training(FakeServer(not_yet=2)) as client:
        backward, step = asyncio.run(script(client))

    assert backward.loss > 0
    assert types.OptimStepResponse() == step


def test_a_resend_repeats_its_number_and_runs_once(client, server):
    """seq_id is the idempotency key: the server knows the second for the first."""
    server.script("forward_backward", lost(), status(503), lost())
    server.script("optim_step", lost(), lost())
    client.forward_backward([datum()], "cross_entropy")
    client.optim_step(ADAM).result(10)

    assert [1, 1, 1, 1, 2, 2, 2] == server.seq_ids()
    assert [(1, "forward_backward"), (2, "optim_step")] == steps(server)
    assert 1 == len({seen.raw for seen in server.seen("forward_backward")})


def test_a_promise_that_the_server_has_lost_is_sent_again_under_its_number(client, server):
    server.script("retrieve_future", status(410, {"detail": "restarted"}))
    client.optim_step(ADAM).result(10)

    assert [1, 1] == server.seq_ids()
    assert [(1, "optim_step")] == steps(server)


# Failure.


def test_what_is_queued_behind_a_refusal_is_not_sent(client, server):
    """A step must not follow gradients that did not arrive."""
    entered, release = threading.Event(), threading.Event()
    server.script("optim_step", blocked(entered, release))
    server.script("forward_backward", *[status(422, {"detail": "no such loss"})] * 2)
    first = client.optim_step(ADAM)
    refused_one = client.forward_backward([datum()], "cross_entropy")
    behind = [client.optim_step(ADAM), client.save_state("a"), client.save_weights_for_sampler("b")]
    behind.append(client.save_weights_and_get_sampling_client("c"))
    behind.append(client.forward_backward_custom([datum()], half_of))
    release.set()

    assert first.result(10)
    for future in behind:
        with pytest.raises(errors.PriorOperationFailedError, match=r"422: no such loss\)\. Look"):
            future.result(10)
    with pytest.raises(errors.UnprocessableEntityError, match="no such loss"):
        refused_one.result(10)
    assert ["optim_step"] == [what for _, what in steps(server)]


def test_once_the_failure_was_delivered_the_client_works_again_with_the_next_number(client, server):
    server.script("forward_backward", *[status(422, {"detail": "no such loss"})] * 2)
    client.optim_step(ADAM).result(10)
    with pytest.raises(errors.UnprocessableEntityError):
        client.forward_backward([datum()], "cross_entropy").result(10)
    client.forward_backward([datum()], "cross_entropy")
    client.optim_step(ADAM).result(10)

    assert [(1, "optim_step"), (2, "forward_backward"), (3, "optim_step")] == steps(server)


def test_statement_10_when_the_second_of_three_batches_is_refused_the_third_is_not_sent():
    """The first counts, which the error names; the next number is free. (statement 10)"""
    server = FakeServer(features={"fwdbwd_max_chunk_len": 1, "proto_write_fwdbwd": True})
    with training(server) as client:
        server.script("forward_backward", lambda *a: a[3](), status(413, {"detail": "too large"}))
        future = client.forward_backward([datum(1), datum(2), datum(3)], "cross_entropy")
        step = client.optim_step(ADAM)

        with pytest.raises(errors.APIStatusError) as caught:
            future.result(10)
        assert (
            f"{URL}/api/v1/forward_backward answered 413: too large (1 part(s) before it were "
            "accepted, as seq_id 1; they took effect on the server.)" == str(caught.value)
        )
        with pytest.raises(errors.PriorOperationFailedError):
            step.result(10)
        assert [(1, "forward_backward")] == steps(server)
        client.optim_step(ADAM).result(10)

    assert [1, 2, 2] == server.seq_ids()
    assert [(1, "forward_backward"), (2, "optim_step")] == steps(server)


def test_a_batch_that_fails_is_known_before_the_ones_before_it_are_done():
    """Theirs waits for one after the other."""
    server = FakeServer(features={"fwdbwd_max_chunk_len": 1})
    entered, release = threading.Event(), threading.Event()

    def behaves(server, request, limits, behave):
        if b'forward_backward-0"' in request.body:
            return blocked(entered, release)(server, request, limits, behave)
        return answer({"error": "out of memory", "category": "server"})(
            server, request, limits, behave
        )

    server.always("retrieve_future", behaves)
    with training(server) as client:
        future = client.forward_backward([datum(), datum()], "cross_entropy")
        with pytest.raises(errors.RequestFailedError, match="part 2 of 2 failed on the server"):
            future.result(10)
        release.set()


def test_a_failure_on_the_server_says_what_failed_and_why(client, server):
    server.script("retrieve_future", answer({"error": "token 9 is too large", "category": "user"}))

    with pytest.raises(errors.RequestFailedError, match="forward_backward on s0:train:0 failed on"):
        client.forward_backward([datum()], "cross_entropy").result(10)


@pytest.mark.parametrize(
    "fault",
    [
        status(503),
        status(429, None, retry_after=3),
        reset(),
        lost(),
        timeout(),
        refused(),
        garbage(),
    ],
    ids=["503", "429", "reset", "lost", "timeout", "refused", "garbage"],
)
def test_an_established_client_gets_through_trouble_at_every_step(server, fault):
    """On the way out and on the way back, twice each."""
    with training(server) as client:
        for path in ("forward_backward", "optim_step", "save_weights", "retrieve_future"):
            server.script(path, fault, fault)
        client.forward_backward([datum()], "cross_entropy")
        client.optim_step(ADAM)
        client.save_state("a").result(20)

    assert [(1, "forward_backward"), (2, "optim_step"), (3, "save_weights")] == steps(server)


def test_an_established_client_survives_five_minutes_of_trouble(server):
    """Every path, everything at once, on a clock that only waiting moves."""
    faults = itertools.cycle(
        [status(503), status(429, None, retry_after=5), reset(), lost(), timeout(), half_protobuf()]
    )
    lock = threading.Lock()
    with training(server) as client:
        client.optim_step(ADAM).result(10)
        end = server.clock() + 300

        def weather(server, request, limits, behave):
            if server.clock() >= end:
                return behave()
            with lock:
                fault = next(faults)
            return fault(server, request, limits, behave)

        for path in ("optim_step", "retrieve_future"):
            server.always(path, weather)
        for _ in range(3):
            client.optim_step(ADAM).result(60)

    assert [(i, "optim_step") for i in range(1, 5)] == steps(server)


def test_when_nobody_knows_whether_a_lost_send_ran_the_client_does_not_go_on(client, server):
    """The next number might be taken for a repetition of it."""
    server.always("optim_step", status(503, {"message": "down for good"}))
    with pytest.raises(errors.InternalServerError, match="down for good"):
        client.optim_step(ADAM).result(20)
    server.always("optim_step", None)

    with pytest.raises(errors.PriorOperationFailedError, match="load the last checkpoint into a"):
        client.optim_step(ADAM).result(10)


def test_a_refused_resend_is_called_outcome_unknown(client, server):
    server.script("optim_step", lost(), *[status(409, {"detail": "seen before"})] * 4)

    with pytest.raises(errors.OutcomeUnknownError, match="may or may not have run"):
        client.optim_step(ADAM).result(10)


def test_poll_timeout_ends_the_waiting_and_says_that_it_may_still_run(client, server):
    server.always("retrieve_future", after(30, try_again()))

    with pytest.raises(errors.APITimeoutError, match="It may still run there; give a longer"):
        client.optim_step(ADAM, poll_timeout=100).result(10)


# Every future resolves.


@pytest.mark.parametrize("stage", ["worker", "encoder", "poller", "decoder"])
@pytest.mark.parametrize("problem", [RuntimeError("injected"), MemoryError("injected")], ids=repr)
def test_statement_31_an_exception_in_any_stage_ends_in_the_future(
    client, monkeypatch, stage, problem
):
    """Never in a hang. And what is called after it was seen, works. (statement 31)"""
    client.optim_step(ADAM).result(10)

    def broken(*args, **options):
        raise problem

    target = {
        "worker": "tinkex.training.batching.split",
        "encoder": "tinkex.runtime.session.wire.encode_request",
        "poller": "tinkex.runtime.polling.Poller.ask",
        "decoder": "tinkex.runtime.polling.wire.decode_result",
    }[stage]
    with monkeypatch.context() as patched:
        patched.setattr(target, broken)
        future = client.forward_backward([datum()], "cross_entropy")
        assert problem is future.exception(10)

    assert client.optim_step(ADAM).result(10)


def test_statement_31_a_callback_that_raises_does_no_harm(client, caplog):
    """It is the user's code, on our thread. (statement 31)"""
    future = client.optim_step(ADAM)
    future.add_done_callback(lambda _: 1 / 0)

    assert future.result(10)
    assert client.optim_step(ADAM).result(10)


def test_a_callback_may_call_the_client(client):
    """It runs on a thread of ours, which must not wait for itself."""
    second = []
    done = threading.Event()

    def callback(_):
        second.append(client.optim_step(ADAM))
        done.set()

    client.optim_step(ADAM).add_done_callback(callback)
    assert done.wait(10)

    assert second[0].result(10)


# A loss of one's own.


def test_statement_19_a_custom_loss_becomes_weights(client, server):
    """weights = -gradient, target_tokens kept, other inputs dropped, cross_entropy both ways.
    (statement 19)"""
    reward = types.TensorData(np.array([5.0], np.float32))
    data = [
        types.Datum(types.ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "reward": reward})
    ]
    calls = []

    def loss(data, logprobs):
        calls.append([d.loss_fn_inputs["reward"].to_numpy()[0] for d in data])
        return 7.0, {"mine": 3, "loss:sum:server": 1}, [np.array([0.25, -2.0], np.float32)]

    output = client.forward_backward_custom(data, loss).result(10)
    first, second = server.bodies("forward_backward")

    assert [[5.0]] == calls
    assert (True, False) == (first.forward_only, second.forward_only)
    assert ("cross_entropy", "cross_entropy") == (first.loss_fn, second.loss_fn)
    assert {"target_tokens"} == set(first.data[0].loss_fn_inputs)
    assert {"target_tokens", "weights"} == set(second.data[0].loss_fn_inputs)
    np.testing.assert_array_equal([-0.25, 2.0], second.data[0].loss_fn_inputs["weights"].to_numpy())
    assert 7.0 == output.loss
    assert 3.0 == output.metrics["mine"]
    np.testing.assert_array_equal(
        logprobs_of(data[0]), output.loss_fn_outputs[0]["logprobs"].to_numpy()
    )


def test_the_gradient_is_the_framework_s(client, server):
    torch = pytest.importorskip("torch")

    def loss(data, logprobs):
        assert all(isinstance(lp, torch.Tensor) for lp in logprobs)
        return (logprobs[0] ** 2).sum() + logprobs[1].sum(), {}

    data = [datum(1, 2), datum(3)]
    client.forward_backward_custom(data, loss).result(10)
    weights = [
        d.loss_fn_inputs["weights"].to_numpy() for d in server.bodies("forward_backward")[1].data
    ]

    np.testing.assert_allclose(-2 * logprobs_of(data[0]), weights[0], rtol=1e-6)
    np.testing.assert_allclose([-1.0], weights[1])


def test_a_custom_loss_over_several_batches_is_still_one_loss():
    server = FakeServer(features={"fwdbwd_max_chunk_len": 2})
    calls = []

    def loss(data, logprobs):
        calls.append(len(logprobs))
        return half_of(data, logprobs)

    with training(server) as client:
        client.forward_backward_custom([datum()] * 5, loss)
        client.optim_step(ADAM).result(10)

    assert [5] == calls
    assert ["forward"] * 3 + ["forward_backward"] * 3 + ["optim_step"] == [
        what for _, what in steps(server)
    ]


def test_the_exception_of_a_loss_reaches_the_future_unchanged_and_no_gradient_is_sent(
    client, server
):
    problem = ZeroDivisionError("in my loss")

    def loss(data, logprobs):
        raise problem

    future = client.forward_backward_custom([datum()], loss)
    step = client.optim_step(ADAM)

    assert problem is future.exception(10)
    with pytest.raises(errors.PriorOperationFailedError, match="ZeroDivisionError: in my loss"):
        step.result(10)
    assert [(1, "forward")] == steps(server)
    client.optim_step(ADAM).result(10)
    assert [(1, "forward"), (2, "optim_step")] == steps(server)


@pytest.mark.parametrize(
    "returned, words",
    [
        (3.0, "must return"),
        ((1.0, "metrics", [np.zeros(3)]), "metrics must be a dict"),
        ((1.0, {}, []), "0 gradients for 1 datums"),
        ((1.0, {}, [np.zeros(2)]), r"gradient of datum 0 has shape \[2\]"),
        ((1.0, {}, [np.array([0.0, np.nan, 0.0])]), "is nan at position 1 of datum 0; nothing"),
        ((1.0, {"x": "high"}, [np.zeros(3)]), "metric 'x' is not a number"),
    ],
)
def test_a_loss_that_returns_what_is_not_one_fails_with_the_reason(client, server, returned, words):
    with pytest.raises((ValueError, TypeError), match=words):
        client.forward_backward_custom([datum()], lambda d, lp: returned).result(10)
    assert [(1, "forward")] == steps(server)


def test_a_server_that_gives_no_log_probabilities_is_told_so(client, server):
    server.results["forward_backward"] = lambda seen: types.ForwardBackwardOutput(
        [{"other": types.TensorData([1.0])}], {}
    )

    with pytest.raises(errors.APIResponseValidationError, match="no logprobs for datum 0"):
        client.forward_backward_custom([datum()], half_of).result(10)


def test_a_custom_loss_has_its_poll_timeout_for_both_passes(client, server):
    server.always("retrieve_future", after(30, try_again()))

    with pytest.raises(errors.APITimeoutError):
        client.forward_backward_custom([datum()], half_of, poll_timeout=60).result(10)


# Waiting is reported.


def pauses(caplog):
    return [r.getMessage() for r in caplog.records if "paused" in r.getMessage()]


@pytest.mark.parametrize(
    "state, reason, text",
    [
        ("paused_rate_limit", None, "concurrent training clients rate limit hit"),
        ("paused_capacity", None, "Tinker backend is running short on capacity, please wait"),
        ("paused_capacity", "node 7 is being replaced", "node 7 is being replaced"),
        ("resting", None, "unknown"),
    ],
)
@pytest.mark.parametrize("where", ["try_again", "408", "429 on a poll", "429 on a submit"])
def test_statement_12_a_pause_is_told_with_its_reason(
    client, server, caplog, state, reason, text, where
):
    """From everywhere a server may say it; its own words win. (statement 12)"""
    body = {"queue_state": state, "queue_state_reason": reason}
    path, fault = {
        "try_again": ("retrieve_future", try_again(state, reason)),
        "408": ("retrieve_future", not_yet_408(state, reason)),
        "429 on a poll": ("retrieve_future", status(429, body)),
        "429 on a submit": ("optim_step", status(429, body)),
    }[where]
    server.script(path, fault)
    client.optim_step(ADAM).result(10)

    assert [f"Training is paused for {MODEL}. Reason: {text}"] == pauses(caplog)


def test_statement_12_it_is_told_once_a_minute_for_each_model(client, server, caplog):
    """A pause of an hour is sixty lines, not a thousand. (statement 12)"""

    def paused():
        server.script("retrieve_future", try_again("paused_capacity"), try_again("active"))
        client.optim_step(ADAM).result(10)
        return len(pauses(caplog))

    assert [1, 1, 1] == [paused() for _ in range(3)]
    server.clock.sleep(60)
    assert 2 == paused()


def test_an_observer_of_one_s_own_takes_the_place_of_the_log(server, caplog):
    told = []
    with training(server, queue_state_observer=lambda *state: told.append(state)) as client:
        server.script("retrieve_future", try_again("paused_capacity", "full"), try_again("active"))
        client.optim_step(ADAM).result(10)

    assert [("paused_capacity", "full"), ("active", None)] == told
    assert [] == pauses(caplog)


def test_statement_31_an_observer_that_raises_is_only_logged(server, caplog):
    """From polls and from refusals alike. (statement 31)"""
    with training(server, queue_state_observer=lambda *state: 1 / 0) as client:
        server.script("retrieve_future", try_again("paused_capacity"))
        server.script("optim_step", status(429, {"queue_state": "paused_capacity"}))

        assert client.optim_step(ADAM).result(10)
    assert "a queue state observer raised" in caplog.text


def test_a_long_wait_is_told_by_name(client, server):
    lines = []

    def look(server, request, limits, behave):
        lines.append(client._session.transport.waits.report())
        return behave()

    server.script("retrieve_future", status(503), after(12, look))
    client.forward_backward([datum()], "cross_entropy").result(10)

    [line] = [line for line in lines if line]
    assert "for forward_backward on s0:train:0" in line
    assert "1 retries" in line


def test_its_repr_says_how_far_it_is(client, server):
    entered, release = threading.Event(), threading.Event()
    server.script("optim_step", lambda *a: a[3](), blocked(entered, release))
    server.always("retrieve_future", pending_until(release))
    for _ in range(5):
        client.optim_step(ADAM)
    entered.wait(10)

    assert f"<TrainingClient {MODEL} [3 queued, 1 in flight]>" == repr(client)
    release.set()
    client.close()
    assert f"<TrainingClient {MODEL} [the client of model {MODEL} is closed]>" == repr(client)


def pending_until(release):
    return lambda server, request, limits, behave: blocked(threading.Event(), release)(
        server, request, limits, behave
    )


# Beginning.


def test_create_makes_a_model_in_the_session(server):
    lora = types.LoraConfig(rank=8, seed=3, train_mlp=False)
    with session(server) as s:
        client = TrainingClient.create(s, "tiny", lora, user_metadata={"run": "a"})

    assert "s0:train:0" == client.model_id
    assert {
        "session_id": "s0",
        "model_seq_id": 0,
        "base_model": "tiny",
        "lora_config": {
            "rank": 8,
            "seed": 3,
            "train_mlp": False,
            "train_attn": True,
        },
        "user_metadata": {"run": "a"},
        "type": "create_model",
    } == server.bodies("create_model")[0]


def test_models_of_a_session_are_numbered_from_0(server):
    with session(server) as s:
        made = [TrainingClient.create(s, "tiny", types.LoraConfig()) for _ in range(3)]

    assert ["s0:train:0", "s0:train:1", "s0:train:2"] == [c.model_id for c in made]


@pytest.mark.parametrize(
    "fault, numbers",
    [
        (status(400, {"detail": "no such base model"}), [0, 0]),
        (refused(), [0, 0]),
        (lost(), [0, 1]),
    ],
    ids=["refused", "no connection", "outcome unknown"],
)
def test_a_number_is_used_again_when_its_model_was_surely_not_made(server, fault, numbers):
    with session(server) as s:
        server.always("create_model", fault)
        with pytest.raises(errors.TinkexError):
            TrainingClient.create(s, "tiny", types.LoraConfig())
        server.always("create_model", None)
        client = TrainingClient.create(s, "tiny", types.LoraConfig())

    assert f"s0:train:{numbers[1]}" == client.model_id


def test_a_number_whose_model_was_accepted_and_then_failed_is_not_used_again(server):
    """Servers know a request by its number: sent again, it would be that failed one for ever."""
    with session(server) as s:
        server.script("retrieve_future", answer({"error": "no such model", "category": "user"}))
        with pytest.raises(errors.RequestFailedError, match="create_model of typo failed on the"):
            TrainingClient.create(s, "typo", types.LoraConfig())

        assert "s0:train:1" == TrainingClient.create(s, "tiny", types.LoraConfig()).model_id


@pytest.mark.parametrize(
    "reply",
    [answer({}), answer({"ok": True}), answer({"model_id": 5})],
    ids=["empty", "something else", "wrong type"],
)
def test_statement_8_a_model_without_an_id_is_a_clear_error(server, reply):
    """Within four tries, naming the endpoint; not a KeyError. (statement 8)"""
    server.always("create_model", reply)

    with (
        session(server) as s,
        pytest.raises(errors.APIResponseValidationError, match="create_model"),
    ):
        TrainingClient.create(s, "tiny", types.LoraConfig())


def test_an_immediate_model_is_a_model():
    with session(FakeServer(immediate={"create_model"})) as s:
        assert "s0:train:0" == TrainingClient.create(s, "tiny", types.LoraConfig()).model_id


def test_start_creates_a_model_in_a_session_of_its_own(server, monkeypatch):
    plugged_in(monkeypatch, server)
    with TrainingClient.start("tiny", lora_config=types.LoraConfig(rank=4), name="mine") as client:
        client.optim_step(ADAM).result(10)
        assert "<TrainingClient mine [0 queued, 0 in flight]>" == repr(client)

    assert 4 == server.bodies("create_model")[0]["lora_config"]["rank"]
    assert {"type": "success"} == server.bodies("sessions/s0/finish")[0]["reason"]


def test_statement_8_start_with_a_model_id_attaches_to_it(server, monkeypatch):
    """Nothing is created; the numbers continue after the last one that was sent. (statement 8)"""
    plugged_in(monkeypatch, server)
    server._next[MODEL] = 8
    with TrainingClient.start(model_id=MODEL, session_id="s0", seq_id=7) as client:
        client.optim_step(ADAM).result(10)

    assert [8] == server.seq_ids()
    assert [] == server.seen("create_model", "create_session", "sessions/s0/finish")


def test_a_start_that_fails_ends_its_session(server, monkeypatch):
    plugged_in(monkeypatch, server)
    server.always("create_model", status(400, {"detail": "no such base model"}))

    with pytest.raises(errors.BadRequestError):
        TrainingClient.start("typo")
    assert {"type": "errored"} == server.bodies("sessions/s0/finish")[0]["reason"]


def test_a_spec_is_a_recipe_for_a_supervisor(server, monkeypatch):
    """Frozen, picklable, without secrets; temporary, and five seconds to end."""
    plugged_in(monkeypatch, server)
    spec = TrainingClient.spec("tiny", lora_config=types.LoraConfig(rank=4), name="mine")
    copy = pickle.loads(pickle.dumps(spec))

    assert spec == copy
    assert ("temporary", 5.0) == (spec.restart, spec.shutdown)
    with copy.start() as client:
        assert "mine" == client.name
    assert 4 == server.bodies("create_model")[0]["lora_config"]["rank"]
    with pytest.raises(AttributeError):
        spec.restart = "permanent"


def test_a_spec_holds_no_secret_and_nothing_that_cannot_travel():
    with pytest.raises(ValueError, match="takes no api_key; set TINKER_API_KEY where"):
        TrainingClient.spec("tiny", api_key="tml-secret")
    with pytest.raises(TypeError, match="learning_rate is not an option of"):
        TrainingClient.spec("tiny", learning_rate=1)
    with pytest.raises(ValueError, match="cannot be pickled"):
        TrainingClient.spec("tiny", queue_state_observer=lambda *state: None)
    with pytest.raises(ValueError, match="base_model is required"):
        TrainingClient.spec()
    assert isinstance(TrainingClient.spec(model_id="m"), ClientSpec)


# Ending.


def test_unload_model_ends_the_model_after_what_was_called_before(client, server):
    step = client.optim_step(ADAM)
    unloaded = client.unload_model()

    assert MODEL == unloaded.result(10).model_id
    assert step.done()
    order = [s.path for s in server.requests if s.path in ("optim_step", "unload_model")]
    assert ["optim_step", "unload_model"] == order


@pytest.mark.parametrize("owns_session", [True, False])
def test_unload_model_ends_the_session_that_is_the_client_s_own(server, owns_session):
    with session(server) as s:
        client = TrainingClient(s, MODEL, owns_session=owns_session)
        client.unload_model().result(10)

        assert owns_session == s.is_closed == bool(server.seen("sessions/s0/finish"))
        client.close()


@pytest.mark.parametrize("when", ["before it is known", "after"])
def test_what_is_called_after_unload_model_says_so_and_is_not_sent(client, server, when):
    entered, release = threading.Event(), threading.Event()
    server.script("unload_model", blocked(entered, release))
    unloaded = client.unload_model()
    if when == "after":
        release.set()
        unloaded.result(10)
    try:
        futures = [client.optim_step(ADAM), client.forward_backward_custom([datum()], half_of)]
    except errors.ClientClosedError as exc:
        assert f"optim_step on {MODEL} was not sent: model {MODEL} was unloaded." == str(exc)
        futures = []
    release.set()

    for future in futures:
        with pytest.raises(errors.TinkexError, match="was unloaded"):
            future.result(10)
    assert [] == server.seen("optim_step", "forward_backward")
    with pytest.raises(errors.ClientClosedError, match="was unloaded"):
        client.get_info()


@pytest.mark.parametrize("reply", [status(204), answer({})])
def test_an_empty_answer_to_unload_model_is_a_success(client, server, reply):
    server.script("unload_model", reply)

    assert types.UnloadModelResponse() == client.unload_model().result(10)


def test_a_server_without_unload_model_is_told_as_such_and_the_client_goes_on(client, server):
    """Production answers 404."""
    server.lacks.add("unload_model")

    with pytest.raises(errors.NotOfferedError, match="this server does not offer unload_model"):
        client.unload_model().result(10)
    assert client.optim_step(ADAM).result(10)


def test_close_sends_what_is_queued(server):
    entered, release = threading.Event(), threading.Event()
    with session(server) as s:
        client = TrainingClient(s, MODEL)
        server.script("optim_step", blocked(entered, release))
        futures = [client.optim_step(ADAM) for _ in range(20)]
        entered.wait(10)
        threading.Timer(0.01, release.set).start()
        client.close()

        assert all(f.result(10) for f in futures)
    assert list(range(1, 21)) == server.seq_ids()


def test_close_with_cancel_sends_nothing_more(client, server):
    entered, release = threading.Event(), threading.Event()
    server.script("optim_step", blocked(entered, release))
    first = client.optim_step(ADAM)
    behind = [client.optim_step(ADAM) for _ in range(5)]
    entered.wait(10)
    threading.Timer(0.01, release.set).start()
    client.close(cancel=True)

    assert first.result(10)
    assert all(f.cancelled() for f in behind)
    with pytest.raises(CancelledError):
        behind[0].result()
    assert [1] == server.seq_ids()


def test_close_is_idempotent_and_later_calls_say_that_it_is_closed(client, server):
    client.close()
    client.close(cancel=True)
    client.close(timeout=0)

    for call in (
        lambda: client.optim_step(ADAM),
        lambda: client.forward_backward([datum()], "cross_entropy"),
        lambda: client.forward_backward_custom([datum()], half_of),
        lambda: client.save_weights_and_get_sampling_client(),
        lambda: client.create_sampling_client("tinker://r/sampler_weights/x"),
        lambda: client.unload_model(),
        lambda: client.get_info(),
    ):
        with pytest.raises(errors.ClientClosedError, match=r"was not sent: the client of model"):
            call()
    assert [] == server.seq_ids()


def in_time(seconds, function, *args, **kwargs):
    """Call *function* on a thread that does not hold up this test if it hangs."""
    future = Future()

    def call():
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=call, daemon=True).start()
    return future.result(seconds)


@pytest.mark.parametrize("owns_session", [False, True])
def test_close_never_blocks_longer_than_its_timeout(server, owns_session):
    """The server hangs, in everything."""
    entered, release = threading.Event(), threading.Event()
    with session(server) as s:
        client = TrainingClient(s, MODEL, owns_session=owns_session)
        server.script("optim_step", blocked(entered, release))
        server.always("sessions/s0/finish", blocked(threading.Event(), release))
        first, second = client.optim_step(ADAM), client.optim_step(ADAM)
        entered.wait(10)
        with pytest.raises(errors.ClientClosedError, match=r"2 operations \(1 not sent, 1 in prog"):
            in_time(5, client.close, timeout=0.1)

        assert second.done()
        release.set()
        assert wait([first], 10).done


def test_close_of_a_client_with_its_own_session_waits_for_what_is_in_flight(server, monkeypatch):
    plugged_in(monkeypatch, server)
    server.not_yet = 3
    with TrainingClient.start("tiny") as client:
        futures = [client.optim_step(ADAM) for _ in range(5)]

    assert all(f.result(10) for f in futures)


def test_leaving_a_with_block_sends_what_is_queued(server):
    with session(server) as s:
        with TrainingClient(s, MODEL) as client:
            futures = [client.optim_step(ADAM) for _ in range(10)]

        assert all(f.result(10) for f in futures)


def test_leaving_a_with_block_by_an_exception_cancels(server):
    """After an error the next steps must not be applied."""
    entered, release = threading.Event(), threading.Event()
    server.script("optim_step", blocked(entered, release))
    with session(server) as s:
        with pytest.raises(KeyboardInterrupt), TrainingClient(s, MODEL) as client:
            client.optim_step(ADAM)
            behind = client.optim_step(ADAM)
            entered.wait(10)
            threading.Timer(0.01, release.set).start()
            raise KeyboardInterrupt

        assert behind.cancelled()
    assert [1] == server.seq_ids()


def test_statement_30_closing_a_client_leaves_its_siblings_and_the_session_alive(
    server, monkeypatch
):
    """Theirs takes the telemetry of the whole service with it. (statement 30)"""
    monkeypatch.setattr("tinkex.runtime.telemetry.INTERVAL", 0.01)
    with session(server, telemetry=True) as s:
        one, two = TrainingClient(s, "a"), TrainingClient(s, "b")
        sampler = two.save_weights_and_get_sampling_client_sync()
        reporter = two.get_telemetry()
        one.close()

        assert two.optim_step(ADAM).result(10)
        assert sampler.sample([1]).result(10)
        assert two.get_telemetry() is reporter is not None
        assert reporter.log("SOMETHING")
        reporter.flush()
        assert [] == server.seen("sessions/s0/finish")
        two.close()
    sent = [e["event"] for b in server.bodies("telemetry") for e in b["events"]]
    assert "SOMETHING" in sent


def test_a_client_ends_its_thread(server):
    with session(server) as s:
        with TrainingClient(s, MODEL, name="short-lived") as client:
            client.optim_step(ADAM).result(10)

        assert "tinkex-short-lived" not in {t.name for t in threading.enumerate()}


def test_closing_the_session_ends_its_clients(server):
    entered, release = threading.Event(), threading.Event()
    server.script("optim_step", blocked(entered, release))
    with session(server) as s:
        client = TrainingClient(s, MODEL, name="of-a-session")
        first, behind = client.optim_step(ADAM), client.optim_step(ADAM)
        entered.wait(10)
    release.set()

    with pytest.raises(errors.ClientClosedError):
        first.result(10)
    with pytest.raises(errors.ClientClosedError):
        behind.result(10)
    assert [1] == server.seq_ids()


def test_a_client_that_nobody_holds_any_more_is_not_kept_alive_by_the_session(server):
    with session(server) as s:
        TrainingClient(s, MODEL)
        gc.collect()

        assert 0 == len(s.dependents)


# Failures that the caller has not seen.


def fail_unseen(client, server, times=1):
    """Have *times* batches fail on the server; the caller looks at none of them."""
    server.script("retrieve_future", *[answer({"error": "no memory"})] * times)
    wait([client.forward_backward([datum()], "cross_entropy") for _ in range(times)], 10)


def messages(caplog):
    return [(r.levelname, r.getMessage()) for r in caplog.records]


UNSEEN = "{} failed, and result() was not called: {}forward_backward on {} failed on"


def test_a_failure_that_is_not_looked_at_is_logged_when_the_next_operation_is_done(
    client, server, caplog
):
    """As asyncio does it. By then the caller could have seen it; and once is enough."""
    fail_unseen(client, server)
    client.optim_step(ADAM).result(10)
    client.optim_step(ADAM)
    client.close()

    [(level, message)] = [m for m in messages(caplog) if "result()" in m[1]]
    assert "ERROR" == level
    assert message.startswith(UNSEEN.format("1 operation", "", MODEL))
    assert "no memory" in message


def test_a_failure_that_the_caller_has_seen_or_waits_for_is_not_logged(client, server, caplog):
    server.script("retrieve_future", *[answer({"error": "no memory"})] * 2)
    first = client.forward_backward([datum()], "cross_entropy")
    with pytest.raises(errors.RequestFailedError):
        first.result(10)
    second = client.forward_backward([datum()], "cross_entropy")
    assert isinstance(second.exception(10), errors.RequestFailedError)
    client.save_state("a").result(10)
    client.close()

    assert [] == messages(caplog)


def test_a_save_after_unseen_failures_warns(client, server, caplog):
    """Four batches that failed, then a save that succeeds: a checkpoint of nothing."""
    fail_unseen(client, server, 4)
    client.save_state("untrained")
    client.close()
    client.close()

    [warning] = [text for level, text in messages(caplog) if level == "WARNING"]
    assert warning.startswith(
        f"save_state('untrained') of {MODEL} succeeded, but 4 operations before it failed: "
    )
    assert "no memory" in warning


def test_a_failure_is_logged_at_the_latest_when_the_client_closes(server, caplog):
    with training(server) as client:
        fail_unseen(client, server)

    [(level, message)] = messages(caplog)
    assert ("ERROR", True) == (level, "no memory" in message)


def test_a_failed_future_is_not_kept_after_it_was_logged(client, server):
    """A run of a million failures must not fill the memory."""
    server.script("retrieve_future", answer({"error": "no memory"}))
    alive = weakref.ref(client.forward_backward([datum()], "cross_entropy"))
    client.optim_step(ADAM).result(10)
    client.optim_step(ADAM).result(10)
    gc.collect()

    assert alive() is None


# Processes.

PROGRAM = """
import threading, sys, os
sys.path.insert(0, {root!r})
from tests.support import fake_server
from tinkex import types
server = fake_server.FakeServer()
entered, release = threading.Event(), threading.Event()
"""


def run(program, *, seconds=15):
    code = PROGRAM.format(root=str(Path(__file__).parents[1])) + textwrap.dedent(program)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds
    )


def test_after_a_fork_the_child_says_that_the_client_must_be_made_anew():
    """Its threads are not there; without the check the future would never resolve."""
    done = run(
        """
        with fake_server.training(server) as client:
            client.optim_step(types.AdamParams()).result(10)
            sampler = client.save_weights_and_get_sampling_client_sync()
            calls = {
                "optim_step": lambda: client.optim_step(types.AdamParams()),
                "custom": lambda: client.forward_backward_custom([fake_server.datum()], max),
                "sampler": client.save_weights_and_get_sampling_client,
                "info": client.get_info,
                "sample": lambda: sampler.sample([1]),
            }
            pid = os.fork()
            if pid == 0:
                for name, call in calls.items():
                    try:
                        call()
                        print(name, "returned")
                    except Exception as exc:
                        print(name, type(exc).__name__, "Create a new client here" in str(exc))
                client.close()
                sys.stdout.flush()
                os._exit(0)
            print(os.waitpid(pid, 0)[1])
            print("parent", client.optim_step(types.AdamParams()).result(10))
        """
    )

    assert [
        *[f"{name} ClientClosedError True" for name in ("optim_step", "custom", "sampler")],
        *[f"{name} ClientClosedError True" for name in ("info", "sample")],
        "0",
        "parent OptimStepResponse(metrics={})",
    ] == done.stdout.splitlines(), done.stderr


def test_after_a_fork_the_child_does_not_wait_for_its_parent_s_results():
    """No thread polls there: the wait would never end."""
    done = run(
        """
        import asyncio
        server.always("retrieve_future", fake_server.blocked(entered, release))
        with fake_server.training(server) as client:
            future = client.optim_step(types.AdamParams())
            entered.wait(10)
            pid = os.fork()
            if pid == 0:
                for wait in (lambda: future.result(5), lambda: asyncio.run(future.result_async())):
                    try:
                        wait()
                    except RuntimeError as exc:
                        print("is a fork of it and cannot receive the result" in str(exc))
                sys.stdout.flush()
                os._exit(0)
            print(os.waitpid(pid, 0)[1])
            release.set()
            print(future.result(10))
        """
    )

    assert ["True", "True", "0", "OptimStepResponse(metrics={})"] == done.stdout.splitlines(), (
        done.stderr
    )


def test_ctrl_c_gets_through_while_a_result_is_awaited():
    done = run(
        """
        import signal, _thread
        server.always("retrieve_future", fake_server.blocked(entered, release))
        with fake_server.session(server) as s:
            client = fake_server.TrainingClient(s, "m1")
            called = threading.Event()
            threading.Thread(
                target=lambda: (
                    called.wait(10), entered.wait(10), os.kill(os.getpid(), signal.SIGINT)
                )
            ).start()
            future = client.optim_step(types.AdamParams())
            try:
                called.set()
                future.result()
            except KeyboardInterrupt:
                print("interrupted", future.done())
                release.set()
        """
    )

    assert "interrupted False" == done.stdout.strip(), done.stderr


def test_nothing_is_logged_in_good_weather(client, caplog):
    caplog.set_level(logging.INFO)
    client.forward_backward([datum()], "cross_entropy")
    client.optim_step(ADAM).result(10)

    assert [] == caplog.records


def test_patience_is_the_caller_s(server, monkeypatch):
    plugged_in(monkeypatch, server)
    with TrainingClient.start("tiny", patience=Patience(request=7.0)) as client:
        client.optim_step(ADAM).result(10)

    assert 7.0 == server.seen("optim_step")[0].timeout[1]


def test_both_dialects_train_alike():
    outputs = []
    for protobuf in (True, False):
        with training(FakeServer(protobuf=protobuf, not_yet=1)) as client:
            outputs.append(
                client.forward_backward([datum(1, 2), datum(3)], "cross_entropy").result(10)
            )

    assert outputs[0].loss_fn_outputs == outputs[1].loss_fn_outputs
    assert outputs[0].metrics == outputs[1].metrics
