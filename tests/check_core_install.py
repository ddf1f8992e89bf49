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
VERSIONS = ("3.10", "3.12", "3.13")
HEAVY = ("torch", "transformers", "google.protobuf", "starlette", "uvicorn")
TRY_IMPORT = f"""
import sys, tinkex
tinkex.ServiceClient, tinkex.types.Datum
found = [name for name in {HEAVY!r} if name in sys.modules]
sys.exit(f"import tinkex pulls in {{found}}" if found else 0)
"""


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
        or run([program, "version"], cwd=venv)
        or run([program, "serve"], cwd=venv, status=1, says="pip install 'tinkex[local]'")
    )


def run(command: list[str], cwd: Path, status: int = 0, says: str = "") -> str | None:
    """None if *command* ends with *status* and its output holds *says*; or its output."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT
    )
    if done.returncode == status and says in done.stdout:
        return None
    return f"$ {' '.join(command)}\n{done.stdout}(exit {done.returncode}, expected {status})"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
