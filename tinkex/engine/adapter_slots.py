"""Finished adapters in buffers of fixed size and address, and products with all of them at once.

The set of running adapters changes often, but a recorded step always reads from the same addresses.
So an adapter is copied into a free slot when it is first needed. Each row is multiplied with the
low-rank matrices of every slot, and the results of all slots but its own are masked: two dense
products, whichever adapters the rows use. Does not know about requests.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tinkex.engine import matmul
from tinkex.engine.finished_lora import Finished
from tinkex.engine.linears import Kept, Linear
from tinkex.engine.lora import Factors

#: Ranks are rounded up to a multiple of this.
RANK_STEP = 8

#: The slot of rows without an adapter.
NO_SLOT = -1


class AdapterSlots:
    """The slots of one base model.

    Attributes:
        version: incremented when the buffers are replaced, which invalidates recorded steps.
    """

    def __init__(self, linears: Mapping[str, Linear], dtype: torch.dtype) -> None:
        self._linears = linears
        self._dtype = dtype
        self._owners: list[weakref.ref[Finished] | None] = []
        self._rank = 0
        self._keys: frozenset[str] = frozenset()
        self._buffers: dict[str, Factors] = {}
        self.version = 0

    def __len__(self) -> int:
        return len(self._owners)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        buffers = self._buffers.values()
        return sum(tensor.nbytes for own in buffers for tensor in (own.a, *own.b))

    def place(self, adapters: Iterable[Finished | None]) -> dict[Finished | None, int]:
        """The slot of each running adapter, `NO_SLOT` for None; copies new adapters into slots.

        Slots of adapters that are not running are free.
        """
        wanted = [adapter for adapter in dict.fromkeys(adapters) if adapter is not None]
        self._make_room(wanted)
        slots = {owner(): slot for slot, owner in enumerate(self._owners) if owner is not None}
        # The device runs in order: steps that read a slot's old adapter end before the copy.
        taken = {slots[adapter] for adapter in wanted if adapter in slots}
        free = iter([slot for slot in range(len(self)) if slot not in taken])
        places: dict[Finished | None, int] = {None: NO_SLOT}
        for adapter in wanted:
            if adapter not in slots:
                slots[adapter] = next(free)
                self._copy(adapter, slots[adapter])
            places[adapter] = slots[adapter]
        return places

    def _make_room(self, wanted: list[Finished]) -> None:
        """Enlarge the buffers for more adapters, a higher rank or other matrices than before.

        Adapters keep their slots.
        """
        count = len(self)
        while count < len(wanted):
            count = max(1, 2 * count)
        rank = max((adapter.rank for adapter in wanted), default=0)
        rank = max(self._rank, -(-rank // RANK_STEP) * RANK_STEP)
        keys = self._keys.union(*(adapter.thin for adapter in wanted))
        if (count, rank, keys) == (len(self), self._rank, self._keys):
            return
        owners = [None if owner is None else owner() for owner in self._owners]
        self._owners, self._rank, self._keys = [None] * count, rank, keys
        self._buffers = {key: self._buffer(self._linears[key]) for key in keys}
        self.version += 1
        for slot, adapter in enumerate(owners):
            if adapter is not None:
                self._copy(adapter, slot)

    def _buffer(self, linear: Linear) -> Factors:
        """A (slots, parts, rank, in) and for each part B (slots, rank, out)."""
        count, rank, weight = len(self), self._rank, linear.weight

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(count, *shape, device=weight.device, dtype=self._dtype)

        a = zeros(len(linear.parts), rank, weight.shape[1])
        return Factors(a, tuple(zeros(rank, part.stop - part.start) for part in linear.parts))

    def _copy(self, adapter: Finished, slot: int) -> None:
        for key, buffer in self._buffers.items():
            thin = adapter.thin.get(key)
            for tensor in (buffer.a, *buffer.b):
                tensor[slot].zero_()  # the rows beyond its rank, or all of them
            if thin is None:
                continue
            parts, rank = len(buffer.b), adapter.rank
            buffer.a[slot, :, :rank].copy_(thin.a.view(parts, rank, -1))
            for target, b in zip(buffer.b, thin.b):
                target[slot, :rank].copy_(b.T)
        self._owners[slot] = weakref.ref(adapter)

    def linears(self, slots: Tensor | None) -> SlotLinears:
        """The matrices for rows with the adapters in *slots* (N,); None if no row has one."""
        mask = None
        if slots is not None:
            every = torch.arange(len(self), device=slots.device)
            mask = (slots.unsqueeze(1) == every).to(self._dtype)
        return SlotLinears(self._linears, self._buffers, mask)


class SlotLinears:
    """A base model's matrices for rows that belong to different slots. Implements `Linears`.

    Args:
        mask: (N, slots) 1 where a row belongs to a slot, else 0; None without adapters.
    """

    def __init__(
        self, linears: Mapping[str, Linear], buffers: Mapping[str, Factors], mask: Tensor | None
    ) -> None:
        self._linears = linears
        self._buffers = buffers
        self._mask = mask

    def forward(self, key: str, x: Tensor, kept: Kept | None = None) -> Tensor:
        linear = self._linears[key]
        y = matmul.linear(x, linear.weight, linear.bias, linear.scales)
        if self._mask is None or key not in self._buffers:
            return y
        buffer = self._buffers[key]
        slots, parts, rank, _ = buffer.a.shape
        inner = torch.mm(x, buffer.a.view(slots * parts * rank, -1).T)
        inner = inner.view(len(x), slots, parts, rank) * self._mask[:, :, None, None]
        for i, part in enumerate(linear.parts):
            b = buffer.b[i].view(slots * rank, -1)
            y[:, part.start : part.stop].addmm_(inner[:, :, i].reshape(len(x), -1), b)
        return y

    def matrix(self, key: str) -> Tensor | None:
        linear = self._linears[key]
        has_adapter = self._mask is not None and key in self._buffers
        is_plain = linear.bias is None and linear.scales is None
        return linear.weight if is_plain and not has_adapter else None

    def backward(
        self, key: str, dy: Tensor, x: Tensor, kept: Kept | None = None, *, wants_dx: bool = True
    ) -> Tensor | None:
        raise RuntimeError("finished adapters are not trained.")
