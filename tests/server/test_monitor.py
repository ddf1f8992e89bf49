"""`/metrics` as Prometheus reads it, and traces that reach from the client into the server."""

from __future__ import annotations

import threading

import pytest
import requests
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

import tinkex
from tests.support.fake_engine import FakeEngine
from tinkex import types
from tinkex.server.auth import Keys


def scraped(url, headers=None):
    """(name, labels as a sorted tuple) -> value."""
    answer = requests.get(f"{url}/metrics", headers=headers or {}, timeout=30)
    assert 200 == answer.status_code, answer.text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(samples, name, **labels):
    return samples.get((name, tuple(sorted(labels.items()))))


def test_operations_tokens_and_requests_are_counted(served):
    client = served.client
    model = client.model()
    client.result(client.forward_backward(model, 1, [1, 2, 3], [4]))
    client.result(client.forward_backward(model, 2, [1, 2]))
    found = scraped(served.server.url)

    done = {"operation": "ForwardBackward", "base_model": "tiny", "outcome": "done"}
    assert 2 == value(found, "tinkex_operations_total", **done)
    assert 6 == value(found, "tinkex_tokens_total", kind="trained", base_model="tiny")
    assert 2 == value(found, "tinkex_operation_seconds_count", operation="ForwardBackward")
    assert 2 == value(found, "tinkex_operation_wait_seconds_count", operation="ForwardBackward")
    request = {"endpoint": "forward_backward", "status": "200"}
    assert 2 == value(found, "tinkex_http_requests_total", **request)
    names = ("tinkex_engine_up", "tinkex_models", "tinkex_sessions")
    assert [1, 1, 1] == [value(found, name) for name in names]
    assert 1e6 < value(found, "process_resident_memory_bytes")


def test_failures_and_refusals_are_counted_as_such(served):
    client = served.client
    model = client.model()
    promise = client.forward_backward(model, 1, [666])  # the fake engine fails on it
    client.send("POST", "retrieve_future", {"request_id": promise["request_id"]})
    client.refused("optim_step", {"model_id": "none", "seq_id": 1, "adam_params": {}})
    found = scraped(served.server.url)

    failed = {"operation": "ForwardBackward", "base_model": "tiny", "outcome": "failed"}
    assert 1 == value(found, "tinkex_operations_total", **failed)
    assert 1 == value(found, "tinkex_http_requests_total", endpoint="optim_step", status="404")


def test_samples_are_counted(served):
    with tinkex.ServiceClient(served.server.url, "tml-any") as service:
        sampler = service.create_sampling_client(base_model="tiny")
        sampled = sampler.sample([1, 2, 3], max_tokens=5, num_samples=2).result()
    found = scraped(served.server.url)

    count = sum(len(sequence.tokens) for sequence in sampled.sequences)
    assert 1 == value(found, "tinkex_sample_requests_total", base_model="tiny", outcome="done")
    assert count == value(found, "tinkex_tokens_total", kind="sampled", base_model="tiny")
    assert 1 == value(found, "tinkex_sample_seconds_count")


def test_what_waits_is_seen(serve):
    gate = threading.Event()
    served = serve(engine=FakeEngine(gate=gate))
    model = served.client.model()
    promises = [served.client.forward_backward(model, seq, [1]) for seq in (1, 2, 3)]
    waiting = value(scraped(served.server.url), "tinkex_operations_queued")
    gate.set()
    for promise in promises:
        served.client.result(promise)

    assert 3 == waiting
    assert 0 == value(scraped(served.server.url), "tinkex_operations_queued")


def test_a_server_with_keys_tells_keys_alone_and_nothing_of_its_users(serve):
    served = serve(keys=lambda home: Keys.of_users(["tml-a", "tml-b"], b"secret"))
    model = served.client_with("tml-a").model()
    url = f"{served.server.url}/metrics"
    answer = requests.get(url, headers={"Authorization": "Bearer tml-b"}, timeout=30)

    assert 401 == requests.get(url, timeout=30).status_code
    assert 200 == answer.status_code
    assert model not in answer.text and "tml-" not in answer.text and "key-" not in answer.text


@pytest.fixture
def exporter(monkeypatch):
    """Spans that have ended, of the client and of the server in the same process."""
    made, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(made))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return made


def test_an_operation_on_the_server_belongs_to_the_trace_of_its_client(served, exporter):
    datum = types.Datum(types.ModelInput.from_ints([1, 2]), {"target_tokens": [1, 2]})
    cursed = types.Datum(types.ModelInput.from_ints([1]), {"target_tokens": [666]})
    with tinkex.ServiceClient(served.server.url, "tml-any") as service:
        training = service.create_lora_training_client("tiny")
        training.forward_backward([datum], "cross_entropy").result()
        with pytest.raises(tinkex.TinkexError):
            training.forward_backward([cursed], "cross_entropy").result()
    spans = exporter.get_finished_spans()
    theirs = {s.context.trace_id for s in spans if s.name == "tinkex.forward_backward"}
    ours = [s for s in spans if s.name == "tinkex.server.ForwardBackward"]

    assert theirs == {span.context.trace_id for span in ours} and 2 == len(theirs)
    assert [True, False] == [s.status.status_code is not trace.StatusCode.ERROR for s in ours]
    assert all(span.parent is not None and span.parent.is_remote for span in ours)
