"""
All traffic goes through a requests.Session: what works with requests works with tinkex.

The packages are the real ones, as their users install them.
"""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import requests
import responses
import urllib3

import tinkex
from tests.support.fake_server import URL, FakeServer, answer, datum, plugged_in, status
from tests.support.served import served
from tinkex import errors, types
from tinkex.config import Config
from tinkex.runtime import http_adapter
from tinkex.runtime.http_adapter import KeptConnections, is_plain
from tinkex.runtime.transport import Transport

ADAM = types.AdamParams()


@pytest.fixture
def server():
    return FakeServer()


@pytest.fixture
def url(server, monkeypatch):
    """The address of *server*, over a real socket."""
    for name in ("TINKER_API_KEY", "TINKER_BASE_URL", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    with served(server) as address:
        yield address


@pytest.fixture
def mounted(server):
    """A user's session that reaches *server* through an adapter of its own."""
    with requests.Session() as session:
        session.mount(URL, server)
        yield session


def train(service):
    training = service.create_lora_training_client("tiny")
    training.forward_backward([datum()], "cross_entropy")
    return training.optim_step(ADAM).result(20)


# The user's session.


def test_all_requests_go_through_the_session_of_the_user(server, mounted):
    """Its adapter is used; it stays open when the client closes."""
    sent = []
    original = mounted.send
    mounted.send = lambda request, **kwargs: sent.append(request.url) or original(request, **kwargs)

    with tinkex.ServiceClient(URL, session=mounted) as service:
        train(service)

    assert len(sent) == len(server.requests) >= 7
    assert 200 == mounted.get(f"{URL}/api/v1/healthz").status_code


def test_what_is_set_on_the_session_is_used(server, mounted):
    """Headers, cookies, auth and hooks, read with each request: they may change."""
    answers = []
    mounted.headers["X-Team"] = "blue"
    mounted.headers["Content-Type"] = "text/plain"
    mounted.auth = ("ada", "pass")
    mounted.cookies.set("sticky", "node-7")
    mounted.hooks["response"].append(lambda response, **_: answers.append(response.status_code))

    with tinkex.ServiceClient(URL, session=mounted) as service:
        service.health()
        mounted.headers["X-Team"] = "red"
        service.health()

    first, second = server.seen("healthz")
    assert ("blue", "red") == (first.headers["X-Team"], second.headers["X-Team"])
    assert first.headers["Authorization"].startswith("Basic ")
    assert "sticky=node-7" == first.headers["Cookie"]
    assert len(answers) == len(server.requests)
    created = server.seen("create_session")[0]
    assert "application/json" == created.headers["Content-Type"], "the protocol's own headers win"
    assert created.headers["User-Agent"].startswith("tinkex/")


def test_a_user_agent_of_the_session_wins(server, mounted):
    mounted.headers["User-Agent"] = "pipeline/1"

    with tinkex.ServiceClient(URL, session=mounted):
        assert "pipeline/1" == server.requests[0].headers["User-Agent"]


def test_a_session_with_default_adapters_gets_ours_for_the_server_alone(url):
    """requests keeps ten connections and warns when there are more; we need hundreds."""
    with requests.Session() as session, tinkex.ServiceClient(url, session=session):
        assert isinstance(session.get_adapter(f"{url}/api/v1/x"), KeptConnections)
        assert is_plain(session.get_adapter("http://elsewhere/"))
        assert is_plain(session.get_adapter(f"{url}0/api"))


@pytest.mark.parametrize(
    "options", [{"max_retries": 3}, {"pool_maxsize": 50}, {"pool_block": True}], ids=str
)
def test_an_adapter_that_the_user_set_up_stays(url, options):
    adapter = requests.adapters.HTTPAdapter(**options)
    with requests.Session() as session:
        session.mount("http://", adapter)
        with tinkex.ServiceClient(url, session=session) as service:
            service.health()

        assert adapter is session.get_adapter(f"{url}/api")


def test_foreign_urls_get_neither_auth_nor_key(server, mounted):
    """An archive may be anywhere; the session's auth is for the server."""
    server.files["https://files.example/a.tar"] = b"archive"
    mounted.mount("https://files.example", server)
    mounted.auth = ("ada", "pass")
    way = Transport(Config(URL, "tml-key", default_headers={"X-Secret": "s"}, session=mounted))

    with way.open_stream("GET", "https://files.example/a.tar") as response:
        assert [b"archive"] == list(response.pieces(100))

    headers = server.requests[-1].headers
    assert not {"Authorization", "X-API-Key", "X-Secret"} & set(headers)


# Set up without a session.


def test_headers_and_hooks_can_be_set_without_a_session(server, monkeypatch):
    plugged_in(monkeypatch, server)
    seen = []
    hooks = {"response": lambda response, **_: seen.append(response.url)}

    with tinkex.ServiceClient(default_headers={"X-Team": "blue"}, hooks=hooks) as service:
        service.health()

    assert {"blue"} == {s.headers["X-Team"] for s in server.requests}
    assert f"{URL}/api/v1/healthz" in seen


def test_proxies_can_be_set(url):
    """The proxy is asked for the server's full address."""
    with served(FakeServer()) as proxy:
        patience = tinkex.Patience(first_contact=1.0)
        with pytest.raises(errors.APIStatusError, match=r"http://training\.example"):
            tinkex.ServiceClient(
                "http://training.example", proxies={"http": proxy}, patience=patience
            )


def test_verify_reaches_the_adapter(server, monkeypatch):
    plugged_in(monkeypatch, server)
    given = []
    original = server.send
    server.send = lambda request, **kwargs: (
        given.append(kwargs["verify"]) or original(request, **kwargs)
    )

    with tinkex.ServiceClient(verify="/ca.pem"):
        assert {"/ca.pem"} == set(given)


def test_a_hook_that_raises_for_the_status_is_an_error_status(server, mounted):
    """`raise_for_status` in a hook is a habit of many."""
    mounted.hooks["response"].append(lambda response, **_: response.raise_for_status())
    with tinkex.ServiceClient(URL, session=mounted) as service:
        server.script("healthz", status(503, {"error": "busy"}))
        service.health()  # tried again, as without the hook

        server.script("healthz", status(403, {"error": "not for you"}))
        with pytest.raises(errors.PermissionDeniedError, match="not for you"):
            service.health()


def test_redirects_are_not_followed(server, mounted):
    """They would take the key along; the error names where to."""
    with tinkex.ServiceClient(URL, "key", session=mounted) as service:
        server.script("healthz", status(307, Location="https://elsewhere.example/x"))
        with pytest.raises(
            errors.APIStatusError, match=r"redirected to https://elsewhere\.example"
        ):
            service.health()

    assert all("elsewhere" not in seen.path for seen in server.requests)


def test_cookies_are_kept_between_requests(server, url):
    """Load balancers that keep a client at one machine use them."""
    server.script("healthz", answer({"status": "ok"}, **{"Set-Cookie": "lb=7; Path=/"}))
    with tinkex.ServiceClient(url) as service:
        service.health()
        service.health()

    first, second = server.seen("healthz")
    assert (None, "lb=7") == (first.headers.get("Cookie"), second.headers.get("Cookie"))


# Instrumentation and mocks.


def test_opentelemetry_instrumentation_sees_each_exchange(server, url):
    """One span for each exchange, and its `traceparent` is in the request."""
    instrumentation = pytest.importorskip("opentelemetry.instrumentation.requests")
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = trace.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    instrumentor = instrumentation.RequestsInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    try:
        with tinkex.ServiceClient(url) as service:
            train(service)
    finally:
        instrumentor.uninstrument()

    spans = exporter.get_finished_spans()
    on_the_wire = {seen.headers["traceparent"].split("-")[2] for seen in server.requests}
    assert len(server.requests) == len(spans)
    assert {f"{span.context.span_id:016x}" for span in spans} == on_the_wire


def test_requests_mock_intercepts(monkeypatch):
    """No name is looked up and no socket opened."""
    requests_mock = pytest.importorskip("requests_mock")
    monkeypatch.setenv("TINKER_BASE_URL", "http://nowhere.invalid")
    api = "http://nowhere.invalid/api/v1"
    with requests_mock.Mocker() as mock:
        mock.post(f"{api}/client/config", json={})
        mock.post(f"{api}/create_session", json={"session_id": "s9"})
        mock.post(f"{api}/sessions/s9/finish", json={})
        mock.get(f"{api}/healthz", json={"status": "ok"})
        with tinkex.ServiceClient() as service:
            assert "s9" == service.session_id
            assert "ok" == service.health().status

        assert "healthz" in {request.path.split("/")[-1] for request in mock.request_history}


def test_vcrpy_records_and_replays(server, url, tmp_path):
    """The second time, no server is there."""
    vcr = pytest.importorskip("vcr")
    recorder = vcr.VCR(match_on=["method", "path"])
    cassette = str(tmp_path / "cassette.yaml")

    def losses():
        with tinkex.ServiceClient(url) as service:
            training = service.create_lora_training_client("tiny")
            loss = training.forward_backward([datum(1, 2)], "cross_entropy").result(20).loss
            training.optim_step(ADAM).result(20)
            return loss

    with recorder.use_cassette(cassette, record_mode="once"):
        recorded = losses()
    asked = len(server.requests)
    with recorder.use_cassette(cassette, record_mode="none") as replayed:
        assert recorded == losses()

    assert asked == len(server.requests) == replayed.play_count
    assert http_adapter.quick_path_works(), "again, after the cassette"


def test_responses_intercepts(monkeypatch):
    monkeypatch.setenv("TINKER_BASE_URL", "http://nowhere.invalid")
    api = "http://nowhere.invalid/api/v1"
    with responses.RequestsMock() as mock:
        mock.post(f"{api}/client/config", json={})
        mock.get(f"{api}/sessions/s0", json={"training_run_ids": ["r1"]})
        with tinkex.RestClient() as rest:
            assert ["r1"] == rest.get_session("s0").training_run_ids


# The quick path and its self-test.


def test_the_quick_path_works_with_the_versions_that_are_installed():
    assert http_adapter.quick_path_works()


BROKEN = {
    "no _get_conn": "del urllib3.HTTPConnectionPool._get_conn",
    "no _put_conn": "del urllib3.HTTPConnectionPool._put_conn",
    "another _get_conn": "urllib3.HTTPConnectionPool._get_conn = lambda self: 1 / 0",
    "content elsewhere": "requests.Response.content = property(lambda self: self._elsewhere)",
}

PROGRAM = """
import requests, sys, urllib3
pool, response = urllib3.HTTPConnectionPool, requests.Response
original = pool._get_conn, pool._put_conn, response.content
{broken}
from tinkex.runtime import http_adapter
assert not http_adapter.quick_path_works()
pool._get_conn, pool._put_conn, response.content = original
with requests.Session() as session:
    session.mount("http://", http_adapter.KeptConnections())
    print(session.get(sys.argv[1] + "/api/v1/healthz").json()["status"])
"""


@pytest.mark.parametrize("broken", BROKEN)
def test_if_the_self_test_fails_the_usual_way_is_taken(url, broken):
    """Another version of urllib3 or requests may have other private names."""
    program = PROGRAM.format(broken=BROKEN[broken])
    done = subprocess.run([sys.executable, "-c", program, url], capture_output=True, text=True)

    assert "ok" == done.stdout.strip(), done.stderr


def test_connections_of_other_classes_take_the_usual_way(url, monkeypatch):
    """A mock's connection may have no socket at all."""

    class Recorded(urllib3.connection.HTTPConnection):
        """As a mock would do it: a subclass, in a module of its own."""

    with requests.Session() as session:
        session.mount("http://", KeptConnections())  # made before the mock is there
        monkeypatch.setattr(urllib3.HTTPConnectionPool, "ConnectionCls", Recorded)
        taken = []
        monkeypatch.setattr(http_adapter, "_write", lambda *args: taken.append(args))

        assert 200 == session.get(f"{url}/api/v1/healthz").status_code
        assert [] == taken


def test_no_pool_warns_of_discarded_connections(url, caplog):
    """50 requests at a time through a session with requests' own adapters."""
    caplog.set_level(logging.WARNING)
    with requests.Session() as session, tinkex.ServiceClient(url, session=session) as service:
        sampler = service.create_sampling_client(base_model="tiny")
        assert 50 == sum(1 for _ in sampler.sample_many([[1, 2]] * 50, max_tokens=1))

    assert [] == [record for record in caplog.records if record.name.startswith("urllib3")]
