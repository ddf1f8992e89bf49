"""`/v1/completions` as the openai package calls it, held against tinkex's own sampling."""

from __future__ import annotations

import math

import numpy as np
import openai
import pytest
import requests

import tinkex
from tests.support.poem import POEM
from tinkex import types
from tinkex.server.app import make_engine
from tinkex.server.auth import Keys
from tinkex.server.openai.generation import token_text
from tinkex.text import tokenizer

TINY = tokenizer.load("tiny")


def sampled(server, tokens, path=None, **params):
    """The same request through the SDK."""
    with tinkex.ServiceClient(base_url=server.url, api_key="tml-any") as service:
        client = service.create_sampling_client(
            **({"model_path": path} if path else {"base_model": "tiny"})
        )
        return client.sample(
            types.ModelInput.from_ints(tokens),
            sampling_params=types.SamplingParams(**params),
            topk_sample_logprobs=3,
            include_prompt_logprobs=True,
            topk_prompt_logprobs=3,
        ).result()


def test_models_are_the_bases_and_ones_own_checkpoints(client, tuned):
    names = [model.id for model in client.models.list()]

    assert ["tiny", tuned[0]] == names
    assert tuned[0] == client.models.retrieve(tuned[0]).id


@pytest.mark.parametrize("name", ["path", "base;path", "run", "its name"])
def test_a_fine_tuned_model_has_four_names(client, tuned, name):
    path, run = tuned
    model = {"path": path, "base;path": f"tiny;{path}", "run": run, "its name": "the owl"}[name]
    answer = client.completions.create(
        model=model, prompt="The owl and", max_tokens=80, temperature=0, stop="boat"
    )

    assert " the pussycat went to sea in a beautiful pea-green " == answer.choices[0].text
    assert "stop" == answer.choices[0].finish_reason
    assert model == answer.model


def test_tokens_and_text_are_the_samplers(server, client):
    """Text of the same seed and settings, token by token, with usage."""
    prompt = TINY.encode("Once upon")
    ours = sampled(server, prompt, max_tokens=12, seed=7).sequences[0]
    answer = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=12, seed=7, logprobs=3
    )
    [choice] = answer.choices

    assert TINY.decode(ours.tokens, skip_special_tokens=True) == choice.text
    assert ours.logprobs == pytest.approx(choice.logprobs.token_logprobs, abs=1e-5)
    assert [token_text(TINY, t) for t in ours.tokens] == choice.logprobs.tokens
    for row, told in zip(ours.topk_logprobs, choice.logprobs.top_logprobs):
        best = max(told.values())
        assert best == pytest.approx(max(row[0][1], *[p for _, p in row]), abs=1e-5)
    assert (len(prompt), 12) == (answer.usage.prompt_tokens, answer.usage.completion_tokens)


def test_several_prompts_and_several_completions_of_each(client):
    """In the order of the prompts, as OpenAI numbers them."""
    prompts = [TINY.encode("Once upon"), TINY.encode("The owl")]
    answer = client.completions.create(model="tiny", prompt=prompts, n=2, max_tokens=4, seed=3)
    alone = client.completions.create(model="tiny", prompt=prompts[1], n=2, max_tokens=4, seed=3)

    assert [0, 1, 2, 3] == [choice.index for choice in answer.choices]
    assert [c.text for c in alone.choices] == [c.text for c in answer.choices[2:]]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_the_prompt_as_evaluation_harnesses_ask(server, client, max_tokens):
    """Token ids in, log-probabilities of each given those before it out; the first has none."""
    prompt = TINY.encode("The owl and the pussycat")
    ours = sampled(server, prompt, max_tokens=1)
    answer = client.completions.create(
        model="tiny", prompt=[prompt], echo=True, logprobs=1, max_tokens=max_tokens, temperature=0
    )
    told = answer.choices[0].logprobs

    assert len(prompt) + max_tokens == len(told.tokens)
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert ours.prompt_logprobs[1:] == pytest.approx(told.token_logprobs[1 : len(prompt)], abs=1e-5)
    for row, at in zip(ours.topk_prompt_logprobs[1:], told.top_logprobs[1:]):
        assert row[0][1] == pytest.approx(max(at.values()), abs=1e-5)
    assert told.text_offset[1] == len(told.tokens[0])
    assert max_tokens == answer.usage.completion_tokens


def test_a_stream_is_the_same_text_in_pieces(client, tuned):
    request = {"model": tuned[0], "prompt": "The owl and", "max_tokens": 80, "temperature": 0}
    whole = client.completions.create(**request, stop="green")
    chunks = list(
        client.completions.create(
            **request, stop="green", stream=True, stream_options={"include_usage": True}
        )
    )
    texts = [c.choices[0].text for c in chunks if c.choices]

    assert whole.choices[0].text == "".join(texts)
    assert len(texts) > 3
    assert "stop" == chunks[-2].choices[0].finish_reason
    assert whole.usage == chunks[-1].usage


def test_a_stream_never_shows_half_a_character_or_the_beginning_of_a_stop(client):
    """The untrained model says any byte; what is shown is whole characters."""
    request = {"model": "tiny", "prompt": "x", "max_tokens": 200, "temperature": 1.5, "seed": 5}
    whole = client.completions.create(**request).choices[0].text
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
    stop = whole[40:44]
    stopped = client.completions.create(**request, stop=stop).choices[0].text

    assert whole == "".join(pieces)
    assert whole[: whole.index(stop)] == stopped


