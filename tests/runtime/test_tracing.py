"""Spans and metrics of operations, by the real OpenTelemetry SDK."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.fake_server import FakeServer, datum, session, status, training, try_again
from tests.support.served import served
from tinkex import errors, types
from tinkex.runtime import tracing
from tinkex.sampling import SamplingClient

trace = pytest.importorskip("opentelemetry.trace")
pytest.importorskip("opentelemetry.sdk.trace")
from opentelemetry import metrics  # noqa: E402
from opentelemetry.sdk.metrics import MeterProvider  # noqa: E402
from opentelemetry.sdk.metrics.export import InMemoryMetricReader  # noqa: E402
from opentelemetry.sdk.trace import TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (  # noqa: E402
    InMemorySpanExporter,
)

ADAM = types.AdamParams()
MODEL = "s0:train:0"


@pytest.fixture
def server():
    return FakeServer()


@pytest.fixture
def exporter(monkeypatch):
    """Spans that have ended; the provider is the program's global one."""
    made, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(made))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return made


@pytest.fixture
def reader(monkeypatch):
    """Metrics of the program's global meter provider."""
    made = InMemoryMetricReader()
    provider = MeterProvider([made])
    monkeypatch.setattr(metrics, "get_meter_provider", lambda: provider)
    monkeypatch.setattr(
        metrics, "get_meter", lambda name, version: provider.get_meter(name, version)
    )
    return made


def spans_of(exporter):
    """(operations by name, their exchanges)."""
    spans = exporter.get_finished_spans()
    operations = {span.name: span for span in spans if span.name.startswith("tinkex.")}
    return operations, [span for span in spans if not span.name.startswith("tinkex.")]


def test_an_operation_is_a_span_from_call_to_result(server, exporter):
    """With what the server said of it; the caller's span is its parent."""
    server.script("forward_backward", status(503, {"error": "busy"}))
    server.script("retrieve_future", try_again("paused_capacity"))
    with training(server) as client, trace.get_tracer("test").start_as_current_span("mine") as mine:
        client.forward_backward([datum(1, 2, 3)], "cross_entropy").result(10)

    operations, _ = spans_of(exporter)
    span = operations["tinkex.forward_backward"]
    assert mine.get_span_context().span_id == span.parent.span_id
    request_id = span.attributes["tinkex.request_id"]
    assert {
        "tinkex.operation": "forward_backward",
        "tinkex.model": MODEL,
        "tinkex.tokens": 3,
        "tinkex.seq_id": 1,
        "tinkex.request_id": request_id,
        "tinkex.retries": 1,
        "tinkex.polls": 1,
        "tinkex.queue_state": "paused_capacity",
    } == dict(span.attributes)
    assert request_id
    assert ["tinkex.queue_state"] == [event.name for event in span.events]


def test_exchanges_are_children_and_carry_the_trace(server, exporter):
    """The refused submit, the submit and the poll; each with its `traceparent` on the wire."""
    server.script("optim_step", status(503, {"error": "busy"}))
    with training(server) as client:
        client.optim_step(ADAM).result(10)

    operations, exchanges = spans_of(exporter)
    parent = operations["tinkex.optim_step"].context
    assert {parent.span_id} == {span.parent.span_id for span in exchanges}
    statuses = [span.attributes["http.response.status_code"] for span in exchanges]
    assert [503, 200, 200] == statuses
    sent = [seen.headers["traceparent"].split("-")[1:3] for seen in server.seen("optim_step")]
    ids = [(span.context.trace_id, span.context.span_id) for span in exchanges[:2]]
    assert [[f"{trace_id:032x}", f"{span_id:016x}"] for trace_id, span_id in ids] == sent


def test_with_the_instrumentation_of_requests_there_is_one_span_for_each_exchange(server, exporter):
    instrumentation = pytest.importorskip("opentelemetry.instrumentation.requests")
    instrumentor = instrumentation.RequestsInstrumentor()
    instrumentor.instrument(tracer_provider=trace.get_tracer_provider())
    try:
        with training(server) as client:
            client.optim_step(ADAM).result(10)
    finally:
        instrumentor.uninstrument()

    operations, exchanges = spans_of(exporter)
    parent = operations["tinkex.optim_step"].context
    of_operation = [s for s in exchanges if s.parent and s.parent.span_id == parent.span_id]
    assert len(server.seen("optim_step", "retrieve_future")) == len(of_operation)


def test_a_call_in_several_requests_is_one_span(exporter):
    server = FakeServer(features={"fwdbwd_max_chunk_len": 1})
    with training(server) as client:
        client.forward_backward([datum(1), datum(2)], "cross_entropy").result(10)

    operations, exchanges = spans_of(exporter)
    assert (1, 2) == operations["tinkex.forward_backward"].attributes["tinkex.seq_id"]
    assert 4 == len(exchanges)


def test_a_failed_operation_is_a_failed_span(server, exporter):
    server.results["optim_step"] = lambda seen: {"error": "no gradient", "category": "user"}
    with training(server) as client:
        future = client.optim_step(ADAM)
        assert isinstance(future.exception(10), errors.RequestFailedError)

    operations, _ = spans_of(exporter)
    span = operations["tinkex.optim_step"]
    assert trace.StatusCode.ERROR == span.status.status_code
    assert "exception" == span.events[-1].name


def test_a_sample_is_a_span(server, exporter):
    with session(server) as s, SamplingClient.create(s, base_model="tiny") as client:
        client.sample([1, 2, 3]).result(10)

    operations, _ = spans_of(exporter)
    assert 3 == operations["tinkex.sample"].attributes["tinkex.tokens"]


def test_operations_tokens_and_times_are_measured(server, reader):
    server.script("optim_step", status(400, {"error": "no"}))
    with training(server) as client:
        client.forward_backward([datum(1, 2, 3)], "cross_entropy").result(10)
        assert client.optim_step(ADAM).exception(10) is not None

    data = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
    measured = {metric.name: metric.data.data_points for metric in data}
    outcomes = {
        (p.attributes["tinkex.operation"], p.attributes["tinkex.outcome"]): p.value
        for p in measured["tinkex.operations"]
    }
    assert {("forward_backward", "done"): 1, ("optim_step", "failed"): 1} == outcomes
    assert [3] == [point.value for point in measured["tinkex.tokens"]]
    assert 2 == sum(point.count for point in measured["tinkex.operation.duration"])
    assert 1 == sum(point.count for point in measured["tinkex.operation.queue_time"])


def test_without_a_provider_there_is_no_span(server, monkeypatch):
    """The API alone, as libraries install it: nothing records."""
    monkeypatch.setattr(trace, "get_tracer_provider", trace.NoOpTracerProvider)
    with training(server) as client:
        future = client.optim_step(ADAM)
        future.result(10)

    assert future.progress.span is None
    assert "traceparent" not in server.seen("optim_step")[0].headers


def test_a_program_without_opentelemetry_does_not_import_it(server):
    """Nor does it need to be installed."""
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import tinkex, tinkex.runtime.tracing as tracing\n"
        "with tinkex.ServiceClient(sys.argv[1]) as service:\n"
        "    service.create_lora_training_client('tiny').save_state('a').result(20)\n"
        "print(tracing.is_loaded(), [m for m in sys.modules if m.startswith('opentelemetry.')])"
    )
    with served(server) as url:
        done = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True)

    assert "False []" == done.stdout.strip(), done.stderr


def test_the_api_is_looked_for_in_loaded_modules_only(monkeypatch):
    for name in ("opentelemetry.trace", "opentelemetry.metrics"):
        monkeypatch.delitem(sys.modules, name)

    assert not tracing.is_loaded()
