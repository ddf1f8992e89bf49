"""OpenTelemetry on the server: operations join the trace of the client that requested them.

Spans are recorded if the package is installed and a provider is set up, as by
`opentelemetry-instrument tinkex serve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from tinkex._version import __version__

try:
    from opentelemetry import propagate, trace
except ImportError:  # of the extra `otel`
    propagate = trace = None  # type: ignore[assignment]

#: The trace that the request being handled belongs to.
_incoming: ContextVar[Any] = ContextVar("incoming", default=None)


def enter(headers: Mapping[str, str]) -> None:
    """Store the trace of a request (from `traceparent`) for the operations that it starts."""
    if trace is not None and "traceparent" in headers:
        _incoming.set(propagate.extract(dict(headers)))


def current() -> Any:
    """The trace of the request being handled, or None."""
    return _incoming.get()


def begin(name: str, parent: Any, model_id: str, seq: int) -> Any:
    """Start the span of an operation in the trace *parent*; None if spans are not recorded."""
    if trace is None:
        return None
    tracer = trace.get_tracer("tinkex.server", __version__)
    span = tracer.start_span(
        f"tinkex.server.{name}",
        context=parent,
        kind=trace.SpanKind.SERVER,
        attributes={"tinkex.model": model_id, "tinkex.seq_id": seq},
    )
    return span if span.is_recording() else None


def end(span: Any, exc: BaseException | None = None) -> None:
    """End a span started by `begin`."""
    if span is None:
        return
    if exc is not None:
        span.record_exception(exc)
        span.set_status(trace.Status(trace.StatusCode.ERROR, type(exc).__name__))
    span.end()
