"""Settings and where they come from: argument, then environment, then default.

The only reader of os.environ. Knows nothing of HTTP: it says with what to talk, not how.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs

#: The official service; used when there is a key and no base_url.
OFFICIAL_URL = "https://tinker.thinkingmachines.dev/services/tinker-prod"

#: The version of the official SDK whose protocol we speak. Servers gate features by it, so it is
#: not our own version (that is in the User-Agent).
PROTOCOL_VERSION = "0.38.0"

CREDENTIALS_FILE = Path("~/.tinker/credentials.json")


def _check_seconds(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    text = f"{attribute.name} must be a positive number of seconds, got {value!r}."
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(text)
    if not 0 < value < math.inf:
        raise ValueError(text)


def _check_count(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    text = f"{attribute.name} must be a positive integer, got {value!r}."
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(text)
    if value < 1:
        raise ValueError(text)


def _seconds(default: float) -> float:
    value: float = attrs.field(default=default, validator=_check_seconds)
    return value


def _instance_of(cls: type, name: str) -> Callable[[Any, Any, Any], None]:
    """A validator whose message is one sentence."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, cls):
            raise TypeError(f"{attribute.name} must be a {name}, got {value!r}.")

    return check


def _check_url(url: object) -> str:
    """A server's URL without a slash at its end. ValueError or TypeError if it is none."""
    if not isinstance(url, str):
        raise TypeError(f"base_url must be the URL of a server, got {url!r}.")
    wrong = f"base_url {url!r} is not a URL of a server"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as exc:
        raise ValueError(f"{wrong} ({exc}: the port is 0 to 65535).") from exc
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{wrong}; give one like http://127.0.0.1:8000.")
    if parts.username or parts.password:
        raise ValueError("base_url holds a user name or password; give the key as api_key instead.")
    if parts.query or parts.fragment:
        raise ValueError("base_url holds a query (?...) or fragment (#...); leave it out.")
    return url.rstrip("/")


def _check_key_characters(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"api_key must be a str, got {type(key).__name__}.")
    if not key.isprintable() or not key.isascii() or " " in key:
        raise ValueError(
            "api_key holds spaces, line breaks or characters that cannot travel in a header; "
            "was it copied whole, and nothing more?"
        )
    return key


