"""Prompts by the time that they take: what a step has time for, and long ones, read in pieces.

A prompt that a step has no time for is read over several steps, so that what others ask for waits
for a piece of it only. Each share has one such prompt at a time, and pieces go to the share that
has got the fewest. Does not know how prompts are computed, or about the running batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import islice

import attrs
from torch import Tensor

from tinkex.engine.base_model import BaseModel, Prompt, PromptReader, PromptState
from tinkex.engine.memory import kind_of
from tinkex.engine.prompt_logprobs import PieceScores
from tinkex.engine.sample_queue import Unit
from tinkex.engine.sample_requests import Job, PromptScores
from tinkex.engine.sample_turns import STEP_OPERATIONS
from tinkex.engine.weight_store import is_in_file

#: Most tokens of prompts that are computed in one step, if they are not too many operations: what
#: the sequences that are running, and requests that arrive, have to wait for. While no two shares
#: have something to do it may be `ALONE` times more.
PREFILL_TOKENS = {"cpu": 1024, "cuda": 16384}
ALONE = 4

#: Tokens that a step has time for in any case, and the fewest of a piece: with fewer, reading the
#: matrices takes longer than computing; from disk, much longer.
LEAST_PIECE = 32
LEAST_FROM_DISK = 512

#: Part of each step's operations that long prompts get, however many short ones there are.
LONG_PART = 0.25

#: How many units of a share's line are looked at: more do not start in one step.
LOOK_AHEAD = 256


@attrs.define(eq=False)
class LongPrompt:
    """A prompt that is being read.

    Attributes:
        rows: numbers of its sequences, and the unit of each. The prompt is dropped with the last.
        scores: of the jobs that want to know something of the prompt.
        reader: None before the first piece.
        done: tokens that have been read.
    """

    prompt: Prompt
    rows: dict[int, Unit] = attrs.field(factory=dict)
    scores: dict[Job, PieceScores] = attrs.field(factory=dict)
    reader: PromptReader | None = None
    done: int = 0

    def serves(self, job: Job) -> bool:
        """True if a job can join: of the same prompt, without scores that need its beginning."""
        if any(unit.job is job for unit in self.rows.values()):
            return True
        return (
            (job.scores is not None or not job.wants_scores)
            and job.adapter is self.prompt.adapter
            and len(job.prompt) == len(self.prompt.tokens)
            and bool((job.prompt == self.prompt.tokens).all())
        )

    def continued(self) -> list[list[int]]:
        """The rows of each unit that goes beyond its first token."""
        of: dict[Unit, list[int]] = {}
        for row, unit in self.rows.items():
            if unit.job.limit > 1:
                of.setdefault(unit, []).append(row)
        return list(of.values())


class LongPrompts:
    """What a step may spend on prompts, and the prompts that are being read."""

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
        """Set what a step may spend."""
        kind = kind_of(self._base.device)
        most = min(STEP_OPERATIONS[kind], self._state.operations(0, PREFILL_TOKENS[kind]))
        self._least = LEAST_FROM_DISK if self._is_on_disk else LEAST_PIECE
        most = max(most, self._state.operations(0, self._least))
        self.most = most * (ALONE if is_alone else 1)

    # -- whose prompts start -----------------------------------------------------------------

    def operations(self, job: Job) -> float:
        """What a job's prompt takes, if it is computed whole."""
        return self._state.operations(0, len(job.prompt))

    def is_long(self, job: Job) -> bool:
        """True if a step has no time for a job's prompt."""
        return self._state.reads_in_pieces and self.operations(job) > self.most

    def ready(self, line: Iterable[Unit]) -> Iterator[Unit]:
        """What may start of a share's line: of its long prompts one, and whatever joins that."""
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
        """Read a unit's prompt in pieces, for *rows*. Its share's account starts with that of the
        share that has spent least."""
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
        """Forget a sequence, if it waits for its prompt."""
        for share, long in self._reading.items():
            unit = long.rows.pop(row, None)
            if unit is None:
                continue
            is_last = all(other.job is not unit.job for other in long.rows.values())
            if is_last and long.scores.pop(unit.job, None) is not None:
                unit.job.scores = None  # if it starts again, they are computed again
            if not long.rows:
                del self._reading[share]
            return

    # -- reading -----------------------------------------------------------------------------

    def read(self, spent: float) -> Iterator[tuple[list[int], Tensor]]:
        """Read on, after so many operations of this step; a piece at least.

        Yields:
            The rows of each prompt that ends, and (V,) logits of the token after it.
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
