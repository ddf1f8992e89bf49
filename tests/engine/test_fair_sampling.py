"""Users share the running batch: a small request does not wait for another user's big ones."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.support import hf_reference as hf
from tinkex import types
from tinkex.engine.engine import Engine
from tinkex.engine.sample_rows import MOST_ROWS


@pytest.fixture
def engine():
    engine = Engine(device="cpu", threads=1)
    engine.load_base("tiny")
    engine.open_sampler("base", "tiny")
    return engine


def request(tokens=(1, 2, 3), *, num_samples=1, seed=7, **params):
    settings = {"max_tokens": 4, "seed": seed, "stop": [], **params}
    return types.SampleRequest(
        types.ModelInput.from_ints(list(tokens)),
        types.SamplingParams(**settings),
        num_samples=num_samples,
    )


def steps_until(engine, ticket, most=100):
    """How many steps a request takes, and its answer."""
    for step in range(1, most + 1):
        for ended, outcome in engine.sample_step():
            if ended == ticket:
                return step, outcome
    return None, None


def rows_of(engine):
    """Share -> its rows in the running batch."""
    return engine._bases["tiny"].sampler._usage()[0]


def hog(engine, seed=1):
    """What fills the batch for as long as the model's context lasts."""
    engine.submit_sample(
        f"hog {seed}", "base", request(num_samples=1024, max_tokens=1_000_000, seed=seed),
        share="greedy",
    )  # fmt: skip


def test_a_small_request_starts_at_once_beside_a_big_one(engine):
    """1,024 x 1,000,000 tokens made another user's single token wait for over a minute."""
    hog(engine)
    for _ in range(3):
        engine.sample_step()
    assert {"greedy": MOST_ROWS} == rows_of(engine)
    engine.submit_sample("small", "base", request(max_tokens=1), share="other")
    steps, response = steps_until(engine, "small")

    assert 1 == steps
    assert 1 == len(response.sequences[0].tokens)


def test_a_single_token_is_answered_before_the_others_get_their_next(engine):
    """And they get it in the step after that, however many single tokens are asked for."""
    hog(engine)
    for _ in range(3):
        engine.sample_step()
    rows = engine._bases["tiny"].sampler._rows
    lengths = []
    for i in range(6):
        engine.submit_sample(i, "base", request(max_tokens=1, seed=i), share="other")
        ended = [ticket for ticket, _ in engine.sample_step()]
        lengths.append(int(rows.length.max()))
        assert [i] == ended

    assert [1, 0, 1, 0, 1] == [b - a for a, b in pairwise(lengths)]


def test_alone_a_user_has_the_whole_batch(engine):
    hog(engine)
    engine.sample_step()

    assert {"greedy": MOST_ROWS} == rows_of(engine)


def test_two_users_with_much_to_do_have_half_each(engine):
    """Whoever came first."""
    hog(engine)
    engine.sample_step()
    engine.submit_sample("b", "base", request(num_samples=500, max_tokens=50), share="other")
    for _ in range(30):
        engine.sample_step()
    rows = rows_of(engine)

    assert MOST_ROWS == sum(rows.values())
    assert abs(rows["greedy"] - rows["other"]) <= 32


def test_what_was_put_back_comes_to_the_same_tokens(engine):
    """And no token is reported twice."""
    one = request(num_samples=300, max_tokens=12, seed=5)
    engine.submit_sample("alone", "base", one, share="greedy")
    expected = hf.sample_all(engine)["alone"]
    told = []
    engine.submit_sample(
        "beside",
        "base",
        one,
        share="greedy",
        on_token=lambda i, token, _: told.append((i, token)),
    )
    found = {}
    for step in range(200):
        if step in (1, 4, 8):
            many = request((step, 2), num_samples=100, max_tokens=3, seed=step)
            engine.submit_sample(step, "base", many, share="other")
        found |= dict(engine.sample_step())
        if not engine.has_samples:
            break
    tokens = [sequence.tokens for sequence in found["beside"].sequences]

    assert [sequence.tokens for sequence in expected.sequences] == tokens
    assert sorted(told) == sorted((i, t) for i, row in enumerate(tokens) for t in row)
    assert {1, 4, 8, "beside"} == set(found)


def test_every_request_ends_among_many_users(engine):
    """No user waits for ever."""
    for user in range(12):
        engine.submit_sample(
            user,
            "base",
            request((user, 1), num_samples=60, max_tokens=6, seed=user),
            share=user,
        )
    found = hf.sample_all(engine)

    assert set(range(12)) == set(found)
    assert all(len(response.sequences) == 60 for response in found.values())


def test_a_cancelled_request_leaves_its_rows_to_others(engine):
    hog(engine)
    engine.sample_step()
    engine.submit_sample("b", "base", request(num_samples=64, max_tokens=30), share="other")
    engine.sample_step()
    engine.cancel_sample("hog 1")
    steps, _ = steps_until(engine, "b")

    assert steps <= 40
    assert not engine.has_samples


@pytest.mark.parametrize("width", [1, 3])
def test_taking_turns_changes_no_token(engine, width):
    """Where a step has no time for all keys and values, the tokens are the same."""

    def sampled():
        for i in range(100):
            one = request((i % 7, 2, 3), num_samples=width, max_tokens=9, seed=i)
            engine.submit_sample(i, "base", one, share=i % 3)
        found = hf.sample_all(engine)
        return [[s.tokens for s in found[i].sequences] for i in range(100)]

    expected = sampled()
    engine._bases["tiny"].sampler._state._pools._step_positions = 200
    assert expected == sampled()


def test_steps_are_short_for_a_minute_after_another_user_has_asked(engine):
    """Alone, a user's samples all advance in every step: that is quicker in all."""
    batch = engine._bases["tiny"].sampler
    batch._state._pools._step_positions = 200

    def advanced():
        """How many rows get a token in a step."""
        before = batch._rows.length.copy()
        engine.sample_step()
        return int((batch._rows.length > before).sum())

    hog(engine)
    engine.sample_step()
    alone = advanced()
    engine.submit_sample("small", "base", request(max_tokens=1), share="other")
    steps_until(engine, "small")
    steps_until(engine, "nothing", most=2)
    beside = advanced()
    batch._shared_until = 0.0

    assert MOST_ROWS == alone
    assert 0 < beside < advanced()


def test_memory_is_shared_too(engine):
    """Where memory is scarce, not rows."""
    batch = engine._bases["tiny"].sampler
    one = request(num_samples=1, max_tokens=200)
    engine.submit_sample("probe", "base", one)
    unit = next(iter(batch._waiting))
    batch._memory = 40 * batch._bytes(unit)
    hf.sample_all(engine)
    for i in range(60):
        engine.submit_sample(("a", i), "base", request(max_tokens=200, seed=i), share="greedy")
    engine.sample_step()
    before = rows_of(engine)
    for i in range(30):
        engine.submit_sample(("b", i), "base", request(max_tokens=200, seed=i), share="other")
    for _ in range(40):
        engine.sample_step()

    assert {"greedy": 40} == before
    assert {"greedy": 20, "other": 20} == rows_of(engine)
