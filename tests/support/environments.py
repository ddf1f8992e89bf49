"""Separate virtual environments for single tests, below build/: created once and reused."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path


def make_once(folder: Path, make: Callable[[], None]) -> None:
    """Call *make* if *folder* does not exist; safe with several test processes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            make()
            (folder / "made").touch()


def borrowing(folder: Path, packages: Sequence[str], *options: str) -> Path:
    """The Python of an environment with *packages*, plus the packages of the tests.

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
    """Make all packages of the current environment importable in the one in *folder*."""
    scheme = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    (Path(scheme["purelib"]) / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
