"""OpenTelemetry, if the program uses it: a span for each operation, its exchanges, and metrics.

Nothing is imported here: a program that uses tracing has imported OpenTelemetry and set up a
provider. Otherwise every function returns after a look-up in sys.modules.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import requests

from tinkex._version import __version__
from tinkex.futures import Progress

#: The meter provider, and the instruments created with it.
_instruments: tuple[Any, dict[str, Any]] = (None, {})


def is_loaded() -> bool:
    """True if the program has imported OpenTelemetry's API."""
    return "opentelemetry.trace" in sys.modules or "opentelemetry.metrics" in sys.modules


def begin(progress: Progress, name: str) -> None:
    """Start the span of an operation; its parent is the caller's current span."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return
    attributes: dict[str, Any] = {"tinkex.operation": name, "tinkex.model": progress.model}
    if progress.tokens:
        attributes["tinkex.tokens"] = progress.tokens
    span = trace.get_tracer("tinkex", __version__).start_span(
        f"tinkex.{name}", kind=trace.SpanKind.CLIENT, attributes=attributes
    )
    if span.is_recording():  # False without a provider, or if not sampled
        progress.span = span


def event(progress: Progress, name: str, value: str) -> None:
    """Add an event to an operation's span."""
    if progress.span is not None:
        progress.span.add_event(f"tinkex.{name}", {f"tinkex.{name}": value})


def end(progress: Progress, name: str, outcome: str, exc: BaseException | None) -> None:
    """End an operation's span, and count it."""
    span = progress.span
    if span is not None:
        if progress.seq_ids:
            ids = list(progress.seq_ids)
            span.set_attribute("tinkex.seq_id", ids[0] if len(ids) == 1 else ids)
        if progress.request_ids:
            span.set_attribute("tinkex.request_id", ",".join(progress.request_ids))
        span.set_attribute("tinkex.retries", progress.retries)
        span.set_attribute("tinkex.polls", progress.polls)
        if progress.queue_state:
            span.set_attribute("tinkex.queue_state", progress.queue_state)
        if exc is not None:
            trace = sys.modules["opentelemetry.trace"]
            span.record_exception(exc)
            span.set_status(trace.Status(trace.StatusCode.ERROR, type(exc).__name__))
        span.end()
    _measure(progress, name, outcome)


@contextmanager
def exchange(
    progress: Progress, method: str, url: str, headers: MutableMapping[str, str]
) -> Iterator[Any]:
    """A child span for one HTTP exchange of an operation; adds `traceparent` to *headers*.

    If opentelemetry-instrumentation-requests is active, it creates the child span; here only the
    parent is set. Yields a function to call with the response's status.
    """
    from opentelemetry import context, propagate, trace  # loaded already: there is a span

    token = context.attach(trace.set_span_in_context(progress.span))
    try:
        if getattr(requests.Session.send, "opentelemetry_instrumentation_requests_applied", False):
            yield lambda status: None
            return
        attributes = {"http.request.method": method, "url.full": url.split("?")[0]}
        tracer = trace.get_tracer("tinkex", __version__)
        with tracer.start_as_current_span(
            method, kind=trace.SpanKind.CLIENT, attributes=attributes
        ) as span:
            propagate.inject(headers)
            yield lambda status: span.set_attribute("http.response.status_code", status)
    finally:
        context.detach(token)


def _measure(progress: Progress, name: str, outcome: str) -> None:
    metrics = sys.modules.get("opentelemetry.metrics")
    if metrics is None:
        return
    instruments = _instruments_of(metrics)
    attributes = {"tinkex.operation": name}
    instruments["operations"].add(1, {**attributes, "tinkex.outcome": outcome})
    if progress.tokens:
        instruments["tokens"].add(progress.tokens, attributes)
    instruments["duration"].record(time.monotonic() - progress.began, attributes)
    if progress.accepted is not None:
        instruments["queue_time"].record(progress.accepted - progress.began, attributes)


def _instruments_of(metrics: Any) -> dict[str, Any]:
    """The instruments, created once for each meter provider."""
    global _instruments
    provider = metrics.get_meter_provider()
    if _instruments[0] is not provider:
        meter = metrics.get_meter("tinkex", __version__)
        made = {
            "operations": meter.create_counter(
                "tinkex.operations", "{operation}", "Operations that were resolved"
            ),
            "tokens": meter.create_counter("tinkex.tokens", "{token}", "Tokens sent in operations"),
            "duration": meter.create_histogram(
                "tinkex.operation.duration", "s", "From the call of an operation to its result"
            ),
            "queue_time": meter.create_histogram(
                "tinkex.operation.queue_time",
                "s",
                "From the call of an operation until the server accepts it",
            ),
        }
        _instruments = (provider, made)
    return _instruments[1]
