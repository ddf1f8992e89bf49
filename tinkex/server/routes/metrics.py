"""The metrics of a training run: measured by the server, and reported by its client."""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import Response

from tinkex import types, wire
from tinkex.server.http_errors import Refusal, shown
from tinkex.server.request_context import Call, reply

#: Limits of one report.
_MOST_SAMPLES = 100
_MOST_POINTS, _MOST_NAMES, _LONGEST_NAME = 1000, 64, 64


async def read_metrics(call: Call) -> Response:
    """Points after the number in "next" of an earlier response."""
    run = await _run(call)
    after = call.number("after", 0, 2**53)
    points, following = await call.site.in_pool(
        call.site.ledger.workshop.metrics.read, run.run_id, after
    )
    samples = await call.site.in_pool(call.site.ledger.workshop.metrics.samples, run.run_id)
    return reply({"points": points, "next": following, "samples": samples})


async def report_metrics(call: Call) -> Response:
    """Add the client's {"points": [{"step": 3, "held_out_loss": 2.5}, ...]} and "samples"."""
    run = await _run(call)
    body = await call.read_json()
    points = body.get("points") if isinstance(body, dict) else None
    if not isinstance(points, list) or len(points) > _MOST_POINTS:
        raise Refusal(400, f"points must be a list of at most {_MOST_POINTS} objects.")
    checked = [_checked(number, point) for number, point in enumerate(points)]
    samples = _samples(body.get("samples", []))
    metrics = call.site.ledger.workshop.metrics
    await call.site.in_pool(metrics.add, run.run_id, checked)
    await call.site.in_pool(metrics.add_samples, run.run_id, samples)
    return reply({})


def _samples(given: Any) -> list[types.RunSample]:
    if not isinstance(given, list) or len(given) > _MOST_SAMPLES:
        raise Refusal(400, f"samples must be a list of at most {_MOST_SAMPLES} objects.")
    read = wire.from_json(types.ReportMetricsRequest, {"points": [], "samples": given}).samples
    for number, sample in enumerate(read):
        if abs(sample.step) > 2**53:
            raise Refusal(400, f"samples[{number}].step is not below 2**53.")
    return read


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
