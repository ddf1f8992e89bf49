"""Chunked prefill: the budget of a step for prompts, and long prompts, computed in pieces.

A prompt that exceeds a step's budget is read over several steps, so that other requests wait for
one piece of it only. Each share reads one long prompt at a time; the next piece is read for the
share that has used the fewest operations. Does not know how prompts are computed, or about the
running batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import islice

import attrs
from torch import Tensor

from tinkex.engine.base_model import BaseModel, Prompt, PromptReader, PromptState
from tinkex.engine.finished_lora import Finished
from tinkex.engine.memory import kind_of
from tinkex.engine.prompt_logprobs import PieceScores
from tinkex.engine.sample_queue import Unit
from tinkex.engine.sample_requests import Job, PromptScores
from tinkex.engine.sample_turns import step_operations
from tinkex.engine.weight_store import is_in_file

#: Most prompt tokens of one step, also limited by `step_operations`: running sequences and new
#: requests wait for them. The limit is `ALONE` times higher while only one share is active.
PREFILL_TOKENS = {"cpu": 1024, "cuda": 16384}
ALONE = 4

#: Tokens that fit in every step, and the smallest piece: with fewer, reading the matrices takes
#: longer than computing; from disk, much longer.
LEAST_PIECE = 32
LEAST_FROM_DISK = 512

#: Fraction of each step's operations reserved for long prompts.
LONG_PART = 0.25

#: Units of a share's queue that are considered: no more than these start in one step.
LOOK_AHEAD = 256


@attrs.define(eq=False)
class LongPrompt:
    """A prompt that is being read.

    Attributes:
        rows: numbers of its sequences, and the unit of each. The prompt is dropped with the last
            row.
        scores: of the jobs that request prompt log-probabilities.
        reader: None before the first piece.
        done: tokens that have been read.
    """

    prompt: Prompt
    rows: dict[int, Unit] = attrs.field(factory=dict)
    scores: dict[Job, PieceScores] = attrs.field(factory=dict)
    reader: PromptReader | None = None
    done: int = 0

    def serves(self, job: Job) -> bool:
        """True if a job can join: it has the same prompt, and needs no scores from the start."""
        if any(unit.job is job for unit in self.rows.values()):
            return True
        return (
            (job.scores is not None or not job.wants_scores)
            and job.adapter is self.prompt.adapter
            and len(job.prompt) == len(self.prompt.tokens)
            and bool((job.prompt == self.prompt.tokens).all())
        )

    def continued(self) -> list[list[int]]:
        """The rows of each unit that generates more than one token."""
        of: dict[Unit, list[int]] = {}
        for row, unit in self.rows.items():
            if unit.job.limit > 1:
                of.setdefault(unit, []).append(row)
        return list(of.values())


class LongPrompts:
    """A step's budget for prompts, and the long prompts that are being read."""

    def __init__(self, base: BaseModel, state: PromptState) -> None:
        self._base = base
        self._state = state
        self._reading: dict[Hashable, LongPrompt] = {}  # by share, in the order of arrival
        self._spent: dict[Hashable, float] = {}  # operations of each share
        weights = (linear.weight for linear in base.linears.values())
        self._is_on_disk = any(map(is_in_file, weights))
        self.begin_step(is_alone=True)

    @property
    def waiting(self) -> int:
        """How many sequences wait for their prompt."""
        return sum(len(long.rows) for long in self._reading.values())

    def begin_step(self, *, is_alone: bool) -> None:
        """Set the budget of a step."""
        kind = kind_of(self._base.device)
        operations = step_operations(kind, self._base.dtype)
        most = min(operations, self._state.operations(0, PREFILL_TOKENS[kind]))
        self._least = LEAST_FROM_DISK if self._is_on_disk else LEAST_PIECE
        most = max(most, self._state.operations(0, self._least))
        self.most = most * (ALONE if is_alone else 1)

    # -- which prompts start -----------------------------------------------------------------

    def operations(self, job: Job) -> float:
        """Floating-point operations of a job's prompt, computed in one piece."""
        return self._state.operations(0, len(job.prompt))

    def is_long(self, job: Job) -> bool:
        """True if a job's prompt exceeds the budget of a step."""
        return self._state.reads_in_pieces and self.operations(job) > self.most

    def ready(self, line: Iterable[Unit]) -> Iterator[Unit]:
        """The units of a share's queue that may start: the first; then the others by adapter, in
        the order in which each adapter's first one came.

        A step whose prompts have few adapters multiplies with each of them less often. The first
        always starts, so a unit waits for no more steps than there are units before it.
        """
        startable = self._startable(line)
        first = next(startable, None)
        if first is None:
            return
        yield first
        by_adapter: dict[Finished | None, list[Unit]] = {first.job.adapter: []}
        for unit in startable:
            by_adapter.setdefault(unit.job.adapter, []).append(unit)
        for units in by_adapter.values():
            yield from units

    def _startable(self, line: Iterable[Unit]) -> Iterator[Unit]:
        """Units with short prompts, and those of one long prompt."""
        chosen: Job | None = None
        for unit in islice(line, LOOK_AHEAD):
            job = unit.job
            if self.is_long(job):
                long = self._reading.get(job.share)
                if long is None:
                    chosen = chosen or job
                if not (job is chosen if long is None else long.serves(job)):
                    continue
            yield unit

    def begin(self, unit: Unit, rows: Sequence[int]) -> None:
        """Start reading a unit's prompt in pieces, for *rows*. A new share starts with the count of
        the share that has spent least."""
        job = unit.job
        long = self._reading.get(job.share)
        cached = 0 if long is None else len(job.prompt)
        if long is None:
            kept = {share: self._spent[share] for share in self._reading}
            self._spent = {**kept, job.share: min(kept.values(), default=0.0)}
            long = LongPrompt(Prompt(job.prompt, job.adapter, share=job.share))
            self._reading[job.share] = long
        long.rows |= dict.fromkeys(rows, unit)
        if job.scores is None:
            job.scores = PromptScores(cached=cached)
            if job.wants_scores:
                long.scores[job] = PieceScores(job, self._base)

    def remove(self, row: int) -> None:
        """Drop a sequence, if it waits for its prompt."""
        for share, long in self._reading.items():
            unit = long.rows.pop(row, None)
            if unit is None:
                continue
            is_last = all(other.job is not unit.job for other in long.rows.values())
            if is_last and long.scores.pop(unit.job, None) is not None:
                unit.job.scores = None  # recomputed if the job restarts
            if not long.rows:
                del self._reading[share]
            return

    # -- reading -----------------------------------------------------------------------------

    def read(self, spent: float) -> Iterator[tuple[list[int], Tensor]]:
        """Read pieces with what the step's budget leaves after *spent* operations; at least one.

        Yields:
            The rows of each completed prompt, and (V,) logits of the token after it.
        """
        operations = max(self.most - spent, LONG_PART * self.most)
        is_first = True
        while self._reading:
            share = min(self._reading, key=lambda share: self._spent[share])
            long = self._reading[share]
            one = self._state.operations(long.done, long.done + 1)
            count = int(operations / one) // self._least * self._least
            if count <= 0 and not is_first:
                return
            is_first = False
            stop = min(long.done + max(count, self._least), len(long.prompt.tokens))
            taken = self._state.operations(long.done, stop)
            operations -= taken
            self._spent[share] += taken
            self._read_piece(long, stop)
            if long.reader is not None and stop == len(long.prompt.tokens):
                del self._reading[share]
                for scores in long.scores.values():
                    scores.finish()
                yield list(long.rows), long.reader.finish(long.continued())

    def _read_piece(self, long: LongPrompt, stop: int) -> None:
        if long.reader is None:
            long.reader = self._state.read(long.prompt)
        states = long.reader.read(stop - long.done)
        long.done = stop
        for scores in long.scores.values():
            scores.add(states, self._state.head(long.prompt.adapter, len(states)))
