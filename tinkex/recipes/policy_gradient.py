"""Policy gradients on sampled answers, weighted by their advantages, as an `Objective`.

rollouts.py samples, the server computes the losses. Distillation is the same with a teacher instead
of the reference, and without rewards. Does not know about folders or the command line.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from tinkex import types
from tinkex.data.records import Task
from tinkex.data.split import Plan
from tinkex.recipes import loop
from tinkex.recipes.loop import Prompt, Work
from tinkex.recipes.rewards import RewardError
from tinkex.recipes.rollouts import Episode, Rollouts, Trace, in_background, seed_of
from tinkex.recipes.settings import RewardSettings
from tinkex.sampling import SamplingClient
from tinkex.training import TrainingClient

#: Held-out prompts whose answers are shown before and after training.
SHOWN_PROMPTS = 3
#: A divergence between the log-probabilities of sampler and trainer above this is logged.
MOST_SAMPLER_KL = 0.05
#: A group's rewards are divided by their standard deviation plus this.
LEAST_DEVIATION = 1e-4

Floats = npt.NDArray[np.float32]

logger = logging.getLogger("tinkex")


def advantages(rewards: Sequence[float], kind: str) -> npt.NDArray[np.float64]:
    """
    The advantage of each episode over its group.

    Args:
        rewards: of the episodes of one group.
        kind: "grpo": reward minus mean, divided by the standard deviation (Shao et al. 2024);
            "centered": without the division (Liu et al. 2025, Dr. GRPO); "rloo": reward minus the
            mean of the others (Ahmadian et al. 2024).
    """
    values = np.asarray(rewards, np.float64)
    centered = values - values.mean()
    if kind == "grpo":
        return np.asarray(centered / (values.std() + LEAST_DEVIATION))
    if kind == "rloo":
        return np.asarray(centered * len(values) / max(1, len(values) - 1))
    return np.asarray(centered)


@attrs.frozen(eq=False)
class _Part:
    """A trace with its advantages.

    Attributes:
        advantages: (T,) float32; 0 where the token was not sampled.
        gap: (T,) float32; log-probability at sampling minus that under the reference; None without
            a reference.
    """

    trace: Trace
    advantages: Floats
    gap: Floats | None

    def datum(self, loss: str) -> types.Datum:
        """Inputs and targets shifted by one, for the policy losses."""
        inputs: dict[str, Any] = {
            "target_tokens": self.trace.tokens[1:],
            "logprobs": self.trace.logprobs[1:],
            "advantages": self.advantages[1:],
        }
        if loss == "gspo":
            inputs["sequence_ratio_mask"] = self.trace.said[1:]
        return types.Datum(types.ModelInput.from_ints(self.trace.tokens[:-1]), inputs)


class PolicyGradient:
    """An `Objective` whose examples are tasks; each step samples answers, scores them, and trains.

    Args:
        first_step: the step after which training begins or resumes.
        reference: gives the log-probabilities of the KL term (*settings*.kl): of the base model, or
            of a teacher.
    """

    falls = False

    def __init__(
        self,
        tasks: Sequence[Task],
        held_out: Sequence[Task],
        settings: RewardSettings,
        rollouts: Rollouts,
        first_step: int,
        reference: SamplingClient | None = None,
    ) -> None:
        self._tasks, self._held_out = tasks, held_out
        self._settings, self._rollouts, self._reference = settings, rollouts, reference
        self._is_distilled = settings.method == "distill"
        self._step = first_step
        self._plan = Plan(
            len(tasks),
            settings.batch_size * settings.gradient_accumulation,
            settings.epochs,
            settings.seed,
            settings.max_steps,
        )
        self._next: Future[list[Episode]] | None = None  # sampled while the last step was trained
        self._has_warned = False
        #: True when the run should stop: sampling is then not waited for.
        self.is_stopped: Callable[[], bool] = lambda: False
        #: The error that ended the run; raised after the run has saved a checkpoint.
        self.failure: RewardError | None = None
        self.examples = len(tasks)
        self.is_evaluated = bool(held_out)
        self.shown: Sequence[Prompt] = self._shown(held_out[:SHOWN_PROMPTS])
        self.prompts: Sequence[Prompt] = ()

    def _shown(self, tasks: Sequence[Task]) -> list[Prompt]:
        found = []
        for task in tasks:
            prompt = self._rollouts.prompt(task)
            tokens = types.ModelInput.from_ints(prompt.tokens)
            found.append(Prompt(tokens, task.text, prompt.stop))
        return found

    # A step

    def train(self, training: TrainingClient, batches: Sequence[Sequence[int]]) -> Work:
        step = self._step + 1
        chosen = [i for batch in batches for i in batch]
        episodes = self._awaited(self._next or self._sampled(training, step, chosen))
        self._next = None
        if self._settings.off_policy_steps and step < self._plan.total_steps:
            # Sampled from the weights before this step, while the server trains on it.
            self._next = self._sampled(training, step + 1, self._plan.batch(step + 1))
        parts = self._parts(episodes)
        loss = self._settings.loss
        future = training.forward_backward(
            [part.datum(loss) for part in parts], loss, self._loss_config()
        )
        self._step = step
        return Work(
            [future],
            lambda results: {
                **_training_row(results[0], parts, self._settings),
                **_episode_row(episodes, self._is_distilled),
                **self._sampler_row(results[0], parts),
            },
            sum(len(part.trace.tokens) - 1 for part in parts),
        )

    def _loss_config(self) -> dict[str, float] | None:
        settings = self._settings
        bounds = {
            "clip_low_threshold": settings.clip_low,
            "clip_high_threshold": settings.clip_high,
        }
        return {key: value for key, value in bounds.items() if value is not None} or None

    def _sampled(
        self, training: TrainingClient, step: int, chosen: Sequence[int]
    ) -> Future[list[Episode]]:
        """Episodes of a step, sampled from the weights after the operations submitted so far."""
        client = training.save_weights_and_get_sampling_client()
        tasks = [self._tasks[i] for i in chosen]
        seed = seed_of(self._settings.seed, 2, step)

        def sample() -> list[Episode]:
            sampler = client.result()
            try:
                return self._rollouts.sample(sampler, tasks, seed)
            finally:
                sampler.close()

        return in_background(sample)

    def _awaited(self, future: Future[Any]) -> Any:
        """The result; a failed reward function ends the run after a checkpoint, like Ctrl-C."""
        try:
            return loop.result_of(future, self.is_stopped)
        except RewardError as exc:
            self.failure = exc
            raise loop.Stopped from exc

    def _parts(self, episodes: Sequence[Episode]) -> list[_Part]:
        """Every trace with its advantages, divided by the step's tokens to make the loss a mean."""
        by_group: dict[int, list[Episode]] = {}
        for episode in episodes:
            by_group.setdefault(episode.group, []).append(episode)
        gaps = self._gaps(episodes)
        count = sum(episode.length for episode in episodes) or 1
        parts = []
        for group in by_group.values():
            values = advantages([e.score.reward for e in group], self._settings.advantage)
            for episode, value in zip(group, values):
                for trace in episode.traces:
                    gap = gaps.get(id(trace))
                    pull = 0.0 if gap is None else self._settings.kl * gap
                    weights = (value - pull) * trace.said / count
                    parts.append(_Part(trace, weights.astype(np.float32), gap))
        return parts

    def _gaps(self, episodes: Sequence[Episode]) -> dict[int, Floats]:
        """By id of each trace: log-probability at sampling minus that of the reference."""
        if self._reference is None:
            return {}
        traces = [trace for episode in episodes for trace in episode.traces]
        reference = self._reference
        futures = self._rollouts.submitted(
            lambda trace: reference.compute_logprobs(types.ModelInput.from_ints(trace.tokens)),
            traces,
        )
        found = {}
        for trace, future in zip(traces, futures):
            given = np.asarray(
                [0.0 if lp is None else lp for lp in loop.result_of(future, self.is_stopped)],
                np.float32,
            )
            found[id(trace)] = (trace.logprobs - given) * trace.said
        return found

    def _sampler_row(
        self, output: types.ForwardBackwardOutput, parts: Sequence[_Part]
    ) -> dict[str, float]:
        """Divergence of the trainer's log-probabilities from the sampler's: about 0 on policy."""
        change = _changes(output, parts)
        found = float((np.expm1(change) - change).mean()) if len(change) else 0.0
        is_on_policy = not self._settings.off_policy_steps
        if found > MOST_SAMPLER_KL and is_on_policy and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "At step %d sampler and trainer differ by %.3f nats per token on the same weights; "
                "the server computes them differently, and rewards may not rise.",
                self._step,
                found,
            )
        return {"sampler_kl": found}

    # Held-out tasks

    def evaluate(self, training: TrainingClient) -> Iterator[Work]:
        future = training.save_weights_and_get_sampling_client()
        # A divergence is an expectation over samples, so greedy answers would be biased.
        temperature = self._settings.temperature if self._is_distilled else 0.0

        def read(results: list[Any]) -> dict[str, float]:
            [sampler] = results
            seed = seed_of(self._settings.seed, 3)

            def sample() -> list[Episode]:
                try:
                    return self._rollouts.sample(
                        sampler, self._held_out, seed, group_size=1, temperature=temperature
                    )
                finally:
                    sampler.close()

            episodes = self._awaited(in_background(sample))
            row = _episode_row(episodes, self._is_distilled)
            if self._reference is not None:
                gaps = np.concatenate(list(self._gaps(episodes).values()))
                row["reference_kl"] = float(gaps.sum() / sum(e.length for e in episodes))
            loss = row["reference_kl"] if self._is_distilled else -row["reward"]
            return {"eval_loss": loss, **{f"eval_{key}": value for key, value in row.items()}}

        yield Work([future], read)


