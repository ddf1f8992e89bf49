"""The pools of keys and values of running samples, and which of them a step advances.

Samples of similar prompts share a pool (see kv_cache.py), which holds a bounded number of them, so
that a step need not advance all. Does not know about requests.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Union

import numpy as np
import torch

from tinkex.engine.kv_cache import SharedPool, SinglePool
from tinkex.engine.memory import kind_of
from tinkex.engine.sample_turns import Turns
from tinkex.engine.spec import Spec

Pool = Union[SinglePool, SharedPool]

#: Longest prompts of the first pool; each further pool takes prompts four times as long.
FIRST_POOL = 128

#: Rows of one pool; more samples form further pools.
POOL_ROWS = {"cpu": 64, "cuda": 256}


class Pools:
    """The pools of one base model.

    Args:
        step_bytes: most bytes of keys and values that a step reads; beyond this, the pools take
            turns, so that steps stay short.
    """

    def __init__(
        self, spec: Spec, device: torch.device, dtype: torch.dtype, step_bytes: int
    ) -> None:
        self._made_of = spec, device, dtype
        self._most_rows = POOL_ROWS[kind_of(device)]
        numbers = 2 * spec.layers * spec.kv_heads * spec.head_dim
        self._step_positions = step_bytes // (numbers * dtype.itemsize)
        self._kinds: dict[Pool, tuple[int, int]] = {}  # longest prompt and width of each pool
        self._of: dict[int, Pool] = {}
        self._turns: Turns[Pool] = Turns()

    def __iter__(self) -> Iterator[Pool]:
        yield from self._kinds

    def add(self, rows: Sequence[int], prompt_length: int) -> tuple[Pool, int]:
        """Make room for samples of one prompt; return their pool, and the place in it to `fill`."""
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
        for pool, other in self._kinds.items():
            if other == kind and pool.rows + width <= self._most_rows:
                return pool
        spec, device, dtype = self._made_of
        made: Pool = SinglePool(spec, device, dtype)
        if width > 1:
            made = SharedPool(spec, width, device, dtype)
        self._kinds[made] = kind
        return made

    def remove(self, row: int) -> None:
        """Drop a sample, if it has keys and values; a pool is removed with its last sample."""
        pool = self._of.pop(row, None)
        if pool is not None:
            pool.remove(row)
            if not pool.rows:
                del self._kinds[pool]

    def choose(self, shares: Mapping[int, Hashable], *, in_turn: bool) -> list[Pool]:
        """The pools that a step advances: all, or if *in_turn* as many as fit in `step_bytes`.

        Args:
            shares: of each row that has keys and values.
        """
        rows = {pool: _live(pool) for pool in self}
        costs = {pool: pool.positions for pool in self}
        return self._turns.choose(rows, shares, costs, self._step_positions if in_turn else None)


def _live(pool: Pool) -> list[int]:
    members = np.asarray(pool.members).reshape(-1)
    live: list[int] = members[members >= 0].tolist()
    return live
