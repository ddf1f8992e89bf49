"""
Builds wheel and sdist, checks their contents, and tries the wheel in an empty environment.

Usage: python -m tests.check_dist DIST_DIR BUILD_DIR
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

from tests.check_core_install import ROOT, try_wheel

#: Files of the package that are no Python, and must be in the wheel all the same.
DATA = {".c", ".h", ".json", ".typed", ".html", ".js", ".css", ".svg"}
IN_SDIST = {"setup.py", "setup.cfg", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"}


def package_files() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tinkex").rglob("*")
        if path.suffix in {".py", *DATA}
    }


def build(dist: Path, scratch: Path) -> tuple[Path, Path]:
    """Both archives, made with `build` in an environment that has nothing else."""
    shutil.rmtree(dist, ignore_errors=True)
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # modules that no longer exist
    venv.create(scratch / "builder", clear=True, with_pip=True)
    python = scratch / "builder" / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", "build"], check=True)
    subprocess.run([python, "-m", "build", "--outdir", dist, ROOT], check=True, stdout=-3)
    [wheel], [sdist] = [*dist.glob("*.whl")], [*dist.glob("*.tar.gz")]
    return wheel, sdist


def problems(wheel: Path, sdist: Path) -> list[str]:
    """What is missing from the archives, and what should not be in them."""
    wanted = package_files()
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    return (
        [f"not in the wheel: {name}" for name in sorted(wanted - in_wheel)]
        + [f"should not be in the wheel: {name}" for name in sorted(in_wheel - wanted)]
        + [f"not in the sdist: {name}" for name in sorted((wanted | IN_SDIST) - in_sdist)]
    )


def main(dist: Path, scratch: Path) -> int:
    wheel, sdist = build(dist, scratch)
    found = problems(wheel, sdist)
    if not found and (failure := try_wheel(sys.executable, scratch / "empty", wheel)):
        found = [failure]
    for problem in found:
        print(problem)
    print(f"{wheel.name}, {sdist.name}: {'FAILED' if found else 'ok'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute()))
