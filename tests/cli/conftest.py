"""What commands are tested on: a fake service for training, a fake server for what is stored."""

from __future__ import annotations

import json

import pytest

import tinkex
from tests.support.fake_server import FakeServer, plugged_in
from tests.support.fake_service import FakeService
from tests.support.storage import Storage
from tinkex import cli, errors
from tinkex.text import tokenizer


@pytest.fixture
def service(monkeypatch):
    """The server behind every client that commands make."""
    service = FakeService()
    service.addresses = []

    def client(base_url=None, api_key=None):
        service.addresses.append((base_url, api_key))
        return service

    def no_tokenizer(identifier):
        raise errors.TokenizerError(f"{identifier} is only known to the fake server")

    monkeypatch.setattr(tinkex, "ServiceClient", client)
    monkeypatch.setattr(tokenizer, "load", no_tokenizer)
    return service


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([json.dumps({"text": "abab" * 5})] * 40))
    return path


@pytest.fixture
def train(service, data, tmp_path):
    """`tinkex train` on 40 examples into <tmp>/run."""

    def train(*options):
        output = str(tmp_path / "run")
        return cli.main(["train", str(data), "--base-model", "fake", "--output", output, *options])

    return train


@pytest.fixture
def server(monkeypatch):
    server = FakeServer()
    plugged_in(monkeypatch, server)
    return server


@pytest.fixture
def storage(server):
    return Storage(server)


@pytest.fixture
def run(capsys):
    def run(*arguments):
        status = cli.main(list(arguments))
        return status, *capsys.readouterr()

    return run
