"""Rollouts: groups of answers, environments of several turns, and what becomes of their tokens."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest

import tinkex
from tests.support.fake_service import ByteTokenizer
from tinkex import types
from tinkex.data import files, records
from tinkex.recipes import rewards, rollouts
from tinkex.text.renderer import Renderer


class Scripted:
    """A sampling client that says the given texts, one after the other, whoever asks."""

    def __init__(self, *texts):
        self.texts, self.prompts, self.params = list(texts), [], []

    def sample(self, prompt, num_samples=1, sampling_params=None):
        self.prompts.append(ByteTokenizer().decode(prompt.to_ints()))
        self.params.append(sampling_params)
        sequences = []
        for _ in range(num_samples):
            text = self.texts.pop(0)
            logprobs = -np.arange(1.0, len(text) + 1)
            reason = "stop" if text.endswith("\nUser:") else "length"
            sequences.append(types.SampledSequence(list(text.encode()), logprobs, reason))
        future = Future()
        future.set_result(types.SampleResponse(sequences))
        return future


@pytest.fixture
def pool():
    pool = rewards.Pool(2, 30)
    yield pool
    pool.close()


def task(prompt, **row):
    return records.parse({"prompt": prompt, **row}, "task")


def test_a_group_of_answers_is_one_request_and_each_is_judged_with_its_row(pool):
    sampler = Scripted("4", "5", "9 ", "x")
    options = rollouts.Options(2, 7, stop=("\n",))
    judge = lambda answer, row: float(answer.strip() == row["right"])  # noqa: E731
    made = rollouts.Rollouts(ByteTokenizer(), options, pool, judge)

    episodes = made.sample(sampler, [task("2+2=", right="4"), task("3*3=", right="9")], 0)

    assert ["2+2=", "3*3="] == sampler.prompts
    assert [(0, "4", 1.0), (0, "5", 0.0), (1, "9 ", 1.0), (1, "x", 0.0)] == [
        (e.group, e.text, e.score.reward) for e in episodes
    ]
    assert {(7, ("\n",))} == {(p.max_tokens, tuple(p.stop)) for p in sampler.params}
    assert 2 == len({p.seed for p in sampler.params})
    [trace] = episodes[2].traces
    assert [0, 0, 0, 0, 0, 1, 1] == trace.said.tolist()
    assert [-1, -2] == trace.logprobs[-2:].tolist()


def test_what_ends_an_answer_is_not_shown_to_the_reward_but_is_learned(pool):
    """It is what the model has to say to end; a message's end is the template's."""
    sampler, seen = Scripted("Hello\nUser:"), []
    made = rollouts.Rollouts(
        ByteTokenizer(), rollouts.Options(1, 20), pool, lambda answer, row: seen.append(answer) or 1
    )

    [episode] = made.sample(sampler, [task([{"role": "user", "content": "Hi"}])], 0)

    assert ["Hello"] == seen
    assert len("Hello\nUser:") == episode.length
    assert not episode.is_cut


class Guess:
    """The model guesses a number; it hears "higher" until it is right."""

    def __init__(self, row):
        self.number, self.guesses = row["number"], 0

    def reset(self):
        return [{"role": "user", "content": "Guess."}]

    def step(self, message):
        self.guesses += 1
        if message["content"] == self.number:
            return tinkex.EnvStep(reward=1.0, done=True, metrics={"guesses": self.guesses})
        return tinkex.EnvStep([{"role": "user", "content": "higher"}], reward=-0.25)


def test_an_environment_talks_with_the_model_until_it_is_done(pool):
    """One sequence of tokens, of which what the model said counts; the rewards are summed."""
    sampler = Scripted(" 1\nUser:", " 2\nUser:")
    made = rollouts.Rollouts(ByteTokenizer(), rollouts.Options(1, 20), pool, make_env=Guess)

    [episode] = made.sample(sampler, [task("Guess.", number="2")], 0)

    assert (0.75, {"guesses": 2.0}, 2) == (
        episode.score.reward,
        episode.score.metrics,
        episode.turns,
    )
    assert sampler.prompts[1].startswith(sampler.prompts[0])
    said = [
        ByteTokenizer().decode(trace.tokens[trace.said > 0]).strip() for trace in episode.traces
    ]
    assert "1" in "".join(said) and "2" in "".join(said)
    assert episode.length == len(" 1\nUser:") + len(" 2\nUser:")
    for trace in episode.traces:
        assert not trace.logprobs[trace.said == 0].any()


def test_turns_that_continue_one_another_are_one_sequence():
    prompt, first = [1, 2, 3], types.SampledSequence([4, 5], [-1.0, -2.0], "stop")
    second = types.SampledSequence([8], [-3.0], "stop")
    traces = []

    rollouts._append(traces, prompt, first)
    rollouts._append(traces, [1, 2, 3, 4, 5, 6, 7], second)
    rollouts._append(traces, [1, 2, 9], second)  # the template has written it differently

    assert [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 9, 8]] == [t.tokens.tolist() for t in traces]
    assert [0, 0, 0, 1, 1, 0, 0, 1] == traces[0].said.tolist()
    assert [0, 0, 0, -1, -2, 0, 0, -3] == traces[0].logprobs.tolist()


def test_an_episode_ends_at_the_largest_number_of_turns(pool):
    sampler = Scripted(*[" 1\nUser:"] * 3)
    options = rollouts.Options(1, 20, max_turns=3)
    made = rollouts.Rollouts(ByteTokenizer(), options, pool, make_env=Guess)

    [episode] = made.sample(sampler, [task("Guess.", number="2")], 0)

    assert (3, True, -0.75) == (episode.turns, episode.is_cut, episode.score.reward)


def test_an_environment_can_offer_tools_and_gets_the_calls(pool, monkeypatch):
    """The template shows the tools; the results come back as messages of the tool."""
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    shown, original = [], Renderer.prompt

    def prompt(self, messages, tools=None):
        shown.append((tools, [message["role"] for message in messages]))
        return original(self, [m for m in messages if m["role"] == "user"])

    class Calculator:
        tools = (tool,)

        def reset(self):
            return [{"role": "user", "content": "1 + 2?"}]

        def step(self, message):
            if calls := message.get("tool_calls"):
                numbers = calls[0]["function"]["arguments"]
                result = str(numbers["a"] + numbers["b"])
                return tinkex.EnvStep([{"role": "tool", "content": result}])
            return tinkex.EnvStep(reward=float(message["content"] == "3"), done=True)

    monkeypatch.setattr(Renderer, "prompt", prompt)
    call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
    options = rollouts.Options(1, 99)
    made = rollouts.Rollouts(ByteTokenizer(), options, pool, make_env=lambda row: Calculator())

    [episode] = made.sample(Scripted(f"{call}\nUser:", " 3\nUser:"), [task("x")], 0)

    assert (1.0, 2) == (episode.score.reward, episode.turns)
    assert [((tool,), ["user"]), ((tool,), ["user", "assistant", "tool"])] == shown


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        (lambda self, message: 1 / 0, r"raised ZeroDivisionError"),
        (lambda self, message: None, r"Guess.step returned None; return tinkex.EnvStep"),
        (lambda self, message: tinkex.EnvStep(reward=float("inf")), "inf, which is not a finite"),
    ],
)
def test_an_environment_that_fails_is_named(pool, monkeypatch, step, problem):
    monkeypatch.setattr(Guess, "step", step)
    made = rollouts.Rollouts(ByteTokenizer(), rollouts.Options(1, 20), pool, make_env=Guess)

    with pytest.raises(tinkex.RewardError, match=problem):
        made.sample(Scripted(" 1\nUser:"), [task("Guess.", number="2")], 0)


# Tasks


def test_a_task_keeps_its_row_and_a_row_without_a_prompt_is_refused():
    assert {"prompt": "2+2=", "right": "4"} == task("2+2=", right="4").row
    with pytest.raises(ValueError, match=r"row 1: has .text.; it needs .prompt."):
        files.from_rows([{"text": "a"}], shape="task")
    with pytest.raises(ValueError, match="prompt is empty"):
        task("")
