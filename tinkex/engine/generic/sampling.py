"""Sampling with transformers' modules: continuous batching with their cache, or without one.

Sequences of one adapter and share form a batch. Its cache is padded on the left, so that all rows
continue at the same position: a sequence joins with its prompt's entries moved to the right, and
leaves with its row. If a model's cache does not allow that, every token is computed from the whole
text. Batches take turns if a step over all would take long.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinkex.engine.attention import LEAST_FILL, Packing
from tinkex.engine.base_model import Ints, OnHidden, Prompt, PromptReader
from tinkex.engine.finished_lora import Finished, MixedLinears, Stack
from tinkex.engine.generic.adapted import Adapted
from tinkex.engine.linears import Linear
from tinkex.engine.lm_head import head_logits
from tinkex.engine.lora import Workspace, can_merge
from tinkex.engine.memory import kind_of
from tinkex.engine.sample_turns import STEP_BYTES, Turns, matrix_operations, step_operations

#: Most prompt tokens, including padding, that are computed together.
MOST_TOKENS = 4096

#: Most sequences of one batch; more form further batches.
BATCH_ROWS = {"cpu": 64, "cuda": 256}


class Model(Protocol):
    """What sampling needs of a `GenericModel`."""

    @property
    def adapted(self) -> Adapted: ...
    @property
    def linears(self) -> Mapping[str, Linear]: ...
    @property
    def width(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def logit_cap(self) -> float: ...
    @property
    def position_bytes(self) -> int | None: ...
    @property
    def sequence_bytes(self) -> int: ...
    @property
    def needs_equal_lengths(self) -> bool: ...
    @property
    def reads_in_pieces(self) -> bool: ...

    def hidden(self, ids: Tensor, **inputs: Any) -> Tensor: ...
    def hidden_rows(self, tokens: Tensor, packing: Packing) -> Tensor: ...


class _Matrices:
    """The matrices with one adapter at a time, merged if it is the only one running: a step with
    several would merge each of them again."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._workspace = Workspace() if can_merge(model.linears) else None

    def of(self, adapter: Finished | None, running: Iterable[Finished | None]) -> MixedLinears:
        room = self._workspace if {adapter, *running} == {adapter} else None
        return MixedLinears(self._model.linears, Stack([adapter]), np.zeros(1, np.int64), room)


class Recomputing:
    """Sampling without a cache: each step computes whole texts. Implements `SamplingState`."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._matrices = _Matrices(model)
        self._token_operations = matrix_operations(model.linears)
        self._turns: Turns[int] = Turns()
        self._texts: dict[int, list[int]] = {}
        self._adapter: dict[int, Finished | None] = {}

    def bytes_needed(self, prompt: int, samples: int, limit: int) -> int:
        return samples * (prompt + limit) * self._model.width * self._model.dtype.itemsize

    def operations(self, start: int, stop: int) -> float:
        return (stop - start) * self._token_operations

    @property
    def reads_in_pieces(self) -> bool:
        return False

    def read(self, prompt: Prompt) -> PromptReader:
        raise RuntimeError("without a cache, a prompt is computed whole.")

    def head(self, adapter: Finished | None, rows: int) -> MixedLinears:
        return self._matrices.of(adapter, self._adapter.values())

    def begin(self, prompts: Sequence[Prompt], on_hidden: OnHidden | None) -> Tensor:
        for prompt in prompts:
            for row in (row for group in prompt.rows for row in group):
                self._texts[row] = prompt.tokens.tolist()
                self._adapter[row] = prompt.adapter
        texts = [prompt.tokens.tolist() for prompt in prompts]
        return self._logits(texts, [prompt.adapter for prompt in prompts], on_hidden)

    def advance(
        self, tokens: Ints, positions: Ints, shares: Mapping[int, Hashable], *, in_turn: bool
    ) -> tuple[Ints, Tensor]:
        costs = {row: self.operations(0, len(text) + 1) for row, text in self._texts.items()}
        model = self._model
        most = step_operations(kind_of(model.device), model.dtype) if in_turn else None
        rows = self._turns.choose({row: [row] for row in costs}, shares, costs, most)
        for row in rows:
            self._texts[row].append(int(tokens[row]))
        adapters = [self._adapter[row] for row in rows]
        logits = self._logits([self._texts[row] for row in rows], adapters, None)
        return np.array(rows, np.int64), logits

    def _logits(
        self,
        texts: Sequence[Sequence[int]],
        adapters: Sequence[Finished | None],
        on_hidden: OnHidden | None,
    ) -> Tensor:
        """(texts, V) logits of the token after each text."""
        found: dict[int, Tensor] = {}
        running = {*adapters, *self._adapter.values()}
        for some in in_batches([len(text) for text in texts], adapters):
            linears = self._matrices.of(adapters[some[0]], running)
            packing = Packing([len(texts[i]) for i in some], self._model.device)
            flat = torch.tensor([t for i in some for t in texts[i]], device=self._model.device)
            with self._model.adapted.using(linears):
                states = self._model.hidden_rows(flat, packing).split(packing.lengths)
            if on_hidden is not None:
                on_hidden(some, states)
            ends = torch.stack([own[-1] for own in states])
            found |= zip(some, head_logits(linears, ends, self._model.logit_cap))
        return torch.stack([found[i] for i in range(len(texts))])

    def remove(self, row: int) -> None:
        self._texts.pop(row, None)
        self._adapter.pop(row, None)


def in_batches(lengths: Sequence[int], adapters: Sequence[object]) -> list[list[int]]:
    """Indices of the texts of each batch: one adapter, similar lengths."""
    number = {adapter: i for i, adapter in enumerate(dict.fromkeys(adapters))}
    order = sorted(range(len(lengths)), key=lambda i: (number[adapters[i]], -lengths[i], i))
    batches: list[list[int]] = []
    tokens = 0
    for i in order:
        tokens += lengths[i]
        if not batches or adapters[batches[-1][0]] is not adapters[i] or tokens > MOST_TOKENS:
            batches.append([])
            tokens = lengths[i]
        batches[-1].append(i)
    return batches


class CacheError(Exception):
    """A model's cache holds more than keys, values and states by sequence."""


