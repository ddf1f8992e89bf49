"""The home is deleted or replaced while the server runs: it reports that, and refuses to save."""

from __future__ import annotations

import shutil
import time

import pytest

from tests.support.processes import free_port


def wait_for(claim, seconds=10):
    deadline = time.monotonic() + seconds
    while not claim() and time.monotonic() < deadline:
        time.sleep(0.02)
    return claim()


def delete(home):
    shutil.rmtree(home)


def replace(home):
    home.rename(home.with_name("away"))
    shutil.copytree(home.with_name("away"), home)


@pytest.mark.parametrize("lose", [delete, replace])
def test_it_is_told_and_nothing_pretends_to_be_saved(serve, tmp_path, caplog, lose):
    served = serve(port=free_port())
    client = served.client
    model = client.model()
    assert {"status": "ready"} == client.get("readyz")
    lose(tmp_path / "home")

    ready = client.send("GET", "readyz")
    assert wait_for(lambda: client.send("GET", "healthz").status_code == 503)
    health = client.send("GET", "healthz").json()
    refused = client.send("POST", "save_weights", {"model_id": model, "seq_id": 1, "path": "a"})
    session = client.send("POST", "create_session", {})
    listed = client.send("GET", "checkpoints")

    assert [503] * 4 == [a.status_code for a in (ready, refused, session, listed)]
    for answer in (ready, refused, session, listed):
        assert "deleted or replaced" in answer.json()["error"]
    assert "deleted or replaced" in health["error"]
    told = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert 1 == len(told)


def test_without_a_journal_a_save_fails(serve, tmp_path):
    """The embedded engine trains on, but no checkpoint is promised."""
    served = serve()
    client = served.client
    model = client.model()
    replace(tmp_path / "home")
    result = client.result(client.save(model, 1, "a"))
    files = list((tmp_path / "home" / "checkpoints").rglob("*.safetensors"))

    assert "deleted or replaced" in result["error"]
    assert "server" == result["category"]
    assert [] == files


def test_a_server_whose_engine_starts_is_not_ready(serve):
    import threading

    from tests.support.fake_engine import FakeEngine

    gate = threading.Event()

    def engine():
        gate.wait(10)
        return FakeEngine()

    served = serve(make_engine=engine)
    early = served.client.send("GET", "readyz")
    gate.set()

    assert 503 == early.status_code
    assert "starting" in early.json()["error"]
    assert wait_for(lambda: served.client.send("GET", "readyz").status_code == 200)
