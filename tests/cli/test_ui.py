"""`tinkex ui`: which page is opened, and how one gets in."""

from __future__ import annotations

import webbrowser

import pytest
import requests

from tests.support.fake_engine import FakeEngine
from tests.support.processes import free_port
from tinkex import cli, config
from tinkex.server import app
from tinkex.server.app import LocalServer
from tinkex.server.auth import Keys


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """The addresses that a browser was sent to."""
    addresses = []
    monkeypatch.setattr(webbrowser, "open", lambda url: addresses.append(url) or True)
    monkeypatch.setenv("TINKEX_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    return addresses


@pytest.fixture
def server(tmp_path):
    keys = Keys.of_one("tml-secret")
    with LocalServer(tmp_path / "home", engine=FakeEngine, keys=lambda home: keys) as running:
        yield running


def signs_in(url):
    """True if the page at *url* shows something, without any key."""
    with requests.Session() as browser:
        browser.get(url, timeout=30)
        return browser.get(url.partition("/ui/")[0] + "/ui/state", timeout=30).status_code == 200


def test_the_page_of_a_server_is_opened_signed_in(server, opened, capsys):
    status = cli.main(["ui", "--base-url", server.url, "--api-key", "tml-secret"])

    assert 0 == status
    assert signs_in(opened[0])
    out = capsys.readouterr().out
    assert server.url in out and "token" not in out


def test_the_embedded_engine_of_a_running_script_is_found(server, opened):
    """By the key file that it keeps for other programs of its user. Another has died."""
    dead = config.engine_key_file(f"http://127.0.0.1:{free_port()}")
    dead.parent.mkdir(parents=True)
    config.engine_key_file(server.url).write_text("tml-secret")
    dead.write_text("tml-dead")

    assert 0 == cli.main(["ui"])
    assert signs_in(opened[0])


def test_without_a_browser_the_address_is_printed(server, opened, capsys):
    cli.main(["ui", "--base-url", server.url, "--api-key", "tml-secret", "--no-browser"])

    address = capsys.readouterr().out.split()[-1]
    assert [] == opened
    assert signs_in(address)


def test_a_wrong_key_is_refused_in_a_sentence(server, opened, capsys):
    assert 1 == cli.main(["ui", "--base-url", server.url, "--api-key", "tml-wrong"])

    assert [] == opened
    assert "the API key is not valid" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_named(opened, capsys):
    url = f"http://127.0.0.1:{free_port()}"

    assert 1 == cli.main(["ui", "--base-url", url])
    assert f"no server answers at {url}" in capsys.readouterr().err


def test_a_server_without_a_page_is_no_puzzle(opened, capsys, requests_mock):
    requests_mock.post("http://other.test/ui/token", status_code=404)

    assert 1 == cli.main(["ui", "--base-url", "http://other.test", "--api-key", "tml-x"])
    assert "http://other.test has no page" in capsys.readouterr().err


def test_with_no_server_at_all_one_is_started(opened, monkeypatch):
    def serve(*, home, on_ready):
        on_ready("http://127.0.0.1:1234")
        return 0

    monkeypatch.setattr(app, "main", serve)

    assert 0 == cli.main(["ui"])
    assert ["http://127.0.0.1:1234/"] == opened
