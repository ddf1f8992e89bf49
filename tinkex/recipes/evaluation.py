"""Evaluation: measures models on data by loss, by their answers, or by a user's function.

Several models are measured on the same examples. Does not know about runs or the command line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from tinkex import types
from tinkex.data import datums, files, records
from tinkex.recipes import rewards, rollouts
from tinkex.sampling import SamplingClient

#: Metrics by name that compare an answer with the reference answer.
ANSWER_METRICS: Mapping[str, Callable[[str, str], float]] = {
    "exact": lambda answer, right: float(answer.strip() == right.strip()),
    "contains": lambda answer, right: float(right.strip() in answer),
}
#: (answer, row) -> number. The row has "prompt", and "answer" if the data has a reference answer.
Metric = Callable[[str, Mapping[str, Any]], Any]


@attrs.frozen
class Options:
    """
    Args:
        max_length: most tokens of an example for the loss.
        max_tokens: limit of an answer.
        temperature: for sampling answers; 0 is greedy.
        stop: strings that end an answer, besides the model's own end tokens.
        limit: use only this many examples, from the first; None is all.
        timeout: time limit of a function, in seconds.
    """

    max_length: int = 1024
    max_tokens: int = 128
    temperature: float = 0.0
    limit: int | None = None
    stop: Sequence[str] = ()
    timeout: float = 60.0


@attrs.frozen
class Value:
    """A metric of a model.

    Attributes:
        mean: over examples; for the loss, over the weighted tokens, in nats.
        error: standard error of the mean, over examples. NaN for a single example.
        count: number of examples.
    """

    mean: float
    error: float
    count: int


@attrs.frozen
class Evaluation:
    """The results of `evaluate`.

    Attributes:
        values: by metric and model.
        answers: a dict per example: "prompt", "answer" (the reference answer, or None), and each
            model's answer by its name; [] if no metric needs answers.
    """

    values: dict[str, dict[str, Value]]
    answers: list[dict[str, Any]] = attrs.field(factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """A dict per metric: its name, and the mean of each model."""
        return [
            {"metric": metric, **{model: value.mean for model, value in models.items()}}
            for metric, models in self.values.items()
        ]


def needs_answers(metrics: Sequence[str | Metric]) -> bool:
    """True unless the loss is the only metric."""
    return any(metric != "loss" for metric in metrics)


def read(
    source: Any, metrics: Sequence[str | Metric], shape: str | None = None, renames: Any = None
) -> files.DataFile:
    """
    Read the data of an evaluation: a path, several paths, or rows in memory.

    Rows may lack a reference answer if all metrics are functions.

    Raises:
        ValueError: If rows are invalid, or lack a reference answer that a metric needs.
    """
    needs_right = any(isinstance(m, str) and ":" not in m for m in metrics)
    if shape is None and not needs_right:
        shape = "task"
    if isinstance(source, str) or (
        isinstance(source, (list, tuple)) and source and isinstance(source[0], str)
    ):
        return files.read(source, shape=shape, renames=renames)
    return files.from_rows(source, shape=shape, renames=renames)


def evaluate(
    models: Mapping[str, SamplingClient],
    data: Any,
    metrics: Sequence[str | Metric] = ("loss",),
    *,
    options: Options | None = None,
    shape: str | None = None,
    renames: Mapping[str, str] | None = None,
) -> Evaluation:
    """
    Measure *models* on *data*.

    Args:
        models: name -> client.
        data: examples as for `tinkex train`: a path, several paths, or rows in memory.
        metrics: "loss" (of the weighted tokens), "exact" (equal to the reference answer, ignoring
            surrounding whitespace), "contains" (contains the reference answer), "my.py:fn", or
            functions `fn(answer, row)` that return a number, or a dict with "reward" and other
            numbers.
        shape, renames: as for `tinkex.data.files.read`.

    Raises:
        ValueError: If the data is invalid, a metric is unknown, or a function fails (RewardError).
        TinkexError: If a request to the server fails.
    """
    options = options or Options()
    named = {str(rewards.name_of(metric)): metric for metric in metrics}
    judges = {name: _judge(metric) for name, metric in named.items() if metric != "loss"}
    file = read(data, list(metrics), shape, renames)
    examples = file.records[: options.limit]
    values: dict[str, dict[str, Value]] = {}
    if "loss" in named:
        values["loss"] = {
            name: _loss(client, examples, file.name, options) for name, client in models.items()
        }
    if not judges:
        return Evaluation(values)
    tasks = [_task(record) for record in examples]
    answers: list[dict[str, Any]] = [
        {"prompt": task.text, "answer": task.row.get("answer")} for task in tasks
    ]
    pool = rewards.Pool(16, options.timeout)
    try:
        for name, client in models.items():
            said = _answers(client, tasks, options, pool)
            for answer, text in zip(answers, said):
                answer[name] = text
            for metric, judge in judges.items():
                found = _judged(pool, metric, judge, said, tasks)
                for key, each in found.items():
                    values.setdefault(key, {})[name] = _value(each)
    finally:
        pool.close()
    return Evaluation(values, answers)


def _judge(metric: str | Metric) -> Metric:
    if not isinstance(metric, str):
        return metric
    if ":" in metric:
        return rewards.load(metric)
    if metric not in ANSWER_METRICS:
        raise ValueError(
            f"metric {metric!r} is not known; choose loss, {', '.join(ANSWER_METRICS)}, or a "
            "function: my.py:fn."
        )
    compare = ANSWER_METRICS[metric]
    return lambda answer, row: compare(answer, str(row["answer"]))


def _loss(
    client: SamplingClient, data: Sequence[records.Record], name: str, options: Options
) -> Value:
    """Negative log-likelihood per token that counts."""
    how = datums.Options(options.max_length, split_turns=False)
    rendered = datums.render(data, client.get_tokenizer(), how)
    if rendered.bad:
        raise ValueError(files.describe(name, rendered.bad))
    datums.check_some_are_left(rendered, len(data), options.max_length)
    futures = [
        client.compute_logprobs(types.ModelInput.from_ints(example.tokens))
        for example in rendered.examples
    ]
    sums, counts = [], []
    for example, future in zip(rendered.examples, futures):
        logprobs = np.asarray([0.0 if lp is None else lp for lp in future.result()])
        sums.append(-float(np.dot(logprobs, example.counted)))
        counts.append(float(example.counted.sum()))
    mean = sum(sums) / sum(counts)
    # Of a ratio of sums, by linearization: each example's deviation from the mean.
    residuals = (np.asarray(sums) - mean * np.asarray(counts)) / np.mean(counts)
    return Value(mean, _value(residuals).error, len(sums))


def _task(record: records.Record) -> records.Task:
    """The prompt of an example and its reference answer."""
    if isinstance(record, records.Task):
        return record
    if isinstance(record, records.Completion):
        return records.Task(
            record.prompt, {"prompt": record.prompt, "answer": record.completion}, record.where
        )
    if isinstance(record, records.Chat):
        *before, last = record.messages
        if last["role"] == "assistant" and before:
            prompt = tuple(before)
            row = {"prompt": list(before), "answer": last.get("content") or ""}
            return records.Task(prompt, row, record.where)
    raise ValueError(
        f"{record.where or 'an example'} has no prompt with a right answer at its end; give rows "
        "with prompt and completion, or conversations that end with the assistant."
    )


def _answers(
    client: SamplingClient, tasks: Sequence[records.Task], options: Options, pool: rewards.Pool
) -> list[str]:
    """The model's answer to each prompt; text is continued without a template, as in training."""
    how = rollouts.Options(1, options.max_tokens, options.temperature, options.stop, plain=True)
    made = rollouts.Rollouts(client.get_tokenizer(), how, pool)
    return [episode.text for episode in made.sample(client, tasks, seed=0)]


def _judged(
    pool: rewards.Pool,
    name: str,
    judge: Metric,
    said: Sequence[str],
    tasks: Sequence[records.Task],
) -> dict[str, list[float]]:
    """The numbers of all examples, by metric; a function's additional numbers as NAME/KEY."""
    calls = [pool.start(judge, text, task.row) for text, task in zip(said, tasks)]
    found: dict[str, list[float]] = {name: []}
    for call, task in zip(calls, tasks):
        try:
            score = rewards.as_score(call.result())
        except rewards.RewardError:
            raise
        except ValueError as exc:
            raise rewards.RewardError(
                f"{name} returned {exc}; the prompt was {task.text!r}"
            ) from exc
        found[name].append(score.reward)
        for key, number in score.metrics.items():
            found.setdefault(f"{name}/{key}", []).append(number)
    return found


def _value(each: Any) -> Value:
    numbers = np.asarray(each, np.float64)
    error = math.nan
    if len(numbers) > 1:
        error = float(numbers.std(ddof=1) / math.sqrt(len(numbers)))
    return Value(float(numbers.mean()), error, len(numbers))