# Metrics


def _changes(
    output: types.ForwardBackwardOutput, parts: Sequence[_Part]
) -> npt.NDArray[np.float64]:
    """log r of every sampled token: the trainer's log-probability minus the sampler's."""
    found = [
        (one["logprobs"].to_numpy().astype(np.float64) - part.trace.logprobs[1:])[
            part.trace.said[1:] > 0
        ]
        for one, part in zip(output.loss_fn_outputs, parts)
    ]
    return np.concatenate(found) if found else np.zeros(0)


def _training_row(
    output: types.ForwardBackwardOutput, parts: Sequence[_Part], settings: RewardSettings
) -> dict[str, float]:
    """train_loss is -sum(r A), which all these losses share within their clip bounds."""
    said = [part.trace.said[1:] > 0 for part in parts]
    weights = np.concatenate([part.advantages[1:][mask] for part, mask in zip(parts, said)])
    ratios = np.exp(_changes(output, parts))
    low = 0.0 if settings.clip_low is None else settings.clip_low
    high = np.inf if settings.clip_high is None else settings.clip_high
    row = {
        "train_loss": -float(np.dot(ratios, weights)),
        "clipped": float(((ratios < low) | (ratios > high)).mean()) if len(ratios) else 0.0,
    }
    gaps = [part.gap for part in parts if part.gap is not None]
    if gaps:
        row["reference_kl"] = float(np.concatenate(gaps).sum() / max(1, sum(map(np.sum, said))))
    return row


def _episode_row(episodes: Sequence[Episode], is_distilled: bool) -> dict[str, float]:
    """Metrics of a step's episodes; without rewards in distillation."""
    rewards = np.asarray([episode.score.reward for episode in episodes])
    groups: dict[int, list[float]] = {}
    for episode in episodes:
        groups.setdefault(episode.group, []).append(episode.score.reward)
    tokens = sum(episode.length for episode in episodes)
    logprobs = sum(
        float(np.dot(trace.logprobs, trace.said)) for e in episodes for trace in e.traces
    )
    of_rewards = {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "equal_groups": float(np.mean([len(set(group)) == 1 for group in groups.values()])),
    }
    row = {
        **({} if is_distilled else of_rewards),
        "entropy": -logprobs / max(1, tokens),
        "length": tokens / len(episodes),
        "cut": float(np.mean([episode.is_cut for episode in episodes])),
    }
    if any(episode.turns > 1 for episode in episodes):
        row["turns"] = float(np.mean([episode.turns for episode in episodes]))
    for key in sorted({key for episode in episodes for key in episode.score.metrics}):
        values = [e.score.metrics[key] for e in episodes if key in e.score.metrics]
        row[f"reward/{key}"] = float(np.mean(values))
    return row
