"""Sampling with continuous batching: requests join and leave the running batch at every step.

A step admits waiting requests (it computes their prompts together, equal prompts once, long prompts
in pieces), then advances every running sequence by one token, or only some in turn if all would
take too long. One `Sampler` serves one base model and any number of adapters over it; the base
model's `SamplingState` does the computation. Does not know about HTTP, users, or where adapters
come from.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinkex import types
from tinkex.engine import token_sampling
from tinkex.engine.base_model import BaseModel, Ints, Prompt, SamplingState
from tinkex.engine.block_decoding import BlockDecoding
from tinkex.engine.cpu_parallel import Workers
from tinkex.engine.finished_lora import Finished
from tinkex.engine.long_prompts import LongPrompts
from tinkex.engine.prompt_logprobs import scorer_of, topk_of
from tinkex.engine.row_operations import TORCH_ROWS, RowOperations
from tinkex.engine.sample_queue import SampleQueue, Unit
from tinkex.engine.sample_requests import Job
from tinkex.engine.sample_rows import MOST_ROWS, Rows

logger = logging.getLogger(__name__)

#: Most samples of one prompt in a group that shares its keys and values.
GROUP_WIDTH = 16

#: Steps stay short for this many seconds after several shares were active. Longer steps have a
#: tenth more throughput, which is better for a single user.
SHARING_SECONDS = 60.0

Decode = Callable[[Sequence[int]], str]
Outcome = tuple[Hashable, "types.SampleResponse | Exception"]


class Sampler:
    """The running batch of one base model.

    Args:
        load_decode: returns ids -> text; called at the first request with a stop string, unless
            `unread_decoder` has loaded it before.
        memory: bytes that keys and values may take; requests beyond that wait.
        workers: compute the prompts in parallel.
        new_state: makes an empty sampling state; None is the base model's.
        operations: read the logits of a token.
    """

    def __init__(
        self,
        base: BaseModel,
        load_decode: Callable[[], Decode],
        memory: int,
        workers: Workers,
        new_state: Callable[[], SamplingState | BlockDecoding] | None = None,
        operations: RowOperations = TORCH_ROWS,
    ) -> None:
        self._base = base
        self._workers = workers
        self._load_decode = load_decode
        self._decode: Decode | None = None
        self._memory = memory
        self._operations = operations
        self._waiting = SampleQueue()
        self._rows = Rows()
        self._new_state = new_state or partial(base.sampling_state, workers)
        self._state = self._new_state()
        self._prompts = LongPrompts(base, self._state)
        self._reserved: dict[int, int] = {}
        self._unit: dict[int, Unit] = {}  # of each running row, oldest first
        self._finished: list[Outcome] = []
        self._answers_first = False
        self._shared_until = 0.0
        self._begun: dict[Job, None] = {}  # jobs that a failed step may have computed in part
        # After a failed step: groups of jobs to recompute, and the waiting units of the current
        # group. Nothing else is admitted until both are empty.
        self._suspects: deque[list[Job]] = deque()
        self._trial = SampleQueue()
        self._isolating = False

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or self._unit or self._finished or self._trial or self._suspects)

    def submit(self, job: Job) -> None:
        """Queue a job made by `make_job`."""
        if job.stop_strings and self._decode is None:
            self._read_decoder()
        self._waiting.extend(self._units(job))
        shares = {job.share, *self._waiting.shares()}
        if len(shares | {unit.job.share for unit in self._unit.values()}) > 1:
            self._shared_until = time.monotonic() + SHARING_SECONDS

    def unread_decoder(self, stop: types.sampling.Stop) -> Callable[[], None] | None:
        """A callable that loads the decoder for stop strings, on any thread; or None."""
        has_strings = isinstance(stop, str) or any(isinstance(item, str) for item in stop or ())
        return self._read_decoder if has_strings and self._decode is None else None

    def _read_decoder(self) -> None:
        self._decode = self._load_decode()

    def cancel(self, ticket: Hashable) -> None:
        """Drop a job; nothing is returned for it."""
        self._drop(lambda job: job.ticket == ticket)

    def _drop(self, matches: Callable[[Job], bool]) -> None:
        for queue in (self._waiting, self._trial):
            queue.drop(lambda unit: matches(unit.job))
        for group in self._suspects:
            group[:] = [job for job in group if not matches(job)]
        self._begun = {job: None for job in self._begun if not matches(job)}
        for row in list(self._unit):
            job = self._rows.job[row]
            if job is not None and matches(job):
                self._release(row)

    def free_idle(self) -> None:
        """Free caches that only make the next step faster, unless there is work."""
        if not self.is_busy:
            self._forget_state()

    @torch.no_grad()
    def step(self) -> list[Outcome]:
        """Admit, then advance running sequences by a token; return the outcomes of finished jobs.

        If a step fails, its jobs are recomputed in smaller groups until the job that fails alone is
        found. That job ends with its exception. The other jobs get the same results as without the
        failure, since their tokens depend on their seeds only.
        """
        try:
            self._prompts.begin_step(is_alone=not self._is_shared)
            spent = self._admit()
            # Jobs that end with their first token are returned before the others advance, but not
            # twice in a row, so that running sequences always make progress.
            self._answers_first = bool(self._finished) and not self._answers_first
            if not self._answers_first:
                for rows, logits in self._prompts.read(spent):
                    self._take_tokens(np.array(rows), logits.repeat(len(rows), 1))
                if len(self._unit) > self._prompts.waiting:
                    self._advance()
        except Exception as exc:  # returned as the outcome of the job that caused it
            self._isolate(exc)
        done, self._finished = self._finished, []
        return done

    def _fail(self, job: Job, exc: Exception) -> None:
        """End a job with the exception that it caused alone."""
        logger.warning("Sample request %s failed: %s", job.ticket, exc, exc_info=exc)
        self._drop(lambda other: other is job)
        self._finished.append((job.ticket, exc))

    def _isolate(self, exc: Exception) -> None:
        """After a failed step: split its jobs into two groups to retry, or end its only job."""
        answered = {ticket for ticket, _ in self._finished}
        jobs = [job for job in self._begun if job.ticket not in answered]
        logger.warning("A sampling step of %d requests failed: %s", len(jobs), exc, exc_info=exc)
        self._forget_state()
        involved = set(jobs)
        self._waiting.drop(lambda unit: unit.job in involved)
        others = [unit.job for unit in self._trial if unit.job not in involved]
        if others:
            self._suspects.appendleft(list(dict.fromkeys(others)))
        self._trial = SampleQueue()
        self._isolating = True
        if len(jobs) == 1:
            self._finished.append((jobs[0].ticket, exc))
        elif jobs:
            half = len(jobs) // 2
            self._suspects.extendleft([jobs[half:], jobs[:half]])

    def _forget_state(self) -> None:
        """Drop all running rows and make a new state: a failure may have left it inconsistent."""
        self._rows = Rows()
        self._reserved.clear()
        self._unit.clear()
        self._begun = {}
        self._state = self._new_state()
        self._prompts = LongPrompts(self._base, self._state)

    def _line(self) -> SampleQueue:
        """The units that may start now: after a failure, only those of the group being retried."""
        while self._isolating and not self._trial and not self._unit:
            if not self._suspects:
                self._isolating = False
                break
            for job in self._suspects[0]:
                job.start_again()
            self._trial = SampleQueue()
            self._trial.extend(unit for job in self._suspects[0] for unit in self._units(job))
            self._suspects.popleft()
        return self._trial if self._isolating else self._waiting

    # -- prompts -----------------------------------------------------------------------------

    @property
    def _is_shared(self) -> bool:
        """True if several shares were active within `SHARING_SECONDS`."""
        return time.monotonic() < self._shared_until

    def _admit(self) -> float:
        """Start the waiting units that fit; return the operations of their short prompts."""
        queue = self._line()
        if not queue:
            return 0.0
        self._make_room(queue)
        units = self._choose_units(queue)
        if not units:
            return 0.0
        self._begun |= dict.fromkeys(unit.job for unit in units)
        begun = set(units)
        self._waiting.remove(begun)
        self._trial.remove(begun)
        short = []
        for unit in units:
            if self._prompts.is_long(unit.job):
                self._prompts.begin(unit, self._start(unit))
            else:
                short.append(unit)
        if short:
            self._begin(short)
        return sum(self._prompts.operations(job) for job in {unit.job for unit in short})

    def _begin(self, units: Sequence[Unit]) -> None:
        """Compute the prompts of units, and give each sample its first token."""
        prompts: dict[tuple[Finished | None, bytes], list[Unit]] = {}
        for unit in units:
            prompts.setdefault((unit.job.adapter, unit.job.prompt.tobytes()), []).append(unit)
        groups = list(prompts.values())
        started = [[self._start(unit) for unit in group] for group in groups]
        asked = []
        for group, rows in zip(groups, started):
            job = group[0].job
            kept = [own for unit, own in zip(group, rows) if unit.job.limit > 1]
            asked.append(Prompt(job.prompt, job.adapter, kept, job.share))
        jobs = [list(dict.fromkeys(unit.job for unit in group)) for group in groups]
        logits = self._state.begin(asked, scorer_of(jobs, self._state, self._base))
        counts = [sum(unit.count for unit in group) for group in groups]
        which = torch.from_numpy(np.repeat(np.arange(len(groups)), counts)).to(logits.device)
        flat = [row for group_rows in started for own in group_rows for row in own]
        self._take_tokens(np.array(flat), logits[which])

    def _usage(self) -> tuple[dict[Hashable, int], dict[Hashable, int]]:
        """Rows and bytes of each share in the running batch."""
        rows: dict[Hashable, int] = {}
        reserved: dict[Hashable, int] = {}
        for row, unit in self._unit.items():
            share = unit.job.share
            rows[share] = rows.get(share, 0) + 1
            reserved[share] = reserved.get(share, 0) + self._reserved[row]
        return rows, reserved

    def _choose_units(self, queue: SampleQueue) -> list[Unit]:
        """Which units start now: as many as fit, beginning with the share that has the fewest rows.

        While several shares are active, each gets at most an equal part of the rows and the memory,
        but always at least one unit.
        """
        chosen: list[Unit] = []
        used, reserved = self._usage()
        lines = {share: self._prompts.ready(queue.line(share)) for share in queue.shares()}
        heads = {share: unit for share, line in lines.items() if (unit := next(line, None))}
        parts = len(used.keys() | lines.keys())
        spent, rows = 0.0, len(self._rows.free)
        counted: set[Job] = set()  # jobs whose prompt is counted in `spent`
        while heads:
            share = min(heads, key=lambda share: used.get(share, 0))
            unit, needed = heads[share], self._bytes(heads[share])
            alone = not chosen and not self._unit
            fits = sum(reserved.values()) + needed <= self._memory or alone
            mine = used.get(share, 0), reserved.get(share, 0)
            is_fair = not mine[0] or (
                mine[0] + unit.count <= MOST_ROWS // parts
                and mine[1] + needed <= self._memory // parts
            )
            if unit.count > rows or not fits or not (is_fair or parts == 1):
                del heads[share]  # the rest of its queue waits behind it
                continue
            if unit.job not in counted and not self._prompts.is_long(unit.job):
                counted.add(unit.job)
                spent += self._prompts.operations(unit.job)
            if chosen and spent > self._prompts.most:
                return self._evenly(chosen)
            rows -= unit.count
            used[share], reserved[share] = mine[0] + unit.count, mine[1] + needed
            chosen.append(unit)
            following = next(lines[share], None)
            if following is None:
                del heads[share]
            else:
                heads[share] = following
        return chosen

    def _evenly(self, units: list[Unit]) -> list[Unit]:
        """*units* without the last few, which wait for the next step, if that step would leave
        workers idle with them and not without them."""
        jobs = list(dict.fromkeys(u.job for u in units if not self._prompts.is_long(u.job)))
        for count in range(len(jobs), len(jobs) // 2, -1):
            if self._workers.is_even([len(job.prompt) for job in jobs[:count]]):
                late = set(jobs[count:])
                return [unit for unit in units if unit.job not in late]
        return units

    def _make_room(self, queue: SampleQueue) -> None:
        """Preempt samples of shares above an equal part, to make room for shares below it.

        The newest samples return to the head of their queue and are recomputed later, with the same
        tokens. Samples within a share's part are never preempted, so every share makes progress.
        """
        parts = len(self._usage()[0].keys() | set(queue.shares()))
        if parts == 1:
            return
        rows_each, bytes_each = MOST_ROWS // parts, self._memory // parts
        for share in queue.shares():
            unit = queue.line(share)[0]
            needed = self._bytes(unit)
            while True:
                used, reserved = self._usage()
                mine = used.get(share, 0)
                is_full = len(self._rows.free) < unit.count
                is_full |= sum(reserved.values()) + needed > self._memory
                has_its_part = mine and (
                    mine + unit.count > rows_each or reserved[share] + needed > bytes_each
                )
                if not is_full or has_its_part:
                    break
                greedy = [s for s in used if used[s] > rows_each or reserved[s] > bytes_each]
                if not greedy:
                    break
                largest = max(greedy, key=lambda s: (reserved[s] / bytes_each, used[s]))
                self._preempt(largest, queue)

    def _preempt(self, share: Hashable, queue: SampleQueue) -> None:
        """Return the newest running unit of a share to its queue."""
        youngest = next(u for u in reversed(self._unit.values()) if u.job.share == share)
        rows = [row for row, unit in self._unit.items() if unit is youngest]
        indexes = [int(self._rows.index[row]) for row in rows]
        for row in rows:
            self._release(row)
        queue.put_back(Unit(youngest.job, index, 1) for index in sorted(indexes))

    def _units(self, job: Job) -> list[Unit]:
        """The samples of a job in units that share the keys and values of their prompt."""
        count, width = len(job.sequences), GROUP_WIDTH
        while width > 1 and self._bytes(Unit(job, 0, min(width, count))) > self._memory // 4:
            width //= 2
        return [Unit(job, i, min(width, count - i)) for i in range(0, count, width)]

    def _bytes(self, unit: Unit) -> int:
        """Most bytes that a unit's keys and values may take."""
        return self._state.bytes_needed(len(unit.job.prompt), unit.count, unit.job.limit)

    def _start(self, unit: Unit) -> list[int]:
        """Rows for a unit's samples."""
        rows = [self._rows.take(unit.job, unit.first + i) for i in range(unit.count)]
        part = self._bytes(unit) // unit.count
        for row in rows:
            self._unit[row] = unit
            self._reserved[row] = part
        return rows

    # -- tokens ------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Advance all running sequences, or those whose turn it is, by a token or a block."""
        if isinstance(self._state, BlockDecoding):
            self._advance_block(self._state)
            return
        state = self._rows
        rows, logits = self._state.advance(
            state.last,
            state.prompt_length + state.length - 1,
            {row: unit.job.share for row, unit in self._unit.items()},
            in_turn=self._is_shared,
        )
        self._take_tokens(rows, logits)

    def _advance_block(self, state: BlockDecoding) -> None:
        """Record the tokens of a block of steps, while the next one is computed."""
        topk = max(unit.job.request.topk_sample_logprobs for unit in self._unit.values())
        for step in state.advance_block(self._rows, topk):
            if step.topk is not None:
                self._keep_topk(step.rows, *step.topk)
            self._record_tokens(step.rows, step.tokens, step.logprobs)

    def _take_tokens(self, rows: Ints, logits: Tensor) -> None:
        """Choose a token for each row, and record it."""
        self._record_topk(rows, logits)
        settings = self._rows.settings(rows)
        tokens, logprobs = token_sampling.choose(logits, settings, self._operations)
        self._record_tokens(rows, tokens, logprobs)

    def _record_topk(self, rows: Ints, logits: Tensor) -> None:
        for i, row in enumerate(rows.tolist()):
            job = self._rows.job[row]
            if job is not None and job.request.topk_sample_logprobs:
                found = topk_of(logits[i : i + 1], job.request.topk_sample_logprobs)
                self._keep_topk(rows[i : i + 1], *found)

    def _keep_topk(
        self, rows: Ints, ids: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32]
    ) -> None:
        """Keep as many of the likeliest tokens (n, K) of each row as its job requests."""
        for i, row in enumerate(rows.tolist()):
            job = self._rows.job[row]
            k = 0 if job is None else job.request.topk_sample_logprobs
            if k:
                self._rows.topk[row].append((ids[i : i + 1, :k], logprobs[i : i + 1, :k]))

    def _record_tokens(self, rows: Ints, tokens: Ints, logprobs: npt.NDArray[np.float32]) -> None:
        """Append a token to each row, and end the sequences that are complete."""
        state = self._rows
        stopped = state.append(rows, tokens, logprobs)
        full = state.length[rows] >= state.limit[rows]
        for i, row in enumerate(rows.tolist()):
            job = state.job[row]
            if job is None:
                continue
            try:  # a failure here concerns this job only
                if job.on_token is not None:
                    place = int(state.index[row]), int(state.length[row])
                    job.tell_token(*place, int(tokens[i]), float(logprobs[i]))
                if stopped[i] or (job.stop_strings and self._completes_stop(row, job)):
                    self._record(row, job, "stop")
                elif full[i]:
                    self._record(row, job, "length")
                else:
                    continue
            except Exception as exc:
                self._fail(job, exc)
                continue
            self._release(row)
            if job.is_done:
                self._finish(job)

    def _completes_stop(self, row: int, job: Job) -> bool:
        """True if the last token has completed a stop string."""
        if self._decode is None:
            raise RuntimeError("a job with stop strings was queued without a decoder.")
        longest = max(len(stop.encode()) for stop in job.stop_strings)
        length = int(self._rows.length[row])
        recent = self._rows.tokens[row, max(0, length - longest - 8) : length].tolist()
        text, before = self._decode(recent), self._decode(recent[:-1])
        return any(text.count(stop) > before.count(stop) for stop in job.stop_strings)

    def _finish(self, job: Job) -> None:
        try:
            outcome: types.SampleResponse | Exception = job.response()
        except Exception as exc:
            outcome = exc
        self._finished.append((job.ticket, outcome))
        self._begun.pop(job, None)

    def _record(self, row: int, job: Job, reason: types.sampling.StopReason) -> None:
        """Copy a finished sequence out of its row."""
        length = int(self._rows.length[row])
        topk = self._rows.topk[row]
        job.sequences[int(self._rows.index[row])] = types.SampledSequence(
            tokens=self._rows.tokens[row, :length].copy(),
            logprobs=self._rows.logprobs[row, :length].copy(),
            stop_reason=reason,
            topk_logprobs=types.TopkLogprobs(
                np.concatenate([ids for ids, _ in topk]), np.concatenate([lp for _, lp in topk])
            )
            if topk
            else None,
        )

    def _release(self, row: int) -> None:
        del self._unit[row], self._reserved[row]
        self._prompts.remove(row)
        self._state.remove(row)
        self._rows.release(row)
