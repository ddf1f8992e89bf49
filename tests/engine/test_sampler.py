"""Sampling: against a naive loop with transformers, alone and in any company."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from tests.support import hf_reference as hf
from tests.support.hf_reference import ask
from tinkex import types
from tinkex.engine import long_prompts, tiny
from tinkex.engine import sampler as sampling
from tinkex.engine.engine import Engine
from tinkex.engine.fast_path import FastSampling
from tinkex.engine.sample_requests import make_job


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return _samplers(tmp_path_factory.mktemp("adapters"), threads=1)


def _samplers(directory, threads):
    """Samplers of the bare tiny model ("base") and of two adapters ("a", "b") over it."""
    engine = Engine(device="cpu", threads=threads)
    engine.load_base("tiny")
    engine.open_sampler("base", "tiny")
    for name, config, seed in (
        ("a", types.LoraConfig(rank=8), 1),
        ("b", types.LoraConfig(rank=3, train_unembed=False), 2),
    ):
        engine.create_model(name, "tiny", config, seed=seed)
        engine._models[name].weights.uniform_(-0.1, 0.1, generator=torch.manual_seed(seed))
        (directory / name).mkdir(parents=True)
        engine.save(name, directory / name, optimizer=False)
        engine.open_sampler(name, "tiny", directory=directory / name)
    return engine


def request(tokens, *, num_samples=1, more=None, **params):
    settings = {"max_tokens": 8, "seed": 7, "stop": [], **params}
    return types.SampleRequest(
        types.ModelInput.from_ints(tokens),
        types.SamplingParams(**settings),
        num_samples=num_samples,
        **(more or {}),
    )


def tokens_of(response):
    return [sequence.tokens for sequence in response.sequences]


def forward_logprobs(engine, model_id, tokens):
    data = [hf.datum(tokens)]
    output = hf.drive(
        engine.forward_backward(model_id, data, "cross_entropy", None, forward_only=True)
    )
    return output.loss_fn_outputs[0]["logprobs"].to_numpy()


PROMPTS = [list(range(n % 7, n + n % 7)) for n in (3, 9, 40, 129, 130, 200)]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_greedy_is_the_naive_greedy_loop(kind, tmp_path):
    """Without a cache, without a batch, with transformers' own module."""
    base = hf.make_base(tmp_path / "base", kind)
    reference = hf.load_base(base)
    engine = Engine(device="cpu", threads=1)
    engine.load_base(str(base))
    engine.open_sampler("s", str(base))
    prompts = [list(range(n)) for n in (1, 20, 140)]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                logits = reference(torch.tensor([tokens])).logits[0, -1]
            tokens.append(int(logits.argmax()))
        expected += [[tokens[len(prompt) :]] * 3]

    responses = ask(engine, *(("s", request(p, temperature=0, num_samples=3)) for p in prompts))

    assert expected == [tokens_of(response) for response in responses]


@pytest.mark.parametrize("sampler", ["a", "b"])
@pytest.mark.parametrize("num_samples", [1, 3, 20])
def test_logprobs_are_what_forward_gives(engine, sampler, num_samples):
    """Training on samples needs the two to be the same, whatever the temperature was."""
    prompt = list(range(60))

    [response] = ask(
        engine, (sampler, request(prompt, num_samples=num_samples, temperature=0.7, top_k=50))
    )

    assert num_samples == len(response.sequences)
    for sequence in response.sequences:
        expected = forward_logprobs(engine, sampler, prompt + sequence.tokens)[59:]
        np.testing.assert_allclose(sequence.logprobs, expected, atol=1e-4)


def test_seeded_samples_do_not_depend_on_their_company(engine):
    """Other adapters, other prompts, joining and leaving: the same request gives the same text."""
    mine = ("a", request(PROMPTS[2], num_samples=3, max_tokens=12))
    alone = tokens_of(ask(engine, mine)[0])
    company = [
        (sampler, request(prompt, num_samples=n, max_tokens=length, seed=length, temperature=1.5))
        for sampler, n, length in (("b", 1, 3), ("base", 5, 20), ("a", 2, 7), ("a", 1, 1))
        for prompt in PROMPTS
    ]

    responses = ask(engine, *company[:10], mine, *company[10:])

    assert alone == tokens_of(responses[10])
    assert 3 == len({tuple(tokens) for tokens in alone})


