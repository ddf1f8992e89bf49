"""`tinkex serve`: which options reach the server, from the command line and the environment."""

from __future__ import annotations

import pytest

from tinkex import cli
from tinkex.server import app


@pytest.fixture
def started(monkeypatch):
    """The options of the server that would run."""
    given = {}
    monkeypatch.setattr(app, "main", lambda **options: given.update(options) or 0)
    return given


def test_every_option_can_be_set_in_the_environment(started, monkeypatch):
    for name, value in {
        "HOST": "0.0.0.0",
        "PORT": "8123",
        "BASE_MODEL": "smollm2 org/model=/models/x",
        "TINY": "false",
        "KEYS": "alice=tml-a bob=tml-b",
        "USER_DISK": "2GB",
        "DRAIN": "30",
        "SSL_CERTFILE": "/etc/server.pem",
        "SESSION_TIMEOUT": "60",
    }.items():
        monkeypatch.setenv(f"TINKEX_SERVE_{name}", value)

    assert 0 == cli.main(["serve"])

    assert ("0.0.0.0", 8123) == (started["host"], started["port"])
    assert ("smollm2", "org/model=/models/x") == started["base_models"]
    assert started["with_tiny"] is False
    assert ("alice=tml-a", "bob=tml-b") == started["api_keys"]
    assert (2 * 10**9, 30.0) == (started["user_disk"], started["drain"])
    assert "/etc/server.pem" == str(started["ssl_certfile"])
    assert 60.0 == started["session_timeout"]


def test_the_command_line_wins_over_the_environment(started, monkeypatch):
    monkeypatch.setenv("TINKEX_SERVE_PORT", "8123")

    cli.main(["serve", "--port", "9000"])

    assert 9000 == started["port"]


def test_a_wrong_value_of_the_environment_is_named(started, monkeypatch, capsys):
    monkeypatch.setenv("TINKEX_SERVE_PORT", "many")

    assert 2 == cli.main(["serve"])
    assert "'many' is not a valid integer" in capsys.readouterr().err
    assert {} == started
