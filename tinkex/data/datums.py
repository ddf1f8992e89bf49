"""Records to examples: rendered, truncated, cached on disk, and turned into datums."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date as Date
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from tinkex import types
from tinkex.data import files, records
from tinkex.text import renderer
from tinkex.text.drafts import Draft, completion_draft
from tinkex.text.messages import TrainOn
from tinkex.text.renderer import Renderer

#: A plain text's prompt is a quarter of its tokens, but at most this many.
MAX_TEXT_PROMPT = 32
#: Records that are encoded together.
ENCODED_AT_ONCE = 256
#: Version of the cache's content; a new number invalidates old files.
CACHE_VERSION = 1


@attrs.frozen(eq=False)
class Example:
    """A rendered record.

    Attributes:
        tokens: (T,) int64, T >= 2.
        counted: (T,) float32; 1 for tokens in the loss, else 0. The first is 0, since no token
            precedes it.
        prompt_length: tokens of the prompt from which a model generates the rest; at least 1.
        record: number of the record, from 0.
    """

    tokens: npt.NDArray[np.int64]
    counted: npt.NDArray[np.float32]
    prompt_length: int
    record: int = 0

    @property
    def prompt(self) -> types.ModelInput:
        return types.ModelInput.from_ints(self.tokens[: self.prompt_length])

    def datum(self, scale: float = 1.0) -> types.Datum:
        """Targets are the tokens shifted by one; each counted target has weight *scale*."""
        return types.Datum(
            model_input=types.ModelInput.from_ints(self.tokens[:-1]),
            loss_fn_inputs={
                "target_tokens": self.tokens[1:],
                "weights": self.counted[1:] * np.float32(scale),
            },
        )


@attrs.frozen
class Rendered:
    """All records of a file as examples.

    Attributes:
        bad: records that cannot be rendered, with the reasons.
        truncated: how many examples were longer than max_length.
        dropped: how many had no counted token (after truncation); they are not in `examples`.
        split: conversations that became several examples, because the chat template renders earlier
            turns differently once later ones follow.
    """

    examples: list[Example] = attrs.field(repr=False)
    bad: list[files.BadLine]
    truncated: int
    dropped: int
    split: int


@attrs.frozen
class Options:
    """How records are rendered.

    Args:
        max_length: most tokens of an example; the rest is cut off.
        train_on: which parts of a conversation are in the loss: see `tinkex.render`.
        split_turns: make several examples of a conversation if its template renders earlier turns
            differently later. If false, such turns are not in the loss.
        date: the date for chat templates; None is today.
    """

    max_length: int
    train_on: TrainOn = "assistant"
    split_turns: bool = True
    date: Date | None = None


def render(
    data: Sequence[records.Record],
    tokenizer: Any,
    options: Options,
    progress: Callable[[int], None] = lambda done: None,
) -> Rendered:
    """
    Tokens and weights of every record, truncated to max_length tokens.

    Args:
        progress: called with the number of records rendered so far.

    Raises:
        ValueError: If no example with a counted token is left.
    """
    render_one = Renderer(tokenizer, date=options.date)
    examples: list[Example] = []
    bad: list[files.BadLine] = []
    truncated = dropped = split = 0
    for first in range(0, len(data), ENCODED_AT_ONCE):
        owners: list[int] = []
        drafts: list[Draft] = []
        given: list[tuple[int, renderer.Rendered]] = []
        for number, record in enumerate(data[first : first + ENCODED_AT_ONCE], start=first):
            if isinstance(record, records.Tokens):
                given.append((number, _as_given(record)))
                continue
            try:
                found = _drafts(record, render_one, options)
            except (ValueError, TypeError) as exc:
                reason = files.BadLine(record.where or f"record {number}", str(exc))
                if reason not in bad[-1:]:  # the two answers of a pair are on the same line
                    bad.append(reason)
                continue
            drafts += found
            owners += [number] * len(found)
            split += len(found) > 1
        finished = [*zip(owners, render_one.finish(drafts)), *given]
        for number, rendered in sorted(finished, key=lambda pair: pair[0]):
            example = _example(rendered, data[number], number, options.max_length)
            truncated += len(rendered.tokens) > options.max_length
            if example.counted.any():
                examples.append(example)
            else:
                dropped += 1
        progress(min(first + ENCODED_AT_ONCE, len(data)))
    return Rendered(examples, bad, truncated, dropped, split)


def check_some_are_left(rendered: Rendered, count: int, max_length: int) -> None:
    """Raise ValueError, with the reason, if none of *count* records became an example."""
    if rendered.examples:
        return
    if rendered.bad:
        raise ValueError(
            f"none of the {count} examples can be rendered. "
            + files.describe("The data", rendered.bad)
        )
    if rendered.truncated:
        raise ValueError(
            f"none of the {count} examples has a token that counts within its first {max_length} "
            "tokens; raise --max-length."
        )
    raise ValueError(
        f"none of the {count} examples has a token that counts: no message counts (weight, "
        "trainable), or what counts is empty."
    )


def _as_given(record: records.Tokens) -> renderer.Rendered:
    weights = np.asarray(record.weights, np.float32)
    first = int(weights.nonzero()[0][0]) if weights.any() else 1
    span = renderer.Span(0, first, len(record.tokens))
    return renderer.Rendered(np.asarray(record.tokens, np.int64), weights, (span,))


def _drafts(record: records.Record, render_one: Renderer, options: Options) -> list[Draft]:
    if isinstance(record, records.Chat):
        drafts = render_one.drafts(record.messages, record.tools or None, options.train_on)
        return drafts if options.split_turns else drafts[:1]
    if isinstance(record, records.Completion):
        return [completion_draft(record.prompt, record.completion)]
    if isinstance(record, records.Text):
        return [completion_draft("", record.text)]
    raise ValueError(unfit(record))


def unfit(record: records.Record) -> str | None:
    """Why a record cannot be used for supervised training; None if it can."""
    if isinstance(record, records.Task):
        return "a prompt without an answer, which is for `tinkex rl`"
    if isinstance(record, records.Preference):
        return (
            "a preference pair (chosen, rejected), which is for preference training: --method dpo"
        )
    return None


def _example(
    rendered: renderer.Rendered, record: records.Record, number: int, max_length: int
) -> Example:
    tokens, counted = rendered.tokens[:max_length], rendered.weights[:max_length]
    prompt_length = rendered.prompt_length
    if isinstance(record, records.Text):
        prompt_length = prompt_length + min(len(tokens) // 4, MAX_TEXT_PROMPT)
    return Example(tokens, counted, max(1, min(prompt_length, len(tokens))), number)


# On disk


def cached(
    folder: Path,
    data: files.DataFile,
    tokenizer: Any,
    options: Options,
    progress: Callable[[int], None] = lambda done: None,
) -> Rendered:
    """
    As `render`, or the result of an earlier call with the same data, tokenizer and options in
    *folder*.

    Nothing is cached for other tokenizers than ours, because they have no fingerprint.
    """
    fingerprint = getattr(Renderer(tokenizer).tokenizer, "fingerprint", None)
    # Templates may write today's date, so the rendering changes every day.
    options = attrs.evolve(options, date=options.date or Date.today())
    if fingerprint is None:
        return render(data.records, tokenizer, options, progress)
    told = [CACHE_VERSION, data.sha256, [r.where for r in data.records[-1:]], len(data.records)]
    said = json.dumps([*told, fingerprint, attrs.astuple(options)], default=str)
    path = folder / f"rendered-{hashlib.sha256(said.encode()).hexdigest()[:16]}.npz"
    found = _load(path)
    if found is None:
        found = render(data.records, tokenizer, options, progress)
        _save(path, found)
    else:
        progress(len(data.records))
    return found


def _save(path: Path, rendered: Rendered) -> None:
    for old in path.parent.glob("rendered-*.npz"):
        old.unlink()
    counts = [rendered.truncated, rendered.dropped, rendered.split]
    said = {"counts": counts, "bad": [[b.where, b.reason] for b in rendered.bad]}
    examples = rendered.examples
    new = path.with_suffix(".new.npz")
    np.savez(
        new,
        tokens=np.concatenate([e.tokens for e in examples] or [np.zeros(0, np.int64)]),
        counted=np.concatenate([e.counted for e in examples] or [np.zeros(0, np.float32)]),
        lengths=np.asarray([len(e.tokens) for e in examples], np.int64),
        prompts=np.asarray([e.prompt_length for e in examples], np.int64),
        owners=np.asarray([e.record for e in examples], np.int64),
        said=np.frombuffer(json.dumps(said).encode(), np.uint8),
    )
    os.replace(new, path)


def _load(path: Path) -> Rendered | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            said = json.loads(held["said"].tobytes())
            ends = np.cumsum(held["lengths"])[:-1]
            examples = [
                Example(tokens, counted, int(prompt), int(owner))
                for tokens, counted, prompt, owner in zip(
                    np.split(held["tokens"], ends),
                    np.split(held["counted"], ends),
                    held["prompts"],
                    held["owners"],
                )
            ]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # missing or incomplete
    return Rendered(examples, [files.BadLine(*b) for b in said["bad"]], *said["counts"])


# For scripts


def datums(
    rows: Any, tokenizer: Any, max_length: int = 1024, train_on: TrainOn = "assistant"
) -> list[types.Datum]:
    """
    Rows in memory as datums for `forward_backward`.

    Args:
        rows: dicts of any shape that `tinkex train` reads, as a list, a DataFrame or a
            `datasets.Dataset`.

    Raises:
        ValueError: If a row is invalid, with its number; or no token is in the loss.
    """
    data = files.from_rows(rows)
    rendered = render(data.records, tokenizer, Options(max_length, train_on))
    if rendered.bad:
        raise ValueError(files.describe(data.name, rendered.bad))
    check_some_are_left(rendered, len(data.records), max_length)
    return [example.datum() for example in rendered.examples]


def slices(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    """Yield the examples in slices of *size*."""
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def counted_tokens(examples: Iterable[Example]) -> float:
    """The number of counted tokens of *examples*."""
    return float(sum(example.counted.sum() for example in examples))
