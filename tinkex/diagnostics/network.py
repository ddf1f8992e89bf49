"""Examines the way to a server: name resolution, TCP, TLS."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from tinkex import config
from tinkex.diagnostics.steps import Failed, Finding, Limits

#: Days that a certificate must remain valid for, or there is a warning.
CERTIFICATE_DAYS = 7


class Network:
    """The first connection on the way to a server: to itself, or to a proxy of the environment."""

    def __init__(self, settings: config.Config, limits: Limits) -> None:
        self._base_url = settings.base_url
        self._limits = limits
        url = urlsplit(settings.base_url)
        self._is_https = url.scheme == "https"
        proxies = requests.utils.get_environ_proxies(settings.base_url)
        proxy = str(requests.utils.select_proxy(settings.base_url, proxies) or "")
        self._proxy = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        first = self._proxy if proxy else url
        self._host: str = first.hostname or ""
        self._port = first.port or (443 if first.scheme == "https" else 80)
        self._addresses: list[str] = []

    @property
    def _through(self) -> str:
        """A note for messages, if the first connection goes to a proxy."""
        if not self._proxy.hostname:
            return ""
        return f" (the proxy from the environment, on the way to {self._base_url})"

    def dns(self) -> Finding:
        """Resolve the host name."""
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError as exc:
            raise Failed(
                f"{self._host}{self._through} does not resolve: {exc.strerror or exc}",
                "Check the spelling of the name, and that this machine is on the "
                "network (or the VPN).",
            ) from exc
        self._addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        text = f"{self._host} resolves to {', '.join(self._addresses)}"
        if self._addresses == [self._host]:
            text = f"{self._host} is an IP address; nothing to resolve"
        return Finding("dns", "ok", text + self._through, details={"addresses": self._addresses})

    def tcp(self) -> Finding:
        """Connect to one of the addresses."""
        problems = []
        for address in self._addresses:
            begun = time.monotonic()
            try:
                socket.create_connection((address, self._port), self._limits.connect).close()
            except OSError as exc:
                problems.append((address, exc))
                continue
            took = 1000 * (time.monotonic() - begun)
            text = f"{_place(address, self._port)} accepts connections ({took:.1f} ms)"
            return Finding("tcp", "ok", text + self._through)
        address, problem = problems[0]
        place = _place(address, self._port) + self._through
        if isinstance(problem, ConnectionRefusedError):
            raise Failed(
                f"nothing listens on {place}: connection refused",
                "Check that the server is running, and its port; `tinkex serve` "
                "prints its address.",
            )
        if isinstance(problem, TimeoutError):
            raise Failed(
                f"{place} does not answer within {self._limits.connect:.0f} s",
                "Check the host name. A firewall may be dropping the packets silently.",
            )
        raise Failed(
            f"{place}: {problem.strerror or problem}", "Check that this machine is on the network."
        )

    def tls(self) -> Finding:
        """Check encryption and certificate."""
        if not self._is_https:
            if self._proxy.hostname or _is_loopback(self._addresses):
                return Finding("tls", "ok", "http: not encrypted, and does not need to be")
            return Finding(
                "tls",
                "warning",
                "http: the key and the data travel unencrypted",
                "Put a TLS proxy in front of the server, or use a tunnel (ssh -L).",
            )
        if self._proxy.hostname:
            return Finding("tls", "ok", "through the proxy; the next step checks it")
        try:
            with socket.create_connection((self._host, self._port), self._limits.connect) as plain:
                plain.settimeout(self._limits.answer)
                with _tls_context().wrap_socket(plain, server_hostname=self._host) as encrypted:
                    return certificate_finding(
                        encrypted.version() or "TLS", encrypted.getpeercert()
                    )
        except ssl.SSLCertVerificationError as exc:
            raise Failed(
                f"the certificate is not valid: {exc.verify_message}",
                "Check the host name and this machine's clock. For a private CA set "
                "REQUESTS_CA_BUNDLE to the file of its certificate.",
            ) from exc
        except ssl.SSLError as exc:
            raise Failed(
                f"the server does not speak TLS here: {exc.reason or exc}",
                "Use http:// instead of https://, or check the port.",
            ) from exc


def _place(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _is_loopback(addresses: list[str]) -> bool:
    return all(ipaddress.ip_address(one.split("%")[0]).is_loopback for one in addresses)


def _tls_context() -> ssl.SSLContext:
    """As strict as the client: with the CAs that requests would use."""
    settings = requests.Session().merge_environment_settings("https://x", {}, None, None, None)
    bundle = (
        settings["verify"]
        if isinstance(settings["verify"], str)
        else requests.utils.DEFAULT_CA_BUNDLE_PATH
    )
    if Path(bundle).is_dir():
        return ssl.create_default_context(capath=bundle)
    return ssl.create_default_context(cafile=bundle)


def certificate_finding(version: str, certificate: Mapping[str, Any] | None) -> Finding:
    """Judge a certificate, as `SSLSocket.getpeercert` gives it, by its last day."""
    end = str((certificate or {}).get("notAfter", ""))
    if not end:
        return Finding("tls", "ok", version)
    until = datetime.fromtimestamp(ssl.cert_time_to_seconds(end), timezone.utc)
    days = (until - datetime.now(timezone.utc)).days
    text = f"{version}, certificate valid until {until:%Y-%m-%d}"
    if days < CERTIFICATE_DAYS:
        return Finding(
            "tls", "warning", text, "It expires soon; ask the operator of the server to renew it."
        )
    return Finding("tls", "ok", text)
