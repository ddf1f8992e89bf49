"""`tinkex push`, with huggingface_hub's own client against a hub that speaks its HTTP."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import huggingface_hub
import pytest

import tinkex
from tests.support import hf_reference as hf
from tinkex import cli
from tinkex.server.app import LocalServer


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as creating a repository and uploading small files needs."""

    created: ClassVar[list[dict]] = []
    files: ClassVar[dict[str, bytes]] = {}
    status = 200

    def do_POST(self):
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self._chunks()
        if self.status != 200:
            self._reply({"error": "Forbidden: this token cannot write"}, self.status)
        elif self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self._reply({"url": "https://huggingface.co/my-org/mine"})
        elif "/preupload/" in self.path:
            found = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._reply({"files": found})
        elif "/commit/" in self.path:
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.files[entry["value"]["path"]] = content
            url = "https://huggingface.co/my-org/mine/commit/" + "1" * 40
            self._reply({"commitUrl": url, "commitOid": "1" * 40, "success": True})
        else:  # checks of README.md's metadata
            self._reply({"errors": [], "warnings": []})

    def do_GET(self):
        self._reply({"id": "my-org/mine", "sha": "0", "siblings": []}, self.status)

    def _chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def _reply(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    class OneHub(Hub):
        created, files, status = [], {}, 200

    server = ThreadingHTTPServer(("127.0.0.1", 0), OneHub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    make = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: make(endpoint=address, token="hf_x"))
    yield OneHub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(tmp_path):
    base = hf.make_base(tmp_path / "base", "llama")
    folder = tmp_path / "run"
    folder.mkdir()
    hf.make_adapter(base, folder / "adapter")
    state = {
        "settings": {"base_model": str(base), "rank": 8},
        "data": "data.jsonl",
        "data_sha256": "abc123",
        "total_steps": 3,
        "step": 3,
        "sampler_path": "tinker://r/sampler_weights/final",
    }
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "metrics.jsonl").write_text("")
    return folder


def test_the_exported_files_are_uploaded_with_the_card(hub, run, capsys):
    status = cli.main(["push", str(run), "my-org/mine", "--to", "peft", "--private"])

    assert 0 == status
    assert "my-org/mine" in capsys.readouterr().out
    [created] = hub.created
    assert ("mine", "my-org", True) == (
        created["name"],
        created["organization"],
        created.get("private") or created.get("visibility") == "private",
    )
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(hub.files)
    assert b"`abc123`" in hub.files["README.md"]


def test_a_token_that_may_not_write_is_a_clear_sentence(hub, run, capsys):
    hub.status = 403

    assert 1 == cli.main(["push", str(run), "my-org/mine"])

    error = capsys.readouterr().err
    assert "my-org/mine cannot be uploaded" in error
    assert "hf auth login" in error


def test_a_name_without_an_organization_is_refused(run, capsys):
    assert 2 == cli.main(["push", str(run), "mine"])

    assert "is not like ORG/NAME" in capsys.readouterr().err


def test_a_checkpoint_s_adapter_is_uploaded(hub, tmp_path, capsys):
    """A new repository is private, as the official command line makes it."""
    with LocalServer(tmp_path / "home") as server:
        with tinkex.ServiceClient(server.url, "tml-any") as service:
            training = service.create_lora_training_client("tiny", rank=2)
            path = training.save_state("final").result().path
        command = ["checkpoint", "push-hf", path, "--base-url", server.url, "--api-key", "tml-any"]
        status = cli.main([*command, "-r", "my-org/mine"])
        wrong = cli.main([*command, "-r", "mine"])

    assert (0, 2) == (status, wrong)
    assert "my-org/mine" in capsys.readouterr().out
    [created] = hub.created
    assert created.get("private") or created.get("visibility") == "private"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(hub.files)
