"""The metrics of a training run: what the server has seen of it, and what its client reports."""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import Response

from tinkex.server.http_errors import Refusal, shown
from tinkex.server.request_context import Call, reply

#: Bounds of one report.
_MOST_POINTS, _MOST_NAMES, _LONGEST_NAME = 1000, 64, 64


async def read_metrics(call: Call) -> Response:
    """Points after the number that an earlier answer had as "next"."""
    run = await _run(call)
    after = call.number("after", 0, 2**53)
    points, following = await call.site.in_pool(
        call.site.ledger.workshop.metrics.read, run.run_id, after
    )
    return reply({"points": points, "next": following})


async def report_metrics(call: Call) -> Response:
    """Add points of the client's own: {"points": [{"step": 3, "held_out_loss": 2.5}, ...]}."""
    run = await _run(call)
    body = await call.read_json()
    points = body.get("points") if isinstance(body, dict) else None
    if not isinstance(points, list) or len(points) > _MOST_POINTS:
        raise Refusal(400, f"points must be a list of at most {_MOST_POINTS} objects.")
    checked = [_checked(number, point) for number, point in enumerate(points)]
    await call.site.in_pool(call.site.ledger.workshop.metrics.add, run.run_id, checked)
    return reply({})


async def _run(call: Call) -> Any:
    return await call.site.in_pool(call.site.store.run, call.parameter("run_id"), call.owner)


def _checked(number: int, point: Any) -> dict[str, float]:
    if not isinstance(point, dict) or not 1 <= len(point) <= _MOST_NAMES:
        raise Refusal(
            400, f"points[{number}] must be an object with 1 to {_MOST_NAMES} numbers by name."
        )
    for name, value in point.items():
        if not name or len(name) > _LONGEST_NAME or not name.isprintable():
            raise Refusal(
                400,
                f"points[{number}]: a metric's name must be 1 to {_LONGEST_NAME} printable "
                f"characters, got {shown(name)}.",
            )
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or abs(value) > 1e300 or not math.isfinite(value):
            raise Refusal(
                400, f"points[{number}].{name} must be a finite number, got {shown(value)}."
            )
    return point


ENDPOINTS: list[tuple[str, str, Any]] = [
    ("GET", "runs/{run_id}/metrics", read_metrics),
    ("POST", "runs/{run_id}/metrics", report_metrics),
]
