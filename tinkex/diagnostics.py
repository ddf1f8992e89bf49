"""What works between here and a server, step by step, and what to do about what does not.

Every step has its time limit, so that a checkup ends whatever it meets. It changes nothing on the
server: endpoints are found out by bodies that none of them can take. Knows nothing of how findings
are shown.
"""

from __future__ import annotations

import email.utils
import importlib.metadata
import importlib.util
import ipaddress
import platform
import re
import shutil
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import wait
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import attrs
import requests

from tinkex import config, errors, types, wire
from tinkex._version import __version__
from tinkex.conformance.asking import as_object, is_missing, said
from tinkex.runtime import embedded
from tinkex.runtime.executor import DaemonExecutor
from tinkex.runtime.responses import Answer
from tinkex.runtime.retry import ONCE
from tinkex.runtime.session import JSON_ONLY, Connection
from tinkex.runtime.transport import Transport

T = TypeVar("T")

Status = Literal["ok", "warning", "failed", "skipped"]

#: Seconds for a connection, an answer, a step; and for the engine, which imports torch.
CONNECT, ANSWER, STEP, ENGINE = 3.0, 5.0, 20.0, 90.0
#: Seconds that two clocks may differ.
SKEW = 30.0
#: Bytes: below the first a disk is nearly full, below the second nothing can be saved.
LITTLE_SPACE, NO_SPACE = 2 << 30, 50 << 20
#: Days that a certificate should still be good for.
CERTIFICATE_DAYS = 7

#: Stands for a model, a run, a session: no server has one of this name.
NOBODY = "tinkex-doctor"

_PATIENCE = config.Patience(
    connect=CONNECT, request=ANSWER, first_contact=ANSWER, no_answer=ANSWER, report_after=1e6
)
_ANY_STATUS = frozenset(range(300, 600))

#: Endpoints by what they are for, and those without which it does not work.
GROUPS: Mapping[str, tuple[tuple[wire.Endpoint[Any], ...], tuple[wire.Endpoint[Any], ...]]] = {
    "sessions": (
        (
            wire.CREATE_SESSION,
            wire.SESSION_HEARTBEAT,
            wire.FINISH_SESSION,
            wire.RETRIEVE_FUTURE,
            wire.RETRIEVE_FUTURES,
            wire.CANCEL_FUTURE,
        ),
        (wire.CREATE_SESSION, wire.RETRIEVE_FUTURE),
    ),
    "training": (
        (
            wire.CREATE_MODEL,
            wire.GET_INFO,
            wire.FORWARD,
            wire.FORWARD_BACKWARD,
            wire.OPTIM_STEP,
            wire.SAVE_WEIGHTS,
            wire.SAVE_WEIGHTS_FOR_SAMPLER,
            wire.LOAD_WEIGHTS,
            wire.UNLOAD_MODEL,
        ),
        (wire.CREATE_MODEL, wire.FORWARD_BACKWARD, wire.OPTIM_STEP),
    ),
    "sampling": (
        (
            wire.CREATE_SAMPLING_SESSION,
            wire.JOIN_SAMPLING_SESSION,
            wire.GET_SAMPLER,
            wire.SAMPLE,
            wire.STREAM_SAMPLE,
        ),
        (wire.SAMPLE,),
    ),
    "stored": (
        (
            wire.LIST_TRAINING_RUNS,
            wire.GET_TRAINING_RUN,
            wire.LIST_CHECKPOINTS,
            wire.LIST_USER_CHECKPOINTS,
            wire.WEIGHTS_INFO,
            wire.CHECKPOINT_ARCHIVE,
            wire.PUBLISH_CHECKPOINT,
            wire.UNPUBLISH_CHECKPOINT,
            wire.SET_CHECKPOINT_TTL,
            wire.DELETE_CHECKPOINT,
            wire.LIST_SESSIONS,
            wire.GET_SESSION,
        ),
        (),
    ),
}


@attrs.frozen
class Finding:
    """What one step found.

    Attributes:
        status: "failed" is what nothing works without.
        advice: what to do about it; "" if there is nothing to do.
        details: the same for programs.
    """

    step: str
    status: Status
    text: str
    advice: str = ""
    details: dict[str, Any] = attrs.field(factory=dict)


class Failed(Exception):
    """A step without which the following ones make no sense has failed."""

    def __init__(self, text: str, advice: str = "") -> None:
        super().__init__(text)
        self.text, self.advice = text, advice


Step = tuple[str, float, Callable[[], Finding]]