def test_each_adapter_samples_as_itself(engine):
    """Rows of several adapters in one batch, checked one by one against their own model."""
    requests = [
        (sampler, request(prompt, num_samples=n))
        for sampler in ("a", "b")
        for prompt, n in zip(PROMPTS, (1, 2, 1, 3, 1, 2))
    ]

    responses = ask(engine, *requests)

    for (sampler, one), response in zip(requests, responses):
        prompt = one.prompt.to_ints()
        for sequence in response.sequences:
            expected = forward_logprobs(engine, sampler, prompt + sequence.tokens)
            np.testing.assert_allclose(sequence.logprobs, expected[len(prompt) - 1 :], atol=1e-4)


def test_sequences_that_end_early_leave_the_others_right(engine):
    """Their places in the cache are reused; the old content must never be read."""
    requests = [
        ("a", request(prompt, num_samples=n, max_tokens=3 + 5 * i % 17, seed=i))
        for i, (prompt, n) in enumerate(zip(PROMPTS * 4, [1, 2, 3, 1, 5, 1, 1] * 4))
    ]
    alone = [tokens_of(ask(engine, one)[0]) for one in requests]

    together = [tokens_of(response) for response in ask(engine, *requests)]

    assert alone == together


def test_more_requests_than_fit_wait_their_turn(engine, monkeypatch):
    """Memory is bounded; the rest of the line waits, and all are answered."""
    sampler = engine._bases["tiny"].sampler
    monkeypatch.setattr(sampler, "_memory", 3 * 2 * 4 * 128 * 4 * 60)  # three of the requests
    requests = [("a", request(list(range(50)), max_tokens=10, seed=i)) for i in range(9)]
    most = 0
    for i, (name, one) in enumerate(requests):
        engine.submit_sample(i, name, one)
    results = {}
    while engine.has_samples:
        results.update(engine.sample_step())
        most = max(most, len(sampler._unit))

    assert 3 == most
    assert 9 == len(results)


def test_a_request_larger_than_the_memory_runs_alone(engine, monkeypatch):
    """Rather than waiting for ever."""
    monkeypatch.setattr(engine._bases["tiny"].sampler, "_memory", 1)

    responses = ask(engine, *[("a", request([1, 2, 3], num_samples=40, seed=i)) for i in range(3)])

    assert [40, 40, 40] == [len(response.sequences) for response in responses]


def test_a_prompt_asked_for_twice_is_computed_once(engine):
    """Requests that arrive together with the same prompt share its computation."""
    first, second, other = ask(
        engine,
        ("a", request(PROMPTS[3], seed=1)),
        ("a", request(PROMPTS[3], seed=2)),
        ("a", request(PROMPTS[4], seed=3)),
    )

    hits = [r.prompt_cache_hit_tokens for r in (first, second, other)]
    assert [0, len(PROMPTS[3]), 0] == hits
    expected = forward_logprobs(engine, "a", PROMPTS[3] + second.sequences[0].tokens)
    np.testing.assert_allclose(
        second.sequences[0].logprobs, expected[len(PROMPTS[3]) - 1 :], atol=1e-4
    )


# -- what ends a sequence ------------------------------------------------------------------------


def _greedy(engine, prompt, n=12, **params):
    [response] = ask(engine, ("a", request(prompt, temperature=0, max_tokens=n, **params)))
    return response.sequences[0]


def test_a_stop_token_ends_and_is_included(engine):
    """Its logprob too: the renderers of chats look for it."""
    free = _greedy(engine, PROMPTS[1])
    stop = free.tokens[4]
    end = free.tokens.index(stop) + 1

    sequence = _greedy(engine, PROMPTS[1], stop=[stop])

    assert (free.tokens[:end], "stop") == (sequence.tokens, sequence.stop_reason)
    assert end == len(sequence.logprobs)
    assert "length" == free.stop_reason


@pytest.mark.parametrize(
    ("stop", "tokens", "strings"),
    [
        (None, (tiny.END, tiny.END_TURN), ()),
        ([], (), ()),
        ([5, 6], (5, 6), ()),
        ("x", (), ("x",)),
        (["x", "yz"], (), ("x", "yz")),
    ],
)
def test_what_ends_a_sequence(engine, stop, tokens, strings):
    """stop None is the model's own end; [] is nothing at all."""
    base = engine._bases["tiny"].base

    job = make_job("t", request([1], stop=stop), None, base)

    assert (tokens, strings) == (job.stop_tokens, job.stop_strings)


