"""Examines a server: does it answer, accept the key, offer the endpoints and name its models."""

from __future__ import annotations

import email.utils
import time
from functools import partial
from typing import Any

import attrs

from tinkex import config, errors, types, wire
from tinkex.conformance.client import as_object, is_missing, said
from tinkex.diagnostics.endpoints import GROUPS, label
from tinkex.diagnostics.exchange import UNKNOWN_ID, ask
from tinkex.diagnostics.network import Network
from tinkex.diagnostics.steps import Failed, Finding, Limits, Step
from tinkex.runtime.connection import Connection
from tinkex.runtime.responses import Answer
from tinkex.runtime.retry import ONCE
from tinkex.runtime.session import JSON_ONLY
from tinkex.runtime.transport import Transport

#: Seconds that two clocks may differ.
SKEW = 30.0


class Server:
    """One server, and what earlier steps found out for later ones.

    Args:
        settings: address and key; *limits* takes the place of its patience.
    """

    def __init__(self, settings: config.Config, limits: Limits) -> None:
        patience = config.Patience(
            connect=limits.connect,
            request=limits.answer,
            first_contact=limits.answer,
            no_answer=limits.answer,
            report_after=1e6,
        )
        self.settings = attrs.evolve(settings, patience=patience)
        self.transport = Transport(self.settings)
        self._limits = limits
        self._healthz: Answer | None = None
        self._asked_at = 0.0  # seconds since the epoch, half-way through that request
        self._protobuf: bool | None = None

    def steps(self) -> list[Step]:
        """From the host name to the models."""
        network, limit = Network(self.settings, self._limits), self._limits.step
        return [
            Step("dns", limit, network.dns),
            Step("tcp", limit, network.tcp),
            Step("tls", limit, network.tls),
            Step("http", limit, self.http),
            Step("clock", limit, self.clock),
            Step("api", limit, self.api),
            Step("key", limit, self.key),
            Step("dialect", limit, self.dialect),
            *(Step(group, limit, partial(self.endpoints, group)) for group in GROUPS),
            Step("models", limit, self.models),
        ]

    def http(self) -> Finding:
        """Ask for healthz."""
        begun, clock = time.time(), time.monotonic()
        answer = ask(self.transport, "GET", wire.HEALTHZ.path)
        took = time.monotonic() - clock
        self._healthz, self._asked_at = answer, begun + took / 2
        text = f"healthz answered {answer.status} in {1000 * took:.0f} ms"
        version = answer.headers.get("X-Tinkex-Version")
        if version:
            engine = answer.headers.get("X-Tinkex-Engine", "")
            text += f": tinkex {version}, engine {engine}" if engine else f": tinkex {version}"
        if answer.status < 300 or answer.status in (401, 403, 404):
            return Finding("http", "ok", text)
        advice = "Ask the operator of the server."
        if answer.status < 400:
            location = answer.headers.get("Location", "elsewhere").split("?")[0]
            advice = f"It redirects to {location}; use the address of the server itself."
        raise Failed(f"{text}: {said(answer)}", advice)

    def clock(self) -> Finding:
        """Compare the Date header with this machine's clock."""
        date = self._healthz.headers.get("Date", "") if self._healthz is not None else ""
        try:
            moment = email.utils.parsedate_to_datetime(date).timestamp()
        except (TypeError, ValueError):
            return Finding("clock", "ok", "the server sends no Date header; not checked")
        skew = moment + 0.5 - self._asked_at  # the header has whole seconds
        details = {"skew_seconds": round(skew, 1)}
        if abs(skew) > SKEW:
            later = "ahead of" if skew > 0 else "behind"
            text = f"the server's clock is {abs(skew):.0f} s {later} this machine's"
            advice = "Set the wrong clock: tokens and certificates depend on the time."
            return Finding("clock", "warning", text, advice, details)
        return Finding(
            "clock", "ok", "the clocks of the server and of this machine agree", details=details
        )

    def api(self) -> Finding:
        """Ask for client/config, which every training server answers in JSON."""
        body = wire.dumps(wire.to_json(types.ClientConfigRequest(config.PROTOCOL_VERSION)))
        answer = ask(self.transport, "POST", wire.CLIENT_CONFIG.path, body)
        if answer.status in (401, 403):
            return Finding("api", "ok", f"client/config requires a key ({answer.status})")
        if is_missing(answer) and self._speaks_json(answer):
            text = "no client/config: tinkex uses the defaults of the protocol"
            return Finding("api", "warning", text, "The official SDK does not start without it.")
        if not self._speaks_json(answer):
            raise Failed(
                f"client/config answered {answer.status} with {answer.content[:60]!r} "
                "instead of JSON",
                "Check that this is the URL of a training server, and not of a login "
                "page before it.",
            )
        if answer.status >= 300:
            raise Failed(
                f"client/config answered {said(answer)}", "Ask the operator of the server."
            )
        return Finding("api", "ok", f"speaks the protocol under {wire.PREFIX}")

    @staticmethod
    def _speaks_json(answer: Answer) -> bool:
        return "json" in answer.headers.get("Content-Type", "") or bool(as_object(answer))

    def key(self) -> Finding:
        """Read a list that requires the key."""
        source = config.key_source(self.settings)
        try:
            connection = Connection(self.settings, transport=self.transport)
            asked = self._asked_with_key(connection)
        except errors.AuthenticationError as exc:
            if source is None:
                raise Failed(
                    f"the server requires a key: {exc.detail or 401}",
                    "Set TINKER_API_KEY, or give --api-key.",
                ) from exc
            raise Failed(
                f"refused ({source}): {exc.detail or 401}",
                "Check that the key belongs to this server and is complete, or create a new one.",
            ) from exc
        except errors.PermissionDeniedError as exc:
            raise Failed(
                f"accepted ({source or 'none'}), but without permission: {exc.detail or 403}"
            ) from exc
        shown = source or "none was sent, and none is required"
        if asked is None:
            return Finding(
                "key", "ok", f"{shown}; not checked, because the server has no lists to read"
            )
        return Finding("key", "ok", f"{shown} (checked with {asked})")

    @staticmethod
    def _asked_with_key(connection: Connection) -> str | None:
        """The path of a list that this key may read; None if the server offers no list."""
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
        """Find out whether batches may be JSON, protobuf or both."""
        json, protobuf = self._takes(protobuf=False), self._takes(protobuf=True)
        self._protobuf = protobuf
        taken = [name for name, is_taken in (("JSON", json), ("protobuf", protobuf)) if is_taken]
        details = {"json": json, "protobuf": protobuf}
        if not taken:
            text = "forward_backward accepts neither JSON nor protobuf"
            return Finding("dialect", "warning", text, "This server cannot train.", details)
        text = f"forward_backward accepts {' and '.join(taken)}"
        return Finding("dialect", "ok", text, details=details)

    def _takes(self, *, protobuf: bool) -> bool:
        """True if the server reads a batch in this dialect; the batch is for an unknown model."""
        request = types.ForwardBackwardRequest(UNKNOWN_ID, 1, [], "cross_entropy")
        path, content_type, _, body = wire.encode_request(request, protobuf)
        answer = ask(self.transport, "POST", path, body, {"Content-Type": content_type})
        if is_missing(answer) or answer.status == 415:
            return False
        if UNKNOWN_ID in answer.content.decode("utf-8", "replace"):
            return True  # the error names the model, so the batch was read
        return answer.status not in (JSON_ONLY if protobuf else (500,))

    def endpoints(self, group: str) -> Finding:
        """Find out which endpoints of a group are missing."""
        endpoints, needed = GROUPS[group]
        if self._protobuf:  # forward then goes to forward_backward
            endpoints = tuple(one for one in endpoints if one is not wire.FORWARD)
        missing = [one for one in endpoints if not self._has(one)]
        details = {
            "offered": [label(one) for one in endpoints if one not in missing],
            "missing": [label(one) for one in missing],
        }
        if not missing:
            return Finding(group, "ok", ", ".join(details["offered"]), details=details)
        text = f"not offered: {', '.join(details['missing'])}"
        if details["offered"]:
            text += f"; offered: {', '.join(details['offered'])}"
        lacks = [label(one) for one in missing if one in needed]
        advice = f"This part of the API does not work without {', '.join(lacks)}." if lacks else ""
        is_vital = bool(lacks) and group == "sessions"
        return Finding(group, "failed" if is_vital else "warning", text, advice, details)

    def _has(self, endpoint: wire.Endpoint[Any]) -> bool:
        """Ask for what does not exist, with a body that no endpoint accepts: changes nothing."""
        headers = {"Content-Type": wire.JSON}
        if endpoint.method == "GET":
            answer = ask(self.transport, "GET", endpoint.path, query={"limit": 1})
        else:
            answer = ask(self.transport, endpoint.method, endpoint.path, b"[]", headers)
        return not is_missing(answer)

    def models(self) -> Finding:
        """Ask for the models that the server offers."""
        answer = ask(self.transport, "GET", wire.CAPABILITIES.path)
        if answer.status >= 300:
            return Finding(
                "models", "warning", f"the server does not name its models: {said(answer)}"
            )
        found = self.transport.decode(wire.CAPABILITIES.result, answer).model_names
        if not found:
            return Finding("models", "warning", "the server names no models")
        more = f" and {len(found) - 10} more" if len(found) > 10 else ""
        return Finding("models", "ok", ", ".join(found[:10]) + more, details={"models": found})
