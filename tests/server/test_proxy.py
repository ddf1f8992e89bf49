"""docs/nginx.conf, tried with a real nginx: HTTPS in front, `tinkex serve` with keys behind it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time

import pytest
import requests

import tinkex
from tests.support.processes import ROOT, ServerProcess, free_port
from tinkex import types

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/local/bin:/usr/bin")

pytestmark = pytest.mark.skipif(NGINX is None, reason="needs nginx: apt install nginx-light")


@pytest.fixture(scope="module")
def proxy(certificate, tmp_path_factory):
    """The proxy's address; its configuration is the documented one, with other ports and files."""
    port, folder = free_port(), tmp_path_factory.mktemp("nginx")
    url = f"https://127.0.0.1:{port}"
    server = ServerProcess(
        folder / "home", real=True, api_keys=["tml-alice"], environment={"TINKEX_PUBLIC_URL": url}
    )
    server.start()
    settings = (ROOT / "docs" / "nginx.conf").read_text()
    for documented, here in {
        "127.0.0.1:8000": f"127.0.0.1:{server.port}",
        "listen 443": f"listen 127.0.0.1:{port}",
        "/etc/ssl/certs/tinkex.pem": str(certificate[0]),
        "/etc/ssl/private/tinkex.key": str(certificate[1]),
        "pid nginx.pid": f"pid {folder}/nginx.pid",
        "http {": f"http {{\n    access_log off;\n    client_body_temp_path {folder}/body;\n"
        f"    proxy_temp_path {folder}/proxy;",
    }.items():
        assert documented in settings
        settings = settings.replace(documented, here, 1)
    (folder / "nginx.conf").write_text(settings)
    log = folder / "error.log"
    process = subprocess.Popen(
        [NGINX, "-c", folder / "nginx.conf", "-e", log, "-g", "daemon off;"], cwd=folder
    )
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
    yield url
    process.terminate()
    process.wait(10)
    server.close()


@pytest.fixture
def browser(certificate):
    session = requests.Session()
    session.trust_env = False
    session.verify = str(certificate[0])
    with session:
        yield session


@pytest.fixture
def service(proxy, browser):
    with tinkex.ServiceClient(proxy, "tml-alice", session=browser) as client:
        yield client


def test_training_saving_and_downloading(service, tmp_path):
    """Download links begin with the address that clients use."""
    training = service.create_lora_training_client("tiny", rank=4)
    tokens = list(range(60))
    datum = types.Datum(types.ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})
    training.forward_backward([datum] * 300, "cross_entropy")  # several requests
    training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    path = training.save_weights_for_sampler("first").result().path
    folder = service.create_rest_client().download_checkpoint(path, tmp_path / "adapter")

    assert (folder / "adapter_model.safetensors").stat().st_size > 1000


def test_streams_arrive_piece_by_piece(proxy, browser):
    body = {"model": "tiny", "prompt": "The", "max_tokens": 400, "stream": True, "temperature": 0}
    headers = {"Authorization": "Bearer tml-alice"}
    first = browser.post(  # loads the model
        f"{proxy}/v1/completions", json={**body, "max_tokens": 1, "stream": False}, headers=headers
    )
    assert first.ok
    start = time.monotonic()
    with browser.post(f"{proxy}/v1/completions", json=body, headers=headers, stream=True) as answer:
        times = [time.monotonic() - start for line in answer.iter_lines(chunk_size=1) if line]

    assert len(times) > 100
    assert times[0] < times[-1] / 2


def test_the_page_is_opened_by_a_link_and_its_events_come(proxy, browser):
    """The cookie goes over HTTPS alone, and the page's own Origin is accepted."""
    told = browser.post(f"{proxy}/ui/token", headers={"X-API-Key": "tml-alice"}).json()
    entered = browser.get(f"{proxy}{told['path']}", allow_redirects=False)
    own = {"Origin": proxy, "Sec-Fetch-Site": "same-origin"}
    state = browser.get(f"{proxy}/ui/state", headers=own)
    foreign = browser.get(f"{proxy}/ui/state", headers={"Origin": "https://elsewhere.test"})
    with browser.get(f"{proxy}/ui/events", headers=own, stream=True, timeout=20) as answer:
        first = next(answer.iter_lines(chunk_size=1))

    assert "Secure" in entered.headers["Set-Cookie"]
    assert (200, 403) == (state.status_code, foreign.status_code)
    assert b"event: state" == first


def test_without_a_key_nothing_is_let_in(proxy, browser):
    assert 401 == browser.get(f"{proxy}/api/v1/sessions").status_code
