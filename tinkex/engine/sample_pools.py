"""Where the keys and values of running samples are, and which of them a step advances.

Samples of similar prompts share a pool (see kv_cache.py), which holds a bounded number of them, so
that a step need not advance all. Does not know about requests; a share is whatever users share by.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Union

import attrs
import numpy as np
import torch

from tinkex.engine.kv_cache import SharedPool, SinglePool
from tinkex.engine.memory import kind_of
from tinkex.engine.spec import Spec

Pool = Union[SinglePool, SharedPool]

#: Longest prompts of the smallest pool; each further pool takes four times as long ones.
FIRST_POOL = 128

#: Rows of one pool; more samples form further pools.
POOL_ROWS = {"cpu": 64, "cuda": 256}


@attrs.define(eq=False)
class _Slot:
    """A pool, and the number of the step that advanced it last; 0 if none has."""

    kind: tuple[int, int]
    pool: Pool
    turn: int


class Pools:
    """The pools of one base model.

    Args:
        step_bytes: keys and values that a step reads, if there are so many; then the pools take
            turns. Whoever waits for the step to end waits for no more than that.
    """

    def __init__(
        self, spec: Spec, device: torch.device, dtype: torch.dtype, step_bytes: int
    ) -> None:
        self._made_of = spec, device, dtype
        self._most_rows = POOL_ROWS[kind_of(device)]
        numbers = 2 * spec.layers * spec.kv_heads * spec.head_dim
        self._step_positions = step_bytes // (numbers * dtype.itemsize)
        self._slots: list[_Slot] = []
        self._of: dict[int, Pool] = {}
        self._tokens: dict[Hashable, int] = {}  # of each share in the running batch, so far
        self._turn = 0

    def __iter__(self) -> Iterator[Pool]:
        for slot in self._slots:
            yield slot.pool

    def add(self, rows: Sequence[int], prompt_length: int) -> tuple[Pool, int]:
        """Make room for samples of one prompt; give their pool, and the place in it to `fill`."""
        pool = self._with_room(len(rows), prompt_length)
        self._of |= dict.fromkeys(rows, pool)
        if isinstance(pool, SinglePool):
            return pool, pool.add(rows[0], prompt_length)
        return pool, pool.add(rows, prompt_length)

    def _with_room(self, count: int, prompt_length: int) -> Pool:
        longest, width = FIRST_POOL, 1 << (count - 1).bit_length()
        while longest < prompt_length:
            longest *= 4
        kind = longest, width
        for slot in self._slots:
            if slot.kind == kind and slot.pool.rows + width <= self._most_rows:
                return slot.pool
        spec, device, dtype = self._made_of
        made: Pool = SinglePool(spec, device, dtype)
        if width > 1:
            made = SharedPool(spec, width, device, dtype)
        self._slots.append(_Slot(kind, made, turn=0))
        return made

    def remove(self, row: int) -> None:
        """Drop a sample, if it has keys and values; a pool goes with its last one."""
        pool = self._of.pop(row, None)
        if pool is not None:
            pool.remove(row)
            self._slots = [slot for slot in self._slots if slot.pool.rows]

    def choose(self, shares: Mapping[int, Hashable], *, in_turn: bool) -> list[Pool]:
        """The pools that a step advances: all, or *in_turn* as many as it has time for.

        First come those with samples of the share that has got the fewest tokens, and among these
        the one that has waited longest. The one that has waited longest of all is never left out.

        Args:
            shares: of each row that has keys and values.
        """
        members = {slot: _live(slot.pool) for slot in self._slots}
        self._forget_shares({shares[row] for rows in members.values() for row in rows})
        chosen = list(self._slots)
        if in_turn and sum(slot.pool.positions for slot in chosen) > self._step_positions:
            chosen = self._in_turn(
                {
                    slot: min(self._tokens[shares[row]] for row in rows)
                    for slot, rows in members.items()
                }
            )
        self._turn += 1
        for slot in chosen:
            slot.turn = self._turn
            for row in members[slot]:
                self._tokens[shares[row]] += 1
        return [slot.pool for slot in chosen]

    def _in_turn(self, tokens: Mapping[_Slot, int]) -> list[_Slot]:
        """As many slots as a step has time for, the one with the fewest *tokens* first."""
        first, *others = sorted(tokens, key=lambda slot: (tokens[slot], slot.turn))
        oldest = min(tokens, key=lambda slot: slot.turn)
        chosen = list(dict.fromkeys([first, oldest]))
        room = self._step_positions - sum(slot.pool.positions for slot in chosen)
        for slot in others:
            room -= 0 if slot in chosen else slot.pool.positions
            if room < 0:
                break
            if slot not in chosen:
                chosen.append(slot)
        return chosen

    def _forget_shares(self, present: set[Hashable]) -> None:
        """Count for *present* alone; who joins starts with the count of the one with the fewest."""
        kept = {share: count for share, count in self._tokens.items() if share in present}
        fewest = min(kept.values(), default=0)
        self._tokens = {share: kept.get(share, fewest) for share in present}


def _live(pool: Pool) -> list[int]:
    members = np.asarray(pool.members).reshape(-1)
    live: list[int] = members[members >= 0].tolist()
    return live
