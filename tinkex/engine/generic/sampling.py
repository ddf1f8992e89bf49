"""Sampling with transformers' modules: continuous batching with their cache, or without one.

The sequences of one adapter form a batch. Its cache is padded on the left, so that all of them
continue at the same place: a sequence joins with its prompt's entries moved to the right, and
leaves with its row. Where a model's cache does not allow that, every token is computed from the
whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinkex.engine.attention import LEAST_FILL, Packing
from tinkex.engine.base_model import Ints, OnHidden, Prompt
from tinkex.engine.generic.adapted import Adapted
from tinkex.engine.linears import Linear
from tinkex.engine.lm_head import head_logits
from tinkex.engine.lora import Finished, MixedLinears, Stack, Workspace, can_merge

#: Tokens of prompts, padding among them, that are computed together.
MOST_TOKENS = 4096


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

    def hidden(self, ids: Tensor, **inputs: Any) -> Tensor: ...
    def hidden_rows(self, tokens: Tensor, packing: Packing) -> Tensor: ...


class _Matrices:
    """The matrices with one adapter at a time, merged where there is room and no other runs: a
    step of several would merge each of them again."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._workspace = Workspace() if can_merge(model.linears) else None

    def of(self, adapter: Finished | None, running: Iterable[Finished | None]) -> MixedLinears:
        room = self._workspace if {adapter, *running} == {adapter} else None
        return MixedLinears(self._model.linears, Stack([adapter]), np.zeros(1, np.int64), room)


class Recomputing:
    """Sequences as tokens; nothing is kept of what was computed. Implements `SamplingState`."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._matrices = _Matrices(model)
        self._texts: dict[int, list[int]] = {}
        self._adapter: dict[int, Finished | None] = {}

    def bytes_needed(self, prompt: int, samples: int, limit: int) -> int:
        return samples * (prompt + limit) * self._model.width * self._model.dtype.itemsize

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
        rows = list(self._texts)
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
        """(texts, V) of what follows each."""
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
    """Numbers of the texts of each batch: of one adapter, similar lengths first."""
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
    """A model's cache holds something else than keys, values and states by sequence."""


@attrs.define(eq=False)
class _Batch:
    """The sequences of one adapter.

    Attributes:
        cache: transformers' `DynamicCache` of all of them.
        rows: their numbers.
        lengths: of the text of each that is in the cache.
    """

    cache: Any
    rows: list[int]
    lengths: list[int]


class GenericSampling:
    """Batches with transformers' cache. Implements `SamplingState`."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._matrices = _Matrices(model)
        self._batches: dict[Finished | None, _Batch] = {}

    @property
    def caches(self) -> list[Any]:
        """The cache of each batch."""
        return [batch.cache for batch in self._batches.values()]

    def bytes_needed(self, prompt: int, samples: int, limit: int) -> int:
        each = (prompt + limit) * (self._model.position_bytes or 0) + self._model.sequence_bytes
        return samples * each

    def head(self, adapter: Finished | None, rows: int) -> MixedLinears:
        return self._matrices.of(adapter, self._batches)

    # -- prompts -----------------------------------------------------------------------------

    def begin(self, prompts: Sequence[Prompt], on_hidden: OnHidden | None) -> Tensor:
        found: dict[int, Tensor] = {}
        lengths = [len(prompt.tokens) for prompt in prompts]
        adapters = [prompt.adapter for prompt in prompts]
        running = {*adapters, *self._batches}
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
        """*numbers*, longest first, in groups whose prompts are computed together."""
        least = 1.0 if self._model.needs_equal_lengths else LEAST_FILL
        groups: list[list[int]] = []
        for i in numbers:
            if not groups or lengths[i] < least * lengths[groups[-1][0]]:
                groups.append([])
            groups[-1].append(i)
        return groups

    def _prefill(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Hidden states (T, d) of each prompt; what the cache holds joins the running batch."""
        lengths = [len(prompt.tokens) for prompt in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for own, prompt in zip(ids, prompts):
            own[: len(prompt.tokens)] = torch.from_numpy(prompt.tokens)
        cache = new_cache(self._model.adapted.model)
        hidden = self._model.hidden(
            ids.to(self._model.device), past_key_values=cache, use_cache=True
        )
        rows = [[row for group in prompt.rows for row in group] for prompt in prompts]
        which = [i for i, own in enumerate(rows) for _ in own]
        if which:
            select(cache, which, self._model.device)
            joining = [lengths[i] for i in which]
            flush_right(cache, joining, max(lengths))
            own = _Batch(cache, [row for group in rows for row in group], joining)
            self._join(prompts[0].adapter, own)
        return [own[:length] for own, length in zip(hidden, lengths)]

    def _join(self, adapter: Finished | None, new: _Batch) -> None:
        batch = self._batches.get(adapter)
        if batch is None:
            self._batches[adapter] = new
            return
        join(batch.cache, new.cache)
        batch.rows += new.rows
        batch.lengths += new.lengths

    # -- tokens ------------------------------------------------------------------------------

    def advance(
        self, tokens: Ints, positions: Ints, shares: Mapping[int, Hashable], *, in_turn: bool
    ) -> tuple[Ints, Tensor]:
        found = [self._step(adapter, batch, tokens) for adapter, batch in self._batches.items()]
        rows = [row for batch in self._batches.values() for row in batch.rows]
        return np.array(rows, np.int64), torch.cat(found)

    def _step(self, adapter: Finished | None, batch: _Batch, tokens: Ints) -> Tensor:
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
        linears = self._matrices.of(adapter, self._batches)
        with self._model.adapted.using(linears):
            hidden = self._model.hidden(ids, **inputs)
        batch.lengths = [length + 1 for length in batch.lengths]
        return head_logits(linears, hidden[:, -1], self._model.logit_cap)

    def remove(self, row: int) -> None:
        for adapter, batch in self._batches.items():
            if row not in batch.rows:
                continue
            kept = [i for i, other in enumerate(batch.rows) if other != row]
            if not kept:
                del self._batches[adapter]
                return
            before = max(batch.lengths)
            batch.rows = [batch.rows[i] for i in kept]
            batch.lengths = [batch.lengths[i] for i in kept]
            select(batch.cache, kept, self._model.device, unused=before - max(batch.lengths))
            return


# -- the cache of transformers --------------------------------------------------------------------


def new_cache(model: Any) -> Any:
    """An empty cache that keeps all positions, also of layers that see a window only.

    Raises:
        CacheError: If a layer keeps something that cannot be moved between batches.
    """
    from transformers import cache_utils

    cache = cache_utils.DynamicCache(config=model.config)
    movable = (
        cache_utils.DynamicLayer,
        cache_utils.LinearAttentionLayer,
        cache_utils.LinearAttentionAndFullAttentionLayer,
        cache_utils.DummyLayer,
    )
    for i, layer in enumerate(cache.layers):
        if type(layer) is cache_utils.DynamicSlidingWindowLayer:
            # The mask of the model hides what is beyond the window.
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
