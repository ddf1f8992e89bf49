"""Virtual environments of their own for single tests, below build/: made once, and then kept."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path


def make_once(folder: Path, make: Callable[[], None]) -> None:
    """Call *make* if *folder* is not made yet; several test processes may want it at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            make()
            (folder / "made").touch()


def borrowing(folder: Path, packages: Sequence[str], *options: str) -> Path:
    """The Python of an environment with *packages*, which borrows what the tests have.

    Args:
        options: of pip.
    """
    found = folder / "bin" / "python"

    def make() -> None:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [found, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, *options, *packages], check=True)
        borrow(folder)

    make_once(folder, make)
    return found


def borrow(folder: Path) -> None:
    """Let the environment in *folder* find all packages of the one that runs this."""
    scheme = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    (Path(scheme["purelib"]) / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
