"""Rollouts: a model's answers to prompts or in environments, with their rewards.

Single answers are sampled in groups, one request per prompt; an environment converses with the
model for several turns. Does not know how a model is trained on them.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import attrs
import numpy as np
import numpy.typing as npt

from tinkex import types
from tinkex.data.records import Task
from tinkex.recipes.rewards import Pool, RewardError, Score, as_score, name_of
from tinkex.sampling import SamplingClient
from tinkex.text.renderer import Renderer
from tinkex.text.responses import parse_response

T = TypeVar("T")
R = TypeVar("R")

#: Characters of an answer that an error shows.
SHOWN = 60


# What users write


@attrs.frozen
class EnvStep:
    """An environment's response to a message of the model.

    Attributes:
        messages: the next messages of the conversation: results of tools, the user's next message.
        reward: of this turn; an episode's reward is the sum.
        done: True ends the episode.
        metrics: other numbers, averaged over the episodes of a step.
    """

    messages: Sequence[Mapping[str, Any]] = ()
    reward: float = 0.0
    done: bool = False
    metrics: Mapping[str, float] = attrs.field(factory=dict)


class Env(Protocol):
    """A conversation with rewards. One object is one episode; a subclass is not needed.

    An attribute `tools`, if there is one, holds JSON schemas of functions that the model may call.
    """

    def reset(self) -> Sequence[Mapping[str, Any]]:
        """The first messages of the episode."""

    def step(self, message: Mapping[str, Any]) -> EnvStep:
        """The response to the model's *message*, which is in the form of
        `tinkex.parse_response`."""


#: Creates the environment for a row of the data.
MakeEnv = Callable[[Mapping[str, Any]], Env]
#: (the model's answer, row of the data) -> reward, or a dict with "reward" and other numbers.
Reward = Callable[[str, Mapping[str, Any]], Any]


# Results


@attrs.frozen(eq=False)
class Trace:
    """A contiguous sequence of tokens of an episode.

    Attributes:
        tokens: (T,) int64.
        said: (T,) float32; 1 where the token was sampled, 0 where it was given.
        logprobs: (T,) float32; of sampled tokens, at the time of sampling; 0 elsewhere.
    """

    tokens: npt.NDArray[np.int64]
    said: npt.NDArray[np.float32]
    logprobs: npt.NDArray[np.float32]


@attrs.frozen(eq=False)
class Episode:
    """A model's answer to one task, in one or several turns.

    Attributes:
        group: number of the task in the step; episodes of a group are compared.
        traces: one, or several if the template writes earlier turns differently later.
        text: the model's last message.
        is_cut: True if it reached the limit of tokens or turns.
    """

    group: int
    traces: Sequence[Trace]
    score: Score
    text: str
    turns: int
    is_cut: bool

    @property
    def length(self) -> int:
        """Number of sampled tokens."""
        return int(sum(trace.said.sum() for trace in self.traces))


@attrs.frozen
class Options:
    """
    Args:
        group_size: episodes of each task.
        plain: continue text prompts without the chat template.
        stop: ends an answer, besides the model's own end tokens.
        max_turns: most turns of an episode in an environment.
        deterministic: one request at a time. A server batches the requests that have arrived, so
            batches depend on timing; so do the last bits of its results, and occasionally a token.
    """

    group_size: int
    max_tokens: int
    temperature: float = 1.0
    stop: Sequence[str] = ()
    plain: bool = False
    max_turns: int = 8
    deterministic: bool = False


@attrs.frozen
class Prompted:
    """Tokens to continue, and the stop strings or tokens."""

    tokens: list[int]
    stop: Any


class Rollouts:
    """Samples episodes of tasks.

    Args:
        reward: scores single answers; None gives every answer the reward 0.
        make_env: instead of *reward*: creates environments for several turns.
        pool: calls both.
    """

    def __init__(
        self,
        tokenizer: Any,
        options: Options,
        pool: Pool,
        reward: Reward | None = None,
        make_env: MakeEnv | None = None,
    ) -> None:
        self.tokenizer, self.options = tokenizer, options
        self._pool, self._reward, self._make_env = pool, reward, make_env
        self._renderer = Renderer(tokenizer)

    def prompt(self, task: Task) -> Prompted:
        """The tokens of a task's prompt; text becomes the user's message if there is a template."""
        is_plain = self.options.plain or self._renderer.template is None
        if isinstance(task.prompt, str) and is_plain:
            stop = list(self.options.stop) or None
            return Prompted(list(self._renderer.encode_prompt(task.prompt)), stop)
        messages = task.prompt
        if isinstance(messages, str):
            messages = ({"role": "user", "content": messages},)
        return self._rendered(messages)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> Prompted:
        rendered = self._renderer.prompt([dict(m) for m in messages], tools)
        stop: Any = rendered.stop
        if self.options.stop and all(isinstance(end, str) for end in stop):
            stop = [*stop, *self.options.stop]
        return Prompted(rendered.tokens, stop or None)

    def sample(
        self,
        sampler: SamplingClient,
        tasks: Sequence[Task],
        seed: int,
        *,
        group_size: int | None = None,
        temperature: float | None = None,
    ) -> list[Episode]:
        """
        Episodes of every task, *group_size* of each, in the order of the tasks.

        Raises:
            RewardError: If a reward or an environment fails, naming it and the answer.
            TinkexError: If sampling fails.
        """
        size = self.options.group_size if group_size is None else group_size
        heat = self.options.temperature if temperature is None else temperature
        if self._make_env is not None:
            return self._in_environments(sampler, self._make_env, tasks, seed, size, heat)
        prompts = [self.prompt(task) for task in tasks]
        futures = self.submitted(
            lambda number: sampler.sample(
                types.ModelInput.from_ints(prompts[number].tokens),
                num_samples=size,
                sampling_params=self._params(prompts[number], heat, seed_of(seed, number)),
            ),
            range(len(prompts)),
        )
        waiting = []
        for number, (task, prompt, future) in enumerate(zip(tasks, prompts, futures)):
            for sampled in future.result().sequences:
                text = self.text(sampled, prompt.stop)
                call = self._reward and self._pool.start(self._reward, text, task.row)
                waiting.append((number, task, prompt, sampled, text, call))
        return [self._judged(*parts) for parts in waiting]

    def submitted(
        self, submit: Callable[[T], Future[R]], inputs: Iterable[T]
    ) -> Iterable[Future[R]]:
        """A future for each of *inputs*; take their results in order.

        With `deterministic`, each is submitted only when it is taken, after the previous one.
        """
        futures = map(submit, inputs)
        return futures if self.options.deterministic else list(futures)

    def _judged(
        self,
        group: int,
        task: Task,
        prompt: Prompted,
        sampled: types.SampledSequence,
        text: str,
        call: Any,
    ) -> Episode:
        try:
            score = Score(0.0) if call is None else _as_score(self._reward, call.result())
        except RewardError as exc:
            raise RewardError(
                f"{exc}; the answer was {_short(text)} to {_short(task.text)}"
            ) from exc
        is_cut = sampled.stop_reason == "length"
        return Episode(group, [_trace(prompt.tokens, sampled)], score, text, 1, is_cut)

    def _params(self, prompt: Prompted, temperature: float, seed: int) -> types.SamplingParams:
        return types.SamplingParams(
            max_tokens=self.options.max_tokens,
            temperature=temperature,
            stop=prompt.stop,
            seed=seed,
        )

    def text(self, sampled: types.SampledSequence, stop: Any) -> str:
        """The sampled text, without the stop string or token."""
        text: str = self.tokenizer.decode(sampled.tokens, skip_special_tokens=True)
        for end in stop or ():
            if isinstance(end, str):
                text = text.removesuffix(end)
        return text

    # Environments

    def _in_environments(
        self,
        sampler: SamplingClient,
        make_env: MakeEnv,
        tasks: Sequence[Task],
        seed: int,
        size: int,
        temperature: float,
    ) -> list[Episode]:
        """Run every episode on a separate thread, so that their turns are batched together."""

        def begin(numbers: tuple[int, int]) -> Future[Episode]:
            task, each = tasks[numbers[0]], seed_of(seed, *numbers)
            return in_background(
                self._episode, sampler, make_env, numbers[0], task, each, temperature
            )

        numbers = itertools.product(range(len(tasks)), range(size))
        return [future.result() for future in self.submitted(begin, numbers)]

    def _episode(
        self,
        sampler: SamplingClient,
        make_env: MakeEnv,
        group: int,
        task: Task,
        seed: int,
        temperature: float,
    ) -> Episode:
        env = self._pool.call(make_env, task.row)
        messages = [dict(message) for message in self._pool.call(env.reset)]
        traces: list[Trace] = []
        metrics: dict[str, float] = {}
        reward, text, turn, is_cut = 0.0, "", 0, True
        for turn in range(1, self.options.max_turns + 1):
            prompt = self._rendered(messages, getattr(env, "tools", None))
            params = self._params(prompt, temperature, seed_of(seed, turn))
            tokens = types.ModelInput.from_ints(prompt.tokens)
            [sampled] = sampler.sample(tokens, 1, params).result().sequences
            _append(traces, prompt.tokens, sampled)
            text = self.text(sampled, prompt.stop)
            message = parse_response(sampled.tokens, self.tokenizer, stop=prompt.stop or ())
            step = self._pool.call(env.step, message)
            if not isinstance(step, EnvStep):
                raise RewardError(
                    f"{type(env).__name__}.step returned {step!r}; return tinkex.EnvStep(...)"
                )
            score = _as_score(env.step, {"reward": step.reward, **step.metrics})
            reward, metrics = reward + score.reward, {**metrics, **score.metrics}
            messages += [message, *(dict(m) for m in step.messages)]
            if step.done:
                is_cut = sampled.stop_reason == "length"
                break
        return Episode(group, traces, Score(reward, metrics), text, turn, is_cut)


def seed_of(*numbers: int) -> int:
    """A seed that depends only on *numbers*."""
    return int(np.random.default_rng(list(numbers)).integers(2**31))


def in_background(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Run *function* on a thread that does not keep the program alive."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=run, name="tinkex-rollout", daemon=True).start()
    return future


def _as_score(function: Any, value: Any) -> Score:
    try:
        return as_score(value)
    except ValueError as exc:
        raise RewardError(f"{name_of(function)} returned {exc}") from exc


def _trace(prompt: Sequence[int], sampled: types.SampledSequence) -> Trace:
    before = len(prompt)
    said = sampled.tokens_np.astype(np.int64)
    logprobs = sampled.logprobs_np
    if logprobs is None:
        raise RewardError("the server gave no log-probabilities of what it sampled")
    return Trace(
        np.concatenate([np.asarray(prompt, np.int64), said]),
        np.concatenate([np.zeros(before, np.float32), np.ones(len(said), np.float32)]),
        np.concatenate([np.zeros(before, np.float32), logprobs]),
    )


def _append(traces: list[Trace], prompt: Sequence[int], sampled: types.SampledSequence) -> None:
    """Add a turn: to the last trace if the prompt continues it, else as a new trace."""
    new = _trace(prompt, sampled)
    if traces:
        last = traces[-1]
        length = len(last.tokens)
        if len(prompt) >= length and np.array_equal(new.tokens[:length], last.tokens):
            traces[-1] = Trace(
                new.tokens,
                np.concatenate([last.said, new.said[length:]]),
                np.concatenate([last.logprobs, new.logprobs[length:]]),
            )
            return
    traces.append(new)


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")