def examine(base_url: str | None = None, api_key: str | None = None) -> Iterator[Finding]:
    """Check the server that is named (here or in the environment), or else the embedded engine."""
    if config.wants_embedded(base_url, api_key):
        yield from _of_this_machine()
    else:
        yield from _of_server(base_url, api_key)


def _run(steps: list[Step]) -> Iterator[Finding]:
    """The findings of *steps*, until one fails; then one that names those that were not tried."""
    pool = DaemonExecutor(len(steps), "tinkex-checkup")
    for number, (name, limit, step) in enumerate(steps):
        finding = _finding(pool, name, limit, step)
        yield finding
        if finding.status == "failed":
            left = ", ".join(name for name, _, _ in steps[number + 1 :])
            if left:
                yield Finding("not tried", "skipped", left)
            break
    pool.shutdown(wait=False)


def _finding(pool: DaemonExecutor, name: str, limit: float, step: Callable[[], Finding]) -> Finding:
    future = pool.submit(step)
    if not wait([future], limit).done:
        advice = "Is the machine, or the network, very busy? Otherwise ask who runs it."
        return Finding(name, "failed", f"not done within {limit:.0f} s", advice)
    try:
        found: Finding = future.result()
        return found
    except Failed as exc:
        return Finding(name, "failed", exc.text, exc.advice)
    except (errors.TinkexError, OSError, ValueError) as exc:
        return Finding(name, "failed", str(exc))


# This machine


def _of_this_machine() -> Iterator[Finding]:
    engine = _Engine()
    steps: list[Step] = [
        ("python", STEP, _python),
        ("extras", STEP, _extras),
        ("home", STEP, _home),
        ("disk", STEP, _disk),
        ("engine", ENGINE, engine.start),
    ]
    sound = True
    try:
        for finding in _run(steps):
            sound = sound and finding.status != "failed"
            yield finding
        if sound and engine.running is not None:
            yield from _of_server(engine.running.base_url, engine.running.api_key)
    finally:
        if engine.running is not None:
            embedded.release(engine.running)


def _python() -> Finding:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    details = {"python": platform.python_version(), "tinkex": __version__}
    return Finding("python", "ok", f"tinkex {__version__}, Python {text}", details=details)


def _extras() -> Finding:
    found = {name: _version_of(name) for name in embedded.NEEDED}
    missing = [name for name, version in found.items() if version is None]
    if missing:
        raise Failed(
            f"the embedded engine needs what is not installed: {', '.join(missing)}",
            "pip install 'tinkex[local]'; or name a server: tinkex doctor URL.",
        )
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    return Finding("extras", "ok", text, details=found)


