"""Waiting samples, one queue per user, so that users start their samples in turn.

Does not know about users: each job names a share, and each share has a queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Hashable, Iterable, Iterator

import attrs

from tinkex.engine.sample_requests import Job


@attrs.frozen(eq=False)
class Unit:
    """Samples first..first+count of a job, which start together."""

    job: Job
    first: int
    count: int


class SampleQueue:
    """Units in order of arrival, by share."""

    def __init__(self) -> None:
        self._lines: dict[Hashable, deque[Unit]] = {}

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __iter__(self) -> Iterator[Unit]:
        for line in self._lines.values():
            yield from line

    def shares(self) -> list[Hashable]:
        """The shares that have something waiting."""
        return list(self._lines)

    def line(self, share: Hashable) -> deque[Unit]:
        """The waiting units of one share, in order of arrival."""
        return self._lines[share]

    def extend(self, units: Iterable[Unit]) -> None:
        """Add units at the ends of their shares' lines."""
        for unit in units:
            self._lines.setdefault(unit.job.share, deque()).append(unit)

    def put_back(self, units: Iterable[Unit]) -> None:
        """Add units at the heads of their shares' lines, keeping their order."""
        for unit in reversed(list(units)):
            self._lines.setdefault(unit.job.share, deque()).appendleft(unit)

    def remove(self, units: Container[Unit]) -> None:
        self.drop(lambda unit: unit in units)

    def drop(self, matches: Callable[[Unit], bool]) -> None:
        """Remove the units that *matches* is true for."""
        kept = {
            share: deque(unit for unit in line if not matches(unit))
            for share, line in self._lines.items()
        }
        self._lines = {share: line for share, line in kept.items() if line}
