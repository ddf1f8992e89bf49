"""The committed figures, docs/benchmarks.json, and changes against them.

Only ratios and shares of the limit are stored: absolute times are not comparable between machines
or loads.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.rows import Row, Spread

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "benchmarks.json"

#: A change must be at least this fraction of the figure, however steady its rounds were.
LEAST_MOVE = 0.05


def of_rows(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """The stored figures of rows, by their keys: median and spread of the ratio and the share."""
    kept: dict[str, dict[str, float]] = {}
    for row in rows:
        figures = {"ratio": row.ratio, "share": row.share}
        numbers = {
            name: value
            for kind, spread in figures.items()
            if spread is not None
            for name, value in (
                (kind, round(spread.median, 4)),
                (f"{kind}_spread", round(spread.half_range, 4)),
            )
        }
        if numbers:
            kept[row.key] = {"at_least": float(row.at_least), **numbers}
    return kept


def committed() -> dict[str, Any]:
    """The last committed file; empty if there is none."""
    shown = subprocess.run(
        ["git", "show", f"HEAD:{FILE.relative_to(ROOT)}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if shown.returncode:
        return {}
    found: dict[str, Any] = json.loads(shown.stdout)
    return found


def write(parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the figures of the parts that were run; keep the others."""
    there = json.loads(FILE.read_text()) if FILE.exists() else {}
    FILE.write_text(json.dumps({**there, **parts}, indent=1, sort_keys=True) + "\n")


def moved(
    before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """A sentence for each figure that changed by more than noise.

    Noise is the spread of the rounds then and now together, and at least `LEAST_MOVE`.
    """
    said = []
    for key in sorted(before.keys() & after.keys()):
        for kind in ("ratio", "share"):
            if kind not in before[key] or kind not in after[key]:
                continue
            old, new = (Spread(f[kind], f[f"{kind}_spread"]) for f in (before[key], after[key]))
            change = new.median - old.median
            noise = max(old.half_range + new.half_range, LEAST_MOVE * abs(old.median))
            if abs(change) <= noise:
                continue
            more_is_better = kind == "share" or bool(after[key]["at_least"])
            word = "better" if (change > 0) == more_is_better else "WORSE"
            said.append(f"{word}: {key}: {kind} {old} -> {new}")
    return said