def test_a_stop_string_ends_after_the_token_that_completes_it(tmp_path):
    """It may span tokens, and begin in the middle of one."""
    engine, text = _parrot(tmp_path)
    stop = text[3:6]

    [response] = ask(engine, ("s", request([65], temperature=0, max_tokens=20, stop=stop)))

    [sequence] = response.sequences
    assert text[:6] == bytes(sequence.tokens).decode()
    assert "stop" == sequence.stop_reason


def _parrot(tmp_path):
    """A sampler whose greedy text is known: ASCII letters, no stop in its first characters."""
    engine = Engine(device="cpu", threads=1)
    engine.load_base("tiny")
    engine.create_model("m", "tiny", types.LoraConfig(rank=8), seed=0)
    text = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    for _ in range(60):
        hf.drive(engine.forward_backward("m", [hf.datum(list(text))], "cross_entropy", None))
        engine.optim_step("m", types.AdamParams(learning_rate=1e-2))
    engine.save("m", tmp_path, optimizer=False)
    engine.open_sampler("s", "tiny", directory=tmp_path)
    return engine, text[1:].decode()


def test_several_stop_strings_end_at_the_first_that_is_complete(tmp_path):
    engine, text = _parrot(tmp_path)

    [response] = ask(
        engine, ("s", request([65], temperature=0, max_tokens=20, stop=["zzz", text[7], text[9]]))
    )

    assert text[:8] == bytes(response.sequences[0].tokens).decode()


def test_max_tokens_is_cut_to_the_context(engine):
    """None is as many as fit; one always does, for logprobs of a prompt of full length."""
    requests = [("base", request([1] * n, max_tokens=None)) for n in (4090, 4096)]

    responses = ask(engine, *requests)

    assert [6, 1] == [len(response.sequences[0]) for response in responses]
    assert "length" == responses[0].sequences[0].stop_reason


