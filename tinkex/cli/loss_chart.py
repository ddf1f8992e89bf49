"""The losses of a run as an SVG picture, drawn without a plotting library."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 720, 400, 60

#: Key in metrics.jsonl, label, color.
_LINES = (("train_loss", "training", "#8aa4c8"), ("eval_loss", "held out", "#c0392b"))


def write(metrics: Path, picture: Path) -> None:
    """Draw train_loss and eval_loss of the rows in the file *metrics* into the file *picture*."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    picture.write_text(draw(rows), encoding="utf-8")


def draw(rows: Sequence[dict[str, float]]) -> str:
    """
    The picture as text.

    Args:
        rows: with "step", and "train_loss" or "eval_loss" or both, in nats per token.
    """
    values = [
        row[key] for key, _, _ in _LINES for row in rows if math.isfinite(row.get(key, math.nan))
    ]
    top = max(values, default=1.0) * 1.05 or 1.0
    last = max((row["step"] for row in rows), default=1) or 1

    def x(step: float) -> float:
        return MARGIN + step / last * (WIDTH - 2 * MARGIN)

    def y(loss: float) -> float:
        return HEIGHT - MARGIN - loss / top * (HEIGHT - 2 * MARGIN)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{MARGIN}" y="28" font-size="16">Loss per token</text>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 16}" text-anchor="middle">step</text>',
    ]
    for i in range(5):
        loss = top * i / 4
        parts.append(
            f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" '
            'stroke="#ddd"/>'
            f'<text x="{MARGIN - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.2f}</text>'
        )
    for step in sorted({0, last // 2, last}):
        below = HEIGHT - MARGIN + 20
        parts.append(f'<text x="{x(step):.1f}" y="{below}" text-anchor="middle">{step:g}</text>')
    for number, (key, label, color) in enumerate(_LINES):
        points = [
            (x(row["step"]), y(row[key])) for row in rows if math.isfinite(row.get(key, math.nan))
        ]
        line = " ".join(f"{across:.1f},{down:.1f}" for across, down in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{color}"/>' for a, b in points]
        left = WIDTH - MARGIN - 160 + 85 * number
        parts.append(f'<text x="{left}" y="28" fill="{color}">{label}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
