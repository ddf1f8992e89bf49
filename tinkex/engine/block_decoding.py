"""Decoding on an accelerator: blocks of steps that run without the host, read one block behind.

The device holds everything that a step needs of each row: the last token, its position, the
sampling settings, the stop tokens. A step reads a token of every row, samples the next, and stores
it for the next step; finished rows are masked. The host starts a block of steps, and reads the
results of the previous block while this one runs. Rows join and leave between blocks. No step
depends on numbers that the host would have to read, so steps are replayed as CUDA graphs
(decode_graph.py) over keys and values at fixed addresses (static_cache.py).

Prompts are computed as in fast_path.py. Does not know about requests or users.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial

import attrs
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinkex.engine.adapter_slots import AdapterSlots
from tinkex.engine.base_model import Ints, OnHidden, Prompt, PromptReader
from tinkex.engine.cpu_parallel import Workers
from tinkex.engine.decode_graph import Capture, Graphs
from tinkex.engine.device_choice import Choice, RowSettings, choice_for, choose, topk_logprobs
from tinkex.engine.fast_path import FastModel, FastSampling
from tinkex.engine.finished_lora import Finished
from tinkex.engine.linears import Linears
from tinkex.engine.lm_head import head_logits
from tinkex.engine.model import Forward
from tinkex.engine.sample_rows import MOST_ROWS, Rows
from tinkex.engine.static_cache import Slab, SlabReading, StaticCache, copy_in, positions_of_row

#: Steps of a block: this many tokens arrive together, and a stop string may be noticed so late.
BLOCK_STEPS = 8

#: Top-k tokens reported per row and block: with a large k, a block has fewer steps.
REPORTED = 2048

#: The row whose numbers fill the unused places of a slab.
_FILLER = MOST_ROWS

#: Columns of a row's integers; its stop tokens follow.
_TOKEN, _POSITION, _COUNT, _LIMIT, _KEY, _TOP_K, _SLOT, _LIVE = range(8)
_STOPS = 8

#: Least room for stop tokens.
_FEWEST_STOPS = 8


@attrs.frozen
class StepShape:
    """The key of a recorded step: steps of the same shape run the same operations.

    Attributes:
        parts: for each slab in use, its number and how many of its rows are read.
        adapters: version of the adapter buffers; None if no row has an adapter.
        stops: room for the stop tokens of a row.
    """

    parts: tuple[tuple[int, int], ...]
    choice: Choice
    adapters: int | None
    stops: int


@attrs.frozen(eq=False)
class Step:
    """The results of one step: arrays of n rows.

    Attributes:
        topk: likeliest tokens (n, K) and their log-probabilities; None if none were wanted.
    """

    rows: Ints
    tokens: Ints
    logprobs: npt.NDArray[np.float32]
    topk: tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]] | None


@attrs.frozen(eq=False)
class _Block:
    """A started block, and the callable that waits for it and returns its arrays."""

    steps: int
    joined: dict[int, int]  # joining number of each row that the block advances
    read: Callable[[], list[npt.NDArray]]


class _DeviceRows:
    """The numbers of every row on the device, and what steps write for the host."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self._device = device
        self._steps = steps
        self.stops = _FEWEST_STOPS
        # Contiguous rows, so that everything about a row is read and written at once.
        self.numbers = self._empty_numbers()
        self.floats = torch.ones(MOST_ROWS + 1, 2, device=device)  # temperature, top_p
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens = torch.full((steps, MOST_ROWS + 1), -1, device=device)
        self.logprobs = torch.zeros(steps, MOST_ROWS + 1, device=device)
        self._topk: dict[int, tuple[Tensor, Tensor]] = {}

    def _empty_numbers(self) -> Tensor:
        numbers = torch.zeros(
            MOST_ROWS + 1, _STOPS + self.stops, dtype=torch.int64, device=self._device
        )
        numbers[:, _STOPS:] = -1
        return numbers

    def widen(self, stops: int) -> None:
        """Make room for *stops* stop tokens a row."""
        if stops > self.stops:
            self.stops = 1 << (stops - 1).bit_length()
            old, self.numbers = self.numbers, self._empty_numbers()
            self.numbers[:, : old.shape[1]] = old

    def join(self, rows: Ints, numbers: npt.NDArray[np.int64], floats: npt.NDArray) -> None:
        """Write the state and settings of *rows*."""
        index = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        own = torch.empty(numbers.shape, dtype=torch.int64, device=self._device)
        settings = torch.empty(floats.shape, device=self._device)
        for target, values in ((index, rows), (own, numbers), (settings, floats)):
            copy_in(target, values)
        self.numbers.index_copy_(0, index, own)
        self.floats.index_copy_(0, index, settings)

    def topk(self, count: int) -> tuple[Tensor, Tensor]:
        """Where steps write the likeliest tokens and their log-probabilities: (steps, rows, count),
        of no more steps than `REPORTED` allows."""
        if count not in self._topk:
            shape = (steps_for(self._steps, count), MOST_ROWS + 1, count)
            ids = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._topk[count] = ids, torch.zeros(shape, device=self._device)
        return self._topk[count]

    def write(self, rows: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        """Store this step's results for *rows*."""
        at = self.at * (MOST_ROWS + 1) + rows
        self.tokens.view(-1).index_copy_(0, at, tokens)
        self.logprobs.view(-1).index_copy_(0, at, logprobs)

    def continue_with(self, rows: Tensor, own: Tensor, tokens: Tensor, live: Tensor) -> None:
        """Update the numbers *own* of rows with a step's tokens; mask the rows that have ended.

        Overwrites *own*.
        """
        own[:, _TOKEN] = torch.where(live, tokens, own[:, _TOKEN])
        own[:, _POSITION] += live
        own[:, _COUNT] += live
        stopped = (own[:, _STOPS:] == tokens.unsqueeze(1)).any(dim=1)
        own[:, _LIVE] = live & ~stopped & (own[:, _COUNT] < own[:, _LIMIT])
        self.numbers.index_copy_(0, rows, own)
        self.at.add_(1)

    def write_topk(self, rows: Tensor, ids: Tensor, logprobs: Tensor) -> None:
        at = self.at * (MOST_ROWS + 1) + rows
        kept_ids, kept_logprobs = self.topk(ids.shape[1])
        kept_ids.view(-1, ids.shape[1]).index_copy_(0, at, ids.int())
        kept_logprobs.view(-1, ids.shape[1]).index_copy_(0, at, logprobs)


def steps_for(steps: int, topk: int) -> int:
    """Steps of a block in which *topk* tokens of each step are reported."""
    return max(1, min(steps, REPORTED // topk)) if topk else steps


def read_later(tensors: Sequence[Tensor]) -> Callable[[], list[npt.NDArray]]:
    """Start copying tensors to the host; the result waits for the arrays when called."""
    if tensors[0].device.type != "cuda":
        copies = [tensor.clone() for tensor in tensors]
        return lambda: [copy.numpy() for copy in copies]
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
    for copy, tensor in zip(copies, tensors):
        copy.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(tensors[0].device))

    def read() -> list[npt.NDArray]:
        done.synchronize()
        return [copy.numpy() for copy in copies]

    return read


class BlockDecoding:
    """The sampling state of the fast path when steps run in blocks. Implements `PromptState`.

    Args:
        memory: bytes that keys and values may take.
        capture: records steps; None runs them without recording.
        block_steps: most steps of a block.
    """

    def __init__(
        self,
        base: FastModel,
        workers: Workers,
        memory: int,
        capture: Capture | None = None,
        block_steps: int = BLOCK_STEPS,
    ) -> None:
        self._base = base
        self._block_steps = block_steps
        self._cache = StaticCache(base.spec, base.device, base.dtype, memory, _FILLER)
        self._prompts = FastSampling(base, workers, self._cache)
        self._slots = AdapterSlots(base.linears, base.dtype)
        self._graphs = Graphs(capture)
        self._on_device = _DeviceRows(base.device, block_steps)
        self._joined: dict[int, int] = {}  # number of each row's joining
        self._joinings = 0
        self._planned: dict[int, int] = {}  # tokens of each row after the blocks that were started
        self._pending: _Block | None = None

    # -- prompts -----------------------------------------------------------------------------

    def bytes_needed(self, prompt: int, samples: int, limit: int) -> int:
        """As `PromptState.bytes_needed`; each sample has its own copy of the prompt."""
        return samples * positions_of_row(prompt + limit) * self._cache.position_bytes

    def begin(self, prompts: Sequence[Prompt], on_hidden: OnHidden | None) -> Tensor:
        """As `PromptState.begin`."""
        return self._prompts.begin(prompts, on_hidden)

    def operations(self, start: int, stop: int) -> float:
        """As `PromptState.operations`."""
        return self._prompts.operations(start, stop)

    @property
    def reads_in_pieces(self) -> bool:
        return self._prompts.reads_in_pieces

    def read(self, prompt: Prompt) -> PromptReader:
        """As `PromptState.read`."""
        return self._prompts.read(prompt)

    def head(self, adapter: Finished | None, rows: int) -> Linears:
        """As `PromptState.head`."""
        return self._prompts.head(adapter, rows)

    def remove(self, row: int) -> None:
        """Drop a sequence, if it is there; a running block's tokens for it are discarded."""
        self._prompts.remove(row)
        self._joined.pop(row, None)
        self._planned.pop(row, None)

    # -- tokens ------------------------------------------------------------------------------

    def advance_block(self, rows: Rows, topk: int) -> Iterator[Step]:
        """Start a block of steps for all sequences; yield the steps of the previous block.

        Args:
            rows: settings and tokens of the sequences, by their numbers. For sequences of the last
                block, the device's state is newer.
            topk: how many of the likeliest tokens are wanted for each step.

        Yields:
            Steps in order, each without the sequences removed before it is yielded.
        """
        self._join(rows)
        before, self._pending = self._pending, self._start(rows, topk)
        if before is not None:
            yield from self._steps_of(before)

    def _join(self, rows: Rows) -> None:
        """Write the state of new sequences to the device."""
        running = self._cache.rows
        new = np.array([row for row in running if row not in self._joined], np.int64)
        if not len(new):
            return
        adapters = [self._prompts.adapter_of(row) for row in running]
        slots = self._slots.place(adapters)
        for row in new.tolist():
            self._joinings += 1
            self._joined[row], self._planned[row] = self._joinings, int(rows.length[row])
        self._on_device.widen(rows.stops.shape[1])
        numbers = np.full((len(new), _STOPS + self._on_device.stops), -1, np.int64)
        numbers[:, _TOKEN] = rows.last[new]
        numbers[:, _POSITION] = rows.prompt_length[new] + rows.length[new] - 1
        numbers[:, _COUNT], numbers[:, _LIMIT] = rows.length[new], rows.limit[new]
        numbers[:, _KEY], numbers[:, _TOP_K] = rows.keys[new].view(np.int64), rows.top_k[new]
        numbers[:, _SLOT] = [slots[self._prompts.adapter_of(row)] for row in new.tolist()]
        numbers[:, _LIVE] = 1
        numbers[:, _STOPS : _STOPS + rows.stops.shape[1]] = rows.stops[new]
        self._on_device.join(
            new, numbers, np.stack([rows.temperature[new], rows.top_p[new]], axis=1)
        )

    def _start(self, rows: Rows, topk: int) -> _Block | None:
        """Start the next block; None if the started blocks already reach every row's last token."""
        planned, limits = self._planned, rows.limit
        running = self._cache.rows
        going = np.array([row for row in running if planned[row] < limits[row]], np.int64)
        if not len(going):
            return None
        missing = max(int(limits[row]) - planned[row] for row in going.tolist())
        steps = min(steps_for(self._block_steps, topk), missing)
        for row in going.tolist():
            planned[row] = min(planned[row] + steps, int(limits[row]))
            self._cache.fit(row, int(rows.prompt_length[row]) + planned[row] - 1)
        self._cache.close_gaps()
        slabs = self._cache.tell_members(set(going.tolist()))
        settings = rows.temperature[going], rows.top_k[going], rows.top_p[going]
        has_adapter = any(self._prompts.adapter_of(row) is not None for row in going.tolist())
        shape = StepShape(
            tuple((slab.number, slab.prefix) for slab in slabs),
            choice_for(*settings, topk, self._base.vocab),
            self._slots.version if has_adapter else None,
            self._on_device.stops,
        )
        self._drop_stale()
        self._on_device.at.zero_()
        for _ in range(steps):
            self._graphs.run(shape, partial(self._step, shape, slabs))
        found = [self._on_device.tokens, self._on_device.logprobs]
        if shape.choice.topk:
            found += self._on_device.topk(shape.choice.topk)
        joined = {row: self._joined[row] for row in going.tolist()}
        return _Block(steps, joined, read_later(found))

    def _drop_stale(self) -> None:
        """Drop recorded steps that read from replaced buffers."""
        there = {slab.number for slab in self._cache}

        def is_stale(shape: Hashable) -> bool:
            return isinstance(shape, StepShape) and (
                shape.stops != self._on_device.stops
                or shape.adapters not in (None, self._slots.version)
                or any(number not in there for number, _ in shape.parts)
            )

        self._graphs.drop(is_stale)

    def _step(self, shape: StepShape, slabs: Sequence[Slab]) -> None:
        """One token for each of the first rows of slabs, without the host."""
        kept, base, spec = self._on_device, self._base, self._base.spec
        counts = [count for _, count in shape.parts]
        rows = torch.cat([slab.members[:count] for slab, count in zip(slabs, counts)])
        own, floats = kept.numbers.index_select(0, rows), kept.floats.index_select(0, rows)
        live = own[:, _LIVE] > 0
        # A finished row may be past its last position; what it reads and writes is not used.
        positions = torch.where(live, own[:, _POSITION], 0)
        readings = [
            SlabReading(spec, slab, part) for slab, part in zip(slabs, positions.split(counts))
        ]
        split = [spec.heads, spec.kv_heads, spec.kv_heads]

        def attend(layer: int, qkv: Tensor) -> tuple[Tensor, object]:
            parts = qkv.view(len(qkv), -1, spec.head_dim).split(counts)
            outs = [
                reading.attend(layer, *part.split(split, dim=1))
                for reading, part in zip(readings, parts)
            ]
            return (outs[0] if len(outs) == 1 else torch.cat(outs)), None

        linears = self._slots.linears(None if shape.adapters is None else own[:, _SLOT])
        longest = max(slab.positions for slab in slabs)
        forward = Forward(base, linears, positions, longest, attend)
        x = base.embed(own[:, _TOKEN])
        for i in range(spec.layers):
            x, _ = forward.layer(i, x)
        logits = head_logits(linears, base.finish(x)[0], spec.logit_cap)
        settings = RowSettings(
            own[:, _KEY], own[:, _COUNT], floats[:, 0], own[:, _TOP_K], floats[:, 1]
        )
        tokens, logprobs = choose(logits, settings, shape.choice)
        kept.write(rows, torch.where(live, tokens, -1), logprobs)
        if shape.choice.topk:
            kept.write_topk(rows, *topk_logprobs(logits, shape.choice.topk))
        kept.continue_with(rows, own, tokens, live)

    def _steps_of(self, block: _Block) -> Iterator[Step]:
        """Wait for a block, and yield its steps."""
        tokens, logprobs, *topk = block.read()
        for step in range(block.steps):
            rows = np.array(
                [row for row, at in block.joined.items() if self._joined.get(row) == at], np.int64
            )
            rows = rows[tokens[step, rows] >= 0]
            if len(rows):
                likeliest = (topk[0][step, rows], topk[1][step, rows]) if topk else None
                yield Step(rows, tokens[step, rows], logprobs[step, rows], likeliest)
