"""
The programs in docs/examples: short, and they run as they are, offline, on the built-in model.

Run as a program, it runs them all, each in its own folder below the one that is named, and prints
how long each took and the last line that it printed: python tests/test_examples.py build/examples
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
#: Lines of an example that a person reads in one go.
MAX_LINES = 60


def run(example: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run it in the empty *folder*, without a key, an address or a network."""
    folder.mkdir(parents=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TINKER_")}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    offline = {"HF_HUB_OFFLINE": "1", "TINKEX_HOME": str(folder / "home"), "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, str(example)],
        cwd=folder,
        env={**kept, **offline},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_there_are_ten():
    assert len(EXAMPLES) >= 10


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_what_it_shows(example):
    text = example.read_text()

    assert text.startswith('"""') and len(text.splitlines()) < MAX_LINES
    assert f"({example.name})" in (example.parent / "README.md").read_text()
    compile(text, str(example), "exec")


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example, tmp_path):
    done = run(example, tmp_path / "here")

    assert 0 == done.returncode, done.stderr
    shown = [line for line in (done.stdout + done.stderr).splitlines() if "tinkex: " not in line]
    assert shown  # besides what tinkex reports by itself


def main(folder: Path) -> int:
    failed = 0
    for example in EXAMPLES:
        began = time.monotonic()
        done = run(example, folder.resolve() / example.stem)
        last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
        seconds = time.monotonic() - began
        print(f"{example.stem:<20} {seconds:5.1f} s  {''.join(last)[:100]}", flush=True)
        failed += done.returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
