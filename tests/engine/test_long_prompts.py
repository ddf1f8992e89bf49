"""A long prompt is read a piece at each step: the same numbers, and others do not wait for it."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch

from tests.support import hf_reference as hf
from tinkex import types
from tinkex.engine import loading, long_prompts, sample_turns, weight_store
from tinkex.engine.base_model import Prompt
from tinkex.engine.cpu_parallel import Workers
from tinkex.engine.engine import Engine
from tinkex.engine.sample_rows import MOST_ROWS

#: Of the generic path: with a cache that allows pieces, and without.
IN_PIECES = ["gpt2", "cohere2", "qwen3_moe", "deepseek_v3"]
WHOLE = ["averaging"]

LONG = [(7 * i) % 250 for i in range(150)]


@pytest.fixture
def short_steps(monkeypatch):
    """A step has time for 16 tokens, for 64 while a user is alone, and reads pieces of 8."""
    monkeypatch.setitem(long_prompts.PREFILL_TOKENS, "cpu", 16)
    monkeypatch.setattr(long_prompts, "LEAST_PIECE", 8)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Kind of model -> an engine with samplers of it: "base", and "a" with an adapter."""
    made = {}

    def engine(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            base = hf.make_base(folder / "base", kind)
            adapter = hf.make_adapter(base, folder / "a", rank=4)
            made[kind] = Engine(device="cpu", threads=1)
            made[kind].load_base(str(base))
            made[kind].open_sampler("base", str(base))
            made[kind].open_sampler("a", str(base), directory=adapter)
        return made[kind]

    return engine


def request(tokens=(1, 2, 3), *, num_samples=1, more=None, **params):
    settings = {"max_tokens": 4, "seed": 7, "stop": [], **params}
    prompt = types.ModelInput.from_ints(list(tokens))
    sampling = types.SamplingParams(**settings)
    return types.SampleRequest(prompt, sampling, num_samples=num_samples, **(more or {}))


def batch_of(engine):
    [loaded] = engine._bases.values()
    return loaded.sampler


def reading(engine):
    """Share -> tokens of its prompt that have been read."""
    return {share: long.done for share, long in batch_of(engine)._prompts._reading.items()}


def ask(engine, one, sampler="a"):
    engine.submit_sample("t", sampler, one)
    found = hf.sample_all(engine)["t"]
    if isinstance(found, Exception):
        raise found
    return found


# -- the numbers ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", [*hf.CONFIGS, *IN_PIECES])
@pytest.mark.parametrize("sizes", [(1, 40, 6, 3), (25, 25)], ids=["uneven", "halves"])
def test_pieces_come_to_what_one_pass_does(engines, kind, sizes):
    """Windows and caps among them; the state that the sequences start from, too."""
    base = batch_of(engines(kind))._base
    tokens = np.array([(5 * i) % 200 for i in range(sum(sizes))], np.int32)
    whole, pieces = base.sampling_state(Workers(1)), base.sampling_state(Workers(1))
    seen = []
    expected = whole.begin([Prompt(tokens, None, [[0], [1, 2]])], lambda _, own: seen.extend(own))

    reader = pieces.read(Prompt(tokens, None))
    hidden = torch.cat([reader.read(count) for count in sizes])
    logits = reader.finish([[0], [1, 2]])

    torch.testing.assert_close(hidden, seen[0], atol=1e-4, rtol=1e-4)
    same_chances(logits, expected[0])
    at, places = np.array([3, 4, 5]), np.full(3, len(tokens))
    steps = [s.advance(at, places, dict.fromkeys(range(3)), in_turn=False) for s in (whole, pieces)]
    assert sorted(steps[0][0]) == sorted(steps[1][0])
    ours, theirs = (logits[np.argsort(rows)] for rows, logits in steps)
    same_chances(ours, theirs)


def same_chances(ours, theirs):
    """Log-probabilities within 1e-5."""
    torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1), atol=1e-5, rtol=2e-6)


