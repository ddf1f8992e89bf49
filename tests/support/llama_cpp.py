"""llama.cpp for tests: llama-cpp-python in a separate environment, under build/llama.

The package index has no wheel of it, and building one takes ten minutes, so it is built only on
request: `make llama`. A wheel that is on the machine is installed within seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.processes import ROOT

BUILD = ROOT / "build" / "llama"
REQUIREMENT = "llama-cpp-python==0.3.36"
WHEEL = "TINKEX_LLAMA_WHEEL"
#: How to get it.
HINT = f"{REQUIREMENT} is not built on this machine: run `make llama`, or name a wheel in {WHEEL}"


def wheel() -> str | None:
    """The wheel named in `WHEEL`, or pip's cached wheel of an earlier build."""
    named = os.environ.get(WHEEL)
    if named:
        return named
    name, version = REQUIREMENT.replace("-", "_").split("==")
    command = [sys.executable, "-m", "pip", "cache", "list", "--format=abspath", name]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    kept = [line for line in listed.split() if Path(line).name.startswith(f"{name}-{version}-")]
    return kept[0] if kept else None


def python(*, build: bool = False) -> Path | None:
    """The environment's Python; None if the package is missing and *build* is False."""
    found = BUILD / "bin" / "python"
    if (BUILD / "done").exists():
        return found
    what = wheel() or (REQUIREMENT if build else None)
    if what is None:
        return None
    subprocess.run([sys.executable, "-m", "venv", "--clear", BUILD], check=True)
    subprocess.run([found, "-m", "pip", "install", "--quiet", what], check=True)
    (BUILD / "done").touch()
    return found


if __name__ == "__main__":
    print(python(build=True))
