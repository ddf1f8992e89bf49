"""Settings and where they come from: arguments, then a Config, then the environment, then defaults.

The only module that reads os.environ. Does not know about HTTP: it holds what the transport uses.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import attrs

#: The official service; used when there is a key and no base_url.
OFFICIAL_URL = "https://tinker.thinkingmachines.dev/services/tinker-prod"
#: The web console of the official service.
CONSOLE_URL = "https://tinker.thinkingmachines.ai"

#: The version of the official SDK whose protocol tinkex implements. Servers enable features by it,
#: so it is not tinkex's version (which is in the User-Agent).
PROTOCOL_VERSION = "0.38.0"

CREDENTIALS_FILE = Path("~/.tinker/credentials.json")


def check_seconds(
    name: str, value: object, *, or_zero: bool = False, or_none: bool = False
) -> None:
    """Raise ValueError or TypeError unless *value* is a positive, finite number of seconds."""
    if or_none and value is None:
        return
    wanted = "seconds of at least 0" if or_zero else "a positive number of seconds"
    text = f"{name} must be {wanted}{' or None' if or_none else ''}, got {value!r}."
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(text)
    if not 0 <= value < math.inf or not (value or or_zero):
        raise ValueError(text)


def _check_seconds(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    check_seconds(attribute.name, value)


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
    """A server's URL without a trailing slash. ValueError or TypeError if it is not a URL."""
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
        raise ValueError("base_url holds a query (?...) or fragment (#...); omit it.")
    return url.rstrip("/")


def _url_or_empty(url: object) -> str:
    return _check_url(url) if url else ""


def _check_key_characters(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"api_key must be a str, got {type(key).__name__}.")
    if not key.isprintable() or not key.isascii() or " " in key:
        raise ValueError(
            "api_key holds spaces, line breaks or characters that cannot be sent in a header; "
            "check that it was copied completely, and nothing else with it."
        )
    return key


