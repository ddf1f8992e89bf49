"""Sampling with continuous batching: requests join and leave the running batch at every step.

A step admits waiting requests (their prompts are computed together, a prompt asked for twice only
once), then gives every running sequence one more token; where that would take long, those of some
pools (see sample_pools.py), in turn. One `Sampler` serves one base model and any
number of adapters over it. Does not know about HTTP, users, or where adapters come from. One
subject in one module: admission, a step, and recovery from a failed step change the same batch.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinkex import types
from tinkex.engine import token_sampling
from tinkex.engine.attention import PackedAttention, Packing
from tinkex.engine.cpu_parallel import Workers
from tinkex.engine.lm_head import head_logits
from tinkex.engine.lora import Finished, MixedLinears, Stack, Workspace, can_merge
from tinkex.engine.model import Base, Forward, kind_of
from tinkex.engine.prompt_logprobs import score_prompts, topk_of
from tinkex.engine.sample_pools import Pool, Pools
from tinkex.engine.sample_queue import SampleQueue, Unit
from tinkex.engine.sample_requests import Job, PromptScores
from tinkex.engine.sample_rows import MOST_ROWS, Rows

logger = logging.getLogger(__name__)

#: Prompt tokens computed in one step (more only for a single longer prompt): what the sequences
#: that are running have to wait for. Where none are running it may be as many times more.
PREFILL_TOKENS = {"cpu": 1024, "cuda": 16384}
ALONE = 4

#: Samples of one prompt that share its keys and values; more form further groups.
GROUP_WIDTH = 16

#: Rows of one adapter from which on it is merged into copies of the matrices, for some steps.
MERGE_ROWS = 16

#: Keys and values that a step reads at most, if there are several pools of them: what a request
#: that has just arrived may have to wait for. Not less than twice the base model, which is read in
#: every step.
STEP_BYTES = {"cpu": 2**28, "cuda": 2**34}

Decode = Callable[[Sequence[int]], str]
Outcome = tuple[Hashable, "types.SampleResponse | Exception"]
Place = tuple[Pool, int]


class Sampler:
    """The running batch of one base model.

    Args:
        load_decode: gives ids -> text; called when a stop string is first asked for.
        memory: bytes that keys and values may take; requests beyond that wait.
        workers: compute shares of the prompts.
    """

    def __init__(
        self, base: Base, load_decode: Callable[[], Decode], memory: int, workers: Workers
    ) -> None:
        self._base = base
        self._workers = workers
        self._load_decode = load_decode
        self._decode: Decode | None = None
        self._memory = memory
        self._waiting = SampleQueue()
        self._rows = Rows()
        step_bytes = max(STEP_BYTES[kind_of(base.device)], 2 * base.nbytes)
        self._pools = Pools(base.spec, base.device, base.dtype, step_bytes)
        self._reserved: dict[int, int] = {}
        self._unit: dict[int, Unit] = {}  # of each running row; the youngest last
        self._stack = Stack([None])
        self._workspace = Workspace() if can_merge(base.linears) else None
        self._finished: list[Outcome] = []
        self._answers_first = False
        self._begun: dict[Job, None] = {}  # jobs that a failing step may have half computed
        # After a step has failed: groups of jobs to compute again, and the waiting units of the
        # group that is computed now. Nothing else is admitted until both are empty.
        self._suspects: deque[list[Job]] = deque()
        self._trial = SampleQueue()
        self._isolating = False

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or self._unit or self._finished or self._trial or self._suspects)

    def submit(self, job: Job) -> None:
        """Queue a job made by `make_job`."""
        if job.stop_strings and self._decode is None:
            self._decode = self._load_decode()
        self._waiting.extend(self._units(job))

    def cancel(self, ticket: Hashable) -> None:
        """Forget a job; nothing is returned for it."""
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
        """Free what only makes the next step quicker, unless there is something to do."""
        if not self.is_busy:
            self._forget_state()

    @torch.no_grad()
    def step(self) -> list[Outcome]:
        """Admit, then advance every running sequence by a token; give what is finished.

        If that fails, the jobs of the step are computed again in smaller groups, until the one
        that fails alone is found. It ends with its exception. The others get the answer that they
        would have got: their tokens depend on their seeds only.
        """
        try:
            self._admit()
            # What has ended with its first token is answered before the others get their next one,
            # but not twice in a row: they are not to wait for ever.
            self._answers_first = bool(self._finished) and not self._answers_first
            if self._unit and not self._answers_first:
                self._advance()
        except Exception as exc:  # handed to whoever waits for the job that caused it
            self._isolate(exc)
        done, self._finished = self._finished, []
        return done

    def _fail(self, job: Job, exc: Exception) -> None:
        """End a job with the failure that it alone has caused."""
        logger.warning("Sample request %s failed: %s", job.ticket, exc, exc_info=exc)
        self._drop(lambda other: other is job)
        self._finished.append((job.ticket, exc))

    def _isolate(self, exc: Exception) -> None:
        """Start again after a failed step: halve the jobs that were in it, or end the only one."""
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
        """Nothing runs. What a failure may have left half changed is made again."""
        self._rows = Rows()
        self._reserved.clear()
        self._unit.clear()
        self._pools.clear()
        self._begun = {}
        self._stack = Stack([None])
        self._workspace = Workspace() if can_merge(self._base.linears) else None

    def _line(self) -> SampleQueue:
        """The units that may start now: after a failure, those of one group of suspects."""
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

    def _admit(self) -> None:
        """Start waiting units, as many as there is room for."""
        queue = self._line()
        if not queue:
            return
        self._make_room(queue)
        units = self._choose_units(queue)
        if units:
            self._begun |= dict.fromkeys(unit.job for unit in units)
            self._begin(units)

    def _begin(self, units: Sequence[Unit]) -> None:
        """Compute the prompts of units, and give each sample its first token."""
        stack = self._stack_with([unit.job.adapter for unit in units])
        number = {adapter: i for i, adapter in enumerate(stack.adapters)}
        prompts: dict[tuple[int, int, bytes], list[Unit]] = {}
        for unit in units:
            prompt = unit.job.prompt
            key = number[unit.job.adapter], len(prompt), prompt.tobytes()
            prompts.setdefault(key, []).append(unit)
        # By adapter, so that each multiplies once; then by length, for attention.
        groups = [prompts[key] for key in sorted(prompts)]
        adapters = np.array([key[0] for key in sorted(prompts)])
        started = [[self._start(unit) for unit in group] for group in groups]
        places = [[place for _, found in group for place in found] for group in started]
        begun = set(units)
        self._waiting.remove(begun)
        self._trial.remove(begun)
        logits = self._compute_prompts(groups, places, stack, adapters)
        counts = [sum(unit.count for unit in group) for group in groups]
        which = torch.from_numpy(np.repeat(np.arange(len(groups)), counts)).to(logits.device)
        flat = [row for group in started for rows, _ in group for row in rows]
        self._take_tokens(np.array(flat), logits[which])

    def _stack_with(self, adapters: Sequence[Finished | None]) -> Stack:
        """The stack of those that are running, if it has all these; else one of just these, which
        will be that of those running if no others are."""
        distinct = dict.fromkeys(adapters)
        if len(distinct) > 1 and distinct.keys() <= set(self._stack.adapters):
            return self._stack
        stack = Stack(list(distinct))
        if not self._unit:
            self._stack = stack
        return stack

    def _usage(self) -> tuple[dict[Hashable, int], dict[Hashable, int]]:
        """Rows and bytes that each share has in the running batch."""
        rows: dict[Hashable, int] = {}
        reserved: dict[Hashable, int] = {}
        for row, unit in self._unit.items():
            share = unit.job.share
            rows[share] = rows.get(share, 0) + 1
            reserved[share] = reserved.get(share, 0) + self._reserved[row]
        return rows, reserved

    def _choose_units(self, queue: SampleQueue) -> list[Unit]:
        """Which units start now: as many as fit, of the share that has the fewest rows first.

        While several shares have something to do, none gets more than its part of the rows and of
        the memory, but for one unit.
        """
        chosen: list[Unit] = []
        used, reserved = self._usage()
        lines = {share: iter(queue.line(share)) for share in queue.shares()}
        heads = {share: next(line) for share, line in lines.items()}
        parts = len(used.keys() | heads.keys())
        tokens, rows = 0, len(self._rows.free)
        most = PREFILL_TOKENS[kind_of(self._base.device)]
        most *= 1 if self._unit else ALONE
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
                del heads[share]  # what is behind it in its line waits for it
                continue
            tokens += len(unit.job.prompt)
            if chosen and tokens > most:
                break
            rows -= unit.count
            used[share], reserved[share] = mine[0] + unit.count, mine[1] + needed
            chosen.append(unit)
            following = next(lines[share], None)
            if following is None:
                del heads[share]
            else:
                heads[share] = following
        return chosen

    def _make_room(self, queue: SampleQueue) -> None:
        """Take rows back from shares that have more than their part, for those that have less.

        The youngest samples go back to the head of their line and are computed again later, to the
        same tokens. Those within a share's part are never taken, so every share makes progress.
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
        """Put the youngest running unit of a share back into its line."""
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
        """What a unit's keys and values may come to."""
        spec = self._base.spec
        numbers = 2 * spec.layers * spec.kv_heads * spec.head_dim
        positions = len(unit.job.prompt) + unit.count * unit.job.limit
        return positions * numbers * self._base.embedding.element_size()

    def _start(self, unit: Unit) -> tuple[list[int], list[Place]]:
        """Rows for a unit's samples, and where the keys and values of its prompt go: nowhere, if
        one token is all."""
        rows = [self._rows.take(unit.job, unit.first + i) for i in range(unit.count)]
        part = self._bytes(unit) // unit.count
        for row in rows:
            self._unit[row] = unit
            self._reserved[row] = part
        if unit.job.limit == 1:
            return rows, []
        return rows, [self._pools.add(rows, len(unit.job.prompt))]

    def _compute_prompts(
        self,
        groups: Sequence[Sequence[Unit]],
        places: Sequence[Sequence[Place]],
        stack: Stack,
        adapters: npt.NDArray[np.int64],
    ) -> Tensor:
        """Logits (groups, V) of what comes after each group's prompt.

        Args:
            places: where each group's keys and values go.
            adapters: number of each group's adapter in the stack; sorted.
        """
        sizes = [len(group[0].job.prompt) for group in groups]
        is_single = len(stack.adapters) == 1
        room = None
        if is_single:
            is_worth = sum(sizes) >= self._base.spec.width // 2
            room = self._room(stack.adapters[0], is_worth)
        shares = [list(range(len(groups)))]
        wants_scores = any(unit.job.wants_scores for group in groups for unit in group)
        if is_single or not wants_scores:  # scores of several adapters take turns in the workspace
            shares = self._workers.share_out(sizes)
        if len(shares) > 1:
            MixedLinears(self._base.linears, stack, adapters, room).prepare()
        parts = [
            partial(
                self._compute_share,
                [groups[i] for i in share],
                [places[i] for i in share],
                stack,
                adapters[share],
                room,
            )
            for share in shares
        ]
        logits = torch.cat(self._workers.run(parts))
        order = np.argsort(np.concatenate(shares))
        return logits[torch.from_numpy(order).to(logits.device)]

    def _compute_share(
        self,
        groups: Sequence[Sequence[Unit]],
        places: Sequence[Sequence[Place]],
        stack: Stack,
        adapters: npt.NDArray[np.int64],
        room: Workspace | None,
    ) -> Tensor:
        """Prefill some groups' prompts, score them, and give their logits (groups, V)."""
        prompts = [group[0].job.prompt for group in groups]
        packing = Packing([len(prompt) for prompt in prompts], self._base.device)
        linears = MixedLinears(self._base.linears, stack, adapters.repeat(packing.lengths), room)
        hidden = self._prefill(prompts, packing, places, linears)
        self._score_prompts(groups, hidden.split(packing.lengths))
        ends = torch.from_numpy(packing.starts + np.asarray(packing.lengths) - 1)
        head_of = MixedLinears(self._base.linears, stack, adapters)
        return head_logits(head_of, hidden[ends.to(hidden.device)], self._base.spec.logit_cap)

    def _prefill(
        self,
        prompts: Sequence[npt.NDArray[np.int32]],
        packing: Packing,
        places: Sequence[Sequence[Place]],
        linears: MixedLinears,
    ) -> Tensor:
        """Hidden states (N, d) of prompts; their keys and values go to their places."""
        base = self._base
        attention = PackedAttention(packing, base.spec)
        keys = base.spec.heads * base.spec.head_dim
        values = keys + base.spec.kv_heads * base.spec.head_dim

        def attend(layer: int, qkv: Tensor) -> tuple[Tensor, object]:
            for i, start in enumerate(packing.starts):
                own = qkv[start : start + packing.lengths[i]]
                k = own[:, keys:values].view(len(own), -1, base.spec.head_dim)
                v = own[:, values:].view(len(own), -1, base.spec.head_dim)
                for pool, place in places[i]:
                    pool.fill(layer, place, k, v)
            return attention.forward(layer, qkv)

        tokens = torch.from_numpy(np.concatenate(prompts)).to(base.device)
        x = base.embed(tokens)
        forward = Forward(base, linears, packing.positions, packing.longest, attend)
        for i in range(base.spec.layers):
            x, _ = forward.layer(i, x)
        return base.finish(x)[0]

    def _score_prompts(self, groups: Sequence[Sequence[Unit]], states: Sequence[Tensor]) -> None:
        """Fill in what the jobs of each prompt want to know of it; those of an adapter together."""
        asked: dict[Finished | None, list[tuple[Job, Tensor]]] = {}
        for group, own in zip(groups, states):
            for i, job in enumerate(dict.fromkeys(unit.job for unit in group)):
                if job.scores is None:
                    job.scores = PromptScores(cached=len(job.prompt) if i else 0)
                    if job.wants_scores:
                        asked.setdefault(job.adapter, []).append((job, own))
        for adapter, jobs in asked.items():
            rows = sum(len(own) for _, own in jobs)
            room = self._room(adapter, rows >= self._base.spec.width // 2)
            one = Stack([adapter])
            linears = MixedLinears(self._base.linears, one, np.zeros(1, np.int64), room)
            score_prompts(jobs, linears, self._base.spec)

    # -- tokens ------------------------------------------------------------------------------

    def _advance(self) -> None:
        """One more token for every running sequence, or for those whose turn it is."""
        pools = self._pools.choose({row: unit.job.share for row, unit in self._unit.items()})
        if not pools:
            return
        members = [pool.begin_step() for pool in pools]
        bounds = np.cumsum([0, *(len(m) for m in members)])
        rows = np.concatenate([np.array(m, np.int64) for m in members])
        adapters = self._adapters(rows)
        to_pools = from_pools = None
        if (np.diff(adapters) < 0).any():  # rows of one go together, so that it multiplies once
            order = np.argsort(adapters, kind="stable")
            rows, adapters = rows[order], adapters[order]
            to_pools = torch.from_numpy(np.argsort(order)).to(self._base.device)
            from_pools = torch.from_numpy(order).to(self._base.device)
        base, spec, state = self._base, self._base.spec, self._rows
        positions = state.prompt_length[rows] + state.length[rows] - 1
        split = [spec.heads, spec.kv_heads, spec.kv_heads]

        def attend(layer: int, qkv: Tensor) -> tuple[Tensor, object]:
            own = qkv if to_pools is None else qkv.index_select(0, to_pools)
            heads = own.view(len(qkv), -1, spec.head_dim)
            outs = []
            for pool, start, stop in zip(pools, bounds, bounds[1:]):
                outs.append(pool.attend(layer, *heads[start:stop].split(split, dim=1)))
            out = outs[0] if len(outs) == 1 else torch.cat(outs)
            return (out if from_pools is None else out.index_select(0, from_pools)), None

        single = self._stack.adapters[0] if len(self._stack.adapters) == 1 else None
        room = self._room(single, len(rows) >= MERGE_ROWS)
        linears = MixedLinears(base.linears, self._stack, adapters, room)
        at = torch.from_numpy(positions).to(base.device)
        forward = Forward(base, linears, at, int(positions.max()) + 1, attend)
        tokens = torch.from_numpy(state.last[rows]).to(base.device)
        x = base.embed(tokens)
        for i in range(spec.layers):
            x, _ = forward.layer(i, x)
        for pool in pools:
            pool.end_step()
        self._take_tokens(rows, head_logits(linears, base.finish(x)[0], spec.logit_cap))

    def _adapters(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Number of each row's adapter in the stack, which is rebuilt if others are running.

        Its order is kept as long as the adapters are the same: stacking copies them all.
        """
        running = dict.fromkeys(unit.job.adapter for unit in self._unit.values())
        if running.keys() != set(self._stack.adapters):
            self._stack = Stack(list(running))
        number = {adapter: i for i, adapter in enumerate(self._stack.adapters)}
        return np.array([number[self._unit[row].job.adapter] for row in rows.tolist()], np.int64)

    def _room(self, adapter: Finished | None, is_worth: bool) -> Workspace | None:
        """Where to merge an adapter, if that is worth it or has been done already."""
        room = self._workspace
        return room if room is not None and (is_worth or room.belongs_to(adapter)) else None

    def _take_tokens(self, rows: npt.NDArray[np.int64], logits: Tensor) -> None:
        """Choose a token for each row, record it, and end the sequences that it ends."""
        state = self._rows
        self._record_topk(rows, logits)
        tokens, logprobs = token_sampling.choose(logits, state.settings(rows))
        stopped = state.append(rows, tokens, logprobs)
        full = state.length[rows] >= state.limit[rows]
        for i, row in enumerate(rows.tolist()):
            job = state.job[row]
            if job is None:
                continue
            try:  # what is of this job alone
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

    def _record_topk(self, rows: npt.NDArray[np.int64], logits: Tensor) -> None:
        jobs = [self._rows.job[row] for row in rows]
        wanted = [i for i, job in enumerate(jobs) if job and job.request.topk_sample_logprobs]
        for i in wanted:
            job = jobs[i]
            if job is not None:
                k = job.request.topk_sample_logprobs
                ids, logprobs = topk_of(logits[i : i + 1], k)
                self._rows.topk[int(rows[i])].append((ids, logprobs))

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
        """Copy a sequence that has ended out of its row."""
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
        self._pools.remove(row)
        self._rows.release(row)
