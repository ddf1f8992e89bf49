"""What is known of the key: found without sending it, and tried once."""

from __future__ import annotations

import json

import pytest

from tests.support.fake_server import FakeServer, plugged_in, status
from tinkex import auth, config, errors


@pytest.fixture(autouse=True)
def without_a_key(monkeypatch, tmp_path):
    for name in ("TINKER_API_KEY", "TINKER_CREDENTIAL_CMD", "TINKER_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(config, "CREDENTIALS_FILE", tmp_path / "credentials.json")


def test_without_a_key_there_is_none():
    assert auth.get_tinker_token() is None
    assert not auth.tinker_has_credentials()


def test_a_key_is_found_in_the_environment_before_the_file(monkeypatch):
    stored = {"version": 1, "default": "a", "keys": {"a": {"type": "manual", "key": "tml-file"}}}
    config.CREDENTIALS_FILE.write_text(json.dumps(stored))

    assert "tml-file" == auth.get_tinker_token()
    monkeypatch.setenv("TINKER_API_KEY", "tml-env")
    assert "tml-env" == auth.get_tinker_token()
    assert auth.tinker_has_credentials()


def test_a_command_counts_as_a_credential_and_is_not_run(monkeypatch):
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", "/bin/false")

    assert auth.tinker_has_credentials()
    assert auth.get_tinker_token() is None


def test_a_server_that_takes_the_key_is_accessible_and_one_that_refuses_is_not(monkeypatch):
    server = FakeServer()
    plugged_in(monkeypatch, server)
    auth.raise_if_tinker_not_accessible()

    server.script("get_server_capabilities", status(401))
    with pytest.raises(errors.AuthenticationError):
        auth.raise_if_tinker_not_accessible()


def test_the_official_service_without_a_key_is_an_error_of_ours(monkeypatch):
    """Scripts catch TinkerError here."""
    monkeypatch.setenv("TINKER_BASE_URL", config.OFFICIAL_URL)

    with pytest.raises(errors.TinkexError, match="api_key is required"):
        auth.raise_if_tinker_not_accessible()