@pytest.mark.parametrize("samplers", [["base"], ["a"], ["a", "b", "base"]])
@pytest.mark.parametrize("scores", [False, True])
def test_prompts_computed_by_workers_give_what_one_thread_gives(tmp_path, samplers, scores):
    """Tokens, and what is said of the prompts; of one adapter or several, a prompt twice."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, n).tolist() for n in (300, 200, 150, 100, 60, 30, 3)]
    prompts.append(prompts[1])
    more = {"prompt_logprobs": True} if scores else {}
    found = []
    for threads in (1, 2):
        engine = _samplers(tmp_path / str(threads), threads)
        asked = [
            (samplers[i % len(samplers)], request(prompt, num_samples=1 + i % 2, more=more))
            for i, prompt in enumerate(prompts)
        ]
        found.append(ask(engine, *asked))

    for expected, actual in zip(*found):
        assert tokens_of(expected) == tokens_of(actual)
        if scores:
            np.testing.assert_allclose(
                actual.prompt_logprobs_np, expected.prompt_logprobs_np, atol=1e-4
            )


@pytest.fixture
def read(monkeypatch):
    """The first tokens of the prompts that each step reads."""
    begin, steps = FastSampling.begin, []

    def watched(self, prompts, on_hidden):
        steps.append([int(prompt.tokens[0]) for prompt in prompts])
        return begin(self, prompts, on_hidden)

    monkeypatch.setattr(FastSampling, "begin", watched)
    return steps


def test_a_step_reads_no_prompt_that_would_leave_a_worker_idle_while_others_wait(
    tmp_path, monkeypatch, read
):
    """There is time for three prompts in a step, but two workers read two."""
    monkeypatch.setitem(long_prompts.PREFILL_TOKENS, "cpu", 640 // long_prompts.ALONE)
    prompts = np.random.default_rng(0).integers(0, 256, (8, 200)).tolist()
    for threads, expected in ((1, [3, 3, 2]), (2, [2, 2, 2, 2])):
        engine = _samplers(tmp_path / str(threads), threads)
        responses = ask(engine, *[("a", request(prompt, max_tokens=1)) for prompt in prompts])
        assert 8 == len(responses)
        assert expected == [len(prompts) for prompts in read]
        read.clear()


def test_a_step_reads_prompts_of_the_adapter_of_the_first_in_line(engine, monkeypatch, read):
    """And then the next in line, whatever comes in the meantime; tokens are the same."""
    monkeypatch.setitem(long_prompts.PREFILL_TOKENS, "cpu", 200 // long_prompts.ALONE)

    def prompt(first):
        return [first, *PROMPTS[3][1:60]]

    line = [(["a", "b", "base"][i % 3], prompt(i)) for i in range(9)]
    for i, (name, tokens) in enumerate(line):
        engine.submit_sample(i, name, request(tokens, max_tokens=2))
    found = dict(engine.sample_step())
    for i, (name, tokens) in enumerate([("a", prompt(9)), ("a", prompt(10))], len(line)):
        engine.submit_sample(i, name, request(tokens, max_tokens=2))
    found |= hf.sample_all(engine)

    assert [[0, 3, 6], [1, 4, 7], [2, 5, 8], [9, 10]] == [sorted(step) for step in read]
    for i, (name, tokens) in enumerate(line):
        [alone] = ask(engine, (name, request(tokens, max_tokens=2)))
        assert tokens_of(alone) == tokens_of(found[i])


# -- what is said of the prompt ------------------------------------------------------------------


def test_prompt_logprobs_are_what_forward_gives(engine):
    """The first has none."""
    prompt = PROMPTS[4]

    [response] = ask(engine, ("a", request(prompt, max_tokens=1, more={"prompt_logprobs": True})))

    actual = response.prompt_logprobs_np
    assert len(prompt) == len(actual)
    assert np.isnan(actual[0])
    np.testing.assert_allclose(actual[1:], forward_logprobs(engine, "a", prompt), atol=1e-4)


def test_only_the_last_prompt_logprobs_where_asked(engine):
    more = {"prompt_logprobs": True, "prompt_logprobs_last_n": 3, "topk_prompt_logprobs": 2}

    [response] = ask(engine, ("a", request(PROMPTS[2], more=more)))

    expected = forward_logprobs(engine, "a", PROMPTS[2])[-3:]
    assert np.isnan(response.prompt_logprobs_np[:-3]).all()
    np.testing.assert_allclose(response.prompt_logprobs_np[-3:], expected, atol=1e-4)
    assert 3 == sum(row is not None for row in response.topk_prompt_logprobs)


def _all_logprobs(engine, model_id, tokens):
    """(N - 1, V): what forward gives for every possible next token."""
    targets = np.tile(np.arange(tiny.VOCAB), (len(tokens) - 1, 1))
    given = types.Datum(types.ModelInput.from_ints(tokens[:-1]), {"target_tokens": targets})
    output = hf.drive(
        engine.forward_backward(model_id, [given], "cross_entropy", None, forward_only=True)
    )
    return output.loss_fn_outputs[0]["logprobs"].to_numpy()


def test_the_likeliest_tokens_of_prompt_and_samples(engine):
    """Best first, with the logprobs that forward gives."""
    prompt = PROMPTS[1]
    more = {"topk_prompt_logprobs": 3, "topk_sample_logprobs": 4}

    [response] = ask(engine, ("a", request(prompt, num_samples=2, more=more)))

    assert response.topk_prompt_logprobs[0] is None
    for sequence in response.sequences:
        everything = _all_logprobs(engine, "a", prompt + sequence.tokens)
        best = np.sort(everything, axis=1)[:, ::-1]
        found = response.topk_prompt_logprobs_np.logprobs[1:]
        np.testing.assert_allclose(found, best[: len(prompt) - 1, :3], atol=1e-4)
        found = sequence.topk_logprobs_np
        np.testing.assert_allclose(found.logprobs, best[len(prompt) - 1 :, :4], atol=1e-4)
        named = np.take_along_axis(everything[len(prompt) - 1 :], found.token_ids, axis=1)
        np.testing.assert_allclose(named, found.logprobs, atol=1e-4)


def test_chosen_targets_of_the_prompt(engine):
    """-1 skips a cell."""
    prompt = PROMPTS[1]
    targets = np.random.default_rng(0).integers(0, tiny.VOCAB, (len(prompt) - 1, 3))
    targets[2, 1] = -1

    [response] = ask(
        engine,
        ("a", request(prompt, more={"target_prompt_logprobs": types.TensorData(targets)})),
    )

    actual = response.target_prompt_logprobs.to_numpy()
    expected = np.take_along_axis(
        _all_logprobs(engine, "a", prompt), np.maximum(targets, 0), axis=1
    )
    assert np.isnan(actual[2, 1])
    actual[2, 1] = expected[2, 1]
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_alternatives_of_the_prompt_are_drawn_from_the_model_s_distribution(engine, temperature):
    """At each position after the first: their log-probabilities are the model's, and how often a
    token is drawn is its probability at the request's temperature."""
    prompt, draws = PROMPTS[1], 4000
    more = {"prompt_alt_tokens_k": draws, "prompt_logprobs": True, "prompt_logprobs_last_n": 2}
    ask_for = request(prompt, max_tokens=1, temperature=temperature, seed=3, more=more)
    [response] = ask(engine, ("a", ask_for))
    [again] = ask(engine, ("a", ask_for))

    found = response.prompt_alt_tokens
    tokens, logprobs = found.tokens.to_numpy(), found.logprobs.to_numpy()
    everything = _all_logprobs(engine, "a", prompt)
    assert (len(prompt) - 1, draws) == tokens.shape == logprobs.shape
    expected = np.take_along_axis(everything, tokens, axis=1)
    np.testing.assert_allclose(logprobs, expected, atol=1e-4)
    np.testing.assert_array_equal(tokens, again.prompt_alt_tokens.tokens.to_numpy())
    for row, drawn in zip(everything, tokens):
        share = np.bincount(drawn, minlength=tiny.VOCAB) / draws
        if temperature == 0:
            assert share[row.argmax()] == 1
            continue
        chances = np.exp((row - row.max()) / temperature)
        chances /= chances.sum()
        # Five standard deviations of a share that is counted in *draws* draws.
        assert (np.abs(share - chances) < 5 * np.sqrt(chances / draws) + 2 / draws).all()
    scored = np.isnan(response.prompt_logprobs_np)
    assert scored[:-2].all()
    assert not scored[-2:].any()


