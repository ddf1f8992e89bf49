"""A real server with a fine-tuned model, and the programs in a virtual environment of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.poem import train_poem
from tests.support.processes import ROOT
from tinkex.server.app import LocalServer

REQUIREMENTS = Path(__file__).parent / "requirements.txt"


@pytest.fixture(scope="session")
def programs():
    """The bin folder of the environment; installed again when the requirements change."""
    folder = ROOT / "build" / "clients"
    done = folder / "requirements.txt"
    if not done.exists() or done.read_text() != REQUIREMENTS.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "-r", REQUIREMENTS], check=True)
        done.write_text(REQUIREMENTS.read_text())
    return folder / "bin"


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with LocalServer(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(scope="session")
def tuned(server):
    """A model that knows the poem by heart."""
    path, _ = train_poem(server.url)
    return path


@pytest.fixture
def program(programs, tmp_path):
    """Runs a program to its end, offline; returns what it wrote to stdout."""

    def run(*command):
        environment = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH",)
        }
        environment |= {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "tml-any"}
        done = subprocess.run(
            [programs / command[0], *command[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert 0 == done.returncode, done.stdout + done.stderr
        return done.stdout

    return run
