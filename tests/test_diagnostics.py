"""What the doctor finds: on a sound server, on broken ones, and on this machine. It always ends."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import attrs
import pytest

from tests.support.fake_engine import FakeEngine
from tinkex import cli, diagnostics, errors
from tinkex.diagnostics import machine, network
from tinkex.runtime import embedded
from tinkex.server.app import LocalServer
from tinkex.server.auth import Keys

CERTIFICATE = Path(__file__).parent / "support" / "localhost.pem"

QUICK = diagnostics.Limits(connect=0.5, answer=0.5)

STEPS = "dns tcp tls http clock api key dialect sessions training sampling stored models".split()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("TINKER_API_KEY", "TINKER_BASE_URL", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def served(tmp_path):
    """Starts the real server, on a fake engine."""
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


#: Answers that let the steps before the tested one pass.
GOOD = {
    "GET healthz": (200, {"status": "ok"}),
    "POST client/config": (200, {}),
    "GET sessions": (200, {"sessions": []}),
}


def found(*arguments, **limits):
    findings = diagnostics.examine(*arguments, limits=attrs.evolve(QUICK, **limits))
    return {finding.step: finding for finding in findings}


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


# A sound server


def test_on_a_sound_server_every_step_is_ok(served):
    """And every step was taken, in order."""
    server = served()
    findings = found(server.url)

    assert STEPS == list(findings)
    assert {"ok"} == {finding.status for finding in findings.values()}
    assert ["tiny"] == findings["models"].details["models"]
    assert {"json": True, "protobuf": True} == findings["dialect"].details
    assert [] == [m for f in findings.values() for m in f.details.get("missing", [])]


def test_a_diagnosis_changes_nothing(served):
    """Not even a session is created, so the doctor may run at any time."""
    server = served()
    found(server.url)

    assert ([], 0) == server.store.sessions("local", 10, 0)
    assert ([], 0) == server.store.runs("local", 10, 0)
    assert {} == server.ledger.workshop.loader.bases


def test_a_dialect_that_is_refused_is_reported(served):
    findings = found(served(dialect="json").url)

    assert {"json": True, "protobuf": False} == findings["dialect"].details
    assert "forward" in findings["training"].details["offered"]


# Before the server


def test_a_closed_port_is_clear_in_seconds():
    """The most frequent case."""
    begun = time.monotonic()
    port = closed_port()
    tcp, not_tried = list(diagnostics.examine(f"http://127.0.0.1:{port}"))[1:]

    assert time.monotonic() - begun < 2
    assert ("tcp", "failed") == (tcp.step, tcp.status)
    assert f"nothing listens on 127.0.0.1:{port}: connection refused" == tcp.text
    assert "Check that the server is running" in tcp.advice
    assert ("skipped", ", ".join(STEPS[2:])) == (not_tried.status, not_tried.text)


def test_a_name_that_does_not_resolve(monkeypatch):
    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    dns = found("http://training.example")["dns"]

    assert "training.example does not resolve: Name or service not known" == dns.text
    assert "spelling" in dns.advice


def test_a_server_that_accepts_and_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        http = found(f"http://127.0.0.1:{silent.getsockname()[1]}")["http"]

    assert "failed" == http.status
    assert "no answer within" in http.text


def test_a_step_ends_in_time_whatever_happens():
    """This server sends a byte now and then, so that no timeout of a socket ever ends it."""
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
        http = found(f"http://127.0.0.1:{listener.getsockname()[1]}", step=0.7)["http"]
        ended.set()
        thread.join()

    assert "failed" == http.status


def test_a_proxy_of_the_environment_is_what_is_connected_to(monkeypatch):
    """And named without its password: users forget that they set one."""
    port = closed_port()
    monkeypatch.setenv("HTTP_PROXY", f"http://me:secret@127.0.0.1:{port}")
    tcp = found("http://training.example")["tcp"]

    assert f"nothing listens on 127.0.0.1:{port} (the proxy from the environment, on" in tcp.text
    assert "secret" not in tcp.text


def test_an_invalid_url():
    [finding] = diagnostics.examine("localhost:8000")

    assert ("settings", "failed") == (finding.step, finding.status)
    assert "give one like http://127.0.0.1:8000" in finding.text


# TLS


def test_a_certificate_without_a_known_ca():
    with odd_server({}, tls=True) as url:
        tls = found(url)["tls"]

    assert "failed" == tls.status
    assert "self-signed" in tls.text or "self signed" in tls.text
    assert "REQUESTS_CA_BUNDLE" in tls.advice


def test_a_certificate_of_a_private_ca(monkeypatch):
    """Trusted as the client trusts it."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(CERTIFICATE))
    with odd_server(GOOD, tls=True) as url:
        findings = found(url)

    assert "TLSv1.3, certificate valid until 2120-01-01" == findings["tls"].text
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

    assert "failed" == tls.status
    assert "Use http:// instead of https://" in tls.advice