def test_prompts_are_scored_together_as_they_are_alone(engine):
    """Of several adapters and lengths, one of them asked for twice, whatever each wants to know."""
    targets = types.TensorData(np.full((len(PROMPTS[1]) - 1, 2), 5))
    wishes = [
        {"prompt_logprobs": True},
        {"target_prompt_logprobs": targets},
        {"prompt_logprobs": True, "prompt_logprobs_last_n": 2},
        {"prompt_logprobs": True, "topk_prompt_logprobs": 2},
        {},
    ]
    requests = [
        (sampler, request(PROMPTS[1] if i == 1 else PROMPTS[i], max_tokens=1, more=more))
        for sampler in ("a", "base", "b")
        for i, more in enumerate(wishes)
    ]
    requests += [("b", request([65], max_tokens=1, more={"prompt_logprobs": True})), requests[0]]

    together = ask(engine, *requests)

    for one, response in zip(requests, together):
        [alone] = ask(engine, one)
        for name in ("prompt_logprobs_np", "target_prompt_logprobs", "topk_prompt_logprobs_np"):
            expected, actual = getattr(alone, name), getattr(response, name)
            assert (expected is None) == (actual is None)
            if name == "target_prompt_logprobs" and expected is not None:
                expected, actual = expected.to_numpy(), actual.to_numpy()
            elif name == "topk_prompt_logprobs_np" and expected is not None:
                np.testing.assert_array_equal(expected.token_ids, actual.token_ids)
                expected, actual = expected.logprobs, actual.logprobs
            if expected is not None:
                np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_who_joins_a_running_batch_samples_as_itself(engine):
    """Some of the running adapters' stack is used again, or all; or another is needed."""
    late = [("a", "b"), ("base",), ("b",)]
    engine.submit_sample("first", "a", request(PROMPTS[0], max_tokens=12))
    engine.submit_sample("second", "b", request(PROMPTS[1], max_tokens=12))
    asked = {}
    for samplers in late:
        engine.sample_step()
        for sampler in samplers:
            ticket = (sampler, len(asked))
            asked[ticket] = request(PROMPTS[2], max_tokens=4)
            engine.submit_sample(ticket, sampler, asked[ticket])

    results = hf.sample_all(engine)

    for (sampler, _), one, response in (
        (ticket, one, results[ticket]) for ticket, one in asked.items()
    ):
        assert tokens_of(ask(engine, (sampler, one))[0]) == tokens_of(response)


# -- streams, cancelling, mistakes ---------------------------------------------------------------


def test_tokens_are_reported_as_they_appear(engine):
    """In order within each sequence, with the logprobs of the answer."""
    told = []

    engine.submit_sample(
        "t", "a", request([1, 2], num_samples=2), on_token=lambda *token: told.append(token)
    )
    response = hf.sample_all(engine)["t"]

    for i, sequence in enumerate(response.sequences):
        own = [(token, logprob) for index, token, logprob in told if index == i]
        assert sequence.tokens == [token for token, _ in own]
        assert sequence.logprobs == pytest.approx([logprob for _, logprob in own])