@attrs.define(eq=False)
class _Batch:
    """Sequences of one adapter and share.

    Attributes:
        owner: adapter and share.
        cache: transformers' `DynamicCache` of all sequences.
        rows: the numbers of the sequences.
        lengths: tokens of each sequence in the cache.
    """

    owner: tuple[Finished | None, Hashable]
    cache: Any
    rows: list[int]
    lengths: list[int]

    @property
    def adapter(self) -> Finished | None:
        return self.owner[0]


class GenericSampling:
    """Batches with transformers' cache. Implements `SamplingState`."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._matrices = _Matrices(model)
        self._batches: list[_Batch] = []
        self._turns: Turns[_Batch] = Turns()
        self._token_operations = matrix_operations(model.linears)
        self._nbytes = sum(linear.weight.nbytes for linear in model.linears.values())

    @property
    def caches(self) -> list[Any]:
        """The cache of each batch."""
        return [batch.cache for batch in self._batches]

    @property
    def _adapters(self) -> list[Finished | None]:
        return [batch.adapter for batch in self._batches]

    def bytes_needed(self, prompt: int, samples: int, limit: int) -> int:
        each = (prompt + limit) * (self._model.position_bytes or 0) + self._model.sequence_bytes
        return samples * each

    def head(self, adapter: Finished | None, rows: int) -> MixedLinears:
        return self._matrices.of(adapter, self._adapters)

    # -- prompts -----------------------------------------------------------------------------

    def begin(self, prompts: Sequence[Prompt], on_hidden: OnHidden | None) -> Tensor:
        found: dict[int, Tensor] = {}
        lengths = [len(prompt.tokens) for prompt in prompts]
        adapters = [prompt.adapter for prompt in prompts]
        running = {*adapters, *self._adapters}
        for some in in_batches(lengths, adapters):
            linears = self._matrices.of(adapters[some[0]], running)
            for alike in self._alike(some, lengths):
                with self._model.adapted.using(linears):
                    states = self._prefill([prompts[i] for i in alike])
                if on_hidden is not None:
                    on_hidden(alike, states)
                ends = torch.stack([own[-1] for own in states])
                found |= zip(alike, head_logits(linears, ends, self._model.logit_cap))
        return torch.stack([found[i] for i in range(len(prompts))])

    def _alike(self, numbers: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """*numbers*, longest first, in groups of prompts that are computed together."""
        least = 1.0 if self._model.needs_equal_lengths else LEAST_FILL
        groups: list[list[int]] = []
        for i in numbers:
            if not groups or lengths[i] < least * lengths[groups[-1][0]]:
                groups.append([])
            groups[-1].append(i)
        return groups

    def _prefill(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Hidden states (T, d) of each prompt; its cache joins the running batch."""
        lengths = [len(prompt.tokens) for prompt in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for own, prompt in zip(ids, prompts):
            own[: len(prompt.tokens)] = torch.from_numpy(prompt.tokens)
        cache = new_cache(self._model.adapted.model)
        hidden = self._model.hidden(
            ids.to(self._model.device), past_key_values=cache, use_cache=True
        )
        self._start(prompts, cache)
        return [own[:length] for own, length in zip(hidden, lengths)]

    def _start(self, prompts: Sequence[Prompt], cache: Any) -> None:
        """Let the sequences of one adapter's prompts join; each row of *cache* is one prompt."""
        lengths = [len(prompt.tokens) for prompt in prompts]
        most = BATCH_ROWS[kind_of(self._model.device)]
        of_share: dict[Hashable, list[tuple[int, int]]] = {}  # (number of the prompt, row)
        for i, prompt in enumerate(prompts):
            rows = [row for group in prompt.rows for row in group]
            of_share.setdefault(prompt.share, []).extend((i, row) for row in rows)
        parts = [
            (share, pairs[first : first + most])
            for share, pairs in of_share.items()
            for first in range(0, len(pairs), most)
        ]
        for left, (share, pairs) in zip(reversed(range(len(parts))), parts):
            own = copy.deepcopy(cache) if left else cache
            which = [i for i, _ in pairs]
            select(own, which, self._model.device)
            joining = [lengths[i] for i in which]
            flush_right(own, joining, max(lengths))
            owner = prompts[0].adapter, share
            self._join(_Batch(owner, own, [row for _, row in pairs], joining), most)

    def _join(self, new: _Batch, most: int) -> None:
        """Add to a batch of the same owner with room, of *most* rows, or to the list of batches."""
        for batch in self._batches:
            if batch.owner == new.owner and len(batch.rows) + len(new.rows) <= most:
                join(batch.cache, new.cache)
                batch.rows += new.rows
                batch.lengths += new.lengths
                return
        self._batches.append(new)

    def operations(self, start: int, stop: int) -> float:
        numbers = (self._model.position_bytes or 0) / self._model.dtype.itemsize
        of_products = 2.0 * numbers * (start + stop) / 2  # more, if heads share keys
        return (stop - start) * (self._token_operations + of_products)

    @property
    def reads_in_pieces(self) -> bool:
        return self._model.reads_in_pieces

    def read(self, prompt: Prompt) -> GenericReader:
        return GenericReader(self._model, prompt, self.head, self._start)

    # -- tokens ------------------------------------------------------------------------------

    def advance(
        self, tokens: Ints, positions: Ints, shares: Mapping[int, Hashable], *, in_turn: bool
    ) -> tuple[Ints, Tensor]:
        position, most = self._model.position_bytes or 0, None
        if in_turn:
            most = max(STEP_BYTES[kind_of(self._model.device)], 2 * self._nbytes)
        costs = {
            batch: self._nbytes + len(batch.rows) * (max(batch.lengths) + 1) * position
            for batch in self._batches
        }
        rows = {batch: batch.rows for batch in self._batches}
        chosen = self._turns.choose(rows, shares, costs, most)
        found = [self._step(batch, tokens) for batch in chosen]
        return np.array([row for batch in chosen for row in batch.rows], np.int64), torch.cat(found)

    def _step(self, batch: _Batch, tokens: Ints) -> Tensor:
        """(n, V) logits after one more token of each sequence of a batch."""
        device = self._model.device
        ids = torch.from_numpy(tokens[batch.rows])[:, None].to(device)
        lengths = torch.tensor(batch.lengths, device=device)
        inputs: dict[str, Any] = {"past_key_values": batch.cache, "use_cache": True}
        longest = max(batch.lengths)
        if min(batch.lengths) < longest:
            at = torch.arange(longest + 1, device=device)
            inputs["attention_mask"] = (at >= longest - lengths[:, None]).long()
        if self._model.adapted.takes_positions:
            inputs["position_ids"] = lengths[:, None]
        linears = self.head(batch.adapter, len(batch.rows))
        with self._model.adapted.using(linears):
            hidden = self._model.hidden(ids, **inputs)
        batch.lengths = [length + 1 for length in batch.lengths]
        return head_logits(linears, hidden[:, -1], self._model.logit_cap)

    def remove(self, row: int) -> None:
        for batch in self._batches:
            if row not in batch.rows:
                continue
            kept = [i for i, other in enumerate(batch.rows) if other != row]
            if not kept:
                self._batches.remove(batch)
                return
            before = max(batch.lengths)
            batch.rows = [batch.rows[i] for i in kept]
            batch.lengths = [batch.lengths[i] for i in kept]
            select(batch.cache, kept, self._model.device, unused=before - max(batch.lengths))
            return


class GenericReader:
    """A prompt computed in pieces, with its cache so far. Implements `PromptReader`.

    Args:
        linears: (adapter, rows) -> the matrices with it.
        start: lets the sequences of prompts join the running ones, with a cache.
    """

    def __init__(
        self,
        model: Model,
        prompt: Prompt,
        linears: Callable[[Finished | None, int], MixedLinears],
        start: Callable[[Sequence[Prompt], Any], None],
    ) -> None:
        self._model = model
        self._prompt = prompt
        self._linears = linears
        self._start = start
        self._cache = new_cache(model.adapted.model)
        self._done = 0

    def read(self, count: int) -> Tensor:
        stop = self._done + count
        ids = torch.from_numpy(self._prompt.tokens[self._done : stop]).long()[None]
        inputs: dict[str, Any] = {"past_key_values": self._cache, "use_cache": True}
        if self._model.adapted.takes_positions:
            inputs["position_ids"] = torch.arange(self._done, stop, device=self._model.device)[None]
        with self._model.adapted.using(self._linears(self._prompt.adapter, count)):
            hidden = self._model.hidden(ids.to(self._model.device), **inputs)[0]
        self._done, self._last = stop, hidden[-1:]
        return hidden

    def finish(self, rows: Sequence[Sequence[int]]) -> Tensor:
        self._start([attrs.evolve(self._prompt, rows=rows)], self._cache)
        head = self._linears(self._prompt.adapter, 1)
        return head_logits(head, self._last, self._model.logit_cap)[0]


# -- the cache of transformers --------------------------------------------------------------------

#: Kinds of layers that can be moved between batches. Older versions of transformers lack some.
_MOVABLE = (
    "DynamicLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "DummyLayer",
)


def new_cache(model: Any) -> Any:
    """An empty cache that keeps all positions, also for layers with a window.

    Raises:
        CacheError: If a layer's state cannot be moved between batches.
    """
    from transformers import cache_utils

    cache = cache_utils.DynamicCache(config=model.config)
    movable = [getattr(cache_utils, name, None) for name in _MOVABLE]
    for i, layer in enumerate(cache.layers):
        if type(layer) is cache_utils.DynamicSlidingWindowLayer:
            # The model's mask hides positions beyond the window.
            cache.layers[i] = cache_utils.DynamicLayer()
        elif type(layer) not in movable:
            raise CacheError(f"its cache has layers of type {type(layer).__name__}")
    return cache


def _change(
    cache: Any, positional: Callable[[Tensor], Tensor], state: Callable[[Tensor], Tensor]
) -> None:
    """Replace the keys and values (n, heads, T, size), and the other states (n, ...)."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            if getattr(layer, name, None) is not None:
                setattr(layer, name, positional(getattr(layer, name)))
        for name in ("conv_states", "recurrent_states"):
            states = getattr(layer, name, {})
            for i, value in states.items():
                if value is not None:
                    states[i] = state(value)


def select(cache: Any, rows: Sequence[int], device: torch.device, unused: int = 0) -> None:
    """Keep *rows*, in this order, without the first *unused* positions."""
    at = torch.tensor(list(rows), device=device)
    _change(
        cache,
        lambda x: x[:, :, unused:].index_select(0, at),
        lambda x: x.index_select(0, at),
    )


def flush_right(cache: Any, lengths: Sequence[int], longest: int) -> None:
    """Move the first *lengths* positions of each row to the end of the longest of them."""
    if min(lengths) == longest:
        return
    most = max(lengths)

    def moved(x: Tensor) -> Tensor:
        out = x.new_zeros(*x.shape[:2], most, x.shape[3])
        for row, length in enumerate(lengths):
            out[row, :, most - length :] = x[row, :, :length]
        return out

    _change(cache, moved, lambda x: x)


def join(cache: Any, other: Any) -> None:
    """Append the rows of *other*; the shorter of the two is padded on the left."""
    for layer, donor in zip(cache.layers, other.layers, strict=True):
        for name in ("keys", "values"):
            mine, theirs = getattr(layer, name, None), getattr(donor, name, None)
            if mine is not None and theirs is not None:
                most = max(mine.shape[2], theirs.shape[2])
                both = [F.pad(x, (0, 0, most - x.shape[2], 0)) for x in (mine, theirs)]
                setattr(layer, name, torch.cat(both))
        for name in ("conv_states", "recurrent_states"):
            states = getattr(layer, name, {})
            for i, value in states.items():
                if value is not None:
                    states[i] = torch.cat([value, getattr(donor, name)[i]])
