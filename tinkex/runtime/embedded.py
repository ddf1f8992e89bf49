"""The embedded engine: tinkex's training server, started as a child process.

Starts it on a free port of the loopback interface, verifies that this process answers there, and
ends it. Does not know what the engine computes.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tinkex import config, errors

logger = logging.getLogger("tinkex")

#: Most seconds from the start of the child to its first response.
START_TIMEOUT = 120.0

#: The packages that it needs: the extra `local`.
NEEDED = (
    "torch",
    "transformers",
    "safetensors",
    "starlette",
    "uvicorn",
    "zstandard",
    "prometheus_client",
)


class EmbeddedEngine:
    """A child process that serves the API at `base_url` to clients with `api_key`.

    The child holds none of our pipes (its output goes to a file). It ends when `close` is called,
    or with this process, even after kill -9.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], base_url: str, api_key: str, log_path: Path
    ) -> None:
        self._process = process
        self.base_url = base_url
        self.api_key = api_key
        self.log_path = log_path
        self._key_file = config.engine_key_file(base_url)
        _remove_stale_keys(self._key_file.parent)
        _write_private(self._key_file, api_key)
        atexit.register(self.close)

    @classmethod
    def start(cls, *, home: Path | None = None) -> EmbeddedEngine:
        """Start the engine and wait until it answers.

        Raises:
            MissingExtraError: If packages that it needs are not installed.
            EngineError: If it does not start; the message has the end of its log.
        """
        _check_installed()
        home = home or config.home()
        token = secrets.token_urlsafe(32)
        with tempfile.TemporaryDirectory(prefix="tinkex-") as scratch:
            announce = Path(scratch) / "announce.json"
            log_path = _log_file(home)
            logger.info("starting the embedded engine (home %s, log %s)", home, log_path)
            process = _spawn(home, announce, log_path, token)
            try:
                base_url = _wait_for(announce, process, log_path)
                engine = cls(process, base_url, token, log_path)
            except BaseException:
                process.kill()
                process.wait()
                raise
        print(f"tinkex: embedded engine at {base_url} (home {home})", file=sys.stderr)
        return engine

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def obituary(self) -> str | None:
        """An error message if the engine has died; None while it runs."""
        if self.is_running:
            return None
        return (
            f"the embedded engine has died (status {self._process.returncode}). What was saved is "
            "safe: make a new ServiceClient, which starts another, and load the last checkpoint. "
            + _end_of(self.log_path)
        )

    def close(self, timeout: float = 5.0) -> None:
        """End the child; kill it if it takes more than *timeout* seconds. Safe to call twice."""
        atexit.unregister(self.close)
        self._key_file.unlink(missing_ok=True)
        if self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _check_installed() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise errors.MissingExtraError(
            f"the embedded engine needs what is not installed: {', '.join(missing)}. Install it "
            "with: pip install 'tinkex[local]'. To use a server instead, give ServiceClient a "
            "base_url, or set TINKER_BASE_URL."
        )


def _write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read, for pickled clients in other processes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
    except OSError as exc:
        raise _unwritable(path.parent, exc) from exc


def _remove_stale_keys(folder: Path) -> None:
    """Remove key files of engines that were killed together with their parents."""
    for path in folder.glob("*.key"):
        host, _, port = path.stem.rpartition("-")
        try:
            socket.create_connection((host, int(port)), timeout=1.0).close()
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except (OSError, ValueError):
            continue


def _log_file(home: Path) -> Path:
    logs = home / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        old = sorted(logs.glob("embedded-*.log"), key=lambda p: p.stat().st_mtime)[:-20]
    except OSError as exc:
        raise _unwritable(home, exc) from exc
    for path in old:
        path.unlink(missing_ok=True)
    return logs / f"embedded-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"


def _unwritable(folder: Path, exc: OSError) -> errors.EngineError:
    return errors.EngineError(
        f"{folder} cannot be written ({exc.strerror}); set TINKEX_HOME to a folder of yours."
    )


def _spawn(home: Path, announce: Path, log_path: Path, token: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tinkex", "serve", "--host", "127.0.0.1", "--port", "0"]
    command += ["--home", str(home), "--announce", str(announce), "--parent-pid", str(os.getpid())]
    with open(log_path, "ab") as log:
        os.chmod(log_path, 0o600)
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=config.engine_environment(token),
            # Ctrl-C in the terminal goes to this process only, which then ends the child
            # gracefully.
            start_new_session=True,
        )


def _wait_for(announce: Path, process: subprocess.Popen[bytes], log_path: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        told = _announced(announce)
        if told is not None and told["pid"] == process.pid:
            return str(told["url"])
        if process.poll() is not None:
            raise errors.EngineError(
                f"the embedded engine ended with status {process.returncode} before it was ready. "
                + _end_of(log_path)
            )
        time.sleep(0.02)
    raise errors.EngineError(
        f"the embedded engine was not ready after {START_TIMEOUT:.0f} s. {_end_of(log_path)}"
    )


def _announced(path: Path) -> dict[str, Any] | None:
    """The engine's announcement, once the file is complete."""
    try:
        told: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return told


def _end_of(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()[-15:]
    except OSError as exc:
        lines = [f"(unreadable: {exc})"]
    return "\n".join([f"The end of its log, {log}:", *lines])


_shared: EmbeddedEngine | None = None
_users = 0
_shared_lock = threading.Lock()  # guards _shared and _users


def acquire() -> EmbeddedEngine:
    """The engine of this process, started for its first user. Pair with `release`."""
    global _shared, _users
    with _shared_lock:
        if _shared is None or not _shared.is_running:
            _shared, _users = EmbeddedEngine.start(), 0
        _users += 1
        return _shared


def release(engine: EmbeddedEngine, timeout: float = 5.0) -> None:
    """Release the engine; the last user ends it, within *timeout* seconds."""
    global _shared, _users
    with _shared_lock:
        if engine is not _shared:
            return  # it died, and another one was started
        _users -= 1
        last = _users == 0
        if last:
            _shared = None
    if last:
        engine.close(timeout)


def forget_after_fork() -> None:
    """In a forked child: the engine belongs to the parent, so neither use nor end it."""
    global _shared, _users, _shared_lock
    if _shared is not None:
        atexit.unregister(_shared.close)
    _shared, _users, _shared_lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_after_fork)
