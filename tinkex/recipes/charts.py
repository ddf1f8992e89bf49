"""Curves as SVG pictures, drawn without a plotting library."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from tinkex.recipes.run_folder import read_rows

WIDTH, HEIGHT = 720, 380
#: Space for the title and legend above, numbers on the left, steps below, and on the right.
TOP, LEFT, BOTTOM, RIGHT = 56, 72, 48, 24
#: Colors that people of any color vision can tell apart (Okabe and Ito 2008).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
#: Points are drawn as dots on lines with at most this many points.
MAX_DOTS = 40
#: Key in metrics.jsonl and label of the losses.
LOSSES = {"train_loss": "training", "eval_loss": "held out"}
#: The same for rewards.
REWARDS = {"reward": "sampled answers", "eval_reward": "held out, likeliest answers"}

Point = tuple[float, float]


@attrs.frozen
class Line:
    """A curve: (step, value) in order. Values that are not finite are omitted."""

    label: str
    points: Sequence[Point]

    @property
    def finite(self) -> list[Point]:
        return [(x, y) for x, y in self.points if math.isfinite(y)]


class Plot:
    """A picture that notebooks display, and that can be saved."""

    def __init__(self, lines: Sequence[Line], title: str = "Loss per token") -> None:
        self.svg = draw(lines, title)

    def save(self, path: str | Path) -> None:
        """Write the SVG into the file *path*."""
        Path(path).write_text(self.svg, encoding="utf-8")

    def _repr_html_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return "<Plot: a notebook shows it; save(path) writes an SVG file>"


def write(metrics: Path, picture: Path) -> None:
    """Draw the losses of the rows in the file *metrics* into the file *picture*."""
    Plot(losses(read_rows(metrics))).save(picture)


def losses(rows: Iterable[Mapping[str, Any]]) -> list[Line]:
    """The lines of train_loss and eval_loss, in nats per token."""
    rows = list(rows)
    found = [line(rows, key, label) for key, label in LOSSES.items()]
    return [one for one in found if one.points]


def plot(rows: Iterable[Mapping[str, Any]]) -> Plot:
    """The main curves of a run: its rewards if it has any, else its losses."""
    rows = list(rows)
    if not any("reward" in row for row in rows):
        return Plot(losses(rows))
    found = [line(rows, key, label) for key, label in REWARDS.items()]
    return Plot([one for one in found if one.points], "Mean reward")


def line(rows: Iterable[Mapping[str, Any]], key: str, label: str) -> Line:
    """The line of one metric, from the rows that have it."""
    return Line(label, [(float(row["step"]), float(row[key])) for row in rows if key in row])


def draw(lines: Sequence[Line], title: str) -> str:
    """The picture as text."""
    across = [x for one in lines for x, _ in one.finite] or [0.0, 1.0]
    up = [y for one in lines for _, y in one.finite] or [0.0, 1.0]
    x_ticks, y_ticks = ticks(min(across), max(across), 6), ticks(min(up), max(up), 5)
    x_range = min(x_ticks[0], min(across)), max(x_ticks[-1], max(across))
    y_range = min(y_ticks[0], min(up)), max(y_ticks[-1], max(up))
    x = _scale(x_range, LEFT, WIDTH - RIGHT)
    y = _scale(y_range, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{html.escape(title)}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" '
        'text-anchor="middle">step</text>',
    ]
    for value in y_ticks:
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
            f'stroke="#e0e0e0"/><text x="{LEFT - 8}" y="{y(value) + 4:.1f}" '
            f'text-anchor="end">{value:.6g}</text>'
        )
    for value in x_ticks:
        parts.append(
            f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            f"{value:.6g}</text>"
        )
    left = float(LEFT)
    for number, one in enumerate(lines):
        color = COLORS[number % len(COLORS)]
        parts += _curve(one, color, x, y)
        parts.append(
            f'<rect x="{left:.0f}" y="32" width="12" height="12" fill="{color}"/>'
            f'<text x="{left + 17:.0f}" y="42">{html.escape(one.label)}</text>'
        )
        left += 34 + 7 * len(one.label)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _curve(
    one: Line, color: str, x: Callable[[float], float], y: Callable[[float], float]
) -> list[str]:
    points = [(x(a), y(b)) for a, b in one.finite]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    parts = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>']
    if len(points) <= MAX_DOTS:
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6" fill="{color}"/>' for a, b in points]
    return parts


def _scale(values: Point, first: float, last: float) -> Callable[[float], float]:
    low, high = values
    return lambda value: first + (value - low) / ((high - low) or 1.0) * (last - first)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About *count* round numbers that span *low* to *high*."""
    if high <= low:
        around = abs(low) / 10 or 0.5
        low, high = low - around, low + around
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]
