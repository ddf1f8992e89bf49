"""Preference training: pairs of a chosen and a rejected answer, as an `Objective` of loop.py.

The losses are in preference_losses.py. Reference log-probabilities are computed once, before the
first step, and stored in the run's folder. Does not know about the command line.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from tinkex import types
from tinkex.data import datums, files, records
from tinkex.recipes import loop, preference_losses
from tinkex.recipes.loop import Prompt, Work
from tinkex.recipes.preference_losses import LOSSES, WITH_REFERENCE, Answers
from tinkex.training import TrainingClient

#: Pairs per request of log-probabilities.
PAIRS_AT_ONCE = 32
#: Held-out prompts whose completions are shown before and after training.
SHOWN_PROMPTS = 3

Floats = npt.NDArray[np.float32]


@attrs.frozen(eq=False)
class Pair:
    """Two answers to one prompt, rendered. In both, only the answer's tokens have weight."""

    chosen: datums.Example
    rejected: datums.Example

    @property
    def sides(self) -> tuple[datums.Example, datums.Example]:
        return self.chosen, self.rejected


def as_conversations(data: files.DataFile, method: str) -> files.DataFile:
    """Each pair as two conversations, chosen first, in which only the answers have weight.

    Raises:
        ValueError: If a record is not a preference pair, naming the record and the method.
    """
    chats: list[records.Record] = []
    for number, record in enumerate(data.records):
        if not isinstance(record, records.Preference):
            where = record.where or f"record {number}"
            raise ValueError(
                f"{where} of {data.name} is not a preference pair; --method {method} learns from "
                'rows with "chosen" and "rejected" (and "prompt"); for other data use --method sft.'
            )
        # Only the answer has weight, whatever roles the prompt has.
        prompt = tuple({**message, "trainable": False} for message in record.prompt)
        chats += [
            records.Chat((*prompt, *answer), record.tools, where=record.where)
            for answer in (record.chosen, record.rejected)
        ]
    digest = hashlib.sha256(f"pairs {data.sha256}".encode()).hexdigest()
    return attrs.evolve(data, records=chats, sha256=digest)


def paired(examples: Sequence[datums.Example]) -> list[Pair]:
    """The pairs of which both rendered answers have a weighted token, in order."""
    by_record = {example.record: example for example in examples}
    return [
        Pair(by_record[number], by_record[number + 1])
        for number in sorted(by_record)
        if number % 2 == 0 and number + 1 in by_record
    ]


class Reference:
    """Log-probabilities of tokens under the model before the first step."""

    def __init__(self, logprobs: Sequence[Floats]) -> None:
        self._logprobs = logprobs

    def of(self, pairs: Sequence[int]) -> list[Floats]:
        """(T - 1,) each: the chosen and the rejected example of each pair in turn."""
        return [self._logprobs[2 * pair + side] for pair in pairs for side in (0, 1)]


def reference(
    pairs: Sequence[Pair], folder: Path, name: str, untrained: Callable[[], TrainingClient]
) -> Reference:
    """
    The reference log-probabilities of *pairs*, from *folder* if they are stored there.

    Args:
        name: of the data; if the pairs have changed, they are computed again.
        untrained: returns a client of the model before the first step, if needed.
    """
    if not pairs:
        return Reference([])
    digest = hashlib.sha256()
    for pair in pairs:
        for example in pair.sides:
            digest.update(example.tokens.tobytes())
    path = folder / f"reference-{name}-{digest.hexdigest()[:16]}.npz"
    lengths = [len(example.tokens) - 1 for pair in pairs for example in pair.sides]
    flat = _load(path, sum(lengths))
    if flat is None:
        flat = np.concatenate(_logprobs(untrained(), pairs))
        new = path.with_suffix(".new.npz")
        np.savez(new, logprobs=flat)
        os.replace(new, path)
    return Reference(np.split(flat, np.cumsum(lengths)[:-1]))


def _load(path: Path, count: int) -> Floats | None:
    try:
        with np.load(path, allow_pickle=False) as held:
            flat: Floats = held["logprobs"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # missing or incomplete
    return flat if len(flat) == count else None


def _logprobs(training: TrainingClient, pairs: Sequence[Pair]) -> list[Floats]:
    found: list[Floats] = []
    futures = [
        training.forward([e.datum() for pair in part for e in pair.sides], "cross_entropy")
        for part in _parts(pairs)
    ]
    for future in futures:
        found += [output["logprobs"].to_numpy() for output in future.result().loss_fn_outputs]
    return found


def _parts(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), PAIRS_AT_ONCE):
        yield items[start : start + PAIRS_AT_ONCE]


