"""The budget of a sampling step, and which samples advance when it is too small for all.

New requests wait for the running step to end, so steps are kept short. Does not know what is
computed.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar

import attrs
import torch

from tinkex.engine.linears import Linear

#: Most bytes of keys and values that a step reads before samples take turns; at least twice the
#: size of the base model, which every step reads.
STEP_BYTES = {"cpu": 2**28, "cuda": 2**34}

#: Floating-point operations of a step: a tenth of a second of two CPU cores, in float32. See
#: `step_operations`.
_HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
STEP_OPERATIONS = {"cpu": 48e9 if _HAS_AVX512 else 16e9, "cuda": 8e12}

#: How many times as fast a CPU multiplies matrices of 16 bits, if it has instructions for them.
#: Older versions of torch cannot say.
_CAPABILITIES: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
HALF_SPEED = 2.0 if _CAPABILITIES.get("avx512_bf16") else 1.0

Item = TypeVar("Item", bound=Hashable)


def step_operations(kind: str, dtype: torch.dtype) -> float:
    """Floating-point operations of a step with matrices of this type."""
    is_fast = kind == "cpu" and dtype == torch.bfloat16
    return STEP_OPERATIONS[kind] * (HALF_SPEED if is_fast else 1.0)


def matrix_operations(linears: Mapping[str, Linear]) -> float:
    """Floating-point operations of one token in a model's matrices, without the head."""
    sizes = {key: linear.weight.numel() for key, linear in linears.items()}
    return 2.0 * (sum(sizes.values()) - sizes["head"])


@attrs.define
class Turns(Generic[Item]):
    """Takes turns among items, each of which has samples that advance together."""

    _last: dict[Item, int] = attrs.field(factory=dict, init=False)  # step that advanced each
    _tokens: dict[Hashable, int] = attrs.field(factory=dict, init=False)  # of each share, so far
    _step: int = attrs.field(default=0, init=False)

    def choose(
        self,
        rows: Mapping[Item, Sequence[int]],
        shares: Mapping[int, Hashable],
        costs: Mapping[Item, float],
        most: float | None,
    ) -> list[Item]:
        """The items that a step advances: all, or as many as cost no more than *most*.

        Items with samples of the share with the fewest tokens come first; among them, the one that
        has waited longest. The item that has waited longest of all is always included.

        Args:
            rows: the samples of each item, at least one.
            shares: of each sample.
            most: None to advance all.
        """
        self._last = {item: self._last.get(item, 0) for item in rows}
        self._forget_shares({shares[row] for own in rows.values() for row in own})
        chosen = list(rows)
        if most is not None and sum(costs.values()) > most:
            tokens = {item: min(self._tokens[shares[row]] for row in rows[item]) for item in rows}
            chosen = self._in_turn(tokens, costs, most)
        self._step += 1
        for item in chosen:
            self._last[item] = self._step
            for row in rows[item]:
                self._tokens[shares[row]] += 1
        return chosen

    def _in_turn(
        self, tokens: Mapping[Item, int], costs: Mapping[Item, float], most: float
    ) -> list[Item]:
        """Items that fit in *most*, those with the fewest *tokens* first."""
        first, *others = sorted(tokens, key=lambda item: (tokens[item], self._last[item]))
        oldest = min(tokens, key=lambda item: self._last[item])
        chosen = list(dict.fromkeys([first, oldest]))
        room = most - sum(costs[item] for item in chosen)
        for item in others:
            room -= 0 if item in chosen else costs[item]
            if room < 0:
                break
            if item not in chosen:
                chosen.append(item)
        return chosen

    def _forget_shares(self, present: set[Hashable]) -> None:
        """Keep counts of *present* only; a new share starts with the lowest count."""
        kept = {share: count for share, count in self._tokens.items() if share in present}
        fewest = min(kept.values(), default=0)
        self._tokens = {share: kept.get(share, fewest) for share in present}
