"""A line of the benchmark table."""

from __future__ import annotations

import attrs


@attrs.frozen
class Row:
    """One figure, ours and what a user would pick instead, side by side.

    Attributes:
        ratio: ours / theirs, the median over rounds.
        target: what the ratio should be at most, or with at_least at the least; None: no target.
        floor: what the machine or a bare loop does, in the same unit.
    """

    name: str
    unit: str
    ours: float
    theirs: float | None
    ratio: float | None
    target: float | None = None
    at_least: bool = False
    floor: float | None = None

    @property
    def met(self) -> bool | None:
        if self.ratio is None or self.target is None:
            return None
        return self.ratio >= self.target if self.at_least else self.ratio <= self.target

    def markdown(self) -> str:
        """The line as a row of a Markdown table."""
        sign = "at least" if self.at_least else "at most"
        target = "" if self.target is None else f"{sign} {self.target:.2f}"
        met = {None: "", True: "yes", False: "**no**"}[self.met]
        cells = [
            self.name,
            self.unit,
            _number(self.ours),
            _number(self.theirs),
            _number(self.floor),
            "" if self.ratio is None else f"{self.ratio:.2f}",
            target,
            met,
        ]
        return "| " + " | ".join(cells) + " |"


HEAD = "| case | unit | tinkex | instead | floor | ratio | target | met |\n" + "|---" * 8 + "|"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
