"""Checks of samples and their log-probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinkex import errors, types, wire
from tinkex.conformance.asking import Broken, NotOffered, as_object, said
from tinkex.conformance.checking import Checks
from tinkex.conformance.data import OTHERS, TOKENS, datum, distance
from tinkex.conformance.lab import Lab, Sampler
from tinkex.text import tokenizer

CHECKS = Checks()

#: Between a sampler and a trainer, in 16 bits too (in nats, on average over tokens).
_AGREE = 0.05


@CHECKS.rule("samples are named by their promise")
def sequence_ids(lab: Lab) -> None:
    """The promise of asample names each sample (sample_sequence_ids); the official SDK from 0.26 on
    fails without. SkyRL 0.3.0 does not name them."""
    answer = lab.sampler.post(TOKENS, 3)
    ended = lab.asker.end(answer)
    ended.value(types.SampleResponse, "asample")
    ids = as_object(answer).get("sample_sequence_ids")
    if not isinstance(ids, list) or len({str(i) for i in ids}) != 3:
        raise Broken(f"for 3 samples there is {ids!r}")


@CHECKS.rule("samples have tokens, log-probabilities and a reason to stop")
def shape(lab: Lab) -> None:
    """As many log-probabilities as tokens, at most max_tokens, ended by "stop" or "length"."""
    response = lab.sampler.sample(TOKENS, 3, params={"max_tokens": 5})
    if len(response.sequences) != 3:
        raise Broken(f"{len(response.sequences)} sequences came for num_samples 3")
    for sequence in response.sequences:
        if not 1 <= len(sequence.tokens) <= 5:
            raise Broken(f"{len(sequence.tokens)} tokens came for max_tokens 5")
        if sequence.logprobs is None or len(sequence.logprobs) != len(sequence.tokens):
            raise Broken("there are not as many log-probabilities as tokens")
        if sequence.stop_reason not in ("stop", "length"):
            raise Broken(f"stop_reason is {sequence.stop_reason!r}")
        if max(sequence.logprobs) > 1e-3:
            raise Broken(f"a log-probability is {max(sequence.logprobs)}")


@CHECKS.rule("log-probabilities of samples are those of forward")
def sampled_logprobs(lab: Lab) -> str:
    """What the sampler says of its tokens is what training computes for them: the ratio that policy
    gradients are made of is 1 at the start."""
    with lab.model() as model:
        model.train([datum()])
        model.train([datum(OTHERS)])
        sampler = lab.open_sampler(model.save_for_sampler(lab.name()))
        [sequence] = sampler.sample(TOKENS, params={"max_tokens": 12, "seed": 1}).sequences
        tokens = [*TOKENS, *sequence.tokens]
        theirs = model.logprobs([datum(tokens)])[len(TOKENS) - 1 :]
        off = float(np.abs(theirs - np.asarray(sequence.logprobs, np.float64)).mean())
        if off > _AGREE:
            raise Broken(f"they differ by {off:.3f} on average")
        return f"{off:.1e} on average"


@CHECKS.rule("prompt log-probabilities are aligned")
def prompt_logprobs(lab: Lab) -> None:
    """As many as there are tokens, the first one null, then log p(token | those before). SkyRL
    gives one less, without the null."""
    with lab.model() as model:
        path = model.save_for_sampler(lab.name())
        response = lab.open_sampler(path).sample(
            TOKENS, params={"max_tokens": 1}, prompt_logprobs=True
        )
        theirs = model.logprobs([datum()])
    found = response.prompt_logprobs
    if found is None:
        raise NotOffered("prompt_logprobs")
    if len(found) != len(TOKENS):
        raise Broken(f"{len(found)} came for {len(TOKENS)} tokens")
    if found[0] is not None or None in found[1:]:
        raise Broken(f"the first is {found[0]}, and {found[1:].count(None)} others are null")
    off = distance(theirs, np.asarray(found[1:], np.float64))
    if off > 4 * _AGREE:
        raise Broken(f"they differ by {off:.3f} from those of forward")


@CHECKS.rule("top-k log-probabilities are aligned")
def topk(lab: Lab) -> None:
    """One row for each token of the prompt, the first null, the best token first. SkyRL refuses
    them, or (0.3.0) leaves them out without a word."""
    fields = {"prompt_logprobs": True, "topk_prompt_logprobs": 2}
    answer = lab.sampler.post(TOKENS, params={"max_tokens": 1}, **fields)
    ended = lab.asker.end(answer)
    if ended.failure is not None:
        raise NotOffered(ended.failure)
    rows = ended.value(types.SampleResponse, "asample").topk_prompt_logprobs
    if rows is None:
        raise Broken("they were asked for, and are left out without a word")
    if len(rows) != len(TOKENS) or rows[0] is not None:
        raise Broken(f"{len(rows)} rows for {len(TOKENS)} tokens, the first {rows[0]}")
    if any(not row or row[0][1] < row[-1][1] for row in rows[1:]):
        raise Broken("a row is empty, or its best token is not the first")


@CHECKS.rule("a seed repeats a sample")
def seed(lab: Lab) -> None:
    """The same seed and request give the same tokens; another seed gives others."""
    drawn = [
        [int(t) for t in lab.sampler.sample(TOKENS, params={"max_tokens": 16, "seed": s})
         .sequences[0].tokens]
        for s in (3, 3, 4, 5)
    ]  # fmt: skip
    if drawn[0] != drawn[1]:
        raise Broken("the same seed gave other tokens")
    if drawn[0] == drawn[2] == drawn[3]:
        raise Broken("other seeds gave the same tokens")


@CHECKS.rule("the samples of one request differ")
def samples_differ(lab: Lab) -> None:
    """num_samples draws so many times, under one seed, too."""
    params = {"max_tokens": 16, "seed": 3}
    sequences = lab.sampler.sample(TOKENS, 4, params=params).sequences
    if len({tuple(map(int, s.tokens)) for s in sequences}) == 1:
        raise Broken("four samples are one and the same")


@CHECKS.rule("temperature 0 takes the likeliest token")
def greedy(lab: Lab) -> None:
    """Whatever the seed, the same tokens, and none is likelier. A server that divides by it, or
    reads 0 as 1, samples."""
    first, second = (
        lab.sampler.sample(TOKENS, params={"max_tokens": 8, "temperature": 0, "seed": s})
        .sequences[0] for s in (1, 2)
    )  # fmt: skip
    if list(first.tokens) != list(second.tokens):
        raise Broken("two seeds gave two continuations")
    drawn = lab.sampler.sample(TOKENS, 8, params={"max_tokens": 1, "seed": 7}).sequences
    best = max(s.logprobs[0] for s in drawn if s.logprobs)
    if first.logprobs and best > first.logprobs[0] + 1e-2:
        raise Broken(f"a sampled token is likelier ({best:.3f}) than the first greedy one "
                     f"({first.logprobs[0]:.3f})")  # fmt: skip


@CHECKS.rule("senseless arguments are refused")
def senseless(lab: Lab) -> None:
    """No samples at all, a negative temperature and the like fail in words, at once or later, and
    an adapter of rank a billion is not tried."""
    wishes = {
        "num_samples=0": lab.sampler.post(TOKENS, 0),
        "temperature=-1": lab.sampler.post(TOKENS, params={"temperature": -1.0}),
        "top_p=2": lab.sampler.post(TOKENS, params={"top_p": 2.0}),
        "an empty prompt": lab.sampler.post([]),
        "rank=10**9": lab.create(rank=10**9),
    }
    for what, answer in wishes.items():
        ended = lab.asker.end(answer)
        if ended.failure is None:
            raise Broken(f"{what} is taken")
        if ended.answer.status >= 500:
            raise Broken(f"{what} gave {ended.failure}")


# Where samples end.


def _continuation(lab: Lab, **params: Any) -> types.SampledSequence:
    params = {"max_tokens": 12, "seed": 9, "temperature": 1.0, **params}
    [sequence] = lab.sampler.sample(TOKENS, params=params).sequences
    return sequence


@CHECKS.rule("a token ends a sample")
def stop_token(lab: Lab) -> None:
    """stop as a list of token ids; the token that stops it is the last one of the sample."""
    free = [int(t) for t in _continuation(lab).tokens]
    if len(free) < 3:
        raise NotOffered("the model ends its text at once")
    wanted = free.index(free[2]) + 1
    stopped = _continuation(lab, stop=[free[2]])
    if [int(t) for t in stopped.tokens] != free[:wanted]:
        raise Broken(f"token {free[2]} at place {wanted} did not end it: {stopped.tokens}")
    if stopped.stop_reason != "stop":
        raise Broken(f"stop_reason is {stopped.stop_reason!r}")


@CHECKS.rule("a text ends a sample")
def stop_text(lab: Lab) -> str:
    """stop as one string and as a list of strings. SkyRL takes only the list."""
    for form in ("no such text \u2603", ["no such text \u2603"]):
        ended = lab.asker.end(lab.sampler.post(TOKENS, params={"stop": form}))
        if ended.failure is not None:
            raise Broken(f"stop={form!r} gave {ended.failure}")
    try:
        words = tokenizer.load(tokenizer.tokenizer_id(lab.base_model, _told_tokenizer(lab)))
    except (errors.TinkexError, ValueError, OSError) as exc:
        return f"taken; not tried with a text that comes, for want of a tokenizer ({exc})"[:120]
    tokens = [int(t) for t in _continuation(lab).tokens]
    for count in range(1, len(tokens)):
        text = words.decode(tokens[:count])[-3:]
        if text.strip() and "\ufffd" not in text:
            break
    else:
        return "taken; the sample holds no text to stop at"
    for form in (text, [text, "no such text"]):
        stopped = _continuation(lab, stop=form)
        if len(stopped.tokens) > count or stopped.stop_reason != "stop":
            raise Broken(
                f"stop={form!r} should end it after {count} tokens; it went on to "
                f"{len(stopped.tokens)} ({stopped.stop_reason})"
            )
    return "one string, several"


def _told_tokenizer(lab: Lab) -> str | None:
    with lab.model() as model:
        answer = lab.asker.post("get_info", {"model_id": model.model_id, "type": "get_info"})
        if answer.status != 200:
            return None
        return wire.from_json(types.GetInfoResponse, answer.json()).model_data.tokenizer_id


@CHECKS.rule("stop=null and stop=[] are taken")
def stop_nothing(lab: Lab) -> None:
    """null: only the end of text stops a sample. []: nothing does, so it runs to max_tokens."""
    forms: tuple[list[str] | None, ...] = (None, [])
    for form in forms:
        answer = lab.sampler.post(TOKENS, 4, params={"stop": form, "max_tokens": 16})
        ended = lab.asker.end(answer)
        if ended.failure is not None:
            raise Broken(f"stop={form!r} gave {ended.failure}")
        for sequence in ended.value(types.SampleResponse, "asample").sequences:
            if form == [] and (sequence.stop_reason, len(sequence.tokens)) != ("length", 16):
                raise Broken(
                    f"with stop=[] a sample ended ({sequence.stop_reason}) after "
                    f"{len(sequence.tokens)} of 16 tokens"
                )


# Samplers and the models they came from.


@CHECKS.rule("sampler weights are frozen while training goes on")
def frozen(lab: Lab) -> str:
    """A sampler samples from the weights that it was made of. SkyRL's follow the training: its
    log-probabilities moved by 0.82 in three steps."""
    with lab.model() as model:
        model.train([datum()])
        sampler = lab.open_sampler(model.save_for_sampler(lab.name()))
        before = sampler.score(TOKENS)
        start = model.logprobs([datum()])
        for _ in range(3):
            model.train([datum()], learning_rate=0.02)
        went = distance(start, model.logprobs([datum()]))
        moved = distance(before, sampler.score(TOKENS))
    if moved > 0.1 * went:
        raise Broken(f"it moved by {moved:.3f} while the model moved by {went:.3f}")
    return f"moved by {moved:.1e}, the model by {went:.2f}"


@CHECKS.rule("sampling from an old checkpoint leaves the model alone")
def old_checkpoint(lab: Lab) -> None:
    """The weights being trained are not those being sampled. In SkyRL, a sample from an older
    checkpoint sets the model back to it, without a word."""
    with lab.model() as model:
        path = model.save_for_sampler(lab.name())
        sampler = lab.open_sampler(path)
        for _ in range(3):
            model.train([datum()], learning_rate=0.02)
        before = model.logprobs([datum()])
        sampler.sample(TOKENS)
        moved = distance(before, model.logprobs([datum()]))
    if moved > 0.02:
        raise Broken(f"one sample moved the model by {moved:.3f}")


@CHECKS.rule("a sampler follows its checkpoint, not the last one used")
def samplers_apart(lab: Lab) -> None:
    """Two samplers of one model, asked in turn, each answer from their own weights."""
    with lab.model() as model:
        samplers = []
        for _ in range(2):
            samplers.append(lab.open_sampler(model.save_for_sampler(lab.name())))
            model.train([datum()], learning_rate=0.05)
        first, second, again = (s.score(TOKENS) for s in (*samplers, samplers[0]))
    if distance(first, second) < 1e-3:
        raise Broken("two checkpoints, before and after a step, give the same log-probabilities")
    if distance(first, again) > 0.1 * distance(first, second):
        raise Broken(
            f"asked after the other, it moved by {distance(first, again):.3f}; the two differ by "
            f"{distance(first, second):.3f}"
        )


@CHECKS.rule("unnamed sampler weights make a sampler at once")
def unnamed(lab: Lab) -> None:
    """save_weights_for_sampler with a number instead of a name gives the sampling session."""
    with lab.model() as model:
        answer = model.post(
            "save_weights_for_sampler", sampling_session_seq_id=lab.sampler_number()
        )
        ended = lab.asker.end(answer)
        saved = ended.value(types.SaveWeightsForSamplerResponse, "save_weights_for_sampler")
        if not saved.sampling_session_id:
            raise Broken("there is no sampling_session_id")
        Sampler(lab.asker, saved.sampling_session_id).sample(TOKENS)


@CHECKS.rule("clones of a sampler get numbers of their own")
def join(lab: Lab) -> None:
    """join_sampling_session numbers each clone of a sampling client, from 1."""
    payload = {"sampling_session_id": lab.sampler.sampler_id, "type": "join_sampling_session"}
    numbers = [
        as_object(lab.asker.endpoint("POST", "join_sampling_session", payload)).get(
            "client_counter"
        )
        for _ in range(2)
    ]
    if not all(isinstance(n, int) and n >= 1 for n in numbers) or numbers[0] == numbers[1]:
        raise Broken(f"the numbers are {numbers}")


@CHECKS.rule("ids are read raw and percent-encoded")
def encoded_ids(lab: Lab) -> str:
    """GET samplers/{id} is asked by some clients with ':' in it, by others with %3A."""
    sampler_id = lab.sampler.sampler_id
    forms = dict.fromkeys([sampler_id, sampler_id.replace(":", "%3A")])
    for form in forms:
        answer = lab.asker.endpoint("GET", f"samplers/{form}")
        if as_object(answer).get("sampler_id") != sampler_id:
            raise Broken(f"samplers/{form} gave {said(answer)}")
    return "" if len(forms) > 1 else f"there is no ':' in {sampler_id}"
