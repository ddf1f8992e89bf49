"""
Installs tinkex without extras under each supported Python of this machine, and tries it.

The SDK for remote servers must not need torch, transformers, nor (before its first use) protobuf.
Usage: python tests/check_core_install.py BUILD_DIR
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
HEAVY = ("torch", "transformers", "google.protobuf", "starlette", "uvicorn")
TRY_IMPORT = f"""
import sys, tinkex
tinkex.ServiceClient, tinkex.types.Datum
found = [name for name in {HEAVY!r} if name in sys.modules]
sys.exit(f"import tinkex pulls in {{found}}" if found else 0)
"""
#: Threads of a ThreadPoolExecutor are joined at the end of the program, and the hook that wakes a
#: poll before is private to Python: so each version is tried. This poll would be open for a minute.
LEAVE_A_POLL_OPEN = """
import http.server, json, threading, time, tinkex

polled = threading.Event()
ANSWERS = {"create_session": {"session_id": "s"}, "asample": {"request_id": "r"},
           "create_sampling_session": {"sampling_session_id": "x"}}

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.removeprefix("/api/v1/")
        if path == "retrieve_future":
            polled.set()
            time.sleep(60)
        body = json.dumps(ANSWERS.get(path, {})).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
patience = tinkex.Patience(close=0.01)
url = f"http://127.0.0.1:{server.server_port}"
client = tinkex.ServiceClient(url, "tml-test", patience=patience)
client.create_sampling_client(base_model="tiny").sample([1, 2, 3])
assert polled.wait(20)
"""
DROPPED = "tinkex: the program ended before 1 operation (0 not sent, 1 in progress)"


def main(build: Path) -> int:
    failures = 0
    for version in VERSIONS:
        python = find_python(version)
        if python is None:
            print(f"core on Python {version}: SKIPPED, there is no python{version} here")
            continue
        problem = try_install(python, build.absolute() / version)
        failures += problem is not None
        print(f"core on Python {version}: {'ok' if problem is None else 'FAILED'} ({python})")
        if problem is not None:
            print(problem)
    return 1 if failures else 0


def find_python(version: str) -> str | None:
    """The first python of *version* that really starts: pyenv puts dead shims on PATH."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [shutil.which(f"python{version}")]
    found += sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/python{version}")))
    for python in filter(None, found):
        if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            return python
    return None


def try_install(python: str, venv: Path) -> str | None:
    """Installs the working tree and tries it. None if all is well, or the output of what failed."""
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # modules that no longer exist
    return try_wheel(python, venv, ROOT)


def try_wheel(python: str, venv: Path, package: Path) -> str | None:
    """Installs *package*, a wheel or a source folder, in an empty environment and tries it."""
    shutil.rmtree(venv, ignore_errors=True)
    program, inside = str(venv / "bin" / "tinkex"), str(venv / "bin" / "python")
    pip = [inside, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    # From the venv's own folder, so that it is the installed package that is imported.
    return (
        run([python, "-m", "venv", str(venv)], cwd=ROOT)
        or run([*pip, "-c", "constraints.txt", str(package)], cwd=ROOT)
        or run([inside, "-W", "error", "-c", TRY_IMPORT], cwd=venv)
        or run([inside, "-c", LEAVE_A_POLL_OPEN], cwd=venv, status=1, says=DROPPED, seconds=10)
        or run([program, "version"], cwd=venv)
        or run([program, "serve"], cwd=venv, status=1, says="pip install 'tinkex[local]'")
    )


def run(
    command: list[str], cwd: Path, status: int = 0, says: str = "", seconds: float | None = None
) -> str | None:
    """None if *command* ends with *status* within *seconds* and prints *says*; or its output."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    shown = f"$ {' '.join(command)}\n"
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            text=True,
            stdout=-1,
            stderr=subprocess.STDOUT,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return f"{shown}(still running after {seconds} s)"
    if done.returncode == status and says in done.stdout:
        return None
    return f"{shown}{done.stdout}(exit {done.returncode}, expected {status})"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
