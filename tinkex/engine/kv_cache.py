"""The KV cache: keys and values of running samples, and attention over them.

Preallocated, grown by doubling, always dense: when a sequence ends, the last row moves into its
place. Samples of one prompt share the prompt's keys and values (`SharedPool`); single samples have
prompt and continuation in one row (`SinglePool`). Sequences of similar prompt length form a pool,
so that a step attends to all of them at once with little padding. Does not know about requests.

Notation: n sequences, S samples of a prompt, H heads, G key/value heads, D head size, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinkex.engine.attention import soft_cap_
from tinkex.engine.cpu_kernels import SPAN
from tinkex.engine.spec import Spec

Ints = npt.NDArray[np.int64]

#: Positions that have left every window are skipped in multiples of this.
FIRST_STEP = 64

#: In bfloat16, spans grow in multiples of this. oneDNN needs half a millisecond to set up a product
#: of a new shape: as long as all layers' attention over a short text.
SPAN_STEP = 32


class Cache:
    """Rows of keys and values for every layer, (layers, rows, G, T, D), grown as needed."""

    def __init__(self, spec: Spec, device: torch.device, dtype: torch.dtype) -> None:
        self._shape = (spec.layers, spec.kv_heads, spec.head_dim)
        self.k = torch.empty(spec.layers, 0, spec.kv_heads, 0, spec.head_dim, device=device).to(
            dtype
        )
        self.v = torch.empty_like(self.k)

    def reserve(self, rows: int, positions: int) -> None:
        """Make room for *rows* rows of *positions* positions."""
        have_rows, have = self.k.shape[1], self.k.shape[3]
        if rows <= have_rows and positions <= have:
            return
        new_rows = have_rows if rows <= have_rows else max(rows, 2 * have_rows)
        new = have if positions <= have else max(-(-positions // 64) * 64, 2 * have)
        self.k, self.v = self._grown(self.k, new_rows, new), self._grown(self.v, new_rows, new)

    def _grown(self, old: Tensor, rows: int, positions: int) -> Tensor:
        layers, kv_heads, size = self._shape
        # Zeros, not garbage: what lies beyond a sequence's end is multiplied by weight 0.
        new = old.new_zeros(layers, rows, kv_heads, positions, size)
        new[:, : old.shape[1], :, : old.shape[3]] = old
        return new

    def span(self, positions: int) -> int:
        """How many positions to attend to, at least *positions*; those beyond are masked."""
        if self.k.dtype == torch.float32 or self.k.device.type != "cpu":
            return positions
        return min(-(-positions // SPAN_STEP) * SPAN_STEP, self.k.shape[3])

    def move(self, source: int, target: int, positions: int) -> None:
        """Copy row *source* to row *target*; *positions* of it are in use."""
        for tensor in (self.k, self.v):
            tensor[:, target, :, :positions] = tensor[:, source, :, :positions]

    def fill(self, layer: int, row: int, k: Tensor, v: Tensor) -> None:
        """Write a prompt's keys and values, (T, G, D) each, at the start of a row."""
        self.k[layer, row, :, : len(k)] = k.transpose(0, 1)
        self.v[layer, row, :, : len(v)] = v.transpose(0, 1)

    def fill_layers(self, row: int, k: Tensor, v: Tensor) -> None:
        """Write a prompt's keys and values, (layers, G, T, D) each, at the start of a row."""
        self.k[:, row, :, : k.shape[2]] = k
        self.v[:, row, :, : v.shape[2]] = v

    def places(self, rows: Ints, positions: Ints) -> Tensor:
        """Places of the keys at some rows' positions, for `write`; valid until the cache grows."""
        _, _, kv_heads, size, _ = self.k.shape
        first = (rows[:, None] * kv_heads + np.arange(kv_heads)) * size
        return torch.from_numpy((first + positions[:, None]).reshape(-1)).to(self.k.device)

    def write(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Write keys and values, (n, G, D) each, at n places."""
        size = k.shape[-1]
        for cache, values in ((self.k, k), (self.v, v)):
            cache[layer].view(-1, size).index_copy_(0, places, values.reshape(-1, size))

    def spans(self, rows: Ints, lengths: Ints) -> npt.NDArray[np.void]:
        """(n,) of `SPAN`: the first *lengths* positions of some rows; true until it grows."""
        spans = np.zeros(len(rows), SPAN)
        layer, row, head = self.k.stride()[:3]
        for name, tensor in (("k", self.k), ("v", self.v)):
            spans[name] = tensor.data_ptr() + rows * (row * tensor.element_size())
        spans["layer"], spans["head"], spans["length"] = layer, head, lengths
        return spans

    @property
    def nbytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()


def _bias(seen: npt.NDArray[np.bool_], like: Tensor) -> Tensor:
    """0 where a position is seen, else -inf."""
    return torch.from_numpy(np.where(seen, 0.0, -np.inf).astype(np.float32)).to(like)


def _first_seen(positions: Ints, window: int, span: int) -> int:
    """First position that a token at one of *positions* sees; less than *span*. Rounded down, so
    that products have few shapes."""
    if not window:
        return 0
    first = max(0, int(positions.min()) - window + 1)
    return min(first, span - 1) // FIRST_STEP * FIRST_STEP


class SinglePool:
    """Sequences with one row each.

    Attributes:
        members: numbers of the sequences, in the order of their rows.
    """

    def __init__(self, spec: Spec, device: torch.device, dtype: torch.dtype) -> None:
        self._spec = spec
        self._cache = Cache(spec, device, dtype)
        self.members: list[int] = []
        self._lengths: list[int] = []
        self._seen: dict[int, tuple[int, Tensor]] | None = None  # of a step, when first needed

    @property
    def nbytes(self) -> int:
        return self._cache.nbytes

    @property
    def rows(self) -> int:
        return len(self.members)

    @property
    def positions(self) -> int:
        """Keys that a step reads, of each layer and head."""
        return len(self._lengths) * (max(self._lengths, default=0) + 1)

    def add(self, member: int, prompt_length: int) -> int:
        """Make room for a sequence; return its row, for `fill`."""
        self.members.append(member)
        self._lengths.append(prompt_length)
        self._cache.reserve(len(self.members), prompt_length + 1)
        return len(self.members) - 1

    def fill(self, layer: int, row: int, k: Tensor, v: Tensor) -> None:
        self._cache.fill(layer, row, k, v)

    def fill_layers(self, row: int, k: Tensor, v: Tensor) -> None:
        self._cache.fill_layers(row, k, v)

    def remove(self, member: int) -> None:
        row, last = self.members.index(member), len(self.members) - 1
        if row != last:
            self._cache.move(last, row, self._lengths[last])
            self.members[row], self._lengths[row] = self.members[last], self._lengths[last]
        del self.members[last], self._lengths[last]

    def begin_step(self) -> list[int]:
        """Make room for one more position of every sequence; return the sequences in row order."""
        self._cache.reserve(len(self._lengths), max(self._lengths) + 1)
        self._seen = None
        return list(self.members)

    def spans(self) -> npt.NDArray[np.void]:
        """(n, 2) of `SPAN`, in row order, for attention outside of `attend`: no shared prompt, and
        the positions of each sequence with the new one."""
        lengths = np.array(self._lengths, np.int64) + 1
        spans = np.zeros((len(lengths), 2), SPAN)
        spans[:, 1] = self._cache.spans(np.arange(len(lengths)), lengths)
        return spans

    def _look(self) -> dict[int, tuple[int, Tensor]]:
        """By window: the first position that this step reads, and the bias."""
        lengths = np.array(self._lengths, np.int64)
        self._span = self._cache.span(int(lengths.max()) + 1)
        ends = np.repeat(lengths, self._spec.kv_heads)[:, None]
        found = {}
        for window in self._spec.distinct_windows:
            first = _first_seen(lengths, window, self._span)
            at = np.arange(first, self._span)
            seen = (at <= ends) & (at > ends - window) if window else at <= ends
            found[window] = first, _bias(seen, self._cache.k).unsqueeze(1)
        self._ends = self._cache.places(np.arange(len(lengths)), lengths)
        return found

    def end_step(self) -> None:
        """Count the new position of every sequence as written."""
        self._lengths = [length + 1 for length in self._lengths]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k, v (n, G, D) of the new position; attend with q (n, H, D) -> (n, H D)."""
        self._seen = self._seen or self._look()
        n, spec, span = len(q), self._spec, self._span
        self._cache.write(layer, self._ends, k, v)
        first, bias = self._seen[spec.window(layer)]
        keys, values = self._cache.k[layer, :n], self._cache.v[layer, :n]
        return attend_rows(q, keys[:, :, first:span], values[:, :, first:span], bias, spec)


def attend_rows(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, spec: Spec) -> Tensor:
    """Attention of one new token of each row.

    Args:
        q: (n, H, D).
        keys, values: (n, G, T, D).
        bias: (n G, 1, T), 0 where a position is seen, else -inf.

    Returns:
        (n, H D).
    """
    n, heads, positions, size = keys.shape
    queries = q.reshape(n * heads, -1, size)
    keys = keys.reshape(n * heads, positions, size)
    values = values.reshape(n * heads, positions, size)
    bias = bias.expand(-1, queries.shape[1], -1)
    if spec.attention_cap:
        products = torch.bmm(queries, keys.transpose(1, 2)).mul_(spec.scale)
        scores = soft_cap_(products, spec.attention_cap).add_(bias)
    else:
        scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=spec.scale)
    return torch.bmm(_softmax(scores), values).view(n, -1)


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension, in float32."""
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)


class SharedPool:
    """Groups of up to *width* samples, which share the prompt; each has its own continuation.

    Attributes:
        members: (groups, width) numbers of the sequences, -1 for places without one.
    """

    def __init__(self, spec: Spec, width: int, device: torch.device, dtype: torch.dtype) -> None:
        self._spec = spec
        self._width = width
        self._prompts = Cache(spec, device, dtype)
        self._own = Cache(spec, device, dtype)
        self.members = np.empty((0, width), np.int64)
        self._prompt_lengths: list[int] = []
        self._own_lengths = np.empty((0, width), np.int64)
        self._seen: dict[int, tuple[int, Tensor]] | None = None  # of a step, when first needed

    @property
    def nbytes(self) -> int:
        return self._prompts.nbytes + self._own.nbytes

    @property
    def rows(self) -> int:
        """Places of samples, including those that ended before others of their group."""
        return self.members.size

    @property
    def positions(self) -> int:
        """Keys that a step reads, of each layer and head."""
        of_prompts = len(self._prompt_lengths) * max(self._prompt_lengths, default=0)
        return of_prompts + self.rows * (int(self._own_lengths.max(initial=0)) + 1)

    def add(self, members: Sequence[int], prompt_length: int) -> int:
        """Make room for a group; return its number, for `fill`."""
        group = np.full((1, self._width), -1, np.int64)
        group[0, : len(members)] = members
        self.members = np.concatenate([self.members, group])
        self._own_lengths = np.concatenate([self._own_lengths, np.zeros_like(group)])
        self._prompt_lengths.append(prompt_length)
        self._prompts.reserve(len(self.members), prompt_length)
        self._own.reserve(len(self.members) * self._width, 1)
        return len(self.members) - 1

    def fill(self, layer: int, group: int, k: Tensor, v: Tensor) -> None:
        self._prompts.fill(layer, group, k, v)

    def fill_layers(self, group: int, k: Tensor, v: Tensor) -> None:
        self._prompts.fill_layers(group, k, v)

    def remove(self, member: int) -> None:
        """Drop a sample, and its group with its last sample."""
        self.members[self.members == member] = -1
        gone = np.flatnonzero((self.members < 0).all(axis=1))
        for group in gone[::-1]:
            self._remove_group(int(group))

    def _remove_group(self, group: int) -> None:
        last, width = len(self.members) - 1, self._width
        if group != last:
            self._prompts.move(last, group, self._prompt_lengths[last])
            for i in range(width):
                length = int(self._own_lengths[last, i])
                self._own.move(last * width + i, group * width + i, length)
            self.members[group] = self.members[last]
            self._own_lengths[group] = self._own_lengths[last]
            self._prompt_lengths[group] = self._prompt_lengths[last]
        self.members, self._own_lengths = self.members[:last], self._own_lengths[:last]
        del self._prompt_lengths[last]

    def begin_step(self) -> list[int]:
        """Make room for one more position of every sample; return the live ones in row order."""
        self._live = self.members.reshape(-1) >= 0
        self._counts = np.where(self._live, self._own_lengths.reshape(-1) + 1, 1)
        self._own.reserve(len(self._counts), int(self._counts.max()))
        self._live_rows = np.flatnonzero(self._live)
        self._seen = None
        members: list[int] = self.members.reshape(-1)[self._live_rows].tolist()
        return members

    def spans(self) -> npt.NDArray[np.void]:
        """(n, 2) of `SPAN` of the live samples, in row order, for attention outside of `attend`:
        the prompt, and the sample's own positions with the new one."""
        rows = self._live_rows
        groups = rows // self._width
        spans = np.zeros((len(rows), 2), SPAN)
        spans[:, 0] = self._prompts.spans(groups, np.array(self._prompt_lengths, np.int64)[groups])
        spans[:, 1] = self._own.spans(rows, self._counts[rows])
        return spans

    def _look(self) -> dict[int, tuple[int, Tensor]]:
        """By window: the first prompt position that this step reads, and the bias."""
        prompts, own = np.array(self._prompt_lengths, np.int64), self._counts
        self._prompt_span, self._own_span = int(prompts.max()), self._own.span(int(own.max()))
        before = np.repeat(prompts, self._width)[:, None]  # positions of the prompt of each sample
        ends, in_own = before + own[:, None] - 1, np.arange(self._own_span)
        found = {}
        for window in self._spec.distinct_windows:
            first = _first_seen(ends, window, self._prompt_span)
            in_prompt = np.arange(first, self._prompt_span)
            seen = np.concatenate([in_prompt < before, in_own < own[:, None]], axis=1)
            if window:
                places = np.concatenate([in_prompt + 0 * before, in_own + before], axis=1)
                seen &= places > ends - window
            shape = (len(prompts), 1, self._width, 1, seen.shape[1])
            found[window] = first, _bias(seen, self._own.k).view(shape)
        rows = self._live_rows
        self._all_live = len(rows) == len(own)
        self._rows = torch.from_numpy(rows).to(self._own.k.device)
        self._ends = self._own.places(rows, own[rows] - 1)
        return found

    def end_step(self) -> None:
        """Count the new position of every live sample as written."""
        self._own_lengths += self._live.reshape(self._own_lengths.shape)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `SinglePool.attend`, with q, k, v of the live samples only."""
        self._seen = self._seen or self._look()
        spec, groups, width = self._spec, len(self._prompt_lengths), self._width
        rows, size = groups * width, spec.head_dim
        self._own.write(layer, self._ends, k, v)
        own_k, own_v = self._own.k[layer, :rows], self._own.v[layer, :rows]
        if not self._all_live:
            q = q.new_zeros(rows, *q.shape[1:]).index_copy_(0, self._rows, q)
        # (groups, G, S, H / G, D): the samples of a group attend to its prompt in one product.
        queries = q.reshape(groups, width, spec.kv_heads, -1, size).transpose(1, 2) * spec.scale
        per_head = queries.shape[3]
        kept = groups * spec.kv_heads
        first, bias = self._seen[spec.window(layer)]
        of_prompts = slice(first, self._prompt_span)
        prompt_k = self._prompts.k[layer, :groups, :, of_prompts].reshape(kept, -1, size)
        prompt_v = self._prompts.v[layer, :groups, :, of_prompts].reshape(kept, -1, size)
        own_k = own_k[:, :, : self._own_span].reshape(rows * spec.kv_heads, -1, size)
        own_v = own_v[:, :, : self._own_span].reshape(rows * spec.kv_heads, -1, size)
        ask_prompt = queries.reshape(kept, width * per_head, size)
        ask_own = queries.transpose(1, 2).reshape(rows * spec.kv_heads, per_head, size)
        shape = (groups, spec.kv_heads, width, per_head)
        of_prompt = torch.bmm(ask_prompt, prompt_k.transpose(1, 2)).view(*shape, -1)
        of_own = torch.bmm(ask_own, own_k.transpose(1, 2))
        of_own = of_own.view(groups, width, spec.kv_heads, per_head, -1).transpose(1, 2)
        products = torch.cat([of_prompt, of_own], dim=-1)
        if spec.attention_cap:
            soft_cap_(products, spec.attention_cap)
        weights = _softmax(products.add_(bias))
        on_prompt, on_own = weights.split([self._prompt_span - first, self._own_span], dim=-1)
        on_prompt = on_prompt.reshape(kept, width * per_head, -1)
        on_own = on_own.transpose(1, 2)
        on_own = on_own.reshape(rows * spec.kv_heads, per_head, -1)
        out = torch.bmm(on_own, own_v).view(groups, width, spec.kv_heads, per_head, size)
        out += torch.bmm(on_prompt, prompt_v).view(*shape, size).transpose(1, 2)
        out = out.view(rows, -1)
        return out if self._all_live else out.index_select(0, self._rows)
