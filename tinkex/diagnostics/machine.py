"""Examines this machine: Python, the packages of the extra `local`, the home folder, the engine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from typing import Any

from tinkex import config, wire
from tinkex._version import __version__
from tinkex.conformance.client import said
from tinkex.diagnostics.exchange import ask
from tinkex.diagnostics.steps import Failed, Finding, Limits, Status, Step
from tinkex.runtime import embedded
from tinkex.runtime.transport import Transport

#: Bytes of free disk space: below the first a warning, below the second nothing can be saved.
LITTLE_SPACE, NO_SPACE = 2 << 30, 50 << 20


def steps(engine: Engine, limits: Limits, base_model: str | None) -> list[Step]:
    """The steps that examine this machine, and what *base_model* needs if one is given; the last
    one starts *engine*."""
    found = [
        Step("python", limits.step, _python),
        Step("extras", limits.step, _extras),
        Step("home", limits.step, _home),
        Step("disk", limits.step, _disk),
        Step("device", limits.engine, partial(_device, limits.engine)),
    ]
    if base_model is not None:
        examine = partial(_base_model, base_model, limits.engine)
        found.append(Step("base model", limits.engine, examine))
    return [*found, Step("engine", limits.engine, engine.start)]


def _python() -> Finding:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    details = {"python": platform.python_version(), "tinkex": __version__}
    return Finding("python", "ok", f"tinkex {__version__}, Python {text}", details=details)


def _extras() -> Finding:
    found = {name: _version_of(name) for name in embedded.NEEDED}
    missing = [name for name, version in found.items() if version is None]
    if missing:
        raise Failed(
            f"the embedded engine needs packages that are not installed: {', '.join(missing)}",
            "Run pip install 'tinkex[local]', or name a server: tinkex doctor URL.",
        )
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    return Finding("extras", "ok", text, details=found)


def _version_of(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(unknown version)"


def _home() -> Finding:
    home = config.home()
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as exc:
        raise Failed(
            f"{home} is not writable: {exc.strerror or exc}",
            "Set TINKEX_HOME to a folder that you can write to.",
        ) from exc
    return Finding("home", "ok", f"{home} is writable", details={"home": str(home)})


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


def _device(seconds: float) -> Finding:
    found = _ask_engine(seconds)
    return Finding("device", "ok", found["text"], details=found["details"])


def _base_model(name: str, seconds: float) -> Finding:
    found = _ask_engine(seconds, name)
    advice = found["advice"]
    status: Status = "warning" if advice else "ok"
    return Finding("base model", status, found["text"], advice, found["details"])


def _ask_engine(seconds: float, *arguments: str) -> dict[str, Any]:
    """What `tinkex.engine.requirements` prints, in a separate process: it imports torch, and a
    model's files come from strangers."""
    command = [sys.executable, "-m", "tinkex.engine.requirements", *config.engine_settings()]
    try:
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired as exc:
        raise Failed(f"not finished within {exc.timeout:.0f} s") from exc
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise Failed(lines[-1])
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


class Engine:
    """The embedded engine; `running` is set once it has started."""

    def __init__(self) -> None:
        self.running: embedded.EmbeddedEngine | None = None

    def start(self) -> Finding:
        """Start it, and wait until it can compute."""
        begun = time.monotonic()
        self.running = embedded.acquire()
        answering = time.monotonic() - begun
        transport = Transport(config.load(self.running.base_url, self.running.api_key))
        answer = ask(transport, "GET", wire.HEALTHZ.path)
        while answer.status == 200 and answer.headers.get("X-Tinkex-Engine") == "starting":
            time.sleep(0.1)
            answer = ask(transport, "GET", wire.HEALTHZ.path)
        if answer.status != 200:
            raise Failed(
                f"the engine is not healthy: {said(answer)}",
                f"See its log in {config.home() / 'logs'}.",
            )
        text = f"answered after {answering:.1f} s, ready after {time.monotonic() - begun:.1f} s"
        return Finding("engine", "ok", text)