def test_a_cancelled_request_leaves_nothing_behind(engine):
    """And the others continue as if it had never been there."""
    mine = request(PROMPTS[2], num_samples=2, max_tokens=10)
    alone = tokens_of(ask(engine, ("a", mine))[0])
    engine.submit_sample("mine", "a", mine)
    engine.submit_sample("gone", "a", request(PROMPTS[2], num_samples=3, max_tokens=500))
    engine.submit_sample("never", "b", request(PROMPTS[1], max_tokens=500))
    engine.sample_step()

    engine.cancel_sample("gone")
    engine.cancel_sample("never")
    engine.cancel_sample("unknown")
    results = hf.sample_all(engine)

    assert ["mine"] == list(results)
    assert alone == tokens_of(results["mine"])


def test_a_failure_in_a_step_answers_all_who_wait(engine, monkeypatch):
    """Nothing hangs, and the next request works."""
    engine.submit_sample("x", "a", request([1, 2, 3], max_tokens=50))
    engine.sample_step()
    with monkeypatch.context() as patch:
        patch.setattr("tinkex.engine.token_sampling.choose", lambda *args: 1 / 0)
        results = hf.sample_all(engine)

    assert isinstance(results["x"], ZeroDivisionError)
    assert ask(engine, ("a", request([1, 2, 3])))


@pytest.mark.parametrize(
    ("tokens", "more", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 512], {}, "token id 512 at position 1, but the model's vocabulary has 512"),
        ([1] * 4097, {}, "4097 tokens, but the model's context is 4096"),
        ([1], {"topk_prompt_logprobs": 513}, "more than the vocabulary's 512"),
        (
            [1, 2],
            {"target_prompt_logprobs": types.TensorData(np.zeros((2, 1), np.int64))},
            r"shape \[2, 1\]; for a prompt of 2 tokens it must be \[1, K\]",
        ),
        (
            [1, 2],
            {"target_prompt_logprobs": types.TensorData(np.array([[512]]))},
            "must hold token ids below 512",
        ),
    ],
)
def test_requests_that_make_no_sense_are_refused(engine, tokens, more, message):
    """Before anything is queued."""
    with pytest.raises(ValueError, match=message):
        engine.submit_sample("t", "a", request(tokens, more=more))

    assert not engine.has_samples


def test_an_unknown_sampler_is_refused(engine):
    with pytest.raises(ValueError, match="there is no sampler 'x'"):
        engine.submit_sample("t", "x", request([1]))


def test_samplers_of_one_directory_share_their_weights(tmp_path):
    """Loading a checkpoint a hundred times takes its memory once."""
    engine = Engine(device="cpu", threads=1)
    engine.load_base("tiny")
    engine.create_model("m", "tiny", types.LoraConfig(rank=4), seed=0)
    engine.save("m", tmp_path, optimizer=False)

    for name in ("one", "two"):
        engine.open_sampler(name, "tiny", directory=tmp_path)

    assert engine._samplers["one"].finished is engine._samplers["two"].finished


@pytest.mark.parametrize(
    ("stop", "sentence"),
    [
        (["x" * 513], "a string of 513 characters"),
        ([f"s{i}" for i in range(65)], "0 token ids and 65 strings"),
        (list(range(1025)), "1025 token ids"),
        ([f"{i}" * 9 for i in range(100_000)], "100000 strings"),
    ],
)
def test_more_stops_than_a_step_can_look_for_are_refused(engine, stop, sentence):
    with pytest.raises(ValueError, match=sentence):
        engine.submit_sample("s", "base", request(PROMPTS[0], stop=stop))


def test_the_most_stops_cost_a_bounded_time_at_every_token(engine):
    """64 strings of 512 characters: they used to be unbounded in number and length."""
    most = [chr(33 + i % 90) + f"{i:04}" * 128 for i in range(64)]
    most = [text[:512] for text in most]
    seconds = []
    for stop in ([], most):
        start = time.perf_counter()
        [response] = ask(engine, ("base", request(PROMPTS[0], max_tokens=200, stop=stop)))
        seconds.append((time.perf_counter() - start) / len(response.sequences[0].tokens))
    print(f"{seconds[0] * 1e3:.2f} ms a token without stops, {seconds[1] * 1e3:.2f} ms with most")

    assert seconds[1] < seconds[0] + 0.02


