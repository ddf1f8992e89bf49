"""A failure at any line of a sampling step ends the request that caused it, and no other."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support import hf_reference as hf
from tinkex import types
from tinkex.engine import (
    fast_path,
    kv_cache,
    long_prompts,
    lora,
    prompt_logprobs,
    sample_pools,
    sample_requests,
    sample_turns,
    sampler,
    token_sampling,
)
from tinkex.engine.engine import Engine

#: Where faults are injected: every line of these that a step executes.
MODULES = (
    sampler,
    fast_path,
    long_prompts,
    sample_requests,
    sample_pools,
    sample_turns,
    token_sampling,
    kv_cache,
    prompt_logprobs,
    lora,
)
FILES = {str(Path(module.__file__)): Path(module.__file__).stem for module in MODULES}
#: The code that handles a failure. A fault in it, on top of another one, is not injected.
HANDLERS = {"step", "is_busy", "_isolate", "_forget_state", "_fail", "_drop", "cancel"}
CULPRIT = "culprit"
#: Parts of all lines: a quick run tries one, `make test-slow` the others.
ONCE, EVERY_STEP = 16, 8


def parts(count):
    slow = (pytest.param(part, marks=pytest.mark.slow) for part in range(1, count))
    return pytest.mark.parametrize("part", [0, *slow])


class Injected(Exception):
    pass


@pytest.fixture(autouse=True)
def prompts_of_some_steps(monkeypatch):
    """A step has time for a part of the longest prompts only."""
    monkeypatch.setitem(long_prompts.PREFILL_TOKENS, "cpu", 16)
    monkeypatch.setattr(long_prompts, "LEAST_PIECE", 8)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    engine = Engine(device="cpu", threads=1)
    engine.load_base("tiny")
    engine.open_sampler("base", "tiny")
    directory = tmp_path_factory.mktemp("adapter")
    engine.create_model("a", "tiny", types.LoraConfig(rank=4), seed=1)
    engine._models["a"].weights.uniform_(-0.1, 0.1)
    engine.save("a", directory, optimizer=False)
    engine.open_sampler("a", "tiny", directory=directory)
    return engine


def request(tokens, *, num_samples=1, more=None, **params):
    settings = {"max_tokens": 3, "seed": 7, "stop": [], **params}
    return types.SampleRequest(
        types.ModelInput.from_ints(tokens),
        types.SamplingParams(**settings),
        num_samples=num_samples,
        **(more or {}),
    )


#: Ticket -> what it samples from, and the request: one for each path through a step.
REQUESTS = {
    "greedy": ("base", request([1, 2, 3], temperature=0)),
    "several": ("a", request([5, 6], num_samples=3, top_k=5, max_tokens=4)),
    CULPRIT: ("base", request([1, 2, 3], num_samples=2, top_p=0.9)),
    "scores": ("a", request([9, 8, 7], more={"prompt_logprobs": True, "topk_prompt_logprobs": 2})),
    "stops": ("base", request([4, 4], stop=["zzzz"], more={"topk_sample_logprobs": 2})),
    "one token": ("base", request([3] * 150, max_tokens=1)),
    "long": ("a", request([5, 3] * 50, num_samples=2, more={"prompt_logprobs": True})),
}


def answers(engine, tracer=None, tickets=tuple(REQUESTS)):
    """The outcome of each request, all sampled together; *tracer* sees each step."""
    told = {ticket: [] for ticket in tickets}
    for ticket, (name, one) in ((ticket, REQUESTS[ticket]) for ticket in tickets):

        def on_token(index, token, logprob, ticket=ticket):
            told[ticket].append((index, token))

        engine.submit_sample(ticket, name, one, on_token=on_token)
    found = {}
    for _ in range(400):
        if not engine.has_samples:
            break
        before = sys.gettrace()  # of coverage, which continues to count
        sys.settrace(tracer or before)
        try:
            done = engine.sample_step()
        finally:
            sys.settrace(before)
        for ticket, outcome in done:
            assert ticket not in found, "answered twice"
            found[ticket] = outcome
    assert not engine.has_samples
    return {t: o if isinstance(o, Exception) else plain(o, told[t]) for t, o in found.items()}


def plain(response, told):
    """All that a response holds, and which tokens were reported as they came."""
    scores = response.prompt_logprobs_np
    return (
        [(s.tokens, s.stop_reason, s.topk_logprobs) for s in response.sequences],
        [] if scores is None else np.nan_to_num(scores).tolist(),
        sorted(told) == sorted((i, t) for i, s in enumerate(response.sequences) for t in s.tokens),
    )


def lines_of_a_step(engine, tickets=tuple(REQUESTS)):
    """Every (file, line) that the steps of these requests execute."""
    seen = set()

    def trace(frame, event, _):
        code = frame.f_code
        if code.co_filename not in FILES:
            return None
        if event == "line" and code.co_name not in HANDLERS:
            seen.add((code.co_filename, frame.f_lineno))
        return trace

    answers(engine, trace, tickets)
    return sorted(seen)


def job_of(frame):
    """The ticket of the only request that the code in *frame* works on, or None."""
    while frame is not None and frame.f_code.co_filename in FILES:
        for name in ("job", "self"):
            if isinstance(frame.f_locals.get(name), sample_requests.Job):
                return frame.f_locals[name].ticket
        frame = frame.f_back
    return None


def fault_at(place, condition):
    """A tracer that raises at a line as long as *condition* holds."""

    def trace(frame, event, _):
        if frame.f_code.co_filename not in FILES:
            return None
        here = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and here == place and condition(frame):
            raise Injected(f"{FILES[place[0]]}:{place[1]}")
        return trace

    return trace


def compare(expected, found, place):
    """The tickets that failed; all others have their undisturbed answers."""
    assert expected.keys() == found.keys(), place
    failed = {t for t, outcome in found.items() if isinstance(outcome, Exception)}
    for ticket in found.keys() - failed:
        ours, theirs = expected[ticket], found[ticket]
        assert [s[:2] for s in ours[0]] == [s[:2] for s in theirs[0]], (place, ticket)
        assert np.allclose(ours[1], theirs[1], atol=1e-3), (place, ticket)
        assert ours[2] == theirs[2], (place, ticket)
    assert all(isinstance(found[ticket], Injected) for ticket in failed), place
    return failed


@parts(ONCE)
def test_a_fault_at_any_line_ends_one_request_at_most(engine, part):
    """It happens once: whatever had been half done is computed again."""
    expected = answers(engine)
    places = lines_of_a_step(engine)
    assert len(places) > 200
    for place in places[part::ONCE]:
        hits = []
        once = fault_at(place, lambda _, hits=hits: not hits and not hits.append(1))
        assert 1 >= len(compare(expected, answers(engine, once), place)), place
    assert set() == compare(expected, answers(engine), None)


@parts(EVERY_STEP)
def test_a_request_that_fails_every_step_fails_alone(engine, part):
    """The fault comes back as long as the culprit is in the batch, at any line that it executes."""
    expected = answers(engine)
    batch = engine._bases["tiny"].sampler

    def present(frame):
        if job_of(frame) not in (None, CULPRIT):
            return False  # these lines work on another request alone
        return any(job.ticket == CULPRIT for job in batch._begun)

    hit = 0
    for place in lines_of_a_step(engine, [CULPRIT])[part::EVERY_STEP]:
        failed = compare(expected, answers(engine, fault_at(place, present)), place)
        assert failed <= {CULPRIT}, place
        hit += bool(failed)
    assert hit > 10


def test_numbers_beyond_64_bit_are_refused_where_they_are_decoded():
    """They used to overflow inside a step, which failed every running sample of every user."""
    for settings in ({"top_k": 2**70}, {"stop": [2**70]}, {"top_k": 2**31}, {"stop": [2**31]}):
        with pytest.raises(ValueError, match=r"top_k|stop"):
            types.SamplingParams(**settings)


def test_a_callback_that_fails_ends_its_own_request(engine):
    expected = answers(engine)["greedy"]

    def broken(index, token, logprob):
        raise Injected("the listener is gone")

    engine.submit_sample("broken", "base", REQUESTS["greedy"][1], on_token=broken)
    engine.submit_sample("fine", *REQUESTS["greedy"])
    found = hf.sample_all(engine)

    assert isinstance(found["broken"], Injected)
    assert expected[0][0][0] == found["fine"].sequences[0].tokens