def test_asynchronous_clients_stream_side_by_side(server):
    import asyncio

    async def one(client, seed):
        stream = await client.completions.create(
            model="tiny", prompt="Once", max_tokens=8, seed=seed, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/oai/api/v1", api_key="x") as client:
            return await asyncio.gather(*(one(client, seed) for seed in (1, 2, 1)))

    first, second, third = asyncio.run(all_of_them())

    assert first == third != second


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"model": "tinker://nothing:train:0/sampler_weights/a"}, "there is no checkpoint"),
        ({"model": "tiny;nothing"}, "after ';' there must be a tinker:// path"),
        ({"prompt": []}, "prompt must be a string"),
        ({"prompt": [10**9]}, "token id 1000000000"),
        ({"prompt": {"a": 1}}, "prompt must be a string"),
        ({"max_tokens": -1}, "max_tokens must be an integer from 1"),
        ({"max_tokens": 2**70}, "max_tokens must be an integer"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"temperature": -1}, "temperature must be from 0"),
        ({"top_p": 0}, "top_p must be from"),
        ({"n": 0}, "n must be an integer from 1"),
        ({"stop": [1]}, "stop must be a string or a list of strings"),
        ({"stop": [f"s{i}" for i in range(65)]}, "stop must hold at most 64 strings, got 65"),
        ({"max_tokens": 10**6 + 1}, "max_tokens must be an integer from 1 to 1000000"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"suffix": "end"}, "suffix"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"best_of": 4}, "best_of"),
        ({"logprobs": 1000}, "logprobs must be an integer from 0 to 20"),
        ({"stream": True, "logprobs": 2}, "stream does not go with echo or logprobs"),
        ({"stream": True, "prompt": [10**9]}, "token id 1000000000"),
    ],
)
def test_what_cannot_be_done_is_refused_in_openai_s_form(server, fields, said):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2, **fields}
    answer = requests.post(f"{server.url}/v1/completions", json=body, timeout=30)

    assert 400 <= answer.status_code < 500
    error = answer.json()["error"]
    assert said in error["message"]
    assert {"message", "type", "param", "code"} == set(error)


def test_a_name_that_no_model_here_has_is_not_looked_for_in_the_hub(client):
    """That takes half a minute where the hub cannot be reached."""
    with pytest.raises(openai.NotFoundError, match=r"there is no model 'gpt-4o' here.*tiny"):
        client.completions.create(model="gpt-4o", prompt="x")


def test_a_refusal_is_the_exception_that_users_of_openai_know(client):
    with pytest.raises(openai.NotFoundError, match="there is no checkpoint"):
        client.completions.create(model="tinker://a:train:0/sampler_weights/b", prompt="a")


def test_a_long_untrained_text_has_finite_scores(client):
    answer = client.completions.create(
        model="tiny", prompt=POEM, echo=True, logprobs=0, max_tokens=1
    )
    scores = answer.choices[0].logprobs.token_logprobs[1:]

    assert all(math.isfinite(x) and x <= 0 for x in scores)
    assert 0 < np.exp(-np.mean(scores)) < TINY.vocab_size * 10


def test_what_belongs_to_another_key_reads_as_if_it_did_not_exist(serve):
    """By its path, by its run's id, or by its run's name; and in the list of models."""
    served = serve(
        make_engine=make_engine, keys=lambda home: Keys.of_users(["tml-a", "tml-b"], b"secret")
    )
    alice = served.client_with("tml-a")
    model = alice.model(user_metadata={"name": "mine"})
    path = alice.result(alice.save_for_sampler(model, 1, "first"))["path"]
    missing = f"{path}-2"

    def ask(key, name):
        with openai.OpenAI(
            base_url=f"{served.server.url}/v1", api_key=key, max_retries=0
        ) as client:
            return client.completions.create(model=name, prompt="The", max_tokens=2, temperature=0)

    for name in (path, f"tiny;{path}", model, "mine"):
        assert 2 == ask("tml-a", name).usage.completion_tokens
        with pytest.raises(openai.NotFoundError):
            ask("tml-b", name)
    with pytest.raises(openai.NotFoundError) as other:
        ask("tml-b", missing)
    with pytest.raises(openai.NotFoundError) as theirs:
        ask("tml-b", path)
    assert str(other.value).replace(missing, path) == str(theirs.value)
    with openai.OpenAI(base_url=f"{served.server.url}/v1", api_key="tml-b") as client:
        assert ["tiny"] == [one.id for one in client.models.list()]


def test_a_checkpoint_is_not_taken_for_one_of_another_base_model(client, tuned):
    """A name of both forms, with the base model before the path, must be right in both."""
    with pytest.raises(openai.BadRequestError, match="the checkpoint is of the base model 'tiny'"):
        client.completions.create(model=f"org/other;{tuned[0]}", prompt="The")


def test_a_run_that_has_saved_nothing_to_sample_from_is_named(serve):
    """Weights to train on are not for sampling."""
    served = serve(make_engine=make_engine)
    model = served.client.model()
    served.client.result(served.client.save(model, 1, "state"))
    with (
        openai.OpenAI(base_url=f"{served.server.url}/v1", api_key="x", max_retries=0) as client,
        pytest.raises(openai.NotFoundError, match="has no weights to sample from yet"),
    ):
        client.completions.create(model=model, prompt="The")
