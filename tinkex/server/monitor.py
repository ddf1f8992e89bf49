"""Metrics of the server for Prometheus: `/metrics`.

Labels are base models, operations, endpoints and outcomes: no user data, and a bounded number of
values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, exposition
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tinkex import types
from tinkex.server.live import Work

#: Upper bounds of histograms, in seconds.
_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0)
CONTENT_TYPE = exposition.CONTENT_TYPE_PLAIN_1_0_0

#: Gauges: name -> (description, function that returns the current value).
Gauges = Mapping[str, tuple[str, Callable[[], float]]]


class Monitor:
    """The counters of one server. Safe to use from any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._operations = self._counter(
            "tinkex_operations", "Operations that have ended.", "operation", "base_model", "outcome"
        )
        self._running = self._histogram(
            "tinkex_operation_seconds", "From the start of an operation to its end.", "operation"
        )
        self._waiting = self._histogram(
            "tinkex_operation_wait_seconds", "From its acceptance to its start.", "operation"
        )
        self._tokens = self._counter(
            "tinkex_tokens", "Tokens computed: trained on, or sampled.", "kind", "base_model"
        )
        self._samples = self._counter(
            "tinkex_sample_requests", "Sample requests that have ended.", "base_model", "outcome"
        )
        self._sampling = self._histogram(
            "tinkex_sample_seconds", "From the acceptance of a sample request to its end."
        )
        self._requests = self._counter(
            "tinkex_http_requests", "HTTP requests answered.", "endpoint", "status"
        )
        self._answering = self._histogram(
            "tinkex_http_request_seconds", "Until the head of the answer.", "endpoint"
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(name, text, labels, registry=self._registry, buckets=_SECONDS)

    def watch(self, gauges: Gauges) -> None:
        """Add gauges to the report."""
        self._registry.register(_Gauges(gauges))

    def operation_ended(self, work: Work, started: float, outcome: str) -> None:
        """Count an operation. *started* is a time.monotonic() value."""
        self._operations.labels(work.name, work.model.base_model, outcome).inc()
        self._running.labels(work.name).observe(time.monotonic() - started)
        self._waiting.labels(work.name).observe(started - work.accepted_at)

    def trained(self, base_model: str, tokens: int) -> None:
        self._tokens.labels("trained", base_model).inc(tokens)

    def sample_ended(self, base_model: str, accepted_at: float, outcome: Any) -> None:
        """Count a sample request by its outcome: a response, or an exception."""
        is_done = isinstance(outcome, types.SampleResponse)
        self._samples.labels(base_model, "done" if is_done else "failed").inc()
        self._sampling.observe(time.monotonic() - accepted_at)
        if is_done:
            tokens = sum(len(sequence.tokens_np) for sequence in outcome.sequences)
            self._tokens.labels("sampled", base_model).inc(tokens)

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """Count an HTTP request."""
        self._requests.labels(endpoint, str(status)).inc()
        self._answering.labels(endpoint).observe(seconds)

    def report(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return exposition.generate_latest(self._registry)


class _Gauges(Collector):
    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, (text, value) in self._gauges.items():
            yield GaugeMetricFamily(name, text, value=value())
