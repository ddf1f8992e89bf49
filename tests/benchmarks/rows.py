"""Rows of benchmark tables: figures of several rounds, for ours, the alternative and the limit."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import attrs


@attrs.frozen
class Spread:
    """The median of several rounds, and half the distance from the smallest to the largest."""

    median: float
    half_range: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), (max(values) - min(values)) / 2)

    def __str__(self) -> str:
        return f"{self.median:.2f} ± {self.half_range:.2f}"


@attrs.frozen
class Row:
    """One figure, from rounds in which everything was measured in turn.

    Attributes:
        ours, theirs: a number for each round; theirs is empty if there is no alternative, and a
            single number if it is the allowed time.
        target: upper bound of the ratio ours / theirs, or with *at_least* its lower bound; None is
            no target.
        floor: the figure of a bare loop, in the same unit.
        limits: the limit of this machine, a number for each round; empty if unknown.
        share_target: lower bound of ours / limit; None is no target.
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
        """The key of the figure in the committed file."""
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
    """Format a number for a table: three digits, or an integer from 100 on."""
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
    "alternative": lambda row: _middle(row.theirs),
}
FLOOR: Columns = {"floor": lambda row: number(row.floor)}
RATIO: Columns = {
    "ratio": lambda row: "" if row.ratio is None else str(row.ratio),
    "target": lambda row: _wanted(row.target, row.at_least),
}
SHARE: Columns = {
    "limit": lambda row: _middle(row.limits),
    "share of limit": lambda row: "" if row.share is None else str(row.share),
    "share target": lambda row: _wanted(row.share_target, True),
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