def _check_text(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{attribute.name} must be a str or None, got {value!r}.")


@attrs.frozen
class Patience:
    """How long to wait for what. All times are in seconds.

    Args:
        connect: for a connection.
        request: for the answer to a request.
        poll: for the answer to one long poll; servers hold these for up to 40 s.
        first_contact: in all, until a server that was never heard of answers; refused connections
            and unknown hosts fail sooner.
        no_answer: in all, while a server that did answer before gives no useful answer.
        report_after: before a wait is reported in the log.
        report_every: between two reports of the same wait.
        heartbeat: between two signs of life of a session.
        close: at most, for close() to send what is queued.
    """

    connect: float = _seconds(5.0)
    request: float = _seconds(60.0)
    poll: float = _seconds(45.0)
    first_contact: float = _seconds(8.0)
    no_answer: float = _seconds(600.0)
    report_after: float = _seconds(8.0)
    report_every: float = _seconds(60.0)
    heartbeat: float = _seconds(10.0)
    close: float = _seconds(30.0)


@attrs.frozen
class SamplingLimits:
    """How much sampling goes on at once, for all samplers of one key.

    Args:
        requests_in_dispatch: submits under way at a time.
        bytes_in_dispatch: bytes of prompts in those submits.
        connections: threads (and connections) that submit and poll; they grow as needed.
    """

    requests_in_dispatch: int = attrs.field(default=400, validator=_check_count)
    bytes_in_dispatch: int = attrs.field(default=10 * 1024 * 1024, validator=_check_count)
    connections: int = attrs.field(default=256, validator=_check_count)


@attrs.frozen
class Config:
    """With what server to talk, as whom, and how patiently.

    Attributes:
        base_url: of the server; everything is under `<base_url>/api/v1/`.
        api_key: sent as X-API-Key; "" where the server wants none. Never shown.
        credential_cmd: a command that prints a credential, for servers that exchange it for a JWT.
        headers: sent with every request; values are never shown.
    """

    base_url: str = attrs.field(converter=_check_url)
    api_key: str = attrs.field(default="", repr=False, converter=_check_key_characters)
    credential_cmd: str | None = attrs.field(default=None, repr=False)
    project_id: str | None = attrs.field(default=None, validator=_check_text)
    tags: tuple[str, ...] = ()
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    telemetry: bool = False
    patience: Patience = attrs.field(
        factory=Patience, validator=_instance_of(Patience, "tinkex.Patience")
    )
    sampling: SamplingLimits = attrs.field(
        factory=SamplingLimits, validator=_instance_of(SamplingLimits, "tinkex.SamplingLimits")
    )

    @property
    def is_official(self) -> bool:
        """Whether this is the official service, which is strict about keys."""
        return urlsplit(self.base_url).hostname == urlsplit(OFFICIAL_URL).hostname

    def without_secrets(self) -> Config:
        """The same, fit to be pickled: keys and headers are found again where it is used."""
        return attrs.evolve(self, api_key="", headers={}, credential_cmd=None)


def wants_embedded(base_url: str | None = None, api_key: str | None = None) -> bool:
    """Whether nothing names a server, so that the embedded engine is meant."""
    named = base_url or api_key or _env("TINKER_BASE_URL") or _env("TINKER_API_KEY")
    return not named and not _env("TINKER_CREDENTIAL_CMD")


def load(
    base_url: str | None = None,
    api_key: str | None = None,
    *,
    project_id: str | None = None,
    patience: Patience | None = None,
    sampling: SamplingLimits | None = None,
) -> Config:
    """The configuration from arguments, environment (TINKER_*) and defaults.

    Raises:
        ValueError: If the URL is not one, or the official service is meant and the key is missing
            or of a wrong shape.
    """
    url = _check_url(base_url or _env("TINKER_BASE_URL") or OFFICIAL_URL)
    config = Config(
        base_url=url,
        api_key=api_key or _env("TINKER_API_KEY") or _engine_key(url),
        credential_cmd=_env("TINKER_CREDENTIAL_CMD"),
        project_id=project_id or _env("TINKER_PROJECT_ID"),
        tags=tuple(t.strip() for t in (_env("TINKER_TAGS") or "").split(",") if t.strip()),
        headers=_cloudflare_headers(),
        telemetry=(_env("TINKER_TELEMETRY") or "").lower() in ("1", "true", "yes", "on"),
        patience=patience or Patience(),
        sampling=sampling or SamplingLimits(),
    )
    if config.is_official:
        config = _check_official_key(config)
    return config


def key_source(config: Config) -> str | None:
    """Where the credential of *config* is from, in words; None if there is none."""
    if config.api_key and config.api_key == _env("TINKER_API_KEY"):
        return "from TINKER_API_KEY"
    if config.api_key and config.api_key == _engine_key(config.base_url):
        return "of the embedded engine"
    if config.api_key and config.is_official and config.api_key == _stored_key():
        return f"from {CREDENTIALS_FILE}"
    if config.api_key:
        return "the one given"
    return "from TINKER_CREDENTIAL_CMD" if config.credential_cmd else None


def wants_color() -> bool:
    """Whether colours may be written to a terminal (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def home() -> Path:
    """Where the local server keeps what outlives it: TINKEX_HOME, or ~/.tinkex."""
    return Path(_env("TINKEX_HOME") or "~/.tinkex").expanduser()


def engine_key_file(base_url: str) -> Path:
    """Where the key of the embedded engine at *base_url* is kept while it runs.

    Only its user can read it: for pickled clients and the command line in other processes.
    """
    parts = urlsplit(base_url)
    return home() / "engines" / f"{parts.hostname}-{parts.port}.key"


def engine_token() -> str | None:
    """The secret by which an embedded engine knows its parent, in the engine's environment."""
    return _env("TINKEX_ENGINE_TOKEN")


def engine_environment(token: str) -> dict[str, str]:
    """The environment for an embedded engine: ours, with the secret and without our keys."""
    ours = {k: v for k, v in os.environ.items() if k not in ("TINKER_API_KEY", "TINKER_BASE_URL")}
    return {**ours, "TINKEX_ENGINE_TOKEN": token, "PYTHONUNBUFFERED": "1"}


def run_credential_cmd(command: str) -> str:
    """What *command* prints, as a credential.

    Raises:
        ValueError: If it fails or prints nothing; its output is not shown, for it may be secret.
    """
    try:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired as exc:
        raise ValueError("TINKER_CREDENTIAL_CMD did not end within 60 s.") from exc
    if done.returncode != 0 or not done.stdout.strip():
        raise ValueError(
            f"TINKER_CREDENTIAL_CMD ended with status {done.returncode} and "
            f"{'no' if not done.stdout.strip() else 'some'} output; it must print a credential."
        )
    return done.stdout.strip()


def _env(name: str) -> str | None:
    return os.environ.get(name, "").strip() or None


def _engine_key(base_url: str) -> str:
    """The key of the embedded engine at *base_url*, if it is one of this user's; else ""."""
    try:
        return engine_key_file(base_url).read_text()
    except OSError:
        return ""


def _cloudflare_headers() -> dict[str, str]:
    names = {
        "CF-Access-Client-Id": "CLOUDFLARE_ACCESS_CLIENT_ID",
        "CF-Access-Client-Secret": "CLOUDFLARE_ACCESS_CLIENT_SECRET",
    }
    return {header: value for header, name in names.items() if (value := _env(name))}


def _check_official_key(config: Config) -> Config:
    key = config.api_key or ("" if config.credential_cmd else _stored_key())
    if not key and not config.credential_cmd:
        raise ValueError(
            "api_key is required by the official service. Pass api_key=..., or set TINKER_API_KEY. "
            "(Without a key and a base_url, ServiceClient() runs the embedded engine.)"
        )
    if key and not key.startswith(("tml-", "eyJ")):
        raise ValueError(
            "api_key must start with the 'tml-' prefix (or be a JWT) for the official service; "
            "for another server, give its base_url."
        )
    return attrs.evolve(config, api_key=key)


def _stored_key() -> str:
    """The default key of the official command line's credentials file, or ""."""
    try:
        stored = json.loads(CREDENTIALS_FILE.expanduser().read_text())
        entry = stored["keys"][stored["default"]]
        return str(entry["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