class Preferences:
    """A preference loss, averaged over pairs. An `Objective` whose examples are pairs.

    Args:
        references: of *pairs* and of *held_out*; None for methods without a reference.
    """

    falls = True

    def __init__(
        self,
        pairs: Sequence[Pair],
        held_out: Sequence[Pair],
        method: str,
        options: preference_losses.Options,
        references: tuple[Reference, Reference] | None,
        tokenizer: Any,
        prompts: Sequence[Prompt] = (),
    ) -> None:
        self._pairs, self._held_out = pairs, held_out
        self._loss, self._options = LOSSES[method], options
        self._references = references
        self.examples = len(pairs)
        self.is_evaluated = bool(held_out)
        self.shown: Sequence[Prompt] = [
            Prompt(pair.chosen.prompt, loop.decode(tokenizer, pair.chosen.prompt.to_ints()))
            for pair in held_out[:SHOWN_PROMPTS]
        ]
        self.prompts = prompts

    def train(self, training: TrainingClient, batches: Sequence[Sequence[int]]) -> Work:
        count = sum(map(len, batches))
        rows: list[dict[str, float]] = []
        futures = []
        for batch in batches:
            chosen = [self._pairs[i] for i in batch]
            reference = self._references[0].of(batch) if self._references else None

            def loss(
                data: Sequence[types.Datum],
                logprobs: list[Any],
                chosen: Any = chosen,
                reference: Any = reference,
            ) -> tuple[float, dict[str, float], list[Floats]]:
                value, row, gradients = self._value(logprobs, chosen, reference)
                rows.append(row)
                return value / count, {}, [gradient / np.float32(count) for gradient in gradients]

            futures.append(
                training.forward_backward_custom(
                    [e.datum() for pair in chosen for e in pair.sides], loss, framework="numpy"
                )
            )

        def read(results: list[Any]) -> dict[str, float]:
            return _averaged(rows, "train_loss", "")

        tokens = sum(len(e.tokens) - 1 for b in batches for i in b for e in self._pairs[i].sides)
        return Work(futures, read, tokens)

    def evaluate(self, training: TrainingClient) -> Iterator[Work]:
        rows: list[dict[str, float]] = []
        numbers = list(_parts(range(len(self._held_out))))
        for part in numbers:
            pairs = [self._held_out[i] for i in part]
            reference = self._references[1].of(part) if self._references else None
            future = training.forward(
                [e.datum() for pair in pairs for e in pair.sides], "cross_entropy"
            )

            def read(
                results: list[Any], pairs: Any = pairs, reference: Any = reference
            ) -> dict[str, float]:
                logprobs = [o["logprobs"].to_numpy() for o in results[0].loss_fn_outputs]
                rows.append(self._value(logprobs, pairs, reference)[1])
                return _averaged(rows, "eval_loss", "eval_") if len(rows) == len(numbers) else {}

            yield Work([future], read)

    def _value(
        self,
        logprobs: Sequence[Floats],
        pairs: Sequence[Pair],
        reference: Sequence[Floats] | None,
    ) -> tuple[float, dict[str, float], list[Floats]]:
        """The loss summed over *pairs*, its metrics, and its gradient by each log-probability."""
        masks = [e.counted[1:].astype(np.float64) for pair in pairs for e in pair.sides]
        sums = [float(np.dot(lp, mask)) for lp, mask in zip(logprobs, masks)]
        counts = [float(mask.sum()) for mask in masks]
        known = [0.0] * len(sums)
        if reference is not None:
            known = [float(np.dot(lp, mask)) for lp, mask in zip(reference, masks)]
        chosen, rejected = (
            Answers(*(np.asarray(values[side::2]) for values in (sums, known, counts)))
            for side in (0, 1)
        )
        loss = self._loss(chosen, rejected, self._options)
        margin = loss.chosen_reward - loss.rejected_reward
        row = {
            "pairs": float(len(pairs)),
            "loss": float(loss.value.sum()),
            "reward_margin": float(margin.sum()),
            "reward_accuracy": float((margin > 0).sum()),
            "chosen_reward": float(loss.chosen_reward.sum()),
            "rejected_reward": float(loss.rejected_reward.sum()),
            "chosen_logprob": float(chosen.mean.sum()),
            "rejected_logprob": float(rejected.mean.sum()),
        }
        if reference is not None:
            row["kl"] = sum(map(_divergence, logprobs, reference, masks)) / 2
        slopes = np.stack([loss.chosen_slope, loss.rejected_slope], axis=1).reshape(-1)
        gradients = [(slope * mask).astype(np.float32) for slope, mask in zip(slopes, masks)]
        return row["loss"], row, gradients


def _divergence(logprobs: Floats, reference: Floats, mask: npt.NDArray[np.float64]) -> float:
    """exp(d) - 1 - d, averaged over the weighted tokens; d = log p - log p of the reference.

    An estimate of KL(reference || model) per token (Schulman 2020) if the answers are samples of
    the reference; never negative, and 0 before the first step.
    """
    d = (logprobs.astype(np.float64) - reference) * mask
    return float((np.expm1(d) - d).sum() / mask.sum())


def _averaged(rows: Sequence[dict[str, float]], loss: str, prefix: str) -> dict[str, float]:
    """The sums of *rows* divided by their pairs: the loss as *loss*, others with *prefix*."""
    pairs = sum(row["pairs"] for row in rows)
    means = {key: sum(row[key] for row in rows) / pairs for key in rows[0] if key != "pairs"}
    return {loss: means.pop("loss"), **{f"{prefix}{key}": mean for key, mean in means.items()}}


def needs_reference(method: str) -> bool:
    """True if *method* compares with the model before the first step."""
    return method in WITH_REFERENCE