SCORES = {
    "all": {"prompt_logprobs": True, "topk_prompt_logprobs": 3},
    "the last": {"prompt_logprobs": True, "prompt_logprobs_last_n": 70},
    "drawn": {"prompt_logprobs": True, "topk_prompt_logprobs": 2, "prompt_alt_tokens_k": 2},
}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("asked", SCORES)
def test_a_response_is_that_of_one_pass(engines, short_steps, monkeypatch, kind, asked):
    """Samples, prompt log-probabilities, likely tokens, random tokens, targets: within 1e-5."""
    engine = engines(kind)
    rng = np.random.default_rng(0)
    targets = types.TensorData(rng.integers(-1, 250, (len(LONG) - 1, 2)))
    more = {**SCORES[asked], "target_prompt_logprobs": targets}
    more.setdefault("topk_prompt_logprobs", 0)
    one = request(LONG, num_samples=3, more=more)
    engine.submit_sample("t", "a", one)
    engine.sample_step()
    assert {None: 64} == reading(engine)
    in_pieces = hf.sample_all(engine)["t"]
    again = ask(engine, one)
    monkeypatch.setitem(long_prompts.PREFILL_TOKENS, "cpu", 1024)
    whole = ask(engine, one)

    for name, value in present(whole).items():
        np.testing.assert_allclose(present(in_pieces)[name], value, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(present(in_pieces)[name], present(again)[name])


def present(response):
    """The numbers that a response has."""
    found = {
        "tokens": np.concatenate([s.tokens for s in response.sequences]),
        "logprobs": np.concatenate([s.logprobs for s in response.sequences]),
        "prompt": response.prompt_logprobs_np,
        "targets": response.target_prompt_logprobs.to_numpy(),
    }
    if response.topk_prompt_logprobs_np is not None:
        found["ids"] = response.topk_prompt_logprobs_np.token_ids
        found["topk"] = response.topk_prompt_logprobs_np.logprobs
    if response.prompt_alt_tokens is not None:
        found["drawn"] = response.prompt_alt_tokens.tokens.to_numpy()
        found["of drawn"] = response.prompt_alt_tokens.logprobs.to_numpy()
    return found


@pytest.mark.parametrize("kind", WHOLE)
def test_a_model_whose_cache_does_not_allow_pieces_computes_a_prompt_a_step(
    engines, short_steps, kind
):
    engine = engines(kind)
    for i in range(3):
        engine.submit_sample(i, "base", request(LONG, max_tokens=1, seed=i), share=i)

    assert not batch_of(engine)._state.reads_in_pieces
    assert [1, 1, 1] == [len(engine.sample_step()) for _ in range(3)]


def test_a_model_with_states_that_begin_again_at_every_piece_is_noticed(tmp_path, monkeypatch):
    """It is tried when a model is loaded."""
    from tinkex.engine.generic import sampling

    read = sampling.GenericReader.read

    def forgets(reader, count):
        reader._cache = sampling.new_cache(reader._model.adapted.model)
        return read(reader, count)

    base = hf.make_base(tmp_path / "base", "gpt2")
    assert loading.load(str(base), torch.device("cpu")).base.reads_in_pieces
    monkeypatch.setattr(sampling.GenericReader, "read", forgets)
    assert not loading.load(str(base), torch.device("cpu")).base.reads_in_pieces


# -- whose turn it is ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_small_request_does_not_wait_for_a_long_prompt(engines, short_steps, kind):
    engine = engines(kind)
    engine.submit_sample("long", "a", request(LONG), share="greedy")
    engine.sample_step()
    engine.submit_sample("small", "base", request(max_tokens=1), share="other")

    assert ["small"] == [ticket for ticket, _ in engine.sample_step()]
    assert {"greedy": 64} == reading(engine)  # what has an answer is not kept for another piece
    engine.sample_step()
    assert 64 < reading(engine)["greedy"] <= 64 + 16
    assert {"long"} == set(hf.sample_all(engine))


def test_a_step_reads_no_more_than_it_has_time_for(engines, short_steps):
    """However many prompts wait."""
    engine = engines("llama")
    read = []
    for share in "ab":
        for i in range(3):
            engine.submit_sample((share, i), "a", request(LONG, seed=i), share=share)
    while engine.has_samples:
        before = reading(engine)
        engine.sample_step()
        read.append(sum(max(0, n - before.get(share, 0)) for share, n in reading(engine).items()))

    assert 8 <= max(read) <= 16 + 8


def test_long_prompts_of_two_users_are_read_in_turn(engines, short_steps):
    """Whoever came first, and however many more one of them has waiting."""
    engine = engines("llama")
    for i in range(5):
        engine.submit_sample(("greedy", i), "a", request(LONG, seed=i), share="greedy")
    engine.sample_step()
    engine.submit_sample("other", "a", request(LONG[::-1]), share="other")
    engine.sample_step()
    start = reading(engine)["greedy"]
    for _ in range(6):
        engine.sample_step()
    read = reading(engine)

    assert abs(read["other"] - (read["greedy"] - start)) <= 24
    assert 6 == len(hf.sample_all(engine))


def test_pieces_are_larger_where_every_step_reads_the_weights_from_disk(tmp_path, monkeypatch):
    """Of a model too large for the memory, a short piece takes as long as a whole prompt."""
    base = hf.make_base(tmp_path / "base", "llama")
    monkeypatch.setattr(weight_store, "SMALLEST", 0)
    monkeypatch.setitem(sample_turns.STEP_OPERATIONS, "cpu", 1.0)
    tokens = {}
    for name, folder in (("memory", None), ("disk", tmp_path)):
        store = weight_store.WeightStore(folder)
        model = loading.load(str(base), torch.device("cpu")).base
        linears = {
            key: attrs.evolve(linear, weight=store.keep(linear.weight))
            for key, linear in model.linears.items()
        }
        model = attrs.evolve(model, linears=linears)
        state = model.sampling_state(Workers(1))
        prompts = long_prompts.LongPrompts(model, state)
        prompts.begin_step(is_alone=False)
        tokens[name] = next(n for n in range(2000) if state.operations(0, n) >= prompts.most)

    assert {"memory": 32, "disk": 512} == tokens


def test_short_prompts_do_not_keep_a_long_one_waiting(engines, short_steps):
    """A quarter of every second step is its own: answers come first, but not twice in a row."""
    engine = engines("llama")
    engine.submit_sample("long", "a", request(LONG, max_tokens=1), share="a")
    found, step = {}, 0
    while "long" not in found:
        for i in range(8):
            engine.submit_sample((step, i), "base", request((step, i, 1), max_tokens=1), share="b")
        found |= dict(engine.sample_step())
        step += 1

    assert step <= 2 * len(LONG) / 8 + 2
    hf.sample_all(engine)


def test_a_users_short_requests_pass_its_own_long_ones(engines, short_steps):
    engine = engines("llama")
    for i in range(3):
        engine.submit_sample(("long", i), "a", request(LONG[i:]), share="a")
    engine.submit_sample("small", "base", request(max_tokens=1), share="a")

    assert ["small"] == [ticket for ticket, _ in engine.sample_step()]
    assert 3 == len(hf.sample_all(engine))


# -- samples of one prompt -----------------------------------------------------------------------


def test_many_samples_of_a_long_prompt_read_it_once(engines, short_steps, monkeypatch):
    """Those that start later join it while it is read, also those of another request."""
    engine = engines("llama")
    batch = batch_of(engine)
    counts = []
    read_piece = long_prompts.LongPrompts._read_piece

    def counted(prompts, long, stop):
        counts.append(stop - long.done)
        read_piece(prompts, long, stop)

    monkeypatch.setattr(long_prompts.LongPrompts, "_read_piece", counted)
    engine.submit_sample("first", "a", request(LONG, num_samples=40, max_tokens=2))
    engine.sample_step()
    engine.submit_sample("second", "a", request(LONG, num_samples=2, seed=1, max_tokens=2))
    found = hf.sample_all(engine)

    assert len(LONG) == sum(counts)
    hits = [found[ticket].prompt_cache_hit_tokens for ticket in ("first", "second")]
    assert [0, len(LONG)] == hits
    assert len(batch._rows.free) == MOST_ROWS


def test_scores_that_need_its_beginning_are_not_taken_from_a_prompt_half_read(engines, short_steps):
    engine = engines("llama")
    more = {"prompt_logprobs": True}
    expected = ask(engine, request(LONG, more=more)).prompt_logprobs_np
    engine.submit_sample("first", "a", request(LONG))
    engine.sample_step()
    engine.submit_sample("scores", "a", request(LONG, more=more))
    found = hf.sample_all(engine)

    np.testing.assert_allclose(found["scores"].prompt_logprobs_np, expected, atol=1e-5)


# -- in the middle of a prompt -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_cancelled_request_leaves_in_the_middle_of_its_prompt(engines, short_steps, kind):
    engine = engines(kind)
    expected = ask(engine, request(LONG[::-1]))
    engine.submit_sample("gone", "a", request(LONG, num_samples=20), share="a")
    engine.submit_sample("stays", "a", request(LONG[::-1]), share="b")
    for _ in range(3):
        engine.sample_step()
    engine.cancel_sample("gone")
    assert {"b"} == set(reading(engine))
    found = hf.sample_all(engine)

    assert ["stays"] == list(found)
    assert expected.sequences[0].tokens == found["stays"].sequences[0].tokens
    assert len(batch_of(engine)._rows.free) == MOST_ROWS


def test_a_request_put_back_in_the_middle_of_its_prompt_comes_to_the_same(engines, short_steps):
    """Its scores, too, which it had in part."""
    engine = engines("llama")
    batch = batch_of(engine)
    more = {"prompt_logprobs": True}
    one = request(LONG, num_samples=MOST_ROWS, max_tokens=3, more=more)
    expected = ask(engine, one)
    engine.submit_sample("put back", "a", one, share="greedy")
    for _ in range(2):
        engine.sample_step()
    had = batch._usage()[0]
    for i in range(4):
        many = request((i, 2), num_samples=64, max_tokens=2, seed=i)
        engine.submit_sample(i, "base", many, share="other")
    engine.sample_step()
    left = batch._usage()[0]
    found = hf.sample_all(engine)

    assert MOST_ROWS == had["greedy"] > left["greedy"]
    assert [s.tokens for s in expected.sequences] == [s.tokens for s in found["put back"].sequences]
    np.testing.assert_allclose(
        found["put back"].prompt_logprobs_np, expected.prompt_logprobs_np, atol=1e-5
    )
    assert {0, 1, 2, 3, "put back"} == set(found)


def test_a_prompt_dropped_with_its_last_sample_begins_again(engines, short_steps):
    """Nothing of what was read is left, of its scores neither."""
    engine = engines("llama")
    batch = batch_of(engine)
    one = request(LONG, more={"prompt_logprobs": True})
    expected = ask(engine, one).prompt_logprobs_np
    engine.submit_sample("t", "a", one, share="a")
    engine.sample_step()
    batch._preempt("a", batch._waiting)
    assert {} == reading(engine)
    found = hf.sample_all(engine)["t"]

    np.testing.assert_allclose(found.prompt_logprobs_np, expected, atol=1e-5)


def test_a_failure_in_the_middle_of_a_prompt_ends_that_request_alone(
    engines, short_steps, monkeypatch
):
    engine = engines("llama")
    read_piece = long_prompts.LongPrompts._read_piece

    def fails(prompts, long, stop):
        if long.prompt.share == "culprit" and stop > 100:
            raise RuntimeError("the second half is cursed")
        read_piece(prompts, long, stop)

    expected = ask(engine, request(LONG[::-1])).sequences[0].tokens
    monkeypatch.setattr(long_prompts.LongPrompts, "_read_piece", fails)
    engine.submit_sample("culprit", "a", request(LONG), share="culprit")
    engine.submit_sample("good", "a", request(LONG[::-1]), share="good")
    found = hf.sample_all(engine)

    assert isinstance(found["culprit"], RuntimeError)
    assert expected == found["good"].sequences[0].tokens
