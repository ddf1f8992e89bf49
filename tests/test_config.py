"""Settings and where they come from: arguments > Config > environment > defaults."""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
from pathlib import Path

import pytest
import requests

from tinkex import Config, Patience, SamplingLimits, config

LOCAL = "http://127.0.0.1:8000"


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith(("TINKER_", "CLOUDFLARE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TINKEX_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(config, "CREDENTIALS_FILE", tmp_path / "credentials.json")


def test_an_argument_wins_over_the_environment_and_that_over_the_default(monkeypatch):
    monkeypatch.setenv("TINKER_BASE_URL", "http://environment")
    monkeypatch.setenv("TINKER_API_KEY", "from-environment")
    monkeypatch.setenv("TINKER_PROJECT_ID", "p-environment")

    of_environment = config.load()
    assert ("http://environment", "from-environment", "p-environment") == (
        of_environment.base_url,
        of_environment.api_key,
        of_environment.project_id,
    )
    of_arguments = config.load(LOCAL, "given", project_id="p")
    assert (LOCAL, "given", "p") == (
        of_arguments.base_url,
        of_arguments.api_key,
        of_arguments.project_id,
    )


#: field -> (default, in the environment, in a Config, as an argument), with how each is given.
PRECEDENCE = {
    "base_url": (config.OFFICIAL_URL, "http://environment", "http://config", "http://argument"),
    "api_key": ("tml-stored", "tml-environment", "tml-config", "tml-argument"),
    "project_id": (None, "environment", "config", "argument"),
    "tags": ((), ("environment",), ("config",), ("argument",)),
    "telemetry": (False, True, False, True),
    "credential_cmd": (None, "environment", "config", "argument"),
}
VARIABLES = {
    "base_url": "TINKER_BASE_URL",
    "api_key": "TINKER_API_KEY",
    "project_id": "TINKER_PROJECT_ID",
    "tags": "TINKER_TAGS",
    "telemetry": "TINKER_TELEMETRY",
    "credential_cmd": "TINKER_CREDENTIAL_CMD",
}


@pytest.mark.parametrize("field", PRECEDENCE)
def test_arguments_win_over_a_config_that_over_the_environment_that_over_defaults(
    field, monkeypatch
):
    stored = {"default": "a", "keys": {"a": {"key": "tml-stored"}}}
    config.CREDENTIALS_FILE.write_text(json.dumps(stored))
    default, environment, in_config, argument = PRECEDENCE[field]

    found = [getattr(config.load(), field)]
    text = environment[0] if isinstance(environment, tuple) else str(environment)
    monkeypatch.setenv(VARIABLES[field], text)
    found.append(getattr(config.load(), field))
    given = Config(**{field: in_config})
    found.append(getattr(config.load(config=given), field))
    found.append(getattr(config.load(config=given, **{field: argument}), field))

    assert [default, environment, in_config, argument] == found


def test_headers_of_the_environment_and_of_a_config_go_together(monkeypatch):
    """Cloudflare's come from the environment; a Config may replace one of them."""
    monkeypatch.setenv("CLOUDFLARE_ACCESS_CLIENT_ID", "id")
    monkeypatch.setenv("CLOUDFLARE_ACCESS_CLIENT_SECRET", "secret")
    given = Config(LOCAL, default_headers={"CF-Access-Client-Id": "mine", "X-Team": "blue"})

    assert {
        "CF-Access-Client-Id": "mine",
        "CF-Access-Client-Secret": "secret",
        "X-Team": "blue",
    } == config.load(config=given).default_headers


def test_a_config_that_names_no_server_means_the_embedded_engine():
    assert config.wants_embedded(config=Config(patience=Patience(close=1)))
    assert not config.wants_embedded(config=Config(LOCAL))
    assert not config.wants_embedded(config=Config(api_key="tml-x"))


def test_a_config_shows_no_secret_and_takes_none_into_a_pickle():
    secret = "very-secret"
    given = Config(
        LOCAL,
        api_key=secret,
        credential_cmd=f"echo {secret}",
        default_headers={"X": secret},
        proxies={"http": f"http://user:{secret}@proxy"},
        session=requests.Session(),
    )

    assert secret not in repr(given)
    assert secret.encode() not in pickle.dumps(given.without_secrets())
    assert LOCAL == pickle.loads(pickle.dumps(given.without_secrets())).base_url


def test_blanks_in_the_environment_are_nothing(monkeypatch):
    """`export TINKER_API_KEY=` is how a shell says none."""
    monkeypatch.setenv("TINKER_API_KEY", "  ")
    monkeypatch.setenv("TINKER_BASE_URL", f" {LOCAL} ")

    assert (LOCAL, "") == (config.load().base_url, config.load().api_key)


@pytest.mark.parametrize(
    "arguments, environment, embedded",
    [
        ({}, {}, True),
        ({"base_url": LOCAL}, {}, False),
        ({"api_key": "tml-x"}, {}, False),
        ({}, {"TINKER_API_KEY": "tml-x"}, False),
        ({}, {"TINKER_BASE_URL": LOCAL}, False),
        ({}, {"TINKER_CREDENTIAL_CMD": "pass show tinker"}, False),
        ({}, {"TINKER_API_KEY": " "}, True),
        ({}, {"TINKER_PROJECT_ID": "p"}, True),
    ],
)
def test_the_embedded_engine_is_meant_where_nothing_names_a_server(
    monkeypatch, arguments, environment, embedded
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert embedded == config.wants_embedded(**arguments)


def test_a_slash_at_the_end_of_the_url_is_none():
    assert LOCAL == config.load(LOCAL + "/").base_url
    assert "http://h/a/b" == config.load("http://h/a/b//").base_url


# Keys.


@pytest.mark.parametrize("key", ["", "anything", "tml-x", "12345"])
def test_statement_32_any_other_server_gets_whatever_key_it_wants(key):
    """Only the official service is strict; users of open servers had to make keys up.
    (statement 32)"""
    assert key == config.load(LOCAL, key).api_key


@pytest.mark.parametrize("key", ["tml-x", "eyJhbGciOi.J9.x"])
def test_statement_32_the_official_service_takes_keys_of_two_shapes(key):
    """A key begins with tml-, or is a JWT. (statement 32)"""
    assert key == config.load(None, key).api_key


def test_statement_32_a_key_of_another_shape_is_told_before_anything_is_sent():
    """The service would answer 401, minutes into a user's script. (statement 32)"""
    with pytest.raises(ValueError, match="api_key must start with the 'tml-' prefix"):
        config.load(None, "sk-something")


def test_statement_32_a_missing_key_is_told_with_the_ways_to_give_one():
    """Three ways: an argument, a variable, or no key and the engine of one's own. (statement 32)"""
    with pytest.raises(ValueError, match="api_key is required by the official service") as caught:
        config.load(config.OFFICIAL_URL)
    assert "TINKER_API_KEY" in str(caught.value)
    assert "embedded engine" in str(caught.value)


def test_the_official_command_line_s_stored_key_is_found(tmp_path):
    stored = {"default": "work", "keys": {"work": {"key": "tml-stored"}}}
    (tmp_path / "credentials.json").write_text(json.dumps(stored))

    assert "tml-stored" == config.load(config.OFFICIAL_URL).api_key
    assert "" == config.load(LOCAL).api_key


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"default": 5}', '{"default":"a","keys":[]}'])
def test_an_odd_file_of_stored_keys_is_none(tmp_path, content):
    (tmp_path / "credentials.json").write_text(content)

    with pytest.raises(ValueError, match="api_key is required"):
        config.load(config.OFFICIAL_URL)


def test_statement_32_secrets_are_in_no_repr(monkeypatch):
    """They would end in logs and bug reports. (statement 32)"""
    monkeypatch.setenv("CLOUDFLARE_ACCESS_CLIENT_ID", "cf-id")
    monkeypatch.setenv("CLOUDFLARE_ACCESS_CLIENT_SECRET", "cf-secret")
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", "echo my-password")
    loaded = config.load(LOCAL, "tml-secret")

    assert {
        "CF-Access-Client-Id": "cf-id",
        "CF-Access-Client-Secret": "cf-secret",
    } == loaded.default_headers
    for secret in ("tml-secret", "cf-secret", "cf-id", "my-password"):
        assert secret not in repr(loaded)
        assert secret not in str(loaded)


def test_the_key_of_an_embedded_engine_is_found_by_its_address(tmp_path):
    """For pickled clients, and for the command line beside it."""
    path = config.engine_key_file(LOCAL)
    path.parent.mkdir(parents=True)
    path.write_text("engine-key")

    assert "engine-key" == config.load(LOCAL).api_key
    assert "given" == config.load(LOCAL, "given").api_key
    assert "" == config.load("http://127.0.0.1:9999").api_key


def test_the_engine_is_started_without_our_keys(monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-secret")
    monkeypatch.setenv("TINKER_BASE_URL", LOCAL)
    monkeypatch.setenv("TINKEX_SERVE_SSL_CERTFILE", "/of/another/server.pem")
    environment = config.engine_environment("token")

    assert "token" == environment["TINKEX_ENGINE_TOKEN"]
    ours = {"TINKER_API_KEY", "TINKER_BASE_URL", "TINKEX_SERVE_SSL_CERTFILE"}
    assert not ours & set(environment)


def test_the_number_type_of_the_engine_is_for_the_engine_alone(monkeypatch):
    """Other programs that this process starts must not inherit it."""
    monkeypatch.setattr(config, "_for_engine", {})
    config.set_engine_dtype("bfloat16")

    assert "bfloat16" == config.engine_environment("token")["TINKEX_DTYPE"]
    assert "TINKEX_DTYPE" not in os.environ


# Credential commands.


def command(code):
    return f'{sys.executable} -c "{code}"'


def test_a_credential_command_gives_what_it_prints():
    assert "secret" == config.run_credential_cmd(command("print('  secret  ')"))


@pytest.mark.parametrize(
    "code, words",
    [
        ("print('secret'); raise SystemExit(3)", "ended with status 3 and some output"),
        ("pass", "ended with status 0 and no output; it must print a credential"),
    ],
)
def test_a_credential_command_that_fails_is_told_without_its_output(code, words):
    with pytest.raises(ValueError, match=words) as caught:
        config.run_credential_cmd(command(code))
    assert "secret" not in str(caught.value)


# The rest.


@pytest.mark.parametrize(
    "value, expected", [("1", True), ("true", True), ("ON", True), ("0", False), ("", False)]
)
def test_telemetry_is_off_unless_asked_for(monkeypatch, value, expected):
    monkeypatch.setenv("TINKER_TELEMETRY", value)

    assert expected == config.load(LOCAL).telemetry


def test_tags_are_separated_by_commas(monkeypatch):
    monkeypatch.setenv("TINKER_TAGS", "a, b ,,c")

    assert ("a", "b", "c") == config.load(LOCAL).tags


@pytest.mark.parametrize(
    "url, official",
    [
        (config.OFFICIAL_URL, True),
        ("https://tinker.thinkingmachines.dev/another/path", True),
        ("https://tinker.thinkingmachines.dev.evil.example", False),
        (LOCAL, False),
    ],
)
def test_the_official_service_is_known_by_its_host(url, official):
    assert official == Config(url, "tml-x").is_official


def test_first_contact_is_told_within_ten_seconds_and_waits_after_ten():
    """The promises of the architecture, as defaults."""
    patience = Patience()

    assert patience.first_contact < 10
    assert patience.report_after <= 10
    assert patience.no_answer >= 300
    assert 45.0 == patience.poll


def test_settings_are_values():
    """Compared, copied and pickled like any other."""
    assert Patience(poll=5) == pickle.loads(pickle.dumps(Patience(poll=5)))
    assert SamplingLimits() == SamplingLimits(400, 10 * 1024 * 1024, 256)
    with pytest.raises(AttributeError):
        Patience().poll = 5


def test_home_is_where_the_environment_says(monkeypatch, tmp_path):
    assert tmp_path / "home" == config.home()
    monkeypatch.delenv("TINKEX_HOME")

    assert ".tinkex" == config.home().name
    assert config.home().is_absolute()


def test_the_configuration_is_the_only_reader_of_the_environment():
    """One place to look for what a variable does. (Engine and server have their own process.)"""
    package = Path(config.__file__).parent
    readers = [
        path.relative_to(package).as_posix()
        for path in sorted(package.rglob("*.py"))
        if re.search(r"os\.environ|getenv", path.read_text())
        and path.parts[len(package.parts)] not in ("engine", "server")
    ]

    assert ["config.py"] == readers
