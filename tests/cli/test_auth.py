"""`tinkex auth`: a key in the file of the official SDK, checked first and never shown."""

from __future__ import annotations

import json

import pytest

from tests.support.fake_server import URL
from tinkex import config

LOGIN = ("auth", "login", "--base-url", URL, "--api-key")
KEY = "tml-secret-key-1234"
OWNER = (200, {"user_details": {"email": "me@example.org"}, "org_details": {"name": "Example"}})


@pytest.fixture(autouse=True)
def file(monkeypatch, tmp_path, server):
    """Where keys are stored; `server` stands in for the network."""
    server.stored["GET", "auth/apikey/me"] = OWNER
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    path = tmp_path / "tinker" / "credentials.json"
    monkeypatch.setattr(config, "CREDENTIALS_FILE", path)
    return path


def test_a_key_is_stored_as_the_official_sdk_reads_it(run, file):
    status_, out, _ = run(*LOGIN, KEY)

    assert 0 == status_
    assert "secret" not in out
    assert {
        "version": 1,
        "default": "tinkex",
        "keys": {
            "tinkex": {
                "type": "manual",
                "key": KEY,
                "name": "tinkex",
                "details": {
                    "org_details": {"name": "Example"},
                    "user_details": {"email": "me@example.org"},
                },
            }
        },
    } == json.loads(file.read_text())
    assert (0o600, 0o700) == (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777)
    assert KEY == config.stored_key()


def test_a_key_that_the_server_refuses_is_not_stored(run, file, server):
    server.stored["GET", "auth/apikey/me"] = (401, {"error": "this key is not known"})
    status_, _, err = run(*LOGIN, KEY)

    assert 1 == status_
    assert "this key is not known" in err
    assert "secret" not in err
    assert not file.exists()
    assert 0 == run(*LOGIN, KEY, "--no-check")[0]
    assert file.exists()


@pytest.mark.parametrize("key", ["sk-other", "tml-a b", "x"])
def test_what_cannot_be_a_key_is_refused(run, file, key):
    assert 2 == run(*LOGIN, key)[0]
    assert not file.exists()


def test_other_keys_of_the_file_are_kept(run, file):
    file.parent.mkdir()
    other = {"type": "manual", "key": "tml-theirs", "name": "work"}
    file.write_text(json.dumps({"version": 1, "default": "work", "keys": {"work": other}}))
    run(*LOGIN, KEY)
    assert KEY == config.stored_key()
    assert 0 == run("auth", "logout")[0]

    stored = json.loads(file.read_text())
    assert ({"work": other}, None) == (stored["keys"], stored.get("default"))
    status_, _, err = run("auth", "logout")
    assert (1, True) == (status_, "stored are: 'work'" in err)
    assert 0 == run("auth", "logout", "--name", "work")[0]


def test_a_file_of_something_else_is_left_as_it_is(run, file):
    file.parent.mkdir()
    file.write_text("my notes")
    status_, _, err = run(*LOGIN, KEY)

    assert 1 == status_
    assert "is not a file of keys" in err
    assert "my notes" == file.read_text()


def test_status_names_the_source_and_hides_the_key(run, monkeypatch):
    assert (1, True) == (lambda s, out, _: (s, "no key" in out))(*run("auth", "status"))
    run(*LOGIN, KEY)
    status_, out, _ = run("auth", "status", "--format", "json")
    assert (0, "tml-...1234") == (status_, json.loads(out)["key"])
    monkeypatch.setenv("TINKER_API_KEY", "tml-another-key-5678")
    assert "tml-...5678 from TINKER_API_KEY" in run("auth", "status")[1]


def test_whoami_asks_the_server(run):
    assert "me@example.org, Example\n" == run("auth", "whoami")[1]
    assert {"user": "me@example.org", "organization": "Example"} == json.loads(
        run("auth", "whoami", "--format", "json")[1]
    )