def _version_of(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _home() -> Finding:
    home = config.home()
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as exc:
        raise Failed(
            f"{home} cannot be written: {exc.strerror or exc}",
            "Set TINKEX_HOME to a folder of yours.",
        ) from exc
    return Finding("home", "ok", f"{home} can be written", details={"home": str(home)})


def _disk() -> Finding:
    home = config.home()
    free = shutil.disk_usage(home).free
    text, details = f"{free / (1 << 30):.1f} GB are free at {home}", {"free_bytes": free}
    advice = (
        "Delete old checkpoints (tinkex checkpoint delete --older-than 30d), or set TINKEX_HOME."
    )
    if free < NO_SPACE:
        raise Failed(text, advice)
    if free < LITTLE_SPACE:
        return Finding("disk", "warning", text, advice, details)
    return Finding("disk", "ok", text, details=details)


class _Engine:
    """The embedded engine, once it is started."""

    def __init__(self) -> None:
        self.running: embedded.EmbeddedEngine | None = None

    def start(self) -> Finding:
        """Start it, and wait until its compute thread has all that it needs."""
        begun = time.monotonic()
        self.running = embedded.acquire()
        answering = time.monotonic() - begun
        transport = Transport(config.load(self.running.base_url, self.running.api_key))
        answer = _ask(transport, "GET", wire.HEALTHZ.path)
        while answer.status == 200 and answer.headers.get("X-Tinkex-Engine") == "starting":
            time.sleep(0.1)
            answer = _ask(transport, "GET", wire.HEALTHZ.path)
        if answer.status != 200:
            raise Failed(
                f"it does not run: {said(answer)}", f"Its log is in {config.home() / 'logs'}."
            )
        text = f"answered after {answering:.1f} s, ready after {time.monotonic() - begun:.1f} s"
        return Finding("engine", "ok", text)


# A server


def _of_server(base_url: str | None, api_key: str | None) -> Iterator[Finding]:
    try:
        settings = config.load(base_url, api_key, patience=_PATIENCE)
    except ValueError as exc:
        yield Finding("settings", "failed", str(exc))
        return
    server = _Server(settings)
    limit = STEP
    try:
        yield from _run(
            [
                ("dns", limit, server.dns),
                ("tcp", limit, server.tcp),
                ("tls", limit, server.tls),
                ("http", limit, server.http),
                ("clock", limit, server.clock),
                ("api", limit, server.api),
                ("key", limit, server.key),
                ("dialect", limit, server.dialect),
                *((name, limit, partial(server.offers, name)) for name in GROUPS),
                ("models", limit, server.models),
            ]
        )
    finally:
        server.transport.close()


def _ask(
    transport: Transport,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    query: Mapping[str, Any] | None = None,
) -> Answer:
    """One request, once; every status is an answer. TinkexError if none comes."""
    return transport.send(
        method,
        transport.url(
            path, run_id=NOBODY, checkpoint_id=f"weights/{NOBODY}", session_id=NOBODY,
            sampler_id=NOBODY,
        ),
        body,
        headers=headers,
        query=query,
        retry=ONCE,
        accept=_ANY_STATUS,
        parse=lambda answer: answer,
    )  # fmt: skip


class _Server:
    """One server, and what the steps have found out for those after them."""

    def __init__(self, settings: config.Config) -> None:
        self.settings = settings
        self.transport = Transport(settings)
        url = urlsplit(settings.base_url)
        self._is_https = url.scheme == "https"
        proxies = requests.utils.get_environ_proxies(settings.base_url)
        proxy = str(requests.utils.select_proxy(settings.base_url, proxies) or "")
        self._proxy = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        first = self._proxy if proxy else url
        #: Where the first connection goes.
        self._host: str = first.hostname or ""
        self._port = first.port or (443 if first.scheme == "https" else 80)
        self._addresses: list[str] = []
        self._healthz: Answer | None = None
        self._asked_at = 0.0  # seconds since the epoch, half-way through that request
        self._protobuf: bool | None = None

    @property
    def _through(self) -> str:
        """What to say of a first connection that does not go to the server itself."""
        if not self._proxy.hostname:
            return ""
        return f" (the proxy of the environment, for {self.settings.base_url})"

    def dns(self) -> Finding:
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError as exc:
            raise Failed(
                f"{self._host}{self._through} does not resolve: {exc.strerror or exc}",
                "Is the name spelled right? Is this machine on the network (and its VPN)?",
            ) from exc
        self._addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        text = f"{self._host} is {', '.join(self._addresses)}"
        if self._addresses == [self._host]:
            text = f"{self._host} is an address; nothing to resolve"
        return Finding("dns", "ok", text + self._through, details={"addresses": self._addresses})

    def tcp(self) -> Finding:
        problems = []
        for address in self._addresses:
            begun = time.monotonic()
            try:
                socket.create_connection((address, self._port), CONNECT).close()
            except OSError as exc:
                problems.append((address, exc))
                continue
            took = 1000 * (time.monotonic() - begun)
            text = f"{_place(address, self._port)} takes connections ({took:.1f} ms)"
            return Finding("tcp", "ok", text + self._through)
        address, problem = problems[0]
        place = _place(address, self._port) + self._through
        if isinstance(problem, ConnectionRefusedError):
            raise Failed(
                f"nobody listens on {place}: connection refused",
                "Is the server running, on this port? `tinkex serve` prints its address.",
            )
        if isinstance(problem, TimeoutError):
            raise Failed(
                f"{place} does not answer within {CONNECT:.0f} s",
                "Is it the right host? A firewall between drops such packets without a word.",
            )
        raise Failed(f"{place}: {problem.strerror or problem}", "Is this machine on the network?")

    def tls(self) -> Finding:
        if not self._is_https:
            if self._proxy.hostname or _is_loopback(self._addresses):
                return Finding("tls", "ok", "http: not encrypted, and need not be")
            return Finding(
                "tls",
                "warning",
                "http: key and data travel unencrypted",
                "Put a proxy with TLS before the server, or use a tunnel (ssh -L).",
            )
        if self._proxy.hostname:
            return Finding("tls", "ok", "through the proxy; the next step tells")
        try:
            with socket.create_connection((self._host, self._port), CONNECT) as plain:
                plain.settimeout(ANSWER)
                with _tls_context().wrap_socket(plain, server_hostname=self._host) as encrypted:
                    return _of_certificate(encrypted.version() or "TLS", encrypted.getpeercert())
        except ssl.SSLCertVerificationError as exc:
            raise Failed(
                f"the certificate is not good: {exc.verify_message}",
                "Is the host name the certificate's, and this machine's clock right? For a CA of "
                "your own set REQUESTS_CA_BUNDLE to its file.",
            ) from exc
        except ssl.SSLError as exc:
            raise Failed(
                f"no TLS here: {exc.reason or exc}", "Is it http:// rather than https://?"
            ) from exc

    def http(self) -> Finding:
        begun, clock = time.time(), time.monotonic()
        answer = _ask(self.transport, "GET", wire.HEALTHZ.path)
        took = time.monotonic() - clock
        self._healthz, self._asked_at = answer, begun + took / 2
        text = f"healthz answered {answer.status} in {1000 * took:.0f} ms"
        version = answer.headers.get("X-Tinkex-Version")
        if version:
            engine = answer.headers.get("X-Tinkex-Engine", "")
            text += f": tinkex {version}, engine {engine}" if engine else f": tinkex {version}"
        if answer.status < 300 or answer.status in (401, 403, 404):
            return Finding("http", "ok", text)
        advice = "Ask who runs it."
        if answer.status < 400:
            location = answer.headers.get("Location", "elsewhere").split("?")[0]
            advice = f"It redirects to {location}; give the address of the server itself."
        raise Failed(f"{text}: {said(answer)}", advice)

    def clock(self) -> Finding:
        told = self._healthz.headers.get("Date", "") if self._healthz is not None else ""
        try:
            moment = email.utils.parsedate_to_datetime(told).timestamp()
        except (TypeError, ValueError):
            return Finding("clock", "ok", "the server does not tell its time")
        skew = moment + 0.5 - self._asked_at  # the header has whole seconds
        details = {"skew_seconds": round(skew, 1)}
        if abs(skew) > SKEW:
            later = "ahead of" if skew > 0 else "behind"
            text = f"the server's clock is {abs(skew):.0f} s {later} this machine's"
            advice = "Set the one that is wrong: tokens and certificates live by the time."
            return Finding("clock", "warning", text, advice, details)
        return Finding("clock", "ok", "the server's and this machine's agree", details=details)

    def api(self) -> Finding:
        body = wire.dumps(wire.to_json(types.ClientConfigRequest(config.PROTOCOL_VERSION)))
        answer = _ask(self.transport, "POST", wire.CLIENT_CONFIG.path, body)
        if answer.status in (401, 403):
            return Finding("api", "ok", f"client/config wants a key ({answer.status})")
        if is_missing(answer) and self._speaks_json(answer):
            text = "no client/config: the protocol's defaults are assumed"
            return Finding("api", "warning", text, "The official SDK does not start without it.")
        if not self._speaks_json(answer):
            raise Failed(
                f"client/config answered {answer.status} with no JSON but {answer.content[:60]!r}",
                "Is this the URL of a training server, without a proxy's login page before it?",
            )
        if answer.status >= 300:
            raise Failed(f"client/config answered {said(answer)}", "Ask who runs it.")
        return Finding("api", "ok", f"speaks the protocol under {wire.PREFIX}")

    @staticmethod
    def _speaks_json(answer: Answer) -> bool:
        return "json" in answer.headers.get("Content-Type", "") or bool(as_object(answer))

    def key(self) -> Finding:
        source = config.key_source(self.settings)
        try:
            connection = Connection(self.settings, transport=self.transport)
            asked = self._asked_with_key(connection)
        except errors.AuthenticationError as exc:
            if source is None:
                raise Failed(
                    f"the server wants one: {exc.detail or 401}",
                    "Set TINKER_API_KEY, or --api-key.",
                ) from exc
            raise Failed(
                f"refused ({source}): {exc.detail or 401}",
                "Is it this server's, and whole? Keys are shown once; make another if in doubt.",
            ) from exc
        except errors.PermissionDeniedError as exc:
            raise Failed(
                f"taken ({source or 'none'}), but not for this: {exc.detail or 403}"
            ) from exc
        shown = source or "none was sent, none is wanted"
        if asked is None:
            return Finding("key", "ok", f"{shown}; not tried, for nothing can be looked up here")
        return Finding("key", "ok", f"{shown} (by {asked})")

    @staticmethod
    def _asked_with_key(connection: Connection) -> str | None:
        """An endpoint that lets this key look something up; None if there is none to ask."""
        lists: tuple[wire.Endpoint[Any], ...] = (
            wire.LIST_SESSIONS,
            wire.LIST_TRAINING_RUNS,
            wire.LIST_USER_CHECKPOINTS,
        )
        for endpoint in lists:
            try:
                connection.call(endpoint, query={"limit": 1, "offset": 0}, retry=ONCE)
                return endpoint.path
            except errors.NotOfferedError:
                continue
        return None

    def dialect(self) -> Finding:
        json, protobuf = self._takes(protobuf=False), self._takes(protobuf=True)
        self._protobuf = protobuf
        taken = [name for name, is_taken in (("JSON", json), ("protobuf", protobuf)) if is_taken]
        details = {"json": json, "protobuf": protobuf}
        if not taken:
            text = "forward_backward takes neither JSON nor protobuf"
            return Finding("dialect", "warning", text, "It cannot train.", details)
        text = f"forward_backward takes {' and '.join(taken)}"
        return Finding("dialect", "ok", text, details=details)

    def _takes(self, *, protobuf: bool) -> bool:
        """Whether a batch in this dialect is read: for a model that there is not."""
        request = types.ForwardBackwardRequest(NOBODY, 1, [], "cross_entropy")
        path, content_type, _, body = wire.encode_request(request, protobuf)
        answer = _ask(self.transport, "POST", path, body, {"Content-Type": content_type})
        if is_missing(answer) or answer.status == 415:
            return False
        if NOBODY in answer.content.decode("utf-8", "replace"):
            return True  # it was read, for it is talked about
        return answer.status not in (JSON_ONLY if protobuf else (500,))

    def offers(self, group: str) -> Finding:
        endpoints, needed = GROUPS[group]
        if self._protobuf:  # forward goes to forward_backward, then
            endpoints = tuple(one for one in endpoints if one is not wire.FORWARD)
        missing = [one for one in endpoints if not self._has(one)]
        details = {
            "offered": [_name(one) for one in endpoints if one not in missing],
            "missing": [_name(one) for one in missing],
        }
        if not missing:
            return Finding(group, "ok", ", ".join(details["offered"]), details=details)
        text = f"not offered: {', '.join(details['missing'])}"
        if details["offered"]:
            text += f"; offered: {', '.join(details['offered'])}"
        lacks = [_name(one) for one in missing if one in needed]
        advice = f"Nothing of this works without {', '.join(lacks)}." if lacks else ""
        is_vital = bool(lacks) and group == "sessions"
        return Finding(group, "failed" if is_vital else "warning", text, advice, details)

    def _has(self, endpoint: wire.Endpoint[Any]) -> bool:
        """Asked for what does not exist, with a body that no endpoint takes: nothing is changed."""
        headers = {"Content-Type": wire.JSON}
        if endpoint.method == "GET":
            answer = _ask(self.transport, "GET", endpoint.path, query={"limit": 1})
        else:
            answer = _ask(self.transport, endpoint.method, endpoint.path, b"[]", headers)
        return not is_missing(answer)

    def models(self) -> Finding:
        answer = _ask(self.transport, "GET", wire.CAPABILITIES.path)
        if answer.status >= 300:
            return Finding("models", "warning", f"the server does not say: {said(answer)}")
        found = self.transport.decode(wire.CAPABILITIES.result, answer).model_names
        if not found:
            return Finding("models", "warning", "the server names none")
        more = f" and {len(found) - 10} more" if len(found) > 10 else ""
        return Finding("models", "ok", ", ".join(found[:10]) + more, details={"models": found})


def _name(endpoint: wire.Endpoint[Any]) -> str:
    """Its path, with a method that is not POST before it and * for what varies."""
    path = re.sub(r"{\w+}", "*", endpoint.path)
    return path if endpoint.method == "POST" else f"{endpoint.method} {path}"


def _place(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _is_loopback(addresses: list[str]) -> bool:
    return all(ipaddress.ip_address(one.split("%")[0]).is_loopback for one in addresses)


def _tls_context() -> ssl.SSLContext:
    """As strict as the client's own: with the CAs that requests would take."""
    settings = requests.Session().merge_environment_settings("https://x", {}, None, None, None)
    bundle = (
        settings["verify"]
        if isinstance(settings["verify"], str)
        else requests.utils.DEFAULT_CA_BUNDLE_PATH
    )
    if Path(bundle).is_dir():
        return ssl.create_default_context(capath=bundle)
    return ssl.create_default_context(cafile=bundle)


def _of_certificate(version: str, certificate: Mapping[str, Any] | None) -> Finding:
    end = str((certificate or {}).get("notAfter", ""))
    if not end:
        return Finding("tls", "ok", version)
    until = datetime.fromtimestamp(ssl.cert_time_to_seconds(end), timezone.utc)
    days = (until - datetime.now(timezone.utc)).days
    text = f"{version}, certificate good until {until:%Y-%m-%d}"
    if days < CERTIFICATE_DAYS:
        return Finding("tls", "warning", text, "It ends soon; let who runs the server renew it.")
    return Finding("tls", "ok", text)
