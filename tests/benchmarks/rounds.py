"""Measuring in turns within a time that is given."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

#: Rounds that a spread needs, and how many are enough.
LEAST, MOST = 3, 9


class Allowance:
    """Seconds that a number of cases share; what one leaves is for those after it."""

    def __init__(self, seconds: float, cases: int) -> None:
        self._end = time.perf_counter() + seconds
        self._cases = cases

    def next(self) -> float:
        """Seconds for the next case; 0 if none are left."""
        left, cases = max(0.0, self._end - time.perf_counter()), max(self._cases, 1)
        self._cases -= 1
        return left / cases


def in_turns(calls: Sequence[Callable[[], Any]], seconds: float) -> list[list[float]]:
    """Run each call once to warm up, then all of them in turns, in changing order.

    Args:
        seconds: in which to do it; at least `LEAST` rounds are made, at most `MOST`.

    Returns:
        For each call its numbers, one a round: what it returned if that is a float, else the
        seconds that it took.
    """
    end = time.perf_counter() + seconds
    for call in calls:
        call()
    found: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    for done in range(MOST):
        if done >= LEAST and time.perf_counter() >= end:
            break
        for i in order:
            start = time.perf_counter()
            result = calls[i]()
            taken = time.perf_counter() - start
            found[i].append(result if isinstance(result, float) else taken)
        order.reverse()
    return found