def test_idle_memory_is_freed_and_the_next_answers_are_the_same(engine):
    """Not while something runs."""
    before = ask(engine, ("a", request(PROMPTS[0], max_tokens=100)))
    engine.submit_sample("x", "a", request(PROMPTS[0], max_tokens=100))
    engine.sample_step()
    engine.free_idle()
    [running] = hf.sample_all(engine).values()
    engine.free_idle()
    after = ask(engine, ("a", request(PROMPTS[0], max_tokens=100)))

    assert tokens_of(before[0]) == tokens_of(running)
    assert tokens_of(before[0]) == tokens_of(after[0])


def _failing_for(monkeypatch, culprits):
    """Every step in which one of the requests *culprits* gets a token fails."""
    record = sampling.Sampler._record_topk

    def fail(self, rows, logits):
        tickets = {self._rows.job[row].ticket for row in rows}
        if tickets & culprits:
            raise RuntimeError(f"of {sorted(tickets & culprits)}")
        record(self, rows, logits)

    monkeypatch.setattr(sampling.Sampler, "_record_topk", fail)


@pytest.mark.parametrize("culprits", [{"q3"}, {"q0", "q5"}, {f"q{i}" for i in range(6)}])
def test_those_that_fail_are_found_by_halving_and_the_others_get_their_answers(
    engine, monkeypatch, culprits
):
    """Also what had tokens before the step failed: it is computed again, to the same tokens."""
    requests = {f"q{i}": request(PROMPTS[i % 3], seed=i, num_samples=2) for i in range(6)}
    alone = {
        ticket: tokens_of(ask(engine, ("a", one))[0])
        for ticket, one in requests.items()
        if ticket not in culprits
    }
    for ticket, one in requests.items():
        engine.submit_sample(ticket, "a", one)
    engine.sample_step()
    _failing_for(monkeypatch, culprits)

    results = hf.sample_all(engine)

    failed = {ticket for ticket, result in results.items() if isinstance(result, Exception)}
    assert culprits == failed
    assert alone == {t: tokens_of(r) for t, r in results.items() if t not in failed}
    assert not engine.has_samples


def test_a_suspect_that_is_cancelled_is_not_computed_again(engine, monkeypatch):
    """Between the failed step and its turn in a smaller group."""
    for i in range(4):
        engine.submit_sample(f"q{i}", "a", request(PROMPTS[1], seed=i))
    engine.sample_step()
    with monkeypatch.context() as patch:
        _failing_for(patch, {"q0"})
        engine.sample_step()
        for i in (1, 2, 3):
            engine.cancel_sample(f"q{i}")
        results = hf.sample_all(engine)

    assert ["q0"] == list(results)
    assert isinstance(results["q0"], RuntimeError)
    assert not engine.has_samples


def test_a_callback_that_fails_ends_all_samples_of_its_request_and_no_other(engine):
    """The second sample of it gets its token in the same step, after the first has failed."""

    def refuse(index, token, logprob):
        raise OSError("the reader is gone")

    mine = request(PROMPTS[1], num_samples=2)
    alone = tokens_of(ask(engine, ("a", mine))[0])
    engine.submit_sample("bad", "a", request(PROMPTS[1], num_samples=3), on_token=refuse)
    engine.submit_sample("good", "a", mine)

    results = hf.sample_all(engine)

    assert isinstance(results["bad"], OSError)
    assert alone == tokens_of(results["good"])


def test_the_likeliest_tokens_are_of_the_last_positions_where_random_ones_are_of_all(engine):
    """Both in one request: random tokens need every position, the others only the last two."""
    more = {"topk_prompt_logprobs": 2, "prompt_logprobs_last_n": 2, "prompt_alt_tokens_k": 3}

    [response] = ask(engine, ("a", request(PROMPTS[1], more=more)))
    [whole] = ask(engine, ("a", request(PROMPTS[1], more={"topk_prompt_logprobs": 2})))

    count = len(PROMPTS[1])
    assert [False] * (count - 2) + [True] * 2 == [
        r is not None for r in response.topk_prompt_logprobs
    ]
    assert whole.topk_prompt_logprobs[-2:] == response.topk_prompt_logprobs[-2:]
    assert (count - 1, 3) == response.prompt_alt_tokens.tokens.to_numpy().shape