def _check_text(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{attribute.name} must be a str or None, got {value!r}.")


def _check_text_dict(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, Mapping) or not all(
        isinstance(k, str) and isinstance(v, str) for k, v in value.items()
    ):
        raise TypeError(
            f"{attribute.name} must be a dict of str to str, got {type(value).__name__} "
            "(its values are not shown, they may be secret)."
        )


def _check_verify(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not isinstance(value, (bool, str)):
        raise TypeError(f"verify must be True, False or the path of a CA bundle, got {value!r}.")


def _check_hooks(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    wrong = "hooks must be a dict like {'response': function}, as in requests"
    if not isinstance(value, Mapping):
        raise TypeError(f"{wrong}, got {value!r}.")
    for event, hooks in value.items():
        if event != "response":
            raise ValueError(f"{wrong}; {event!r} is not an event of requests.")
        for hook in hooks if isinstance(hooks, (list, tuple)) else [hooks]:
            if not callable(hook):
                raise TypeError(f"{wrong}; {hook!r} is not a function.")


def _check_session(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    requests = sys.modules.get("requests")  # imported if there is a Session
    if value is not None and not (requests and isinstance(value, requests.Session)):
        raise TypeError(f"session must be a requests.Session, got {value!r}.")


def _as_tags(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(tag, str) for tag in value):
        raise TypeError(f"tags must be a list of str, got {value!r}.")
    return tuple(value)


def _dict_or_empty(value: Any) -> Any:
    return {} if value is None else value


@attrs.frozen
class Patience:
    """Time limits and intervals of waits, in seconds.

    Args:
        connect: for a connection.
        request: for the response to a request.
        poll: for the response to one long poll, which servers hold for up to 40 s.
        first_contact: in total, until the first response of a server; refused connections and
            unknown hosts fail sooner.
        no_answer: in total, while a server that has answered before gives no useful response.
        report_after: before a wait is reported in the log.
        report_every: between two reports of the same wait.
        heartbeat: between two heartbeats of a session.
        close: for close() and the end of a program to wait for submitted operations; they give up
            sooner if the server does not answer for `no_answer`.
    """

    connect: float = _seconds(5.0)
    request: float = _seconds(60.0)
    poll: float = _seconds(45.0)
    first_contact: float = _seconds(8.0)
    no_answer: float = _seconds(600.0)
    report_after: float = _seconds(8.0)
    report_every: float = _seconds(60.0)
    heartbeat: float = _seconds(10.0)
    close: float = _seconds(86_400.0)


@attrs.frozen
class SamplingLimits:
    """Limits of concurrent sampling, for all samplers of one key.

    Args:
        requests_in_dispatch: requests that are being submitted at a time.
        bytes_in_dispatch: bytes of prompts in those requests.
        connections: most threads (and connections) that submit and poll.
    """

    requests_in_dispatch: int = attrs.field(default=400, validator=_check_count)
    bytes_in_dispatch: int = attrs.field(default=10 * 1024 * 1024, validator=_check_count)
    connections: int = attrs.field(default=256, validator=_check_count)


@attrs.frozen
class Config:
    """The server, the key, and further settings. Missing settings are looked up.

    Pass it as `ServiceClient(config=...)`. Arguments of the client override it; a field with its
    default value comes from the environment (`TINKER_*`), or keeps the default.

    Attributes:
        base_url: of the server; everything is under `<base_url>/api/v1/`. "" looks it up.
        api_key: sent as X-API-Key; "" looks it up (servers may need none). Never shown.
        credential_cmd: a command that prints a credential, for servers that exchange it for a JWT.
        project_id, tags: stored with each session.
        default_headers: sent with every request; values are never shown.
        telemetry: send usage events to the service; None looks it up; off by default.
        proxies: such as {"https": "http://10.0.0.1:3128"}; override HTTP_PROXY and HTTPS_PROXY.
        verify: False accepts any TLS certificate; a str is the path of a CA bundle.
        hooks: {"response": function or list of functions}, as in requests; each is called as
            function(response, **options) on the thread that made the request.
        session: a requests.Session for all requests. Do not change it from several threads at once;
            it is not closed.
    """

    base_url: str = attrs.field(default="", converter=_url_or_empty)
    api_key: str = attrs.field(default="", repr=False, converter=_check_key_characters)
    credential_cmd: str | None = attrs.field(default=None, repr=False)
    project_id: str | None = attrs.field(default=None, validator=_check_text)
    tags: tuple[str, ...] = attrs.field(default=(), converter=_as_tags)
    default_headers: Mapping[str, str] = attrs.field(
        factory=dict, repr=False, converter=_dict_or_empty, validator=_check_text_dict
    )
    telemetry: bool | None = None
    patience: Patience = attrs.field(
        factory=Patience, validator=_instance_of(Patience, "tinkex.Patience")
    )
    sampling: SamplingLimits = attrs.field(
        factory=SamplingLimits, validator=_instance_of(SamplingLimits, "tinkex.SamplingLimits")
    )
    proxies: Mapping[str, str] = attrs.field(
        factory=dict, repr=False, converter=_dict_or_empty, validator=_check_text_dict
    )
    verify: bool | str | None = attrs.field(default=None, validator=_check_verify)
    hooks: Mapping[str, Any] = attrs.field(
        factory=dict, repr=False, converter=_dict_or_empty, validator=_check_hooks
    )
    session: Any = attrs.field(default=None, repr=False, validator=_check_session)

    @property
    def is_official(self) -> bool:
        """True for the official service, which is strict about keys."""
        return urlsplit(self.base_url).hostname == urlsplit(OFFICIAL_URL).hostname

    def console_url(self, kind: str, name: str) -> str:
        """The web address of a session or a training run: its page in the official service's
        console; on other servers, its API address.

        Args:
            kind: "sessions" or "training_runs".
        """
        where = CONSOLE_URL if self.is_official else f"{self.base_url.rstrip('/')}/api/v1"
        return f"{where}/{kind}/{quote(name, safe=':')}"

    def without_secrets(self) -> Config:
        """A copy for pickling, without secrets and functions; these are looked up or given again
        where the copy is used."""
        return attrs.evolve(
            self,
            api_key="",
            credential_cmd=None,
            default_headers={},
            proxies={},
            hooks={},
            session=None,
        )


def wants_embedded(
    base_url: str | None = None, api_key: str | None = None, config: Config | None = None
) -> bool:
    """True if nothing names a server, so that the embedded engine is started."""
    given = _checked(config)
    named = base_url or api_key or given.base_url or given.api_key or given.credential_cmd
    in_environment = ("TINKER_BASE_URL", "TINKER_API_KEY", "TINKER_CREDENTIAL_CMD")
    return not named and not any(variable(name) for name in in_environment)


def load(
    base_url: str | None = None,
    api_key: str | None = None,
    *,
    config: Config | None = None,
    **fields: Any,
) -> Config:
    """The settings: arguments > *config* > environment (TINKER_*) > defaults.

    Args:
        fields: further fields of Config; None is "not given".

    Raises:
        TypeError, ValueError: If a value is invalid, such as a base_url that is not a URL; or if
            the official service is used and the key is missing or malformed.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    given = attrs.evolve(_checked(config), **fields)
    url = _check_url(base_url or given.base_url or variable("TINKER_BASE_URL") or OFFICIAL_URL)
    telemetry = given.telemetry
    if telemetry is None:
        telemetry = (variable("TINKER_TELEMETRY") or "").lower() in ("1", "true", "yes", "on")
    loaded = attrs.evolve(
        given,
        base_url=url,
        api_key=api_key or given.api_key or variable("TINKER_API_KEY") or _engine_key(url),
        credential_cmd=given.credential_cmd or variable("TINKER_CREDENTIAL_CMD"),
        project_id=given.project_id or variable("TINKER_PROJECT_ID"),
        tags=given.tags or _tags(variable("TINKER_TAGS") or ""),
        default_headers={**_cloudflare_headers(), **given.default_headers},
        telemetry=telemetry,
    )
    return _check_official_key(loaded) if loaded.is_official else loaded


def _checked(config: object) -> Config:
    if config is None:
        return Config()
    if not isinstance(config, Config):
        raise TypeError(f"config must be a tinkex.Config, got {config!r}.")
    return config


def _tags(text: str) -> tuple[str, ...]:
    return tuple(tag.strip() for tag in text.split(",") if tag.strip())


def key_source(config: Config) -> str | None:
    """A description of the source of the credential in *config*; None if there is none."""
    if config.api_key and config.api_key == variable("TINKER_API_KEY"):
        return "from TINKER_API_KEY"
    if config.api_key and config.api_key == _engine_key(config.base_url):
        return "of the embedded engine"
    if config.api_key and config.is_official and config.api_key == stored_key():
        return f"from {CREDENTIALS_FILE}"
    if config.api_key:
        return "the one given"
    return "from TINKER_CREDENTIAL_CMD" if config.credential_cmd else None


def log_level() -> str | None:
    """The log level in TINKEX_LOG, in lower case; None if it is not set."""
    level = variable("TINKEX_LOG")
    return level.lower() if level else None


def wants_color() -> bool:
    """True if colors may be written to a terminal (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def home() -> Path:
    """The folder where the local server stores its files: TINKEX_HOME, or ~/.tinkex."""
    return Path(variable("TINKEX_HOME") or "~/.tinkex").expanduser()


def cache() -> Path:
    """The cache folder: tinkex/ in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(variable("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tinkex"


def engine_key_file(base_url: str) -> Path:
    """The file with the key of the embedded engine at *base_url*, while the engine runs.

    Only its user can read it. Pickled clients and the command line use it in other processes.
    """
    parts = urlsplit(base_url)
    return home() / "engines" / f"{parts.hostname}-{parts.port}.key"


def engine_addresses() -> list[str]:
    """Addresses of this user's embedded engines, the newest first. Some may have died."""
    files = sorted((home() / "engines").glob("*.key"), key=lambda path: -path.stat().st_mtime)
    names = [path.stem.rpartition("-") for path in files]
    return [
        f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        for host, _, port in names
    ]


def openai_key() -> str:
    """The key for servers in the style of OpenAI: OPENAI_API_KEY, or ""."""
    return variable("OPENAI_API_KEY") or ""


def engine_token() -> str | None:
    """The secret by which an embedded engine authenticates its parent process."""
    return variable("TINKEX_ENGINE_TOKEN")


#: Environment variables for the embedded engine only. One engine serves the whole process.
_for_engine: dict[str, str] = {}


def set_engine_dtype(dtype: str) -> None:
    """Set the type of base weights of embedded engines that this process starts later."""
    _for_engine["TINKEX_DTYPE"] = dtype


def engine_settings() -> tuple[str, str]:
    """Device and dtype of the embedded engines that this process starts, for `Engine`."""
    device = variable("TINKEX_DEVICE") or "auto"
    return device, _for_engine.get("TINKEX_DTYPE") or variable("TINKEX_DTYPE") or "auto"


def engine_environment(token: str) -> dict[str, str]:
    """The environment of an embedded engine: ours, with the secret, but without our keys and the
    variables of `tinkex serve`."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TINKER_API_KEY", "TINKER_BASE_URL")
        and not name.startswith("TINKEX_SERVE_")
    }
    return {**ours, **_for_engine, "TINKEX_ENGINE_TOKEN": token, "PYTHONUNBUFFERED": "1"}


def run_credential_cmd(command: str) -> str:
    """Run *command*, which prints a credential, and return its output.

    Raises:
        ValueError: If it fails or prints nothing; its output may be secret and is not shown.
    """
    try:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired as exc:
        raise ValueError("TINKER_CREDENTIAL_CMD did not finish within 60 s.") from exc
    if done.returncode != 0 or not done.stdout.strip():
        raise ValueError(
            f"TINKER_CREDENTIAL_CMD ended with status {done.returncode} and "
            f"{'no' if not done.stdout.strip() else 'some'} output; it must print a credential."
        )
    return done.stdout.strip()


def variable(name: str) -> str | None:
    """An environment variable without surrounding spaces; None if it is not set or empty."""
    return os.environ.get(name, "").strip() or None


def _engine_key(base_url: str) -> str:
    """The key of this user's embedded engine at *base_url*; "" if there is none."""
    try:
        return engine_key_file(base_url).read_text()
    except OSError:
        return ""


def _cloudflare_headers() -> dict[str, str]:
    names = {
        "CF-Access-Client-Id": "CLOUDFLARE_ACCESS_CLIENT_ID",
        "CF-Access-Client-Secret": "CLOUDFLARE_ACCESS_CLIENT_SECRET",
    }
    return {header: value for header, name in names.items() if (value := variable(name))}


def _check_official_key(config: Config) -> Config:
    key = config.api_key or ("" if config.credential_cmd else stored_key())
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


def stored_key() -> str:
    """The default key of the official command line's credentials file, or ""."""
    try:
        stored = json.loads(CREDENTIALS_FILE.expanduser().read_text())
        entry = stored["keys"][stored["default"]]
        return str(entry["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def found_key() -> tuple[str, str]:
    """The source of the key for the official service, and the key itself.

    ("", "") if there is none; the key is "" if TINKER_CREDENTIAL_CMD prints it. Runs nothing.
    """
    if given := variable("TINKER_API_KEY"):
        return "TINKER_API_KEY", given
    if variable("TINKER_CREDENTIAL_CMD"):
        return "TINKER_CREDENTIAL_CMD", ""
    key = stored_key()
    return (str(CREDENTIALS_FILE.expanduser()), key) if key else ("", "")
