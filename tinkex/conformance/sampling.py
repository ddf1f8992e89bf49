"""Checks of samplers, samples and their log-probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinkex import errors, types, wire
from tinkex.conformance.client import Broken, NotOffered, as_object, said
from tinkex.conformance.context import Context, Sampler
from tinkex.conformance.data import OTHERS, TOKENS, datum, distance
from tinkex.conformance.runner import Checks
from tinkex.text import tokenizer

CHECKS = Checks()

#: Largest mean difference between sampler and training, also in 16 bits; in nats per token.
_AGREE = 0.05


@CHECKS.rule("samples are named by their promise")
def sequence_ids(ctx: Context) -> None:
    """The promise of asample names each sample (sample_sequence_ids); the official SDK from 0.26 on
    requires it. SkyRL 0.3.0 does not name them."""
    answer = ctx.sampler.post(TOKENS, 3)
    ended = ctx.client.end(answer)
    ended.value(types.SampleResponse, "asample")
    ids = as_object(answer).get("sample_sequence_ids")
    if not isinstance(ids, list) or len({str(i) for i in ids}) != 3:
        raise Broken(f"sample_sequence_ids for 3 samples is {ids!r}")


@CHECKS.rule("samples have tokens, log-probabilities and a reason to stop")
def shape(ctx: Context) -> None:
    """As many log-probabilities as tokens, at most max_tokens, and a stop_reason."""
    response = ctx.sampler.sample(TOKENS, 3, params={"max_tokens": 5})
    if len(response.sequences) != 3:
        raise Broken(f"{len(response.sequences)} sequences for num_samples=3")
    for sequence in response.sequences:
        if not 1 <= len(sequence.tokens) <= 5:
            raise Broken(f"{len(sequence.tokens)} tokens for max_tokens=5")
        if sequence.logprobs is None or len(sequence.logprobs) != len(sequence.tokens):
            raise Broken("the numbers of log-probabilities and tokens differ")
        if sequence.stop_reason not in ("stop", "length"):
            raise Broken(f"stop_reason is {sequence.stop_reason!r}")
        if max(sequence.logprobs) > 1e-3:
            raise Broken(f"a log-probability is {max(sequence.logprobs)}")


@CHECKS.rule("log-probabilities of samples are those of forward")
def sampled_logprobs(ctx: Context) -> str:
    """The sampler reports the log-probabilities that training computes for its tokens: the ratio in
    policy gradients starts at 1."""
    with ctx.model() as model:
        model.train([datum()])
        model.train([datum(OTHERS)])
        sampler = ctx.open_sampler(model.save_for_sampler(ctx.name()))
        [sequence] = sampler.sample(TOKENS, params={"max_tokens": 12, "seed": 1}).sequences
        tokens = [*TOKENS, *sequence.tokens]
        theirs = model.logprobs([datum(tokens)])[len(TOKENS) - 1 :]
        off = float(np.abs(theirs - np.asarray(sequence.logprobs, np.float64)).mean())
        if off > _AGREE:
            raise Broken(f"they differ by {off:.3f} on average")
        return f"{off:.1e} on average"


@CHECKS.rule("prompt log-probabilities are aligned")
def prompt_logprobs(ctx: Context) -> None:
    """As many as tokens: the first one null, then log p(token | tokens before it). SkyRL returns
    one less, without the null."""
    with ctx.model() as model:
        path = model.save_for_sampler(ctx.name())
        response = ctx.open_sampler(path).sample(
            TOKENS, params={"max_tokens": 1}, prompt_logprobs=True
        )
        theirs = model.logprobs([datum()])
    found = response.prompt_logprobs
    if found is None:
        raise NotOffered("prompt_logprobs")
    if len(found) != len(TOKENS):
        raise Broken(f"{len(found)} for {len(TOKENS)} tokens")
    if found[0] is not None or None in found[1:]:
        raise Broken(f"the first is {found[0]}, and {found[1:].count(None)} others are null")
    off = distance(theirs, np.asarray(found[1:], np.float64))
    if off > 4 * _AGREE:
        raise Broken(f"they differ by {off:.3f} from those of forward")


@CHECKS.rule("top-k log-probabilities are aligned")
def topk(ctx: Context) -> None:
    """One row for each token of the prompt, the first row null, the best token first. SkyRL refuses
    them, or (0.3.0) omits them silently."""
    fields = {"prompt_logprobs": True, "topk_prompt_logprobs": 2}
    answer = ctx.sampler.post(TOKENS, params={"max_tokens": 1}, **fields)
    ended = ctx.client.end(answer)
    if ended.failure is not None:
        raise NotOffered(ended.failure)
    rows = ended.value(types.SampleResponse, "asample").topk_prompt_logprobs
    if rows is None:
        raise Broken("they were requested, but are missing from the result")
    if len(rows) != len(TOKENS) or rows[0] is not None:
        raise Broken(f"{len(rows)} rows for {len(TOKENS)} tokens, the first {rows[0]}")
    if any(not row or row[0][1] < row[-1][1] for row in rows[1:]):
        raise Broken("a row is empty, or its best token is not the first")


@CHECKS.rule("a seed repeats a sample")
def seed(ctx: Context) -> None:
    """The same seed and request give the same tokens; another seed gives different ones."""
    drawn = [
        [int(t) for t in ctx.sampler.sample(TOKENS, params={"max_tokens": 16, "seed": s})
         .sequences[0].tokens]
        for s in (3, 3, 4, 5)
    ]  # fmt: skip
    if drawn[0] != drawn[1]:
        raise Broken("the same seed gave different tokens")
    if drawn[0] == drawn[2] == drawn[3]:
        raise Broken("different seeds gave the same tokens")


@CHECKS.rule("the samples of one request differ")
def samples_differ(ctx: Context) -> None:
    """num_samples draws independent samples, also with a seed."""
    params = {"max_tokens": 16, "seed": 3}
    sequences = ctx.sampler.sample(TOKENS, 4, params=params).sequences
    if len({tuple(map(int, s.tokens)) for s in sequences}) == 1:
        raise Broken("four samples are identical")


@CHECKS.rule("temperature 0 takes the likeliest token")
def greedy(ctx: Context) -> None:
    """Every seed gives the same tokens, and no token is likelier. A server that divides by the
    temperature, or reads 0 as 1, samples instead."""
    first, second = (
        ctx.sampler.sample(TOKENS, params={"max_tokens": 8, "temperature": 0, "seed": s})
        .sequences[0] for s in (1, 2)
    )  # fmt: skip
    if list(first.tokens) != list(second.tokens):
        raise Broken("two seeds gave different continuations")
    drawn = ctx.sampler.sample(TOKENS, 8, params={"max_tokens": 1, "seed": 7}).sequences
    best = max(s.logprobs[0] for s in drawn if s.logprobs)
    if first.logprobs and best > first.logprobs[0] + 1e-2:
        raise Broken(f"a sampled token is likelier ({best:.3f}) than the first greedy one "
                     f"({first.logprobs[0]:.3f})")  # fmt: skip


@CHECKS.rule("invalid arguments are refused")
def senseless(ctx: Context) -> None:
    """num_samples 0, a negative temperature and the like fail with a message, at once or later, and
    an adapter of rank one billion is refused."""
    requests = {
        "num_samples=0": ctx.sampler.post(TOKENS, 0),
        "temperature=-1": ctx.sampler.post(TOKENS, params={"temperature": -1.0}),
        "top_p=2": ctx.sampler.post(TOKENS, params={"top_p": 2.0}),
        "an empty prompt": ctx.sampler.post([]),
        "rank=10**9": ctx.create(rank=10**9),
    }
    for what, answer in requests.items():
        ended = ctx.client.end(answer)
        if ended.failure is None:
            raise Broken(f"{what} is accepted")
        if ended.answer.status >= 500:
            raise Broken(f"{what} returned {ended.failure}")


# Stop conditions.


def _continuation(ctx: Context, **params: Any) -> types.SampledSequence:
    params = {"max_tokens": 12, "seed": 9, "temperature": 1.0, **params}
    [sequence] = ctx.sampler.sample(TOKENS, params=params).sequences
    return sequence


@CHECKS.rule("a stop token ends a sample")
def stop_token(ctx: Context) -> None:
    """stop may be a list of token ids; the stop token is the last one of the sample."""
    free = [int(t) for t in _continuation(ctx).tokens]
    if len(free) < 3:
        raise NotOffered("the model ends its text after one or two tokens")
    wanted = free.index(free[2]) + 1
    stopped = _continuation(ctx, stop=[free[2]])
    if [int(t) for t in stopped.tokens] != free[:wanted]:
        raise Broken(
            f"token {free[2]} at position {wanted} did not end the sample: {stopped.tokens}"
        )
    if stopped.stop_reason != "stop":
        raise Broken(f"stop_reason is {stopped.stop_reason!r}")


@CHECKS.rule("a stop string ends a sample")
def stop_text(ctx: Context) -> str:
    """stop may be a string or a list of strings. SkyRL accepts only the list."""
    for form in ("no such text \u2603", ["no such text \u2603"]):
        ended = ctx.client.end(ctx.sampler.post(TOKENS, params={"stop": form}))
        if ended.failure is not None:
            raise Broken(f"stop={form!r} returned {ended.failure}")
    try:
        decoder = tokenizer.load(tokenizer.tokenizer_id(ctx.base_model, _tokenizer_of_model(ctx)))
    except (errors.TinkexError, ValueError, OSError) as exc:
        return f"accepted; not tested with a text in the sample: no tokenizer ({exc})"[:120]
    tokens = [int(t) for t in _continuation(ctx).tokens]
    for count in range(1, len(tokens)):
        text = decoder.decode(tokens[:count])[-3:]
        if text.strip() and "\ufffd" not in text:
            break
    else:
        return "accepted; the sample has no text to stop at"
    for form in (text, [text, "no such text"]):
        stopped = _continuation(ctx, stop=form)
        if len(stopped.tokens) > count or stopped.stop_reason != "stop":
            raise Broken(
                f"stop={form!r} should end it after {count} tokens; it ended after "
                f"{len(stopped.tokens)} ({stopped.stop_reason})"
            )
    return "one string, several"


def _tokenizer_of_model(ctx: Context) -> str | None:
    with ctx.model() as model:
        answer = ctx.client.post("get_info", {"model_id": model.model_id, "type": "get_info"})
        if answer.status != 200:
            return None
        return wire.from_json(types.GetInfoResponse, answer.json()).model_data.tokenizer_id


@CHECKS.rule("stop=null and stop=[] are accepted")
def stop_nothing(ctx: Context) -> None:
    """null: only the end of text stops a sample. []: nothing does, so it reaches max_tokens."""
    forms: tuple[list[str] | None, ...] = (None, [])
    for form in forms:
        answer = ctx.sampler.post(TOKENS, 4, params={"stop": form, "max_tokens": 16})
        ended = ctx.client.end(answer)
        if ended.failure is not None:
            raise Broken(f"stop={form!r} returned {ended.failure}")
        for sequence in ended.value(types.SampleResponse, "asample").sequences:
            if form == [] and (sequence.stop_reason, len(sequence.tokens)) != ("length", 16):
                raise Broken(
                    f"with stop=[] a sample ended ({sequence.stop_reason}) after "
                    f"{len(sequence.tokens)} of 16 tokens"
                )


# Samplers and the models they come from.


@CHECKS.rule("sampler weights stay frozen while training continues")
def frozen(ctx: Context) -> str:
    """A sampler keeps the weights it was created from. Samplers of SkyRL follow the training: their
    log-probabilities changed by 0.82 in three steps."""
    with ctx.model() as model:
        model.train([datum()])
        sampler = ctx.open_sampler(model.save_for_sampler(ctx.name()))
        before = sampler.score(TOKENS)
        start = model.logprobs([datum()])
        for _ in range(3):
            model.train([datum()], learning_rate=0.02)
        went = distance(start, model.logprobs([datum()]))
        moved = distance(before, sampler.score(TOKENS))
    if moved > 0.1 * went:
        raise Broken(f"it changed by {moved:.3f} while the model changed by {went:.3f}")
    return f"changed by {moved:.1e}, the model by {went:.2f}"


@CHECKS.rule("sampling from an old checkpoint leaves the model alone")
def old_checkpoint(ctx: Context) -> None:
    """Sampling does not change the weights being trained. In SkyRL, a sample from an older
    checkpoint silently resets the model to it."""
    with ctx.model() as model:
        path = model.save_for_sampler(ctx.name())
        sampler = ctx.open_sampler(path)
        for _ in range(3):
            model.train([datum()], learning_rate=0.02)
        before = model.logprobs([datum()])
        sampler.sample(TOKENS)
        moved = distance(before, model.logprobs([datum()]))
    if moved > 0.02:
        raise Broken(f"one sample changed the model by {moved:.3f}")


@CHECKS.rule("a sampler follows its checkpoint, not the last one used")
def samplers_apart(ctx: Context) -> None:
    """Two samplers of one model, used in turn, each sample from their own weights."""
    with ctx.model() as model:
        samplers = []
        for _ in range(2):
            samplers.append(ctx.open_sampler(model.save_for_sampler(ctx.name())))
            model.train([datum()], learning_rate=0.05)
        first, second, again = (s.score(TOKENS) for s in (*samplers, samplers[0]))
    if distance(first, second) < 1e-3:
        raise Broken("two checkpoints, before and after a step, give the same log-probabilities")
    if distance(first, again) > 0.1 * distance(first, second):
        raise Broken(
            f"after the other was used, it changed by {distance(first, again):.3f}; they differ by "
            f"{distance(first, second):.3f}"
        )


@CHECKS.rule("unnamed sampler weights make a sampler at once")
def unnamed(ctx: Context) -> None:
    """save_weights_for_sampler with a number instead of a name returns a sampling session."""
    with ctx.model() as model:
        answer = model.post(
            "save_weights_for_sampler", sampling_session_seq_id=ctx.sampler_number()
        )
        ended = ctx.client.end(answer)
        saved = ended.value(types.SaveWeightsForSamplerResponse, "save_weights_for_sampler")
        if not saved.sampling_session_id:
            raise Broken("there is no sampling_session_id")
        Sampler(ctx.client, saved.sampling_session_id).sample(TOKENS)


@CHECKS.rule("clones of a sampler are numbered separately")
def join(ctx: Context) -> None:
    """join_sampling_session gives each clone of a sampling client its own number, from 1."""
    payload = {"sampling_session_id": ctx.sampler.sampler_id, "type": "join_sampling_session"}
    numbers = [
        as_object(ctx.client.endpoint("POST", "join_sampling_session", payload)).get(
            "client_counter"
        )
        for _ in range(2)
    ]
    if not all(isinstance(n, int) and n >= 1 for n in numbers) or numbers[0] == numbers[1]:
        raise Broken(f"the numbers are {numbers}")


@CHECKS.rule("ids are read raw and percent-encoded")
def encoded_ids(ctx: Context) -> str:
    """Some clients send GET samplers/{id} with ':' in the id, others with %3A."""
    sampler_id = ctx.sampler.sampler_id
    forms = dict.fromkeys([sampler_id, sampler_id.replace(":", "%3A")])
    for form in forms:
        answer = ctx.client.endpoint("GET", f"samplers/{form}")
        if as_object(answer).get("sampler_id") != sampler_id:
            raise Broken(f"samplers/{form} returned {said(answer)}")
    return "" if len(forms) > 1 else f"there is no ':' in {sampler_id}"
