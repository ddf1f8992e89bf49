"""A compact set of integers."""

from __future__ import annotations

from bisect import bisect_right


class Numbers:
    """A set of integers that are added mostly in order, stored as ranges."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []  # inclusive

    def add(self, number: int) -> None:
        i = bisect_right(self._starts, number) - 1
        if i >= 0 and number <= self._ends[i]:
            return
        joins_left = i >= 0 and self._ends[i] == number - 1
        joins_right = i + 1 < len(self._starts) and self._starts[i + 1] == number + 1
        if joins_left and joins_right:
            self._ends[i] = self._ends.pop(i + 1)
            del self._starts[i + 1]
        elif joins_left:
            self._ends[i] = number
        elif joins_right:
            self._starts[i + 1] = number
        else:
            self._starts.insert(i + 1, number)
            self._ends.insert(i + 1, number)

    @property
    def highest(self) -> int:
        """The largest number, or -1."""
        return self._ends[-1] if self._ends else -1

    def __contains__(self, number: int) -> bool:
        i = bisect_right(self._starts, number) - 1
        return i >= 0 and number <= self._ends[i]

    def discard(self, number: int) -> None:
        """The inverse of `add`; no effect if the number is not in the set."""
        i = bisect_right(self._starts, number) - 1
        if i < 0 or number > self._ends[i]:
            return
        start, end = self._starts.pop(i), self._ends.pop(i)
        for left, right in ((number + 1, end), (start, number - 1)):
            if left <= right:
                self._starts.insert(i, left)
                self._ends.insert(i, right)
