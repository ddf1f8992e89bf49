"""What a checkup finds: on a sound server, on broken ones, and on this machine. It always ends."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import attrs
import pytest

from tests.support.fake_engine import FakeEngine
from tinkex import cli, diagnostics, errors
from tinkex.runtime import embedded
from tinkex.server.app import LocalServer
from tinkex.server.auth import Keys

CERTIFICATE = Path(__file__).parent / "support" / "localhost.pem"

STEPS = "dns tcp tls http clock api key dialect sessions training sampling stored models".split()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("TINKER_API_KEY", "TINKER_BASE_URL", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(diagnostics, "_PATIENCE", attrs.evolve(diagnostics._PATIENCE, request=0.5))
    monkeypatch.setattr(diagnostics, "CONNECT", 0.5)


@pytest.fixture
def served(tmp_path):
    """Starts the real server, on an engine of toy numbers."""
    running = []

    def served(**options):
        server = LocalServer(tmp_path / "home", engine=FakeEngine, **options)
        server.start()
        running.append(server)
        return server

    yield served
    for server in running:
        server.close()


@contextmanager
def odd_server(answers, tls=False):
    """A server that gives these answers: "METHOD path" -> (status, body[, headers]); else 404."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.split("?")[0].removeprefix("/api/v1/")
            status, body, *more = answers.get(
                f"{self.command} {path}", (404, {"detail": "Not Found"})
            )
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            kind = "text/html" if isinstance(body, bytes) else "application/json"
            self.send_response_only(status)
            headers = {"Content-Type": kind, "Content-Length": str(len(content))}
            for name, value in {**headers, **(more[0] if more else {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *args: None  # clients that hang up are what we test
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"{'https' if tls else 'http'}://localhost:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


#: What is enough for the steps before the one that a test is about.
GOOD = {
    "GET healthz": (200, {"status": "ok"}),
    "POST client/config": (200, {}),
    "GET sessions": (200, {"sessions": []}),
}


def found(*arguments):
    return {finding.step: finding for finding in diagnostics.examine(*arguments)}


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


# A sound server


def test_on_a_sound_server_all_is_well(served):
    """And every step was taken, in order."""
    server = served()
    findings = found(server.url)

    assert STEPS == list(findings)
    assert {"ok"} == {finding.status for finding in findings.values()}
    assert ["tiny"] == findings["models"].details["models"]
    assert {"json": True, "protobuf": True} == findings["dialect"].details
    assert [] == [m for f in findings.values() for m in f.details.get("missing", [])]


def test_a_checkup_changes_nothing(served):
    """Not even a session is made: doctors may be asked as often as one likes."""
    server = served()
    found(server.url)

    assert ([], 0) == server.store.sessions("local", 10, 0)
    assert ([], 0) == server.store.runs("local", 10, 0)
    assert {} == server.ledger.workshop.bases


def test_a_dialect_that_is_not_taken_is_told(served):
    findings = found(served(dialect="json").url)

    assert {"json": True, "protobuf": False} == findings["dialect"].details
    assert "forward" in findings["training"].details["offered"]


# Before the server


def test_a_closed_port_is_clear_in_seconds():
    """The most usual case of all."""
    begun = time.monotonic()
    port = closed_port()
    tcp, not_tried = list(diagnostics.examine(f"http://127.0.0.1:{port}"))[1:]

    assert time.monotonic() - begun < 2
    assert ("tcp", "failed") == (tcp.step, tcp.status)
    assert f"nobody listens on 127.0.0.1:{port}: connection refused" == tcp.text
    assert "Is the server running, on this port?" in tcp.advice
    assert ("skipped", ", ".join(STEPS[2:])) == (not_tried.status, not_tried.text)


def test_a_name_that_does_not_resolve(monkeypatch):
    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    [dns, _] = diagnostics.examine("http://training.example")

    assert "training.example does not resolve: Name or service not known" == dns.text
    assert "spelled right" in dns.advice


def test_a_server_that_accepts_and_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        http = found(f"http://127.0.0.1:{silent.getsockname()[1]}")["http"]

    assert "failed" == http.status
    assert "no answer within" in http.text


def test_a_step_ends_whatever_it_meets(monkeypatch):
    """This server sends a byte now and then, so that no timeout of a socket ever ends it."""
    monkeypatch.setattr(diagnostics, "STEP", 0.7)
    ended = threading.Event()

    def drip(listener):
        connections = []
        listener.settimeout(0.05)
        while not ended.is_set():
            try:
                connections.append(listener.accept()[0])
            except TimeoutError:
                pass
            for connection in connections:
                try:
                    connection.send(b"H")
                except OSError:
                    pass  # it was hung up on
        for connection in connections:
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        http = found(f"http://127.0.0.1:{listener.getsockname()[1]}")["http"]
        ended.set()
        thread.join()

    assert "failed" == http.status


def test_a_proxy_of_the_environment_is_what_is_connected_to(monkeypatch):
    """And named, for nobody remembers it; without its password."""
    port = closed_port()
    monkeypatch.setenv("HTTP_PROXY", f"http://me:secret@127.0.0.1:{port}")
    tcp = found("http://training.example")["tcp"]

    assert f"nobody listens on 127.0.0.1:{port} (the proxy of the environment, for" in tcp.text
    assert "secret" not in tcp.text


def test_a_url_that_is_none():
    [finding] = diagnostics.examine("localhost:8000")

    assert ("settings", "failed") == (finding.step, finding.status)
    assert "give one like http://127.0.0.1:8000" in finding.text


# TLS


def test_a_certificate_that_nobody_vouches_for():
    with odd_server({}, tls=True) as url:
        tls = found(url)["tls"]

    assert "failed" == tls.status
    assert "self-signed" in tls.text or "self signed" in tls.text
    assert "REQUESTS_CA_BUNDLE" in tls.advice


def test_a_certificate_of_one_s_own_ca(monkeypatch):
    """Trusted as the client trusts it."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(CERTIFICATE))
    with odd_server(GOOD, tls=True) as url:
        findings = found(url)

    assert "TLSv1.3, certificate good until 2120-01-01" == findings["tls"].text
    assert "ok" == findings["http"].status


def test_a_certificate_of_another_host(monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(CERTIFICATE))
    with odd_server(GOOD, tls=True) as url:
        tls = found(url.replace("localhost", "127.0.0.1"))["tls"]

    assert "failed" == tls.status
    assert "127.0.0.1" in tls.text


def test_https_where_http_is_spoken():
    with odd_server(GOOD) as url:
        tls = found(url.replace("http:", "https:"))["tls"]

    assert ("failed", "Is it http:// rather than https://?") == (tls.status, tls.advice)


def test_a_certificate_that_is_about_to_end():
    end = time.strftime("%b %d %H:%M:%S %Y GMT", time.gmtime(time.time() + 86400))
    finding = diagnostics._of_certificate("TLSv1.3", {"notAfter": end})

    assert "warning" == finding.status


# HTTP and the API


@pytest.mark.parametrize(
    "answers, step, text, advice",
    [
        ({"GET healthz": (302, {}, {"Location": "https://new.test/x?token=1"})}, "http",
         "answered 302", "It redirects to https://new.test/x;"),
        ({"GET healthz": (503, {"error": "the engine does not run"})}, "http",
         "the engine does not run", ""),
        ({"GET healthz": (200, b"<html>"), "POST client/config": (200, b"<html>login</html>")},
         "api", "answered 200 with no JSON but b'<html>login", "login page"),
        ({"POST client/config": (500, {"error": "broken"})}, "api", "broken", ""),
    ],
)  # fmt: skip
def test_what_is_no_sound_server(answers, step, text, advice):
    """The first thing that is wrong is the last thing that is tried."""
    with odd_server(answers) as url:
        findings = found(url)

    assert "failed" == findings[step].status
    assert text in findings[step].text
    assert advice in findings[step].advice
    assert "not tried" == list(findings)[-1]


def test_a_web_server_that_is_no_training_server():
    with odd_server(
        {"GET healthz": (404, b"nothing here"), "POST client/config": (404, b"no")}
    ) as url:
        findings = found(url)

    assert "failed" == findings["api"].status


def test_clocks_that_differ():
    answers = {**GOOD, "GET healthz": (200, {}, {"Date": formatdate(time.time() - 600)})}
    with odd_server(answers) as url:
        clock = found(url)["clock"]

    assert "warning" == clock.status
    assert "behind this machine's" in clock.text
    assert abs(clock.details["skew_seconds"] + 600) < 10


def test_a_server_that_does_not_tell_its_time():
    with odd_server(GOOD) as url:
        assert "ok" == found(url)["clock"].status


# Keys


@pytest.fixture
def locked(served):
    return served(keys=lambda home: Keys.of_users(["right-key"], home.secret())).url


def test_a_key_that_is_missing(locked):
    key = found(locked)["key"]

    assert "failed" == key.status
    assert "the server wants one" in key.text
    assert "TINKER_API_KEY" in key.advice


def test_a_key_that_is_wrong_is_named_by_where_it_is_from_and_never_shown(locked, monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", "wrong-key")
    findings = found(locked)

    assert findings["key"].text.startswith("refused (from TINKER_API_KEY): ")
    assert "wrong-key" not in str(findings)


def test_the_right_key(locked):
    findings = found(locked, "right-key")

    assert ("ok", "the one given (by sessions)") == (findings["key"].status, findings["key"].text)
    assert "ok" == findings["training"].status
    assert "right-key" not in str(findings)


def test_a_key_that_may_not(monkeypatch):
    answers = {**GOOD, "GET sessions": (403, {"error": "not for trial accounts"})}
    with odd_server(answers) as url:
        key = found(url, "k")["key"]

    assert "failed" == key.status
    assert "not for trial accounts" in key.text


def test_where_nothing_can_be_looked_up_the_key_is_not_tried():
    answers = {key: value for key, value in GOOD.items() if key != "GET sessions"}
    with odd_server(answers) as url:
        key = found(url, "k")["key"]

    assert "ok" == key.status
    assert "not tried" in key.text


# What is offered


def test_what_a_server_lacks_is_named_with_what_it_costs():
    refused = (422, {"detail": "a body is wanted"})
    answers = {**GOOD, "POST create_session": refused, "POST retrieve_future": refused,
               "POST forward_backward": (415, {"detail": "no"})}  # fmt: skip
    with odd_server(answers) as url:
        findings = found(url)

    assert ["create_session", "retrieve_future"] == findings["sessions"].details["offered"]
    assert "session_heartbeat" in findings["sessions"].details["missing"]
    assert "warning" == findings["sessions"].status
    assert "It cannot train." == findings["dialect"].advice
    assert "Nothing of this works without create_model, optim_step." == findings["training"].advice
    assert ["GET sessions"] == findings["stored"].details["offered"]
    assert "warning" == findings["models"].status


def test_without_sessions_nothing_works():
    with odd_server(GOOD) as url:
        sessions = found(url)["sessions"]

    assert "failed" == sessions.status
    assert "Nothing of this works without create_session, retrieve_future." == sessions.advice


# This machine


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINKEX_HOME", str(tmp_path))
    return tmp_path


def test_extras_that_are_not_installed(home, monkeypatch):
    monkeypatch.setattr(embedded, "NEEDED", ("attrs", "no_such_package"))
    [python, extras, _] = diagnostics.examine()

    assert "ok" == python.status
    assert "the embedded engine needs what is not installed: no_such_package" == extras.text
    assert "pip install 'tinkex[local]'" in extras.advice


def test_a_home_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TINKEX_HOME", str(tmp_path / "file"))
    finding = found()["home"]

    assert "failed" == finding.status
    assert "Set TINKEX_HOME" in finding.advice


@pytest.mark.parametrize("free, status", [(1 << 30, "warning"), (1 << 20, "failed")])
def test_a_disk_that_is_nearly_full(home, monkeypatch, free, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    monkeypatch.setattr(embedded, "acquire", lambda: pytest.fail("not on a full disk"))
    if status == "warning":
        monkeypatch.setattr(embedded, "acquire", no_engine)

    assert status == found()["disk"].status


def no_engine():
    raise errors.EngineError("the embedded engine ended with status 1 before it was ready")


def test_an_engine_that_does_not_start(home, monkeypatch):
    monkeypatch.setattr(embedded, "acquire", no_engine)
    engine = found()["engine"]

    assert "failed" == engine.status
    assert "ended with status 1" in engine.text


def test_the_engine_is_checked_like_any_server_and_given_back(home, served, monkeypatch):
    server = served()
    running = type("Running", (), {"base_url": server.url, "api_key": ""})
    released = []
    monkeypatch.setattr(embedded, "acquire", lambda: running)
    monkeypatch.setattr(embedded, "release", released.append)
    findings = found()

    assert ["python", "extras", "home", "disk", "engine", *STEPS] == list(findings)
    assert {"ok"} == {f.status for f in findings.values() if f.step != "disk"}
    assert [running] == released


# How it is shown


def test_doctor_shows_a_line_for_each_step_and_exits_0(served, capsys):
    assert 0 == cli.main(["doctor", served().url])
    out, err = capsys.readouterr()

    assert "" == err
    assert "ok       tcp        127.0.0.1:" in out
    assert max(map(len, out.splitlines())) <= 100


def test_doctor_exits_1_and_says_what_to_do(capsys):
    assert 1 == cli.main(["doctor", f"http://127.0.0.1:{closed_port()}"])
    out, _ = capsys.readouterr()

    assert "failed   tcp        nobody listens on" in out
    assert "-> Is the server running, on this port?" in out


def test_doctor_in_json(capsys):
    assert 1 == cli.main(["doctor", f"http://127.0.0.1:{closed_port()}", "--format", "json"])
    out, err = capsys.readouterr()
    told = json.loads(out)

    assert (False, "") == (told["ok"], err)
    assert ["ok", "failed", "skipped"] == [step["status"] for step in told["steps"]]
