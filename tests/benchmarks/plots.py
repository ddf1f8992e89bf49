"""Curves as SVG pictures in docs/."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from tests.benchmarks.figures import FILE

#: Numbers against a size.
Curve = Sequence[tuple[float, float]]


def plot(curves: Mapping[str, Curve], x: str, y: str, name: str) -> None:
    """Curves over a logarithmic axis, in one picture."""
    panels({y: curves}, x, name)


def panels(
    kinds: Mapping[str, Mapping[str, Curve]],
    x: str,
    name: str,
    *,
    across: int = 3,
    proportion: bool = False,
) -> None:
    """A panel for each kind, with its curves; titles name what grows if *x* is empty.

    Args:
        proportion: make both axes logarithmic, with dotted lines for costs that grow in proportion.
    """
    columns = min(across, len(kinds))
    rows = -(-len(kinds) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(6 if columns == 1 else 4 * columns, 3.2 * rows),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for place, (kind, curves) in zip(axes.flat, kinds.items()):
        for label, points in curves.items():
            place.plot(*zip(*points, strict=True), marker="o", label=label)
        if proportion:
            _in_proportion(place, curves.values())
        else:
            place.set(xscale="log", ylim=(0, None))
        place.set(xlabel=x or kind, ylabel=kind if x else "")
        place.grid(alpha=0.3)
        place.legend(frameon=False, fontsize="small")
    for place in list(axes.flat)[len(kinds) :]:
        place.axis("off")
    figure.savefig(FILE.with_name(name), metadata={"Date": None})
    pyplot.close(figure)


def _in_proportion(place: Axes, curves: Collection[Curve]) -> None:
    """Make both axes logarithmic, and draw what each curve would be in proportion to its end."""
    place.set(xscale="log", yscale="log")
    for points in curves:
        sizes, (most, cost) = [size for size, _ in points], points[-1]
        line = [cost * size / most for size in sizes]
        place.plot(sizes, line, color="gray", linestyle=":", linewidth=0.8, zorder=0)
    costs = [cost for points in curves for _, cost in points if cost > 0]
    place.set_ylim(min(costs) / 3, max(costs) * 6)  # room for the legend
