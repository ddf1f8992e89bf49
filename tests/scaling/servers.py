"""Other training servers of this API: how each is installed in a virtual environment of its own,
and started on a small model, on processors alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import attrs
import requests

from tests.check_core_install import find_python
from tests.support.environments import make_once
from tests.support.processes import ROOT, free_port

BUILD = ROOT / "build" / "scaling"

#: Seconds that pip may take (SkyRL has 7 GB to install), and a server from its start to its answer.
INSTALL_TIMEOUT, START_TIMEOUT = 3600.0, 300.0

#: Seconds that it may take to end.
END_SECONDS = 10.0

KEYS = ("tml-first", "tml-second")

#: What TuFT 0.2.2 needs on processors. Its own list has vLLM and the torch of CUDA in it; here it
#: gets the build of torch that we have.
TUFT_NEEDS = (
    "accelerate>=1",
    "datasets>=4",
    "fastapi>=0.133,<0.137",
    "httpx",
    "huggingface-hub>=1.3,<2",
    "numpy>=2",
    "nvidia-ml-py>=13",
    "omegaconf",
    "opentelemetry-api",
    "opentelemetry-exporter-otlp",
    "opentelemetry-instrumentation-fastapi",
    "opentelemetry-instrumentation-logging",
    "opentelemetry-sdk",
    "peft==0.20.0",
    "protobuf",
    "psutil",
    "ray>=2.50",
    "tinker>=0.25,<0.26",
    f"torch=={version('torch')}",
    "transformers>=5.5.3,<6",
    "typer",
    "uvicorn[standard]>=0.38",
)


class Unavailable(Exception):
    """A server that cannot be installed or started here; the message is what was seen."""


@attrs.frozen
class Server:
    """A server that is compared.

    Attributes:
        pythons: versions of Python that it runs on, the best first; () for our own server.
        installs: arguments of `pip install`, one call each.
        note: what has to be known to read its results.
    """

    name: str
    version: str
    pythons: tuple[str, ...] = ()
    installs: tuple[tuple[str, ...], ...] = ()
    note: str = ""

    @property
    def title(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def folder(self) -> Path:
        return BUILD / f"{self.name.lower()}-{self.version}"


SERVERS = (
    Server("tinkex", "serve", note="our own server, for comparison"),
    Server(
        "SkyRL",
        "0.4.0",
        ("3.12", "3.13"),
        # uv starts its engine; aiohttp is imported, but not among what it says it needs.
        (("skyrl[tinker,jax]==0.4.0", "uv", "aiohttp"),),
        note="JAX on processors",
    ),
    Server(
        "TuFT",
        "0.2.2",
        ("3.11", "3.12"),
        (TUFT_NEEDS, ("--no-deps", "tuft==0.2.2")),
        note="its CPU mode, which is a stand-in: 16 numbers are trained, and samples are made up",
    ),
)


def install(server: Server) -> Path:
    """The folder of the server's programs; made where it is not there yet. Raises Unavailable."""
    if not server.pythons:
        return Path(sys.executable).parent
    base = next(filter(None, map(find_python, server.pythons)), None)
    if base is None:
        raise Unavailable(f"it needs Python {' or '.join(server.pythons)}, and there is none here")

    def make() -> None:
        _run(base, "-m", "venv", "--clear", str(server.folder))
        for packages in server.installs:
            pip = (str(server.folder / "bin" / "python"), "-m", "pip", "install", "--quiet")
            _run(*pip, "--disable-pip-version-check", *packages)

    make_once(server.folder, make)
    return server.folder / "bin"


def _run(*command: str) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as exc:
        raise Unavailable(f"`{' '.join(command[:6])}` took over {exc.timeout:.0f} s") from exc
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        raise Unavailable(" ".join(lines[-3:]) or f"`{command[0]}` ended with {done.returncode}")


def command(server: Server, programs: Path, model: Path, folder: Path, port: int) -> list[str]:
    """What starts the server on 127.0.0.1:*port*; its files go to *folder*."""
    if server.name == "SkyRL":
        room = {"max_lora_adapters": 16, "max_lora_rank": 16}
        return [
            *(str(programs / "uv"), "run", "--no-project", "--python", str(programs / "python")),
            *("-m", "skyrl.tinker.api", "--base-model", str(model), "--backend", "jax"),
            *("--backend-config", json.dumps(room), "--host", "127.0.0.1", "--port", str(port)),
            *("--database-url", f"sqlite:///{folder}/server.db"),
            *("--checkpoints-base", str(folder / "checkpoints")),
        ]
    if server.name == "TuFT":
        settings = {
            "checkpoint_dir": str(folder / "checkpoints"),
            "supported_models": [
                {"model_name": str(model), "model_path": str(model), "max_model_len": 256}
            ],
            "authorized_users": dict(zip(KEYS, ("first", "second"))),
        }
        # YAML, of which JSON is a part
        (folder / "tuft.yaml").write_text(json.dumps(settings))
        tuft = str(programs / "tuft")
        return [tuft, "launch", "--port", str(port), "-c", str(folder / "tuft.yaml")]
    keys = [part for key in KEYS for part in ("--api-key", key)]
    serve = ["-m", "tinkex", "serve", "--port", str(port), "--home", str(folder / "home")]
    return [str(programs / "python"), *serve, "--base-model", str(model), *keys]


def environment(programs: Path, folder: Path) -> Mapping[str, str]:
    """TuFT's CPU mode is asked for by a variable; SkyRL looks for uv on the PATH."""
    own = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "TUFT_CPU_TEST": "1",
        "TUFT_HOME": str(folder / "tuft"),
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
    }
    kept = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    return kept | own


@contextmanager
def running(server: Server, programs: Path, model: Path, folder: Path) -> Iterator[str]:
    """The server's address, while it runs. Its output is in *folder*/server.log.

    Raises:
        Unavailable: If it does not answer, with the end of its output.
    """
    port, log = free_port(), folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command(server, programs, model, folder, port),
            cwd=folder,
            env=environment(programs, folder),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, f"{url}/api/v1/healthz", log)
        yield url
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise Unavailable(f"it ended with {process.returncode}: {' '.join(lines[-3:])}")
        try:
            if requests.get(url, timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(0.5)
    raise Unavailable(f"it did not answer within {START_TIMEOUT:.0f} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    """With the processes that it has started: not every server ends by SIGTERM."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(END_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
