"""Recorded samples: kept for a day, and held against the provenance of training data."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import tinkex
from tinkex import errors, types
from tinkex.server import recorded
from tinkex.server.app import LocalServer
from tinkex.server.home import Home
from tinkex.server.http_errors import Refusal
from tinkex.server.store import Store

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with LocalServer(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture
def service(server):
    with tinkex.ServiceClient(server.url, "tml-any") as made:
        yield made


@pytest.fixture
def training(service):
    return service.create_lora_training_client("tiny", rank=2, seed=1)


def sampled(training, n=2):
    sampler = training.save_weights_and_get_sampling_client(record_stability_info=True)
    return sampler.sample(PROMPT, n, max_tokens=4, stop=[], seed=1).result(60).sequences


def datum_of(sequence, *, prompt=PROMPT, spans_of=None):
    """The sequence as the official recipes train on it: prompt and sample, shifted by one."""
    name = spans_of or sequence.sequence_id
    tokens = [*prompt, *sequence.tokens]
    q = np.r_[np.zeros(len(prompt) - 1), sequence.logprobs].astype(np.float32)
    datum = types.Datum(
        types.ModelInput.from_ints(tokens[:-1]),
        {"target_tokens": tokens[1:], "logprobs": q, "advantages": np.ones_like(q)},
    )
    of_prompt, of_sample = types.PromptProvenanceSpan, types.SampledProvenanceSpan
    return datum.with_provenance(
        model_input=[
            of_prompt(sequence_id=name, length=len(prompt)),
            of_sample(sequence_id=name, length=len(sequence) - 1),
        ],
        loss_fn_inputs=[
            of_prompt(sequence_id=name, offset=1, length=len(prompt) - 1),
            of_sample(sequence_id=name, length=len(sequence)),
        ],
    )


@pytest.mark.parametrize("loss_fn", ["ppo", "importance_sampling", "cispo"])
def test_training_data_says_where_it_came_from(training, loss_fn):
    """The loss is the same with provenance and without."""
    data = [datum_of(sequence) for sequence in sampled(training)]
    bare = [types.Datum(d.model_input, d.loss_fn_inputs) for d in data]

    expected = training.forward(bare, loss_fn).result().loss
    assert expected == training.forward(data, loss_fn).result().loss
    assert training.forward_backward(data, loss_fn).result().loss == expected


def test_other_tokens_than_were_sampled_are_refused_with_their_place(training):
    first, second = sampled(training)
    assert first.tokens != second.tokens

    with pytest.raises(errors.TinkexError, match=r"data\[1\].model_input holds other tokens"):
        training.forward_backward(
            [datum_of(first), datum_of(second, spans_of=first.sequence_id)], "ppo"
        ).result()
    with pytest.raises(errors.TinkexError, match="offset 0, length 3"):
        training.forward_backward([datum_of(first, prompt=[5, 6, 8])], "ppo").result()
    assert training.forward([datum_of(first)], "ppo").result()  # the model trains on


def test_targets_in_the_prompt_may_be_anything(training):
    """The official recipes put zeros there, for nothing is learned at these positions."""
    [sequence, _] = sampled(training)
    datum = datum_of(sequence)
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy().copy()
    targets[: len(PROMPT) - 1] = 0
    inputs = {**datum.loss_fn_inputs, "target_tokens": targets}

    assert training.forward([dataclasses.replace(datum, loss_fn_inputs=inputs)], "ppo").result()
    targets[-1] += 1
    wrong = {**datum.loss_fn_inputs, "target_tokens": targets}
    with pytest.raises(errors.TinkexError, match="target_tokens holds other tokens"):
        training.forward([dataclasses.replace(datum, loss_fn_inputs=wrong)], "ppo").result()


def test_a_sequence_of_another_session_is_refused(server, training):
    [sequence, _] = sampled(training)
    with tinkex.ServiceClient(server.url, "tml-any") as other:
        client = other.create_lora_training_client("tiny", rank=2, seed=1)
        with pytest.raises(errors.TinkexError, match="was sampled in another session"):
            client.forward_backward([datum_of(sequence)], "ppo").result()


def test_a_sequence_that_was_not_recorded_is_taken_as_it_is(training):
    """Losses other than stable_reinforce need no record; recipes name their samples anyway."""
    sampler = training.save_weights_and_get_sampling_client()
    [sequence] = sampler.sample(PROMPT, 1, max_tokens=3, stop=[]).result(60).sequences

    assert training.forward_backward([datum_of(sequence)], "ppo").result()


def test_stable_reinforce_is_refused_with_the_losses_to_use(training):
    with pytest.raises(errors.RequestFailedError, match=r"formula is not published; .* ppo"):
        training.forward_backward([datum_of(sampled(training)[0])], "stable_reinforce").result()


def test_a_record_is_kept_for_a_day_after_its_last_use(tmp_path):
    now = [1000.0]
    store = Store(Home.open(tmp_path), now=lambda: now[0])
    response = types.SampleResponse([types.SampledSequence([8, 9], [-1.0, -2.0], "length", "s:0")])
    prompt = types.ModelInput.from_ints(PROMPT)
    wrong = datum_of(types.SampledSequence([8, 10], [0.0, 0.0], "length", "s:0"))
    right = datum_of(types.SampledSequence([8, 9], [0.0, 0.0], "length", "s:0"))
    store.recorded.add("me", "session", ["s:0"], prompt, response)

    now[0] += recorded.KEPT_SECONDS - 1
    store.recorded.check("me", "session", [right])  # restarts the day
    now[0] += recorded.KEPT_SECONDS - 1
    store.recorded.delete_expired()
    with pytest.raises(Refusal, match="holds other tokens"):
        store.recorded.check("me", "session", [wrong])
    with pytest.raises(Refusal, match="another session"):
        store.recorded.check("you", "session", [right])
    now[0] += recorded.KEPT_SECONDS + 1
    store.recorded.check("me", "session", [wrong])  # nothing is known of it any more
    store.recorded.delete_expired()
    store.close()


def test_inflight_weights_follow_the_model_and_a_snapshot_does_not(training):
    """Each save replaces the weights of all inflight clients; a snapshot stays as it was."""
    snapshot = training.save_weights_and_get_sampling_client().result()
    first = training.save_weights_and_get_sampling_client(kind="inflight").result()
    before = first.compute_logprobs([5, 6, 7]).result()
    assert before == snapshot.compute_logprobs([5, 6, 7]).result()
    datum = types.Datum(types.ModelInput.from_ints([5, 6]), {"target_tokens": [6, 7]})
    training.forward_backward([datum], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=0.1)).result()
    assert before == first.compute_logprobs([5, 6, 7]).result()  # nothing was saved yet
    second = training.save_weights_and_get_sampling_client(kind="inflight").result()

    after = second.compute_logprobs([5, 6, 7]).result()
    assert after != before
    assert after == first.compute_logprobs([5, 6, 7]).result()
    assert before == snapshot.compute_logprobs([5, 6, 7]).result()


def test_spans_that_leave_tokens_uncovered_are_refused(training):
    """They would be compared with the wrong part of what was sampled."""
    [sequence, _] = sampled(training)
    datum = datum_of(sequence)
    short = dataclasses.replace(datum, model_input_spans=datum.model_input_spans[:1])

    with pytest.raises(errors.BadRequestError, match="cover another number of tokens than it has"):
        training.forward([short], "ppo").result()
