"""The KV cache of running samples in tensors at fixed addresses.

Samples are grouped by length: a slab has room for rows of T positions, T being a power of two. A
sample that outgrows its slab moves to the next. The device computes the places where keys are
written and read, so all steps over the same number of rows have one shape and can be recorded
(decode_graph.py).

Notation as in attention.py: G key/value heads, D head size, T positions, R rows of a slab.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence, Set

import numpy as np
import torch
from torch import Tensor

from tinkex.engine.kv_cache import attend_rows
from tinkex.engine.spec import Spec

#: Positions of the shortest rows, and fewest rows of a slab.
SHORTEST = 128
FEWEST_ROWS = 8

_numbers = itertools.count(1)


def positions_of_row(needed: int) -> int:
    """Positions of the shortest rows that hold *needed* positions."""
    return max(SHORTEST, _power_of_two(needed))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


class Slab:
    """Rows of one length.

    Args:
        filler: the number in `members` of a row that is not in use.

    Attributes:
        number: unique among slabs.
        k, v: (layers, R, G, T, D).
        members: (R,) int64 on the device, the sequence in each row; read by steps.
        rows: the same on the host, None where free.
    """

    def __init__(
        self,
        spec: Spec,
        rows: int,
        positions: int,
        device: torch.device,
        dtype: torch.dtype,
        filler: int,
    ) -> None:
        self.number = next(_numbers)
        shape = (spec.layers, rows, spec.kv_heads, positions, spec.head_dim)
        # Zeros, not garbage: what lies beyond a sequence's end is multiplied by weight 0.
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.members = torch.full((rows,), filler, device=device)
        self.rows: list[int | None] = [None] * rows
        self._filler = filler
        self._told = [filler] * rows

    @property
    def positions(self) -> int:
        return self.k.shape[3]

    @property
    def used(self) -> list[int]:
        """The sequences in `rows`."""
        return [slot for slot, row in enumerate(self.rows) if row is not None]

    @property
    def prefix(self) -> int:
        """How many rows from the first one cover all rows in use: a power of two, or all."""
        return min(len(self.rows), _power_of_two(max(self.used, default=0) + 1))

    def tell_members(self, going: Set[int]) -> None:
        """Copy the rows of *going* sequences to `members`."""
        members = [self._filler if row is None or row not in going else row for row in self.rows]
        if members != self._told:
            self._told = members
            copy_in(self.members, np.array(members, np.int64))

    def move(self, source: int, target: Slab, slot: int) -> None:
        """Move row *source* to row *slot* of *target*, whose rows are at least as long."""
        size = self.positions
        target.k[:, slot, :, :size] = self.k[:, source]
        target.v[:, slot, :, :size] = self.v[:, source]
        target.rows[slot], self.rows[source] = self.rows[source], None


def copy_in(target: Tensor, values: np.ndarray) -> None:
    """Copy an array to a tensor of its shape, without waiting for the device to do it."""
    source = torch.from_numpy(values)
    if target.device.type == "cuda":
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)


class StaticCache:
    """The slabs of one base model, one for each length in use.

    Args:
        budget: bytes that slabs may take; beyond that, a slab gets only the rows it needs.
        filler: a number that no sequence has.
    """

    def __init__(
        self, spec: Spec, device: torch.device, dtype: torch.dtype, budget: int, filler: int
    ) -> None:
        self._spec = spec
        self._made_of = device, dtype
        self._budget = budget
        self._filler = filler
        self._slabs: dict[int, Slab] = {}  # by positions
        self._places: dict[int, tuple[Slab, int]] = {}
        self._together: dict[int, Sequence[int]] = {}  # rows of one prompt, by the first of them

    def __iter__(self) -> Iterator[Slab]:
        return iter(self._slabs.values())

    @property
    def rows(self) -> list[int]:
        """All sequences that have a row."""
        return list(self._places)

    @property
    def nbytes(self) -> int:
        return sum(slab.k.nbytes + slab.v.nbytes for slab in self)

    @property
    def position_bytes(self) -> int:
        """Bytes of one position."""
        spec = self._spec
        return 2 * spec.layers * spec.kv_heads * spec.head_dim * self._made_of[1].itemsize

    def add(self, rows: Sequence[int], prompt_length: int) -> tuple[StaticCache, int]:
        """Make room for samples of one prompt; return the cache, and the place in it to `fill`."""
        slab = self._with_room(positions_of_row(prompt_length + 1), len(rows))
        free = [slot for slot, row in enumerate(slab.rows) if row is None]
        for row, slot in zip(rows, free):
            slab.rows[slot] = row
            self._places[row] = slab, slot
        self._together[rows[0]] = rows
        return self, rows[0]

    def fill(self, layer: int, place: int, k: Tensor, v: Tensor) -> None:
        """Write a prompt's keys and values, (T, G, D) each, at the start of its rows."""
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        for row in self._together[place]:
            slab, slot = self._places[row]
            slab.k[layer, slot, :, : k.shape[1]] = k
            slab.v[layer, slot, :, : v.shape[1]] = v

    def fill_layers(self, place: int, k: Tensor, v: Tensor) -> None:
        """The same of all layers, (layers, G, T, D) each."""
        for row in self._together[place]:
            slab, slot = self._places[row]
            slab.k[:, slot, :, : k.shape[2]] = k
            slab.v[:, slot, :, : v.shape[2]] = v

    def remove(self, row: int) -> None:
        """Free the place of a row, if it has one."""
        self._together.pop(row, None)
        place = self._places.pop(row, None)
        if place is not None:
            slab, slot = place
            slab.rows[slot] = None

    def fit(self, row: int, positions: int) -> None:
        """Move a row to a longer slab unless *positions* fit where it is."""
        slab, slot = self._places[row]
        if positions > slab.positions:
            longer = self._with_room(positions_of_row(positions), 1)
            target = longer.rows.index(None)
            slab.move(slot, longer, target)
            self._places[row] = longer, target

    def close_gaps(self) -> None:
        """Move the last rows of slabs to free places, where fewer would then have to be read."""
        for slab in self:
            wanted = _power_of_two(max(1, len(slab.used)))
            for slot in slab.used:
                row = slab.rows[slot]
                if slot >= wanted and row is not None:
                    target = slab.rows.index(None)
                    slab.move(slot, slab, target)
                    self._places[row] = slab, target

    def tell_members(self, going: Set[int]) -> list[Slab]:
        """Let the next steps read the rows of *going* sequences; return the slabs that have any."""
        slabs = [slab for slab in self if not going.isdisjoint(slab.rows)]
        for slab in slabs:
            slab.tell_members(going)
        return slabs

    def _with_room(self, positions: int, count: int) -> Slab:
        """The slab of a length, with at least *count* free rows."""
        old = self._slabs.get(positions)
        used = 0 if old is None else len(old.used)
        if old is not None and len(old.rows) - used >= count:
            return old
        device, dtype = self._made_of
        rows = self._row_count(positions, used + count)
        slab = Slab(self._spec, rows, positions, device, dtype, self._filler)
        if old is not None:
            size = len(old.rows)
            slab.k[:, :size], slab.v[:, :size] = old.k, old.v
            slab.rows[:size] = old.rows
            for slot, row in enumerate(old.rows):
                if row is not None:
                    self._places[row] = slab, slot
        self._slabs[positions] = slab
        return slab

    def _row_count(self, positions: int, needed: int) -> int:
        """Rows of a slab for *needed*: a power of two if that fits."""
        rows = max(FEWEST_ROWS, _power_of_two(needed))
        size = self.position_bytes * positions
        if self.nbytes + rows * size > self._budget:
            kept = self._slabs.items()
            self._slabs = {p: slab for p, slab in kept if p == positions or slab.used}
        while rows > needed and self.nbytes + rows * size > self._budget:
            rows = max(needed, rows // 2)
        old = self._slabs.get(positions)
        return rows if old is None else max(rows, len(old.rows))


class SlabReading:
    """One step's attention of the first n rows of a slab.

    Args:
        positions: (n,) int64 of the new token of each row; less than the slab has.
    """

    def __init__(self, spec: Spec, slab: Slab, positions: Tensor) -> None:
        self._spec = spec
        self._slab = slab
        n, heads, size = len(positions), spec.kv_heads, slab.positions
        device = positions.device
        first = torch.arange(n * heads, device=device).view(n, heads) * size
        self._places = (first + positions.unsqueeze(1)).view(-1)
        at = torch.arange(size, device=device)
        ends = positions.repeat_interleave(heads, output_size=n * heads).unsqueeze(1)
        self._bias = {}
        for window in spec.distinct_windows:
            seen = at <= ends
            if window:
                seen = seen & (at > ends - window)
            bias = torch.where(seen, 0.0, -torch.inf).to(slab.k.dtype)
            self._bias[window] = bias.unsqueeze(1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k, v (n, G, D) of the new position; attend with q (n, H, D) -> (n, H D)."""
        spec, slab, n = self._spec, self._slab, len(q)
        for cache, values in ((slab.k, k), (slab.v, v)):
            rows = cache[layer].view(-1, spec.head_dim)
            rows.index_copy_(0, self._places, values.reshape(-1, spec.head_dim))
        bias = self._bias[spec.window(layer)]
        return attend_rows(q, slab.k[layer, :n], slab.v[layer, :n], bias, spec)