def test_a_certificate_that_expires_soon():
    end = time.strftime("%b %d %H:%M:%S %Y GMT", time.gmtime(time.time() + 86400))
    finding = network.certificate_finding("TLSv1.3", {"notAfter": end})

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
         "api", "answered 200 with b'<html>login", "login page"),
        ({"POST client/config": (500, {"error": "broken"})}, "api", "broken", ""),
    ],
)  # fmt: skip
def test_a_broken_server(answers, step, text, advice):
    """The first step that fails is the last one that runs."""
    with odd_server(answers) as url:
        findings = found(url)

    assert "failed" == findings[step].status
    assert text in findings[step].text
    assert advice in findings[step].advice
    assert "not run" == list(findings)[-1]


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


def test_a_server_without_a_clock():
    with odd_server(GOOD) as url:
        assert "ok" == found(url)["clock"].status


# Keys


@pytest.fixture
def locked(served):
    return served(keys=lambda home: Keys.of_users(["right-key"], home.secret())).url


def test_a_key_that_is_missing(locked):
    key = found(locked)["key"]

    assert "failed" == key.status
    assert "the server requires a key" in key.text
    assert "TINKER_API_KEY" in key.advice


def test_a_key_that_is_wrong_is_named_by_where_it_is_from_and_never_shown(locked, monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", "wrong-key")
    findings = found(locked)

    assert findings["key"].text.startswith("refused (from TINKER_API_KEY): ")
    assert "wrong-key" not in str(findings)


def test_the_right_key(locked):
    findings = found(locked, "right-key")

    assert ("ok", "the one given (checked with sessions)") == (
        findings["key"].status,
        findings["key"].text,
    )
    assert "ok" == findings["training"].status
    assert "right-key" not in str(findings)


def test_a_key_without_permission(monkeypatch):
    answers = {**GOOD, "GET sessions": (403, {"error": "not for trial accounts"})}
    with odd_server(answers) as url:
        key = found(url, "k")["key"]

    assert "failed" == key.status
    assert "not for trial accounts" in key.text


def test_without_lists_the_key_is_not_checked():
    answers = {key: value for key, value in GOOD.items() if key != "GET sessions"}
    with odd_server(answers) as url:
        key = found(url, "k")["key"]

    assert "ok" == key.status
    assert "not checked" in key.text


# Endpoints


def test_missing_endpoints_are_named_with_the_consequence():
    refused = (422, {"detail": "a body is wanted"})
    answers = {**GOOD, "POST create_session": refused, "POST retrieve_future": refused,
               "POST forward_backward": (415, {"detail": "no"})}  # fmt: skip
    with odd_server(answers) as url:
        findings = found(url)

    assert ["create_session", "retrieve_future"] == findings["sessions"].details["offered"]
    assert "session_heartbeat" in findings["sessions"].details["missing"]
    assert "warning" == findings["sessions"].status
    assert "This server cannot train." == findings["dialect"].advice
    assert (
        "This part of the API does not work without create_model, optim_step."
        == findings["training"].advice
    )
    assert ["GET sessions"] == findings["stored"].details["offered"]
    assert "warning" == findings["models"].status


def test_without_sessions_nothing_works():
    with odd_server(GOOD) as url:
        sessions = found(url)["sessions"]

    assert "failed" == sessions.status
    assert (
        "This part of the API does not work without create_session, retrieve_future."
        == sessions.advice
    )


# This machine


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINKEX_HOME", str(tmp_path))
    return tmp_path


ask_engine = machine._ask_engine


@cache
def answer_on_the_device():
    return ask_engine(60.0)


@pytest.fixture
def device_known(monkeypatch):
    """The engine is asked for its device only once: each time, a process imports torch."""

    def ask(seconds, *base_model):
        return ask_engine(seconds, *base_model) if base_model else answer_on_the_device()

    monkeypatch.setattr(machine, "_ask_engine", ask)


def test_extras_that_are_not_installed(home, monkeypatch):
    monkeypatch.setattr(embedded, "NEEDED", ("attrs", "no_such_package"))
    [python, extras, _] = diagnostics.examine()

    assert "ok" == python.status
    assert (
        "the embedded engine needs packages that are not installed: no_such_package" == extras.text
    )
    assert "pip install 'tinkex[local]'" in extras.advice


def test_a_home_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TINKEX_HOME", str(tmp_path / "file"))
    finding = found()["home"]

    assert "failed" == finding.status
    assert "Set TINKEX_HOME" in finding.advice


@pytest.mark.parametrize("free, status", [(1 << 30, "warning"), (1 << 20, "failed")])
def test_a_disk_that_is_nearly_full(home, device_known, monkeypatch, free, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    monkeypatch.setattr(embedded, "acquire", lambda: pytest.fail("not on a full disk"))
    if status == "warning":
        monkeypatch.setattr(embedded, "acquire", no_engine)

    assert status == found()["disk"].status


def no_engine():
    raise errors.EngineError("the embedded engine ended with status 1 before it was ready")


def test_an_engine_that_does_not_start(home, device_known, monkeypatch):
    monkeypatch.setattr(embedded, "acquire", no_engine)
    engine = found()["engine"]

    assert "failed" == engine.status
    assert "ended with status 1" in engine.text


def test_the_engine_is_checked_like_any_server_and_released(
    home, device_known, served, monkeypatch
):
    server = served()
    running = type("Running", (), {"base_url": server.url, "api_key": ""})
    released = []
    monkeypatch.setattr(embedded, "acquire", lambda: running)
    monkeypatch.setattr(embedded, "release", released.append)
    findings = found()

    assert ["python", "extras", "home", "disk", "device", "engine", *STEPS] == list(findings)
    assert {"ok"} == {f.status for f in findings.values() if f.step != "disk"}
    assert [running] == released


def test_the_device_is_what_the_engine_computes_with(home, monkeypatch):
    monkeypatch.setattr(embedded, "acquire", no_engine)
    monkeypatch.setenv("TINKEX_DTYPE", "bfloat16")
    device = found()["device"]

    assert "ok" == device.status
    assert ("cpu", "bfloat16") == (device.details["name"], device.details["dtype"])
    assert 0 < device.details["free"] <= device.details["total"]


def test_a_device_that_is_not_here_ends_the_diagnosis(home, monkeypatch):
    monkeypatch.setenv("TINKEX_DEVICE", "nonsense")
    [*_, device, left] = diagnostics.examine()

    assert ("device", "failed") == (device.step, device.status)
    assert "device 'nonsense' cannot be used here" in device.text
    assert "engine" == left.text


def test_what_a_base_model_needs_is_said_before_the_engine_starts(home, device_known, monkeypatch):
    monkeypatch.setattr(embedded, "acquire", no_engine)
    findings = {one.step: one for one in diagnostics.examine(base_model="tiny")}
    model = findings["base model"]

    assert ["base model", "engine"] == list(findings)[-2:]
    assert "ok" == model.status
    assert "tiny: LlamaForCausalLM on the fast path in float32" in model.text


def test_a_base_model_that_does_not_fit_is_a_warning_with_advice(
    home, device_known, monkeypatch, tmp_path
):
    """Of 70,000 million parameters; its weights are never read."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(embedded, "acquire", no_engine)
    model = {one.step: one for one in diagnostics.examine(base_model=str(tmp_path))}["base model"]

    assert "warning" == model.status
    assert "70,554 million parameters. Weights need 282.2 GB" in model.text
    assert "use --dtype bfloat16 (weights of 141.1 GB)" in model.advice


def test_a_base_model_is_examined_on_this_machine_only(served):
    with pytest.raises(ValueError, match="on this machine only, but a server is named"):
        list(diagnostics.examine(served().url, base_model="tiny"))


# How it is shown


def test_doctor_shows_a_line_for_each_step_and_exits_0(served, capsys):
    assert 0 == cli.main(["doctor", served().url])
    out, err = capsys.readouterr()

    assert "" == err
    assert "ok       tcp        127.0.0.1:" in out
    assert max(map(len, out.splitlines())) <= 100


def test_doctor_exits_1_with_advice(capsys):
    assert 1 == cli.main(["doctor", f"http://127.0.0.1:{closed_port()}"])
    out, _ = capsys.readouterr()

    assert "failed   tcp        nothing listens on" in out
    assert "-> Check that the server is running" in out


def test_doctor_in_json(capsys):
    assert 1 == cli.main(["doctor", f"http://127.0.0.1:{closed_port()}", "--format", "json"])
    out, err = capsys.readouterr()
    report = json.loads(out)

    assert (False, "") == (report["ok"], err)
    assert ["ok", "failed", "skipped"] == [step["status"] for step in report["steps"]]
