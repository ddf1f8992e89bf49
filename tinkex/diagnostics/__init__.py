"""What works between here and a server, step by step, and how to fix what does not.

Every step has a time limit. A diagnosis changes nothing on the server: endpoints are detected by
sending bodies that none of them accepts.
"""

from __future__ import annotations

from collections.abc import Iterator

from tinkex import config
from tinkex.diagnostics import machine, steps
from tinkex.diagnostics.server import Server
from tinkex.diagnostics.steps import Finding, Limits, Status
from tinkex.runtime import embedded

_DEFAULT = Limits()


def examine(
    base_url: str | None = None,
    api_key: str | None = None,
    limits: Limits = _DEFAULT,
    *,
    base_model: str | None = None,
) -> Iterator[Finding]:
    """Examine the server named here or in the environment, or else this machine and the engine.

    Yields a finding for each step, until a step fails that the others depend on.

    Args:
        base_model: find out, too, what this model would need on this machine. Nothing is loaded.

    Raises:
        ValueError: If a base model is given for a server.
    """
    if config.wants_embedded(base_url, api_key):
        yield from _examine_machine(limits, base_model)
    elif base_model is not None:
        raise ValueError(
            f"base_model={base_model!r} is examined on this machine only, but a server is named; "
            "omit its URL (TINKER_BASE_URL) and key, or run this on the server's machine."
        )
    else:
        yield from _examine_server(base_url, api_key, limits)


def _examine_machine(limits: Limits, base_model: str | None) -> Iterator[Finding]:
    engine = machine.Engine()
    sound = True
    try:
        for finding in steps.run(machine.steps(engine, limits, base_model)):
            sound = sound and finding.status != "failed"
            yield finding
        if sound and engine.running is not None:
            yield from _examine_server(engine.running.base_url, engine.running.api_key, limits)
    finally:
        if engine.running is not None:
            embedded.release(engine.running)


def _examine_server(base_url: str | None, api_key: str | None, limits: Limits) -> Iterator[Finding]:
    try:
        settings = config.load(base_url, api_key)
    except ValueError as exc:
        yield Finding("settings", "failed", str(exc))
        return
    server = Server(settings, limits)
    try:
        yield from steps.run(server.steps())
    finally:
        server.transport.close()


__all__ = ["Finding", "Limits", "Status", "examine"]
