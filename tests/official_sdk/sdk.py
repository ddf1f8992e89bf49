"""The official SDK, one virtual environment per version, under build/; and servers to hold it to.

Nothing of it is installed beside tinkex. torch, which the SDK does without until a custom loss
needs it, is borrowed from the Python that runs this, through a .pth file.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import environments

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BUILD = ROOT / "build" / "official-sdk"

#: Oldest to newest; what is new in each: the first with every loss, the last of the JSON era, the
#: first of the protobuf era, the last with load_state, and today's.
VERSIONS = ("0.18.0", "0.24.1", "0.25.0", "0.36.0", "0.38.0")

#: What a version imports without saying that it needs it.
UNDECLARED = {"0.18.0": ["orjson"]}

#: Seconds from the start of a server to its first answer, at most.
START_TIMEOUT = 120.0


def python_of(version: str) -> Path:
    """The Python of an environment with this version of the SDK; made where it is not there yet.

    Raises:
        RuntimeError: If it cannot be made, with the end of pip's output.
    """
    folder = BUILD / version
    python = folder / "bin" / "python"

    def make() -> None:
        base = _new_enough_python()
        _run(base, "-m", "venv", "--clear", folder)
        wanted = [f"tinker=={version}", *UNDECLARED.get(version, ())]
        if base == sys.executable:
            environments.borrow(folder)
        else:
            wanted.append("torch")
        pip = (python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet")
        _run(*pip, "-c", ROOT / "constraints.txt", *wanted)

    environments.make_once(folder, make)
    return python


def _new_enough_python() -> str:
    """This Python, or one from the PATH where this one is too old for the SDK."""
    if sys.version_info >= (3, 11):
        return sys.executable
    for minor in (13, 12, 11):
        found = shutil.which(f"python3.{minor}")
        # What pyenv puts on the PATH runs only if that version is chosen.
        if found and not subprocess.run([found, "-c", ""], capture_output=True).returncode:
            return found
    raise RuntimeError(
        f"tinker needs Python 3.11 or newer; this is {sys.version.split()[0]}, and there is no "
        "python3.11, python3.12 or python3.13 on the PATH that runs."
    )


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(map(str, command))} ended with {done.returncode}. It said:\n"
            f"{(done.stdout + done.stderr)[-2000:]}"
        )


#: `tinkex serve` with other limits, which the command line has no options for.
_WITH_LIMITS = """
import json, sys
from tinkex import cli
from tinkex.server import app, limits
main, chosen = app.main, limits.Limits(**json.loads(sys.argv.pop()))
app.main = lambda **options: main(limits=chosen, **options)
cli.main()
"""


@contextmanager
def server(*options: str, **limits: float) -> Iterator[str]:
    """The address of a separate `tinkex serve`, with an empty home.

    Args:
        options: of `tinkex serve`; limits: of `tinkex.server.limits.Limits`.
    """
    with tempfile.TemporaryDirectory(prefix="tinkex-conformance-") as scratch:
        announce, log = Path(scratch) / "announce.json", Path(scratch) / "log"
        command = ["serve", "--host", "127.0.0.1", "--port", "0", "--announce", str(announce)]
        command += ["--home", str(Path(scratch) / "home"), "--parent-pid", str(os.getpid())]
        program = ["-m", "tinkex", *command, *options]
        if limits:
            program = ["-c", _WITH_LIMITS, *command, *options, json.dumps(limits)]
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, *program],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(),
                cwd=ROOT,
            )
        try:
            yield _address(announce, process, log)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.returncode not in (0, -15):
                print(f"the server ended with {process.returncode}:\n{log.read_text()[-3000:]}")


def _address(announce: Path, process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if announce.exists():
            address: str = json.loads(announce.read_text())["url"]
            return address
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")


def environment() -> dict[str, str]:
    """Ours, less what would tell the SDK or the server of another server or of keys."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TINKER_", "TINKEX_"))}
    return {**kept, "TINKER_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}


def scenario(
    version: str, url: str, *features: str, timeout: float = 900
) -> tuple[list[dict[str, str]], str]:
    """What the scenario says of each feature (or of those whose names hold one of *features*), and
    what the SDK printed for its user on stderr."""
    tokenizer = ROOT / "tinkex" / "engine" / "tiny" / "tokenizer.json"
    done = subprocess.run(
        [str(python_of(version)), str(HERE / "scenario.py"), url, str(tokenizer), *features],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
    )
    if done.returncode:
        raise RuntimeError(f"the scenario with tinker {version} broke off:\n{done.stderr[-3000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"feature"')]
    return [json.loads(line) for line in lines], done.stderr


def surface(version: str) -> str:
    """What surface.py prints in the environment of *version*."""
    command = [str(python_of(version)), str(HERE / "surface.py")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
