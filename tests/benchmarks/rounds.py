"""Measuring in turns within a given time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

#: Least rounds for a spread, and most rounds.
LEAST, MOST = 3, 9


class Allowance:
    """Seconds for a number of cases; time that a case does not use goes to later ones."""

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
        seconds: time limit; at least `LEAST` and at most `MOST` rounds are run.

    Returns:
        For each call one number per round: its result if that is a float, else its seconds.
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
