"""A line of a benchmark table: figures of several rounds, ours beside another's and the limit's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import attrs


@attrs.frozen
class Spread:
    """A median of several rounds, and half the distance from the least to the largest."""

    median: float
    half_range: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), (max(values) - min(values)) / 2)

    def __str__(self) -> str:
        return f"{self.median:.2f} ± {self.half_range:.2f}"


@attrs.frozen
class Row:
    """One figure, in rounds in which everything was measured one after the other.

    Attributes:
        ours, theirs: a number for each round; theirs is empty where there is nothing to compare
            with, and a single number where it is the time that is allowed.
        target: what the ratio ours / theirs should be at most, or with *at_least* at the least;
            None: no target.
        floor: what a bare loop does, in the same unit.
        limits: what this machine allows at most, a number for each round; empty: unknown.
        share_target: what ours / limit should be at the least; None: no target.
    """

    case: str
    unit: str
    ours: Sequence[float]
    theirs: Sequence[float] = ()
    model: str = ""
    target: float | None = None
    at_least: bool = False
    floor: float | None = None
    limits: Sequence[float] = ()
    share_target: float | None = None

    @property
    def key(self) -> str:
        """What names the figure in the committed file."""
        return f"{self.case} | {self.model}" if self.model else self.case

    @property
    def ratio(self) -> Spread | None:
        """ours / theirs, round by round."""
        return _quotient(self.ours, self.theirs)

    @property
    def share(self) -> Spread | None:
        """ours / limit, round by round."""
        return _quotient(self.ours, self.limits)

    @property
    def met(self) -> bool | None:
        """True if every target is met; None if there is none."""
        found = []
        if self.ratio is not None and self.target is not None:
            ratio = self.ratio.median
            found.append(ratio >= self.target if self.at_least else ratio <= self.target)
        if self.share is not None and self.share_target is not None:
            found.append(self.share.median >= self.share_target)
        return all(found) if found else None


def _quotient(ours: Sequence[float], others: Sequence[float]) -> Spread | None:
    if not others:
        return None
    paired = others if len(others) == len(ours) else list(others) * len(ours)
    return Spread.of([a / max(b, 1e-12) for a, b in zip(ours, paired, strict=True)])


def number(value: float | None) -> str:
    """A number in a table: three digits, or whole from 100 on."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _middle(values: Sequence[float]) -> str:
    return number(statistics.median(values)) if values else ""


def _wanted(target: float | None, at_least: bool) -> str:
    return "" if target is None else f"{'at least' if at_least else 'at most'} {target:.2f}"


#: The columns of a table, by their heading.
Columns = dict[str, Callable[[Row], str]]

CASE: Columns = {"case": lambda row: row.case}
MODEL: Columns = {"model": lambda row: row.model}
FIGURES: Columns = {
    "unit": lambda row: row.unit,
    "tinkex": lambda row: _middle(row.ours),
    "instead": lambda row: _middle(row.theirs),
}
FLOOR: Columns = {"floor": lambda row: number(row.floor)}
RATIO: Columns = {
    "ratio": lambda row: "" if row.ratio is None else str(row.ratio),
    "wanted": lambda row: _wanted(row.target, row.at_least),
}
SHARE: Columns = {
    "limit": lambda row: _middle(row.limits),
    "share of it": lambda row: "" if row.share is None else str(row.share),
    "share wanted": lambda row: _wanted(row.share_target, True),
}
MET: Columns = {"met": lambda row: {None: "", True: "yes", False: "**no**"}[row.met]}

PLAIN: Columns = {**CASE, **FIGURES, **FLOOR, **RATIO, **MET}
OF_LIMIT: Columns = {**CASE, **MODEL, **FIGURES, **RATIO, **SHARE, **MET}


def table(rows: Sequence[Row], columns: Columns = PLAIN) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(cell(row) for cell in columns.values()) + " |")
    return "\n".join(lines)
